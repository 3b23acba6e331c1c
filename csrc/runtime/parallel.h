// The one seam to threads: torch's own, never a second pool.
#pragma once

#include <cstdint>

namespace fastrobust {

using RangeFn = void (*)(int64_t begin, int64_t end, void* ctx);

// Calls fn on disjoint ranges that cover [0, n). A range has at least `grain` items unless fewer are left, so n <=
// grain runs on the calling thread. fn must not throw, and its result must not depend on how the range is cut.
void parallel_for(int64_t n, int64_t grain, RangeFn fn, void* ctx);

// The same for a callable: parallel_for(n, grain, [&](int64_t begin, int64_t end) { ... });
template <class F>
void parallel_for(int64_t n, int64_t grain, const F& f) {
  parallel_for(
      n, grain, [](int64_t begin, int64_t end, void* ctx) { (*static_cast<const F*>(ctx))(begin, end); },
      const_cast<F*>(&f));
}

int num_threads();
// "torch_parallel_for", "GOMP_parallel" or "serial": what was found in the process.
const char* thread_backend();

}  // namespace fastrobust
