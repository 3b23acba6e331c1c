#include <algorithm>
#include <cstring>

#include "pgd/row_cpu.h"
#include "pgd/square.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainElements = 8192;

// from(channel): the image that a channel's window is copied from.
template <class From>
void fill_window(const SquareArgs& a, const SquareWindow& w, SquarePlace at, float* to, const From& from) {
  const size_t bytes = static_cast<size_t>(w.width) * sizeof(float);
  for (int64_t c = 0; c < a.channels; ++c) {
    const float* source = from(c);
    for (int64_t r = 0; r < w.height; ++r) {
      const int64_t i = (c * a.height + at.top + r) * a.width + at.left;
      std::memcpy(to + i, source + i, bytes);
    }
  }
}

void row_of(const SquareArgs& a, int64_t row) {
  const int64_t base = row * a.channels * a.height * a.width;
  float *x = a.x + base, *next = a.next + base;
  if (a.hit != nullptr) {
    const bool better = square_better(a, row);
    const float* source = better ? next : x;
    fill_window(a, a.last, square_place(a, row, a.last), better ? x : next, [&](int64_t) { return source; });
    if (better) square_note(a, row);
  }
  if (a.window.height == 0) return;
  Philox4 signs{};
  fill_window(a, a.window, square_place(a, row, a.window), next, [&](int64_t c) {
    if (c % 128 == 0) signs = square_words(a, row, a.window.query, square_sign_block(c));
    return (square_up(signs, c) ? a.high : a.low) + base;
  });
}

}  // namespace

void square_cpu(const SquareArgs& a) {
  const int64_t each =
      a.channels * std::max<int64_t>(1, a.window.height * a.window.width + a.last.height * a.last.width);
  parallel_for(a.batch, std::max<int64_t>(1, kGrainElements / each), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) row_of(a, row);
  });
}

FR_NS_END
