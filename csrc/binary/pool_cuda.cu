// Max pooling on CUDA, forward and input gradient (see PoolArgs): one thread per element of what is written, or per
// four images side by side.
#include "binary/kernels.h"
#include "binary/pool.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;

// Pixel of element i (of the first of four), and where it is written; false for what is no pixel.
struct Place {
  int64_t n, c, y, x, at;
};
__device__ bool place_of(const PoolArgs& a, const Layout& l, int64_t height, int64_t width, int64_t i, Place& p) {
  if (a.plane > 0) {
    const int64_t block = i / (a.channels * a.plane), q = i % a.plane - l.origin;
    p.c = i / a.plane % a.channels;
    p.at = block * l.block + p.c * l.channel + i % a.plane;
    p.n = block * l.lanes + q % l.lanes;
    p.y = q / l.row;
    p.x = q % l.row / l.col;
    return q >= 0 && p.n < a.batch && p.y < height && p.x < width;
  }
  p.x = i % width;
  p.y = i / width % height;
  p.c = i / width / height % a.channels;
  p.n = i / width / height / a.channels;
  p.at = address(l, p.n, p.c, p.y, p.x);
  return true;
}

int64_t elements(const PoolArgs& a, const Layout& l, int64_t height, int64_t width) {
  if (a.plane > 0) return (a.batch + l.lanes - 1) / l.lanes * a.channels * a.plane;
  return a.batch * a.channels * height * width;
}

// Numbers of missing images are zeros.
template <class P>
__device__ __forceinline__ void write(const PoolArgs& a, const Place& p, Values<float, P::count> v) {
  for (int k = 0; k < P::count; ++k)
    if (p.n + k >= a.batch) v.v[k] = 0.f;
  store_at(a.out, P{p.at}, v);
}
template <class P>
__device__ __forceinline__ Values<uint8_t, P::count> codes_at(const uint8_t* where, int64_t at) {
  Values<uint8_t, P::count> codes;
  if constexpr (P::count == 4) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(where + at));
    memcpy(codes.v, &word, sizeof word);
  } else {
    codes.v[0] = where[at];
  }
  return codes;
}
template <class P>
__device__ __forceinline__ void write_codes(uint8_t* where, int64_t at, const Values<uint8_t, P::count>& codes) {
  if constexpr (P::count == 4) {
    uint32_t word;
    memcpy(&word, codes.v, sizeof word);
    *reinterpret_cast<uint32_t*>(where + at) = word;
  } else {
    where[at] = codes.v[0];
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) pool_kernel(PoolArgs a, int64_t total) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total / P::count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    Place p;
    if (!place_of(a, a.to, a.out_h, a.out_w, i * P::count, p)) {
      store_at(a.out, P{p.at}, Values<float, P::count>{});
      continue;
    }
    const int64_t top = p.y * a.stride_h - a.pad_h, left = p.x * a.stride_w - a.pad_w;
    const int64_t y0 = first_inside(top, a.dilation_h), y1 = end_inside(top, a.dilation_h, a.kernel_h, a.in_h);
    const int64_t x0 = first_inside(left, a.dilation_w), x1 = end_inside(left, a.dilation_w, a.kernel_w, a.in_w);
    const float* const x = a.x + image_at(a.from, p.n) + p.c * a.from.channel;
    Values<float, P::count> best, taken;
    for (int k = 0; k < P::count; ++k) {
      best.v[k] = -INFINITY;
      taken.v[k] = static_cast<float>(first_taken(top, a.dilation_h, a.kernel_h) * a.kernel_w +
                                      first_taken(left, a.dilation_w, a.kernel_w));
    }
    for (int64_t ky = y0; ky < y1; ++ky)
      for (int64_t kx = x0; kx < x1; ++kx) {
        const auto v =
            load_at<Use::again>(x, P{(top + ky * a.dilation_h) * a.from.row + (left + kx * a.dilation_w) * a.from.col});
        for (int k = 0; k < P::count; ++k)
          take_larger(v.v[k], static_cast<float>(ky * a.kernel_w + kx), best.v[k], taken.v[k]);
      }
    write<P>(a, p, best);
    if (a.where != nullptr) {
      Values<uint8_t, P::count> codes;
      for (int k = 0; k < P::count; ++k) codes.v[k] = static_cast<uint8_t>(taken.v[k]);
      write_codes<P>(a.where, p.at, codes);
    }
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) pool_grad_kernel(PoolArgs a, int64_t total) {
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total / P::count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    Place p;
    if (!place_of(a, a.from, a.in_h, a.in_w, i * P::count, p)) {
      store_at(a.out, P{p.at}, Values<float, P::count>{});
      continue;
    }
    const int64_t plane = image_at(a.to, p.n) + p.c * a.to.channel;
    Values<float, P::count> sum = {};
    for (int64_t ky = a.kernel_h - 1; ky >= 0; --ky) {
      const int64_t t = p.y + a.pad_h - ky * a.dilation_h, y = t / a.stride_h;
      if (t < 0 || t % a.stride_h != 0 || y >= a.out_h) continue;
      for (int64_t kx = a.kernel_w - 1; kx >= 0; --kx) {
        const int64_t u = p.x + a.pad_w - kx * a.dilation_w, x = u / a.stride_w;
        if (u < 0 || u % a.stride_w != 0 || x >= a.out_w) continue;
        const int64_t at = plane + y * a.to.row + x * a.to.col;
        const auto v = load_at<Use::again>(a.x, P{at});
        const auto codes = codes_at<P>(a.where, at);
        for (int k = 0; k < P::count; ++k)
          sum.v[k] = sum.v[k] + select(codes.v[k] == ky * a.kernel_w + kx, v.v[k], 0.f);
      }
    }
    write<P>(a, p, sum);
  }
}

// Whether four neighbours of both layouts are four images of one pixel.
bool by_fours(const PoolArgs& a) {
  const int64_t places = a.from.lanes | a.from.block | a.from.channel | a.from.row | a.from.col | a.from.origin |
                         a.to.lanes | a.to.block | a.to.channel | a.to.row | a.to.col | a.to.origin | a.plane;
  return a.plane > 0 && places % 4 == 0 && Addresses().add(a.x).add(a.out).whole(4) &&
         reinterpret_cast<uintptr_t>(a.where) % 4 == 0;
}

}  // namespace
FR_NS_END

namespace fastrobust {

void max_pool_cuda(const PoolArgs& a, void* stream) {
  const int64_t total = elements(a, a.to, a.out_h, a.out_w);
  if (by_fours(a))
    FR_LAUNCH(pool_kernel<Four>, blocks_of(total, 4 * kThreads), kThreads, 0, stream, a, total);
  else
    FR_LAUNCH(pool_kernel<One>, blocks_of(total, kThreads), kThreads, 0, stream, a, total);
}

void max_pool_grad_cuda(const PoolArgs& a, void* stream) {
  const int64_t total = elements(a, a.from, a.in_h, a.in_w);
  if (by_fours(a))
    FR_LAUNCH(pool_grad_kernel<Four>, blocks_of(total, 4 * kThreads), kThreads, 0, stream, a, total);
  else
    FR_LAUNCH(pool_grad_kernel<One>, blocks_of(total, kThreads), kThreads, 0, stream, a, total);
}

}  // namespace fastrobust
