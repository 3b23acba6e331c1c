// Products with a matrix of signs: the sums that six rows of b can have, 64 with all signs, stand in a table, so that a
// row takes a sixth of the operations of a product. Tables of one chunk of rows of b and one vector of columns fill the
// first cache. Each number has its own sum, in an order that depends on nothing else.
#include <algorithm>
#include <cstring>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/pack.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int kBits = 6, kEntries = 1 << kBits, kGroups = 8, kChunk = kBits * kGroups;
constexpr int64_t kTable = int64_t{kEntries} * kLanes;
constexpr int64_t kBlock = 1024, kTiles = 4;  // rows and vectors of columns of one task: all sums in the second cache
constexpr int64_t kFewZeros = 32;             // one zero in so many numbers is mended by itself
constexpr uint64_t kAll = (uint64_t{1} << kChunk) - 1, kNan = uint64_t{1} << 63;

int64_t chunks_of(const SignProductArgs& g) { return (g.count + kChunk - 1) / kChunk; }

// What the products know of x.
struct Signs {
  std::unique_ptr<uint16_t[]> at;     // [chunks][rows][kGroups]: where a group's sum stands in the tables
  std::unique_ptr<uint64_t[]> zeros;  // [chunks][rows]: which numbers are zero, as bits
  std::unique_ptr<uint64_t[]> none;   // [chunks]: which are zero in all rows
  std::unique_ptr<uint64_t[]> some;   // [chunks]: which are zero in others
  std::unique_ptr<bool[]> dead;       // [rows]: all zero

  explicit Signs(const SignProductArgs& g)
      : at(new uint16_t[static_cast<size_t>(chunks_of(g) * g.rows * kGroups)]),
        zeros(new uint64_t[static_cast<size_t>(chunks_of(g) * g.rows)]),
        none(new uint64_t[static_cast<size_t>(chunks_of(g))]),
        some(new uint64_t[static_cast<size_t>(chunks_of(g))]()),
        dead(new bool[static_cast<size_t>(g.rows)]) {}
};

FR_HD uint64_t wide(Mask m) { return bits(m); }

// x's rows lie in one piece each.
void read_rows(const SignProductArgs& g, int64_t chunk, uint16_t* at, uint64_t* zeros) {
  const Vec zero(0.f);
  const int64_t left = std::min<int64_t>(kChunk, g.count - chunk * kChunk);
  for (int64_t row = 0; row < g.rows; ++row, at += kGroups) {
    const float* x = g.x + row * g.x_row + chunk * kChunk;
    uint64_t up = 0, down = 0, nan = 0;
    for (int v = 0; v * kLanes < left; ++v) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, left - v * kLanes));
      const Vec s = n == kLanes ? load(x + v * kLanes) : load_n(x + v * kLanes, n);
      up |= wide(s > zero) << (v * kLanes);
      down |= wide(s < zero) << (v * kLanes);
      nan |= wide(!(s == s));
    }
    zeros[row] = (~(up | down) & kAll) | (nan != 0 ? kNan : 0);
    for (int i = 0; i < kGroups; ++i)
      at[i] = static_cast<uint16_t>(i * kTable + static_cast<int64_t>((up >> (i * kBits)) % kEntries) * kLanes);
  }
}

// x's columns do: a row a lane.
void read_columns(const SignProductArgs& g, int64_t chunk, uint16_t* at, uint64_t* zeros) {
  const Vec zero(0.f);
  const int64_t left = std::min<int64_t>(kChunk, g.count - chunk * kChunk);
  for (int64_t row = 0; row < g.rows; row += kLanes) {
    const int n = static_cast<int>(std::min<int64_t>(kLanes, g.rows - row));
    const float* x = g.x + chunk * kChunk * g.x_step + row;
    std::fill_n(zeros + row, n, kAll & ~((uint64_t{1} << left) - 1));
    for (int i = 0; i < kGroups; ++i) {
      Vec code(0.f);
      for (int bit = 0; bit < kBits && i * kBits + bit < left; ++bit) {
        const int k = i * kBits + bit;
        const Vec s = n == kLanes ? load(x + k * g.x_step) : load_n(x + k * g.x_step, n);
        const Mask up = s > zero;
        code = code + select(up, Vec(static_cast<float>(1 << bit)), zero);
        for (uint32_t no = ~bits(up | (s < zero)) & ((1u << n) - 1); no != 0; no &= no - 1) {
          const int64_t of = row + __builtin_ctz(no);
          zeros[of] |= uint64_t{1} << k | (x[k * g.x_step + of - row] == 0.f ? 0 : kNan);
        }
      }
      float codes[kLanes];
      store(codes, code);
      for (int lane = 0; lane < n; ++lane)
        at[(row + lane) * kGroups + i] = static_cast<uint16_t>(i * kTable + static_cast<int64_t>(codes[lane]) * kLanes);
    }
  }
}

// False where zeros are too many to mend, or a NaN is found.
bool read(const SignProductArgs& g, Signs& s) {
  const int64_t chunks = chunks_of(g);
  parallel_for(chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      uint64_t* zeros = s.zeros.get() + chunk * g.rows;
      (g.x_step == 1 ? read_rows : read_columns)(g, chunk, s.at.get() + chunk * g.rows * kGroups, zeros);
      uint64_t none = kAll, any = 0;
      for (int64_t row = 0; row < g.rows; ++row) none &= zeros[row], any |= zeros[row];
      s.none[static_cast<size_t>(chunk)] = none | (any & kNan);
    }
  });
  int64_t used = 0, single = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const uint64_t none = s.none[static_cast<size_t>(chunk)];
    if (none & kNan) return false;
    used += kChunk - __builtin_popcountll(none);
  }
  for (int64_t row = 0; row < g.rows; ++row) {
    int64_t found = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      uint64_t& zeros = s.zeros[static_cast<size_t>(chunk * g.rows + row)];
      zeros &= ~s.none[static_cast<size_t>(chunk)];
      found += __builtin_popcountll(zeros);
    }
    const bool dead = s.dead[static_cast<size_t>(row)] = found == used;
    single += dead ? 0 : found;
    for (int64_t chunk = 0; chunk < chunks && found != 0; ++chunk) {
      uint64_t& zeros = s.zeros[static_cast<size_t>(chunk * g.rows + row)];
      if (dead) zeros = 0;
      s.some[static_cast<size_t>(chunk)] |= zeros;
    }
  }
  return single * kFewZeros <= g.rows * g.count;
}

// Columns [at, at + width) of b, scaled; nothing where x is zero in all rows.
void pack(const SignProductArgs& g, const Signs& s, int64_t at, int64_t width, float* to) {
  pack_panel<kLanes>(g.b + at * g.b_column, g.b_step, g.b_column, g.count, width, to);
  for (int64_t k = 0; k < g.count; ++k, to += kLanes) {
    if (s.none[static_cast<size_t>(k / kChunk)] >> (k % kChunk) & 1)
      store(to, Vec(0.f));
    else if (g.b_scale != nullptr)
      store(to, load(to) * Vec(g.b_scale[k]));
  }
}

// All sums of the rows of a chunk, up to six at a time.
void fill(const float* b, int64_t left, float* table) {
  for (int64_t i = 0; i < kGroups; ++i, table += kTable, b += kBits * kLanes, left -= kBits) {
    const int64_t rows = std::clamp<int64_t>(left, 0, kBits);
    Vec least(0.f);
    for (int64_t k = 0; k < rows; ++k) least = least - load(b + k * kLanes);
    store(table, least);
    for (int64_t k = 0; k < rows; ++k) {
      const Vec twice = load(b + k * kLanes) * Vec(2.f);
      const int64_t half = (int64_t{1} << k) * kLanes;
      for (int64_t at = 0; at < half; at += kLanes) store(table + half + at, load(table + at) + twice);
    }
  }
}

// The sums of rows [begin, end) over a chunk.
void add(const Signs& s, const SignProductArgs& g, int64_t chunk, int64_t begin, int64_t end, const float* b,
         const float* table, float* sums) {
  const uint16_t* at = s.at.get() + (chunk * g.rows + begin) * kGroups;
  for (int64_t row = begin; row < end; ++row, at += kGroups, sums += kLanes) {
    Vec even = load(sums), odd(0.f);
#pragma GCC unroll 2
    for (int i = 0; i < kGroups; i += 4) {
      uint64_t four;  // one load: loads are what this loop is short of
      std::memcpy(&four, at + i, sizeof four);
      asm("" : "+r"(four));
      even = even + load(table + (four & 0xffff)), odd = odd + load(table + (four >> 16 & 0xffff));
      even = even + load(table + (four >> 32 & 0xffff)), odd = odd + load(table + (four >> 48));
    }
    store(sums, even + odd);
  }
  if (s.some[static_cast<size_t>(chunk)] == 0) return;
  sums -= (end - begin) * kLanes;
  const uint64_t* zeros = s.zeros.get() + chunk * g.rows + begin;
  for (int64_t row = begin; row < end; ++row, ++zeros, sums += kLanes)
    for (uint64_t left = *zeros; left != 0; left &= left - 1)  // a zero counted as negative
      store(sums, load(sums) + load(b + __builtin_ctzll(left) * kLanes));
}

// What the rows [begin, end) have in `width` columns from `at` on; sums [kTiles][kBlock][kLanes].
void write(const SignProductArgs& g, const Signs& s, int64_t begin, int64_t end, int64_t at, int64_t width,
           float* sums) {
  const bool lines = g.out_column == 1;
  for (int64_t row = begin; row < end; ++row, sums += kLanes)
    for (int64_t c = 0; c < width; c += kLanes) {
      const int n = static_cast<int>(std::min<int64_t>(kLanes, width - c));
      float* sum = sums + c * kBlock;
      Vec v = s.dead[static_cast<size_t>(row)] ? Vec(0.f) : load(sum) * Vec(g.scale[row]);
      if (g.base != nullptr) {
        const float* base = g.base + g.base_row[row] * g.columns + at + c;
        v = fmadd(Vec(g.base_scale[row]), n == kLanes ? load(base) : load_n(base, n), v);
      }
      float* out = lines ? g.out + row * g.out_row + at + c : sum;
      n == kLanes || !lines ? store(out, v) : store_n(out, v, n);
      if (lines) __builtin_prefetch(out + std::min<int64_t>(16, end - 1 - row) * g.out_row, 1);
    }
  if (lines) return;
  sums -= (end - begin) * kLanes;
  const int64_t rows = end - begin, quads = g.out_row == 1 ? rows / 4 * 4 : 0, full = width / 4 * 4;
  float* out = g.out + begin * g.out_row + at * g.out_column;
  const auto sum = [&](int64_t row, int64_t c) {
    return sums + c / kLanes * kBlock * kLanes + row * kLanes + c % kLanes;
  };
  for (int64_t c = 0; c < full; c += 4)
    for (int64_t row = 0; row < quads; row += 4) {
      Quad q[4];
      for (int i = 0; i < 4; ++i) q[i] = load_quad(sum(row + i, c));
      transpose(q);
      for (int i = 0; i < 4; ++i) store_quad(out + (c + i) * g.out_column + row, q[i]);
    }
  for (int64_t c = 0; c < width; ++c)
    for (int64_t row = c < full ? quads : 0; row < rows; ++row) out[c * g.out_column + row * g.out_row] = *sum(row, c);
}

}  // namespace

bool sign_product_cpu(const SignProductArgs& g) {
  Signs signs(g);
  if (!read(g, signs)) return false;
  const int64_t chunks = chunks_of(g), length = chunks * kChunk * kLanes, columns = kTiles * kLanes;
  const int64_t blocks = (g.rows + kBlock - 1) / kBlock;
  parallel_for((g.columns + columns - 1) / columns * blocks, 1, [&](int64_t first, int64_t last) {
    const Floats panels(kTiles * length), table(kGroups * kTable), sums(kTiles * kBlock * kLanes);
    for (int64_t task = first, packed = -1; task < last; ++task) {
      const int64_t at = task / blocks * columns, width = std::min(columns, g.columns - at);
      const int64_t begin = task % blocks * kBlock, end = std::min(g.rows, begin + kBlock);
      for (int64_t c = 0; c < width; c += kLanes) {
        float *panel = panels.get() + c / kLanes * length, *sum = sums.get() + c * kBlock;
        if (packed != at) pack(g, signs, at + c, std::min<int64_t>(kLanes, width - c), panel);
        std::fill_n(sum, (end - begin) * kLanes, 0.f);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
          const float* b = panel + chunk * kChunk * kLanes;
          fill(b, g.count - chunk * kChunk, table.get());
          add(signs, g, chunk, begin, end, b, table.get(), sum);
        }
      }
      packed = at;
      write(g, signs, begin, end, at, width, sums.get());
    }
  });
  return true;
}

FR_NS_END
