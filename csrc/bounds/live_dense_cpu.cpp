// Rows of coefficients through one activation and a dense layer to the input: lines, product and extremes in one pass
// over panels of the weight, without the neurons that have no lines. The product itself is never written.
#include <algorithm>
#include <cstring>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "bounds/live_cpu.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 9, kVectors = 3;  // of a product in registers
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kRows = 6, kVectors = 1;
#else
constexpr int kRows = 3, kVectors = 1;
#endif
constexpr int64_t kStride = kMostLiveDense + 32;       // numbers between rows: not a multiple of the cache's ways
constexpr int64_t kGroupNumbers = int64_t{160} << 10;  // of the coefficients that are kept at a time: 640 KB
constexpr int64_t kPanel = int64_t{kVectors} * kLanes;

// Some rows of one side of an example, scaled by their lines.
struct Tile {
  int64_t example = 0, rows = 0, count = 0;  // neurons with lines
  int side = 0;
  int64_t row[kRows];           // in the results
  float low[kRows], up[kRows];  // what the intercepts add
  Vec mid[kRows], size[kRows];
  std::unique_ptr<float[]> values;   // [kRows][kStride]
  std::unique_ptr<int32_t[]> place;  // of a neuron's weights in a panel
  float* kept[kRows];                // where the products go, or null
};

template <Dual kDual>
FR_HD Vec term(Vec v, Vec reach, Vec sum) {
  if constexpr (kDual == Dual::none) return fmadd(vabs(v), reach, sum);
  return norm_term<kDual>(vabs(v * reach), sum);
}

// What a panel's columns, from `column` on, add to the sums of a tile. middle, reach: of the columns, the last ones of
// `width` partly.
template <int kR, int kV, Dual kDual>
void add_panel(Tile& t, const float* panel, const float* middle, const float* reach, int64_t column, int64_t width) {
  Vec acc[kR][kV];
#pragma GCC unroll 9
  for (int r = 0; r < kR; ++r)
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) acc[r][v] = Vec(0.f);
  const float* a = t.values.get();
  const int32_t* place = t.place.get();
  for (int64_t i = 0, n = t.count; i < n; ++i) {
    Vec w[kV];
#pragma GCC unroll 3
    for (int v = 0; v < kV; ++v) w[v] = load(panel + place[i] + v * kLanes);
#pragma GCC unroll 9
    for (int r = 0; r < kR; ++r) {
      const Vec b(a[r * kStride + i]);
#pragma GCC unroll 3
      for (int v = 0; v < kV; ++v) acc[r][v] = fmadd(b, w[v], acc[r][v]);
    }
  }
#pragma GCC unroll 3
  for (int v = 0; v < kV; ++v) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, width - v * kLanes));
    const Vec m = load_n(middle + v * kLanes, n), e = load_n(reach + v * kLanes, n);
#pragma GCC unroll 9
    for (int r = 0; r < kR; ++r) {
      if (t.kept[0] != nullptr) store_n(t.kept[r] + column + v * kLanes, acc[r][v], n);
      t.mid[r] = fmadd(acc[r][v], m, t.mid[r]);
      t.size[r] = term<kDual>(acc[r][v], e, t.size[r]);
    }
  }
}

using PanelFn = void (*)(Tile&, const float*, const float*, const float*, int64_t, int64_t);
template <int kV, Dual kDual, int kR = kRows>
PanelFn pick_rows(int64_t rows) {
  if constexpr (kR > 1)
    if (rows < kR) return pick_rows<kV, kDual, kR - 1>(rows);
  return add_panel<kR, kV, kDual>;
}
template <Dual kDual, int kV = kVectors>
PanelFn pick(int64_t rows, int64_t vectors) {
  if constexpr (kV > 1)
    if (vectors < kV) return pick<kDual, kV - 1>(rows, vectors);
  return pick_rows<kV, kDual>(rows);
}

class Worker {
 public:
  explicit Worker(const ChainArgs& g) : g_(g), s_(g.steps[0]), panel_(s_.channels * kPanel) {
    live_.reserve(s_);
    apart_ = g.rows.sides == 2 && (g.rows.side_stride != 0 || s_.slope_sides == 2);
    shared_ = g.rows.sides == 2 && !apart_;
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t example = begin; example < end; ++example) {
      const int64_t n = g_.starts[example + 1] - g_.starts[example];
      if (n == 0) continue;
      live_.find(s_, LineMaps(s_, g_.examples, example));
      for (int side = 0; side < (apart_ ? 2 : 1); ++side)
        for (int64_t first = 0, left = (n + kRows - 1) / kRows; left > 0; --left) {
          const int64_t rows = (n - first + left - 1) / left;
          if (tiles_ == kMostTiles || held_ > kGroupNumbers) flush();
          enter(example, side, g_.starts[example] + first, rows);
          first += rows;
        }
    }
    flush();
  }

 private:
  static constexpr int kMostTiles = 128;

  void enter(int64_t example, int side, int64_t first, int64_t rows) {
    Tile& t = tile_[tiles_++];
    if (t.values == nullptr) {
      t.values.reset(new float[kRows * kStride]);
      t.place.reset(new int32_t[kMostLiveDense + kLanes]);
    }
    t.example = example, t.rows = rows, t.side = side, t.count = live_.count;
    held_ += rows * live_.count;
    for (int64_t i = 0; i < live_.count; ++i)
      t.place[static_cast<size_t>(i)] = live_.channel[static_cast<size_t>(i)] * static_cast<int32_t>(kPanel);
    const Rows& g = g_.rows;
    const LineMaps map(s_, g_.examples, example);
    const float *il = side == 0 ? map.low : map.up, *iu = side == 0 ? map.up : map.low;
    const float *sl = side == 0 ? map.slope_low : map.slope_up, *su = side == 0 ? map.slope_up : map.slope_low;
    for (int64_t k = 0; k < rows; ++k) {
      const int64_t row = g_.order != nullptr ? g_.order[first + k] : first + k;
      t.row[k] = row;
      t.kept[k] = s_.kept != nullptr ? s_.kept + (side * g.count + row) * columns_ : nullptr;
      const float* a = g.a + side * g.side_stride + (g.pick != nullptr ? g.pick[row] : row) * g.length;
      const float* less = g.minus != nullptr ? g.a + side * g.side_stride + g.minus[row] * g.length : nullptr;
      float* to = t.values.get() + k * kStride;
      Vec low(0.f), up(0.f);
      for (int64_t at = 0; at < g.length; at += kLanes) {
        const int n = static_cast<int>(std::min<int64_t>(kLanes, g.length - at));
        const auto get = [&](const float* p)
                             FR_INLINE_LAMBDA { return n == kLanes ? load(p + at) : load_n(p + at, n); };
        Vec v = get(a);
        if (less != nullptr) v = v - get(less);
        const Vec lower = get(il), upper = get(iu), slope_low = get(sl), slope_up = get(su);
        low = fmadd(v, by_sign(v, lower, upper), low);
        if (shared_) up = fmadd(v, by_sign(v, upper, lower), up);
        to = LiveList::compress(live_.mask[static_cast<size_t>(at / kLanes)], v * by_sign(v, slope_low, slope_up), to);
      }
      t.low[k] = lane_sum(low), t.up[k] = lane_sum(up);
      t.mid[k] = t.size[k] = Vec(0.f);
    }
  }

  // The tiles that are held, panel by panel.
  void flush() {
    const ConcretizeArgs& e = g_.end;
    const bool box = e.center != nullptr;
    const int64_t columns = columns_;
    for (int64_t at = 0; at < columns && tiles_ > 0; at += kPanel) {
      const int64_t width = std::min(kPanel, columns - at), vectors = (width + kLanes - 1) / kLanes;
      for (int64_t k = 0; k < s_.channels; ++k)
        for (int64_t v = 0; v < vectors; ++v) {
          const float* w = s_.weight + k * s_.lanes + at + v * kLanes;
          const int n = static_cast<int>(std::min<int64_t>(kLanes, width - v * kLanes));
          store(panel_.get() + k * kPanel + v * kLanes, n == kLanes ? load(w) : load_n(w, n));
        }
      for (int i = 0; i < tiles_; ++i) {
        Tile& t = tile_[i];
        const int64_t map = t.example * columns + at;
        product(e.dual, t.rows, vectors)(t, panel_.get(), (box ? e.center : e.x) + map, (box ? e.radius : e.eps) + map,
                                         at, width);
      }
    }
    for (int i = 0; i < tiles_; ++i) leave(tile_[i]);
    tiles_ = 0, held_ = 0;
  }

  static PanelFn product(Dual dual, int64_t rows, int64_t vectors) {
    switch (dual) {
      case Dual::l1:
        return pick<Dual::l1>(rows, vectors);
      case Dual::l2:
        return pick<Dual::l2>(rows, vectors);
      case Dual::linf:
        return pick<Dual::linf>(rows, vectors);
      default:
        return pick<Dual::none>(rows, vectors);
    }
  }

  // The square of a row's l2 norm at the input, in double.
  double squares_of_row(const Tile& t, int64_t k) const {
    double sum = 0.;
    for (int64_t column = 0; t.count > 0 && column < columns_; ++column) {
      float a = 0.f;
      for (int64_t i = 0; i < t.count; ++i)
        a += t.values[static_cast<size_t>(k * kStride + i)] *
             s_.weight[t.place[static_cast<size_t>(i)] / kPanel * s_.lanes + column];
      const float w = a * g_.end.eps[t.example * columns_ + column];
      sum += static_cast<double>(w) * w;
    }
    return sum;
  }

  void leave(const Tile& t) {
    for (int64_t k = 0; k < t.rows; ++k) {
      const float mid = lane_sum(t.mid[k]);
      float size = norm_of(t.size[k], g_.end.dual);
      if (g_.end.dual == Dual::l2) size = root_of_squares(size, [&] { return squares_of_row(t, k); });
      const auto put = [&](int side, float offset) {
        const int64_t at = side * g_.rows.count + t.row[k];
        g_.end.out[at] = g_.b[at] + offset + (side == 1 ? mid + size : mid - size);
      };
      put(t.side, t.low[k]);
      if (shared_) put(1, t.up[k]);
    }
  }

  const ChainArgs& g_;
  const ChainStep& s_;
  const int64_t columns_ = s_.out_height * s_.out_width * s_.out_channels;
  Floats panel_;
  LiveList live_;
  Tile tile_[kMostTiles];
  int tiles_ = 0;
  int64_t held_ = 0;
  bool apart_ = false, shared_ = false;
};

}  // namespace

void live_dense_cpu(const ChainArgs& g) {
  parallel_for(g.examples, 1, [&](int64_t begin, int64_t end) { Worker(g).run(begin, end); });
}

FR_NS_END
