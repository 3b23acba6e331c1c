#include <cmath>
#include <cstring>
#include <string>

#include "bindings/bindings.h"
#include "bindings/on_device.h"
#include "bindings/tensor_view.h"
#include "core/rounding.h"
#include "pgd/kernels.h"
#include "runtime/device.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

// A parameter comes as (address, value, per).
Param param(uintptr_t address, double value, int per, int64_t batch, int64_t n, const char* name, bool downwards) {
  Param p;
  p.per = static_cast<Per>(per);
  p.value = downwards ? round_down(value) : static_cast<float>(value);
  if (p.per != Per::all) p.data = pointer<const float>(address, p.per == Per::example ? batch : batch * n, name);
  return p;
}

// The box in float32, rounded inwards.
void set_box(double lo, double hi, float* lo32, float* hi32) {
  *lo32 = -round_down(-lo);
  *hi32 = round_down(hi);
  if (!(*lo32 <= *hi32))
    throw std::invalid_argument("clip: got bounds with no float32 number between them, expected lo <= hi in float32");
}

// Kernels read and write the same position of x and out only; any other overlap of the output would spoil the input.
void refuse_overlap(const StepArgs& a, int64_t elements) {
  const auto apart = [&](const void* p, int64_t bytes) {
    const uintptr_t in = reinterpret_cast<uintptr_t>(p), out = reinterpret_cast<uintptr_t>(a.out);
    return p == nullptr || in + static_cast<uintptr_t>(bytes) <= out ||
           out + 4 * static_cast<uintptr_t>(elements) <= in;
  };
  if (a.out == nullptr || elements == 0) return;
  const int64_t grad_bytes = (a.grad_type == GradType::f32 ? 4 : 2) * elements;
  const bool averages = a.previous != nullptr && a.momentum != 1.f;  // reads x after it wrote
  if (!apart(a.x0, 4 * elements) || !apart(a.grad, grad_bytes) || (averages && !apart(a.previous, 4 * elements)) ||
      ((averages || a.out != a.x) && !apart(a.x, 4 * elements)))
    throw std::invalid_argument("out: got memory that overlaps x, x0 or grad, expected memory of its own or x itself");
}

// device < 0 is the CPU. One call for every step: which outputs are given tells what is computed.
void step(int device, uintptr_t stream, uintptr_t x, uintptr_t x0, uintptr_t grad, uintptr_t out, int64_t batch,
          int64_t n, int norm, int grad_type, py::tuple step_size, py::tuple eps, double lo, double hi,
          uintptr_t active, bool normalize, py::object fosc, py::object atas, py::object apgd, uintptr_t workspace) {
  StepArgs a;
  const int64_t elements = batch * n;
  a.batch = batch;
  a.n = n;
  a.x = pointer<const float>(x, elements, "x");
  a.x0 = pointer<const float>(x0, elements, "x0");
  a.grad_type = static_cast<GradType>(grad_type);
  a.grad = a.grad_type == GradType::none ? nullptr : pointer<const void>(grad, elements, "grad");
  a.out = reinterpret_cast<float*>(out);
  a.step = param(step_size[0].cast<uintptr_t>(), step_size[1].cast<double>(), step_size[2].cast<int>(), batch, n,
                 "step_size", false);
  a.eps = param(eps[0].cast<uintptr_t>(), eps[1].cast<double>(), eps[2].cast<int>(), batch, n, "eps", true);
  set_box(lo, hi, &a.lo, &a.hi);
  a.active = reinterpret_cast<const uint8_t*>(active);
  a.normalize = normalize;
  if (!fosc.is_none()) {  // (value, active_out, threshold)
    const py::tuple f = fosc;
    a.fosc = pointer<float>(f[0].cast<uintptr_t>(), batch, "fosc");
    a.active_out = reinterpret_cast<uint8_t*>(f[1].cast<uintptr_t>());
    a.threshold = f[2].cast<float>();
  }
  if (!atas.is_none()) {  // (v, v_out, step_out, beta, c, authors, min_step, max_step)
    const py::tuple t = atas;
    a.v = pointer<const float>(t[0].cast<uintptr_t>(), batch, "v");
    a.v_out = pointer<float>(t[1].cast<uintptr_t>(), batch, "v_out");
    a.step_out = pointer<float>(t[2].cast<uintptr_t>(), batch, "step_out");
    a.beta = t[3].cast<float>();
    a.c = t[4].cast<float>();
    a.authors = t[5].cast<bool>();
    a.min_step = t[6].cast<float>();
    a.max_step = t[7].cast<float>();
  }
  if (!apgd.is_none()) {  // (previous, momentum, 1 - momentum, keep)
    const py::tuple t = apgd;
    a.previous = pointer<const float>(t[0].cast<uintptr_t>(), elements, "previous");
    a.momentum = t[1].cast<float>();
    a.rest = t[2].cast<float>();
    a.keep = reinterpret_cast<const int64_t*>(t[3].cast<uintptr_t>());
  }
  if (a.fosc == nullptr) pointer<float>(out, elements, "out");
  refuse_overlap(a, elements);
  const bool elementwise =
      static_cast<Norm>(norm) == Norm::linf && a.fosc == nullptr && a.v_out == nullptr && a.previous == nullptr;
  if (device < 0) {
    without_gil(elements, [&] { elementwise ? pgd().linf(a) : pgd().rows(a, static_cast<Norm>(norm)); });
    return;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  void* s = reinterpret_cast<void*>(stream);
  elementwise ? linf_cuda(a, s) : rows_cuda(a, static_cast<Norm>(norm), reinterpret_cast<double*>(workspace), s);
#else
  (void)stream;
  (void)workspace;
  throw std::runtime_error("fastrobust was built without CUDA kernels; rebuild with nvcc on PATH (FASTROBUST_CUDA=ON)");
#endif
}

// The inner loop's call: float32, one step size and one radius, norm inf or 2 (the step normalised), CPU.
void simple_step(uintptr_t x, uintptr_t x0, uintptr_t grad, uintptr_t out, int64_t elements, int64_t batch, int norm,
                 double step_size, double eps, double lo, double hi) {
  StepArgs a;
  a.batch = batch;
  a.n = batch > 0 ? elements / batch : 0;
  a.x = pointer<const float>(x, elements, "x");
  a.x0 = pointer<const float>(x0, elements, "x0");
  a.grad = pointer<const float>(grad, elements, "grad");
  a.out = pointer<float>(out, elements, "out");
  a.step.value = static_cast<float>(step_size);
  a.eps.value = round_down(eps);
  set_box(lo, hi, &a.lo, &a.hi);
  refuse_overlap(a, elements);
  const Norm n = static_cast<Norm>(norm);
  without_gil(elements, [&] { n == Norm::linf ? pgd().linf(a) : pgd().rows(a, n); });
}

// The same on tensors; false, and nothing done, where one of them is not dense float32 on the CPU or shapes differ.
bool quick_step(py::handle x, py::handle x0, py::handle grad, py::handle out, int norm, double step_size, double eps,
                double lo, double hi) {
  DenseView vx, v0, vg, vt;
  if (!view_dense(x, &vx) || !view_dense(x0, &v0) || !view_dense(grad, &vg) || !view_dense(out, &vt)) return false;
  if (!same_shape(vx, v0) || !same_shape(vx, vg) || !same_shape(vx, vt)) return false;
  const auto address = [](const DenseView& v) { return reinterpret_cast<uintptr_t>(v.data); };
  simple_step(address(vx), address(v0), address(vg), address(vt), vx.elements, vx.shape[0], norm, step_size, eps, lo,
              hi);
  return true;
}

// Auto-PGD's step in the same way, norms inf and 2: one radius, and `length` a step size for each example.
bool quick_apgd(py::handle x, py::handle previous, py::handle x0, py::handle grad, py::handle length, py::handle out,
                int norm, double eps, double lo, double hi, double momentum) {
  DenseView vx, vp, v0, vg, vl, vt;
  if (!view_dense(x, &vx) || !view_dense(previous, &vp) || !view_dense(x0, &v0) || !view_dense(grad, &vg) ||
      !view_dense(length, &vl) || !view_dense(out, &vt))
    return false;
  if (!same_shape(vx, vp) || !same_shape(vx, v0) || !same_shape(vx, vg) || !same_shape(vx, vt) || vl.ndim != 1 ||
      vl.elements != vx.shape[0])
    return false;
  StepArgs a;
  a.batch = vx.shape[0];
  a.n = a.batch > 0 ? vx.elements / a.batch : 0;
  a.x = vx.data;
  a.previous = vp.data;
  a.x0 = v0.data;
  a.grad = vg.data;
  a.out = vt.data;
  a.step.data = vl.data;
  a.step.per = Per::example;
  a.eps.value = round_down(eps);
  set_box(lo, hi, &a.lo, &a.hi);
  a.momentum = static_cast<float>(momentum);
  a.rest = static_cast<float>(1. - momentum);
  refuse_overlap(a, vx.elements);
  without_gil(vx.elements, [&] { pgd().rows(a, static_cast<Norm>(norm)); });
  return true;
}

int64_t workspace_doubles(int64_t batch, int64_t n) {
#if defined(FASTROBUST_HAS_CUDA)
  StepArgs a;
  a.batch = batch;
  a.n = n;
  return pgd_workspace_doubles(a);
#else
  (void)batch;
  (void)n;
  return 0;
#endif
}

// What Auto-PGD notes after a step; `state` in the order of AscentArgs.
void ascent(int device, uintptr_t stream, uintptr_t value, uintptr_t score, double sign, uintptr_t left,
            uintptr_t left_grad, py::tuple state, int64_t batch, int64_t n, uintptr_t workspace) {
  AscentArgs a;
  a.batch = batch;
  a.n = n;
  a.value = pointer<const float>(value, batch, "value");
  a.score = pointer<const float>(score, batch, "score");
  a.sign = static_cast<float>(sign);
  a.left = pointer<const float>(left, batch * n, "left");
  a.left_grad = pointer<const float>(left_grad, batch * n, "left_grad");
  const auto at = [&](size_t i) { return state[i].cast<uintptr_t>(); };
  a.best = pointer<float>(at(0), batch * n, "best");
  a.best_grad = pointer<float>(at(1), batch * n, "best_grad");
  a.last_value = pointer<float>(at(2), batch, "last_value");
  a.best_value = pointer<float>(at(3), batch, "best_value");
  a.best_score = pointer<float>(at(4), batch, "best_score");
  a.rises = pointer<int64_t>(at(5), batch, "rises");
  a.best_is_x = pointer<uint8_t>(at(6), batch, "best_is_x");
  if (device < 0) {
    without_gil(batch * n, [&] { pgd().ascent(a); });
    return;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  ascent_cuda(a, pointer<uint8_t>(workspace, batch, "workspace"), reinterpret_cast<void*>(stream));
#else
  (void)stream;
  (void)workspace;
  throw std::runtime_error("fastrobust was built without CUDA kernels; rebuild with nvcc on PATH (FASTROBUST_CUDA=ON)");
#endif
}

// What Auto-PGD does at a checkpoint; `state` in the order of AscentCheckArgs.
void ascent_check(int device, uintptr_t stream, py::tuple state, double needed, int64_t batch, int64_t n,
                  uintptr_t workspace) {
  AscentCheckArgs a;
  a.batch = batch;
  a.n = n;
  const auto at = [&](size_t i) { return state[i].cast<uintptr_t>(); };
  a.x = pointer<float>(at(0), batch * n, "x");
  a.grad = pointer<float>(at(1), batch * n, "grad");
  a.best = pointer<const float>(at(2), batch * n, "best");
  a.best_grad = pointer<const float>(at(3), batch * n, "best_grad");
  a.last_value = pointer<float>(at(4), batch, "last_value");
  a.mark = pointer<float>(at(5), batch, "mark");
  a.best_value = pointer<const float>(at(6), batch, "best_value");
  a.factor = pointer<float>(at(7), batch, "factor");
  a.rises = pointer<int64_t>(at(8), batch, "rises");
  a.best_is_x = pointer<const uint8_t>(at(9), batch, "best_is_x");
  a.halved = pointer<uint8_t>(at(10), batch, "halved");
  a.needed = static_cast<float>(needed);
  if (device < 0) {
    without_gil(batch * n, [&] { pgd().ascent_check(a); });
    return;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  ascent_check_cuda(a, pointer<uint8_t>(workspace, batch, "workspace"), reinterpret_cast<void*>(stream));
#else
  (void)stream;
  (void)workspace;
  throw std::runtime_error("fastrobust was built without CUDA kernels; rebuild with nvcc on PATH (FASTROBUST_CUDA=ON)");
#endif
}

void random_start(int device, uintptr_t stream, uintptr_t x0, uintptr_t out, int64_t batch, int64_t n, int norm,
                  py::tuple eps, double lo, double hi, uint64_t seed, int64_t first_example, uintptr_t numbers,
                  uintptr_t workspace) {
  RandomStartArgs a;
  a.batch = batch;
  a.n = n;
  a.x0 = pointer<const float>(x0, batch * n, "x0");
  a.out = pointer<float>(out, batch * n, "out");
  a.eps = param(eps[0].cast<uintptr_t>(), eps[1].cast<double>(), eps[2].cast<int>(), batch, n, "eps", true);
  set_box(lo, hi, &a.lo, &a.hi);
  a.seed = seed;
  a.first_example = first_example;
  a.numbers = reinterpret_cast<const int64_t*>(numbers);
  a.norm = static_cast<Norm>(norm);
  if (device < 0) {
    without_gil(batch * n, [&] { pgd().random_start(a); });
    return;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  random_start_cuda(a, reinterpret_cast<int64_t*>(workspace), reinterpret_cast<void*>(stream));
#else
  (void)stream;
  (void)workspace;
  throw std::runtime_error("fastrobust was built without CUDA kernels; rebuild with nvcc on PATH (FASTROBUST_CUDA=ON)");
#endif
}

SquareWindow window_inside(const SquareRows& a, const py::tuple& t, const char* name) {
  const SquareWindow w{t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>()};
  if (w.query < 0 || w.height < 0 || w.width < 0 || w.height > a.height || w.width > a.width)
    throw std::invalid_argument(std::string(name) + ": got a window larger than the image, expected one inside");
  return w;
}

// What both proposals of the Square attack are given: a window is (query, height, width), `sizes` (batch, channels,
// height, width), `settled` the addresses of score, hit, value and fooled. Returns the number of elements.
int64_t square_rows(SquareRows* a, uintptr_t x, uintptr_t next, uintptr_t numbers, const py::tuple& sizes,
                    uint64_t seed, const py::tuple& window, const py::object& settled) {
  const auto size = [&](size_t i) { return sizes[i].cast<int64_t>(); };
  a->batch = size(0);
  a->channels = size(1);
  a->height = size(2);
  a->width = size(3);
  a->seed = seed;
  const int64_t elements = a->batch * a->channels * a->height * a->width;
  a->x = pointer<float>(x, elements, "x");
  a->next = pointer<float>(next, elements, "next");
  a->numbers = pointer<const int64_t>(numbers, a->batch, "numbers");
  if (!settled.is_none()) {
    const py::tuple t = settled;
    a->score = pointer<const float>(t[0].cast<uintptr_t>(), a->batch, "score");
    a->hit = pointer<const uint8_t>(t[1].cast<uintptr_t>(), a->batch, "hit");
    a->value = pointer<float>(t[2].cast<uintptr_t>(), a->batch, "value");
    a->fooled = pointer<uint8_t>(t[3].cast<uintptr_t>(), a->batch, "fooled");
  }
  a->window = window_inside(*a, window, "window");
  return elements;
}

void square(int device, uintptr_t stream, uintptr_t x, uintptr_t next, uintptr_t low, uintptr_t high, uintptr_t numbers,
            py::tuple sizes, uint64_t seed, py::tuple last, py::tuple window, py::object settled) {
  SquareArgs a;
  const int64_t elements = square_rows(&a, x, next, numbers, sizes, seed, window, settled);
  a.last = window_inside(a, last, "last");
  a.low = pointer<const float>(low, elements, "low");
  a.high = pointer<const float>(high, elements, "high");
  on_device(device, stream, elements, a, pgd().square, FR_CUDA_KERNEL(square_cuda));
}

void square_move(int device, uintptr_t stream, uintptr_t x, uintptr_t next, uintptr_t x0, uintptr_t numbers,
                 py::tuple sizes, uint64_t seed, py::tuple window, int norm, py::tuple eps, uintptr_t pattern,
                 py::object settled) {
  SquareMoveArgs a;
  const int64_t elements = square_rows(&a, x, next, numbers, sizes, seed, window, settled);
  a.x0 = pointer<const float>(x0, elements, "x0");
  a.norm = static_cast<Norm>(norm);
  a.eps = param(eps[0].cast<uintptr_t>(), eps[1].cast<double>(), eps[2].cast<int>(), a.batch, 1, "eps", true);
  a.pattern = pointer<const float>(pattern, a.window.height * a.window.width, "pattern");
  on_device(device, stream, elements, a, pgd().square_move, FR_CUDA_KERNEL(square_move_cuda));
}

// Which examples' labels are the argmax of their logits (`wanted` false: are not).
void agrees(int device, uintptr_t stream, uintptr_t logits, uintptr_t labels, bool wanted, uintptr_t out, int64_t batch,
            int64_t classes) {
  AgreesArgs a;
  a.batch = batch;
  a.classes = classes;
  a.logits = pointer<const float>(logits, batch * classes, "logits");
  a.labels = pointer<const int64_t>(labels, batch, "labels");
  a.out = pointer<uint8_t>(out, batch, "out");
  a.wanted = wanted;
  on_device(device, stream, batch * classes, a, pgd().agrees, FR_CUDA_KERNEL(agrees_cuda));
}

void loss(int device, uintptr_t stream, int kind, uintptr_t logits, uintptr_t reference, uintptr_t labels,
          uintptr_t targets, uintptr_t value, uintptr_t grad, int64_t batch, int64_t classes) {
  LossArgs a;
  a.loss = static_cast<Loss>(kind);
  a.batch = batch;
  a.classes = classes;
  a.logits = pointer<const float>(logits, batch * classes, "logits");
  a.reference = reinterpret_cast<const float*>(reference);
  a.labels = reinterpret_cast<const int64_t*>(labels);
  a.targets = reinterpret_cast<const int64_t*>(targets);
  a.value = pointer<float>(value, batch, "value");
  a.grad = pointer<float>(grad, batch * classes, "grad");
  on_device(device, stream, batch * classes, a, pgd().loss, FR_CUDA_KERNEL(loss_cuda));
}

}  // namespace

void bind_pgd(py::module_& m) {
  m.def("pgd_step", &step);
  m.def("pgd_simple_step", &simple_step);
  m.def("pgd_quick_step", &quick_step);
  m.def("pgd_workspace_doubles", &workspace_doubles);
  m.def("pgd_quick_apgd", &quick_apgd);
  m.def("pgd_ascent", &ascent);
  m.def("pgd_ascent_check", &ascent_check);
  m.def("pgd_random_start", &random_start);
  m.def("pgd_loss", &loss);
  m.def("pgd_agrees", &agrees);
  m.def("pgd_square", &square);
  m.def("pgd_square_move", &square_move);
}

}  // namespace fastrobust
