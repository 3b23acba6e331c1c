// Where the pixels of a moved image lie in its row of the store. An image is flipped, then shifted; what it shows is a
// window of the frame, read forwards or backwards.
#pragma once

#include "core/half.h"
#include "store/args.h"

FR_NS_BEGIN

// A whole number of low-resolution pixels: the nearest, halves towards zero.
FR_HD int64_t nearest_part(int64_t offset, int64_t factor) {
  const int64_t size = offset < 0 ? -offset : offset, parts = (size + (factor - 1) / 2) / factor;
  return offset < 0 ? -parts : parts;
}

// Image pixel (i, j) is frame pixel (row + i, column + sign j); with `low` both are of the store's resolution.
struct Place {
  int64_t row, column, sign;
};
FR_HD Place place_of(const StoreArgs& a, int64_t b) {
  const int64_t scale = a.low ? a.factor : 1, padding = a.padding / scale;
  int64_t down = a.offsets == nullptr ? 0 : a.offsets[2 * b], right = a.offsets == nullptr ? 0 : a.offsets[2 * b + 1];
  if (a.low) {
    down = nearest_part(down, a.factor);
    right = nearest_part(right, a.factor);
  }
  const int64_t row = padding - (a.inverse ? -down : down);
  // mirrored and shifted is its own inverse
  if (a.flips != nullptr && a.flips[b] != 0) return {row, padding + a.width / scale - 1 + right, -1};
  return {row, padding - (a.inverse ? -right : right), 1};
}

// A pixel of the image along one axis: (1 - t) of store coordinate `first` and t of `second`; -1 is outside, a zero.
struct Tap {
  int64_t first, second;
  float t;
};
FR_HD Tap between(int64_t pixel, int64_t factor, int64_t count) {
  float at = (static_cast<float>(pixel) + 0.5f) / static_cast<float>(factor) - 0.5f;
  at = at > 0.f ? at : 0.f;
  const int64_t first = static_cast<int64_t>(at);
  return {first, first + 1 < count ? first + 1 : count - 1, at - static_cast<float>(first)};
}
FR_HD Tap tap_of(int64_t i, int64_t base, int64_t sign, int64_t size, int64_t store_size, const StoreArgs& a) {
  if (a.low) {
    Tap tap = between(i, a.factor, size / a.factor);
    tap.first = base + sign * tap.first;
    tap.second = base + sign * tap.second;
    if (tap.first < 0 || tap.first >= store_size) tap.first = -1;
    if (tap.second < 0 || tap.second >= store_size) tap.second = -1;
    return tap;
  }
  const int64_t pixel = base + sign * i;
  if (pixel < 0 || pixel >= store_size * a.factor) return {-1, -1, 0.f};
  if (a.factor == 1) return {pixel, pixel, 0.f};
  return between(pixel, a.factor, store_size);
}
FR_HD Tap row_tap(const StoreArgs& a, const Place& p, int64_t i) { return tap_of(i, p.row, 1, a.height, a.store_h, a); }
FR_HD Tap column_tap(const StoreArgs& a, const Place& p, int64_t j) {
  return tap_of(j, p.column, p.sign, a.width, a.store_w, a);
}
template <class V>
FR_HD V mix(V a, V b, float t) {
  return t == 0.f ? a : a * V(1.f - t) + b * V(t);
}

// The image pixels [first, last) along one axis whose mean a store coordinate keeps; none: it keeps what it has.
struct Shown {
  int64_t first, last;
  FR_HD int64_t count() const { return last > first ? last - first : 0; }
};
FR_HD Shown shown_of(int64_t u, int64_t base, int64_t sign, int64_t size, const StoreArgs& a) {
  if (a.low) {
    const int64_t i = sign * (u - base);
    return i < 0 || i >= size / a.factor ? Shown{0, 0} : Shown{i * a.factor, (i + 1) * a.factor};
  }
  const int64_t near = sign * (u * a.factor - base), far = sign * (u * a.factor + a.factor - 1 - base);
  const int64_t first = near < far ? near : far, last = (near < far ? far : near) + 1;
  return {first > 0 ? first : 0, last < size ? last : size};
}
FR_HD Shown shown_rows(const StoreArgs& a, const Place& p, int64_t u) { return shown_of(u, p.row, 1, a.height, a); }
FR_HD Shown shown_columns(const StoreArgs& a, const Place& p, int64_t v) {
  return shown_of(v, p.column, p.sign, a.width, a);
}

// Of images with the same row the last one writes.
FR_HD bool is_last(const StoreArgs& a, int64_t b) {
  if (a.index == nullptr) return true;
  for (int64_t k = b + 1; k < a.batch; ++k)
    if (a.index[k] == a.index[b]) return false;
  return true;
}
// The image's row of the store, or -1 where it has none.
FR_HD int64_t row_of(const StoreArgs& a, int64_t b) {
  const int64_t row = a.index == nullptr ? b : a.index[b];
  return row >= 0 && row < a.rows ? row : -1;
}

template <class T>
FR_HD float kept(T v);
template <>
FR_HD float kept<float>(float v) {
  return v;
}
template <>
FR_HD float kept<uint16_t>(uint16_t v) {
  return half_to_float(v);
}
FR_HD void keep(float* p, float v) { *p = v; }
FR_HD void keep(uint16_t* p, float v) { *p = float_to_half(v); }

FR_NS_END
