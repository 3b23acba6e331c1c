#include <array>
#include <string>

#include "bindings/bindings.h"
#include "bindings/on_device.h"
#include "core/rounding.h"
#include "store/kernels.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

// (rows, batch, channels, height, width, store height, store width, padding)
using Sizes = std::array<int64_t, 8>;

StoreArgs arguments(uintptr_t store, bool half, uintptr_t index, const Sizes& s, bool low, uintptr_t offsets,
                    uintptr_t flips) {
  StoreArgs a;
  a.rows = s[0], a.batch = s[1], a.channels = s[2], a.height = s[3], a.width = s[4];
  a.store_h = s[5], a.store_w = s[6], a.padding = s[7];
  if (*std::min_element(s.begin(), s.end()) < 0)
    throw std::invalid_argument("sizes: got a negative one, expected 0 or more");
  // the CUDA kernels count the numbers of an image, and of a row, in 32 bits
  if (a.channels * std::max(a.height * a.width, a.store_h * a.store_w) > INT32_MAX)
    throw std::invalid_argument("x: got images of 2^31 numbers or more, expected fewer");
  const int64_t height = a.height + 2 * a.padding, width = a.width + 2 * a.padding;
  a.factor = a.store_h == 0 ? 1 : height / a.store_h;
  if (a.factor < 1 || a.factor * a.store_h != height || a.factor * a.store_w != width ||
      (low && (a.padding % a.factor != 0 || a.height % a.factor != 0 || a.width % a.factor != 0)))
    throw std::invalid_argument("store: got rows of " + std::to_string(a.store_h) + "x" + std::to_string(a.store_w) +
                                ", expected images of " + std::to_string(height) + "x" + std::to_string(width) +
                                " with their padding, down-sampled by one whole number");
  a.store = pointer<void>(store, a.rows * a.channels * a.store_h * a.store_w, "store");
  a.type = half ? StoreType::f16 : StoreType::f32;
  a.index = reinterpret_cast<const int64_t*>(index);
  a.low = low;
  a.offsets = reinterpret_cast<const int64_t*>(offsets);
  a.flips = reinterpret_cast<const uint8_t*>(flips);
  return a;
}

void gather(int device, uintptr_t stream, uintptr_t store, bool half, uintptr_t index, Sizes sizes, bool low,
            bool inverse, uintptr_t offsets, uintptr_t flips, uintptr_t x, uintptr_t out, uintptr_t eps_each,
            double eps, double lo, double hi) {
  StoreArgs a = arguments(store, half, index, sizes, low, offsets, flips);
  const int64_t elements = a.batch * a.channels * a.height * a.width;
  a.inverse = inverse;
  a.x = reinterpret_cast<const float*>(x);
  a.out = pointer<float>(out, elements, "out");
  a.eps_each = reinterpret_cast<const float*>(eps_each);
  a.eps = round_down(eps);
  a.lo = -round_down(-lo);
  a.hi = round_down(hi);
  if (!(a.lo <= a.hi))
    throw std::invalid_argument("clip: got bounds with no float32 number between them, expected lo <= hi in float32");
  on_device(device, stream, elements, a, fastrobust::store().gather, FR_CUDA_KERNEL(store_gather_cuda));
}

void scatter(int device, uintptr_t stream, uintptr_t store, bool half, uintptr_t index, Sizes sizes, bool low,
             uintptr_t offsets, uintptr_t flips, uintptr_t adv, uintptr_t x) {
  StoreArgs a = arguments(store, half, index, sizes, low, offsets, flips);
  const int64_t elements = a.batch * a.channels * a.height * a.width;
  a.adv = pointer<const float>(adv, elements, "adv");
  a.x = reinterpret_cast<const float*>(x);
  on_device(device, stream, elements, a, fastrobust::store().scatter, FR_CUDA_KERNEL(store_scatter_cuda));
}

}  // namespace

void bind_store(py::module_& m) {
  m.def("store_gather", &gather);
  m.def("store_scatter", &scatter);
}

}  // namespace fastrobust
