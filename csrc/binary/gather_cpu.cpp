// Sums of shifted contiguous runs: every masked convolution and its input gradient (see args.h).
//
// A tile of up to kMaxTile vectors of the output stays in registers while the lists are walked, so an entry costs one
// index load and one memory operand per vector. The walk is bound by those loads; segments of the input channels keep
// the rows that a tile reads in the first cache level when the lists are long.
#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "binary/epilogue.h"
#include "binary/layout.h"
#include "binary/room.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kMaxTile = 28;  // vectors of sixteen: 28 of 32 registers
constexpr int kSegmentTile = 16;
#elif defined(__AVX__) || defined(__aarch64__)
constexpr int kMaxTile = 6;
constexpr int kSegmentTile = 6;
#else
constexpr int kMaxTile = 3;
constexpr int kSegmentTile = 3;
#endif
// Vector additions that are worth waking a thread for.
constexpr int64_t kGrainWork = 16384;

struct Tile {
  const GatherArgs& a;
  const float* x;  // block and tile start
  int64_t out;     // the same in the output, without the row
  int64_t step;    // floats from one line of the tile to the next
  int64_t x_step;  // the same in what is read
  int64_t sides;   // of the bits of a ReLU, in groups of sixteen floats, without the row
  float* sums;     // of the segments so far, tile by tile of a row
  float* room;     // two tiles
};

FR_HD float channel_value(const float* p, int64_t channel, float missing) {
  return p == nullptr ? missing : p[channel];
}

// f(vector, its place) over R lines of C vectors. One pointer that moves from line to line: with an address per vector
// the compiler runs out of registers.
template <int R, int C, class P, class F>
FR_HD void over_tile(Vec* acc, P p, int64_t step, int64_t each, const F& f) {
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 32
    for (int c = 0; c < C; ++c) f(acc[r * C + c], p + c * each);
    p += step;
  }
}

// The activations on a tile written to memory: calls, so that their many branches are compiled once and not for every
// shape of a tile. ReLU is done in the registers.
__attribute__((noinline)) void activate(const Act& act, float* v, float* slopes, int vectors) {
  if (slopes == nullptr)
    with_act<Vec>(act, [&](const auto& f) FR_INLINE_LAMBDA {
      for (int i = 0; i < vectors; ++i) store(v + i * kLanes, f(load(v + i * kLanes)));
    });
  else
    with_act_and_slope<Vec>(act, [&](const auto& f) FR_INLINE_LAMBDA {
      for (int i = 0; i < vectors; ++i) {
        Vec slope;
        store(v + i * kLanes, f(load(v + i * kLanes), slope));
        store(slopes + i * kLanes, slope);
      }
    });
}

// A tile is R lines of C vectors: a stretch of the run (R = 1), or a patch, which may read every S-th vector of every
// S-th line.

// What follows the sums of a row, and their write.
template <int R, int C>
FR_HD void finish(const Tile& t, int64_t row, Vec* acc) {
  constexpr int T = R * C;
  const GatherArgs& a = t.a;
  const int64_t step = t.step;
  const Epilogue& e = a.epilogue;
  const int64_t channel = row % e.channels, base = t.out + row * a.out_plane;
  if (e.scale != nullptr || e.shift != nullptr) {
    const Vec scale(channel_value(e.scale, channel, 1.f)), shift(channel_value(e.shift, channel, 0.f));
#pragma GCC unroll 32
    for (int i = 0; i < T; ++i) acc[i] = affine(acc[i], scale, shift);
  }
  if (e.residual != nullptr)
    over_tile<R, C>(acc, e.residual + base, step, kLanes,
                    [](Vec& v, const float* s) FR_INLINE_LAMBDA { v = v + load(s); });
  const auto put = [](const Vec& v, float* d) FR_INLINE_LAMBDA { store(d, v); };
  const int64_t sides = t.sides + row * (a.out_plane / kLanes);
  if (e.act.kind == ActKind::relu && e.slopes == nullptr) {
    if (e.passed != nullptr)
      over_tile<R, C>(acc, e.passed + sides, step / kLanes, 1, [](const Vec& v, uint16_t* s) FR_INLINE_LAMBDA {
        *s = static_cast<uint16_t>(bits(v > Vec(0.f)));
      });
#pragma GCC unroll 32
    for (int i = 0; i < T; ++i) acc[i] = relu(acc[i]);
  } else if (e.act.kind != ActKind::none) {
    if (e.passed != nullptr)
      over_tile<R, C>(acc, e.passed + sides, step / kLanes, 1, [&](const Vec& v, uint16_t* s) FR_INLINE_LAMBDA {
        *s = static_cast<uint16_t>(bits(is_open(e.act, v)));
      });
#pragma GCC unroll 32
    for (int i = 0; i < T; ++i) store(t.room + i * kLanes, acc[i]);
    float* const slopes = e.slopes == nullptr ? nullptr : t.room + T * kLanes;
    activate(e.act, t.room, slopes, T);
    if (slopes != nullptr) {
#pragma GCC unroll 32
      for (int i = 0; i < T; ++i) acc[i] = load(slopes + i * kLanes);
      over_tile<R, C>(acc, e.slopes + base, step, kLanes, put);
    }
#pragma GCC unroll 32
    for (int i = 0; i < T; ++i) acc[i] = load(t.room + i * kLanes);
  }
  if (e.gate != nullptr) {
    if (e.gate_act.kind == ActKind::relu)
      over_tile<R, C>(acc, e.gate + base, step, kLanes,
                      [](Vec& v, const float* s) FR_INLINE_LAMBDA { v = through(v, load(s)); });
    else
      over_tile<R, C>(acc, e.gate + base, step, kLanes,
                      [&](Vec& v, const float* s) FR_INLINE_LAMBDA { v = through(e.gate_act, v, load(s)); });
  }
  if (e.open != nullptr) {
    const float slope = slope_of(e.gate_act);
    if (slope == 0.f)
      over_tile<R, C>(acc, e.open + sides, step / kLanes, 1,
                      [](Vec& v, const uint16_t* s) FR_INLINE_LAMBDA { v = through(v, *s); });
    else
      over_tile<R, C>(acc, e.open + sides, step / kLanes, 1,
                      [slope](Vec& v, const uint16_t* s) FR_INLINE_LAMBDA { v = pick(*s, v, v * Vec(slope)); });
  }
  if (e.pre != nullptr) over_tile<R, C>(acc, e.pre + base, step, kLanes, put);
  if (e.post != nullptr) {
    const Vec post(e.post[channel]);
#pragma GCC unroll 32
    for (int i = 0; i < T; ++i) acc[i] = acc[i] * post;
  }
  over_tile<R, C>(acc, a.out + base, step, kLanes, put);
}

// Rows whose lists are walked side by side: a sum is a chain of additions, each of which waits four cycles for the
// last, and a tile of few vectors has few chains of its own.
constexpr int rows_together(int64_t vectors) {
#if defined(__AVX512F__)
  constexpr int64_t kRegisters = 1;  // of a vector
#else
  constexpr int64_t kRegisters = kRegs;
#endif
  const int64_t rows = 8 / (vectors * kRegisters);
  return rows > 4 ? 4 : rows < 1 ? 1 : static_cast<int>(rows);
}

// Entries ptr[2 k + from] to ptr[2 k + to] of the lists of rows k < K, in their order for each row; add(entry) is what
// one does to a vector of the sum.
template <int R, int C, int S, int K, class F>
FR_HD void walk(const Tile& t, Vec* acc, const int32_t* ptr, int from, int to, const F& add) {
  const float* const x = t.x;
  const int32_t* const offsets = t.a.offsets;
  int64_t common = K > 1 ? INT64_MAX : 0;
  if constexpr (K > 1) {
    for (int k = 0; k < K; ++k) common = std::min<int64_t>(common, ptr[2 * k + to] - ptr[2 * k + from]);
    for (int64_t i = 0; i < common; ++i)
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
        const int64_t e = ptr[2 * k + from] + i;
        over_tile<R, C>(acc + k * R * C, x + offsets[e], t.x_step, S * kLanes, add(e));
      }
  }
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k)
    for (int64_t e = ptr[2 * k + from] + common, end = ptr[2 * k + to]; e < end; ++e)
      over_tile<R, C>(acc + k * R * C, x + offsets[e], t.x_step, S * kLanes, add(e));
}

// K rows of one tile and one segment.
template <int R, int C, int S, int K>
void tile_rows(const Tile& t, int64_t row, int64_t segment) {
  constexpr int T = R * C;
  const GatherArgs& a = t.a;
  const int32_t* const ptr = a.ptr + 2 * (segment * a.rows + row);
  const bool last = segment + 1 == a.segments;
  if (segment > 0 && ptr[0] == ptr[2 * K] && !last) return;
  float* const sums = t.sums + row * T * kLanes;
  Vec acc[K * T];
  if (segment > 0) {
#pragma GCC unroll 32
    for (int i = 0; i < K * T; ++i) acc[i] = load(sums + i * kLanes);
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < K * T; ++i) acc[i] = Vec(0.f);
  }
  if (const float* const values = a.values; values != nullptr) {
    walk<R, C, S, K>(t, acc, ptr, 0, 2, [values](int64_t e) FR_INLINE_LAMBDA {
      return [value = Vec(values[e])](Vec& v, const float* s) FR_INLINE_LAMBDA { v = v + load(s) * value; };
    });
  } else {
    walk<R, C, S, K>(t, acc, ptr, 0, 1, [](int64_t) FR_INLINE_LAMBDA {
      return [](Vec& v, const float* s) FR_INLINE_LAMBDA { v = v + load(s); };
    });
    walk<R, C, S, K>(t, acc, ptr, 1, 2, [](int64_t) FR_INLINE_LAMBDA {
      return [](Vec& v, const float* s) FR_INLINE_LAMBDA { v = v - load(s); };
    });
  }
  if (!last) {
#pragma GCC unroll 32
    for (int i = 0; i < K * T; ++i) store(sums + i * kLanes, acc[i]);
    return;
  }
#pragma GCC unroll 4
  for (int k = 0; k < K; ++k) finish<R, C>(t, row + k, acc + k * T);
}

// `count` rows, at most rows_together of the tile.
template <int R, int C, int S = 1>
void tile_row(const Tile& t, int64_t row, int64_t count, int64_t segment) {
  constexpr int kTogether = rows_together(R * C);
  if constexpr (kTogether > 1)
    if (count == kTogether) return tile_rows<R, C, S, kTogether>(t, row, segment);
  for (int64_t end = row + count; row < end; ++row) tile_rows<R, C, S, 1>(t, row, segment);
}

using RowFn = void (*)(const Tile&, int64_t, int64_t, int64_t);

template <int T>
RowFn run_fn(int64_t tile) {
  if constexpr (T == 1)
    return tile_row<1, 1>;
  else
    return tile == T ? tile_row<1, T> : run_fn<T - 1>(tile);
}

#if defined(__AVX512F__)
constexpr int kMaxLines = 7, kMaxColumns = 8;
constexpr int64_t kFirstLevelLines = 1000;  // of 64 bytes: what a tile may read of a segment (measured)

template <int S, int... I>
constexpr auto patch_fns(std::integer_sequence<int, I...>) {
  constexpr auto fn = [](auto i) -> RowFn {
    constexpr int kLines = i / kMaxColumns + 1, kColumns = i % kMaxColumns + 1;
    if constexpr (kLines * kColumns <= kMaxTile)
      return tile_row<kLines, kColumns, S>;
    else
      return nullptr;
  };
  return std::array<RowFn, sizeof...(I)>{fn(std::integral_constant<int, I>{})...};
}
constexpr auto kPatches = patch_fns<1>(std::make_integer_sequence<int, kMaxLines * kMaxColumns>{});
constexpr auto kPatches2 = patch_fns<2>(std::make_integer_sequence<int, kMaxLines * kMaxColumns>{});
#endif

RowFn patch_fn([[maybe_unused]] int64_t lines, [[maybe_unused]] int64_t columns, [[maybe_unused]] int64_t stride) {
#if defined(__AVX512F__)
  const auto at = static_cast<size_t>((lines - 1) * kMaxColumns + columns - 1);
  return stride == 2 ? kPatches2[at] : kPatches[at];
#else
  return nullptr;
#endif
}

// How many patches of pixels a map is cut into, down and across; 0 where stretches of the run are as good. With sixteen
// images side by side a pixel is a vector, so a tile may be a patch: it reads fewer lines of cache than a stretch of
// the same size, and leaves the border columns out.
struct Patches {
  int64_t down = 0, across = 0;
};

Patches patches_for([[maybe_unused]] const GatherArgs& a) {
  Patches best;
#if defined(__AVX512F__)
  if (a.lanes != kLanes) return best;
  int64_t least = INT64_MAX;
  const int64_t threads = num_threads();
  for (int64_t lines = 1; lines <= kMaxLines; ++lines)
    for (int64_t columns = 1; columns <= kMaxColumns && lines * columns <= kMaxTile; ++columns) {
      const int64_t down = (a.height + lines - 1) / lines, across = (a.width + columns - 1) / columns;
      // What a 3x3 kernel reads, in how many stretches, and what a tile costs by itself.
      const int64_t touched = (lines + 2) * (columns + 2), tiles = down * across * a.blocks;
      const bool fits = a.segments == 1 || touched * a.depth <= kFirstLevelLines;
      // Few tiles that threads cannot share evenly are read by all of them.
      const bool even = tiles % threads == 0 || tiles > 4 * threads;
      const int64_t cost = tiles * (touched + 5 * (lines + 2) + 14) * (fits ? 2 : 3) * (even ? 5 : 6);
      if (cost < least) {
        least = cost;
        best = {down, across};
      }
    }
#endif
  return best;
}

// Sums of the segments so far for all rows of a tile, together so that they stay near.
thread_local Room thread_sums;

// Floats of an output plane, from its first pixel, that are no pixels and must be zero.
struct Gap {
  int64_t at, length;
};

// Those that a tile answers for: what it overwrites, or, where all borders are asked for, whatever lies in its stretch.
void find_gaps(const GatherArgs& a, int64_t begin, int64_t end, bool overwrites, std::vector<Gap>& gaps) {
  const int64_t run = run_length(a), line = a.pitch * a.lanes;
  const auto add = [&](int64_t from, int64_t to) {
    if (from < to) gaps.push_back({from, to - from});
  };
  gaps.clear();
  if (a.borders && begin == 0) add(-a.out_origin, 0);
  if (overwrites || a.borders) {
    for (int64_t y = std::max<int64_t>(0, begin / line - 1); y + 1 < a.height && y * line < end; ++y)
      add(std::max(begin, y * line + a.width * a.lanes), std::min(end, (y + 1) * line));
    if (end >= run) add(run, a.borders ? a.out_plane - a.out_origin : end);
  }
}

FR_HD void clear(float* p, int64_t n) {
  if (n == kLanes)
    store(p, Vec(0.f));
  else if (n < kLanes)
    store_n(p, Vec(0.f), static_cast<int>(n));
  else
    std::memset(p, 0, static_cast<size_t>(n) * sizeof(float));
}

// sum + x[offsets] * values, in the lanes whose value is not zero.
FR_HD Vec add_lanes(Vec sum, const float* x, const int32_t* offsets, const float* values) {
#if defined(__AVX512F__)
  const __m512 value = _mm512_loadu_ps(values);
  const __mmask16 some = _mm512_cmp_ps_mask(value, _mm512_setzero_ps(), _CMP_NEQ_UQ);
  const __m512i at = _mm512_loadu_si512(offsets);
  const __m512 read = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), some, at, x, sizeof(float));
  return _mm512_mask_add_ps(sum.v, some, sum.v, _mm512_mul_ps(read, value));
#else
  alignas(kLanes * sizeof(float)) float sums[kLanes];
  store(sums, sum);
  for (int i = 0; i < kLanes; ++i)
    if (values[i] != 0.f) sums[i] = sums[i] + x[offsets[i]] * values[i];
  return load(sums);
#endif
}

// Rows of one pixel of one image (see `order`): a row is a single number, so sixteen rows make a vector.
void gather_side_by_side(const GatherArgs& a) {
  constexpr int64_t kEntry = 10, kRow = 15;  // in vector additions
  const int64_t slices = (a.rows + kLanes - 1) / kLanes;
  const int64_t work = kEntry * a.entries / kLanes / slices + kRow * kLanes + 1;
  // A layer is one of several that take ten microseconds each: waking a thread for it costs as much as it saves.
  parallel_for(a.blocks * slices, std::max<int64_t>(1, 2 * kGrainWork / work), [&](int64_t first, int64_t last) {
    alignas(kLanes * sizeof(float)) float room[2 * kLanes], sums[kLanes];
    std::vector<Gap> gaps;
    find_gaps(a, 0, kLanes, true, gaps);
    for (int64_t item = first; item < last; ++item) {
      const int64_t block = item / slices, slice = item % slices;
      const float* const x = a.x + block * a.x_block + a.x_origin;
      Vec sum(0.f);
      for (int64_t e = a.ptr[slice]; e < a.ptr[slice + 1]; ++e)
        sum = add_lanes(sum, x, a.offsets + e * kLanes, a.values + e * kLanes);
      store(sums, sum);
      const int64_t out = block * a.out_block + a.out_origin;
      const Tile t{a, x, out, 0, 0, block * a.rows * (a.out_plane / kLanes), nullptr, room};
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t row = a.order[slice * kLanes + i];
        if (row < 0) continue;
        Vec number(sums[i]);
        finish<1, 1>(t, row, &number);
        for (const Gap& gap : gaps)
          for (float* const written : {a.out, a.epilogue.pre, a.epilogue.slopes})
            if (written != nullptr) clear(written + out + row * a.out_plane + gap.at, gap.length);
      }
    }
  });
}

}  // namespace

void gather_cpu(const GatherArgs& a) {
  if (a.blocks == 0 || a.rows == 0 || a.height == 0 || a.width == 0) return;
  if (a.order != nullptr) return gather_side_by_side(a);
  const int64_t vectors = (run_length(a) + kLanes - 1) / kLanes, line = a.pitch * a.lanes;
  const int64_t x_line = a.x_pitch * a.lanes;
  const int64_t most = a.segments > 1 ? kSegmentTile : kMaxTile;
  const Patches patches = patches_for(a);
  const int64_t tiles = patches.down > 0 ? patches.down * patches.across : (vectors + most - 1) / most;
  const int64_t per_tile = (vectors + tiles - 1) / tiles;
  const int64_t parts = std::max<int64_t>(1, std::min(a.rows / 4, (16 + a.blocks * tiles - 1) / (a.blocks * tiles)));
  const int64_t items = a.blocks * tiles * parts;
  const int64_t work = (a.entries + 4 * a.rows * a.segments) * per_tile / parts + 1;
  const int64_t grain = std::max<int64_t>(1, kGrainWork / work);
  parallel_for(items, grain, [&](int64_t first, int64_t last) {
    std::vector<Gap> gaps;
    alignas(kLanes * sizeof(float)) float room[2 * kMaxTile * kLanes];
    float* const sums = a.segments > 1 ? thread_sums.floats(a.rows * kMaxTile * kLanes) : nullptr;
    for (int64_t item = first; item < last; ++item) {
      const int64_t part = item % parts, tile = item / parts % tiles, block = item / parts / tiles;
      int64_t begin, x_begin, together;
      RowFn fn;
      if (patches.down > 0) {
        const int64_t down = tile / patches.across, across = tile % patches.across;
        const int64_t y0 = down * a.height / patches.down, y1 = (down + 1) * a.height / patches.down;
        const int64_t x0 = across * a.width / patches.across, x1 = (across + 1) * a.width / patches.across;
        begin = y0 * line + x0 * a.lanes;
        x_begin = a.x_stride * (y0 * x_line + x0 * a.lanes);
        fn = patch_fn(y1 - y0, x1 - x0, a.x_stride);
        together = rows_together((y1 - y0) * (x1 - x0));
        // The last patch of its lines answers for their borders.
        gaps.clear();
        if (a.borders && x1 == a.width) find_gaps(a, y0 * line, y1 * line, false, gaps);
      } else {
        x_begin = begin = tile * per_tile * kLanes;
        const int64_t end = std::min(vectors * kLanes, begin + per_tile * kLanes);
        fn = run_fn<kMaxTile>((end - begin) / kLanes);
        together = rows_together((end - begin) / kLanes);
        find_gaps(a, begin, end, true, gaps);
      }
      const Tile t{a,
                   a.x + block * a.x_block + a.x_origin + x_begin,
                   block * a.out_block + a.out_origin + begin,
                   line,
                   a.x_stride * x_line,
                   block * a.rows * (a.out_plane / kLanes) + begin / kLanes,
                   sums,
                   room};
      const int64_t row0 = row_boundary(a, part, parts), row1 = row_boundary(a, part + 1, parts);
      for (int64_t segment = 0; segment < a.segments; ++segment)
        for (int64_t row = row0; row < row1; row += together) {
          const int64_t count = std::min<int64_t>(together, row1 - row);
          fn(t, row, count, segment);
          if (segment + 1 < a.segments) continue;
          for (int64_t k = row; k < row + count; ++k) {
            const int64_t plane = block * a.out_block + k * a.out_plane + a.out_origin;
            for (const Gap& gap : gaps)
              for (float* const written : {a.out, a.epilogue.pre, a.epilogue.slopes})
                if (written != nullptr) clear(written + plane + gap.at, gap.length);
          }
        }
    }
  });
}

FR_NS_END
