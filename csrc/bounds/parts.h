// A vector of sixteen lanes register by register: a loop whose sums would not stay in registers goes over its data once
// for each of them, with the same sums lane by lane.
#pragma once

#include "bounds/fma.h"
#include "core/simd.h"

FR_NS_BEGIN

#if defined(__AVX512F__)
using Part = Vec;
constexpr int kParts = 1;
FR_HD Part load_part(const float* p) { return load(p); }
FR_HD void store_part(float* p, Part a) { store(p, a); }
FR_HD Part part_of(Vec a, int) { return a; }
FR_HD void set_part(Vec& a, int, Part part) { a = part; }
// In a register: the compiler may not load it again for its second use.
FR_HD Part held(Part a) {
  asm("" : "+v"(a.v));
  return a;
}
#else
struct Part {
  NativeF r;
  Part() = default;
  FR_HD Part(NativeF a) : r(a) {}
  FR_HD Part(float a) : r(splat(a)) {}
  friend FR_HD Part operator+(Part a, Part b) { return a.r + b.r; }
};
constexpr int kParts = kRegs;
FR_HD Part load_part(const float* p) { return *reinterpret_cast<const UnalignedF*>(p); }
FR_HD void store_part(float* p, Part a) { *reinterpret_cast<UnalignedF*>(p) = a.r; }
FR_HD Part part_of(Vec a, int part) { return a.r[part]; }
FR_HD void set_part(Vec& a, int i, Part part) { a.r[i] = part.r; }
FR_HD Part fmadd(Part a, Part b, Part c) { return fmadd_native(a.r, b.r, c.r); }
FR_HD Part held(Part a) {
#if defined(__x86_64__)
  asm("" : "+x"(a.r));
#endif
  return a;
}
#endif
constexpr int kPartLanes = kLanes / kParts;

FR_NS_END
