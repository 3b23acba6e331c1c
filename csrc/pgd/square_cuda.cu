// A block has an example: first its last window is settled, then the next one is written, which may lie over it.
#include "pgd/kernels.h"
#include "pgd/load.h"
#include "pgd/square.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

// body(channel, element) for the elements of a window, a thread each.
template <class Body>
__device__ __forceinline__ void each_of_window(const SquareArgs& a, const SquareWindow& w, SquarePlace at, Body body) {
  const int area = static_cast<int>(w.height * w.width), width = static_cast<int>(w.width);
  for (int64_t c = 0; c < a.channels; ++c)
    for (int k = threadIdx.x; k < area; k += kThreads)
      body(c, (c * a.height + at.top + k / width) * a.width + at.left + k % width);
}

__global__ void __launch_bounds__(kThreads) square_kernel(SquareArgs a) {
  for (int64_t row = blockIdx.x; row < a.batch; row += gridDim.x) {
    const int64_t base = row * a.channels * a.height * a.width;
    float *x = a.x + base, *next = a.next + base;
    if (a.hit != nullptr) {
      const bool better = square_better(a, row);
      const float* from = better ? next : x;
      float* to = better ? x : next;
      each_of_window(a, a.last, square_place(a, row, a.last), [&](int64_t, int64_t i) { to[i] = from[i]; });
      __syncthreads();  // every thread has read the score
      if (better && threadIdx.x == 0) square_note(a, row);
    }
    if (a.window.height == 0) continue;
    Philox4 signs{};
    int64_t drawn = 0;
    each_of_window(a, a.window, square_place(a, row, a.window), [&](int64_t c, int64_t i) {
      if (square_sign_block(c) != drawn) {
        drawn = square_sign_block(c);
        signs = square_words(a, row, a.window.query, drawn);
      }
      next[i] = (square_up(signs, c) ? a.high : a.low)[base + i];
    });
  }
}

// ---- norms 2 and 1: a block has an example, and a thread the same elements of it in every pass over the whole ----
__device__ __forceinline__ double power(Norm norm, float d) {
  return norm == Norm::l2 ? static_cast<double>(d) * d : static_cast<double>(vabs(d));
}
__device__ __forceinline__ bool covers(SquarePlace at, const SquareWindow& w, int64_t r, int64_t column) {
  return r >= at.top && r < at.top + w.height && column >= at.left && column < at.left + w.width;
}

__global__ void __launch_bounds__(kThreads, 4) square_move_kernel(SquareMoveArgs a) {
  const int64_t n = a.channels * a.height * a.width;
  const int area = static_cast<int>(a.window.height * a.window.width), width = static_cast<int>(a.window.width);
  for (int64_t row = blockIdx.x; row < a.batch; row += gridDim.x) {
    float *x = a.x + row * n, *next = a.next + row * n;
    const float* x0 = a.x0 + row * n;
    if (a.hit != nullptr) {
      const bool better = square_better(a, row);
      if (better)
        for (int64_t i = threadIdx.x; i < n; i += kThreads) x[i] = next[i];
      __syncthreads();  // every thread has read the score, and the point is whole
      if (better && threadIdx.x == 0) square_note(a, row);
    }
    if (a.window.height == 0) continue;
    const Philox4 p = square_words(a, row, a.window.query, 0);
    const SquarePlace first = square_place(a, a.window, p, 0), second = square_place(a, a.window, p, 1);
    const float* pattern = a.pattern + (square_turned(p) ? area : 0);
    const double eps = param_at(a.eps, row, 1, 0);
    double used = 0.;
    for (int64_t i = threadIdx.x; i < n; i += kThreads) used += power(a.norm, x[i] - x0[i]);
    used = block_sum(used);
    double kept = used;
    Philox4 signs{};
    for (int64_t c = 0; c < a.channels; ++c) {
      if (c % 128 == 0) signs = square_words(a, row, a.window.query, square_sign_block(c));
      const auto index = [&](SquarePlace at, int k) {
        return (c * a.height + at.top + k / width) * a.width + at.left + k % width;
      };
      double old = 0., other = 0.;
      for (int k = threadIdx.x; k < area; k += kThreads) {
        const int64_t i = index(first, k), j = index(second, k);
        old += power(a.norm, x[i] - x0[i]);
        if (!covers(first, a.window, second.top + k / width, second.left + k % width))
          other += power(a.norm, x[j] - x0[j]);
      }
      old = block_sum(old);
      other = block_sum(other);
      const float length = static_cast<float>(fmax(square_root(a.norm, old), kSquareLeast));
      const float sign = square_up(signs, c) ? 1.f : -1.f;
      double size = 0.;
      for (int k = threadIdx.x; k < area; k += kThreads) {
        const int64_t i = index(first, k);
        const float v = square_fresh(pattern[k], sign, x[i] - x0[i], length);
        size += power(a.norm, v);
        next[i] = v;
      }
      size = square_root(a.norm, block_sum(size));
      const double room = square_room(a.norm, eps, used, old + other, a.channels);
      const float scale = static_cast<float>(room / fmax(size, kSquareLeast));
      for (int k = threadIdx.x; k < area; k += kThreads) next[index(first, k)] *= scale;
      const double given = scale * size;
      kept += (a.norm == Norm::l2 ? given * given : given) - old - other;
    }
    const float stretch = square_stretch(a.norm, eps, kept);
    __syncthreads();
    // a warp has a line: no division tells the place of an element
    constexpr int kWarps = kThreads / kWarp;
    const int64_t lines = a.channels * a.height;
    for (int64_t line = threadIdx.x / kWarp, r = line; line < lines; line += kWarps, r += kWarps) {
      while (r >= a.height) r -= a.height;
      for (int64_t column = threadIdx.x % kWarp; column < a.width; column += kWarp) {
        const int64_t i = line * a.width + column;
        const bool fresh = covers(first, a.window, r, column), gone = covers(second, a.window, r, column);
        next[i] = x0[i] + (fresh ? next[i] : gone ? 0.f : x[i] - x0[i]) * stretch;
      }
    }
    __syncthreads();  // before the next example's passes
  }
}

}  // namespace
FR_NS_END

namespace fastrobust {

void square_cuda(const SquareArgs& a, void* stream) {
  if (a.batch == 0) return;
  const unsigned blocks = static_cast<unsigned>(a.batch < 65536 ? a.batch : 65536);
  FR_LAUNCH(square_kernel, blocks, kThreads, 0, stream, a);
}

void square_move_cuda(const SquareMoveArgs& a, void* stream) {
  if (a.batch == 0) return;
  const unsigned blocks = static_cast<unsigned>(a.batch < 65536 ? a.batch : 65536);
  FR_LAUNCH(square_move_kernel, blocks, kThreads, 0, stream, a);
}

}  // namespace fastrobust
