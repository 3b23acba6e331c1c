// Steps that need numbers per example: L2, FOSC, ATAS. A block works on one chunk of one example and leaves its partial
// sums in the workspace; the next kernel's blocks add up the chunks of their example in a fixed order. So a batch of a
// few large images fills the device as a batch of many small ones does, and no atomic makes results vary.
#include "pgd/kernels.h"
#include "pgd/load.h"
#include "pgd/rows_cuda.h"
#include "pgd/step.h"
#include "runtime/cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;
constexpr int64_t kChunk = 8192;

FR_HD int64_t chunks_of(int64_t n) { return n == 0 ? 1 : (n + kChunk - 1) / kChunk; }

// Sum of an example's partials; every thread gets it.
__device__ double total(const double* parts, int64_t row, int64_t chunks) {
  double s = 0.;
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads) s += parts[row * chunks + c];
  return block_sum(s);
}

// Runs f(row, i) for the block's chunk, strided by threads, for all the rows of its y.
#define FR_EACH_CHUNK(a)                                               \
  const int64_t chunk = blockIdx.x, chunks = gridDim.x;                \
  const int64_t begin = chunk * kChunk;                                \
  const int64_t end = begin + kChunk < (a).n ? begin + kChunk : (a).n; \
  for (int64_t row = blockIdx.y; row < (a).batch; row += gridDim.y)

template <GradType T>
__global__ void __launch_bounds__(kThreads) grad_norm_kernel(StepArgs a, double* sums) {
  FR_EACH_CHUNK(a) {
    const GradReader<T> g(a.grad, row * a.n);
    double s = 0.;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const double w = clean_grad(g.at(i));
      s += w * w;
    }
    s = block_sum(s);
    if (threadIdx.x == 0) sums[row * chunks + chunk] = s;
  }
}

// ---- L2 ----
template <GradType T>
__device__ __forceinline__ float l2_moved(float x, float g, const L2Ascent& m) {
  return T == GradType::none ? x : l2_ascend(x, clean_grad(g), m.pow2, m.scale);
}

template <GradType T>
__global__ void __launch_bounds__(kThreads) l2_distance_kernel(StepArgs a, const double* grad_sums, double* sums) {
  FR_EACH_CHUNK(a) {
    const int64_t base = row * a.n;
    const GradReader<T> g(a.grad, base);
    const double norm2 = T != GradType::none && a.normalize ? total(grad_sums, row, chunks) : 0.;
    const L2Ascent m = l2_ascent(norm2, param_at(a.step, row, a.n, 0), a.normalize);
    double s = 0.;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const double d = l2_moved<T>(a.x[base + i], g.at(i), m) - a.x0[base + i];
      s += d * d;
    }
    s = block_sum(s);
    if (threadIdx.x == 0) sums[row * chunks + chunk] = s;
  }
}

// An example next to the sphere is looked at exactly, before the step writes over x: what lies inside is told by a
// distance of zero.
template <GradType T>
__global__ void __launch_bounds__(kThreads) l2_sphere_kernel(StepArgs a, const double* grad_sums, double* sums) {
  const int64_t chunks = chunks_of(a.n);
  for (int64_t row = blockIdx.x; row < a.batch; row += gridDim.x) {
    const float eps = param_at(a.eps, row, a.n, 0);
    if (!near_sphere(sqrt(total(sums, row, chunks)), eps)) continue;
    const int64_t base = row * a.n;
    const GradReader<T> g(a.grad, base);
    const double norm2 = T != GradType::none && a.normalize ? total(grad_sums, row, chunks) : 0.;
    const L2Ascent m = l2_ascent(norm2, param_at(a.step, row, a.n, 0), a.normalize);
    ExactSum s;
    for (int64_t i = threadIdx.x; i < a.n; i += kThreads)
      exact_add(&s, l2_moved<T>(a.x[base + i], g.at(i), m), a.x0[base + i], true);
    if (exact_inside(block_exact_sum<kThreads>(s), eps, true))
      for (int64_t c = threadIdx.x; c < chunks; c += kThreads) sums[row * chunks + c] = 0.;
  }
}

template <GradType T>
__global__ void __launch_bounds__(kThreads) l2_write_kernel(StepArgs a, const double* grad_sums, const double* sums) {
  FR_EACH_CHUNK(a) {
    const int64_t base = row * a.n;
    const bool move = a.active == nullptr || a.active[row] != 0;
    const GradReader<T> g(a.grad, base);
    const double norm2 = T != GradType::none && a.normalize ? total(grad_sums, row, chunks) : 0.;
    const L2Ascent m = l2_ascent(norm2, param_at(a.step, row, a.n, 0), a.normalize);
    const float shrink = l2_shrink(total(sums, row, chunks), param_at(a.eps, row, a.n, 0));
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const float x = a.x[base + i];
      a.out[base + i] = move ? l2_project(l2_moved<T>(x, g.at(i), m), a.x0[base + i], shrink, a.lo, a.hi) : x;
    }
  }
}

// ---- FOSC, with the L-inf step in the same pass when there is an output ----
template <GradType T>
__global__ void __launch_bounds__(kThreads)
    fosc_kernel(StepArgs a, Norm norm, bool write, double* duals, double* inners) {
  FR_EACH_CHUNK(a) {
    const int64_t base = row * a.n;
    const bool move = a.active == nullptr || a.active[row] != 0;
    const GradReader<T> g(a.grad, base);
    const bool step_each = a.step.per == Per::element, eps_each = a.eps.per == Per::element;
    const float step_all = step_each ? 0.f : param_at(a.step, row, a.n, 0);
    const float eps_all = eps_each ? 0.f : param_at(a.eps, row, a.n, 0);
    double dual = 0., inner = 0.;
    float top = 0.f;
    for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
      const float gi = clean_grad(g.at(i)), x = a.x[base + i], x0 = a.x0[base + i];
      const float eps = eps_each ? a.eps.data[base + i] : eps_all;
      inner += static_cast<double>(x - x0) * gi;
      if (norm == Norm::linf)
        dual += static_cast<double>(vabs(gi)) * eps;
      else if (norm == Norm::l2)
        dual += static_cast<double>(gi) * gi;
      else
        top = vmax(top, vabs(gi));
      if (write) {
        const float step = step_each ? a.step.data[base + i] : step_all;
        a.out[base + i] = move ? linf_project(linf_ascend(x, gi, step), x0, eps, a.lo, a.hi) : x;
      }
    }
    inner = block_sum(inner);
    dual = norm == Norm::l1 ? static_cast<double>(block_max(top)) : block_sum(dual);
    if (threadIdx.x == 0) {
      duals[row * chunks + chunk] = dual;
      inners[row * chunks + chunk] = inner;
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    fosc_end_kernel(StepArgs a, Norm norm, int64_t chunks, const double* duals, const double* inners) {
  for (int64_t row = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; row < a.batch;
       row += static_cast<int64_t>(gridDim.x) * kThreads) {
    double dual = 0., inner = 0.;
    for (int64_t c = 0; c < chunks; ++c) {
      const double d = duals[row * chunks + c];
      dual = norm == Norm::l1 ? (d > dual ? d : dual) : dual + d;
      inner += inners[row * chunks + c];
    }
    if (norm != Norm::linf) dual = param_at(a.eps, row, a.n, 0) * (norm == Norm::l2 ? sqrt(dual) : dual);
    const float value = fosc_value(dual, inner);
    a.fosc[row] = value;
    if (a.active_out != nullptr) a.active_out[row] = (a.active == nullptr || a.active[row] != 0) && value > a.threshold;
  }
}

// ---- ATAS ----
__global__ void __launch_bounds__(kThreads) atas_kernel(StepArgs a, int64_t chunks, const double* sums) {
  for (int64_t row = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; row < a.batch;
       row += static_cast<int64_t>(gridDim.x) * kThreads) {
    double s = 0.;
    for (int64_t c = 0; c < chunks; ++c) s += sums[row * chunks + c];
    const bool move = a.active == nullptr || a.active[row] != 0;
    const float v = move ? atas_average(a.v[row], s, a.beta) : a.v[row];
    a.v_out[row] = v;
    a.step_out[row] = atas_step_size(v, param_at(a.step, row, a.n, 0), a.c, a.authors, a.min_step, a.max_step);
  }
}

template <GradType T>
struct Rows {
  const StepArgs& a;
  void* stream;
  int64_t chunks;
  dim3 grid;
  unsigned row_blocks;
  double *first, *second;

  Rows(const StepArgs& args, double* workspace, void* s)
      : a(args),
        stream(s),
        chunks(chunks_of(args.n)),
        grid(static_cast<unsigned>(chunks), grid_y(args.batch)),
        row_blocks(static_cast<unsigned>((args.batch + kThreads - 1) / kThreads)),
        first(workspace),
        second(workspace + args.batch * chunks) {}

  void grad_norm() const { FR_LAUNCH(grad_norm_kernel<T>, grid, kThreads, 0, stream, a, first); }

  void step(const StepArgs& b, Norm norm) const {
    if (norm == Norm::linf) return linf_cuda(b, stream);
    if (norm == Norm::l1) return l1_cuda(b, stream);
    if (T != GradType::none && b.normalize) grad_norm();
    FR_LAUNCH(l2_distance_kernel<T>, grid, kThreads, 0, stream, b, first, second);
    FR_LAUNCH(l2_sphere_kernel<T>, static_cast<unsigned>(b.batch < 65536 ? b.batch : 65536), kThreads, 0, stream, b,
              first, second);
    FR_LAUNCH(l2_write_kernel<T>, grid, kThreads, 0, stream, b, first, second);
  }

  void run(Norm norm) const {
    if (a.fosc != nullptr) {
      const bool together = norm == Norm::linf && a.out != nullptr;
      FR_LAUNCH(fosc_kernel<T>, grid, kThreads, 0, stream, a, norm, together, first, second);
      FR_LAUNCH(fosc_end_kernel, row_blocks, kThreads, 0, stream, a, norm, chunks, first, second);
      if (a.out != nullptr && !together) step(a, norm);
    } else if (a.v_out != nullptr) {
      grad_norm();
      FR_LAUNCH(atas_kernel, row_blocks, kThreads, 0, stream, a, chunks, first);
      StepArgs adapted = a;
      adapted.step.per = Per::example;
      adapted.step.data = a.step_out;
      step(adapted, norm);
    } else {
      step(a, norm);
    }
  }
};

}  // namespace
FR_NS_END

namespace fastrobust {

int64_t pgd_workspace_doubles(const StepArgs& a) { return 2 * a.batch * chunks_of(a.n); }

void rows_cuda(const StepArgs& a, Norm norm, double* workspace, void* stream) {
  if (a.batch == 0) return;
  with_grad_type(a.grad_type, [&](auto type) { Rows<decltype(type)::value>(a, workspace, stream).run(norm); });
}

}  // namespace fastrobust
