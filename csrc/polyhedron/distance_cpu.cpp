// polyhedral_distance on the CPU: one row at a time, its w and c prepared once into a buffer that stays in cache.
#include <algorithm>
#include <new>

#include "polyhedron/solve.h"
#include "polyhedron/wide.h"
//
#include "polyhedron/kernels.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

FR_HD void prefetch(const float* p) { __builtin_prefetch(p); }

// Elements that a thread should have before a second one is woken.
constexpr int64_t kGrain = 8192;

// The passes over one row. n is m rounded up to whole pairs of vectors; the elements behind m have w = c = 0 and change
// nothing.
struct Row {
  float* w;
  float* c;
  double* log_w;  // lp only
  double* meets;  // lp only: log2 lambda at which the element meets the box
  int64_t m, n;
  double p;
  const float* next;  // the row that comes after this one: its memory is fetched while this one is summed

  template <Distance kKind>
  FastSums fast(float t) const {
    // two chains hide the latency of the additions
    Vec used0(0.f), used1(0.f), slope0(0.f), slope1(0.f);
    const Vec level(t), zero(0.f);
    for (int64_t j = 0; j < n; j += 2 * kLanes) {
      const Vec x = load(w + j), y = load(c + j), x1 = load(w + j + kLanes), y1 = load(c + j + kLanes);
      const Mask fixed = y <= cap_at<kKind>(level, x), fixed1 = y1 <= cap_at<kKind>(level, x1);
      used0 = used0 + select(fixed, x * y, zero);
      used1 = used1 + select(fixed1, x1 * y1, zero);
      slope0 = slope0 + select(fixed, zero, slope_of<kKind>(x));
      slope1 = slope1 + select(fixed1, zero, slope_of<kKind>(x1));
    }
    return {sum(widen(used0) + widen(used1)), sum(widen(slope0) + widen(slope1))};
  }

  template <Distance kKind, bool kNarrow>
  RowSums sums(double t, double high) const {
    DVec used(0.), slope(0.), squares(0.);
    if constexpr (kNarrow) {
      Mask changed = Vec(0.f) > Vec(0.f);
      const Vec level(round_down(t)), later(-round_down(-high)), zero(0.f);
      for (int64_t j = 0; j < n; j += kLanes) {
        prefetch(next + j);
        const Vec x = load(w + j), y = load(c + j);
        const Mask fixed = y <= cap_at<kKind>(level, x);
        changed = changed | (!fixed & (y <= cap_at<kKind>(later, x)));
        const DVec spent = widen(select(fixed, y, zero));
        used = used + widen(x) * spent;
        slope = slope + slope_of<kKind>(widen(select(fixed, zero, x)));
        if (kKind == Distance::l2) squares = squares + spent * spent;
      }
      return {sum(used), sum(slope), sum(squares), any(changed)};
    } else {
      WideMask changed = no_lane();
      const DVec level(t), later(high);
      for (int64_t j = 0; j < n; j += kLanes) {
        const DVec x = widen(load(w + j)), y = widen(load(c + j));
        const WideMask fixed = at_most(y, cap_at<kKind>(level, x));
        changed = changed | (at_most(y, cap_at<kKind>(later, x)) - fixed);
        used = used + keep(fixed, x * y);
        slope = slope + drop(fixed, slope_of<kKind>(x));
        if (kKind == Distance::l2) squares = squares + keep(fixed, y * y);
      }
      return {sum(used), sum(slope), sum(squares), any(changed)};
    }
  }

  // Compensated: exact up to about m 2^-106 of the sum.
  template <class Fixed>
  Pair exact(const Fixed& fixed) const {
    Pair s{0., 0.};
    for (int64_t j = 0; j < m; ++j)
      if (w[j] > 0.f && fixed(j)) s = add(s, static_cast<double>(w[j]) * static_cast<double>(c[j]));
    return add_exact(s.high, s.low);
  }
  template <Distance kKind, bool kNarrow>
  Pair exact_used(double t) const {
    if (kNarrow) return exact([&, level = round_down(t)](int64_t j) { return c[j] <= cap_at<kKind>(level, w[j]); });
    return exact([&](int64_t j) { return static_cast<double>(c[j]) <= cap_at<kKind>(t, static_cast<double>(w[j])); });
  }

  // ---- general p ----
  PowerSums power(double at) const {
    PowerSums s{0., -kInf, 0., 0., 0.};
    for (int64_t j = 0; j < m; ++j) {
      if (!(w[j] > 0.f)) continue;
      if (meets[j] <= at)
        s.largest = std::max(s.largest, static_cast<double>(c[j]));
      else
        s.top = std::max(s.top, log_w[j]);
    }
    const double q = p / (p - 1.);
    for (int64_t j = 0; j < m; ++j) {
      if (!(w[j] > 0.f)) continue;
      if (meets[j] <= at) {
        s.used += static_cast<double>(w[j]) * static_cast<double>(c[j]);
        s.powers += std::pow(static_cast<double>(c[j]) / s.largest, p);
      } else {
        s.slope += std::exp2(q * (log_w[j] - s.top));
      }
    }
    return s;
  }
  Pair exact_used_power(double at) const {
    return exact([&](int64_t j) { return w[j] > 0.f && meets[j] <= at; });
  }

  // ---- p = 1 ----
  FillStep fill_fast(float level) const {
    Vec used0(0.f), used1(0.f);
    const Vec limit(level), zero(0.f), infinite(static_cast<float>(kInf));
    Vec above(infinite), up_to(0.f);
    for (int64_t j = 0; j < n; j += 2 * kLanes) {
      const Vec x = load(w + j), x1 = load(w + j + kLanes);
      const Mask over = x > limit, over1 = x1 > limit;
      used0 = used0 + select(over, x * load(c + j), zero);
      used1 = used1 + select(over1, x1 * load(c + j + kLanes), zero);
      above = vmin(above, vmin(select(over, x, infinite), select(over1, x1, infinite)));
      up_to = vmax(up_to, vmax(select(over, zero, x), select(over1, zero, x1)));
    }
    return {sum(widen(used0) + widen(used1)), -max_lane(-above), max_lane(up_to)};
  }
  FillSums fill(float level) const {
    DVec used(0.), cost(0.), tie(0.), count(0.);
    const Vec limit(level), zero(0.f), infinite(static_cast<float>(kInf));
    for (int64_t j = 0; j < n; j += kLanes) {
      const Vec x = load(w + j), y = load(c + j);
      const Mask above = x > limit, same = x == limit, open = y == infinite;
      const Vec spent = select(above, y, zero);
      used = used + widen(select(above, x, zero)) * widen(spent);
      cost = cost + widen(spent);
      tie = tie + widen(select(same & !open, y, zero));
      count = count + widen(select(same & open, Vec(1.f), zero));
    }
    return {sum(used), sum(cost), sum(tie), sum(count)};
  }
  Pair exact_above(float level) const {
    return exact([&](int64_t j) { return w[j] > level; });
  }
};

struct Prepared {
  bool valid;
  double slope;
  float largest;
};

// w = |a| and c = the room against the sign of a.
template <Distance kKind, int kLowerInner, int kUpperInner>
Prepared prepare(const float* a, const float* lower, const float* upper, bool flip, Row& row) {
  const Vec zero(0.f), lower_all(lower[0]), upper_all(upper[0]), turn(flip ? -1.f : 1.f);
  Vec total(0.f), largest(0.f);
  Mask valid = zero <= zero;
  const auto part = [&](int64_t j, Vec x, Vec lo, Vec hi) {
    valid = valid & (lo <= zero) & (hi >= zero);
    Vec size = vabs(x);
    Vec room = select(x * turn > zero, -lo, hi);
    if (kKind == Distance::l1 || kKind == Distance::lp) {  // leave out what cannot move or has no effect
      const Mask moves = (size > zero) & (room > zero);
      largest = vmax(largest, select(moves, size, zero));
      total = total + size;
      size = select(moves, size, zero);
      room = select(moves, room, zero);
    } else {
      total = total + slope_of<kKind>(size);
    }
    store(row.w + j, size);
    store(row.c + j, room);
  };
  int64_t j = 0;
  for (; j + kLanes <= row.m; j += kLanes)
    part(j, load(a + j), kLowerInner ? load(lower + j) : lower_all, kUpperInner ? load(upper + j) : upper_all);
  if (j < row.m) {
    const int left = static_cast<int>(row.m - j);
    part(j, load_n(a + j, left), kLowerInner ? load_n(lower + j, left) : lower_all,
         kUpperInner ? load_n(upper + j, left) : upper_all);
    j += kLanes;
  }
  for (; j < row.n; j += kLanes) {
    store(row.w + j, zero);
    store(row.c + j, zero);
  }
  const double slope = sum(widen(total));
  bool good = !any(!valid);
  if (!(slope < kInf))  // an infinite or NaN coefficient, or an overflow
    for (int64_t k = 0; k < row.m; ++k) good = good && std::fabs(a[k]) < static_cast<float>(kInf);
  return {good, slope, kKind == Distance::l1 ? max_lane(largest) : 0.f};
}

template <Distance kKind>
Prepared prepare(const DistanceArgs& args, int64_t r, bool flip, Row& row) {
  const float* a = args.a + r * args.m;
  const float* lower = args.lower.data + side_offset(args, args.lower, r);
  const float* upper = args.upper.data + side_offset(args, args.upper, r);
  if (args.lower.inner)
    return args.upper.inner ? prepare<kKind, 1, 1>(a, lower, upper, flip, row)
                            : prepare<kKind, 1, 0>(a, lower, upper, flip, row);
  return args.upper.inner ? prepare<kKind, 0, 1>(a, lower, upper, flip, row)
                          : prepare<kKind, 0, 0>(a, lower, upper, flip, row);
}

void take_logs(Row& row) {
  for (int64_t j = 0; j < row.m; ++j) {
    row.log_w[j] = row.w[j] > 0.f ? std::log2(static_cast<double>(row.w[j])) : -kInf;
    row.meets[j] = row.w[j] > 0.f ? (row.p - 1.) * std::log2(static_cast<double>(row.c[j])) - row.log_w[j] : kInf;
  }
}

struct Scratch {
  void* start;
  explicit Scratch(size_t bytes) : start(::operator new(bytes, std::align_val_t(64))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(start, std::align_val_t(64)); }
};

template <Distance kKind>
void solve_rows(const DistanceArgs& args, int64_t first, int64_t last) {
  const int64_t n = (args.m + 2 * kLanes - 1) / (2 * kLanes) * (2 * kLanes);
  // no containers: their code would be a weak symbol shared between the instruction sets
  const int64_t wide = kKind == Distance::lp ? 2 * n : 0;
  const Scratch memory(static_cast<size_t>(2 * n) * sizeof(float) + static_cast<size_t>(wide) * sizeof(double));
  float* const w = static_cast<float*>(memory.start);
  double* const logs = reinterpret_cast<double*>(w + 2 * n);
  Row row{w, w + n, logs, logs + wide / 2, args.m, n, args.p, nullptr};
  for (int64_t r = first; r < last; ++r) {
    const double b = static_cast<double>(args.b[r]);
    const bool flip = args.is_signed && b < 0.;
    row.next = args.a + std::min(r + 1, last - 1) * args.m;
    const Prepared prepared = prepare<kKind>(args, r, flip, row);
    RowResult result;
    const double target = flip ? -b : b;
    const bool valid = prepared.valid && fabs(b) < kInf;
    if (valid && (target > 0. || (args.is_signed && target == 0.))) {
      if constexpr (kKind == Distance::l1) {
        result = solve_fill(row, target, prepared.largest, args.m, flip);
      } else if constexpr (kKind == Distance::lp) {
        take_logs(row);
        result = solve_power(row, target, args.p, args.m, flip);
      } else {
        if (!solve_quadratic<kKind, true>(row, target, prepared.slope, args.m, flip, result))
          solve_quadratic<kKind, false>(row, target, prepared.slope, args.m, flip, result);
      }
    }
    const float nan = static_cast<float>(kInf) * 0.f;
    args.distance[r] = valid ? round_down(flip ? -result.value : result.value) : nan;
    if (args.multiplier) args.multiplier[r] = valid ? static_cast<float>(result.multiplier) : nan;
    if (args.point) {
      const float* a = args.a + r * args.m;
      float* point = args.point + r * args.m;
      for (int64_t j = 0; j < args.m; ++j) {
        const float step = static_cast<float>(moved_by(result, kKind, args.p, row.w[j], row.c[j]));
        point[j] = valid ? ((a[j] > 0.f) != flip ? -step : step) : nan;
      }
    }
  }
}

void distance(const DistanceArgs& args) {
  if (args.rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(args.m, 1));
  parallel_for(args.rows, grain, [&](int64_t first, int64_t last) {
    switch (args.kind) {
      case Distance::l1:
        return solve_rows<Distance::l1>(args, first, last);
      case Distance::l2:
        return solve_rows<Distance::l2>(args, first, last);
      case Distance::linf:
        return solve_rows<Distance::linf>(args, first, last);
      default:
        return solve_rows<Distance::lp>(args, first, last);
    }
  });
}

}  // namespace

extern const PolyhedronTable polyhedron_table;
const PolyhedronTable polyhedron_table = {distance};

FR_NS_END
