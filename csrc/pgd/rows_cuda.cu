// Steps that need numbers per example: L2, FOSC, ATAS; and what Auto-PGD notes. A block works on one chunk of one
// example and leaves its partial sums in the workspace; the next kernel's blocks add up the chunks of their example in
// a fixed order. So a batch of a few large images fills the device as a batch of many small ones does, and no atomic
// makes results vary.
#include "pgd/kernels.h"
#include "pgd/rows_cuda.h"
#include "pgd/step.h"

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

// A block's chunk, for all the rows of its y.
#define FR_EACH_CHUNK(a)                                               \
  const int64_t chunk = blockIdx.x, chunks = gridDim.x;                \
  const int64_t begin = chunk * kChunk;                                \
  const int64_t end = begin + kChunk < (a).n ? begin + kChunk : (a).n; \
  for (int64_t row = blockIdx.y; row < (a).batch; row += gridDim.y)

// Sums over [begin, end) in the order of a plain loop over the threads of a block (see each_in_order).
template <GradType T, bool kWide, int kTerms, class Natural, class Add>
__device__ __forceinline__ void each_term(int64_t begin, int64_t end, Natural natural, Add add) {
  each_in_order<kWide, kUnit<T>, kTerms, kThreads, kThreads>(begin, end, natural, add);
}

template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads) grad_norm_kernel(StepArgs a, double* sums) {
  FR_EACH_CHUNK(a) {
    const GradReader<T> g(a.grad, row * a.n);
    double s = 0.;
    each_term<T, kWide, 1>(
        begin, end,
        [&](auto i, auto& t) {
          const auto gi = grad_at(g, i);
          for (int k = 0; k < i.count; ++k) t.v[0][k] = clean_grad(gi.v[k]);
        },
        [&](const float* t) {
          const double w = t[0];
          s += w * w;
        });
    s = block_sum(s);
    if (threadIdx.x == 0) sums[row * chunks + chunk] = s;
  }
}

// ---- L2 ----
template <GradType T>
__device__ __forceinline__ float l2_moved(float x, float g, const L2Ascent& m) {
  return T == GradType::none ? x : l2_ascend(x, clean_grad(g), m.pow2, m.scale);
}

template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads) l2_distance_kernel(StepArgs a, const double* grad_sums, double* sums) {
  FR_EACH_CHUNK(a) {
    const int64_t base = row * a.n;
    const GradReader<T> g(a.grad, base);
    const double norm2 = T != GradType::none && a.normalize ? total(grad_sums, row, chunks) : 0.;
    const L2Ascent m = l2_ascent(norm2, param_at(a.step, row, a.n, 0), a.normalize);
    double s = 0.;
    each_term<T, kWide, 1>(
        begin, end,
        [&](auto i, auto& t) {
          const auto x = load_at(a.x + base, i), x0 = load_at(a.x0 + base, i), gi = grad_at(g, i);
          for (int k = 0; k < i.count; ++k) t.v[0][k] = l2_moved<T>(x.v[k], gi.v[k], m) - x0.v[k];
        },
        [&](const float* t) {
          const double d = t[0];
          s += d * d;
        });
    s = block_sum(s);
    if (threadIdx.x == 0) sums[row * chunks + chunk] = s;
  }
}

// An example next to the sphere is looked at exactly, before the step writes over x: what lies inside is told by a
// distance of zero.
template <GradType T, bool kWide>
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
    each_term<T, kWide, 2>(
        0, a.n,
        [&](auto i, auto& t) {
          const auto x = load_at(a.x + base, i), x0 = load_at(a.x0 + base, i), gi = grad_at(g, i);
          for (int k = 0; k < i.count; ++k) {
            t.v[0][k] = l2_moved<T>(x.v[k], gi.v[k], m);
            t.v[1][k] = x0.v[k];
          }
        },
        [&](const float* t) { exact_add(&s, t[0], t[1], true); });
    if (exact_inside(block_exact_sum<kThreads>(s), eps, true))
      for (int64_t c = threadIdx.x; c < chunks; c += kThreads) sums[row * chunks + c] = 0.;
  }
}

template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    l2_write_kernel(StepArgs a, int shift, const double* grad_sums, const double* sums) {
  FR_EACH_CHUNK(a) {
    const int64_t base = row * a.n + begin;
    const bool move = a.active == nullptr || a.active[row] != 0;
    const GradReader<T> g(a.grad, base);
    const double norm2 = T != GradType::none && a.normalize ? total(grad_sums, row, chunks) : 0.;
    const L2Ascent m = l2_ascent(norm2, param_at(a.step, row, a.n, 0), a.normalize);
    const float shrink = l2_shrink(total(sums, row, chunks), param_at(a.eps, row, a.n, 0));
    each_element<kWide, kUnit<T>>(end - begin, shift + base, threadIdx.x, kThreads, [&](auto i) {
      auto x = load_at(a.x + base, i);
      if (move) {
        const auto x0 = load_at(a.x0 + base, i), gi = grad_at(g, i);
        for (int k = 0; k < i.count; ++k)
          x.v[k] = l2_project(l2_moved<T>(x.v[k], gi.v[k], m), x0.v[k], shrink, a.lo, a.hi);
      }
      store_at(a.out + base, i, x);
    });
  }
}

// Auto-PGD: out holds the projected step averaged with the last move, which is projected next.
template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads)
    l2_average_kernel(StepArgs a, int shift, const double* grad_sums, const double* sums) {
  FR_EACH_CHUNK(a) {
    const int64_t base = row * a.n + begin;
    const GradReader<T> g(a.grad, base);
    const L2Ascent m =
        l2_ascent(a.normalize ? total(grad_sums, row, chunks) : 0., param_at(a.step, row, a.n, 0), a.normalize);
    const float shrink = l2_shrink(total(sums, row, chunks), param_at(a.eps, row, a.n, 0));
    each_element<kWide, kUnit<T>>(end - begin, shift + base, threadIdx.x, kThreads, [&](auto i) {
      auto x = load_at(a.x + base, i);
      const auto x0 = load_at(a.x0 + base, i), gi = grad_at(g, i), before = load_at(a.previous + base, i);
      for (int k = 0; k < i.count; ++k) {
        const float z = l2_project(l2_moved<T>(x.v[k], gi.v[k], m), x0.v[k], shrink, a.lo, a.hi);
        x.v[k] = averaged(x.v[k], before.v[k], z, a.momentum, a.rest);
      }
      store_at(a.out + base, i, x);
    });
  }
}

// ---- what Auto-PGD notes: numbers first, one thread an example, then the rows that are to be kept ----
__global__ void __launch_bounds__(kThreads) ascent_note_kernel(AscentArgs a, uint8_t* save) {
  for (int64_t row = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; row < a.batch;
       row += static_cast<int64_t>(gridDim.x) * kThreads)
    save[row] = ascent_note(a, row);
}
__global__ void __launch_bounds__(kThreads) ascent_check_kernel(AscentCheckArgs a, uint8_t* back) {
  for (int64_t row = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; row < a.batch;
       row += static_cast<int64_t>(gridDim.x) * kThreads)
    back[row] = ascent_check(a, row);
}
template <bool kWide>
__global__ void __launch_bounds__(kThreads) ascent_save_kernel(AscentArgs a, int shift, const uint8_t* save) {
  FR_EACH_CHUNK(a) {
    (void)chunks;
    if (save[row] == 0) continue;
    const int64_t base = row * a.n + begin;
    each_element<kWide, 4>(end - begin, shift + base, threadIdx.x, kThreads, [&](auto i) {
      store_at(a.best + base, i, load_at(a.left + base, i));
      store_at(a.best_grad + base, i, load_at(a.left_grad + base, i));
    });
  }
}

// ---- FOSC, with the L-inf step in the same pass when all move ----
template <GradType T, bool kWide>
__global__ void __launch_bounds__(kThreads, 2)
    fosc_kernel(StepArgs a, Norm norm, bool write, double* duals, double* inners) {
  FR_EACH_CHUNK(a) {
    const int64_t base = row * a.n;
    const GradReader<T> g(a.grad, base);
    const StepRow at(a, row);
    double dual = 0., inner = 0.;
    float top = 0.f;
    each_term<T, kWide, 3>(
        begin, end,
        [&](auto i, auto& t) {
          const auto x = load_at(a.x + base, i), x0 = load_at(a.x0 + base, i), eps = at.eps(i);
          auto gi = grad_at(g, i);
          for (int k = 0; k < i.count; ++k) {
            gi.v[k] = clean_grad(gi.v[k]);
            t.v[0][k] = x.v[k] - x0.v[k];
            t.v[1][k] = gi.v[k];
            t.v[2][k] = eps.v[k];
          }
          if (write) store_at(a.out + base, i, at.linf(x, x0, gi, i));
        },
        [&](const float* t) {
          inner += static_cast<double>(t[0]) * t[1];
          if (norm == Norm::linf)
            dual += static_cast<double>(vabs(t[1])) * t[2];
          else if (norm == Norm::l2)
            dual += static_cast<double>(t[1]) * t[1];
          else
            top = vmax(top, vabs(t[1]));
        });
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
    if (a.active_out != nullptr) a.active_out[row] = fosc_moves(a.active, row, value, a.threshold);
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
  Addresses lie;
  bool whole;  // every row starts at a multiple of 16 bytes and ends at one, as sums need it

  Rows(const StepArgs& args, double* workspace, void* s)
      : a(args),
        stream(s),
        chunks(chunks_of(args.n)),
        grid(static_cast<unsigned>(chunks), grid_y(args.batch)),
        row_blocks(static_cast<unsigned>((args.batch + kThreads - 1) / kThreads)),
        first(workspace),
        second(workspace + args.batch * chunks),
        lie(addresses_of(args)),
        whole(lie.whole(args.n)) {}

  void grad_norm() const {
    if constexpr (T != GradType::none) {
      if (whole)
        FR_LAUNCH((grad_norm_kernel<T, true>), grid, kThreads, 0, stream, a, first);
      else
        FR_LAUNCH((grad_norm_kernel<T, false>), grid, kThreads, 0, stream, a, first);
    }
  }
  template <bool kWide>
  void l2_sums(const StepArgs& b) const {
    FR_LAUNCH((l2_distance_kernel<T, kWide>), grid, kThreads, 0, stream, b, first, second);
    FR_LAUNCH((l2_sphere_kernel<T, kWide>), static_cast<unsigned>(b.batch < 65536 ? b.batch : 65536), kThreads, 0,
              stream, b, first, second);
  }
  void step(const StepArgs& b, Norm norm) const {
    if (norm == Norm::linf) return linf_cuda(b, stream);
    if (norm == Norm::l1) return l1_cuda(b, stream);
    if (T != GradType::none && b.normalize) grad_norm();
    whole ? l2_sums<true>(b) : l2_sums<false>(b);
    if constexpr (T != GradType::none) {
      if (b.previous != nullptr && b.momentum != 1.f) {
        if (lie.aligned)
          FR_LAUNCH((l2_average_kernel<T, true>), grid, kThreads, 0, stream, b, lie.shift, first, second);
        else
          FR_LAUNCH((l2_average_kernel<T, false>), grid, kThreads, 0, stream, b, 0, first, second);
        StepArgs rest = b;  // the projection of what lies in out
        rest.x = b.out;
        rest.previous = nullptr;
        rest.grad = nullptr;
        rest.grad_type = GradType::none;
        return Rows<GradType::none>(rest, first, stream).step(rest, norm);
      }
    }
    if (lie.aligned)
      FR_LAUNCH((l2_write_kernel<T, true>), grid, kThreads, 0, stream, b, lie.shift, first, second);
    else
      FR_LAUNCH((l2_write_kernel<T, false>), grid, kThreads, 0, stream, b, 0, first, second);
  }
  void fosc(Norm norm, bool write) const {
    if (whole)
      FR_LAUNCH((fosc_kernel<T, true>), grid, kThreads, 0, stream, a, norm, write, first, second);
    else
      FR_LAUNCH((fosc_kernel<T, false>), grid, kThreads, 0, stream, a, norm, write, first, second);
  }

  void run(Norm norm) const {
    if (a.fosc != nullptr) {
      const bool moves = a.active_out != nullptr, together = norm == Norm::linf && moves && a.active == nullptr;
      fosc(norm, together);
      FR_LAUNCH(fosc_end_kernel, row_blocks, kThreads, 0, stream, a, norm, chunks, first, second);
      if (!moves || together) return;
      StepArgs decided = a;
      decided.active = a.active_out;
      step(decided, norm);
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

static void save_noted(const AscentArgs& a, const uint8_t* workspace, void* stream) {
  if (a.n == 0) return;
  Addresses lie;
  lie.add(a.left).add(a.left_grad).add(a.best).add(a.best_grad);
  const dim3 grid(static_cast<unsigned>(chunks_of(a.n)), grid_y(a.batch));
  if (lie.aligned)
    FR_LAUNCH((ascent_save_kernel<true>), grid, kThreads, 0, stream, a, lie.shift, workspace);
  else
    FR_LAUNCH((ascent_save_kernel<false>), grid, kThreads, 0, stream, a, 0, workspace);
}

void ascent_cuda(const AscentArgs& a, uint8_t* workspace, void* stream) {
  if (a.batch == 0) return;
  FR_LAUNCH(ascent_note_kernel, static_cast<unsigned>((a.batch + kThreads - 1) / kThreads), kThreads, 0, stream, a,
            workspace);
  save_noted(a, workspace, stream);
}

void ascent_check_cuda(const AscentCheckArgs& a, uint8_t* workspace, void* stream) {
  if (a.batch == 0) return;
  FR_LAUNCH(ascent_check_kernel, static_cast<unsigned>((a.batch + kThreads - 1) / kThreads), kThreads, 0, stream, a,
            workspace);
  AscentArgs back;  // the same copies, the other way round
  back.batch = a.batch;
  back.n = a.n;
  back.left = a.best;
  back.left_grad = a.best_grad;
  back.best = a.x;
  back.best_grad = a.grad;
  save_noted(back, workspace, stream);
}

}  // namespace fastrobust
