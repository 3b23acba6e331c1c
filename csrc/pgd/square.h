// Where the Square attack's windows lie (Andriushchenko et al. 2020, algorithm 2), from the example's own numbers.
#pragma once

#include "core/philox.h"
#include "pgd/args.h"

FR_NS_BEGIN

constexpr uint32_t kStreamSquare = 3;

// Words of a query: two places of two words each, then a sign bit for each channel; whole counter blocks.
FR_HD int64_t square_blocks(int64_t channels) { return 2 + (channels + 127) / 128; }

struct SquarePlace {
  int64_t top, left;
};
FR_HD Philox4 square_words(const SquareArgs& a, int64_t row, int64_t query, int64_t block) {
  return philox(a.seed, kStreamSquare, static_cast<uint32_t>(a.numbers[row]),
                static_cast<uint64_t>(query * square_blocks(a.channels) + block));
}
FR_HD SquarePlace square_place(const SquareArgs& a, int64_t row, const SquareWindow& w) {
  const Philox4 p = square_words(a, row, w.query, 0);
  const auto at = [](uint32_t u, int64_t places) { return static_cast<int64_t>(u >> 8) * places >> 24; };
  return {at(p.r[0], a.height - w.height + 1), at(p.r[1], a.width - w.width + 1)};
}
// Whether a channel goes up; `p` holds the words of its block.
FR_HD int64_t square_sign_block(int64_t channel) { return 1 + channel / 128; }
FR_HD bool square_up(const Philox4& p, int64_t channel) {
  const int64_t word = channel / 32 % 4;
  const uint32_t u = word == 0 ? p.r[0] : word == 1 ? p.r[1] : word == 2 ? p.r[2] : p.r[3];
  return ((u >> (channel % 32)) & 1u) == 0;
}

// NaN is never the larger score.
FR_HD bool square_better(const SquareArgs& a, int64_t row) {
  return (a.score[row] > a.value[row] || a.hit[row] != 0) && a.fooled[row] == 0;
}
FR_HD void square_note(const SquareArgs& a, int64_t row) {
  a.value[row] = a.score[row];
  if (a.hit[row] != 0) a.fooled[row] = 1;
}

FR_NS_END
