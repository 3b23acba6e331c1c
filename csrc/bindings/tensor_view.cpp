#include "bindings/tensor_view.h"

#include <algorithm>

namespace py = pybind11;

namespace fastrobust {
namespace {

// The layout of DLPack's structures, major version 1.
struct DlTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DlExchange {
  uint32_t major, minor;
  void *older, *allocate, *export_managed, *import_managed;
  int (*view)(void* object, DlTensor* out);
};
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2;

PyTypeObject* tensor_type = nullptr;
PyObject* is_neg = nullptr;
int (*view)(void* object, DlTensor* out) = nullptr;

bool contiguous(const DlTensor& t) {
  bool ok = true;
  int64_t stride = 1;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] == 0) return true;
    if (t.shape[d] != 1) ok = ok && t.strides[d] == stride;
    stride *= t.shape[d];
  }
  return ok;
}

}  // namespace

bool learn_tensor_type(py::object type) {
  if (!PyType_Check(type.ptr()) || !py::hasattr(type, "__dlpack_c_exchange_api__")) return false;
  const py::object capsule = type.attr("__dlpack_c_exchange_api__");
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return false;
  const auto* table = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (table->major != 1 || table->view == nullptr) return false;
  if (is_neg == nullptr) is_neg = PyUnicode_InternFromString("is_neg");
  view = table->view;
  // the type and its table live as long as torch does
  tensor_type = reinterpret_cast<PyTypeObject*>(type.inc_ref().ptr());
  return true;
}

bool view_dense(py::handle object, DenseView* out) {
  if (view == nullptr || Py_TYPE(object.ptr()) != tensor_type) return false;
  DlTensor t;
  if (view(object.ptr(), &t) != 0) {
    PyErr_Clear();
    return false;
  }
  if (t.device_type != kCpu || t.code != kFloat || t.bits != 32 || t.lanes != 1 || t.ndim < 1 || !contiguous(t))
    return false;
  const py::object negated = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object.ptr(), is_neg));
  if (negated.ptr() != Py_False) {
    PyErr_Clear();
    return false;
  }
  int64_t elements = 1;
  for (int32_t d = 0; d < t.ndim; ++d) elements *= t.shape[d];
  out->data = reinterpret_cast<float*>(static_cast<char*>(t.data) + t.byte_offset);
  out->elements = elements;
  out->ndim = t.ndim;
  out->shape = t.shape;
  return true;
}

bool same_shape(const DenseView& a, const DenseView& b) {
  return a.ndim == b.ndim && std::equal(a.shape, a.shape + a.ndim, b.shape);
}

}  // namespace fastrobust
