// Max pooling in the fast layout, forward and input gradient (see PoolArgs).
//
// A vector is sixteen floats of a row of what is written: sixteen images of a pixel, or 16 / lanes pixels. Where
// windows reach over the sides of the map and a vector holds several pixels, rows are read from copies with borders
// that never win, of which as many are kept as a window has rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "binary/pool.h"
#include "binary/room.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainFloats = 16384;

// How the pixels of a vector lie in what is read: side by side, every second float, or in pieces of `lanes` floats.
enum class Step { one, two, pieces };

#if defined(__AVX512F__)
FR_HD Vec load_even(const float* p) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_ps(load(p).v, even, load(p + kLanes).v);
}
FR_HD void store_bytes(uint8_t* p, Vec v, int64_t n) {
  const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(v.v));
  _mm_mask_storeu_epi8(p, static_cast<__mmask16>((1u << n) - 1), bytes);
}
#else
constexpr int kEach = kLanes / kRegs;
typedef uint8_t NativeB __attribute__((vector_size(kEach)));
FR_HD Vec load_even(const float* p) {
  Vec v;
  for (int i = 0; i < kRegs; ++i) {
    const NativeF a = *reinterpret_cast<const UnalignedF*>(p + 2 * i * kEach);
    const NativeF b = *reinterpret_cast<const UnalignedF*>(p + (2 * i + 1) * kEach);
#if defined(__AVX__)
    v.r[i] = FR_SHUFFLE(NativeI, a, b, 0, 2, 4, 6, 8, 10, 12, 14);
#else
    v.r[i] = FR_SHUFFLE(NativeI, a, b, 0, 2, 4, 6);
#endif
  }
  return v;
}
FR_HD void store_bytes(uint8_t* p, Vec v, int64_t n) {
  uint8_t bytes[kLanes];
  for (int i = 0; i < kRegs; ++i) {
    const NativeB b = __builtin_convertvector(__builtin_convertvector(v.r[i], NativeI), NativeB);
    std::memcpy(bytes + i * kEach, &b, sizeof b);
  }
  if (n == kLanes)
    std::memcpy(p, bytes, kLanes);
  else
    std::memcpy(p, bytes, static_cast<size_t>(n));
}
#endif

// 16 / lanes pieces of `lanes` floats, `step` apart.
FR_HD Vec load_pieces(const float* p, int64_t lanes, int64_t step) {
#if defined(__AVX512F__)
  if (lanes == 8) return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p)), _mm256_loadu_ps(p + step), 1);
  if (lanes == 4) {
    const __m512 a = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(p)), _mm_loadu_ps(p + step), 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(a, _mm_loadu_ps(p + 2 * step), 2), _mm_loadu_ps(p + 3 * step), 3);
  }
#elif defined(__AVX__)
  Vec v;
  if (lanes == 8) {
    for (int i = 0; i < 2; ++i) v.r[i] = (NativeF)_mm256_loadu_ps(p + i * step);
    return v;
  }
  if (lanes == 4) {
    for (int i = 0; i < 2; ++i)
      v.r[i] = (NativeF)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 2 * i * step)),
                                             _mm_loadu_ps(p + (2 * i + 1) * step), 1);
    return v;
  }
#else
  Vec v;
  if (lanes == 8 || lanes == 4) {
    for (int i = 0; i < 4; ++i)
      v.r[i] = *reinterpret_cast<const UnalignedF*>(p + (lanes == 4 ? i * step : i / 2 * step + i % 2 * 4));
    return v;
  }
#endif
  float f[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) f[i] = p[i / lanes * step + i % lanes];
  return load(f);
}

template <Step S>
FR_HD Vec load_pixels(const PoolArgs& a, const float* p) {
  if constexpr (S == Step::one) return load(p);
  if constexpr (S == Step::two) return load_even(p);
  return load_pieces(p, a.from.lanes, a.stride_w * a.from.lanes);
}

// The rows of a window that lie inside, each from where the window of the first pixel begins.
struct Rows {
  std::vector<const float*> at;
  int64_t first = 0, count = 0;  // in the kernel
  // Where sides are clipped: the first column of the kernel that lies inside, for each float of a row.
  const float* columns = nullptr;
};

// K: columns of the kernel, 0: k0 .. k1.
template <Step S, bool kWhere, int K>
FR_HD void window(const PoolArgs& a, const Rows& rows, int64_t i, int64_t k0, int64_t k1, float* out, uint8_t* where,
                  int64_t n) {
  const int64_t from = K > 0 ? 0 : k0, to = K > 0 ? K : k1, step = a.dilation_w * a.from.lanes;
  // Nothing is larger where all is -inf: then it is the first.
  Vec best(-INFINITY), taken(static_cast<float>(rows.first * a.kernel_w + std::min(from, a.kernel_w - 1)));
  if (kWhere && rows.columns != nullptr)
    taken = Vec(static_cast<float>(rows.first * a.kernel_w)) + load(rows.columns + i);
  for (int64_t y = 0; y < rows.count; ++y) {
    const float* const p = rows.at[static_cast<size_t>(y)] + i * a.stride_w;
    const float number = static_cast<float>((rows.first + y) * a.kernel_w);
    for (int64_t k = from; k < to; ++k) {
      const Vec v = load_pixels<S>(a, p + k * step);
      if (kWhere) {
        take_larger(v, Vec(number + static_cast<float>(k)), best, taken);
      } else {
        Vec unused(0.f);
        take_larger(v, unused, best, unused);
      }
    }
  }
  if (n == kLanes)
    store(out, best);
  else
    store_n(out, best, static_cast<int>(n));
  if (kWhere) store_bytes(where, taken, n);
}

template <Step S, bool kWhere, int K>
void pool_row(const PoolArgs& a, const Rows& rows, const int64_t* inside, float* out, uint8_t* where) {
  const int64_t floats = a.out_w * a.to.lanes;
  for (int64_t i = 0; i < floats; i += kLanes) {
    const int64_t n = std::min<int64_t>(kLanes, floats - i);
    uint8_t* const at = kWhere ? where + i : nullptr;
    if (inside != nullptr && inside[i / kLanes * 2 + 1] - inside[i / kLanes * 2] != a.kernel_w)
      window<S, kWhere, 0>(a, rows, i, inside[i / kLanes * 2], inside[i / kLanes * 2 + 1], out + i, at, n);
    else
      window<S, kWhere, K>(a, rows, i, 0, a.kernel_w, out + i, at, n);
  }
}

using RowFn = void (*)(const PoolArgs&, const Rows&, const int64_t*, float*, uint8_t*);

template <Step S>
RowFn row_fn(bool where, int64_t kernel) {
  if (kernel == 2) return where ? pool_row<S, true, 2> : pool_row<S, false, 2>;
  if (kernel == 3) return where ? pool_row<S, true, 3> : pool_row<S, false, 3>;
  return where ? pool_row<S, true, 0> : pool_row<S, false, 0>;
}

thread_local Room thread_rows;

int64_t planes_of(const PoolArgs& a) { return (a.batch + a.to.lanes - 1) / a.to.lanes * a.channels; }
int64_t grain_of(const PoolArgs& a) {
  const int64_t each = a.out_h * a.out_w * a.to.lanes * a.kernel_h * a.kernel_w;
  return std::max<int64_t>(1, kGrainFloats / std::max<int64_t>(1, each));
}
int64_t plane_at(const Layout& l, int64_t item, int64_t channels) {
  return item / channels * l.block + item % channels * l.channel;
}

}  // namespace

void max_pool_cpu(const PoolArgs& a) {
  const int64_t lanes = a.from.lanes, vectors = (a.out_w * lanes + kLanes - 1) / kLanes;
  const bool whole = lanes == kLanes;
  const bool clipped = a.pad_w > 0 || (a.out_w - 1) * a.stride_w + (a.kernel_w - 1) * a.dilation_w >= a.in_w;
  // Whole vectors of pixels of large steps would be read past the slack behind the last plane.
  const bool copies = !whole && (clipped || a.stride_w > 2);
  const Step step = whole || a.stride_w == 1 ? Step::one : lanes == 1 && a.stride_w == 2 ? Step::two : Step::pieces;
  const bool where = a.where != nullptr;
  const RowFn fn = step == Step::one   ? row_fn<Step::one>(where, a.kernel_w)
                   : step == Step::two ? row_fn<Step::two>(where, a.kernel_w)
                                       : row_fn<Step::pieces>(where, a.kernel_w);
  // With an image per lane, which columns of the kernel each window reads; else the first of them.
  std::vector<int64_t> inside(static_cast<size_t>(clipped && whole ? 2 * a.out_w : 0));
  std::vector<float> columns(static_cast<size_t>(where && clipped && !whole ? vectors * kLanes : 0));
  for (int64_t x = 0; clipped && x < a.out_w; ++x) {
    const int64_t begin = x * a.stride_w - a.pad_w;
    if (whole) {
      inside[static_cast<size_t>(2 * x)] = first_inside(begin, a.dilation_w);
      inside[static_cast<size_t>(2 * x + 1)] = end_inside(begin, a.dilation_w, a.kernel_w, a.in_w);
    } else if (where) {
      std::fill_n(columns.begin() + x * lanes, lanes, static_cast<float>(first_taken(begin, a.dilation_w, a.kernel_w)));
    }
  }
  const int64_t kept = (a.kernel_h - 1) * a.dilation_h + 1;
  const int64_t reach = (vectors * kLanes / lanes - 1) * a.stride_w + (a.kernel_w - 1) * a.dilation_w + 1;
  const int64_t length = std::max(reach, a.pad_w + a.in_w) * lanes + 2 * kLanes;
  parallel_for(planes_of(a), grain_of(a), [&](int64_t begin, int64_t end) {
    float* const ring = copies ? thread_rows.floats(kept * length) : nullptr;
    if (copies) std::fill_n(ring, kept * length, -INFINITY);
    Rows rows;
    if (!columns.empty()) rows.columns = columns.data();
    rows.at = std::vector<const float*>(static_cast<size_t>(a.kernel_h));
    for (int64_t item = begin; item < end; ++item) {
      const float* const x = a.x + plane_at(a.from, item, a.channels) + a.from.origin;
      const int64_t to = plane_at(a.to, item, a.channels);
      int64_t copied = 0;
      for (int64_t y = 0; y < a.out_h; ++y) {
        const int64_t top = y * a.stride_h - a.pad_h;
        rows.first = first_taken(top, a.dilation_h, a.kernel_h);
        rows.count =
            std::max<int64_t>(0, end_inside(top, a.dilation_h, a.kernel_h, a.in_h) - first_inside(top, a.dilation_h));
        for (int64_t k = 0; k < rows.count; ++k) {
          const int64_t in = top + (rows.first + k) * a.dilation_h;
          if (!copies) {
            rows.at[static_cast<size_t>(k)] = x + in * a.from.row - a.pad_w * lanes;
            continue;
          }
          for (copied = std::max(copied, top); copied <= in; ++copied)
            std::memcpy(ring + copied % kept * length + a.pad_w * lanes, x + copied * a.from.row,
                        static_cast<size_t>(a.in_w * lanes) * sizeof(float));
          rows.at[static_cast<size_t>(k)] = ring + in % kept * length;
        }
        const int64_t at = to + a.to.origin + y * a.to.row;
        fn(a, rows, inside.empty() ? nullptr : inside.data(), a.out + at, where ? a.where + at : nullptr);
      }
      if (a.plane > 0) clear_borders(a.out + to, a.to, a.out_h, a.out_w, a.plane);
    }
  });
}

namespace {

// A window of a row that has pixels inside: where its result lies, and where it begins.
struct Column {
  int64_t out, in;
};

// Each result to the pixel it came from, in order; sums in memory are as fast as picking the winners of each pixel.
template <int L>
void scatter_row(const std::vector<Column>& columns, const int64_t* offsets, const float* grad, const uint8_t* where,
                 float* dx) {
  for (const Column& c : columns)
    for (int i = 0; i < L; ++i) {
      float& sum = dx[c.in + i + offsets[where[c.out + i]]];
      sum = sum + grad[c.out + i];
    }
}

bool has_pixels(int64_t begin, int64_t dilation, int64_t kernel, int64_t size) {
  return first_inside(begin, dilation) < end_inside(begin, dilation, kernel, size);
}

}  // namespace

void max_pool_grad_cpu(const PoolArgs& a) {
  const int64_t lanes = a.from.lanes;
  int64_t offsets[256] = {};
  for (int64_t k = 0; k < a.kernel_h * a.kernel_w; ++k)
    offsets[k] = k / a.kernel_w * a.dilation_h * a.from.row + k % a.kernel_w * a.dilation_w * lanes;
  std::vector<Column> columns;
  for (int64_t x = 0; x < a.out_w; ++x) {
    const int64_t begin = x * a.stride_w - a.pad_w;
    if (has_pixels(begin, a.dilation_w, a.kernel_w, a.in_w)) columns.push_back({x * lanes, begin * lanes});
  }
  const auto fn = lanes == 1   ? scatter_row<1>
                  : lanes == 2 ? scatter_row<2>
                  : lanes == 4 ? scatter_row<4>
                  : lanes == 8 ? scatter_row<8>
                               : scatter_row<16>;
  parallel_for(planes_of(a), grain_of(a), [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t from = plane_at(a.to, item, a.channels) + a.to.origin;
      float* const plane = a.out + plane_at(a.from, item, a.channels);
      float* const dx = plane + a.from.origin;
      if (a.plane > 0)
        std::memset(plane, 0, static_cast<size_t>(a.plane) * sizeof(float));
      else
        for (int64_t y = 0; y < a.in_h; ++y)
          std::memset(dx + y * a.from.row, 0, static_cast<size_t>(a.in_w * lanes) * sizeof(float));
      for (int64_t y = 0; y < a.out_h; ++y) {
        const int64_t top = y * a.stride_h - a.pad_h, at = from + y * a.to.row;
        if (has_pixels(top, a.dilation_h, a.kernel_h, a.in_h))
          fn(columns, offsets, a.x + at, a.where + at, dx + top * a.from.row);
      }
    }
  });
}

FR_NS_END
