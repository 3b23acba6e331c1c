// Layers of intervals and their gradients.
#include <array>
#include <cstring>
#include <numeric>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/on_device.h"
#include "bounds/kernels.h"
#include "bounds/pool.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

// sizes: (count, in_h, in_w, in_c, out_h, out_w, out_c, kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x); weight
// with radius, radius_a and radius_count for the two products of an interval layer, or 0.
void conv_grad(const std::array<int64_t, 13>& sizes, uintptr_t x, uintptr_t a, uintptr_t out, uintptr_t weight,
               uintptr_t radius, uintptr_t radius_a, int64_t radius_count, const Apart& apart) {
  ConvGradArgs g;
  int64_t* const to[] = {&g.count,    &g.in_h,     &g.in_w,     &g.in_c,     &g.out_h, &g.out_w, &g.out_c,
                         &g.kernel_h, &g.kernel_w, &g.stride_y, &g.stride_x, &g.pad_y, &g.pad_x};
  for (size_t i = 0; i < sizes.size(); ++i) *to[i] = sizes[i];
  tell_apart(apart, g);
  const int64_t taps = g.kernel_h * g.kernel_w * (g.in_c / g.groups);
  g.x = pointer<const float>(x, g.count, "x");
  g.a = pointer<const float>(a, g.count, "a");
  g.out = pointer<float>(out, taps * g.out_c, "out");
  g.weight = reinterpret_cast<const float*>(weight);
  g.radius_count = radius_count;
  if (g.weight != nullptr) {
    g.radius = pointer<const float>(radius, radius_count, "radius");
    g.radius_a = pointer<const float>(radius_a, radius_count, "radius_a");
  }
  without_gil(g.count * g.out_h * g.out_w * taps * g.out_c, [&] { bounds().conv_grad(g); });
}

void turn(uintptr_t from, uintptr_t to, int64_t count, int64_t rows, int64_t columns) {
  const int64_t numbers = count * rows * columns;
  const auto* a = pointer<const float>(from, numbers, "from");
  auto* out = pointer<float>(to, numbers, "to");
  without_gil(numbers, [&] { bounds().turn(a, out, count, rows, columns); });
}

// strides: (a_row, a_step, b_step, b_column)
void product(uintptr_t a, uintptr_t b, uintptr_t out, int64_t rows, int64_t count, int64_t columns,
             const std::array<int64_t, 4>& strides) {
  ProductArgs g;
  g.a = pointer<const float>(a, rows * count, "a");
  g.b = pointer<const float>(b, columns * count, "b");
  g.out = pointer<float>(out, rows * columns, "out");
  g.rows = rows, g.count = count, g.columns = columns;
  g.a_row = strides[0], g.a_step = strides[1], g.b_step = strides[2], g.b_column = strides[3];
  without_gil(rows * count * columns, [&] { bounds().product(g); });
}

// strides: (x_row, x_step, b_step, b_column, out_row, out_column); base with base_scale and base_row, or 0. False: not
// done.
bool sign_product(uintptr_t x, uintptr_t b, uintptr_t b_scale, uintptr_t scale, const std::array<uintptr_t, 3>& base,
                  uintptr_t out, int64_t rows, int64_t count, int64_t columns, const std::array<int64_t, 6>& strides) {
  SignProductArgs g;
  g.x = pointer<const float>(x, rows * count, "x");
  g.b = pointer<const float>(b, columns * count, "b");
  g.b_scale = reinterpret_cast<const float*>(b_scale);
  g.scale = pointer<const float>(scale, rows, "scale");
  g.base = reinterpret_cast<const float*>(base[0]);
  if (g.base != nullptr) {
    g.base_scale = pointer<const float>(base[1], rows, "base_scale");
    g.base_row = pointer<const int64_t>(base[2], rows, "base_row");
  }
  g.out = pointer<float>(out, rows * columns, "out");
  g.rows = rows, g.count = count, g.columns = columns;
  g.x_row = strides[0], g.x_step = strides[1], g.b_step = strides[2], g.b_column = strides[3];
  g.out_row = strides[4], g.out_column = strides[5];
  bool done = false;
  without_gil(rows * count * columns / 4, [&] { done = bounds().sign_product(g); });
  return done;
}

// Margins: for each of `batch` labels the rows label minus other, `other` ascending. out [3][batch * (classes - 1)]:
// example, label, other. False where a label is none.
bool margin_rows(uintptr_t labels, int64_t batch, int64_t classes, uintptr_t out) {
  const int64_t* label = pointer<const int64_t>(labels, batch, "labels");
  const int64_t rows = batch * (classes - 1);
  int64_t* to = pointer<int64_t>(out, rows, "out");
  for (int64_t i = 0; i < batch; ++i) {
    if (label[i] < 0 || label[i] >= classes) return false;
    for (int64_t k = 0; k < classes; ++k)
      if (k != label[i]) to[0] = i, to[rows] = label[i], to[2 * rows] = k, ++to;
  }
  return true;
}

// Whether no number is infinite or NaN.
bool all_finite(uintptr_t numbers, int64_t count) {
  const float* x = pointer<const float>(numbers, count, "numbers");
  constexpr uint32_t kExponent = 0x7f800000;
  uint32_t found = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    found |= (bits & kExponent) == kExponent ? 1 : 0;
  }
  return found == 0;
}

void pick_grad(int device, uintptr_t stream, uintptr_t from, uintptr_t pick, uintptr_t minus, uintptr_t out,
               int64_t count, int64_t length, int64_t rows) {
  PickGradArgs g;
  g.from = pointer<const float>(from, count * length, "from");
  g.pick = pointer<const int64_t>(pick, count, "rows");
  g.minus = reinterpret_cast<const int64_t*>(minus);
  g.out = pointer<float>(out, rows * length, "out");
  g.count = count, g.length = length, g.rows = rows;
  on_device(device, stream, count * length, g, bounds().pick_grad, FR_CUDA_KERNEL(pick_grad_cuda));
}

void interval_grad(uintptr_t center, uintptr_t radius, uintptr_t weight, uintptr_t from_center, uintptr_t from_radius,
                   uintptr_t to_weight, uintptr_t to_center, uintptr_t to_radius, int64_t batch, int64_t radius_batch,
                   int64_t n, int64_t m) {
  IntervalGradArgs g;
  g.center = pointer<const float>(center, batch * n, "center");
  g.radius = pointer<const float>(radius, radius_batch * n, "radius");
  g.weight = pointer<const float>(weight, m * n, "weight");
  g.from_center = pointer<const float>(from_center, batch * m, "from_center");
  g.from_radius = pointer<const float>(from_radius, radius_batch * m, "from_radius");
  g.to_weight = pointer<float>(to_weight, m * n, "to_weight");
  g.to_center = reinterpret_cast<float*>(to_center);
  g.to_radius = reinterpret_cast<float*>(to_radius);
  g.batch = batch, g.radius_batch = radius_batch, g.n = n, g.m = m;
  without_gil(batch * n * m, [&] { bounds().interval_grad(g); });
}

ReluBoxArgs relu_box_from(uintptr_t center, uintptr_t radius, bool shared, uintptr_t bias, int64_t period,
                          int64_t batch, int64_t n, bool adaptive) {
  ReluBoxArgs g;
  if (n > 0 && (period < 1 || n % period != 0))
    throw std::invalid_argument("bias: got a period of " + std::to_string(period) + ", expected a divisor of " +
                                std::to_string(n));
  g.center = pointer<const float>(center, batch * n, "center");
  g.radius = pointer<const float>(radius, batch * n, "radius");
  g.bias = reinterpret_cast<const float*>(bias);
  g.batch = batch, g.n = n, g.period = period, g.adaptive = adaptive, g.shared = shared;
  return g;
}

// Returns how many neurons have lines, 0 without them (slopes 0). On CUDA they are not counted: all may have.
int64_t relu_box(int device, uintptr_t stream, uintptr_t center, uintptr_t radius, bool shared, uintptr_t bias,
                 int64_t period, int64_t batch, int64_t n, bool adaptive, uintptr_t slopes, uintptr_t intercepts,
                 uintptr_t next_center, uintptr_t next_radius) {
  ReluBoxArgs g = relu_box_from(center, radius, shared, bias, period, batch, n, adaptive);
  g.slopes = reinterpret_cast<float*>(slopes);
  g.intercepts = pointer<float>(intercepts, slopes == 0 ? 0 : batch * n, "intercepts");
  g.next_center = reinterpret_cast<float*>(next_center);
  g.next_radius = reinterpret_cast<float*>(next_radius);
  std::vector<int64_t> living(static_cast<size_t>(device < 0 ? batch : 0));
  g.living = living.data();
  on_device(device, stream, 8 * batch * n, g, bounds().relu_box, FR_CUDA_KERNEL(relu_box_cuda));
  if (device >= 0) return slopes == 0 ? 0 : batch * n;
  return std::accumulate(living.begin(), living.end(), int64_t{0});
}

// work: on CUDA as ReluBoxGradArgs::sums, else 0
void relu_box_grad(int device, uintptr_t stream, uintptr_t center, uintptr_t radius, bool shared, uintptr_t bias,
                   int64_t period, int64_t batch, int64_t n, bool adaptive, const std::array<uintptr_t, 4>& from,
                   uintptr_t to_center, uintptr_t to_radius, uintptr_t to_bias, uintptr_t work) {
  ReluBoxGradArgs g;
  g.forward = relu_box_from(center, radius, shared, bias, period, batch, n, adaptive);
  g.from_slopes = reinterpret_cast<const float*>(from[0]);
  g.from_intercepts = pointer<const float>(from[1], from[0] == 0 ? 0 : batch * n, "intercepts");
  g.from_center = reinterpret_cast<const float*>(from[2]);
  g.from_radius = reinterpret_cast<const float*>(from[3]);
  g.to_center = pointer<float>(to_center, batch * n, "to_center");
  g.to_radius = pointer<float>(to_radius, shared ? n : batch * n, "to_radius");
  g.to_bias = reinterpret_cast<float*>(to_bias);
  g.sums = pointer<float>(work, device < 0 ? 0 : n, "work");
  on_device(device, stream, 16 * batch * n, g, bounds().relu_box_grad, FR_CUDA_KERNEL(relu_box_grad_cuda));
}

using Axes = std::array<int64_t, 2>;  // height, width

template <class T>
void pool_picks_of(uintptr_t lower, uintptr_t upper, uintptr_t source, uintptr_t rival, int64_t planes, Axes size,
                   Axes out, Axes kernel, Axes stride, Axes padding, Axes dilation,
                   void (*run)(const PoolPicksArgs<T>&)) {
  PoolPicksArgs<T> g;
  const int64_t numbers = planes * size[0] * size[1], windows = planes * out[0] * out[1];
  g.lower = pointer<const T>(lower, numbers, "lower");
  g.upper = pointer<const T>(upper, numbers, "upper");
  g.source = pointer<int64_t>(source, windows, "source");
  g.rival = pointer<int64_t>(rival, windows, "rival");
  g.planes = planes, g.height = size[0], g.width = size[1], g.out_h = out[0], g.out_w = out[1];
  g.kernel_h = kernel[0], g.kernel_w = kernel[1], g.stride_y = stride[0], g.stride_x = stride[1];
  g.pad_y = padding[0], g.pad_x = padding[1], g.dilation_y = dilation[0], g.dilation_x = dilation[1];
  without_gil(windows * kernel[0] * kernel[1] * 4, [&] { run(g); });
}

void pool_picks(bool is_double, uintptr_t lower, uintptr_t upper, uintptr_t source, uintptr_t rival, int64_t planes,
                Axes size, Axes out, Axes kernel, Axes stride, Axes padding, Axes dilation) {
  if (is_double)
    pool_picks_of<double>(lower, upper, source, rival, planes, size, out, kernel, stride, padding, dilation,
                          pool().picks_double);
  else
    pool_picks_of<float>(lower, upper, source, rival, planes, size, out, kernel, stride, padding, dilation,
                         pool().picks);
}

}  // namespace

void bind_bounds_layers(py::module_& m) {
  m.def("bounds_conv_grad", &conv_grad, py::arg("sizes"), py::arg("x"), py::arg("a"), py::arg("out"), py::arg("weight"),
        py::arg("radius"), py::arg("radius_a"), py::arg("radius_count"), py::arg("apart") = Apart{1, 1, 1});
  m.def("bounds_turn", &turn);
  m.def("bounds_product", &product);
  m.def("bounds_sign_product", &sign_product);
  m.def("bounds_margin_rows", &margin_rows);
  m.def("all_finite", &all_finite);
  m.def("bounds_pick_grad", &pick_grad);
  m.def("bounds_interval_grad", &interval_grad);
  m.def("bounds_relu_box", &relu_box);
  m.def("bounds_relu_box_grad", &relu_box_grad);
  m.def("bounds_pool_picks", &pool_picks, py::arg("is_double"), py::arg("lower"), py::arg("upper"), py::arg("source"),
        py::arg("rival"), py::arg("planes"), py::arg("size"), py::arg("out"), py::arg("kernel"), py::arg("stride"),
        py::arg("padding"), py::arg("dilation"));
}

}  // namespace fastrobust
