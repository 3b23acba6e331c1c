// The adjoint of a convolution: for a few positions at a time the products with every tap, from registers, which are
// then added where they belong. Positions are independent, so a result does not depend on what else is computed.
#include <algorithm>
#include <cstring>

#include "bounds/depthwise_cpu.h"
#include "bounds/entry_cpu.h"
#include "bounds/patches_cpu.h"
#include "bounds/serial_cpu.h"
#include "bounds/taps.h"
#include "core/floats.h"
#include "core/quads.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kTarget = 6144;  // taps that stay in the first cache

FR_HD void add_quad(float* o, const float* v) { store_quad(o, load_quad(o) + load_quad(v)); }

FR_HD void add_to(float* FR_RESTRICT o, const float* FR_RESTRICT v, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(o + i, load(o + i) + load(v + i));
  for (; i + 4 <= n; i += 4) add_quad(o + i, v + i);
  for (; i < n; ++i) o[i] += v[i];
}

// Where the taps of one row of positions go.
struct Place {
  float* out;                    // of the example
  int64_t top, first_y, last_y;  // of the taps that lie on it
  int64_t left;                  // of position 0
};

// One line of taps of every position. Neighbours overlap, so they are visited in turns in which they do not: a load
// would otherwise wait for the stores before it. The order is the same for every row of positions of this geometry.
template <bool kQuad>
void add_lines(const SpreadArgs& g, const Place& at, const float* taps) {
  const int64_t turns = (g.kernel_w + g.stride_x - 1) / g.stride_x, line = g.kernel_w * g.out_c;
  for (int64_t turn = 0; turn < turns; ++turn)
    for (int64_t x = turn; x < g.in_w; x += turns) {
      const int64_t left = at.left + x * g.stride_x;
      const float* t = taps + x * g.lanes;
      if (left >= 0 && left + g.kernel_w <= g.out_w) {
        for (int64_t ky = at.first_y; ky < at.last_y; ++ky) {
          float* o = at.out + ((at.top + ky * g.dilation_y) * g.out_w + left) * g.out_c;
          if constexpr (kQuad)
            add_quad(o, t + ky * 4);
          else
            add_to(o, t + ky * line, line);
        }
        continue;
      }
      const int64_t first = std::max<int64_t>(0, -left);
      const int64_t count = (std::min(g.kernel_w, g.out_w - left) - first) * g.out_c;
      for (int64_t ky = at.first_y; ky < at.last_y; ++ky)
        add_to(at.out + ((at.top + ky * g.dilation_y) * g.out_w + left + first) * g.out_c,
               t + ky * line + first * g.out_c, count);
    }
}

// The same where neighbours of a line of taps are not neighbours on the output.
void add_taps_apart(const SpreadArgs& g, const Place& at, const float* taps) {
  for (int64_t x = 0; x < g.in_w; ++x)
    for (int64_t ky = at.first_y; ky < at.last_y; ++ky)
      for (int64_t kx = 0; kx < g.kernel_w; ++kx) {
        const int64_t column = at.left + x * g.stride_x + kx * g.dilation_x;
        if (column < 0 || column >= g.out_w) continue;
        add_to(at.out + ((at.top + ky * g.dilation_y) * g.out_w + column) * g.out_c,
               taps + x * g.lanes + (ky * g.kernel_w + kx) * g.out_c, g.out_c);
      }
}

// The taps of one row of positions, `row` counted over all examples.
FR_HD void add_row(const SpreadArgs& g, int64_t row, const float* taps) {
  const int64_t item = row / g.in_h, y = row % g.in_h, size = g.out_h * g.out_w * g.out_c;
  float* out = g.out + item * size;
  if (y == 0) std::memset(out, 0, static_cast<size_t>(size) * sizeof(float));
  Place at{out, y * g.stride_y - g.pad_y, 0, 0, -g.pad_x};
  at.first_y = std::max<int64_t>(0, (g.dilation_y - 1 - at.top) / g.dilation_y);
  at.last_y = at.top >= g.out_h ? 0 : std::min(g.kernel_h, (g.out_h - 1 - at.top) / g.dilation_y + 1);
  if (g.dilation_x != 1)
    add_taps_apart(g, at, taps);
  else if (g.kernel_w * g.out_c == 4)
    add_lines<true>(g, at, taps);
  else
    add_lines<false>(g, at, taps);
}

// Taps of four numbers a line, of one channel: positions whose lines do not overlap lie side by side on the output and
// are kept as one line, and each line of the output is written once, as the sum of what belongs to it.
class Lines {
 public:
  // Whether the lines of a row of positions lie side by side, and enough of them fit.
  static bool serve(const SpreadArgs& g) {
    return g.lanes == kLanes && g.kernel_w == 4 && g.out_c == 1 && 4 % g.stride_x == 0 && g.pad_x < kLanes &&
           g.dilation_y == 1 && g.dilation_x == 1 && Lines(g).numbers() <= kMost;
  }
  explicit Lines(const SpreadArgs& g)
      : g_(g),
        turns_(4 / g.stride_x),
        slots_((g.kernel_h + g.stride_y - 1) / g.stride_y),
        width_(kLanes + std::max(whole(4 * ((g.in_w + turns_ - 1) / turns_)), whole(g.out_w) + whole(g.pad_x))) {}

  // From the example `item` on.
  void start(int64_t item) {
    std::memset(held_, 0, static_cast<size_t>(numbers()) * sizeof(float));
    out_ = g_.out + item * g_.out_h * g_.out_w;
    y_ = slot_ = 0;
  }

  // The taps of the next row of positions.
  void add(const float* taps) {
    for (int64_t turn = 0; turn < turns_; ++turn)
      for (int64_t x = turn, at = kLanes; x < g_.in_w; x += 4 * turns_, at += kLanes) four(turn, x, at, taps);
    const int64_t top = y_ * g_.stride_y - g_.pad_y;
    const int64_t begin = y_ == 0 ? 0 : std::clamp<int64_t>(top, 0, g_.out_h);
    const int64_t end = y_ + 1 == g_.in_h ? g_.out_h : std::clamp(top + g_.stride_y, begin, g_.out_h);
    for (int64_t line = begin; line < end; ++line) write(line - top, out_ + line * g_.out_w);
    if (++slot_ == slots_) slot_ = 0;
    if (++y_ < g_.in_h) return;
    y_ = 0;
    out_ += g_.out_h * g_.out_w;
  }

 private:
  static constexpr int64_t kMost = 8192;
  static int64_t whole(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }
  int64_t numbers() const { return slots_ * g_.kernel_h * turns_ * width_; }
  float* line_of(int64_t slot, int64_t ky) { return held_ + (slot * g_.kernel_h + ky) * turns_ * width_; }

  // The lines of positions x, x + turns, ... side by side; zero beyond the last.
  void four(int64_t turn, int64_t x, int64_t at, const float* taps) {
    const int64_t left = (g_.in_w - x + turns_ - 1) / turns_, apart = turns_ * g_.lanes;
    const float* t = taps + x * g_.lanes;
    float* to = line_of(slot_, 0) + turn * width_ + at;
    const int64_t next = turns_ * width_;
#if defined(__AVX512F__)
    if (g_.kernel_h == 4) {
      const __m512 zero = _mm512_setzero_ps();
      const __m512 a = load(t).v, b = left > 1 ? load(t + apart).v : zero, c = left > 2 ? load(t + 2 * apart).v : zero,
                   d = left > 3 ? load(t + 3 * apart).v : zero;
      const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44), cd = _mm512_shuffle_f32x4(c, d, 0x44);  // lines 0 and 1
      const __m512 AB = _mm512_shuffle_f32x4(a, b, 0xEE), CD = _mm512_shuffle_f32x4(c, d, 0xEE);
      store(to, _mm512_shuffle_f32x4(ab, cd, 0x88));
      store(to + next, _mm512_shuffle_f32x4(ab, cd, 0xDD));
      store(to + 2 * next, _mm512_shuffle_f32x4(AB, CD, 0x88));
      store(to + 3 * next, _mm512_shuffle_f32x4(AB, CD, 0xDD));
      return;
    }
#endif
    for (int64_t ky = 0; ky < g_.kernel_h; ++ky)
      for (int64_t k = 0; k < std::min<int64_t>(4, left); ++k)
        std::memcpy(to + ky * next + 4 * k, t + k * apart + 4 * ky, 4 * sizeof(float));
  }

  // A line of the output that no later row of positions reaches: line `tap` of this one's taps.
  void write(int64_t tap, float* out) {
    for (int64_t i = 0; i < g_.out_w; i += kLanes) {
      Vec sum(0.f);
      int64_t ky = tap, slot = slot_;
      for (int64_t back = std::min(y_ + 1, slots_); back > 0; --back, ky += g_.stride_y) {
        if (ky >= 0 && ky < g_.kernel_h) {
          const float* held = line_of(slot, ky) + kLanes + i + g_.pad_x;
          for (int64_t turn = 0; turn < turns_; ++turn) sum = sum + load(held + turn * (width_ - g_.stride_x));
        }
        slot = slot == 0 ? slots_ - 1 : slot - 1;
      }
      if (i + kLanes <= g_.out_w)
        store(out + i, sum);
      else
        store_n(out + i, sum, static_cast<int>(g_.out_w - i));
    }
  }

  const SpreadArgs& g_;
  const int64_t turns_, slots_, width_;
  float* out_ = nullptr;  // of this example
  int64_t y_ = 0, slot_ = 0;
  alignas(64) float held_[kMost];
};

template <int kTaps, class AddRow>
void spread_range(const SpreadArgs& g, int64_t begin, int64_t end, const AddRow& add) {
  constexpr int kPositions = positions_for(kTaps);
  alignas(64) float taps[kSpreadBuffer];
  const int64_t stop = end * g.in_h * g.in_w;
  const bool blocked = g.lanes > kTaps * kLanes && (end - begin) * g.in_h * g.in_w >= 16 * kPositions;
  const Floats blocks(blocked ? g.in_c * g.lanes : 0);
  if (blocked) block_weights<kTaps>(g.in_c, g.lanes, g.weight, blocks.get());
  const float* weight = blocked ? blocks.get() : g.weight;
  const int64_t target = std::max<int64_t>(1, kTarget / (g.in_w * g.lanes)) * g.in_w;  // whole rows of positions
  int64_t base = begin * g.in_h * g.in_w, filled = 0;                                  // taps of [base, base + filled)
  while (base < stop) {
    const int64_t wanted = std::min(target, stop - base);
    while (filled < wanted) {
      const float* a = g.a + (base + filled) * g.in_c;
      if (base + filled + kPositions <= stop) {
        all_products<kTaps, kPositions>(g.in_c, g.in_c, g.lanes, a, weight, blocked, taps + filled * g.lanes);
        filled += kPositions;
      } else {
        all_products<kTaps, 1>(g.in_c, g.in_c, g.lanes, a, weight, blocked, taps + filled * g.lanes);
        ++filled;
      }
    }
    const int64_t rows = filled / g.in_w, used = rows * g.in_w;
    for (int64_t row = 0; row < rows; ++row) add(base / g.in_w + row, taps + row * g.in_w * g.lanes);
    std::memmove(taps, taps + used * g.lanes, static_cast<size_t>((filled - used) * g.lanes) * sizeof(float));
    base += used;
    filled -= used;
  }
}

template <int kTaps>
void spread_rows(const SpreadArgs& g, int64_t begin, int64_t end) {
  if (kTaps == 1 && Lines::serve(g)) {
    Lines lines(g);
    lines.start(begin);
    spread_range<kTaps>(g, begin, end, [&](int64_t, const float* taps) { lines.add(taps); });
  } else {
    spread_range<kTaps>(g, begin, end, [&](int64_t row, const float* taps) { add_row(g, row, taps); });
  }
}

void spread_group(const SpreadArgs& g, int64_t begin, int64_t end) {
  using Fn = void (*)(const SpreadArgs&, int64_t, int64_t);
  const int64_t vectors = g.lanes / kLanes;
  Fn f = spread_rows<kTapBlock>;
  if constexpr (kTapBlock == 4) {
    if (vectors <= 3)
      f = vectors == 1 ? spread_rows<1> : vectors == 2 ? spread_rows<2> : spread_rows<3>;
    else if (vectors % 4 != 0 && vectors % 3 == 0)
      f = spread_rows<3>;
  }
  f(g, begin, end);
}

// One channel a group and as many of the result.
void spread_depthwise(const SpreadArgs& g, int64_t begin, int64_t end) {
  Depthwise d{g.in_h,     g.in_w,     g.out_h, g.out_w, g.out_c,      g.kernel_h,  g.kernel_w,
              g.stride_y, g.stride_x, g.pad_y, g.pad_x, g.dilation_y, g.dilation_x};
  const Floats weight(d.numbers());
  d.turn(g.weight, g.lanes, weight.get());
  for (int64_t i = begin; i < end; ++i) {
    std::fill_n(g.out + i * d.image(), d.image(), 0.f);
    d.spread(g.a + i * d.result(), weight.get(), g.out + i * d.image());
  }
}

// Group by group: the channels of one are copied out of the rows and into them, which is little beside the products.
void spread_groups(const SpreadArgs& g, int64_t begin, int64_t end) {
  SpreadArgs one = g;
  one.groups = 1, one.in_c = g.in_c / g.groups, one.out_c = g.out_c / g.groups;
  const int64_t some = 8, in = g.in_h * g.in_w, out = g.out_h * g.out_w;
  const Floats a(some * in * one.in_c), found(some * out * one.out_c);
  one.a = a.get(), one.out = found.get();
  for (int64_t i = begin; i < end; i += some) {
    const int64_t n = std::min(some, end - i);
    for (int64_t k = 0; k < g.groups; ++k) {
      one.weight = g.weight + k * one.in_c * g.lanes;
      copy_channels(g.a + i * in * g.in_c + k * one.in_c, n * in, one.in_c, g.in_c, a.get(), one.in_c);
      spread_group(one, 0, n);
      copy_channels(found.get(), n * out, one.out_c, one.out_c, g.out + i * out * g.out_c + k * one.out_c, g.out_c);
    }
  }
}

}  // namespace

void spread_items(const SpreadArgs& g, int64_t begin, int64_t end) {
  if (g.groups == 1) return spread_group(g, begin, end);
  if (begin >= end) return;
  g.groups == g.in_c&& g.groups == g.out_c ? spread_depthwise(g, begin, end) : spread_groups(g, begin, end);
}

void spread_cpu(const SpreadArgs& g) {
  const int64_t work = g.in_h * g.in_w * g.in_c * g.lanes / kLanes;
  parallel_for(g.count, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, work)),
               [&](int64_t begin, int64_t end) { spread_items(g, begin, end); });
}

FR_NS_END
