// One row of polyhedral_distance on the CPU and the passes over it that solve.h asks for.
//
// p = 2, inf, 3 and 1.5: a small sample of the row tells roughly where the root lies. One pass then settles the
// elements that surely meet the box before it and those that surely do not, and notes the few others, among which the
// root is found. p = 1 packs what lies above a cut, taken from a sample too, into a buffer, and searches there. Other p
// pack the whole row with its logarithms.
#pragma once

#include <algorithm>

#include "polyhedron/power.h"
#include "polyhedron/solve.h"
#include "polyhedron/wide.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kSampled = 16;  // rows of fewer vectors are taken whole

// One side of the box: element j lies at data[j & mask]. A side with one value for the whole row is spread to a vector.
struct Side {
  const float* data;
  int64_t mask;
  float spread[kLanes];

  void point_to(const float* first, bool inner) {
    data = inner ? first : spread;
    mask = inner ? -1 : 0;
    if (!inner)
      for (float& v : spread) v = *first;
  }
  Vec at(int64_t j) const { return load(data + (j & mask)); }
  Vec at_end(int64_t j, int left) const { return mask ? load_n(data + j, left) : load(data); }
};

struct Row {
  // the input
  const float* a;
  Side lower, upper;
  int64_t m;
  bool flip;
  const float* next;   // the row that comes after this one
  double spread = 0.;  // relative error of what a sample suggests, rarely more
  // elements packed together, and a vector of zeros behind them
  float* w;
  float* c;
  int64_t count;
  uint64_t* list;  // vectors with elements in the band: the first element's index, and which ones by bits
  float limit;     // p = 1: every element with w above it is there
  bool finite;     // p = 1: no NaN and no infinity seen
  // general p
  double p;
  double* log_w;
  double* log_c;

  // Calls part(|a|, room of the box against the sign of a) for every vector of the row. What it reads is copied first:
  // the stores of `part` could change the members.
  template <class Part>
  FR_HD void each(const Part& part) const {
    const Vec zero(0.f), turn(flip ? -1.f : 1.f);
    const float *const from = a, *const low = lower.data, *const high = upper.data;
    const int64_t n = m, low_mask = lower.mask, high_mask = upper.mask;
    int64_t j = 0;
    for (; j + kLanes <= n; j += kLanes) {
      const Vec x = load(from + j);
      part(vabs(x), select(x * turn > zero, -load(low + (j & low_mask)), load(high + (j & high_mask))));
    }
    if (j < n) {
      const int left = static_cast<int>(n - j);
      const Vec x = load_n(from + j, left);
      part(vabs(x), select(x * turn > zero, -lower.at_end(j, left), upper.at_end(j, left)));
    }
  }
  void end_of_packed(int64_t n) {
    count = n;
    store(w + n, Vec(0.f));
    store(c + n, Vec(0.f));
  }

  bool box_is_valid() const {
    const Vec zero(0.f);
    Mask valid = zero <= zero;
    int64_t j = 0;
    for (; j + kLanes <= m; j += kLanes) valid = valid & (lower.at(j) <= zero) & (upper.at(j) >= zero);
    if (j < m) {
      const int left = static_cast<int>(m - j);
      valid = valid & (lower.at_end(j, left) <= zero) & (upper.at_end(j, left) >= zero);
    }
    return !any(!valid);
  }
  bool is_finite() const {
    const Vec most(FLT_MAX);
    Mask valid = most <= most;
    int64_t j = 0;
    for (; j + kLanes <= m; j += kLanes) valid = valid & (vabs(load(a + j)) <= most);
    if (j < m) valid = valid & (vabs(load_n(a + j, static_cast<int>(m - j))) <= most);
    return !any(!valid);
  }

  double sample() {
    const int64_t vectors = m / kLanes;
    if (vectors < kSampled) return 0.;
    const int64_t take = std::min<int64_t>(std::max<int64_t>(vectors / 12, 8), 64), step = vectors / take;
    const Vec zero(0.f), turn(flip ? -1.f : 1.f);
    for (int64_t i = 0; i < take; ++i) {
      const int64_t j = (i * step + step / 2) * kLanes;
      const Vec x = load(a + j);
      store(w + i * kLanes, vabs(x));
      store(c + i * kLanes, select(x * turn > zero, -lower.at(j), upper.at(j)));
    }
    count = take * kLanes;
    spread = 2. / std::sqrt(static_cast<double>(count));
    return static_cast<double>(count) / static_cast<double>(m);
  }

  // ---- p = 2 and p = inf ----
  // A guess of the root from a sample.
  template <Distance kKind>
  Start guess(double b) {
    const double part = b * sample();
    if (!(part > 0.)) return {0., 0.};
    double before = 0., t = part / sampled<kKind>(0.f).slope;
    for (int i = 0; i < 4 && t < 0x1p60 && t > 1.05 * before; ++i) {
      const FastSums s = sampled<kKind>(static_cast<float>(t));
      before = t;
      t = (part - s.used) / s.slope;
    }
    return t >= before && t > 0x1p-60 && t < 0x1p60 ? Start{t, t} : Start{0., 0.};
  }
  template <Distance kKind>
  FastSums sampled(float t) const {
    Vec used(0.f), slope(0.f);
    const Vec level(t), zero(0.f);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec x = load(w + j), y = load(c + j);
      const Mask fixed = y <= cap_at<kKind>(level, x);
      used = used + select(fixed, x * y, zero);
      slope = slope + select(fixed, zero, slope_of<kKind>(x));
    }
    return {sum(widen(used)), sum(widen(slope))};
  }

  // The row is read by runs of eight vectors, and the next row brought closer on the way.
  template <Distance kKind>
  BandSums band(float from, float to) {
    return lower.mask && upper.mask ? band<kKind, true>(from, to) : band<kKind, false>(from, to);
  }
  template <Distance kKind, bool kFull>
  BandSums band(float from, float to) {
    const Vec first(from), last(to), zero(0.f);
    const float *const source = a, *const low = lower.data, *const high = upper.data, *const ahead = next;
    const int64_t low_mask = kFull ? -1 : lower.mask, high_mask = kFull ? -1 : upper.mask;
    uint64_t* const found = list;
    int64_t n = 0;
    DVec used(0.), slope(0.), powers(0.);
    Vec spent[4], free[4], power[4];
    const auto part = [&](int i, int64_t k, Vec x, Vec down, Vec up) FR_INLINE_LAMBDA {
      const Vec size = vabs(x), room = select_by_sign(x, up, -down);
      const Mask fixed = room <= cap_at<kKind>(first, size), reached = room <= cap_at<kKind>(last, size);
      const Vec s = select(fixed, size * room, zero), f = select(reached, zero, slope_of<kKind>(size));
      spent[i & 3] = i < 4 ? s : spent[i & 3] + s;
      free[i & 3] = i < 4 ? f : free[i & 3] + f;
      if (kKind != Distance::linf) {
        const Vec q = select(fixed, power_of<kKind>(room), zero);
        power[i & 3] = i < 4 ? q : power[i & 3] + q;
      }
      const uint64_t between = bits(reached & !fixed);  // few: noted without a branch
      found[n] = static_cast<uint64_t>(k) << kLanes | between;
      n += between != 0;
    };
    const auto add_up = [&]() FR_INLINE_LAMBDA {
      used = used + widen((spent[0] + spent[1]) + (spent[2] + spent[3]));
      slope = slope + widen((free[0] + free[1]) + (free[2] + free[3]));
      if (kKind != Distance::linf) powers = powers + widen((power[0] + power[1]) + (power[2] + power[3]));
    };
    int64_t j = 0;
    for (; j + 8 * kLanes <= m; j += 8 * kLanes) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int64_t k = j + i * kLanes;
        __builtin_prefetch(ahead + k);
        part(i, k, load(source + k), load(low + (k & low_mask)), load(high + (k & high_mask)));
      }
      add_up();
    }
    if (j < m) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const int64_t k = j + i * kLanes;
        const int left = static_cast<int>(std::min<int64_t>(std::max<int64_t>(m - k, 0), kLanes));
        if (left > 0)
          part(i, k, load_n(source + k, left), lower.at_end(k, left), upper.at_end(k, left));
        else if (i < 4)
          spent[i] = free[i] = power[i] = zero;
      }
      add_up();
    }
    gather(n);
    return {sum(used), sum(slope), kKind != Distance::linf ? sum(powers) : 0.};
  }
  // Packs the elements of the first n entries of the list.
  void gather(int64_t entries) {
    const Vec zero(0.f);
    float *const pw = w, *const pc = c;
    int64_t n = 0;
    for (int64_t i = 0; i < entries; ++i) {
      const int64_t k = static_cast<int64_t>(list[i] >> kLanes);
      const int left = static_cast<int>(std::min<int64_t>(m - k, kLanes));
      const Mask between = mask_of(static_cast<uint32_t>(list[i] & ((1u << kLanes) - 1)));
      Vec x, down, up;
      if (left == kLanes) {
        x = load(a + k);
        down = lower.at(k);
        up = upper.at(k);
      } else {
        x = load_n(a + k, left);
        down = lower.at_end(k, left);
        up = upper.at_end(k, left);
      }
      n += pack(pw + n, pc + n, between, vabs(x), select(x > zero, -down, up));
    }
    end_of_packed(n);
  }
  // float64 sums over what is packed, S = {c <= t v}
  template <Distance kKind>
  RowSums within(double t) const {
    DVec used(0.), slope(0.), powers(0.);
    const DVec level(t);
    for (int64_t j = 0; j < count; j += kLanes) {
      const DVec x = widen(load(w + j)), y = widen(load(c + j));
      const WideMask fixed = at_most(y, cap_at<kKind>(level, x));
      used = used + keep(fixed, x * y);
      slope = slope + drop(fixed, slope_of<kKind>(x));
      if (kKind != Distance::linf) powers = powers + keep(fixed, power_of<kKind>(y));
    }
    return {sum(used), sum(slope), kKind != Distance::linf ? sum(powers) : 0., false};
  }

  template <Distance kKind, bool kNarrow>
  RowSums sums(double t, double high) const {
    DVec used(0.), slope(0.), squares(0.);
    bool late;
    if constexpr (kNarrow) {
      Mask changed = Vec(0.f) > Vec(0.f);
      const Vec level(round_down(t)), later(-round_down(-high)), zero(0.f);
      each([&](Vec x, Vec y) FR_INLINE_LAMBDA {
        const Mask fixed = y <= cap_at<kKind>(level, x);
        changed = changed | (!fixed & (y <= cap_at<kKind>(later, x)));
        const DVec spent = widen(select(fixed, y, zero));
        used = used + widen(x) * spent;
        slope = slope + slope_of<kKind>(widen(select(fixed, zero, x)));
        if (kKind == Distance::l2) squares = squares + spent * spent;
      });
      late = any(changed);
    } else {
      WideMask changed = no_lane();
      const DVec level(t), later(high);
      each([&](Vec size, Vec room) FR_INLINE_LAMBDA {
        const DVec x = widen(size), y = widen(room);
        const WideMask fixed = at_most(y, cap_at<kKind>(level, x));
        changed = changed | (at_most(y, cap_at<kKind>(later, x)) - fixed);
        used = used + keep(fixed, x * y);
        slope = slope + drop(fixed, slope_of<kKind>(x));
        if (kKind == Distance::l2) squares = squares + keep(fixed, y * y);
      });
      late = any(changed);
    }
    return {sum(used), sum(slope), kKind == Distance::l2 ? sum(squares) : 0., late};
  }

  // Compensated: exact up to about m 2^-106 of the sum.
  template <Distance kKind, bool kNarrow>
  Pair exact_used(double t) const {
    Pair s{0., 0.};
    const float level = round_down(t);
    for (int64_t j = 0; j < m; ++j) {
      const float x = flip ? -a[j] : a[j], size = vabs(x);
      const float room = x > 0.f ? -lower.data[j & lower.mask] : upper.data[j & upper.mask];
      const bool fixed = kNarrow ? room <= cap_at<kKind>(level, size)
                                 : static_cast<double>(room) <= cap_at<kKind>(t, static_cast<double>(size));
      if (size > 0.f && fixed) s = add(s, static_cast<double>(size) * static_cast<double>(room));
    }
    return add_exact(s.high, s.low);
  }

  // ---- elements that were packed ----
  // Compensated: exact up to about m 2^-106 of the sum.
  template <class Fixed>
  Pair exact(const Fixed& fixed) const {
    Pair s{0., 0.};
    for (int64_t j = 0; j < count; ++j)
      if (w[j] > 0.f && fixed(j)) s = add(s, static_cast<double>(w[j]) * static_cast<double>(c[j]));
    return add_exact(s.high, s.low);
  }

  // ---- general p ----
  // The row without what cannot move or has no effect; behind it elements that are always fixed and add nothing.
  void gather_all() {
    const Vec zero(0.f);
    float *const pw = w, *const pc = c;
    int64_t n = 0;
    each([&](Vec size, Vec room)
             FR_INLINE_LAMBDA { n += pack(pw + n, pc + n, (size > zero) & (room > zero), size, room); });
    end_of_packed(n);
    take_logs();
  }
  void take_logs() {
    const DVec infinite(kInf);
    for (int64_t j = 0; j < count; j += kLanes) {
      const DVec x = widen(load(w + j)), y = widen(load(c + j));
      store(log_w + j, log2_lanes(x));
      store(log_c + j, select(at_most(infinite, y), infinite, log2_lanes(y)));
    }
    for (int64_t j = count; j < count + kLanes; ++j) {
      log_w[j] = 0.;
      log_c[j] = -kInf;
    }
  }
  // log2 lambda at the root, guessed from a sample; -inf for none.
  double guess_power(double b) {
    const double part = b * sample();
    if (!(part > 0.)) return -kInf;
    take_logs();
    double at = -kInf;
    for (int i = 0; i < 6; ++i) {
      const PowerSums s = power(at);
      const double level = (part - s.used) / (exp2(s.top) * s.slope);
      const double next = (p - 1.) * std::log2(level) - s.top;
      if (!(next > at && next < kInf)) return at;
      if (next - at < 0x1p-5) return next;
      at = next;
    }
    return at;
  }
  // log2 lambda at which the elements meet the box
  DVec meets(int64_t j) const { return DVec(p - 1.) * load_wide(log_c + j) - load_wide(log_w + j); }

  PowerSums power(double at) const {
    const DVec level(at), none(-kInf);
    DVec largest(0.), top(-kInf);
    for (int64_t j = 0; j < count; j += kLanes) {
      const WideMask fixed = at_most(meets(j), level);
      largest = vmax(largest, keep(fixed, widen(load(c + j))));
      top = vmax(top, select(fixed, none, load_wide(log_w + j)));
    }
    PowerSums s{0., lane_max(top), 0., lane_max(largest), 0.};
    const DVec share(p), rate(p / (p - 1.)), log_top(s.top > -kInf ? s.top : 0.);
    const DVec log_largest(s.largest > 0. ? std::log2(s.largest) : 0.);
    DVec used(0.), slope(0.), powers(0.);
    for (int64_t j = 0; j < count; j += kLanes) {
      const WideMask fixed = at_most(meets(j), level);
      const DVec moved = rate * (load_wide(log_w + j) - log_top), met = share * (load_wide(log_c + j) - log_largest);
      const DVec part = exp2_lanes(select(fixed, met, moved));
      used = used + keep(fixed, widen(load(w + j)) * widen(load(c + j)));
      slope = slope + drop(fixed, part);
      powers = powers + keep(fixed, part);
    }
    s.used = sum(used);
    s.slope = sum(slope);
    s.powers = sum(powers);
    return s;
  }
  Pair exact_used_power(double at) const {
    return exact([&](int64_t j) { return (p - 1.) * log_c[j] - log_w[j] <= at; });
  }

  // ---- p = 1 ----
  // A cut such that what lies above it should be worth b, and a few elements more.
  void guess_cut(double b) {
    limit = 0.f;
    const double part = b * sample();
    if (!(part > 0.)) return;
    const double all = above(0.f).used, wanted = 1.5 * part + all / 32.;
    if (!(wanted < all)) return;
    float high = largest();
    for (int i = 0; i < 8; ++i) {
      const float middle = 0.5f * (limit + high);
      (above(middle).used >= wanted ? limit : high) = middle;
    }
  }
  void gather_above() {
    const Vec cut(limit), zero(0.f), most(FLT_MAX);
    Mask good = zero <= zero;
    float *const pw = w, *const pc = c;
    int64_t n = 0;
    each([&](Vec size, Vec room) FR_INLINE_LAMBDA {
      good = good & (size <= most);
      n += pack(pw + n, pc + n, (size > cut) & (room > zero), size, room);
    });
    end_of_packed(n);
    finite = !any(!good);
  }
  void gather_rest() {
    limit = 0.f;
    gather_above();
  }
  float largest() const {
    Vec most(0.f);
    for (int64_t j = 0; j < count; j += kLanes) most = vmax(most, load(w + j));
    return max_lane(most);
  }

  FillStep above(float level) const {
    Vec used(0.f);
    const Vec cut(level), zero(0.f), infinite(static_cast<float>(kInf));
    Vec over(infinite), up_to(0.f);
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec x = load(w + j);
      const Mask more = x > cut;
      used = used + select(more, x * load(c + j), zero);
      over = vmin(over, select(more, x, infinite));
      up_to = vmax(up_to, select(more, zero, x));
    }
    return {sum(widen(used)), -max_lane(-over), max_lane(up_to)};
  }
  FillStep fill_start(double b) {
    FillStep s = above(limit);
    if (limit > 0.f && !(s.used > b * (1. + 0x1p-10))) {
      gather_rest();
      s = above(limit);
    }
    return s;
  }
  FillStep fill_fast(float level) {
    if (level < limit) gather_rest();
    FillStep s = above(level);
    if (limit > 0.f && !(s.up_to > 0.f)) {
      gather_rest();
      s = above(level);
    }
    return s;
  }
  FillSums fill(float level) {
    if (level < limit) gather_rest();
    DVec used(0.), cost(0.), tie(0.), infinite_ties(0.);
    const Vec cut(level), zero(0.f), infinite(static_cast<float>(kInf));
    for (int64_t j = 0; j < count; j += kLanes) {
      const Vec x = load(w + j), y = load(c + j);
      const Mask more = x > cut, same = x == cut, open = y == infinite;
      const Vec spent = select(more, y, zero);
      used = used + widen(select(more, x, zero)) * widen(spent);
      cost = cost + widen(spent);
      tie = tie + widen(select(same & !open, y, zero));
      infinite_ties = infinite_ties + widen(select(same & open, Vec(1.f), zero));
    }
    return {sum(used), sum(cost), sum(tie), sum(infinite_ties)};
  }
  Pair exact_above(float level) {
    if (level < limit) gather_rest();
    return exact([&](int64_t j) { return w[j] > level; });
  }

  // ---- the point ----
  template <Distance kKind>
  void write_point(const RowResult& result, bool valid, float* point) const {
    const Vec zero(0.f), turn(flip ? -1.f : 1.f), nan(static_cast<float>(kInf) * 0.f);
    const DVec level(result.level), rate(1. / (p - 1.)), top(result.top);
    int64_t j = 0;
    for (; j + kLanes <= m && kKind != Distance::l1; j += kLanes) {
      const Vec x = load(a + j) * turn, size = vabs(x), room = select(x > zero, -lower.at(j), upper.at(j));
      DVec moved = level;
      if (kKind == Distance::l2) moved = level * widen(size);
      if (kKind == Distance::lp) moved = level * exp2_lanes(rate * (log2_lanes(widen(size)) - top));
      const Vec most = narrow(moved);
      const Vec step = select(size > zero, vmin(room, most), zero);
      store(point + j, valid ? select(x > zero, -step, step) : nan);
    }
    for (; j < m; ++j) {
      const float x = flip ? -a[j] : a[j];
      const float room = x > 0.f ? -lower.data[j & lower.mask] : upper.data[j & upper.mask];
      const float step = static_cast<float>(moved_by(result, kKind, p, vabs(x), room));
      point[j] = valid ? (x > 0.f ? -step : step) : static_cast<float>(kInf) * 0.f;
    }
  }
};

}  // namespace

FR_NS_END
