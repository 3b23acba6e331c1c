// Which inputs the lines around a max pooling are made from.
#include <algorithm>

#include "bounds/pool.h"
#include "core/macros.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// The taps [first, end) of a window that lie inside [0, size).
struct Taps {
  int64_t at, first, end;
  Taps(int64_t out, int64_t stride, int64_t pad, int64_t dilation, int64_t kernel, int64_t size)
      : at(out * stride - pad),
        first(at >= 0 ? 0 : (-at + dilation - 1) / dilation),
        end(std::min(kernel, at >= size ? 0 : (size - at + dilation - 1) / dilation)) {}
};

template <class T>
struct Picked {
  int64_t source = -1, rival = -1;
  T lower{}, upper{}, other{};

  // The largest upper end of the others; NaN stays.
  void rest(int64_t at, T up) {
    if (rival < 0 || up > other || (up != up && other == other)) rival = at, other = up;
  }
  void add(int64_t at, T low, T up) {
    if (source < 0 || low > lower || (low == lower && up > upper)) {
      if (source >= 0) rest(source, upper);
      source = at, lower = low, upper = up;
    } else {
      rest(at, up);
    }
  }
};

template <class T>
void picks(const PoolPicksArgs<T>& g) {
  const int64_t rows = g.planes * g.out_h, work = std::max<int64_t>(1, g.out_w * g.kernel_h * g.kernel_w);
  parallel_for(rows, std::max<int64_t>(1, 8192 / work), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t plane = row / g.out_h * g.height * g.width;
      const Taps y(row % g.out_h, g.stride_y, g.pad_y, g.dilation_y, g.kernel_h, g.height);
      for (int64_t column = 0; column < g.out_w; ++column) {
        const Taps x(column, g.stride_x, g.pad_x, g.dilation_x, g.kernel_w, g.width);
        Picked<T> found;
        for (int64_t i = y.first; i < y.end; ++i)
          for (int64_t j = x.first; j < x.end; ++j) {
            const int64_t at = (y.at + i * g.dilation_y) * g.width + x.at + j * g.dilation_x;
            found.add(at, g.lower[plane + at], g.upper[plane + at]);
          }
        g.source[row * g.out_w + column] = found.source;
        g.rival[row * g.out_w + column] = found.rival;
      }
    }
  });
}

}  // namespace

extern const PoolTable pool_table = {picks<float>, picks<double>};

FR_NS_END
