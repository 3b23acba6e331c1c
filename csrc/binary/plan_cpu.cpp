// From the index lists of a weight to offsets into a fast layout, and from a dense weight to its index lists.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <vector>

#include "binary/args.h"
#include "core/simd.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

struct Tap {
  int64_t phase, shift;  // the input lies in this phase, at output position + shift
};

// Input position of output y and tap k: stride y + dilation k - padding = stride (y + shift) + phase.
Tap tap(int64_t k, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t at = dilation * k - padding;
  const int64_t phase = ((at % stride) + stride) % stride;
  return {phase, (at - phase) / stride};
}

}  // namespace

// Forward: row k reads channel (phase, c) shifted by (shift_y, shift_x). Transposed: row (phase, c) reads channel k
// shifted by the opposite. The lists keep the ascending order of the weight, which fixes the order of summation.
bool plan_cpu(const PlanArgs& a) {
  const int64_t taps = a.kernel_h * a.kernel_w, phases = a.stride_h * a.stride_w;
  const int64_t group_in = a.in_channels / a.groups, group_out = a.out_channels / a.groups;
  const int64_t rows = a.transposed ? phases * a.in_channels : a.out_channels;
  const int64_t read = a.transposed ? group_out : group_in;
  const int64_t segment = a.segment > 0 ? a.segment : std::max<int64_t>(read, 1);
  const int64_t segments = std::max<int64_t>(1, (read + segment - 1) / segment);
  std::vector<Tap> ys, xs;
  for (int64_t k = 0; k < a.kernel_h; ++k) ys.push_back(tap(k, a.stride_h, a.pad_h, a.dilation_h));
  for (int64_t k = 0; k < a.kernel_w; ++k) xs.push_back(tap(k, a.stride_w, a.pad_w, a.dilation_w));
  bool fits = true;
  // Calls f(list, offset, tap, entry) for every entry, in the order of the weight.
  const auto each = [&](const auto& f) {
    for (int64_t k = 0; k < a.out_channels; ++k)
      for (int sign = 0; sign < 2; ++sign)
        for (int64_t e = a.ptr[2 * k + sign]; e < a.ptr[2 * k + sign + 1]; ++e) {
          const int64_t c = a.index[e] / taps, t = a.index[e] - c * taps;
          const Tap y = ys[static_cast<size_t>(t / a.kernel_w)], x = xs[static_cast<size_t>(t % a.kernel_w)];
          const int64_t channel = k / group_out * group_in + c,
                        phased = (y.phase * a.stride_w + x.phase) * a.in_channels + channel;
          const int64_t shift = (y.shift * a.pitch + x.shift) * a.lanes;
          if (a.transposed)
            f(2 * (k % group_out / segment * rows + phased) + sign, k * a.plane - shift, t, e);
          else
            f(2 * (c / segment * rows + k) + sign, phased * a.plane + shift, t, e);
        }
  };
  int32_t* const ptr = a.out_ptr;
  for (int64_t i = 0; i <= 2 * segments * rows; ++i) ptr[i] = 0;
  each([&](int64_t list, int64_t offset, int64_t, int64_t) {
    ++ptr[list + 1];
    fits = fits && offset >= INT32_MIN && offset <= INT32_MAX;
  });
  if (!fits) return false;
  for (int64_t i = 0; i < 2 * segments * rows; ++i) ptr[i + 1] += ptr[i];
  std::vector<int32_t> next(ptr, ptr + 2 * segments * rows);
  each([&](int64_t list, int64_t offset, int64_t t, int64_t e) {
    const int32_t at = next[static_cast<size_t>(list)]++;
    a.offsets[at] = static_cast<int32_t>(offset);
    if (a.taps != nullptr) a.taps[at] = static_cast<uint16_t>(t);
    if (a.values != nullptr) a.out_values[at] = a.values[e];
  });
  return true;
}

// First without `index`: counts into ptr, and what the entries are. A real weight has one list a row, in place of the
// plus list.
Entries pack_cpu(const PackArgs& a) {
  const int64_t grain = std::max<int64_t>(1, 65536 / std::max<int64_t>(1, a.row_size));
  if (a.index == nullptr) {
    std::atomic<bool> signs{true}, finite{true};
    parallel_for(a.rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const float* const w = a.weight + row * a.row_size;
        int32_t plus = 0, minus = 0, zero = 0;
        for (int64_t i = 0; i < a.row_size; ++i) {
          plus += w[i] == 1.f;
          minus += w[i] == -1.f;
          zero += w[i] == 0.f;
        }
        if (plus + minus + zero != a.row_size) {
          signs = false;
          if (!std::all_of(w, w + a.row_size, [](float v) { return std::isfinite(v); })) finite = false;
          minus = static_cast<int32_t>(a.row_size) - zero - plus;
        }
        a.ptr[2 * row + 1] = plus;
        a.ptr[2 * row + 2] = minus;
      }
    });
    for (int64_t row = 0; row < a.rows && !signs; ++row) {
      a.ptr[2 * row + 1] += a.ptr[2 * row + 2];
      a.ptr[2 * row + 2] = 0;
    }
    for (int64_t i = 0; i < 2 * a.rows; ++i) a.ptr[i + 1] += a.ptr[i];
    return signs ? Entries::signs : finite ? Entries::real : Entries::not_finite;
  }
  parallel_for(a.rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const float* const w = a.weight + row * a.row_size;
      int32_t *plus = a.index + a.ptr[2 * row], *minus = a.index + a.ptr[2 * row + 1];
      for (int64_t i = 0; i < a.row_size;) {
        // Most of a row is zero: pass over sixteen zeros at a time.
        if (i + kLanes <= a.row_size) {
          const Vec v = load(w + i);
          if (!any((v < Vec(0.f)) | (v > Vec(0.f)))) {
            i += kLanes;
            continue;
          }
        }
        for (const int64_t end = std::min(a.row_size, i + kLanes); i < end; ++i) {
          if (a.values != nullptr && w[i] != 0.f) {
            a.values[plus - a.index] = w[i];
            *plus++ = static_cast<int32_t>(i);
          } else {
            if (w[i] > 0.f) *plus++ = static_cast<int32_t>(i);
            if (w[i] < 0.f) *minus++ = static_cast<int32_t>(i);
          }
        }
      }
    }
  });
  return a.values == nullptr ? Entries::signs : Entries::real;
}

FR_NS_END
