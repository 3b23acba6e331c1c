// polyhedral_distance on CUDA: one row per block. All threads follow the same decisions (solve.h) on the same block
// sums; a row's w and c stay in shared memory where they fit, longer rows are read again from the L2 cache.
#include "polyhedron/solve.h"
//
#include "polyhedron/kernels.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSharedBytes = 48 * 1024 - 16 * 1024;  // what every device grants, less the static arrays

// The largest of one double per thread.
__device__ __forceinline__ double block_largest(double v) {
  __shared__ double parts[kThreads];
  __syncthreads();
  parts[threadIdx.x] = v;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width && parts[threadIdx.x + width] > parts[threadIdx.x])
      parts[threadIdx.x] = parts[threadIdx.x + width];
  }
  __syncthreads();
  return parts[0];
}

// The sum of one compensated number per thread, in a fixed order.
__device__ __forceinline__ Pair block_pair(Pair v) {
  __shared__ double high[kThreads], low[kThreads];
  __syncthreads();
  high[threadIdx.x] = v.high;
  low[threadIdx.x] = v.low;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width) {
      const Pair s = add({high[threadIdx.x], low[threadIdx.x]}, high[threadIdx.x + width]);
      high[threadIdx.x] = s.high;
      low[threadIdx.x] = s.low + low[threadIdx.x + width];
    }
  }
  __syncthreads();
  return add_exact(high[0], low[0]);
}

struct Element {
  float w, c;
};

// The passes over one row, each a strided loop and block sums.
template <bool kShared, bool kWide>
struct BlockRow {
  const float* a;
  const float* lower;
  const float* upper;
  float lower_all = 0.f, upper_all = 0.f;  // of the whole row, where `lower` and `upper` are null
  int64_t m;
  bool flip;
  double p;
  float* w_shared;
  float* c_shared;

  __device__ __forceinline__ Element element(float given, float lo, float hi) const {
    const float x = flip ? -given : given, size = vabs(x), room = x > 0.f ? -lo : hi;
    return size > 0.f && room > 0.f ? Element{size, room} : Element{0.f, 0.f};
  }
  // body(k-th of the neighbours, a, lower, upper)
  template <class P, class Body>
  __device__ __forceinline__ void read(P i, Body body) const {
    const auto x = load_at<Use::again>(a, i), lo = load_or<Use::again>(lower, lower != nullptr, lower_all, i),
               hi = load_or<Use::again>(upper, upper != nullptr, upper_all, i);
    for (int k = 0; k < P::count; ++k) body(k, x.v[k], lo.v[k], hi.v[k]);
  }
  // body(element), in the order of a plain loop over the threads (see each_in_order)
  template <class Body>
  __device__ __forceinline__ void each(Body body) const {
    if constexpr (kShared) {
      for (int64_t j = threadIdx.x; j < m; j += kThreads) body(Element{w_shared[j], c_shared[j]});
    } else {
      each_in_order<kWide, 4, 2, kThreads, kThreads>(
          0, m,
          [&](auto i, auto& t) {
            read(i, [&](int k, float x, float lo, float hi) {
              const Element e = element(x, lo, hi);
              t.v[0][k] = e.w;
              t.v[1][k] = e.c;
            });
          },
          [&](const float* t) { body(Element{t[0], t[1]}); });
    }
  }

  template <Distance kKind>
  __device__ FastSums fast(float t) const {
    float used = 0.f, slope = 0.f;
    each([&](Element e) {
      if (e.c <= cap_at<kKind>(t, e.w))
        used += e.w * e.c;
      else
        slope += slope_of<kKind>(e.w);
    });
    const double total = block_sum(used);
    return {total, block_sum(slope)};
  }
  template <Distance kKind, bool kNarrow>
  __device__ RowSums sums(double t, double high) const {
    double used = 0., slope = 0., squares = 0.;
    float changed = 0.f;
    each([&](Element e) {
      const double w = e.w, c = e.c;
      if (c <= cap_at<kKind>(t, w)) {
        used += w * c;
        squares += c * c;
      } else {
        slope += slope_of<kKind>(w);
        if (c <= cap_at<kKind>(high, w)) changed = 1.f;
      }
    });
    RowSums s;
    s.used = block_sum(used);
    s.slope = block_sum(slope);
    s.powers = kKind == Distance::l2 ? block_sum(squares) : 0.;
    s.changed = block_max(changed) > 0.f;
    return s;
  }
  template <class Fixed>
  __device__ Pair exact(const Fixed& fixed) const {
    Pair s{0., 0.};
    each([&](Element e) {
      if (e.w > 0.f && fixed(e)) s = add(s, static_cast<double>(e.w) * static_cast<double>(e.c));
    });
    return block_pair(s);
  }
  template <Distance kKind, bool kNarrow>
  __device__ Pair exact_used(double t) const {
    return exact([=](Element e) { return static_cast<double>(e.c) <= cap_at<kKind>(t, static_cast<double>(e.w)); });
  }

  // log2 lambda at which the element meets the box
  __device__ __forceinline__ double meets(Element e) const {
    return (p - 1.) * log2(static_cast<double>(e.c)) - log2(static_cast<double>(e.w));
  }
  __device__ PowerSums power(double level) const {
    double largest = 0., top = -kInf;
    each([&](Element e) {
      if (!(e.w > 0.f)) return;
      if (meets(e) <= level)
        largest = largest > e.c ? largest : static_cast<double>(e.c);
      else
        top = fmax(top, log2(static_cast<double>(e.w)));
    });
    PowerSums s;
    s.largest = block_largest(largest);
    s.top = block_largest(top);
    const double q = p / (p - 1.);
    double used = 0., powers = 0., slope = 0.;
    each([&](Element e) {
      if (!(e.w > 0.f)) return;
      if (meets(e) <= level) {
        used += static_cast<double>(e.w) * static_cast<double>(e.c);
        powers += pow(static_cast<double>(e.c) / s.largest, p);
      } else {
        slope += exp2(q * (log2(static_cast<double>(e.w)) - s.top));
      }
    });
    s.used = block_sum(used);
    s.powers = block_sum(powers);
    s.slope = block_sum(slope);
    return s;
  }
  __device__ Pair exact_used_power(double level) const {
    return exact([=, this_row = *this](Element e) { return this_row.meets(e) <= level; });
  }

  __device__ FillStep fill_fast(float level) const {
    float used = 0.f, above = static_cast<float>(kInf), up_to = 0.f;
    each([&](Element e) {
      if (e.w > level) {
        used += e.w * e.c;
        above = vmin(above, e.w);
      } else {
        up_to = vmax(up_to, e.w);
      }
    });
    FillStep s;
    s.used = block_sum(used);
    s.above = -block_max(-above);
    s.up_to = block_max(up_to);
    return s;
  }
  __device__ FillStep fill_start(double) const { return fill_fast(0.f); }
  __device__ FillSums fill(float level) const {
    double used = 0., cost = 0., tie = 0., count = 0.;
    each([&](Element e) {
      if (e.w > level) {
        used += static_cast<double>(e.w) * static_cast<double>(e.c);
        cost += static_cast<double>(e.c);
      } else if (e.w == level) {
        if (e.c < static_cast<float>(kInf))
          tie += static_cast<double>(e.c);
        else
          count += 1.;
      }
    });
    FillSums s;
    s.used = block_sum(used);
    s.cost = block_sum(cost);
    s.tie_room = block_sum(tie);
    s.tie_count = block_sum(count);
    return s;
  }
  __device__ Pair exact_above(float level) const {
    return exact([=](Element e) { return e.w > level; });
  }
};

template <Distance kKind, bool kShared, bool kWide>
__global__ void __launch_bounds__(kThreads, 2) distance_kernel(DistanceArgs args) {
  FR_DYNAMIC_SHARED(float, shared);
  for (int64_t r = blockIdx.x; r < args.rows; r += gridDim.x) {
    const double b = static_cast<double>(args.b[r]);
    BlockRow<kShared, kWide> row;
    row.a = args.a + r * args.m;
    row.lower = args.lower.data + side_offset(args, args.lower, r);
    row.upper = args.upper.data + side_offset(args, args.upper, r);
    if (args.lower.inner == 0) row.lower_all = *row.lower, row.lower = nullptr;
    if (args.upper.inner == 0) row.upper_all = *row.upper, row.upper = nullptr;
    row.m = args.m;
    row.flip = args.is_signed && b < 0.;
    row.p = args.p;
    row.w_shared = shared;
    row.c_shared = shared + args.m;
    __syncthreads();  // the row before this one is done with the shared memory
    float bad = 0.f, largest = 0.f, total = 0.f;
    each_in_order<kWide, 4, 1, kThreads, kThreads>(
        0, args.m,
        [&](auto i, auto& t) {
          row.read(i, [&](int k, float x, float lo, float hi) {
            if (!(lo <= 0.f && hi >= 0.f && vabs(x) <= FLT_MAX)) bad = 1.f;
            const Element e = row.element(x, lo, hi);
            t.v[0][k] = e.w;
            if (kShared) {
              row.w_shared[i.at(k)] = e.w;
              row.c_shared[i.at(k)] = e.c;
            }
          });
        },
        [&](const float* t) {
          if (kKind == Distance::l1)
            largest = vmax(largest, t[0]);
          else
            total += slope_of<kKind>(t[0]);
        });
    __syncthreads();
    const bool valid = block_max(bad) == 0.f && fabs(b) < kInf;
    const double target = row.flip ? -b : b;
    RowResult result;
    if (valid && (target > 0. || (args.is_signed && target == 0.))) {
      if constexpr (kKind == Distance::l1)
        result = solve_fill(row, target, block_max(largest), args.m, row.flip);
      else if constexpr (kKind == Distance::lp)
        result = solve_power(row, target, args.p, -kInf, args.m, row.flip);
      else
        solve_quadratic<kKind, false>(row, target, start_in_float32<kKind>(row, target, block_sum(total)), args.m,
                                      row.flip, result);
    }
    const float nan = static_cast<float>(kInf) * 0.f;
    if (threadIdx.x == 0) {
      args.distance[r] = valid ? round_down(row.flip ? -result.value : result.value) : nan;
      if (args.multiplier) args.multiplier[r] = valid ? static_cast<float>(result.multiplier) : nan;
    }
    if (args.point) {
      float* point = args.point + r * args.m;
      each_element<kWide, 4>(args.m, 0, threadIdx.x, kThreads, [&](auto i) {
        Values<float, decltype(i)::count> to;
        row.read(i, [&](int k, float x, float lo, float hi) {
          const Element e = row.element(x, lo, hi);
          const float step = static_cast<float>(moved_by(result, kKind, args.p, e.w, e.c));
          to.v[k] = valid ? ((x > 0.f) != row.flip ? -step : step) : nan;
        });
        store_at(point, i, to);
      });
    }
  }
}

// Whether rows of a side start at multiples of 16 bytes, or are one number each.
bool in_fours(const DistanceArgs& args, const BoxSide& side) {
  if (side.inner == 0) return true;
  for (int k = 0; k < args.dims; ++k)
    if (args.size[k] > 1 && side.stride[k] % 4 != 0) return false;
  return Addresses().add(side.data).whole(4);
}

template <Distance kKind, bool kWide>
void launch(const DistanceArgs& args, void* stream) {
  const int64_t bytes = 2 * args.m * static_cast<int64_t>(sizeof(float));
  const unsigned blocks = static_cast<unsigned>(args.rows < 0x7fffffff ? args.rows : 0x7fffffff);
  if (bytes <= kSharedBytes)
    FR_LAUNCH((distance_kernel<kKind, true, kWide>), blocks, kThreads, static_cast<size_t>(bytes), stream, args);
  else
    FR_LAUNCH((distance_kernel<kKind, false, kWide>), blocks, kThreads, 0, stream, args);
}
template <Distance kKind>
void launch(const DistanceArgs& args, void* stream) {
  const bool wide =
      Addresses().add(args.a).add(args.point).whole(args.m) && in_fours(args, args.lower) && in_fours(args, args.upper);
  wide ? launch<kKind, true>(args, stream) : launch<kKind, false>(args, stream);
}

}  // namespace

FR_NS_END

namespace fastrobust {

void polyhedral_distance_cuda(const DistanceArgs& args, void* stream) {
  if (args.rows == 0) return;
  switch (args.kind) {
    case Distance::l1:
      return launch<Distance::l1>(args, stream);
    case Distance::l2:
      return launch<Distance::l2>(args, stream);
    case Distance::linf:
      return launch<Distance::linf>(args, stream);
    default:
      return launch<Distance::lp>(args, stream);
  }
}

}  // namespace fastrobust
