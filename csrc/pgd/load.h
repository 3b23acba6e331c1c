// Reading gradients of any type, sixteen at a time, and parameters of any shape.
#pragma once

#include <type_traits>

#include "core/simd.h"
#include "pgd/args.h"

FR_NS_BEGIN

template <GradType T>
struct GradReader;

template <>
struct GradReader<GradType::f32> {
  const float* p;
  FR_HD GradReader(const void* base, int64_t offset) : p(static_cast<const float*>(base) + offset) {}
  FR_HD float at(int64_t i) const { return p[i]; }
#if !defined(__CUDACC__)
  FR_HD Vec vec(int64_t i) const { return load(p + i); }
  FR_HD Vec vec(int64_t i, int n) const { return load_n(p + i, n); }
#endif
};
template <>
struct GradReader<GradType::f16> {
  const uint16_t* p;
  FR_HD GradReader(const void* base, int64_t offset) : p(static_cast<const uint16_t*>(base) + offset) {}
  FR_HD float at(int64_t i) const { return half_to_float(p[i]); }
#if !defined(__CUDACC__)
  FR_HD Vec vec(int64_t i) const { return load_half(p + i); }
  FR_HD Vec vec(int64_t i, int n) const { return load_half_n(p + i, n); }
#endif
};
template <>
struct GradReader<GradType::bf16> {
  const uint16_t* p;
  FR_HD GradReader(const void* base, int64_t offset) : p(static_cast<const uint16_t*>(base) + offset) {}
  FR_HD float at(int64_t i) const { return bfloat_to_float(p[i]); }
#if !defined(__CUDACC__)
  FR_HD Vec vec(int64_t i) const { return load_bfloat(p + i); }
  FR_HD Vec vec(int64_t i, int n) const { return load_bfloat_n(p + i, n); }
#endif
};
template <>
struct GradReader<GradType::none> {
  FR_HD GradReader(const void*, int64_t) {}
  FR_HD float at(int64_t) const { return 0.f; }
#if !defined(__CUDACC__)
  FR_HD Vec vec(int64_t) const { return Vec(0.f); }
  FR_HD Vec vec(int64_t, int) const { return Vec(0.f); }
#endif
};

// Calls f with the gradient's type as a type: f(std::integral_constant<GradType, ...>).
template <class F>
void with_grad_type(GradType type, const F& f) {
  switch (type) {
    case GradType::f32:
      return f(std::integral_constant<GradType, GradType::f32>());
    case GradType::f16:
      return f(std::integral_constant<GradType, GradType::f16>());
    case GradType::bf16:
      return f(std::integral_constant<GradType, GradType::bf16>());
    default:
      return f(std::integral_constant<GradType, GradType::none>());
  }
}

// A parameter read at (example, element): `stride` is 1 when it has a value per element, else 0.
FR_HD float param_at(const Param& p, int64_t row, int64_t n, int64_t i) {
  return p.per == Per::all ? p.value : (p.per == Per::example ? p.data[row] : p.data[row * n + i]);
}

FR_NS_END
