// Losses of an attack: value and gradient with respect to the logits. An attack ascends them.
//   cross entropy  log sum_j exp(z_j) - z_y
//   margin (CW)    max_{j != y} z_j - z_y                                                (Carlini and Wagner 2017)
//   DLR            -(z_y - max_{j != y} z_j) / (z_(1) - z_(3) + 1e-12)                   (Croce and Hein 2020)
//   targeted DLR   -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)
//   KL             sum_j p_j (log p_j - log q_j), p = softmax(reference), q = softmax(z)  (TRADES, Zhang et al. 2019)
// z_(k) is the k-th largest logit; among equals the lower index comes first. A NaN logit makes its row's value and
// gradient NaN; so do an infinite largest logit in cross entropy and KL, whose softmax does not exist then.
#pragma once

#include <cmath>

#include "core/simd.h"
#include "pgd/args.h"

FR_NS_BEGIN

// The four largest logits and the largest one apart from y.
struct Top {
  float value[4];
  int64_t index[4];
  float other;
  int64_t other_index;
};
FR_HD void top_start(Top* t) {
  for (int k = 0; k < 4; ++k) {
    t->value[k] = -INFINITY;
    t->index[k] = -1;
  }
  t->other = -INFINITY;
  t->other_index = -1;
}
FR_HD void top_add(Top* t, float z, int64_t j, bool is_label) {
  if (!is_label && (z > t->other || t->other_index < 0)) {
    t->other = z;
    t->other_index = j;
  }
  for (int k = 0; k < 4; ++k) {
    if (z > t->value[k] || t->index[k] < 0) {
      for (int l = 3; l > k; --l) {
        t->value[l] = t->value[l - 1];
        t->index[l] = t->index[l - 1];
      }
      t->value[k] = z;
      t->index[k] = j;
      return;
    }
  }
}

// Does argmax prefer a logit to the label's? It takes the first of the largest, and a NaN for larger than any number.
FR_HD bool outranks(float z, float label, bool first) {
  const bool nan = !(z == z), label_nan = !(label == label);
  if (nan || label_nan) return nan && (first || !label_nan);
  return z > label || (z == label && first);
}

// Loss and its sparse gradient: at most five coordinates, given as (index, weight); an index may repeat.
struct Sparse {
  float value;
  int64_t index[5];
  float weight[5];
  int count;
};
FR_HD void sparse_add(Sparse* s, int64_t index, double weight) {
  s->index[s->count] = index;
  s->weight[s->count] = static_cast<float>(weight);
  ++s->count;
}
FR_HD Sparse sparse_loss(Loss loss, const Top& t, float zy, int64_t y, float zt, int64_t target) {
  Sparse s;
  s.count = 0;
  if (loss == Loss::margin) {
    s.value = t.other - zy;
    sparse_add(&s, t.other_index, 1.);
    sparse_add(&s, y, -1.);
    return s;
  }
  const bool targeted = loss == Loss::dlr_targeted;
  const int64_t rival = targeted ? target : t.other_index;
  const double gap = static_cast<double>(zy) - (targeted ? zt : t.other);
  const double low = targeted ? 0.5 * (static_cast<double>(t.value[2]) + t.value[3]) : t.value[2];
  const double width = t.value[0] - low + 1e-12, slope = gap / (width * width);
  s.value = static_cast<float>(-gap / width);
  sparse_add(&s, y, -1. / width);
  sparse_add(&s, rival, 1. / width);
  sparse_add(&s, t.index[0], slope);
  if (targeted) {
    sparse_add(&s, t.index[2], -0.5 * slope);
    sparse_add(&s, t.index[3], -0.5 * slope);
  } else {
    sparse_add(&s, t.index[2], -slope);
  }
  return s;
}

FR_NS_END
