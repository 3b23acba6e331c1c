// Counter-based random numbers: Philox4x32-10 (Salmon et al. 2011). A number is a function of (seed, stream, example,
// element) alone, so it is the same on every device and for every batch size and number of threads.
#pragma once

#include <cmath>

#include "core/half.h"
#include "core/macros.h"

FR_NS_BEGIN

struct Philox4 {
  uint32_t r[4];
};

FR_HD Philox4 philox(uint64_t seed, uint32_t stream, uint32_t example, uint64_t block) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = example, c3 = stream;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u, p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// 24 random bits on [0, 1), and 23 on the open (0, 1).
FR_HD float uniform_half_open(uint32_t u) { return static_cast<float>(u >> 8) * 0x1p-24f; }
FR_HD float uniform_open(uint32_t u) { return (static_cast<float>(u >> 9) + 0.5f) * 0x1p-23f; }

// log of a positive normal float: polynomial on [sqrt(1/2), sqrt(2)), the same roundings on every device (1 ulp or so).
FR_HD float portable_log(float a) {
  const uint32_t bits = bits_of(a), shifted = bits - 0x3f3504f3u;  // sqrt(1/2)
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  const float m = float_from_bits((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.f;
  // log(1+m) = 2 atanh(s), s = m / (2+m), as an odd series in s
  const float s = m / (2.f + m), z = s * s;
  const float series = 2.f + z * (0.66666669f + z * (0.39999986f + z * (0.28575694f + z * 0.22681832f)));
  return static_cast<float>(exponent) * 0.69314718f + s * series;
}

// Two independent standard normals (Box and Muller 1958).
struct Normal2 {
  float a, b;
};
FR_HD Normal2 normal_pair(uint32_t u, uint32_t v) {
  const float radius = sqrtf(-2.f * portable_log(uniform_open(u)));
  const float turns = uniform_half_open(v) * 4.f;  // quarter turns
  const int quadrant = static_cast<int>(turns + 0.5f);
  const float t = (turns - static_cast<float>(quadrant)) * 1.57079633f, t2 = t * t;
  const float sine = t * (1.f + t2 * (-0.16666655f + t2 * (8.3321608e-3f + t2 * -1.9515296e-4f)));
  const float cosine = 1.f + t2 * (-0.5f + t2 * (4.1666646e-2f + t2 * (-1.3887316e-3f + t2 * 2.4433157e-5f)));
  const bool swap = (quadrant & 1) != 0;
  const float c = swap ? sine : cosine, s = swap ? cosine : sine;
  const bool negative_c = ((quadrant + 1) & 2) != 0, negative_s = (quadrant & 2) != 0;
  return {radius * (negative_c ? -c : c), radius * (negative_s ? -s : s)};
}

FR_NS_END
