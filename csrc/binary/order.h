// Floats as unsigned integers in the same order, cut into three digits.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

FR_NS_BEGIN

constexpr int kPasses = 3;
constexpr int kBins = 2048;
// Bits of the digit of a pass, and what lies below it.
FR_HD int digit_bits(int pass) { return pass < 2 ? 11 : 10; }
FR_HD int digit_shift(int pass) { return pass == 0 ? 21 : pass == 1 ? 10 : 0; }

// Ascending with the value; -0 and 0 are one key. Not for NaN.
FR_HD uint32_t order_key(float value) {
  const float canonical = value + 0.f;  // -0 becomes 0
#if defined(__CUDA_ARCH__)
  const uint32_t bits = __float_as_uint(canonical);
#else
  uint32_t bits;
  std::memcpy(&bits, &canonical, sizeof bits);
#endif
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}

FR_HD uint32_t digit(uint32_t key, int pass) {
  return pass == 0 ? key >> 21 : pass == 1 ? (key >> 10) & 2047u : key & 1023u;
}

// Infinities and NaN fall into the bins of the largest exponent, at both ends of the first histogram: the first digit
// holds the sign, eight exponent bits and two mantissa bits.
template <class Count>
FR_HD bool not_finite(const Count* first_histogram) {
  bool bad = false;
  for (int b = 0; b < 4; ++b) bad = bad || first_histogram[b] != 0 || first_histogram[kBins - 1 - b] != 0;
  return bad;
}

FR_NS_END
