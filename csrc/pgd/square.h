// The Square attack's windows (Andriushchenko et al. 2020, algorithms 2 and 3), drawn from the example's own numbers.
#pragma once

#include <cmath>

#include "core/philox.h"
#include "core/simd.h"
#include "pgd/args.h"

FR_NS_BEGIN

constexpr uint32_t kStreamSquare = 3;

// Words of a query: two places of two words each, then a sign bit for each channel; whole counter blocks.
FR_HD int64_t square_blocks(int64_t channels) { return 2 + (channels + 127) / 128; }

struct SquarePlace {
  int64_t top, left;
};
FR_HD Philox4 square_words(const SquareRows& a, int64_t row, int64_t query, int64_t block) {
  return philox(a.seed, kStreamSquare, static_cast<uint32_t>(a.numbers[row]),
                static_cast<uint64_t>(query * square_blocks(a.channels) + block));
}
// The first (which 0) or second place of a window, from the words of its query's block 0.
FR_HD SquarePlace square_place(const SquareRows& a, const SquareWindow& w, const Philox4& p, int which = 0) {
  const auto at = [](uint32_t u, int64_t places) { return static_cast<int64_t>(u >> 8) * places >> 24; };
  return {at(which == 0 ? p.r[0] : p.r[2], a.height - w.height + 1),
          at(which == 0 ? p.r[1] : p.r[3], a.width - w.width + 1)};
}
FR_HD SquarePlace square_place(const SquareRows& a, int64_t row, const SquareWindow& w) {
  return square_place(a, w, square_words(a, row, w.query, 0));
}
FR_HD bool square_turned(const Philox4& p) { return (p.r[3] & 1u) != 0; }  // no part of a place
// Whether a channel goes up; `p` holds the words of its block.
FR_HD int64_t square_sign_block(int64_t channel) { return 1 + channel / 128; }
FR_HD bool square_up(const Philox4& p, int64_t channel) {
  const int64_t word = channel / 32 % 4;
  const uint32_t u = word == 0 ? p.r[0] : word == 1 ? p.r[1] : word == 2 ? p.r[2] : p.r[3];
  return ((u >> (channel % 32)) & 1u) == 0;
}

// NaN is never the larger score.
FR_HD bool square_better(const SquareRows& a, int64_t row) {
  return (a.score[row] > a.value[row] || a.hit[row] != 0) && a.fooled[row] == 0;
}
FR_HD void square_note(const SquareRows& a, int64_t row) {
  a.value[row] = a.score[row];
  if (a.hit[row] != 0) a.fooled[row] = 1;
}

// ---- norms 2 and 1 (algorithm 3; norm 1: Croce and Hein 2021). Sums are of |d| or d^2; their root is a length. ----
constexpr double kSquareLeast = 1e-12;
FR_HD double square_root(Norm norm, double sum) { return norm == Norm::l2 ? sqrt(sum) : sum; }
// What a channel's new window looks like, before it is given its length.
template <class V>
FR_HD V square_fresh(V pattern, V sign, V old, V old_length) {
  return pattern * sign + old / old_length;
}
// The length of that window: of the two that it replaces, and a part of what is left of the radius. Norm 1 gives more
// than the ball holds: the projection takes from all coordinates.
FR_HD double square_room(Norm norm, double eps, double used, double windows, int64_t channels) {
  const double count = static_cast<double>(channels);
  if (norm == Norm::l2) return sqrt(fmax(eps * eps - used, 0.) / count + windows);
  return fmax(eps - used, 0.) + count * windows;
}
// Norm 2: the whole perturbation goes to the sphere.
FR_HD float square_stretch(Norm norm, double eps, double sum) {
  return norm == Norm::l2 ? static_cast<float>(eps / fmax(sqrt(fmax(sum, 0.)), kSquareLeast)) : 1.f;
}

FR_NS_END
