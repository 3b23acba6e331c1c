// Extremes of linear bounds over boxes, balls and their intersections on CUDA: one block a row and side.
#include "bounds/kernels.h"
#include "bounds/rows_cuda.h"
#include "bounds/support.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

// ||.||_q of what the threads saw: sums, or the largest and whether there was a NaN
template <Dual kDual>
struct Norm {
  double sum = 0.;
  float top = 0.f;
  __device__ __forceinline__ void add(float w) {
    if (kDual == Dual::l2) sum += static_cast<double>(w) * w;
    if (kDual == Dual::l1) sum += static_cast<double>(w);
    if (kDual == Dual::linf) {
      top = vmax(w, top);
      sum += w == w ? 0. : 1.;
    }
  }
  __device__ __forceinline__ double result() {
    const double total = block_sum(sum);
    if (kDual == Dual::linf) {
      const double highest = block_max(top);
      return total > 0. ? static_cast<double>(nanf("")) : highest;
    }
    return kDual == Dual::l2 ? sqrt(total) : total;
  }
};

// One row of one side over its example's maps. Sums are in the order of a plain loop over the threads (each_in_order);
// outside the map all numbers are zero, and so is what they add.
template <bool kWide>
struct Row {
  const ConcretizeArgs& g;
  PlacedRow placed;
  int64_t side_offset, base;
  bool maximum;

  __device__ __forceinline__ Row(const ConcretizeArgs& args, int64_t row, int side)
      : g(args),
        placed(args.rows, row),
        side_offset(side * args.rows.side_stride),
        base(example_of(args.rows, row) * map_size(args.rows)),
        maximum(side == 1) {}

  // natural(place on the map, coefficients, terms); add(terms)
  template <int kTerms, class Natural, class Add>
  __device__ __forceinline__ void each_term(Natural natural, Add add) const {
    each_in_order<kWide, 4, kTerms, kThreads, kThreads>(
        0, g.rows.length,
        [&](auto i, auto& t) {
          const auto m = placed.on_map(i);
          auto v = placed.coefficients(side_offset, i);
          for (int k = 0; k < i.count; ++k) v.v[k] = m.there(k) ? v.v[k] : 0.f;
          natural(m, v, t);
        },
        add);
  }
  template <class M>
  __device__ __forceinline__ auto from(const float* p, M m) const {
    return from_map(p + base, m);
  }
  // The numbers of the search: w and room of each coordinate.
  template <class M, class V>
  __device__ __forceinline__ void spread(M m, const V& v, float scale, V& w, V& room) const {
    const auto eps = from(g.eps, m), center = from(g.center, m), radius = from(g.radius, m), x = from(g.x, m);
    for (int k = 0; k < M::count; ++k) {
      w.v[k] = vabs(v.v[k] * eps.v[k]) * scale;
      room.v[k] = room_of(v.v[k], maximum, center.v[k], radius.v[k], x.v[k], eps.v[k]);
    }
  }
};

template <Dual kDual, bool kWide>
__device__ double extreme_of_both(const Row<kWide>& r) {
  const ConcretizeArgs& g = r.g;
  LevelSearch<kDual> search;
  float scale = 1.f;  // of w, so that its squares are floats
  const auto begin = [&] {
    double spent = 0., other = 0., size = 0.;
    float top = 0.f;
    r.template each_term<3>(
        [&](auto m, const auto& v, auto& t) {
          auto w = v, room = v;
          r.spread(m, v, scale, w, room);
          for (int k = 0; k < m.count; ++k) {
            t.v[0][k] = t.v[1][k] = 0.f;
            search_terms<kDual>(w.v[k], room.v[k], 0.f, t.v[0][k], t.v[1][k]);
            t.v[2][k] = w.v[k];
          }
        },
        [&](const float* t) {
          spent += t[0], other += t[1], size += static_cast<double>(t[2]) * t[2], top = vmax(t[2], top);
        });
    spent = block_sum(spent), other = block_sum(other), size = block_sum(size);
    const double highest = block_max(top);
    search.start(spent, other, kDual == Dual::l2 ? size : highest);
    return size;
  };
  const double squares = begin();
  if (kDual == Dual::l2 && !search.done && (scale = scale_of_squares(squares)) != 1.f) begin();
  while (!search.done) {  // the same on every thread: so are the sums
    double spent = 0., other = 0.;
    const float level = static_cast<float>(search.level);
    r.template each_term<2>(
        [&](auto m, const auto& v, auto& t) {
          auto w = v, room = v;
          r.spread(m, v, scale, w, room);
          for (int k = 0; k < m.count; ++k) {
            t.v[0][k] = t.v[1][k] = 0.f;
            search_terms<kDual>(w.v[k], room.v[k], level, t.v[0][k], t.v[1][k]);
          }
        },
        [&](const float* t) { spent += t[0], other += t[1]; });
    spent = block_sum(spent), other = block_sum(other);
    search.step(spent, other);
  }
  double middle = 0., reach = 0.;
  Norm<kDual> norm;
  const float level = static_cast<float>(search.level);
  r.template each_term<6>(
      [&](auto m, const auto& v, auto& t) {
        auto w = v, room = v;
        r.spread(m, v, scale, w, room);
        const auto e = r.from(g.eps, m), center = r.from(g.center, m), radius = r.from(g.radius, m), x = r.from(g.x, m);
        for (int k = 0; k < m.count; ++k) {
          const float part = ball_part<kDual>(v.v[k], w.v[k], room.v[k], e.v[k], level, scale);
          t.v[0][k] = v.v[k] - part;
          t.v[1][k] = center.v[k];
          t.v[2][k] = part;
          t.v[3][k] = x.v[k];
          t.v[4][k] = radius.v[k];
          t.v[5][k] = vabs(part * e.v[k]);
        }
      },
      [&](const float* t) {
        middle += static_cast<double>(t[0]) * t[1] + static_cast<double>(t[2]) * t[3];
        reach += static_cast<double>(vabs(t[0])) * t[4];
        norm.add(t[5]);
      });
  middle = block_sum(middle), reach = block_sum(reach);
  const double length = reach + norm.result();
  return r.maximum ? middle + length : middle - length;
}

template <Dual kDual, bool kBox, bool kWide>
__device__ double extreme_of_one(const Row<kWide>& r) {
  const ConcretizeArgs& g = r.g;
  double middle = 0., reach = 0.;
  Norm<kDual> norm;
  r.template each_term<3>(
      [&](auto m, const auto& v, auto& t) {
        const auto center = r.from(kBox ? g.center : g.x, m), size = r.from(kBox ? g.radius : g.eps, m);
        for (int k = 0; k < m.count; ++k) {
          t.v[0][k] = v.v[k];
          t.v[1][k] = center.v[k];
          t.v[2][k] = kBox ? size.v[k] : vabs(v.v[k] * size.v[k]);
        }
      },
      [&](const float* t) {
        middle += static_cast<double>(t[0]) * t[1];
        if (kBox) {
          reach += static_cast<double>(vabs(t[0])) * t[2];
        } else {
          norm.add(t[2]);
        }
      });
  middle = block_sum(middle);
  const double length = kBox ? block_sum(reach) : norm.result();
  return r.maximum ? middle + length : middle - length;
}

template <Dual kDual, bool kBox, bool kWide>
__global__ void __launch_bounds__(kThreads, 4) concretize_kernel(ConcretizeArgs g) {
  const int64_t count = g.rows.count;
  for (int64_t at = blockIdx.x; at < count * g.rows.sides; at += gridDim.x) {
    const Row<kWide> row(g, at % count, static_cast<int>(at / count));
    double value;
    if constexpr (kBox && kDual != Dual::none) {
      value = extreme_of_both<kDual>(row);
    } else {
      value = extreme_of_one<kDual, kBox>(row);
    }
    if (threadIdx.x == 0) g.out[at] = g.b[at] + static_cast<float>(value);
  }
}

template <Dual kDual, bool kBox>
void launch(const ConcretizeArgs& g, void* stream) {
  const int64_t blocks = g.rows.count * g.rows.sides;
  const dim3 grid(static_cast<unsigned>(blocks < (int64_t{1} << 30) ? blocks : (int64_t{1} << 30)));
  Addresses lie = addresses_of(g.rows);
  if (by_fours(g.rows) && lie.add(g.center).add(g.radius).add(g.x).add(g.eps).whole(4))
    FR_LAUNCH((concretize_kernel<kDual, kBox, true>), grid, dim3(kThreads), 0, stream, g);
  else
    FR_LAUNCH((concretize_kernel<kDual, kBox, false>), grid, dim3(kThreads), 0, stream, g);
}
template <Dual kDual>
void launch(const ConcretizeArgs& g, void* stream) {
  g.center != nullptr ? launch<kDual, true>(g, stream) : launch<kDual, false>(g, stream);
}

}  // namespace
FR_NS_END

namespace fastrobust {

void concretize_cuda(const ConcretizeArgs& g, void* stream) {
  if (g.rows.count == 0) return;
  switch (g.dual) {
    case Dual::l1:
      return launch<Dual::l1>(g, stream);
    case Dual::l2:
      return launch<Dual::l2>(g, stream);
    case Dual::linf:
      return launch<Dual::linf>(g, stream);
    default:
      return launch<Dual::none, true>(g, stream);
  }
}

}  // namespace fastrobust
