// Rows of coefficients and the maps under them, one element or four neighbours at a time.
#pragma once

#include "bounds/formulas.h"
#include "bounds/window.h"
#include "runtime/wide_cuda.h"

FR_NS_BEGIN

// Where elements of a row lie on their map; -1: outside. Four neighbours lie together (by_fours).
struct OneOnMap {
  static constexpr int count = 1;
  int64_t first;
  __device__ __forceinline__ bool there(int) const { return first >= 0; }
};
struct FourOnMap {
  static constexpr int count = 4;
  int64_t first;
  __device__ __forceinline__ bool there(int) const { return first >= 0; }
};
struct EightOnMap {
  static constexpr int count = 8;
  int64_t first, second;
  __device__ __forceinline__ bool there(int k) const { return (k < 4 ? first : second) >= 0; }
};
// Numbers of a map of an example; zeros outside. Other rows of the example read them too.
__device__ __forceinline__ Values<float, 1> from_map(const float* p, OneOnMap m) {
  return {{m.first < 0 ? 0.f : p[m.first]}};
}
__device__ __forceinline__ Values<float, 4> from_map(const float* p, FourOnMap m) {
  if (m.first < 0) return {};
  return load_wide<4, Use::again>(p + m.first);
}
__device__ __forceinline__ Values<float, 8> from_map(const float* p, EightOnMap m) {
  const Values<float, 4> a = from_map(p, FourOnMap{m.first}), b = from_map(p, FourOnMap{m.second});
  return {{a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3]}};
}

// One row: what of Rows is its own is read once.
struct PlacedRow {
  const Rows& r;
  bool window;
  int64_t corner_y, corner_x;
  const float *a, *minus;

  __device__ __forceinline__ PlacedRow(const Rows& rows, int64_t row)
      : r(rows),
        window(rows.corner_y != nullptr),
        corner_y(window ? rows.corner_y[row] : 0),
        corner_x(window ? rows.corner_x[row] : 0),
        a(rows.a + source_row(rows, row) * rows.length),
        minus(rows.minus == nullptr ? nullptr : rows.a + rows.minus[row] * rows.length) {}

  __device__ __forceinline__ int64_t map(int64_t i) const { return window ? map_at(r, corner_y, corner_x, i) : i; }
  __device__ __forceinline__ OneOnMap on_map(One i) const { return {map(i.first)}; }
  __device__ __forceinline__ FourOnMap on_map(Four i) const { return {map(i.first)}; }
  __device__ __forceinline__ EightOnMap on_map(Eight i) const { return {map(i.first), map(i.second)}; }

  template <class P>
  __device__ __forceinline__ Values<float, P::count> coefficients(int64_t side_offset, P i) const {
    auto v = load_at(a + side_offset, i);
    if (minus != nullptr) {
      const auto other = load_at<Use::again>(minus + side_offset, i);
      for (int k = 0; k < P::count; ++k) v.v[k] = v.v[k] - other.v[k];
    }
    return v;
  }
};

// Whether four neighbours of a row are neighbours on the map, and every row starts at a multiple of four.
inline bool by_fours(const Rows& r) { return (r.corner_y == nullptr ? r.length : r.channels) % 4 == 0; }
inline Addresses addresses_of(const Rows& r) { return Addresses().add(r.a); }

FR_NS_END
