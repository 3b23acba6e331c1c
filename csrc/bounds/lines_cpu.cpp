// Lines around activations, their gradients and ranges: one elementwise pass each.
#include <algorithm>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/lines.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// ---- float by vectors, double by numbers ----
template <class T>
struct Lane;
template <>
struct Lane<float> {
  using V = Vec;
  static constexpr int kCount = kLanes;
  static FR_HD V get(const float* p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
  static FR_HD void put(float* p, V v, int n) { n == kLanes ? store(p, v) : store_n(p, v, n); }
  static FR_HD V times_plus(V a, V b, V c) { return fmadd(a, b, c); }
};
template <>
struct Lane<double> {
  using V = double;
  static constexpr int kCount = 1;
  static FR_HD V get(const double* p, int) { return *p; }
  static FR_HD void put(double* p, V v, int) { *p = v; }
  static FR_HD V times_plus(V a, V b, V c) { return a * b + c; }
};

// n numbers from `at` on of a line that repeats
template <class T>
typename Lane<T>::V periodic(const T* line, int64_t at, int64_t period, int n) {
  if (at + n <= period) return Lane<T>::get(line + at, n);
  T some[Lane<T>::kCount] = {};
  for (int k = 0; k < n; ++k) some[k] = line[(at + k) % period];
  return Lane<T>::get(some, Lane<T>::kCount);
}

constexpr int64_t kGrain = 4096;

// Calls part(i, n) for every vector's worth of numbers.
template <class T, class Part>
void each(int64_t count, const Part& part) {
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += Lane<T>::kCount)
      part(i, static_cast<int>(std::min<int64_t>(Lane<T>::kCount, end - i)));
  });
}

template <Activation kAct, class T>
void lines_of(const LinesArgs<T>& g) {
  using L = Lane<T>;
  using V = typename L::V;
  const V p0(static_cast<T>(g.p0)), p1(static_cast<T>(g.p1));
  each<T>(g.count, [&](int64_t i, int n) FR_INLINE_LAMBDA {
    V slope_low, slope_up, low, up;
    lines<kAct>(L::get(g.lower + i, n), L::get(g.upper + i, n), p0, p1, g.adaptive, slope_low, slope_up, low, up);
    if (g.bias != nullptr) {
      const V bias = periodic(g.bias, i % g.period, g.period, n);
      low = L::times_plus(slope_low, bias, low);
      up = L::times_plus(slope_up, bias, up);
    }
    L::put(g.slopes + i, slope_low, n);
    if (g.adaptive) L::put(g.slopes + g.count + i, slope_up, n);
    L::put(g.intercepts + i, low, n);
    L::put(g.intercepts + g.count + i, up, n);
  });
}

template <Activation kAct, class T>
void lines_grad_of(const LinesGradArgs<T>& g) {
  using L = Lane<T>;
  using V = typename L::V;
  const V p0(static_cast<T>(g.p0)), p1(static_cast<T>(g.p1)), zero(static_cast<T>(0));
  const T* const upper_slopes = g.adaptive ? g.from_slopes + g.count : g.from_slopes;
  each<T>(g.count, [&](int64_t i, int n) FR_INLINE_LAMBDA {
    V to_l, to_u;
    lines_grad<kAct>(L::get(g.lower + i, n), L::get(g.upper + i, n), p0, p1, g.adaptive,
                     g.adaptive ? L::get(g.from_slopes + i, n) : zero, L::get(upper_slopes + i, n),
                     L::get(g.from_intercepts + i, n), L::get(g.from_intercepts + g.count + i, n), to_l, to_u);
    L::put(g.to_lower + i, to_l, n);
    L::put(g.to_upper + i, to_u, n);
  });
}

template <Activation kAct>
void range_of_all(const RangeArgs<float>& g) {
  using L = Lane<float>;
  const Vec p0(static_cast<float>(g.p0)), p1(static_cast<float>(g.p1));
  each<float>(g.count, [&](int64_t i, int n) FR_INLINE_LAMBDA {
    Vec low, up;
    range_of<kAct>(L::get(g.lower + i, n), L::get(g.upper + i, n), p0, p1, low, up);
    L::put(g.out_lower + i, low, n);
    L::put(g.out_upper + i, up, n);
  });
}

template <Activation kAct, class T>
void support_of(const SupportArgs<T>& g) {
  using L = Lane<T>;
  using V = typename L::V;
  const V p0(static_cast<T>(g.p0)), p1(static_cast<T>(g.p1));
  each<T>(g.count, [&](int64_t i, int n) FR_INLINE_LAMBDA {
    V b, at;
    support<kAct>(L::get(g.slopes + i, n), L::get(g.lower + i, n), L::get(g.upper + i, n), p0, p1, g.above, b, at);
    L::put(g.intercepts + i, b, n);
    L::put(g.points + i, at, n);
  });
}

// One entry for each activation, in the order of the enumeration.
#define FR_EACH_ACTIVATION(f) \
  {f(relu), f(hardtanh), f(sigmoid), f(tanh), f(arctan), f(softplus), f(elu), f(silu), f(gelu), f(gelu_tanh)}

template <class T>
void lines_any(const LinesArgs<T>& g) {
#define FR_ENTRY(name) lines_of<Activation::name, T>
  static constexpr void (*kTable[kActivations])(const LinesArgs<T>&) = FR_EACH_ACTIVATION(FR_ENTRY);
#undef FR_ENTRY
  kTable[static_cast<int>(g.activation)](g);
}
template <class T>
void lines_grad_any(const LinesGradArgs<T>& g) {
#define FR_ENTRY(name) lines_grad_of<Activation::name, T>
  static constexpr void (*kTable[kActivations])(const LinesGradArgs<T>&) = FR_EACH_ACTIVATION(FR_ENTRY);
#undef FR_ENTRY
  kTable[static_cast<int>(g.activation)](g);
}
template <class T>
void support_any(const SupportArgs<T>& g) {
#define FR_ENTRY(name) support_of<Activation::name, T>
  static constexpr void (*kTable[kActivations])(const SupportArgs<T>&) = FR_EACH_ACTIVATION(FR_ENTRY);
#undef FR_ENTRY
  kTable[static_cast<int>(g.activation)](g);
}

}  // namespace

void lines_cpu(const LinesArgs<float>& g) { lines_any(g); }
void lines_double_cpu(const LinesArgs<double>& g) { lines_any(g); }
void lines_grad_cpu(const LinesGradArgs<float>& g) { lines_grad_any(g); }
void lines_grad_double_cpu(const LinesGradArgs<double>& g) { lines_grad_any(g); }
void support_cpu(const SupportArgs<float>& g) { support_any(g); }
void support_double_cpu(const SupportArgs<double>& g) { support_any(g); }
void range_cpu(const RangeArgs<float>& g) {
#define FR_ENTRY(name) range_of_all<Activation::name>
  static constexpr void (*kTable[kActivations])(const RangeArgs<float>&) = FR_EACH_ACTIVATION(FR_ENTRY);
#undef FR_ENTRY
  kTable[static_cast<int>(g.activation)](g);
}

FR_NS_END
