// Additions with a chosen rounding direction, exact on every path: embedded rounding on AVX-512, the directed
// intrinsics on CUDA, and elsewhere Knuth's TwoSum, whose error term tells on which side the rounded sum fell.
#pragma once

#include "core/simd.h"

FR_NS_BEGIN

#if defined(__CUDA_ARCH__)

FR_HD float add_up(float a, float b) { return __fadd_ru(a, b); }
FR_HD float add_down(float a, float b) { return __fadd_rd(a, b); }

#else

FR_HD float step_bits(float a, int dir) { return float_from_bits(bits_of(a) + static_cast<uint32_t>(dir)); }

// error of s = fl(a + b): a + b == s + two_sum_error(a, b, s). An infinite sum gives NaN, which compares false below.
template <class V>
FR_HD V two_sum_error(V a, V b, V s) {
  const V bb = s - a;
  return (a - (s - bb)) + (b - bb);
}
// A sum that is zero or subnormal is exact, so no neighbour across zero is ever wanted.
template <class V>
FR_HD V add_up_two_sum(V a, V b) {
  const V s = a + b;
  const V next = select(s > V(0.f), step_bits(s, 1), step_bits(s, -1));
  return select(two_sum_error(a, b, s) > V(0.f), next, s);
}
// By negation, so that an exact sum of zero has the sign that rounding down gives it in hardware: -0.
template <class V>
FR_HD V add_down_two_sum(V a, V b) {
  return -add_up_two_sum(-a, -b);
}

FR_HD float add_up(float a, float b) { return add_up_two_sum(a, b); }
FR_HD float add_down(float a, float b) { return add_down_two_sum(a, b); }

#if !defined(__CUDACC__)
#if defined(__AVX512F__)
FR_HD Vec add_up(Vec a, Vec b) { return _mm512_add_round_ps(a.v, b.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC); }
FR_HD Vec add_down(Vec a, Vec b) { return _mm512_add_round_ps(a.v, b.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
#else
FR_HD Vec add_up(Vec a, Vec b) { return add_up_two_sum(a, b); }
FR_HD Vec add_down(Vec a, Vec b) { return add_down_two_sum(a, b); }
#endif
#endif

#endif  // __CUDA_ARCH__

// x0 + d rounded towards x0: |result - x0| <= |d| in exact arithmetic. Mirrored, so that d <= 0 and one rounding up
// serves both signs. A zero or NaN leaves x0 as it is.
template <class V>
FR_HD V add_inward(V x0, V d) {
  const V down = -vabs(d);
  const auto mirror = d > V(0.f);
  const V r = add_up(select(mirror, -x0, x0), down);
  return select(down < V(0.f), select(mirror, -r, r), x0);
}
#if defined(__AVX512F__) && !defined(__CUDACC__)
// The same in two masked instructions.
FR_HD Vec add_inward(Vec x0, Vec d) {
  const Mask rises = d > Vec(0.f), falls = d < Vec(0.f);
  const __m512 r = _mm512_mask_add_round_ps(x0.v, rises.m, x0.v, d.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return _mm512_mask_add_round_ps(r, falls.m, x0.v, d.v, _MM_FROUND_TO_POS_INF | _MM_FROUND_NO_EXC);
}
#endif

#if defined(__x86_64__) && !defined(__CUDACC__)
// While it lives the processor rounds every operation up, which is cheaper than TwoSum. The compiler does not know: the
// arithmetic meant must sit in a function of its own that is not inlined.
class RoundingUp {
 public:
  RoundingUp() : saved_(_mm_getcsr()) { _mm_setcsr((saved_ & ~_MM_ROUND_MASK) | _MM_ROUND_UP); }
  ~RoundingUp() { _mm_setcsr(saved_); }
  RoundingUp(const RoundingUp&) = delete;
  RoundingUp& operator=(const RoundingUp&) = delete;

 private:
  unsigned saved_;
};
#endif

// The largest float not above a double.
FR_HD float round_down(double a) {
  const float f = static_cast<float>(a);
  if (static_cast<double>(f) <= a || !(a == a)) return f;
  return f > 0.f ? float_from_bits(bits_of(f) - 1) : float_from_bits(bits_of(f) + 1);
}

FR_NS_END
