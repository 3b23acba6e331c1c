#include "runtime/parallel.h"

#include <dlfcn.h>

#include <algorithm>

namespace fastrobust {
namespace {

// torch >= 2.10 exports a C parallel_for; before that its OpenMP runtime is reached through libtorch_cpu's own
// dependencies, so that no second OpenMP runtime is ever loaded.
struct Threads {
  int32_t (*torch_parallel_for)(int64_t, int64_t, int64_t, RangeFn, void*) = nullptr;
  int32_t (*torch_get_num_threads)(uint32_t*) = nullptr;
  void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*omp_get_max_threads)() = nullptr;
  int (*omp_get_thread_num)() = nullptr;
  int (*omp_in_parallel)() = nullptr;

  Threads() {
    void* torch = nullptr;
    for (const char* name : {"libtorch_cpu.so", "libtorch_cpu.dylib", "@rpath/libtorch_cpu.dylib"})
      if ((torch = dlopen(name, RTLD_LAZY | RTLD_NOLOAD)) != nullptr) break;
    if (torch == nullptr) return;
    find(torch, "torch_parallel_for", torch_parallel_for);
    find(torch, "torch_get_num_threads", torch_get_num_threads);
    find(torch, "GOMP_parallel", gomp_parallel);
    find(torch, "omp_get_max_threads", omp_get_max_threads);
    find(torch, "omp_get_thread_num", omp_get_thread_num);
    find(torch, "omp_in_parallel", omp_in_parallel);
    if (omp_get_max_threads == nullptr || omp_get_thread_num == nullptr || omp_in_parallel == nullptr)
      gomp_parallel = nullptr;
  }

  template <class F>
  static void find(void* lib, const char* name, F& f) {
    f = reinterpret_cast<F>(dlsym(lib, name));
  }
};

const Threads& threads() {
  static const Threads t;
  return t;
}

struct Share {
  int64_t n;
  int64_t count;
  RangeFn fn;
  void* ctx;
  int (*thread_num)();
};

void run_share(void* p) {
  const Share& s = *static_cast<Share*>(p);
  const int64_t chunk = (s.n + s.count - 1) / s.count;
  const int64_t begin = s.thread_num() * chunk;
  if (begin < s.n) s.fn(begin, std::min(s.n, begin + chunk), s.ctx);
}

}  // namespace

void parallel_for(int64_t n, int64_t grain, RangeFn fn, void* ctx) {
  if (n <= 0) return;
  if (n > grain) {
    const Threads& t = threads();
    if (t.torch_parallel_for != nullptr) {
      t.torch_parallel_for(0, n, grain, fn, ctx);
      return;
    }
    if (t.gomp_parallel != nullptr && t.omp_in_parallel() == 0) {
      const int64_t count = std::min<int64_t>(t.omp_get_max_threads(), (n + grain - 1) / grain);
      if (count > 1) {
        Share s{n, count, fn, ctx, t.omp_get_thread_num};
        t.gomp_parallel(run_share, &s, static_cast<unsigned>(count), 0);
        return;
      }
    }
  }
  fn(0, n, ctx);
}

int num_threads() {
  const Threads& t = threads();
  uint32_t n = 0;
  if (t.torch_get_num_threads != nullptr && t.torch_get_num_threads(&n) == 0) return static_cast<int>(n);
  if (t.gomp_parallel != nullptr) return t.omp_get_max_threads();
  return 1;
}

const char* thread_backend() {
  const Threads& t = threads();
  if (t.torch_parallel_for != nullptr) return "torch_parallel_for";
  return t.gomp_parallel != nullptr ? "GOMP_parallel" : "serial";
}

}  // namespace fastrobust
