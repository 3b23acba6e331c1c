// polyhedral_distance on the CPU: rows one by one, in parallel.
#include <algorithm>
#include <new>

#include "polyhedron/row_cpu.h"
//
#include "polyhedron/kernels.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// Elements that a thread should have before a second one is woken.
constexpr int64_t kGrain = 8192;
// Offsets of the rows' sides in elements, without a division a row.
struct Walk {
  int64_t index[kBoxDims] = {};
  int64_t lower, upper;

  Walk(const DistanceArgs& args, int64_t row)
      : lower(side_offset(args, args.lower, row)), upper(side_offset(args, args.upper, row)) {
    for (int k = args.dims - 1; k >= 0; --k) {
      index[k] = row % args.size[k];
      row /= args.size[k];
    }
  }
  void next(const DistanceArgs& args) {
    for (int k = args.dims - 1; k >= 0; --k) {
      lower += args.lower.stride[k];
      upper += args.upper.stride[k];
      if (++index[k] < args.size[k]) return;
      lower -= args.size[k] * args.lower.stride[k];
      upper -= args.size[k] * args.upper.stride[k];
      index[k] = 0;
    }
  }
};

struct Scratch {
  void* start;
  explicit Scratch(size_t bytes) : start(::operator new(bytes, std::align_val_t(64))) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { ::operator delete(start, std::align_val_t(64)); }
};

// False where a coefficient is NaN or infinite.
template <Distance kKind>
bool solve_row(Row& row, double target, RowResult& result) {
  if constexpr (kKind == Distance::l1) {
    row.guess_cut(target);
    row.gather_above();
    if (row.finite) result = solve_fill(row, target, row.largest(), row.m, row.flip);
    return row.finite;
  } else if constexpr (kKind == Distance::lp) {
    if (!row.is_finite()) return false;
    const double start = row.guess_power(target);
    row.gather_all();
    result = solve_power(row, target, row.p, start, row.m, row.flip);
    return true;
  } else {
    Start start = row.template guess<kKind>(target);
    if (!row.flip && solve_quick<kKind>(row, target, row.p, start, row.spread, row.m, result)) return true;
    if constexpr (kKind == Distance::l3 || kKind == Distance::l3_2) return solve_row<Distance::lp>(row, target, result);
    if (!solve_quadratic<kKind, true>(row, target, start, row.m, row.flip, result))
      solve_quadratic<kKind, false>(row, target, {0., 0.}, row.m, row.flip, result);
    return result.value == result.value;
  }
}

template <Distance kKind>
void solve_rows(const DistanceArgs& args, int64_t first, int64_t last) {
  constexpr bool kPower = kKind == Distance::lp || kKind == Distance::l3 || kKind == Distance::l3_2;
  // no containers: their code would be a weak symbol shared between the instruction sets
  const int64_t room = (args.m + 2 * kLanes - 1) / kLanes * kLanes + kLanes, wide = kPower ? 2 * room : 0,
                vectors = room / kLanes;
  const Scratch memory(static_cast<size_t>(2 * room) * sizeof(float) + static_cast<size_t>(wide) * sizeof(double) +
                       static_cast<size_t>(vectors) * sizeof(uint64_t));
  Row row;
  row.m = args.m;
  row.w = static_cast<float*>(memory.start);
  row.c = row.w + room;
  row.p = args.p;
  row.log_w = reinterpret_cast<double*>(row.w + 2 * room);
  row.log_c = row.log_w + room;
  row.list = reinterpret_cast<uint64_t*>(row.log_w + wide);
  Walk walk(args, first);
  int64_t lower = 0, upper = 0;
  bool box = false;
  for (int64_t r = first; r < last; ++r, walk.next(args)) {
    const double b = static_cast<double>(args.b[r]);
    row.a = args.a + r * args.m;
    row.next = args.a + std::min(r + 1, last - 1) * args.m;
    row.flip = args.is_signed && b < 0.;
    if (r == first || lower != walk.lower || upper != walk.upper) {  // rows of one example share their box
      lower = walk.lower;
      upper = walk.upper;
      row.lower.point_to(args.lower.data + lower, args.lower.inner != 0);
      row.upper.point_to(args.upper.data + upper, args.upper.inner != 0);
      box = row.box_is_valid();
    }
    RowResult result;
    const double target = row.flip ? -b : b;
    bool valid = box && fabs(b) < kInf;
    if (valid)
      valid = target > 0. || (args.is_signed && target == 0.) ? solve_row<kKind>(row, target, result) : row.is_finite();
    const float nan = static_cast<float>(kInf) * 0.f;
    args.distance[r] = valid ? round_down(row.flip ? -result.value : result.value) : nan;
    if (args.multiplier) args.multiplier[r] = valid ? static_cast<float>(result.multiplier) : nan;
    if (args.point) row.template write_point<kPower ? Distance::lp : kKind>(result, valid, args.point + r * args.m);
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
        if (args.p == 3.) return solve_rows<Distance::l3>(args, first, last);
        if (args.p == 1.5) return solve_rows<Distance::l3_2>(args, first, last);
        return solve_rows<Distance::lp>(args, first, last);
    }
  });
}

}  // namespace

extern const PolyhedronTable polyhedron_table;
const PolyhedronTable polyhedron_table = {distance};

FR_NS_END
