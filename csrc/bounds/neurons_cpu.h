// Both gradients of one neuron of a convolution for a few rows: its weights and their gradient meet the rows' windows,
// each of which is loaded once for the two.
#pragma once

#include "bounds/fma.h"
#include "bounds/parts.h"
#include "core/simd.h"

FR_NS_BEGIN

#if defined(__AVX512F__)
constexpr int kNeuronRows = 9;  // at a time
#else
constexpr int kNeuronRows = 5;
#endif

// The lane sums of four vectors, one after the other.
FR_HD void four_sums(Vec a, Vec b, Vec c, Vec d, float* to) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 quads = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quads), _mm512_extractf32x8_ps(quads, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  Quad q[4] = {quarters(a), quarters(b), quarters(c), quarters(d)};
  transpose(q);
  store_quad(to, (q[0] + q[2]) + (q[1] + q[3]));
#endif
}

// sum[r] += w row(r) and, returned, to + the sum of f[r] row(r) over the rows r. Each is loaded once for the two: loads
// are what loops over this are short of.
template <int kR, class Row>
FR_HD Part both_products(Part w, Part to, const Part (&f)[kR], const Row& row, Part (&sum)[kR]) {
  Part odd(0.f);
#pragma GCC unroll 9
  for (int r = 0; r < kR; ++r) {
    const Part x = held(row(r));
    sum[r] = fmadd(w, x, sum[r]);
    if (r % 2 == 0)
      to = fmadd(f[r], x, to);
    else
      odd = fmadd(f[r], x, odd);
  }
  return to + odd;
}

// A window of a bordered image: `lines` of `line` numbers (whole vectors), `pitch` apart. The weights lie line by line.
struct WindowShape {
  int64_t lines, line, pitch;
};

// dots[r] = weight . x[r] and to_weight += factor[r] x[r] over the rows r; dots has room for whole groups of four.
template <int kR>
FR_HD void neuron_gradients(const WindowShape& s, const float* const* x, const float* factor, const float* weight,
                            float* to_weight, float* dots) {
  constexpr int kGroups = (kR + 3) / 4 * 4;
  Vec total[kGroups];
#pragma GCC unroll 12
  for (int r = 0; r < kGroups; ++r) total[r] = Vec(0.f);
#pragma GCC unroll 4
  for (int part = 0; part < kParts; ++part) {
    Part sum[kR], f[kR];
#pragma GCC unroll 9
    for (int r = 0; r < kR; ++r) sum[r] = Part(0.f), f[r] = Part(factor[r]);
    const float* w_line = weight + part * kPartLanes;
    float* to_line = to_weight + part * kPartLanes;
    for (int64_t k = 0, at = part * kPartLanes; k < s.lines; ++k, at += s.pitch, w_line += s.line, to_line += s.line) {
      const float* from[kR];
#pragma GCC unroll 9
      for (int r = 0; r < kR; ++r) from[r] = x[r] + at;
      for (int64_t i = 0; i < s.line; i += kLanes) {
        const auto row = [&](int r) FR_INLINE_LAMBDA { return load_part(from[r] + i); };
        store_part(to_line + i, both_products(load_part(w_line + i), load_part(to_line + i), f, row, sum));
      }
    }
#pragma GCC unroll 9
    for (int r = 0; r < kR; ++r) set_part(total[r], part, sum[r]);
  }
#pragma GCC unroll 3
  for (int r = 0; r < kGroups; r += 4) four_sums(total[r], total[r + 1], total[r + 2], total[r + 3], dots + r);
}

using NeuronFn = void (*)(const WindowShape&, const float* const*, const float*, const float*, float*, float*);
template <int kR = kNeuronRows>
NeuronFn neuron_fn(int64_t rows) {
  if constexpr (kR > 1)
    if (rows < kR) return neuron_fn<kR - 1>(rows);
  return neuron_gradients<kR>;
}

FR_NS_END
