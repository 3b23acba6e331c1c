// Extremes of linear bounds over boxes, balls and their intersections: one row at a time, summed in a fixed order.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/formulas.h"
#include "bounds/support.h"
#include "bounds/window.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// One side of one row: its coefficients, and the maps it sees.
struct Row {
  const Rows& r;
  int64_t row;
  const float *a, *less, *center, *radius, *x, *eps;
  bool maximum;

  Row(const ConcretizeArgs& g, int64_t at, int side) : r(g.rows), row(at), maximum(side == 1) {
    const int64_t base = example_of(r, row) * map_size(r);
    const auto map = [base](const float* p) { return p == nullptr ? nullptr : p + base; };
    a = r.a + side * r.side_stride + source_row(r, row) * r.length;
    less = r.minus != nullptr ? r.a + side * r.side_stride + r.minus[row] * r.length : nullptr;
    center = map(g.center), radius = map(g.radius), x = map(g.x), eps = map(g.eps);
  }

  // body(v, get): the coefficients of some positions, and the reader of a map there.
  template <class Body>
  void each(Body body) const {
    const auto some = [&](int64_t at, int64_t map, int n) FR_INLINE_LAMBDA {
      const auto read = [n](const float* p) FR_INLINE_LAMBDA { return n == kLanes ? load(p) : load_n(p, n); };
      Vec v = read(a + at);
      if (less != nullptr) v = v - read(less + at);
      body(v, [&](const float* p) FR_INLINE_LAMBDA { return read(p + map); });
    };
    for (int64_t line = 0; line < lines_of(r); ++line) {
      const Segment s = segment_of(r, row, line);
      int64_t i = s.begin, map = s.map;
      for (; i + kLanes <= s.end; i += kLanes, map += kLanes) some(i, map, kLanes);
      if (i < s.end) some(i, map, static_cast<int>(s.end - i));
    }
  }
};

template <Dual kDual, bool kBox>
float extreme_of_one(const Row& row) {
  Vec mid(0.f), reach(0.f), size(0.f);
  row.each([&](Vec v, auto map) FR_INLINE_LAMBDA {
    if (kBox) {
      mid = fmadd(v, map(row.center), mid);
      reach = fmadd(vabs(v), map(row.radius), reach);
    } else {
      mid = fmadd(v, map(row.x), mid);
      size = norm_term<kDual>(vabs(v * map(row.eps)), size);
    }
  });
  float length = kBox ? lane_sum(reach) : norm_of(size, kDual);
  if (!kBox && kDual == Dual::l2)
    length = root_of_squares(length, [&] {
      double wide = 0.;
      row.each([&](Vec v, auto map) { wide += squares_of(v * map(row.eps)); });
      return wide;
    });
  return row.maximum ? lane_sum(mid) + length : lane_sum(mid) - length;
}

template <Dual kDual>
float extreme_of_both(const Row& row) {
  const auto room_at = [&](Vec v, auto map, Vec e) FR_INLINE_LAMBDA {
    return room_of(v, row.maximum, map(row.center), map(row.radius), map(row.x), e);
  };
  LevelSearch<kDual> search;
  float scale = 1.f;  // of w, so that its squares are floats
  const auto begin = [&] {
    Vec spent(0.f), other(0.f), size(0.f);
    row.each([&](Vec v, auto map) FR_INLINE_LAMBDA {
      const Vec e = map(row.eps), w = vabs(v * e) * Vec(scale), room = room_at(v, map, e);
      search_terms<kDual>(w, room, Vec(0.f), spent, other);
      size = kDual == Dual::l2 ? fmadd(w, w, size) : vmax(w, size);
    });
    const float top = kDual == Dual::l2 ? lane_sum(size) : max_lane(size);
    search.start(lane_sum(spent), lane_sum(other), top);
    return top;
  };
  const float top = begin();
  if (kDual == Dual::l2 && !search.done && (scale = scale_of_squares(top)) != 1.f) begin();
  while (!search.done) {
    Vec spent(0.f), other(0.f);
    const Vec level(static_cast<float>(search.level));
    row.each([&](Vec v, auto map) FR_INLINE_LAMBDA {
      const Vec e = map(row.eps);
      search_terms<kDual>(vabs(v * e) * Vec(scale), room_at(v, map, e), level, spent, other);
    });
    search.step(lane_sum(spent), lane_sum(other));
  }
  Vec mid(0.f), reach(0.f), at_x(0.f), size(0.f);
  const Vec level(static_cast<float>(search.level));
  const auto part_of = [&](Vec v, auto map, Vec e) FR_INLINE_LAMBDA {
    return ball_part<kDual>(v, vabs(v * e) * Vec(scale), room_at(v, map, e), e, level, scale);
  };
  row.each([&](Vec v, auto map) FR_INLINE_LAMBDA {
    const Vec e = map(row.eps), c = map(row.center), r = map(row.radius), x = map(row.x);
    const Vec part = part_of(v, map, e), rest = v - part;
    mid = fmadd(rest, c, mid);
    reach = fmadd(vabs(rest), r, reach);
    at_x = fmadd(part, x, at_x);
    size = norm_term<kDual>(vabs(part * e), size);
  });
  float ball = norm_of(size, kDual);
  if (kDual == Dual::l2)
    ball = root_of_squares(ball, [&] {
      double wide = 0.;
      row.each([&](Vec v, auto map) {
        const Vec e = map(row.eps);
        wide += squares_of(part_of(v, map, e) * e);
      });
      return wide;
    });
  const float length = lane_sum(reach) + ball, middle = lane_sum(mid) + lane_sum(at_x);
  return row.maximum ? middle + length : middle - length;
}

using Extreme = float (*)(const Row&);
template <Dual kDual>
Extreme pick(bool box) {
  return box ? extreme_of_both<kDual> : extreme_of_one<kDual, false>;
}
Extreme pick(const ConcretizeArgs& g) {
  const bool box = g.center != nullptr;
  switch (g.dual) {
    case Dual::l1:
      return pick<Dual::l1>(box);
    case Dual::l2:
      return pick<Dual::l2>(box);
    case Dual::linf:
      return pick<Dual::linf>(box);
    default:
      return extreme_of_one<Dual::none, true>;
  }
}

}  // namespace

void concretize_rows(const ConcretizeArgs& g, int64_t begin, int64_t end) {
  const Extreme f = pick(g);
  const Rows& r = g.rows;
  for (int64_t row = begin; row < end; ++row)
    for (int side = 0; side < r.sides; ++side) {
      const int64_t at = side * r.count + row;
      g.out[at] = g.b[at] + f(Row(g, row, side));
    }
}

void concretize_cpu(const ConcretizeArgs& g) {
  parallel_for(g.rows.count, grain_of(g.rows), [&](int64_t begin, int64_t end) { concretize_rows(g, begin, end); });
}

FR_NS_END
