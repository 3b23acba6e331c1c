// The adjoint of a convolution by positions of its result: where the result has enough channels for a vector, each
// position is a sum over the few positions of `a` that reach it, and nothing is added twice. The positions that share a
// remainder by the stride see the same taps.
#include <algorithm>
#include <cstring>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/serial_cpu.h"

FR_NS_BEGIN
namespace {

#if defined(__AVX512F__)
constexpr int kPositions = 8, kMaxVectors = 2;
#else
constexpr int kPositions = 4, kMaxVectors = 1;
#endif
constexpr int64_t kExamples = 16;  // padded at a time

// One axis: result positions at = phase + stride * i reach a's i - taps(phase) + 1, ..., i.
struct Axis {
  int64_t in, out, kernel, stride, pad, most;
  Axis(int64_t in_, int64_t out_, int64_t kernel_, int64_t stride_, int64_t pad_)
      : in(in_), out(out_), kernel(kernel_), stride(stride_), pad(pad_), most((kernel_ + stride_ - 1) / stride_) {}
  int64_t padded() const { return in + 2 * (most - 1); }
  int64_t taps(int64_t phase) const { return phase < kernel ? (kernel - phase + stride - 1) / stride : 0; }
  // [first, last) of i for results inside [0, out)
  int64_t first(int64_t phase) const {
    const int64_t least = pad - phase;
    return least <= 0 ? 0 : (least + stride - 1) / stride;
  }
  int64_t last(int64_t phase) const {
    const int64_t room = out - 1 + pad - phase;
    return room < 0 ? 0 : std::min(in + taps(phase) - 1, room / stride + 1);
  }
  int64_t place(int64_t phase, int64_t i) const { return phase + stride * i - pad; }
  bool covers() const {  // every result position is reached
    return kernel >= stride && out - 1 + pad < (in - 1) * stride + kernel;
  }
  int64_t products() const {  // positions times taps
    int64_t sum = 0;
    for (int64_t p = 0; p < stride; ++p) sum += std::max<int64_t>(0, last(p) - first(p)) * taps(p);
    return sum;
  }
};

template <int kVectors>
FR_HD void tile(const float* const* base, float* const* to, int count, const float* weight, int64_t lanes,
                int64_t lines, int64_t line, int64_t skip, int64_t channels) {
  Vec acc[kPositions][kVectors];
  const float* at[kPositions];
#pragma GCC unroll 8
  for (int p = 0; p < kPositions; ++p) {
    at[p] = base[p];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[p][v] = Vec(0.f);
  }
  for (int64_t y = 0; y < lines; ++y)
    for (int64_t i = y * skip; i < y * skip + line; ++i, weight += lanes) {
      Vec w[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) w[v] = load(weight + v * kLanes);
#pragma GCC unroll 8
      for (int p = 0; p < kPositions; ++p) {
        const Vec a(at[p][i]);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) acc[p][v] = fmadd(a, w[v], acc[p][v]);
      }
    }
#pragma GCC unroll 8
  for (int p = 0; p < kPositions; ++p) {
    if (p >= count) break;
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      store_n(to[p] + v * kLanes, acc[p][v], static_cast<int>(std::min<int64_t>(kLanes, channels - v * kLanes)));
  }
}

class Gather {
 public:
  explicit Gather(const SpreadArgs& g)
      : g_(g),
        y_(g.in_h, g.out_h, g.kernel_h, g.stride_y, g.pad_y),
        x_(g.in_w, g.out_w, g.kernel_w, g.stride_x, g.pad_x),
        lanes_((g.out_c + kLanes - 1) / kLanes * kLanes),
        image_(y_.padded() * x_.padded() * g.in_c),
        weight_(new float[static_cast<size_t>(g.kernel_h * g.kernel_w * g.in_c * lanes_)]()),
        padded_(new float[static_cast<size_t>(kExamples * image_)]()) {
    pack();
  }

  void run(int64_t begin, int64_t end) {
    const float* weight = weight_.get();
    for (int64_t item = begin; item < end; ++item) pad(item, padded_.get() + (item - begin) * image_);
    if (!y_.covers() || !x_.covers())
      std::memset(result(begin), 0,
                  static_cast<size_t>((end - begin) * g_.out_h * g_.out_w * g_.out_c) * sizeof(float));
    for (int64_t py = 0; py < g_.stride_y; ++py)
      for (int64_t px = 0; px < g_.stride_x; ++px) {
        phase(begin, end, py, px, weight);
        weight += y_.taps(py) * x_.taps(px) * g_.in_c * lanes_;
      }
  }

 private:
  float* result(int64_t item) const { return g_.out + item * g_.out_h * g_.out_w * g_.out_c; }

  // [phases][taps, the last ones first][channel of a][lanes]
  void pack() {
    float* to = weight_.get();
    for (int64_t py = 0; py < g_.stride_y; ++py)
      for (int64_t px = 0; px < g_.stride_x; ++px)
        for (int64_t ty = y_.taps(py) - 1; ty >= 0; --ty)
          for (int64_t tx = x_.taps(px) - 1; tx >= 0; --tx) {
            const int64_t tap = (py + ty * g_.stride_y) * g_.kernel_w + px + tx * g_.stride_x;
            for (int64_t c = 0; c < g_.in_c; ++c, to += lanes_)
              std::copy_n(g_.weight + c * g_.lanes + tap * g_.out_c, g_.out_c, to);
          }
  }

  // The border stays zero from one example to the next.
  void pad(int64_t item, float* to) const {
    const int64_t row = g_.in_w * g_.in_c;
    const float* from = g_.a + item * g_.in_h * row;
    for (int64_t y = 0; y < g_.in_h; ++y)
      std::copy_n(from + y * row, row, to + ((y + y_.most - 1) * x_.padded() + x_.most - 1) * g_.in_c);
  }

  void phase(int64_t begin, int64_t end, int64_t py, int64_t px, const float* weight) const {
    const int64_t ty = y_.taps(py), tx = x_.taps(px), skip = x_.padded() * g_.in_c;
    if (ty == 0 || tx == 0) return;
    const float* base[kPositions];
    float* to[kPositions];
    int count = 0;
    const auto flush = [&] {
      for (int p = count; p < kPositions; ++p) base[p] = base[0];
      int64_t c = 0;
      for (; c + kMaxVectors * kLanes <= lanes_; c += kMaxVectors * kLanes)
        products<kMaxVectors>(base, to, count, weight + c, ty, tx, skip, c);
      if constexpr (kMaxVectors > 1)
        if (c < lanes_) products<1>(base, to, count, weight + c, ty, tx, skip, c);
      count = 0;
    };
    for (int64_t item = begin; item < end; ++item) {
      const float* image = padded_.get() + (item - begin) * image_;
      for (int64_t i = y_.first(py); i < y_.last(py); ++i)
        for (int64_t j = x_.first(px); j < x_.last(px); ++j) {
          base[count] = image + ((i + y_.most - ty) * x_.padded() + j + x_.most - tx) * g_.in_c;
          to[count] = result(item) + (y_.place(py, i) * g_.out_w + x_.place(px, j)) * g_.out_c;
          if (++count == kPositions) flush();
        }
    }
    if (count > 0) flush();
  }

  template <int kVectors>
  void products(const float* const* base, float* const* to, int count, const float* weight, int64_t ty, int64_t tx,
                int64_t skip, int64_t channel) const {
    float* at[kPositions];
    for (int p = 0; p < count; ++p) at[p] = to[p] + channel;
    tile<kVectors>(base, at, count, weight, lanes_, ty, tx * g_.in_c, skip, g_.out_c - channel);
  }

  const SpreadArgs& g_;
  Axis y_, x_;
  int64_t lanes_, image_;
  std::unique_ptr<float[]> weight_, padded_;
};

}  // namespace

bool gather_pays(const SpreadArgs& g) {
  const Axis y(g.in_h, g.out_h, g.kernel_h, g.stride_y, g.pad_y), x(g.in_w, g.out_w, g.kernel_w, g.stride_x, g.pad_x);
  const int64_t lanes = (g.out_c + kLanes - 1) / kLanes * kLanes;
  const int64_t here = y.products() * x.products() * lanes, there = g.in_h * g.in_w * g.lanes;
  return g.origin_y == nullptr && 4 * here <= 5 * there;
}

void gather_items(const SpreadArgs& g, int64_t begin, int64_t end) {
  Gather gather(g);
  for (int64_t item = begin; item < end; item += kExamples) gather.run(item, std::min(end, item + kExamples));
}

FR_NS_END
