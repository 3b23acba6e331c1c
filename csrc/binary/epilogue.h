// What happens to a sum before it is written, for float and for sixteen lanes.
#pragma once

#include "core/simd.h"

FR_NS_BEGIN

// Zero for negative values; NaN stays NaN as in torch.
template <class V>
FR_HD V relu(V v) {
  return select(v < V(0.f), V(0.f), v);
}

template <class V>
FR_HD V affine(V sum, V scale, V shift) {
  return sum * scale + shift;
}

// The gradient that passes a ReLU whose output was `gate`.
template <class V>
FR_HD V through(V v, V gate) {
  return select(gate > V(0.f), v, V(0.f));
}

FR_NS_END
