// From a batch back to the store: the move is taken back, pixels are averaged where the store has fewer, and what the
// image did not show keeps its value.
#include <algorithm>

#include "core/floats.h"
#include "runtime/parallel.h"
#include "store/place.h"
#include "store/rows_cpu.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainElements = 16384;

// The sum of the image rows that one row of the store stands for.
void add_rows(const StoreArgs& a, int64_t at, const Shown& rows, float* out) {
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const float* adv = a.adv + at + i * a.width;
    const float* x = a.x == nullptr ? nullptr : a.x + at + i * a.width;
    const bool first = i == rows.first;
    each_part(a.width, [&](int64_t j, int m) FR_INLINE_LAMBDA {
      const Vec d = x == nullptr ? read(adv + j, m) : read(adv + j, m) - read(x + j, m);
      write(out + j, first ? d : read(out + j, m) + d, m);
    });
  }
}

// Columns of the sum, pixel by pixel.
template <class T>
void put_copies(const StoreArgs& a, const Place& p, const float* sum, float* turned, T* row) {
  const int64_t start = p.sign > 0 ? p.column : p.column - (a.width - 1);  // of the store, where the window starts
  const int64_t from = std::max<int64_t>(start, 0), to = std::min(start + a.width, a.store_w);
  if (p.sign < 0) {
    std::reverse_copy(sum, sum + a.width, turned);
    sum = turned;
  }
  each_part(to - from,
            [&](int64_t v, int m) FR_INLINE_LAMBDA { write(row + from + v, read(sum + (from - start) + v, m), m); });
}
template <class T>
void put_means(const StoreArgs& a, const Place& p, int64_t rows, const float* sum, T* row) {
  for (int64_t v = 0; v < a.store_w; ++v) {
    const Shown columns = shown_columns(a, p, v);
    if (columns.count() == 0) continue;
    float total = 0.f;
    for (int64_t j = columns.first; j < columns.last; ++j) total += sum[j];
    keep(row + v, total / static_cast<float>(rows * columns.count()));
  }
}

template <class T>
void example(const StoreArgs& a, int64_t b, const Floats& sum, const Floats& turned) {
  const int64_t row = row_of(a, b);
  if (row < 0 || !is_last(a, b)) return;
  const Place p = place_of(a, b);
  for (int64_t c = 0; c < a.channels; ++c) {
    const int64_t at = (b * a.channels + c) * a.height * a.width;
    T* to = static_cast<T*>(a.store) + (row * a.channels + c) * a.store_h * a.store_w;
    for (int64_t u = 0; u < a.store_h; ++u) {
      const Shown rows = shown_rows(a, p, u);
      if (rows.count() == 0) continue;
      add_rows(a, at, rows, sum.get());
      if (a.factor == 1)
        put_copies(a, p, sum.get(), turned.get(), to + u * a.store_w);
      else
        put_means(a, p, rows.count(), sum.get(), to + u * a.store_w);
    }
  }
}

}  // namespace

void store_scatter_cpu(const StoreArgs& a) {
  const int64_t elements = a.channels * a.height * a.width;
  if (a.batch * elements == 0) return;
  parallel_for(a.batch, std::max<int64_t>(1, kGrainElements / elements), [&](int64_t begin, int64_t end) {
    const Floats sum(a.width), turned(a.width);
    for (int64_t b = begin; b < end; ++b)
      a.type == StoreType::f16 ? example<uint16_t>(a, b, sum, turned) : example<float>(a, b, sum, turned);
  });
}

FR_NS_END
