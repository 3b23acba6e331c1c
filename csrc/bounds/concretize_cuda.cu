// Extremes of linear bounds over boxes, balls and their intersections on CUDA: one block a row and side.
#include "bounds/formulas.h"
#include "bounds/kernels.h"
#include "bounds/support.h"
#include "bounds/window.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

// body(v, map position) at every position of a row that lies on the map
template <class Body>
__device__ __forceinline__ void each(const Rows& r, int64_t row, int side, Body body) {
  for (int64_t i = threadIdx.x; i < r.length; i += kThreads) {
    const int64_t m = map_of(r, row, i);
    if (m >= 0) body(coefficient(r, row, side * r.side_stride, i), m);
  }
}

// ||.||_q of what the threads saw: sums, or the largest and whether there was a NaN
template <Dual kDual>
struct Norm {
  double sum = 0.;
  float top = 0.f;
  __device__ __forceinline__ void add(float w) {
    if (kDual == Dual::l2) sum += static_cast<double>(w) * w;
    if (kDual == Dual::l1) sum += static_cast<double>(w);
    if (kDual == Dual::linf) {
      top = vmax(w, top);
      sum += w == w ? 0. : 1.;
    }
  }
  __device__ __forceinline__ double result() {
    const double total = block_sum(sum);
    if (kDual == Dual::linf) {
      const double highest = block_max(top);
      return total > 0. ? static_cast<double>(nanf("")) : highest;
    }
    return kDual == Dual::l2 ? sqrt(total) : total;
  }
};

template <Dual kDual>
__device__ double extreme_of_both(const ConcretizeArgs& g, int64_t row, int side, int64_t base) {
  const Rows& r = g.rows;
  const bool maximum = side == 1;
  const auto room_at = [&](float v, int64_t m) {
    return room_of(v, maximum, g.center[m], g.radius[m], g.x[m], g.eps[m]);
  };
  LevelSearch<kDual> search;
  float scale = 1.f;  // of w, so that its squares are floats
  const auto begin = [&] {
    double spent = 0., other = 0., size = 0.;
    float top = 0.f;
    each(r, row, side, [&](float v, int64_t i) {
      const int64_t m = base + i;
      const float w = vabs(v * g.eps[m]) * scale;
      float s = 0.f, o = 0.f;
      search_terms<kDual>(w, room_at(v, m), 0.f, s, o);
      spent += s, other += o, size += static_cast<double>(w) * w, top = vmax(w, top);
    });
    spent = block_sum(spent), other = block_sum(other), size = block_sum(size);
    const double highest = block_max(top);
    search.start(spent, other, kDual == Dual::l2 ? size : highest);
    return size;
  };
  const double squares = begin();
  if (kDual == Dual::l2 && !search.done && (scale = scale_of_squares(squares)) != 1.f) begin();
  while (!search.done) {  // the same on every thread: so are the sums
    double spent = 0., other = 0.;
    const float level = static_cast<float>(search.level);
    each(r, row, side, [&](float v, int64_t i) {
      const int64_t m = base + i;
      float s = 0.f, o = 0.f;
      search_terms<kDual>(vabs(v * g.eps[m]) * scale, room_at(v, m), level, s, o);
      spent += s, other += o;
    });
    spent = block_sum(spent), other = block_sum(other);
    search.step(spent, other);
  }
  double middle = 0., reach = 0.;
  Norm<kDual> norm;
  const float level = static_cast<float>(search.level);
  each(r, row, side, [&](float v, int64_t i) {
    const int64_t m = base + i;
    const float e = g.eps[m], w = vabs(v * e) * scale;
    const float part = ball_part<kDual>(v, w, room_at(v, m), e, level, scale), rest = v - part;
    middle += static_cast<double>(rest) * g.center[m] + static_cast<double>(part) * g.x[m];
    reach += static_cast<double>(vabs(rest)) * g.radius[m];
    norm.add(vabs(part * e));
  });
  middle = block_sum(middle), reach = block_sum(reach);
  const double length = reach + norm.result();
  return maximum ? middle + length : middle - length;
}

template <Dual kDual, bool kBox>
__device__ double extreme_of_one(const ConcretizeArgs& g, int64_t row, int side, int64_t base) {
  double middle = 0., reach = 0.;
  Norm<kDual> norm;
  each(g.rows, row, side, [&](float v, int64_t i) {
    const int64_t m = base + i;
    middle += static_cast<double>(v) * (kBox ? g.center : g.x)[m];
    if (kBox) {
      reach += static_cast<double>(vabs(v)) * g.radius[m];
    } else {
      norm.add(vabs(v * g.eps[m]));
    }
  });
  middle = block_sum(middle);
  const double length = kBox ? block_sum(reach) : norm.result();
  return side == 1 ? middle + length : middle - length;
}

template <Dual kDual, bool kBox>
__global__ void __launch_bounds__(kThreads) concretize_kernel(ConcretizeArgs g) {
  const Rows& r = g.rows;
  for (int64_t at = blockIdx.x; at < r.count * r.sides; at += gridDim.x) {
    const int side = static_cast<int>(at / r.count);
    const int64_t row = at % r.count, base = example_of(r, row) * map_size(r);
    double value;
    if constexpr (kBox && kDual != Dual::none) {
      value = extreme_of_both<kDual>(g, row, side, base);
    } else {
      value = extreme_of_one<kDual, kBox>(g, row, side, base);
    }
    if (threadIdx.x == 0) g.out[at] = g.b[at] + static_cast<float>(value);
  }
}

template <Dual kDual, bool kBox>
void launch(const ConcretizeArgs& g, void* stream) {
  const int64_t blocks = g.rows.count * g.rows.sides;
  const dim3 grid(static_cast<unsigned>(blocks < (int64_t{1} << 30) ? blocks : (int64_t{1} << 30)));
  FR_LAUNCH((concretize_kernel<kDual, kBox>), grid, dim3(kThreads), 0, stream, g);
}
template <Dual kDual>
void launch(const ConcretizeArgs& g, void* stream) {
  g.center != nullptr ? launch<kDual, true>(g, stream) : launch<kDual, false>(g, stream);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void concretize_cuda(const ConcretizeArgs& g, void* stream) {
  if (g.rows.count == 0) return;
  switch (g.dual) {
    case Dual::l1:
      return launch<Dual::l1>(g, stream);
    case Dual::l2:
      return launch<Dual::l2>(g, stream);
    case Dual::linf:
      return launch<Dual::linf>(g, stream);
    default:
      return launch<Dual::none, true>(g, stream);
  }
}

}  // namespace fastrobust
