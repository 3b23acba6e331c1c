// Backward step on CUDA: one block a row, neighbours on neighbouring addresses.
#include "bounds/kernels.h"
#include "bounds/rows_cuda.h"

FR_NS_BEGIN
namespace {

constexpr int kThreads = 128;

template <bool kWide>
__global__ void __launch_bounds__(kThreads, 4) back_kernel(BackArgs g) {
  const Rows& r = g.rows;
  const int64_t maps = map_size(r), second = g.examples * maps;
  const bool two = r.sides == 2;
  for (int64_t row = blockIdx.x; row < r.count; row += gridDim.x) {
    const PlacedRow placed(r, row);
    const int64_t ex = example_of(r, row) * maps;
    float* const out = g.out + row * r.length;
    float* const out_up = g.sides_out == 2 ? out + r.count * r.length : nullptr;
    double low = 0., up = 0.;
    // Sums in the order of a plain loop over the threads (see each_in_order).
    each_in_order<kWide, 4, 2, kThreads, kThreads>(
        0, r.length,
        [&](auto i, auto& t) {
          const auto m = placed.on_map(i);
          auto a = placed.coefficients(0, i), c = a;
          if (two && r.side_stride != 0) c = placed.coefficients(r.side_stride, i);
          const auto il = from_map(g.intercepts + ex, m), iu = from_map(g.intercepts + second + ex, m);
          const auto sl = from_map(g.slopes + ex, m);
          const auto su = g.slope_sides == 2 ? from_map(g.slopes + second + ex, m) : sl;
          for (int k = 0; k < i.count; ++k) {  // where there is no map its numbers are zero: so is what is written
            const bool there = m.there(k);
            const float one = a.v[k], other = c.v[k];
            t.v[0][k] = there ? one * serving(0, one, il.v[k], iu.v[k]) : 0.f;
            t.v[1][k] = there && two ? other * serving(1, other, il.v[k], iu.v[k]) : 0.f;
            a.v[k] = there ? one * serving(0, one, sl.v[k], su.v[k]) : 0.f;
            c.v[k] = there ? other * serving(1, other, sl.v[k], su.v[k]) : 0.f;
          }
          store_at(out, i, a);
          if (two && out_up != nullptr) store_at(out_up, i, c);
        },
        [&](const float* t) {
          low += static_cast<double>(t[0]);
          up += static_cast<double>(t[1]);
        });
    low = block_sum(low);
    if (two) up = block_sum(up);
    if (threadIdx.x == 0) {
      g.b_out[row] = g.b[row] + static_cast<float>(low);
      if (two) g.b_out[r.count + row] = g.b[r.count + row] + static_cast<float>(up);
    }
  }
}

}  // namespace
FR_NS_END

namespace fastrobust {

void back_cuda(const BackArgs& g, void* stream) {
  const int64_t rows = g.rows.count, most = int64_t{1} << 30;
  if (rows == 0) return;
  const dim3 grid(static_cast<unsigned>(rows < most ? rows : most));
  Addresses lie = addresses_of(g.rows);
  if (by_fours(g.rows) && lie.add(g.slopes).add(g.intercepts).add(g.out).whole(4))
    FR_LAUNCH(back_kernel<true>, grid, dim3(kThreads), 0, stream, g);
  else
    FR_LAUNCH(back_kernel<false>, grid, dim3(kThreads), 0, stream, g);
}

}  // namespace fastrobust
