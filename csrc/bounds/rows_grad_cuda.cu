// Gradients of the backward step, of concretisation and of picked rows on CUDA. What rows of one example add to its
// maps is gathered: a thread owns a few places of a map and visits the example's rows in order, without atomics.
#include <type_traits>

#include "bounds/kernels.h"
#include "bounds/line_grads.h"
#include "bounds/rows_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;
template <bool kWide>
using PlaceOf = std::conditional_t<kWide, Four, One>;

// A place of a map, and where it lies on the rows.
struct MapPlace {
  const Rows& r;
  int64_t at, y = 0, x = 0, channel = 0;

  __device__ __forceinline__ MapPlace(const Rows& rows, int64_t place) : r(rows), at(place) {
    if (r.corner_y == nullptr) return;
    const int64_t line = r.map_width * r.channels;
    y = at / line, x = at % line / r.channels, channel = at % r.channels;
  }
  // -1: not on this row
  __device__ __forceinline__ int64_t on(int64_t row) const {
    if (r.corner_y == nullptr) return at;
    const int64_t line = y - r.corner_y[row], column = x - r.corner_x[row];
    if (line < 0 || line >= r.height || column < 0 || column >= r.width) return -1;
    return (line * r.width + column) * r.channels + channel;
  }
};

// body(row, place on it) for the rows of an example that see a place of its map.
template <class Place, class Args, class Body>
__device__ __forceinline__ void each_row(const Args& g, const MapPlace& map, int64_t example, Body body) {
  const int64_t end = g.starts[example + 1];
  for (int64_t i = g.starts[example]; i < end; ++i) {
    const int64_t row = g.order != nullptr ? g.order[i] : i, at = map.on(row);
    if (at >= 0) body(row, Place{at});
  }
}

template <class P>
__device__ __forceinline__ void add_at(float* p, P i, const Values<float, P::count>& more) {
  auto sum = load_at(p, i);
#pragma unroll
  for (int k = 0; k < P::count; ++k) sum.v[k] = sum.v[k] + more.v[k];
  store_at(p, i, sum);
}

// kTwo: a slope per side; kApart: a matrix for each side.
template <bool kTwo, bool kApart, bool kWide>
__global__ void __launch_bounds__(kThreads) back_grad_kernel(BackGradArgs g) {
  using Place = PlaceOf<kWide>;
  constexpr int kN = Place::count;
  const Rows& r = g.rows;
  const int64_t maps = map_size(r), second = g.examples * maps;
  const int64_t other_from = g.sides_out == 2 ? r.count * r.length : 0;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN;
  if (at >= maps) return;
  const MapPlace map(r, at);
  for (int64_t example = blockIdx.y; example < g.examples; example += gridDim.y) {
    const Place low{example * maps + at}, up{second + example * maps + at};
    const auto sl = load_at<Use::again>(g.slopes, low), su = load_at<Use::again>(g.slopes, kTwo ? up : low);
    const auto bl = load_at<Use::again>(g.intercepts, low), bu = load_at<Use::again>(g.intercepts, up);
    float add_s[kN][2] = {}, add_b[kN][2] = {};
    each_row<Place>(g, map, example, [&](int64_t row, Place i) {
      const PlacedRow placed(r, row);
      Values<float, kN> v = {}, f = {}, out[2] = {};
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int k = kApart ? side : 0;
        if (side >= r.sides) continue;
        if (side == k) v = placed.coefficients(k * r.side_stride, i);
        if (kTwo || side == k) f = load_at(g.from_out + row * r.length + (kTwo ? side : k) * other_from, i);
        const float t = g.from_b[side * r.count + row];
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          intercept_grad(side, v.v[e], t, bl.v[e], bu.v[e], out[k].v[e], add_b[e]);
          if (kTwo || side == k) slope_grad<kTwo>(side, v.v[e], f.v[e], sl.v[e], su.v[e], out[k].v[e], add_s[e]);
        }
      }
      store_at(g.to_a + row * r.length, i, out[0]);
      if (kApart) store_at(g.to_a + (r.count + row) * r.length, i, out[1]);
    });
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      Values<float, kN> s, b;
#pragma unroll
      for (int e = 0; e < kN; ++e) s.v[e] = add_s[e][side], b.v[e] = add_b[e][side];
      if (side == 0 || kTwo) add_at(g.to_slopes, side == 0 ? low : up, s);
      add_at(g.to_intercepts, side == 0 ? low : up, b);
    }
  }
}

template <bool kApart, bool kWide>
__global__ void __launch_bounds__(kThreads) concretize_grad_kernel(ConcretizeGradArgs g) {
  using Place = PlaceOf<kWide>;
  constexpr int kN = Place::count;
  const Rows& r = g.rows;
  const int64_t maps = map_size(r), at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kN;
  if (at >= maps) return;
  const MapPlace map(r, at);
  for (int64_t example = blockIdx.y; example < g.examples; example += gridDim.y) {
    const Place own{example * maps + at};
    const auto center = load_at<Use::again>(g.center, own), radius = load_at<Use::again>(g.radius, own);
    Values<float, kN> to_center = {}, to_radius = {};
    each_row<Place>(g, map, example, [&](int64_t row, Place i) {
      const PlacedRow placed(r, row);
      Values<float, kN> v = {}, out[2] = {};
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int k = kApart ? side : 0;
        if (side >= r.sides) continue;
        if (side == k) v = placed.coefficients(k * r.side_stride, i);
        const float t = g.from[side * r.count + row];
#pragma unroll
        for (int e = 0; e < kN; ++e)
          extreme_grad(side, v.v[e], t, center.v[e], radius.v[e], out[k].v[e], to_center.v[e], to_radius.v[e]);
      }
      store_at(g.to_a + row * r.length, i, out[0]);
      if (kApart) store_at(g.to_a + (r.count + row) * r.length, i, out[1]);
    });
    if (g.to_center != nullptr) add_at(g.to_center, own, to_center);
    if (g.to_radius != nullptr) add_at(g.to_radius, own, to_radius);
  }
}

// A block owns a row of the result and the places that one warp takes together; its warps look for what was picked from
// that row, a run each, and add it in order.
constexpr int kPickWarps = 8;
template <bool kWide>
__global__ void __launch_bounds__(kPickWarps* kWarp) pick_grad_kernel(PickGradArgs g) {
  using Place = PlaceOf<kWide>;
  constexpr int kN = Place::count;
  __shared__ float sums[kPickWarps][kWarp * kN];
  const int lane = static_cast<int>(threadIdx.x) % kWarp, warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kWarp + lane) * kN;
  const int64_t run = (g.count + kPickWarps * kWarp - 1) / (kPickWarps * kWarp) * kWarp;
  const bool inside = at < g.length;
  for (int64_t row = blockIdx.y; row < g.rows; row += gridDim.y) {
    Values<float, kN> sum = {};
    for (int64_t start = warp * run; start < (warp + 1) * run && start < g.count; start += kWarp) {
      const int64_t mine = start + lane;
      const bool there = mine < g.count;
      const unsigned plus = __ballot_sync(0xffffffffu, there && g.pick[mine] == row);
      const unsigned minus = g.minus != nullptr ? __ballot_sync(0xffffffffu, there && g.minus[mine] == row) : 0u;
      if (!inside) continue;
      for (unsigned left = plus | minus; left != 0; left &= left - 1) {
        const int k = __ffs(static_cast<int>(left)) - 1;
        const auto v = load_at(g.from + (start + k) * g.length, Place{at});
#pragma unroll
        for (int e = 0; e < kN; ++e) {
          if ((plus >> k & 1) != 0) sum.v[e] = sum.v[e] + v.v[e];
          if ((minus >> k & 1) != 0) sum.v[e] = sum.v[e] - v.v[e];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kN; ++e) sums[warp][lane * kN + e] = sum.v[e];
    __syncthreads();
    if (warp != 0 || !inside) continue;
    for (int w = 1; w < kPickWarps; ++w)
#pragma unroll
      for (int e = 0; e < kN; ++e) sum.v[e] = sum.v[e] + sums[w][lane * kN + e];
    store_at(g.out + row * g.length, Place{at}, sum);
  }
}

inline dim3 grid_of(const Rows& r, int64_t examples, bool wide) {
  const int64_t each = kThreads * (wide ? 4 : 1);
  return dim3(static_cast<unsigned>((map_size(r) + each - 1) / each), grid_y(examples));
}

// Places of windows beyond the map, which no thread owns.
inline void clear_beyond(const Rows& r, float* to_a, void* stream) {
  const int64_t matrices = r.side_stride != 0 ? 2 : 1;
  if (r.corner_y != nullptr)
    FR_CUDA_CHECK(cudaMemsetAsync(to_a, 0, static_cast<size_t>(matrices * r.count * r.length) * sizeof(float),
                                  static_cast<cudaStream_t>(stream)));
}

template <bool kTwo, bool kApart>
void launch_back(const BackGradArgs& g, void* stream) {
  Addresses lie = addresses_of(g.rows).add(g.slopes).add(g.intercepts).add(g.from_out).add(g.to_a);
  const bool wide = by_fours(g.rows) && lie.add(g.to_slopes).add(g.to_intercepts).whole(4);
  const dim3 grid = grid_of(g.rows, g.examples, wide);
  if (wide)
    FR_LAUNCH((back_grad_kernel<kTwo, kApart, true>), grid, dim3(kThreads), 0, stream, g);
  else
    FR_LAUNCH((back_grad_kernel<kTwo, kApart, false>), grid, dim3(kThreads), 0, stream, g);
}
template <bool kApart>
void launch_end(const ConcretizeGradArgs& g, void* stream) {
  Addresses lie = addresses_of(g.rows).add(g.center).add(g.radius).add(g.to_a).add(g.to_center).add(g.to_radius);
  const bool wide = by_fours(g.rows) && lie.whole(4);
  const dim3 grid = grid_of(g.rows, g.examples, wide);
  if (wide)
    FR_LAUNCH((concretize_grad_kernel<kApart, true>), grid, dim3(kThreads), 0, stream, g);
  else
    FR_LAUNCH((concretize_grad_kernel<kApart, false>), grid, dim3(kThreads), 0, stream, g);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void back_grad_cuda(const BackGradArgs& g, void* stream) {
  if (g.rows.count == 0 || g.rows.length == 0 || g.examples == 0) return;
  clear_beyond(g.rows, g.to_a, stream);
  const bool two = g.slope_sides == 2;
  if (g.rows.side_stride != 0)
    two ? launch_back<true, true>(g, stream) : launch_back<false, true>(g, stream);
  else
    two ? launch_back<true, false>(g, stream) : launch_back<false, false>(g, stream);
}

void concretize_grad_cuda(const ConcretizeGradArgs& g, void* stream) {
  if (g.rows.count == 0 || g.rows.length == 0 || g.examples == 0) return;
  clear_beyond(g.rows, g.to_a, stream);
  g.rows.side_stride != 0 ? launch_end<true>(g, stream) : launch_end<false>(g, stream);
}

void pick_grad_cuda(const PickGradArgs& g, void* stream) {
  if (g.rows == 0 || g.length == 0) return;
  const bool wide = Addresses().add(g.from).add(g.out).whole(g.length);
  const int64_t each = kWarp * (wide ? 4 : 1);
  const dim3 grid(static_cast<unsigned>((g.length + each - 1) / each), grid_y(g.rows)), block(kPickWarps * kWarp);
  if (wide)
    FR_LAUNCH(pick_grad_kernel<true>, grid, block, 0, stream, g);
  else
    FR_LAUNCH(pick_grad_kernel<false>, grid, block, 0, stream, g);
}

}  // namespace fastrobust
