// From the store to where a batch starts: a row is read, moved, brought to full resolution and projected while in
// cache.
#include <algorithm>
#include <vector>

#include "core/ball.h"
#include "core/floats.h"
#include "runtime/parallel.h"
#include "store/place.h"
#include "store/rows_cpu.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainElements = 16384;

// Memory of one thread: a row of the store with a zero before it, a row of perturbations, and the columns' taps.
struct Scratch {
  Floats narrow, wide;
  std::vector<Tap> taps;
  explicit Scratch(const StoreArgs& a)
      : narrow(a.store_w + kLanes), wide(a.width + kLanes), taps(static_cast<size_t>(a.width)) {
    narrow[kLanes - 1] = 0.f;
  }
  float* row() const { return narrow.get() + kLanes; }  // row()[-1] is the zero outside
};

template <class T>
void blend(const T* plane, const Tap& tap, int64_t n, float* out) {
  const T *a = plane + tap.first * n, *b = plane + tap.second * n;
  each_part(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
    const Vec first = tap.first < 0 ? Vec(0.f) : read(a + i, m);
    write(out + i, tap.t == 0.f ? first : mix(first, tap.second < 0 ? Vec(0.f) : read(b + i, m), tap.t), m);
  });
}

// The columns of one row of the store as the image shows them.
const float* spread(const StoreArgs& a, const Place& p, const Scratch& s) {
  const float* row = s.row();
  float* out = s.wide.get();
  if (a.factor > 1) {
    for (int64_t j = 0; j < a.width; ++j) {
      const Tap& t = s.taps[static_cast<size_t>(j)];
      out[j] = mix(row[t.first], row[t.second], t.t);
    }
    return out;
  }
  // image columns [from, to) lie in the frame
  const int64_t near = p.sign > 0 ? -p.column : p.column - (a.store_w - 1),
                from = std::clamp<int64_t>(near, 0, a.width), to = std::clamp<int64_t>(near + a.store_w, from, a.width);
  if (p.sign > 0 && from == 0 && to == a.width) return row + p.column;
  std::fill_n(out, from, 0.f);
  if (p.sign > 0)
    std::copy(row + p.column + from, row + p.column + to, out + from);
  else
    std::reverse_copy(row + p.column - to + 1, row + p.column - from + 1, out + from);
  std::fill(out + to, out + a.width, 0.f);
  return out;
}

void finish(const StoreArgs& a, const float* d, const float* x, float eps, float* out) {
  if (x == nullptr) {
    std::copy_n(d, a.width, out);
    return;
  }
  const Vec radius(eps), lo(a.lo), hi(a.hi);
  each_part(a.width, [&](int64_t j, int m) FR_INLINE_LAMBDA {
    const Vec center = read(x + j, m);
    write(out + j, linf_project(center + read(d + j, m), center, radius, lo, hi), m);
  });
}

template <class T>
void plane(const StoreArgs& a, int64_t b, int64_t c, Scratch* s) {
  const int64_t row = row_of(a, b), pixels = a.height * a.width, at = (b * a.channels + c) * pixels;
  const Place p = place_of(a, b);
  if (a.factor > 1)
    for (int64_t j = 0; j < a.width; ++j) s->taps[static_cast<size_t>(j)] = column_tap(a, p, j);
  const T* from = static_cast<const T*>(a.store) + (row * a.channels + c) * a.store_h * a.store_w;
  const float eps = a.eps_each == nullptr ? a.eps : a.eps_each[b];
  for (int64_t i = 0; i < a.height; ++i) {
    const Tap tap = row_tap(a, p, i);
    const float* d = s->wide.get();
    if (row < 0 || (tap.first < 0 && tap.second < 0)) {
      std::fill_n(s->wide.get(), a.width, 0.f);
    } else {
      blend(from, tap, a.store_w, s->row());
      d = spread(a, p, *s);
    }
    finish(a, d, a.x == nullptr ? nullptr : a.x + at + i * a.width, eps, a.out + at + i * a.width);
  }
}

}  // namespace

void store_gather_cpu(const StoreArgs& a) {
  const int64_t pixels = a.height * a.width;
  if (a.batch * a.channels * pixels == 0) return;
  parallel_for(a.batch * a.channels, std::max<int64_t>(1, kGrainElements / pixels), [&](int64_t begin, int64_t end) {
    Scratch scratch(a);
    for (int64_t k = begin; k < end; ++k)
      a.type == StoreType::f16 ? plane<uint16_t>(a, k / a.channels, k % a.channels, &scratch)
                               : plane<float>(a, k / a.channels, k % a.channels, &scratch);
  });
}

FR_NS_END
