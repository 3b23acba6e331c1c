// float16 and bfloat16 are bits here, widened exactly and rounded to nearest; no device type is needed.
#pragma once

#include <cstring>

#include "core/macros.h"

FR_NS_BEGIN

FR_HD float float_from_bits(uint32_t u) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(u);
#else
  float f;
  std::memcpy(&f, &u, sizeof f);
  return f;
#endif
}

FR_HD uint32_t bits_of(float f) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(f);
#else
  uint32_t u;
  std::memcpy(&u, &f, sizeof u);
  return u;
#endif
}

FR_HD float bfloat_to_float(uint16_t h) { return float_from_bits(static_cast<uint32_t>(h) << 16); }

// Shift the bits into place and let a multiplication by 2^112 fix the exponent; subnormals come out exact.
FR_HD float half_to_float(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  const float scaled = float_from_bits(magnitude) * 0x1p112f;
  const uint32_t bits = (h & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000u : bits_of(scaled);
  return float_from_bits(bits | static_cast<uint32_t>(h & 0x8000) << 16);
}

// To nearest, ties to even; what is too large becomes infinite.
FR_HD uint16_t float_to_half(float f) {
  const uint32_t bits = bits_of(f), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  // below 2^-14 the steps are those of the floats in [1/2, 1): an addition rounds
  if (size < 0x38800000u) return static_cast<uint16_t>(sign | (bits_of(float_from_bits(size) + 0.5f) - bits_of(0.5f)));
  return static_cast<uint16_t>(sign | (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13);
}

FR_NS_END
