// A block has an example: first its last window is settled, then the next one is written, which may lie over it.
#include "pgd/kernels.h"
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

}  // namespace
FR_NS_END

namespace fastrobust {

void square_cuda(const SquareArgs& a, void* stream) {
  if (a.batch == 0) return;
  const unsigned blocks = static_cast<unsigned>(a.batch < 65536 ? a.batch : 65536);
  FR_LAUNCH(square_kernel, blocks, kThreads, 0, stream, a);
}

}  // namespace fastrobust
