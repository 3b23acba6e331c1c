#include "bindings/bindings.h"
#include "bindings/tensor_view.h"
#include "runtime/device.h"
#include "runtime/digest.h"
#include "runtime/dispatch.h"
#include "runtime/parallel.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  using namespace fastrobust;
  m.doc() = "Compiled kernels of fastrobust. Use the functions of fastrobust.ops instead.";
  m.attr("__version__") = FASTROBUST_VERSION;
  m.attr("cpu_variants") = FASTROBUST_VARIANTS;
#if defined(FASTROBUST_HAS_CUDA)
  m.attr("cuda_toolkit") = FASTROBUST_CUDA_VERSION;
  m.attr("cuda_architectures") = FASTROBUST_CUDA_ARCHS;
#else
  m.attr("cuda_toolkit") = "";
  m.attr("cuda_architectures") = "";
#endif
#if defined(__VERSION__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "";
#endif
  m.def("digest", [](uintptr_t address, int64_t bytes) {
    return bytes > 0 ? digest(pointer<const void>(address, bytes, "address"), bytes) : uint64_t{0};
  });
  m.def("cpu_variant", [] { return cpu_variant_name(); });
  m.def("cpu_variant_reason", [] { return cpu_variant_reason(); });
  m.def("num_threads", &num_threads);
  m.def("thread_backend", [] { return thread_backend(); });
  m.def("learn_tensor_type", &learn_tensor_type);
  m.def("cuda_devices", [] {
    const DeviceReport r = device_report();
    return py::make_tuple(r.devices, r.error);
  });
  bind_bounds(m);
  bind_pgd(m);
  bind_polyhedron(m);
  bind_store(m);
  bind_binary(m);
}
