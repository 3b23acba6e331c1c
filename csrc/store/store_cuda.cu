// The store on CUDA: a thread for each pixel of the images, or of the store's rows. Images go by 16 bytes where their
// addresses allow; the store is read where the move puts it, a few neighbours for each pixel.
#include "core/ball.h"
#include "runtime/wide_cuda.h"
#include "store/kernels.h"
#include "store/place.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;

// One pixel of the moved perturbation, in the order of additions that the CPU takes: rows first.
template <class T>
__device__ __forceinline__ float value_at(const StoreArgs& a, const Place& p, const T* row, int64_t element) {
  const uint32_t pixels = static_cast<uint32_t>(a.height * a.width), e = static_cast<uint32_t>(element);
  const uint32_t c = e / pixels, in = e - c * pixels, i = in / static_cast<uint32_t>(a.width);
  const Tap rows = row_tap(a, p, i), columns = column_tap(a, p, in - i * static_cast<uint32_t>(a.width));
  const T* plane = row + c * a.store_h * a.store_w;
  const auto at = [&](int64_t u, int64_t v) { return u < 0 ? 0.f : kept<T>(plane[u * a.store_w + v]); };
  const auto blended = [&](int64_t v) {
    if (v < 0 || (rows.first < 0 && rows.second < 0)) return 0.f;
    return rows.t == 0.f ? at(rows.first, v) : mix(at(rows.first, v), at(rows.second, v), rows.t);
  };
  return columns.t == 0.f ? blended(columns.first) : mix(blended(columns.first), blended(columns.second), columns.t);
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(StoreArgs a, int shift) {
  const int64_t n = a.channels * a.height * a.width;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const int64_t from = row_of(a, b), base = b * n;
    const Place p = place_of(a, b);
    const T* row = static_cast<const T*>(a.store) + from * a.channels * a.store_h * a.store_w;
    const float eps = a.eps_each == nullptr ? a.eps : a.eps_each[b];
    each_element<kWide, 4>(n, shift + base, static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x,
                           static_cast<int64_t>(gridDim.x) * kThreads, [&](auto i) {
                             const auto x = load_or(a.x + base, a.x != nullptr, 0.f, i);
                             auto y = x;
#pragma unroll
                             for (int k = 0; k < i.count; ++k) {
                               const float d = from < 0 ? 0.f : value_at(a, p, row, i.at(k));
                               y.v[k] = a.x == nullptr ? d : linf_project(x.v[k] + d, x.v[k], eps, a.lo, a.hi);
                             }
                             store_at(a.out + base, i, y);
                           });
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) scatter_rows_kernel(StoreArgs a) {
  const int64_t n = a.channels * a.store_h * a.store_w, pixels = a.height * a.width;
  for (int64_t b = blockIdx.y; b < a.batch; b += gridDim.y) {
    const int64_t to = row_of(a, b);
    if (to < 0 || !is_last(a, b)) continue;
    const Place p = place_of(a, b);
    T* row = static_cast<T*>(a.store) + to * n;
    for (int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; e < n;
         e += static_cast<int64_t>(gridDim.x) * kThreads) {
      const uint32_t plane = static_cast<uint32_t>(a.store_h * a.store_w), width = static_cast<uint32_t>(a.store_w);
      const uint32_t c = static_cast<uint32_t>(e) / plane, in = static_cast<uint32_t>(e) - c * plane, u = in / width;
      const Shown rows = shown_rows(a, p, u), columns = shown_columns(a, p, in - u * width);
      const int64_t count = rows.count() * columns.count();
      if (count == 0) continue;
      float total = 0.f;
      for (int64_t j = columns.first; j < columns.last; ++j) {
        float sum = 0.f;
        for (int64_t i = rows.first; i < rows.last; ++i) {
          const int64_t at = (b * a.channels + c) * pixels + i * a.width + j;
          const float d = a.x == nullptr ? a.adv[at] : a.adv[at] - a.x[at];
          sum = i == rows.first ? d : sum + d;
        }
        total = a.factor == 1 ? sum : total + sum;
      }
      keep(row + e, a.factor == 1 ? total : total / static_cast<float>(count));
    }
  }
}

template <class T>
void gather(const StoreArgs& a, void* stream) {
  Addresses lie;
  lie.add(a.x).add(a.out);
  const dim3 grid(blocks_of(a.channels * a.height * a.width, 8 * kThreads), grid_y(a.batch));
  if (lie.aligned)
    FR_LAUNCH((gather_rows_kernel<T, true>), grid, kThreads, 0, stream, a, lie.shift);
  else
    FR_LAUNCH((gather_rows_kernel<T, false>), grid, kThreads, 0, stream, a, 0);
}
template <class T>
void scatter(const StoreArgs& a, void* stream) {
  const dim3 grid(blocks_of(a.channels * a.store_h * a.store_w, kThreads), grid_y(a.batch));
  FR_LAUNCH((scatter_rows_kernel<T>), grid, kThreads, 0, stream, a);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void store_gather_cuda(const StoreArgs& a, void* stream) {
  if (a.batch * a.channels * a.height * a.width == 0) return;
  a.type == StoreType::f16 ? gather<uint16_t>(a, stream) : gather<float>(a, stream);
}

void store_scatter_cuda(const StoreArgs& a, void* stream) {
  if (a.batch * a.channels * a.height * a.width == 0) return;
  a.type == StoreType::f16 ? scatter<uint16_t>(a, stream) : scatter<float>(a, stream);
}

}  // namespace fastrobust
