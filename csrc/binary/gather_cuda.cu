// Sums of shifted contiguous runs on CUDA (see args.h): a thread sums kPer elements of one row, the lists are the same
// for all threads of a block, so their loads are broadcasts and those of x are coalesced. With four images side by side
// or more, the elements are neighbours and every offset is a multiple of four.
#include "binary/epilogue.h"
#include "binary/kernels.h"
#include "binary/layout.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;
constexpr int kPer = 4;

// Calls, so that the registers of all branches are not taken at once.
__device__ __noinline__ float activate(const Act& act, float v) {
  with_act<float>(act, [&](const auto& f) { v = f(v); });
  return v;
}
__device__ __noinline__ float slope_at(const Act& act, float v) {
  float slope = 0.f;
  with_act_and_slope<float>(act, [&](const auto& f) { f(v, slope); });
  return slope;
}

// kAny: activations other than ReLU; a kernel without them needs fewer registers.
template <bool kAny, class P, class V>
__device__ __forceinline__ V finish(const Epilogue& e, V v, int64_t channel, P at) {
  if (e.scale != nullptr || e.shift != nullptr) {
    const float scale = e.scale == nullptr ? 1.f : e.scale[channel],
                shift = e.shift == nullptr ? 0.f : e.shift[channel];
    for (int k = 0; k < P::count; ++k) v.v[k] = affine(v.v[k], scale, shift);
  }
  if (e.residual != nullptr) {
    const V residual = load_at(e.residual, at);
    for (int k = 0; k < P::count; ++k) v.v[k] = v.v[k] + residual.v[k];
  }
  if (kAny && e.slopes != nullptr) {
    V slopes;
    for (int k = 0; k < P::count; ++k) slopes.v[k] = slope_at(e.act, v.v[k]);
    store_at(e.slopes, at, slopes);
  }
  if (e.act.kind == ActKind::relu) {
    for (int k = 0; k < P::count; ++k) v.v[k] = relu(v.v[k]);
  } else if (kAny) {
    for (int k = 0; k < P::count; ++k) v.v[k] = activate(e.act, v.v[k]);
  }
  if (e.gate != nullptr) {
    const V gate = load_at(e.gate, at);
    for (int k = 0; k < P::count; ++k)
      v.v[k] = kAny ? through(e.gate_act, v.v[k], gate.v[k]) : through(v.v[k], gate.v[k]);
  }
  if (e.pre != nullptr) store_at(e.pre, at, v);
  if (e.post != nullptr)
    for (int k = 0; k < P::count; ++k) v.v[k] = v.v[k] * e.post[channel];
  return v;
}

// grid: x covers a plane, y the rows, z the groups of images. P: the neighbours of a piece, Four or One.
template <bool kAny, class P>
__global__ void __launch_bounds__(kThreads, 8) gather_kernel(GatherArgs a) {
  constexpr int kPieces = kPer / P::count;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads * kPieces + threadIdx.x) * P::count;
  const int64_t apart = kThreads * P::count;
  for (int64_t block = blockIdx.z; block < a.blocks; block += gridDim.z) {
    const float* const x = a.x + block * a.x_block + a.x_origin;
    for (int64_t row = blockIdx.y; row < a.rows; row += gridDim.y) {
      Values<float, P::count> acc[kPieces] = {};
      bool pixel[kPieces];
      const float* at[kPieces];
      for (int i = 0; i < kPieces; ++i) {
        const int64_t place = first + i * apart - a.out_origin;
        pixel[i] = is_pixel(a, place);
        at[i] = x + place;
      }
      // add(piece, x, entry) over the entries of a list, in order
      const auto each = [&](int32_t begin, int32_t end, const auto& add) {
#pragma unroll 4
        for (int32_t e = begin; e < end; ++e) {
          const int64_t offset = a.offsets[e];
          for (int i = 0; i < kPieces; ++i) {
            if (!pixel[i]) continue;
            const auto v = load_at<Use::again>(at[i], P{offset});
            for (int k = 0; k < P::count; ++k) add(acc[i].v[k], v.v[k], e);
          }
        }
      };
      for (int64_t segment = 0; segment < a.segments; ++segment) {
        const int32_t* const ptr = a.ptr + 2 * (segment * a.rows + row);
        if (a.values != nullptr) {
          each(ptr[0], ptr[2], [&](float& sum, float v, int32_t e) { sum = sum + v * a.values[e]; });
          continue;
        }
        each(ptr[0], ptr[1], [](float& sum, float v, int32_t) { sum = sum + v; });
        each(ptr[1], ptr[2], [](float& sum, float v, int32_t) { sum = sum - v; });
      }
      const int64_t plane = block * a.out_block + row * a.out_plane;
      for (int i = 0; i < kPieces; ++i) {
        if (first + i * apart >= a.out_plane) break;
        const P to{plane + first + i * apart};
        if (pixel[i]) {
          store_at(a.out, to, finish<kAny>(a.epilogue, acc[i], row % a.epilogue.channels, to));
        } else {
          store_at(a.out, to, all_equal(0.f, to));
          if (a.epilogue.pre != nullptr) store_at(a.epilogue.pre, to, all_equal(0.f, to));
          if (a.epilogue.slopes != nullptr) store_at(a.epilogue.slopes, to, all_equal(0.f, to));
        }
      }
    }
  }
}

}  // namespace
FR_NS_END

namespace fastrobust {

void gather_cuda(const GatherArgs& a, void* stream) {
  if (a.blocks == 0 || a.rows == 0 || a.height == 0 || a.width == 0) return;
  const int64_t tiles = (a.out_plane + kThreads * kPer - 1) / (kThreads * kPer);
  const dim3 grid(static_cast<unsigned>(tiles), grid_y(a.rows), grid_y(a.blocks));
  const Epilogue& e = a.epilogue;
  const bool any = (e.act.kind != ActKind::none && e.act.kind != ActKind::relu) ||
                   (e.gate != nullptr && e.gate_act.kind != ActKind::relu) || e.slopes != nullptr;
  const int64_t strides = a.lanes | a.x_block | a.x_origin | a.out_block | a.out_origin | a.out_plane;
  Addresses lie = Addresses().add(a.x).add(a.out).add(e.residual).add(e.gate).add(e.pre).add(e.slopes);
  const auto kernel = lie.whole(strides) ? (any ? gather_kernel<true, Four> : gather_kernel<false, Four>)
                                         : (any ? gather_kernel<true, One> : gather_kernel<false, One>);
  FR_LAUNCH(kernel, grid, kThreads, 0, stream, a);
}

}  // namespace fastrobust
