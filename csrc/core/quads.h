// Four and eight floats at a time, where the order of numbers changes: transposition, every second number.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/macros.h"

// Numbers of a, then of b, by constant indices: GCC has clang's builtin since version 12, clang never had GCC's.
#if defined(__clang__) || __GNUC__ >= 12
#define FR_SHUFFLE(Index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define FR_SHUFFLE(Index, a, b, ...) __builtin_shuffle(a, b, Index{__VA_ARGS__})
#endif

FR_NS_BEGIN

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadIndex __attribute__((vector_size(16)));
typedef float Oct __attribute__((vector_size(32)));
typedef int32_t OctIndex __attribute__((vector_size(32)));

FR_HD Quad load_quad(const float* p) {
  Quad q;
  std::memcpy(&q, p, sizeof q);
  return q;
}
FR_HD void store_quad(float* p, Quad q) { std::memcpy(p, &q, sizeof q); }

FR_HD void transpose(Quad q[4]) {
  const Quad a = FR_SHUFFLE(QuadIndex, q[0], q[1], 0, 4, 1, 5), b = FR_SHUFFLE(QuadIndex, q[0], q[1], 2, 6, 3, 7);
  const Quad c = FR_SHUFFLE(QuadIndex, q[2], q[3], 0, 4, 1, 5), d = FR_SHUFFLE(QuadIndex, q[2], q[3], 2, 6, 3, 7);
  q[0] = FR_SHUFFLE(QuadIndex, a, c, 0, 1, 4, 5);
  q[1] = FR_SHUFFLE(QuadIndex, a, c, 2, 3, 6, 7);
  q[2] = FR_SHUFFLE(QuadIndex, b, d, 0, 1, 4, 5);
  q[3] = FR_SHUFFLE(QuadIndex, b, d, 2, 3, 6, 7);
}

// The first of every two of eight, or of sixteen, numbers.
FR_HD void put_even4(float* dst, const float* src) {
  store_quad(dst, FR_SHUFFLE(QuadIndex, load_quad(src), load_quad(src + 4), 0, 2, 4, 6));
}
FR_HD void put_even8(float* dst, const float* src) {
  Oct a, b;
  std::memcpy(&a, src, sizeof a);
  std::memcpy(&b, src + 8, sizeof b);
  a = FR_SHUFFLE(OctIndex, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  std::memcpy(dst, &a, sizeof a);
}

FR_NS_END
