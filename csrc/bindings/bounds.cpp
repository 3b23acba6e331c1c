#include <algorithm>
#include <array>
#include <vector>

#include "bindings/bindings.h"
#include "bindings/on_device.h"
#include "bounds/kernels.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

// (a, side_stride, pick, example, count, length, sides, window, minus): window is None or
// (corner_y, corner_x, height, width, channels, map_height, map_width)
Rows rows_from(const py::tuple& t) {
  Rows r;
  r.count = t[4].cast<int64_t>();
  r.length = t[5].cast<int64_t>();
  r.a = pointer<const float>(t[0].cast<uintptr_t>(), r.count * r.length, "A");
  r.side_stride = t[1].cast<int64_t>();
  r.pick = reinterpret_cast<const int64_t*>(t[2].cast<uintptr_t>());
  r.example = reinterpret_cast<const int64_t*>(t[3].cast<uintptr_t>());
  r.sides = t[6].cast<int>();
  r.minus = reinterpret_cast<const int64_t*>(t[8].cast<uintptr_t>());
  if (!t[7].is_none()) {
    const py::tuple w = t[7];
    r.corner_y = pointer<const int64_t>(w[0].cast<uintptr_t>(), r.count, "corner_y");
    r.corner_x = pointer<const int64_t>(w[1].cast<uintptr_t>(), r.count, "corner_x");
    r.height = w[2].cast<int64_t>();
    r.width = w[3].cast<int64_t>();
    r.channels = w[4].cast<int64_t>();
    r.map_height = w[5].cast<int64_t>();
    r.map_width = w[6].cast<int64_t>();
  }
  return r;
}

void back(int device, uintptr_t stream, const py::tuple& rows, uintptr_t slopes, int slope_sides, uintptr_t intercepts,
          int64_t examples, uintptr_t b, uintptr_t b_out, uintptr_t out, int sides_out) {
  BackArgs g;
  g.rows = rows_from(rows);
  const int64_t work = g.rows.count * g.rows.length;
  if (g.rows.count == 0) return;
  g.slopes = pointer<const float>(slopes, work, "slopes");
  g.intercepts = pointer<const float>(intercepts, work, "intercepts");
  g.examples = examples;
  g.slope_sides = slope_sides;
  g.b = pointer<const float>(b, g.rows.count, "b");
  g.b_out = pointer<float>(b_out, g.rows.count, "b_out");
  g.out = pointer<float>(out, work, "out");
  g.sides_out = sides_out;
  on_device(device, stream, work, g, bounds().back, FR_CUDA_KERNEL(back_cuda));
}

void concretize(int device, uintptr_t stream, const py::tuple& rows, uintptr_t center, uintptr_t radius, uintptr_t x,
                uintptr_t eps, int dual, uintptr_t b, uintptr_t out) {
  ConcretizeArgs g;
  g.rows = rows_from(rows);
  if (g.rows.count == 0) return;
  g.center = reinterpret_cast<const float*>(center);
  g.radius = reinterpret_cast<const float*>(radius);
  g.x = reinterpret_cast<const float*>(x);
  g.eps = reinterpret_cast<const float*>(eps);
  g.dual = static_cast<Dual>(dual);
  if ((g.center == nullptr && g.dual == Dual::none) || (g.center != nullptr && g.radius == nullptr) ||
      (g.dual != Dual::none && (g.x == nullptr || g.eps == nullptr)))
    throw std::invalid_argument("box and ball: got tensors without memory, expected real data");
  g.b = pointer<const float>(b, g.rows.count, "b");
  g.out = pointer<float>(out, g.rows.count, "out");
  on_device(device, stream, g.rows.count * g.rows.length, g, bounds().concretize, FR_CUDA_KERNEL(concretize_cuda));
}

// sizes: (count, in_h, in_w, in_c, out_h, out_w, out_c, kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x, lanes)
void spread(uintptr_t a, uintptr_t weight, uintptr_t out, const py::tuple& sizes, const Apart& apart) {
  SpreadArgs g;
  int64_t* const to[] = {&g.count,    &g.in_h,     &g.in_w,     &g.in_c,     &g.out_h, &g.out_w, &g.out_c,
                         &g.kernel_h, &g.kernel_w, &g.stride_y, &g.stride_x, &g.pad_y, &g.pad_x, &g.lanes};
  for (size_t i = 0; i < 14; ++i) *to[i] = sizes[i].cast<int64_t>();
  tell_apart(apart, g);
  if (g.lanes % 16 != 0 || g.lanes < 16 || (g.in_w + 12) * g.lanes > kSpreadBuffer)
    throw std::invalid_argument("lanes: expected a multiple of 16 with (width + 12) * lanes up to " +
                                std::to_string(kSpreadBuffer));
  if (g.count == 0) return;
  g.a = pointer<const float>(a, g.count, "A");
  g.weight = pointer<const float>(weight, g.in_c, "weight");
  g.out = pointer<float>(out, g.count, "out");
  without_gil(g.count * g.in_h * g.in_w * g.in_c, [&] { bounds().spread(g); });
}

void interval(int device, uintptr_t stream, uintptr_t center, uintptr_t radius, uintptr_t weight, uintptr_t bias,
              uintptr_t out_a, uintptr_t out_b, int64_t batch, int64_t n, int64_t m, int finish, bool shared) {
  IntervalArgs g;
  g.center = pointer<const float>(center, batch * n, "center");
  g.radius = pointer<const float>(radius, batch * n, "radius");
  g.shared = shared;
  g.weight = pointer<const float>(weight, m * n, "weight");
  g.bias = reinterpret_cast<const float*>(bias);
  g.out_a = pointer<float>(out_a, batch * m, "out_a");
  g.out_b = pointer<float>(out_b, batch * m, "out_b");
  g.batch = batch;
  g.n = n;
  g.m = m;
  g.finish = static_cast<Finish>(finish);
  on_device(device, stream, batch * n * m, g, bounds().interval, FR_CUDA_KERNEL(interval_cuda));
}

void interval_step(int device, uintptr_t stream, uintptr_t a, uintptr_t b, uintptr_t out_a, uintptr_t out_b,
                   int64_t count, int step, double eps, double lo, double hi) {
  IntervalStepArgs g;
  g.a = pointer<const float>(a, count, "a");
  g.b = reinterpret_cast<const float*>(b);
  g.out_a = pointer<float>(out_a, count, "out_a");
  g.out_b = pointer<float>(out_b, count, "out_b");
  g.count = count;
  g.step = static_cast<IntervalStep>(step);
  g.eps_value = static_cast<float>(eps);
  g.lo = static_cast<float>(lo);
  g.hi = static_cast<float>(hi);
  if (g.b == nullptr && g.step != IntervalStep::box && g.step != IntervalStep::box_ends && count > 0)
    throw std::invalid_argument("b: got a tensor without memory (address 0), expected real data");
  on_device(device, stream, count, g, bounds().interval_step, FR_CUDA_KERNEL(interval_step_cuda));
}

// sizes: (batch, in_h, in_w, in_c, out_h, out_w, out_c, kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x), the
// strides of centre and radius (example, y, x, channel). Without `work` returns how many numbers it must hold.
int64_t interval_conv(const std::array<int64_t, 13>& sizes, const std::array<int64_t, 4>& center_stride,
                      const std::array<int64_t, 4>& radius_stride, uintptr_t center, uintptr_t radius, uintptr_t weight,
                      uintptr_t bias, uintptr_t work, uintptr_t out_a, uintptr_t out_b, int finish,
                      const Apart& apart) {
  IntervalConvArgs g;
  int64_t* const to[] = {&g.batch,    &g.in_h,     &g.in_w,     &g.in_c,     &g.out_h, &g.out_w, &g.out_c,
                         &g.kernel_h, &g.kernel_w, &g.stride_y, &g.stride_x, &g.pad_y, &g.pad_x};
  for (size_t i = 0; i < sizes.size(); ++i) *to[i] = sizes[i];
  tell_apart(apart, g);
  std::copy(center_stride.begin(), center_stride.end(), g.center_stride);
  std::copy(radius_stride.begin(), radius_stride.end(), g.radius_stride);
  g.radius = reinterpret_cast<const float*>(radius);  // null: a convolution
  if (work == 0) return bounds().interval_conv_work(g);
  const int64_t values = g.batch * g.out_h * g.out_w * g.out_c;
  g.center = pointer<const float>(center, values, "center");
  g.weight = pointer<const float>(weight, values, "weight");
  g.bias = reinterpret_cast<const float*>(bias);
  g.work = reinterpret_cast<float*>(work);
  g.out_a = pointer<float>(out_a, values, "out_a");
  g.out_b = pointer<float>(out_b, g.radius != nullptr ? values : 0, "out_b");
  g.finish = static_cast<Finish>(finish);
  without_gil(values * (g.in_c / g.groups) * g.kernel_h * g.kernel_w, [&] { bounds().interval_conv(g); });
  return 0;
}

// (slopes, slope_sides, intercepts, map_height, map_width, channels, weight, out_height, out_width, out_channels,
// kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x, lanes, turned, kept or 0)
ChainStep chain_step(const std::array<int64_t, 19>& t) {
  ChainStep s;
  s.slopes = pointer<const float>(static_cast<uintptr_t>(t[0]), 1, "slopes");
  s.slope_sides = static_cast<int>(t[1]);
  s.intercepts = pointer<const float>(static_cast<uintptr_t>(t[2]), 1, "intercepts");
  s.weight = pointer<const float>(static_cast<uintptr_t>(t[6]), 1, "weight");
  int64_t* const to[] = {&s.map_height, &s.map_width,    &s.channels, nullptr,     &s.out_height,
                         &s.out_width,  &s.out_channels, &s.kernel_h, &s.kernel_w, &s.stride_y,
                         &s.stride_x,   &s.pad_y,        &s.pad_x,    &s.lanes};
  for (size_t i = 0; i < 14; ++i)
    if (to[i] != nullptr) *to[i] = t[i + 3];
  s.turned = t[17] != 0;
  s.kept = reinterpret_cast<float*>(static_cast<uintptr_t>(t[18]));
  return s;
}

void chain(const py::tuple& rows, const std::vector<std::array<int64_t, 19>>& steps, int64_t examples, uintptr_t center,
           uintptr_t radius, uintptr_t x, uintptr_t eps, int dual, uintptr_t b, uintptr_t out, uintptr_t starts,
           uintptr_t order) {
  ChainArgs g;
  g.rows = rows_from(rows);
  if (g.rows.count == 0) return;
  if (g.rows.example == nullptr || steps.empty()) throw std::invalid_argument("example and steps: expected");
  std::vector<ChainStep> list;
  for (const auto& t : steps) list.push_back(chain_step(t));
  g.steps = list.data();
  g.count = static_cast<int>(list.size());
  g.examples = examples;
  g.b = pointer<const float>(b, g.rows.count, "b");
  g.end.center = reinterpret_cast<const float*>(center);
  g.end.radius = reinterpret_cast<const float*>(radius);
  g.end.x = reinterpret_cast<const float*>(x);
  g.end.eps = reinterpret_cast<const float*>(eps);
  g.end.dual = static_cast<Dual>(dual);
  g.end.out = pointer<float>(out, g.rows.count, "out");
  g.starts = pointer<const int64_t>(starts, g.rows.count, "starts");
  g.order = reinterpret_cast<const int64_t*>(order);
  for (const ChainStep& s : list)
    if (s.turned == (&s == &list.back()) || std::min(s.kernel_h, s.map_height) > 64 ||
        (g.end.center != nullptr && g.end.dual != Dual::none))
      throw std::invalid_argument(
          "steps: expected a box or a ball, kernels of 64 lines at most, and turned weights but the last");
  const ChainStep& s = list[0];  // few outputs a vector of rows: a dense layer alone is taken with them in the lanes
  const bool dense = list.size() == 1 && s.map_height == 1 && s.map_width == 1 && s.kernel_h == s.out_height &&
                     s.kernel_w == s.out_width && s.pad_y == 0 && s.pad_x == 0 && s.channels <= kMostLiveDense;
  without_gil(kReleaseGilAbove + 1, [&] {
    if (dense)
      bounds().live_dense(g);
    else
      bounds().live_chain(g);
  });
}

// grads: (to_slopes, to_intercepts, to_weight or 0) of each step
void chain_grad(const py::tuple& rows, const std::vector<std::array<int64_t, 19>>& steps,
                const std::vector<std::array<uintptr_t, 3>>& grads, int64_t examples, uintptr_t center,
                uintptr_t radius, uintptr_t from, uintptr_t starts, uintptr_t order, uintptr_t to_a,
                uintptr_t to_center, uintptr_t to_radius, bool living) {
  ChainGradArgs g;
  g.rows = rows_from(rows);
  if (g.rows.count == 0) return;
  if (g.rows.example == nullptr || steps.empty() || steps.size() != grads.size() || steps.size() > kMaxChain)
    throw std::invalid_argument("example, steps and grads: expected, 32 steps at most");
  std::vector<ChainGradStep> list(steps.size());
  for (size_t i = 0; i < steps.size(); ++i) {
    list[i].forward = chain_step(steps[i]);
    list[i].to_slopes = pointer<float>(grads[i][0], 1, "to_slopes");
    list[i].to_intercepts = pointer<float>(grads[i][1], 1, "to_intercepts");
    list[i].to_weight = reinterpret_cast<float*>(grads[i][2]);
  }
  g.steps = list.data();
  g.count = static_cast<int>(list.size());
  g.examples = examples;
  g.center = pointer<const float>(center, 1, "center");
  g.radius = pointer<const float>(radius, 1, "radius");
  g.from = pointer<const float>(from, 1, "from");
  g.starts = pointer<const int64_t>(starts, 1, "starts");
  g.order = reinterpret_cast<const int64_t*>(order);
  g.to_a = pointer<float>(to_a, 1, "to_a");
  g.to_center = reinterpret_cast<float*>(to_center);
  g.to_radius = reinterpret_cast<float*>(to_radius);
  g.living = living;
  without_gil(kReleaseGilAbove + 1, [&] { bounds().chain_grad(g); });
}

// tensors: from, from_b, starts, order or 0, to_a, to_slopes, to_intercepts, to_weight
void live_grad(const std::array<int64_t, 19>& step, const py::tuple& rows, int64_t examples, int64_t matrices,
               int64_t picked, const std::array<uintptr_t, 8>& tensors) {
  LiveGradArgs g;
  g.step = chain_step(step);
  g.rows = rows_from(rows);
  g.examples = examples, g.matrices = matrices, g.picked = picked;
  g.from = pointer<const float>(tensors[0], g.rows.count, "from");
  g.from_b = pointer<const float>(tensors[1], g.rows.count, "from_b");
  g.starts = pointer<const int64_t>(tensors[2], 1, "starts");
  g.order = reinterpret_cast<const int64_t*>(tensors[3]);
  g.to_a = pointer<float>(tensors[4], 1, "to_a");
  g.to_slopes = pointer<float>(tensors[5], examples, "to_slopes");
  g.to_intercepts = pointer<float>(tensors[6], examples, "to_intercepts");
  g.to_weight = pointer<float>(tensors[7], 1, "to_weight");
  without_gil(kReleaseGilAbove + 1, [&] { bounds().live_grad(g); });
}

void back_grad(int device, uintptr_t stream, const py::tuple& rows, uintptr_t slopes, int slope_sides,
               uintptr_t intercepts, int64_t examples, uintptr_t from_out, int sides_out, uintptr_t from_b,
               uintptr_t starts, uintptr_t order, uintptr_t to_a, uintptr_t to_slopes, uintptr_t to_intercepts) {
  BackGradArgs g;
  g.rows = rows_from(rows);
  const int64_t work = g.rows.count * g.rows.length;
  if (work == 0) return;
  g.slopes = pointer<const float>(slopes, work, "slopes");
  g.intercepts = pointer<const float>(intercepts, work, "intercepts");
  g.examples = examples;
  g.slope_sides = slope_sides;
  g.sides_out = sides_out;
  g.from_out = pointer<const float>(from_out, work, "from_out");
  g.from_b = pointer<const float>(from_b, work, "from_b");
  g.starts = pointer<const int64_t>(starts, work, "starts");
  g.order = reinterpret_cast<const int64_t*>(order);
  g.to_a = pointer<float>(to_a, work, "to_a");
  g.to_slopes = pointer<float>(to_slopes, work, "to_slopes");
  g.to_intercepts = pointer<float>(to_intercepts, work, "to_intercepts");
  on_device(device, stream, work, g, bounds().back_grad, FR_CUDA_KERNEL(back_grad_cuda));
}

void concretize_grad(int device, uintptr_t stream, const py::tuple& rows, uintptr_t center, uintptr_t radius,
                     int64_t examples, uintptr_t from, uintptr_t starts, uintptr_t order, uintptr_t to_a,
                     uintptr_t to_center, uintptr_t to_radius) {
  ConcretizeGradArgs g;
  g.rows = rows_from(rows);
  const int64_t work = g.rows.count * g.rows.length;
  if (work == 0) return;
  g.center = pointer<const float>(center, work, "center");
  g.radius = pointer<const float>(radius, work, "radius");
  g.examples = examples;
  g.from = pointer<const float>(from, work, "from");
  g.starts = pointer<const int64_t>(starts, work, "starts");
  g.order = reinterpret_cast<const int64_t*>(order);
  g.to_a = pointer<float>(to_a, work, "to_a");
  g.to_center = reinterpret_cast<float*>(to_center);
  g.to_radius = reinterpret_cast<float*>(to_radius);
  on_device(device, stream, work, g, bounds().concretize_grad, FR_CUDA_KERNEL(concretize_grad_cuda));
}

Activation activation_from(int number) {
  if (number < 0 || number >= kActivations) throw std::invalid_argument("activation: unknown number");
  return static_cast<Activation>(number);
}

#if defined(FASTROBUST_HAS_CUDA)
template <class T>
constexpr auto lines_gpu = &lines_cuda<T>;
template <class T>
constexpr auto lines_grad_gpu = &lines_grad_cuda<T>;
template <class T>
constexpr auto support_gpu = &support_cuda<T>;
#else
template <class T>
constexpr auto lines_gpu = nullptr;
template <class T>
constexpr auto lines_grad_gpu = nullptr;
template <class T>
constexpr auto support_gpu = nullptr;
#endif

template <class T>
void lines_as(int device, uintptr_t stream, uintptr_t lower, uintptr_t upper, uintptr_t slopes, uintptr_t intercepts,
              int64_t count, int activation, double p0, double p1, bool adaptive, uintptr_t bias, int64_t period,
              void (*cpu)(const LinesArgs<T>&)) {
  LinesArgs<T> g;
  if (bias != 0 && period < 1) throw std::invalid_argument("bias: got no period");
  g.lower = pointer<const T>(lower, count, "lower");
  g.upper = pointer<const T>(upper, count, "upper");
  g.slopes = pointer<T>(slopes, count, "slopes");
  g.intercepts = pointer<T>(intercepts, count, "intercepts");
  g.count = count;
  g.activation = activation_from(activation);
  g.p0 = p0, g.p1 = p1, g.adaptive = adaptive;
  g.bias = reinterpret_cast<const T*>(bias);
  g.period = period;
  on_device(device, stream, 8 * count, g, cpu, lines_gpu<T>);
}
// bias: [period] or 0
void lines(int device, uintptr_t stream, bool wide, uintptr_t lower, uintptr_t upper, uintptr_t slopes,
           uintptr_t intercepts, int64_t count, int activation, double p0, double p1, bool adaptive, uintptr_t bias,
           int64_t period) {
  if (wide)
    lines_as<double>(device, stream, lower, upper, slopes, intercepts, count, activation, p0, p1, adaptive, bias,
                     period, bounds().lines_double);
  else
    lines_as<float>(device, stream, lower, upper, slopes, intercepts, count, activation, p0, p1, adaptive, bias, period,
                    bounds().lines);
}

template <class T>
void lines_grad_as(int device, uintptr_t stream, const std::array<uintptr_t, 6>& tensors, int64_t count, int activation,
                   double p0, double p1, bool adaptive, void (*cpu)(const LinesGradArgs<T>&)) {
  LinesGradArgs<T> g;
  g.lower = pointer<const T>(tensors[0], count, "lower");
  g.upper = pointer<const T>(tensors[1], count, "upper");
  g.from_slopes = pointer<const T>(tensors[2], count, "slopes");
  g.from_intercepts = pointer<const T>(tensors[3], count, "intercepts");
  g.to_lower = pointer<T>(tensors[4], count, "to_lower");
  g.to_upper = pointer<T>(tensors[5], count, "to_upper");
  g.count = count;
  g.activation = activation_from(activation);
  g.p0 = p0, g.p1 = p1, g.adaptive = adaptive;
  on_device(device, stream, 8 * count, g, cpu, lines_grad_gpu<T>);
}
// tensors: lower, upper, the gradients of slopes and intercepts, those of lower and upper
void lines_grad(int device, uintptr_t stream, bool wide, const std::array<uintptr_t, 6>& tensors, int64_t count,
                int activation, double p0, double p1, bool adaptive) {
  if (wide)
    lines_grad_as<double>(device, stream, tensors, count, activation, p0, p1, adaptive, bounds().lines_grad_double);
  else
    lines_grad_as<float>(device, stream, tensors, count, activation, p0, p1, adaptive, bounds().lines_grad);
}

template <class T>
void support_as(int device, uintptr_t stream, const std::array<uintptr_t, 5>& tensors, int64_t count, int activation,
                double p0, double p1, bool above, void (*cpu)(const SupportArgs<T>&)) {
  SupportArgs<T> g;
  g.slopes = pointer<const T>(tensors[0], count, "slopes");
  g.lower = pointer<const T>(tensors[1], count, "lower");
  g.upper = pointer<const T>(tensors[2], count, "upper");
  g.intercepts = pointer<T>(tensors[3], count, "intercepts");
  g.points = pointer<T>(tensors[4], count, "points");
  g.count = count;
  g.activation = activation_from(activation);
  g.p0 = p0, g.p1 = p1, g.above = above;
  on_device(device, stream, 8 * count, g, cpu, support_gpu<T>);
}
// tensors: slopes, lower, upper, intercepts, points
void support(int device, uintptr_t stream, bool wide, const std::array<uintptr_t, 5>& tensors, int64_t count,
             int activation, double p0, double p1, bool above) {
  if (wide)
    support_as<double>(device, stream, tensors, count, activation, p0, p1, above, bounds().support_double);
  else
    support_as<float>(device, stream, tensors, count, activation, p0, p1, above, bounds().support);
}

void range(int device, uintptr_t stream, uintptr_t lower, uintptr_t upper, uintptr_t out_lower, uintptr_t out_upper,
           int64_t count, int activation, double p0, double p1) {
  RangeArgs<float> g;
  g.lower = pointer<const float>(lower, count, "lower");
  g.upper = pointer<const float>(upper, count, "upper");
  g.out_lower = pointer<float>(out_lower, count, "out_lower");
  g.out_upper = pointer<float>(out_upper, count, "out_upper");
  g.count = count;
  g.activation = activation_from(activation);
  g.p0 = p0, g.p1 = p1;
  on_device(device, stream, 4 * count, g, bounds().range, FR_CUDA_KERNEL(range_cuda));
}

// layers: (kind, finish, n, m, in_h, in_w, in_c, out_h, out_w, out_c, kernel_h, kernel_w, stride_y, stride_x, pad_y,
// pad_x) each; addresses: weight and bias of each, then of the last layer. Without `work` returns how many numbers it
// must hold, else 0 or, where the inputs or results are not fine, 1.
int64_t interval_chain(const std::vector<std::array<int64_t, 16>>& layers, const std::vector<uintptr_t>& addresses,
                       uintptr_t x, int64_t batch, int64_t numbers, double eps, double low, double high,
                       uintptr_t labels, int64_t classes, uintptr_t work, uintptr_t out, int sides) {
  if (addresses.size() != 2 * layers.size() + 2) throw std::invalid_argument("addresses: expected two for each layer");
  std::vector<IntervalLayer> list(layers.size());
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto& t = layers[i];
    IntervalLayer& s = list[i];
    s.kind = static_cast<LayerKind>(t[0]);
    s.finish = static_cast<Finish>(t[1]);
    s.n = t[2], s.m = t[3];
    IntervalConvArgs& c = s.conv;
    int64_t* const to[] = {&c.in_h,     &c.in_w,     &c.in_c,     &c.out_h,    &c.out_w, &c.out_c,
                           &c.kernel_h, &c.kernel_w, &c.stride_y, &c.stride_x, &c.pad_y, &c.pad_x};
    for (size_t k = 0; k < 12; ++k) *to[k] = t[k + 4];
    s.weight = reinterpret_cast<const float*>(addresses[2 * i]);
    s.bias = reinterpret_cast<const float*>(addresses[2 * i + 1]);
    if (s.kind != LayerKind::flatten && s.weight == nullptr) throw std::invalid_argument("weight: has no memory");
  }
  IntervalChainArgs g;
  g.x = pointer<const float>(x, batch * numbers, "x");
  g.batch = batch, g.numbers = numbers;
  g.eps = static_cast<float>(eps), g.low = static_cast<float>(low), g.high = static_cast<float>(high);
  g.layers = list.data(), g.count = static_cast<int>(list.size());
  g.weight = pointer<const float>(addresses[addresses.size() - 2], 1, "weight");
  g.bias = reinterpret_cast<const float*>(addresses.back());
  g.classes = classes, g.sides = sides;
  if (work == 0) return bounds().interval_chain_work(g);
  g.labels = pointer<const int64_t>(labels, batch, "labels");
  g.work = reinterpret_cast<float*>(work);
  g.out = pointer<float>(out, 1, "out");
  ChainResult result = ChainResult::done;
  without_gil(kReleaseGilAbove + 1, [&] { result = bounds().interval_chain(g); });
  return static_cast<int64_t>(result);
}

}  // namespace

void bind_bounds(py::module_& m) {
  bind_bounds_graph(m);
  bind_bounds_layers(m);
  m.def("bounds_back", &back);
  m.def("bounds_concretize", &concretize);
  m.def("bounds_spread", &spread, py::arg("a"), py::arg("weight"), py::arg("out"), py::arg("sizes"),
        py::arg("apart") = Apart{1, 1, 1});
  m.def("bounds_interval", &interval);
  m.def("bounds_interval_step", &interval_step);
  m.def("bounds_interval_conv", &interval_conv, py::arg("sizes"), py::arg("center_stride"), py::arg("radius_stride"),
        py::arg("center"), py::arg("radius"), py::arg("weight"), py::arg("bias"), py::arg("work"), py::arg("out_a"),
        py::arg("out_b"), py::arg("finish"), py::arg("apart") = Apart{1, 1, 1});
  m.def("bounds_chain", &chain);
  m.def("bounds_chain_grad", &chain_grad);
  m.def("bounds_live_grad", &live_grad);
  m.def("bounds_interval_chain", &interval_chain);
  m.def("bounds_back_grad", &back_grad);
  m.def("bounds_concretize_grad", &concretize_grad);
  m.def("bounds_lines", &lines);
  m.def("bounds_lines_grad", &lines_grad);
  m.def("bounds_support", &support);
  m.def("bounds_range", &range);
}

}  // namespace fastrobust
