// What happens to a sum before it is written, for float and for sixteen lanes.
#pragma once

#include "binary/activation.h"

FR_NS_BEGIN

template <class V>
FR_HD V affine(V sum, V scale, V shift) {
  return sum * scale + shift;
}

// The gradient that passes a ReLU whose output was `gate`.
template <class V>
FR_HD V through(V v, V gate) {
  return select(gate > V(0.f), v, V(0.f));
}

#if !defined(__CUDACC__)
// Lane i of a where bit i is set, of b elsewhere.
FR_HD Vec pick(uint16_t set, Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(set, b.v, a.v);
#else
  constexpr int kEach = kLanes / kRegs;
  Mask m;
  for (int i = 0; i < kRegs; ++i) {
    NativeI bit;
    for (int j = 0; j < kEach; ++j) bit[j] = 1 << (i * kEach + j);
    m.r[i] = ((NativeI{} + set) & bit) == bit;
  }
  return select(m, a, b);
#endif
}

// Lane i where bit i is set, zero elsewhere.
FR_HD Vec where_set(Vec v, uint16_t set) {
#if defined(__AVX512F__)
  return _mm512_maskz_mov_ps(set, v.v);
#else
  return pick(set, v, Vec(0.f));
#endif
}

// `through` with the sides of the ReLU as bits.
FR_HD Vec through(Vec v, uint16_t open) { return where_set(v, open); }
#endif

FR_NS_END
