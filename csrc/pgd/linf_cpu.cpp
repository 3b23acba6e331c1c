// L-inf step and projection on the CPU: one pass, elementwise, in blocks that stay in cache.
#include <algorithm>

#include "pgd/row_cpu.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kBlock = 4096;
// Fewer elements than this are done faster by one thread than two can be woken.
constexpr int64_t kGrain = 32768;
// Above this many bytes in flight the output is not read again soon: write past the caches and save their read.
constexpr int64_t kStreamBytes = int64_t{24} << 20;

using BlockFn = void (*)(const StepArgs&, int64_t, int64_t, int64_t);

template <GradType T, bool kStream>
BlockFn pick(const StepArgs& a) {
  const bool step_each = a.step.per == Per::element, eps_each = a.eps.per == Per::element;
  if (step_each) return eps_each ? linf_block<T, true, true, kStream> : linf_block<T, true, false, kStream>;
  return eps_each ? linf_block<T, false, true, kStream> : linf_block<T, false, false, kStream>;
}

template <bool kStream>
BlockFn pick(const StepArgs& a) {
  BlockFn block = nullptr;
  with_grad_type(a.grad_type, [&](auto type) { block = pick<decltype(type)::value, kStream>(a); });
  return block;
}

}  // namespace

void linf_cpu(const StepArgs& given) {
  StepArgs a = given;
  if (a.batch * a.n == 0) return;
  if (a.step.per != Per::example && a.eps.per != Per::example && a.active == nullptr) {
    a.n *= a.batch;  // nothing differs between examples: one long row
    a.batch = 1;
  }
  const int64_t per_row = (a.n + kBlock - 1) / kBlock;
  const bool aligned = reinterpret_cast<uintptr_t>(a.out) % 64 == 0 && (a.batch == 1 || a.n % kLanes == 0);
  const bool stream = aligned && a.out != a.x && a.batch * a.n * 16 > kStreamBytes;
  const BlockFn block = stream ? pick<true>(a) : pick<false>(a);
  parallel_for(
      a.batch * per_row, std::max<int64_t>(1, kGrain / std::min(a.n, kBlock)), [&](int64_t first, int64_t last) {
        for (int64_t k = first; k < last; ++k) {
          const int64_t row = k / per_row, begin = (k - row * per_row) * kBlock, end = std::min(a.n, begin + kBlock);
          if (a.active == nullptr || a.active[row] != 0)
            block(a, row, begin, end);
          else if (a.out != a.x)
            std::memcpy(a.out + row * a.n + begin, a.x + row * a.n + begin,
                        static_cast<size_t>(end - begin) * sizeof(float));
        }
        if (stream) stream_fence();
      });
}

FR_NS_END
