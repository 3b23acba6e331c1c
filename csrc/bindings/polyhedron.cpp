#include <algorithm>
#include <vector>

#include "bindings/bindings.h"
#include "polyhedron/kernels.h"
#include "runtime/device.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

// (address, strides of the leading dimensions, stride of the last one) of a side broadcast to a.
BoxSide side(const py::tuple& t, int64_t elements, const char* name) {
  BoxSide s;
  s.data = pointer<const float>(t[0].cast<uintptr_t>(), elements, name);
  const auto strides = t[1].cast<std::vector<int64_t>>();
  for (size_t k = 0; k < strides.size(); ++k) s.stride[k] = strides[k];
  s.inner = t[2].cast<int64_t>();
  return s;
}

// device < 0 is the CPU; there it returns whether a row came out as NaN. multiplier and point may be 0.
bool distance(int device, uintptr_t stream, uintptr_t a, uintptr_t b, const py::tuple& lower, const py::tuple& upper,
              const std::vector<int64_t>& sizes, int64_t m, double p, bool is_signed, uintptr_t out,
              uintptr_t multiplier, uintptr_t point) {
  if (sizes.size() > static_cast<size_t>(kBoxDims)) throw std::invalid_argument("a: too many leading dimensions");
  DistanceArgs args;
  args.dims = static_cast<int>(sizes.size());
  args.rows = 1;
  for (size_t k = 0; k < sizes.size(); ++k) {
    args.size[k] = sizes[k];
    args.rows *= sizes[k];
  }
  args.m = m;
  args.a = pointer<const float>(a, args.rows * m, "a");
  args.b = pointer<const float>(b, args.rows, "b");
  args.lower = side(lower, args.rows * m, "lower");
  args.upper = side(upper, args.rows * m, "upper");
  args.kind = p == 1. ? Distance::l1 : p == 2. ? Distance::l2 : p > 1e30 ? Distance::linf : Distance::lp;
  args.p = p;
  args.is_signed = is_signed;
  args.distance = pointer<float>(out, args.rows, "out");
  args.multiplier = reinterpret_cast<float*>(multiplier);
  args.point = reinterpret_cast<float*>(point);
  if (device < 0) {
    without_gil(args.rows * m, [&] { polyhedron().distance(args); });
    return std::any_of(args.distance, args.distance + args.rows, [](float d) { return d != d; });
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  polyhedral_distance_cuda(args, reinterpret_cast<void*>(stream));
  return false;
#else
  (void)stream;
  throw std::runtime_error("fastrobust was built without CUDA kernels; rebuild with nvcc on PATH (FASTROBUST_CUDA=ON)");
#endif
}

}  // namespace

void bind_polyhedron(py::module_& m) { m.def("polyhedral_distance", &distance); }

}  // namespace fastrobust
