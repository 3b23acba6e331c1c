// Rows of coefficients through a chain of activations and convolutions down to the input: a block of rows at a time, so
// that the coefficients between the layers stay in a core's cache.
#include <algorithm>
#include <vector>

#include "bounds/entry_cpu.h"
#include "bounds/serial_cpu.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kBlockNumbers = int64_t{96} << 10;  // of both buffers together: 384 KB
constexpr int64_t kMaxBlock = 64;

// Positions of a row before and after the convolution of each step.
struct Extent {
  int64_t height, width;
  bool window;
};
Extent before(const ChainArgs& g) {
  const bool window = g.rows.corner_y != nullptr;
  return {window ? g.rows.height : g.steps[0].map_height, window ? g.rows.width : g.steps[0].map_width, window};
}
Extent after(const ChainStep& s, const Extent& e) {
  if (!e.window || !s.stays) return {s.out_height, s.out_width, false};
  return {(e.height - 1) * s.stride_y + s.kernel_h, (e.width - 1) * s.stride_x + s.kernel_w, true};
}

struct Buffers {
  int64_t block = 1, scaled = 0, spread = 0;  // rows; numbers of one row and side
  explicit Buffers(const ChainArgs& g) {
    Extent e = before(g);
    for (int i = 0; i < g.count; ++i) {
      scaled = std::max(scaled, e.height * e.width * g.steps[i].channels);
      e = after(g.steps[i], e);
      spread = std::max(spread, e.height * e.width * g.steps[i].out_channels);
    }
    block = std::clamp<int64_t>(kBlockNumbers / std::max<int64_t>(1, g.rows.sides * (scaled + spread)), 1, kMaxBlock);
  }
};

class Block {
 public:
  Block(const ChainArgs& g, const Buffers& sizes)
      : g_(g), scaled_(sizes.block * g.rows.sides * sizes.scaled), spread_(sizes.block * g.rows.sides * sizes.spread) {}

  void run(int64_t begin, int64_t n) {
    const Rows& all = g_.rows;
    Rows r = all;
    r.count = n;
    if (all.pick != nullptr)
      r.pick += begin;
    else
      r.a += begin * all.length;
    if (all.minus != nullptr) r.minus += begin;
    r.example += begin;
    if (all.corner_y != nullptr) {
      std::copy_n(all.corner_y + begin, n, y_);
      std::copy_n(all.corner_x + begin, n, x_);
      r.corner_y = y_;
      r.corner_x = x_;
    }
    for (int side = 0; side < all.sides; ++side) std::copy_n(g_.b + side * all.count + begin, n, b_ + side * n);
    Extent e = before(g_);
    for (int i = 0; i < g_.count; ++i) {
      scale(g_.steps[i], r);
      spread(g_.steps[i], r, e, begin);
    }
    ConcretizeArgs c = g_.end;
    float values[2 * kMaxBlock];
    c.rows = r;
    c.b = b_;
    c.out = values;
    concretize_rows(c, 0, n);
    for (int side = 0; side < all.sides; ++side)
      std::copy_n(values + side * n, n, g_.end.out + side * all.count + begin);
  }

 private:
  void scale(const ChainStep& s, Rows& r) {
    float next[2 * kMaxBlock];
    BackArgs back;
    back.rows = r;
    back.slopes = s.slopes;
    back.intercepts = s.intercepts;
    back.examples = g_.examples;
    back.slope_sides = s.slope_sides;
    back.sides_out = s.slope_sides == 2 ? r.sides : (r.side_stride != 0 ? 2 : 1);
    back.b = b_;
    back.b_out = next;
    back.out = scaled_.get();
    back_rows(back, 0, r.count);
    std::copy_n(next, r.sides * r.count, b_);
    matrices_ = back.sides_out;
  }

  void spread(const ChainStep& s, Rows& r, Extent& e, int64_t begin) {
    SpreadArgs p;
    const Extent to = after(s, e);
    p.weight = s.weight;
    p.in_h = e.height, p.in_w = e.width, p.in_c = s.channels;
    p.out_h = to.height, p.out_w = to.width, p.out_c = s.out_channels;
    p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w, p.stride_y = s.stride_y, p.stride_x = s.stride_x,
    p.lanes = s.lanes;
    if (e.window) {
      for (int64_t i = 0; i < r.count; ++i) {
        y_[i] = y_[i] * s.stride_y - s.pad_y;
        x_[i] = x_[i] * s.stride_x - s.pad_x;
      }
      if (!to.window) p.origin_y = y_, p.origin_x = x_, p.origins = r.count;
    } else {
      p.pad_y = s.pad_y, p.pad_x = s.pad_x;
    }
    const int64_t length = to.height * to.width * s.out_channels;
    float* const out = s.kept != nullptr ? s.kept + begin * length : spread_.get();
    const int64_t apart = (s.kept != nullptr ? g_.rows.count : r.count) * length;
    p.count = r.count;
    for (int m = 0; m < matrices_; ++m) {
      p.a = scaled_.get() + m * r.count * e.height * e.width * s.channels;
      p.out = out + m * apart;
      spread_items(p, 0, p.count);
    }
    Rows next;
    next.a = out;
    next.side_stride = matrices_ == 2 ? apart : 0;
    next.example = r.example;
    next.count = r.count, next.length = length, next.sides = r.sides;
    if (to.window) {
      next.corner_y = y_, next.corner_x = x_;
      next.height = to.height, next.width = to.width, next.channels = s.out_channels;
      next.map_height = s.out_height, next.map_width = s.out_width;
    }
    r = next;
    e = to;
  }

  const ChainArgs& g_;
  Floats scaled_, spread_;
  int64_t y_[kMaxBlock], x_[kMaxBlock];
  float b_[2 * kMaxBlock];
  int matrices_ = 1;
};

}  // namespace

void chain_cpu(const ChainArgs& g) {
  const Buffers sizes(g);
  const int64_t blocks = (g.rows.count + sizes.block - 1) / sizes.block;
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    Block block(g, sizes);
    for (int64_t i = first; i < last; ++i)
      block.run(i * sizes.block, std::min(sizes.block, g.rows.count - i * sizes.block));
  });
}

FR_NS_END
