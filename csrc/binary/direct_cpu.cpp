// Masked convolutions between plain tensors, without a fast layout between: for calls in which the copies into it and
// out of it would take longer than the sums (see args.h). The sums are those of gather_cpu in the same order.
//
// A tile of up to kMaxTile vectors of the output stays in registers while the lists are walked: a stretch of a map, or,
// where maps are small, the same stretch of several images. Borders are masks of loads.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "binary/args.h"
#include "binary/epilogue.h"
#include "binary/room.h"
#include "core/quads.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kMaxTile = 16;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kMaxTile = 4;
#else
constexpr int kMaxTile = 2;
#endif
// Vector additions that are worth waking a thread for.
constexpr int64_t kGrainWork = 16384;

struct Tile {
  const DirectArgs& a;
  const float* x;            // first image, at the first output of the tile
  int64_t x_step;            // floats from one image to the next
  const float *first, *end;  // of what may be read
  int64_t out;               // the same in the output, without the row
  int64_t out_step;
  const uint16_t* masks;  // of tap 0, at the first vector of the tile
  int64_t vectors;        // masks of a tap
  int tail;               // floats of the last vector that are outputs
};

// Sixteen floats of which those without a bit are neither read nor counted.
#if defined(__AVX512F__)
using LoadMask = __mmask16;
#else
using LoadMask = uint16_t;
#endif
FR_HD Vec load_where(const Tile& t, const float* p, LoadMask set) {
#if defined(__AVX512F__)
  (void)t;
  return _mm512_maskz_loadu_ps(set, p);
#else
  if (p >= t.first && t.end - p >= kLanes) return where_set(load(p), set);
  float f[kLanes] = {};
  for (int i = 0; i < kLanes; ++i)
    if (set >> i & 1) f[i] = p[i];
  return load(f);
#endif
}

// f(vector, its place, its column) over R images of C vectors.
template <int R, int C, class P, class F>
FR_HD void over_tile(Vec* acc, P p, int64_t step, const F& f) {
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
    for (int c = 0; c < C; ++c) f(acc[r * C + c], p + c * kLanes, c);
    p += step;
  }
}

// How loads are masked: not at all, each by its own mask, or, K > 0, by lines of K vectors of which all but the first
// and the last of the tile have the same masks.
constexpr int kUnmasked = -1, kEach = 0;

// terms(e) is what entry e does to a sum: f(sum, what was read).
template <int R, int C, int K, class F>
FR_HD void add_entries(const Tile& t, Vec* acc, int64_t from, int64_t to, const F& terms) {
  const int32_t* const offsets = t.a.offsets;
  const uint16_t* const taps = t.a.taps;
  for (int64_t e = from; e < to; ++e) {
    const float* const x = t.x + offsets[e];
    const auto f = terms(e);
    if constexpr (K > 0) {
      const uint16_t* const m = t.masks + taps[e] * t.vectors;
      LoadMask first[K], middle[K], last[K];
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k) {
        first[k] = m[k];
        middle[k] = m[K + k];
        last[k] = m[C - K + k];
      }
      over_tile<R, C>(acc, x, t.x_step, [&](Vec& v, const float* s, int c) FR_INLINE_LAMBDA {
        v = f(v, load_where(t, s, c < K ? first[c % K] : c < C - K ? middle[c % K] : last[c % K]));
      });
    } else if constexpr (K == kEach) {
      const uint16_t* const m = t.masks + taps[e] * t.vectors;
      over_tile<R, C>(acc, x, t.x_step,
                      [&](Vec& v, const float* s, int c) FR_INLINE_LAMBDA { v = f(v, load_where(t, s, m[c])); });
    } else {
      over_tile<R, C>(acc, x, t.x_step, [&](Vec& v, const float* s, int) FR_INLINE_LAMBDA { v = f(v, load(s)); });
    }
  }
}

// One row of one tile.
template <int R, int C, int K>
void tile_row(const Tile& t, int64_t row) {
  constexpr int T = R * C;
  const DirectArgs& a = t.a;
  Vec acc[T];
#pragma GCC unroll 32
  for (int i = 0; i < T; ++i) acc[i] = Vec(0.f);
  // Two loops, so that the one of signs keeps its registers.
  const auto segments = [&](const auto& walk) FR_INLINE_LAMBDA {
    for (int64_t segment = 0; segment < a.segments; ++segment) walk(a.ptr + 2 * (segment * a.rows + row));
  };
  if (const float* const values = a.values; values != nullptr) {
    segments([&](const int32_t* ptr) FR_INLINE_LAMBDA {
      add_entries<R, C, K>(t, acc, ptr[0], ptr[2], [values](int64_t e) FR_INLINE_LAMBDA {
        return [value = Vec(values[e])](Vec v, Vec x) FR_INLINE_LAMBDA { return v + x * value; };
      });
    });
  } else {
    segments([&](const int32_t* ptr) FR_INLINE_LAMBDA {
      add_entries<R, C, K>(t, acc, ptr[0], ptr[1], [](int64_t) FR_INLINE_LAMBDA {
        return [](Vec v, Vec x) FR_INLINE_LAMBDA { return v + x; };
      });
      add_entries<R, C, K>(t, acc, ptr[1], ptr[2], [](int64_t) FR_INLINE_LAMBDA {
        return [](Vec v, Vec x) FR_INLINE_LAMBDA { return v - x; };
      });
    });
  }
  if (a.scale != nullptr || a.shift != nullptr) {
    const Vec scale(a.scale == nullptr ? 1.f : a.scale[row]), shift(a.shift == nullptr ? 0.f : a.shift[row]);
#pragma GCC unroll 32
    for (int i = 0; i < T; ++i) acc[i] = affine(acc[i], scale, shift);
  }
  const int64_t base = t.out + row * a.height * a.width;
  const int tail = t.tail;
  if (a.residual != nullptr)
    over_tile<R, C>(acc, a.residual + base, t.out_step, [tail](Vec& v, const float* s, int c) FR_INLINE_LAMBDA {
      v = v + (c + 1 < C || tail == kLanes ? load(s) : load_n(s, tail));
    });
  if (a.relu) {
#pragma GCC unroll 32
    for (int i = 0; i < T; ++i) acc[i] = relu(acc[i]);
  }
  over_tile<R, C>(acc, a.out + base, t.out_step, [tail](const Vec& v, float* d, int c) FR_INLINE_LAMBDA {
    if (c + 1 < C || tail == kLanes)
      store(d, v);
    else
      store_n(d, v, tail);
  });
}

using RowFn = void (*)(const Tile&, int64_t);

// By the logarithm of the images, the vectors of each, and whether loads are masked.
constexpr int kPowers = kMaxTile == 16 ? 4 : kMaxTile == 4 ? 3 : 2;
// Images often lie a power of two apart, in the same sets of the first cache level, which hold eight to twelve lines.
constexpr int64_t kMaxImages = int64_t{1} << (kPowers - 1);
template <int... I>
constexpr auto row_fns(std::integer_sequence<int, I...>) {
  constexpr auto fn = [](auto i) -> RowFn {
    constexpr int kImages = 1 << i / (2 * kMaxTile), kVectors = i / 2 % kMaxTile + 1;
    if constexpr (kImages * kVectors <= kMaxTile)
      return tile_row < kImages, kVectors, i % 2 == 1 ? kEach : kUnmasked > ;
    else
      return nullptr;
  };
  return std::array<RowFn, sizeof...(I)>{fn(std::integral_constant<int, I>{})...};
}
constexpr auto kRows = row_fns(std::make_integer_sequence<int, kPowers * 2 * kMaxTile>{});

// dst[i] = src[i * stride] for all of `length` floats.
FR_HD void every(float* dst, const float* src, int64_t stride, int64_t length) {
  if (stride == 1) {
    std::memcpy(dst, src, static_cast<size_t>(length) * sizeof(float));
    return;
  }
  int64_t i = 0;
  if (stride == 2) {
    for (; 2 * (i + 8) <= length; i += 8) put_even8(dst + i, src + 2 * i);
    for (; 2 * (i + 4) <= length; i += 4) put_even4(dst + i, src + 2 * i);
  }
  for (; i * stride < length; ++i) dst[i] = src[i * stride];
}

// The phases of one image that are read: [phase][channel][height][width], what lies beyond the image left as it is.
void split_phases(const DirectArgs& a, const float* x, float* dst) {
  const int64_t height = (a.in_height + a.stride_h - 1) / a.stride_h,
                width = (a.in_width + a.stride_w - 1) / a.stride_w;
  for (int64_t py = 0; py < a.stride_h; ++py)
    for (int64_t px = 0; px < a.stride_w; ++px) {
      const int64_t phase = py * a.stride_w + px;
      if ((a.phases >> phase & 1) == 0) continue;
      for (int64_t c = 0; c < a.channels; ++c) {
        const float* const from = x + c * a.in_height * a.in_width + px;
        float* const to = dst + (phase * a.channels + c) * height * width;
        for (int64_t y = 0; y * a.stride_h + py < a.in_height; ++y)
          every(to + y * width, from + (y * a.stride_h + py) * a.in_width, a.stride_w, a.in_width - px);
      }
    }
}

thread_local Room thread_phases;

// Images first .. first + count of a group.
struct Group {
  int64_t first, count;
};

// Groups of `together` images, the rest in powers of two.
Group group_of(const DirectArgs& a, int64_t group, int64_t together) {
  const int64_t full = a.batch / together;
  if (group < full) return {group * together, together};
  int64_t first = full * together;
  for (int64_t count = together / 2;; count /= 2) {
    if (a.batch - first < count) continue;
    if (group-- == full) return {first, count};
    first += count;
  }
}

int64_t group_count(const DirectArgs& a, int64_t together) {
  int64_t groups = a.batch / together;
  for (int64_t rest = a.batch % together; rest > 0; rest &= rest - 1) ++groups;
  return groups;
}

bool all_set(const DirectArgs& a, int64_t vectors, int64_t begin, int64_t end) {
  for (int64_t tap = 0; tap < a.tap_count; ++tap)
    for (int64_t v = begin; v < end; ++v)
      if (a.masks[tap * vectors + v] != 0xffff) return false;
  return true;
}

// Whether the lines of a full tile, of `line` vectors each, have the same masks but for the first and the last.
bool alike([[maybe_unused]] const DirectArgs& a, [[maybe_unused]] int64_t vectors, [[maybe_unused]] int64_t begin,
           [[maybe_unused]] int64_t line) {
#if defined(__AVX512F__)
  for (int64_t tap = 0; tap < a.tap_count; ++tap) {
    const uint16_t* const m = a.masks + tap * vectors + begin;
    for (int64_t v = 2 * line; v < kMaxTile - line; ++v)
      if (m[v] != m[v - line]) return false;
  }
  return true;
#else
  return false;  // masks are no registers here
#endif
}

}  // namespace

void direct_cpu(const DirectArgs& a) {
  const int64_t pixels = a.height * a.width;
  if (a.batch == 0 || a.rows == 0 || pixels == 0) return;
  const int64_t vectors = (pixels + kLanes - 1) / kLanes, cut = (vectors + kMaxTile - 1) / kMaxTile;
  const int64_t per_tile = (vectors + cut - 1) / cut, tiles = (vectors + per_tile - 1) / per_tile;
  int64_t together = 1;
  while (together < kMaxImages && 2 * together * per_tile <= kMaxTile && 2 * together <= a.batch) together *= 2;
  const bool phased = a.stride_h * a.stride_w > 1;
  const int64_t phase_floats =
      ((a.in_height + a.stride_h - 1) / a.stride_h) * ((a.in_width + a.stride_w - 1) / a.stride_w);
  // A line more, so that images do not lie a power of two apart, where they would share few cache sets.
  const int64_t image = phased ? (a.stride_h * a.stride_w * a.channels * phase_floats / kLanes + 2) * kLanes : 0;
  // Each thread has phases of its own to split.
  while (together > 1 && group_count(a, together) * tiles < num_threads()) together /= 2;
  const int64_t groups = group_count(a, together);
  const int64_t parts = std::max<int64_t>(1, std::min(a.rows / 4, (8 + groups * tiles - 1) / (groups * tiles)));
  const int64_t items = groups * tiles * parts;
  const int64_t work = (a.entries + 4 * a.rows) * per_tile * together / parts + 1;
  parallel_for(items, std::max<int64_t>(1, kGrainWork / work), [&](int64_t begin, int64_t end) {
    float* const room = phased ? thread_phases.floats(together * image) : nullptr;
    int64_t split = -1;  // the group whose phases lie there
    for (int64_t item = begin; item < end; ++item) {
      const int64_t part = item % parts, tile = item / parts % tiles, number = item / parts / tiles;
      const Group group = group_of(a, number, together);
      const float* x = a.x + group.first * a.x_block;
      const float *first = a.x, *last = a.x + (a.batch - 1) * a.x_block + a.channels * a.in_height * a.in_width;
      int64_t x_step = a.x_block;
      if (phased) {
        if (split != number)
          for (int64_t n = 0; n < group.count; ++n) split_phases(a, x + n * a.x_block, room + n * image);
        split = number;
        x = first = room;
        last = room + group.count * image;
        x_step = image;
      }
      const int64_t v0 = tile * per_tile, v1 = std::min(vectors, v0 + per_tile);
      const int64_t out_step = a.rows * pixels;
      const Tile t{a,        x + v0 * kLanes,
                   x_step,   first,
                   last,     group.first * out_step + v0 * kLanes,
                   out_step, a.masks + v0,
                   vectors,  static_cast<int>(std::min<int64_t>(kLanes, pixels - (v1 - 1) * kLanes))};
      const int power = __builtin_ctzll(static_cast<unsigned long long>(group.count));
      const bool masked = !all_set(a, vectors, v0, v1);
      RowFn fn = kRows[static_cast<size_t>((power * kMaxTile + v1 - v0 - 1) * 2 + masked)];
      const int64_t line = a.width / kLanes;
      if (masked && power == 0 && v1 - v0 == kMaxTile && a.width % kLanes == 0 && line <= 2 &&
          alike(a, vectors, v0, line))
        fn = line == 1 ? tile_row<1, kMaxTile, 1> : tile_row<1, kMaxTile, 2>;
      const int64_t row1 = row_boundary(a, part + 1, parts);
      for (int64_t row = row_boundary(a, part, parts); row < row1; ++row) fn(t, row);
    }
  });
}

FR_NS_END
