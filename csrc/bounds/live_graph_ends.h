// The rows in the lanes where they have reached the input: their extremes over the input set, or the linear bounds
// there.
#pragma once

#include <algorithm>

#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "bounds/live_graph.h"
#include "bounds/live_products.h"

FR_NS_BEGIN

// Up to kM kLanes rows of one group, of both sides one after the other where they have coefficients of their own.
template <int kM>
class GraphRows {
 protected:
  explicit GraphRows(GraphWork& work) : g_(work.g), work_(work) {}

  template <class F>
  FR_HD static void each(const F& f) {
#pragma GCC unroll 4
    for (int m = 0; m < kM; ++m) f(m);
  }
  // The numbers of one line of a rectangle: of neurons in `alive`, or of the input itself.
  Run line_of(int stage, int64_t y) const {
    const Rect& r = work_.rects[stage];
    const GraphStage& s = g_.stages[stage];
    if (work_.last(stage)) return {(y * s.map_width + r.left) * s.channels, (y * s.map_width + r.right) * s.channels};
    const int64_t* start = work_.alive[static_cast<size_t>(stage)].start.get() + y * s.map_width;
    return {start[r.left], start[r.right]};
  }

  // f(side, lane, what the neurons on the way have added to b)
  template <class F>
  void offsets(const F& f) const {
    float low[kM * kLanes], up[kM * kLanes];
    each([&](int m) { store(low + m * kLanes, low_[m]), store(up + m * kLanes, up_[m]); });
    for (int64_t i = 0; i < n_; ++i) {
      f(side_[i], i, low[i] + lost_[i]);
      if (shared_) f(1, i, up[i] + lost_[i]);
    }
  }

  // The linear bounds at the input, as they are asked for.
  void hand_out() {
    const GraphStage& s = g_.stages[g_.count - 1];
    const Rect& r = work_.rects[g_.count - 1];
    const bool whole = g_.window_height == 0;
    const int64_t height = whole ? s.map_height : g_.window_height, width = whole ? s.map_width : g_.window_width;
    const int64_t top = whole ? 0 : r.top, left = whole ? 0 : r.left, length = height * width * s.channels;
    float* rows[kM * kLanes];
    for (int64_t i = 0; i < n_; ++i) {
      rows[i] = g_.map + ((work_.apart ? side_[i] * g_.rows : 0) + row_[i]) * length;
      if (r.bottom - r.top < height || r.right - r.left < width) std::fill_n(rows[i], length, 0.f);
      if (!whole) g_.map_y[row_[i]] = top, g_.map_x[row_[i]] = left;
    }
    for (int64_t y = r.top; y < r.bottom; ++y) {
      const Run run = line_of(g_.count - 1, y);
      const int64_t to = ((y - top) * width + r.left - left) * s.channels;
      for (int64_t k = run.begin; k < run.end; k += kLanes) {
        const float* v = work_.values(g_.count - 1) + k * kM * kLanes;
        const int64_t n = std::min<int64_t>(kLanes, run.end - k);
        for (int64_t i = 0; i < n_; ++i)
          for (int64_t j = 0; j < n; ++j) rows[i][to + k - run.begin + j] = v[j * kM * kLanes + i];
      }
    }
    offsets([&](int side, int64_t i, float offset) {
      const int64_t at = side * g_.rows + row_[i];
      g_.offset[at] = g_.b[at] + offset;
    });
  }

  // The extremes over the input set.
  void leave() {
    if (g_.map != nullptr) hand_out();
    if (g_.end.out == nullptr) return;
    const ConcretizeArgs& e = g_.end;
    const int input = g_.count - 1;
    const GraphStage& s = g_.stages[input];
    const int64_t base = work_.example * s.map_height * s.map_width * s.channels;
    const bool box = e.center != nullptr;
    const float *middle = (box ? e.center : e.x) + base, *reach = (box ? e.radius : e.eps) + base;
    Vec mid[kM], size[kM];
    each([&](int m) { mid[m] = size[m] = Vec(0.f); });
    const auto end = [&](const auto& term) FR_INLINE_LAMBDA {
      for (int64_t y = work_.rects[input].top; y < work_.rects[input].bottom; ++y) {
        const Run run = line_of(input, y);
        Vec a[kM], b[kM];
        each([&](int m) FR_INLINE_LAMBDA { a[m] = b[m] = Vec(0.f); });
        for (int64_t i = run.begin; i < run.end; ++i) {
          const Vec c(middle[i]), r(reach[i]);
          each([&](int m) FR_INLINE_LAMBDA {
            const Vec v = load(work_.values(input) + (i * kM + m) * kLanes);
            a[m] = fmadd(v, c, a[m]);
            b[m] = term(v, r, b[m]);
          });
        }
        each([&](int m) FR_INLINE_LAMBDA {
          mid[m] = mid[m] + a[m];
          size[m] = e.dual == Dual::linf ? vmax_nan(size[m], b[m]) : size[m] + b[m];
        });
      }
    };
    if (!work_.rects[input].empty()) with_term(box, e.dual, end);
    float centre[kM * kLanes], length[kM * kLanes];
    each([&](int m) {
      store(centre + m * kLanes, mid[m]);
      store(length + m * kLanes, size[m]);
    });
    for (int64_t i = 0; i < n_ && e.dual == Dual::l2 && !box; ++i)
      length[i] = root_of_squares(length[i], [&] {
        double wide = 0.;
        for (int64_t y = work_.rects[input].top; y < work_.rects[input].bottom; ++y) {
          const Run run = line_of(input, y);
          for (int64_t k = run.begin; k < run.end; ++k) {
            const float w = work_.values(input)[k * kM * kLanes + i] * reach[k];
            wide += static_cast<double>(w) * w;
          }
        }
        return wide;
      });
    offsets([&](int side, int64_t i, float offset) {
      const int64_t at = side * g_.rows + row_[i];
      const float end_of = side == 1 ? centre[i] + length[i] : centre[i] - length[i];
      e.out[at] = g_.b[at] + offset + end_of;
    });
  }
  const GraphArgs& g_;
  GraphWork& work_;
  int64_t n_ = 0;
  int64_t row_[kM * kLanes];
  int side_[kM * kLanes];
  float lost_[kM * kLanes];  // NaN where a row has what is no number
  Vec low_[kM], up_[kM];
  bool shared_ = false;  // one row of coefficients for both sides
};

FR_NS_END
