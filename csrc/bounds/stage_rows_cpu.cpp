// Rows of coefficients down a graph of stages to the input with all neurons: a few rows at a time, so that what lies
// between the stages stays in a core's cache.
#include <algorithm>
#include <memory>

#include "bounds/entry_cpu.h"
#include "bounds/patches_cpu.h"
#include "bounds/serial_cpu.h"
#include "bounds/stage_rows.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

// The adjoint of a convolution of stride 1 is a convolution by the turned kernel, which reads windows and writes every
// number once; the adjoint proper adds each tap where it belongs, which costs more where a position has few channels.
struct Gather {
  Bordered border;
  Floats weight;  // [kernel_h, kernel_w, channels of the source][channels of the stage]
  bool serves = false;

  void reset(const GraphLink& l, const GraphStage& from, const GraphStage& to) {
    const int64_t up = l.kernel_h - 1 - l.pad_y, left = l.kernel_w - 1 - l.pad_x;
    serves = kMostTaps > 1 && l.kind == LinkKind::conv && l.groups == 1 && l.dilation_y == 1 && l.dilation_x == 1 &&
             l.stride_y == 1 && l.stride_x == 1 && up >= 0 && left >= 0 && to.channels % kLanes == 0 &&
             to.channels <= kMostTaps * kLanes;
    if (!serves) return;
    border = {
        to.map_height, to.map_width, from.map_height, from.map_width, from.channels, l.kernel_h, l.kernel_w, 1, 1, up,
        left};
    const int64_t taps = l.kernel_h * l.kernel_w;
    weight = Floats(taps * from.channels * to.channels);
    for (int64_t k = 0; k < taps; ++k)
      for (int64_t c = 0; c < from.channels; ++c)
        std::copy_n(l.weight + c * l.lanes + (taps - 1 - k) * to.channels, to.channels,
                    weight.get() + (k * from.channels + c) * to.channels);
  }
};

class Block {
 public:
  Block(const GraphArgs& g, const StagePlan& plan, const Gather* gathers, int64_t bordered)
      : g_(g),
        plan_(plan),
        gathers_(gathers),
        bordered_(bordered),
        scaled_(plan.block * g.sides * plan.scaled),
        values_(plan.block * g.sides * plan.widest),
        spare_(plan.block * g.sides * plan.widest) {
    std::fill_n(zeros_, kStageRows, 0);
  }

  void run(int64_t begin, int64_t n) {
    begin_ = begin, n_ = n;
    for (int side = 0; side < g_.sides; ++side) std::copy_n(g_.b + side * g_.rows + begin, n, b_ + side * n);
    for (int i = 0; i < g_.count; ++i) {
      const Rows r = arrive(i);
      if (i + 1 < g_.count)
        lines(i, r);
      else
        leave(r);
    }
  }

 private:
  // Where the rows of a stage begin that leave it, and how far its matrices are apart.
  float* scaled(int i) const {
    const GraphStage& s = g_.stages[i];
    if (s.kept_out != nullptr) return s.kept_out + begin_ * size_of(s);
    return scaled_.get() + plan_.block * g_.sides * plan_.at[static_cast<size_t>(i)];
  }
  int64_t apart(int i) const { return (g_.stages[i].kept_out != nullptr ? g_.rows : n_) * size_of(g_.stages[i]); }

  // The sum of everything that reaches a stage.
  Rows arrive(int i) {
    const GraphStage& s = g_.stages[i];
    const int64_t size = size_of(s);
    const int matrices = plan_.in[static_cast<size_t>(i)];
    Rows r;
    r.count = n_, r.length = size, r.sides = g_.sides;
    r.example = g_.example + begin_;
    if (s.links == 0) {
      const GraphEntry& e = g_.entries[s.entry];
      r.a = e.a;
      if (e.pick != nullptr)
        r.pick = e.pick + begin_;
      else
        r.a += begin_ * size;
      r.minus = e.minus != nullptr ? e.minus + begin_ : nullptr;
      r.side_stride = e.side_stride;
      return r;
    }
    float* to = s.kept_in != nullptr ? s.kept_in + begin_ * size : values_.get();
    const int64_t step = (s.kept_in != nullptr ? g_.rows : n_) * size;
    for (int m = 0; m < matrices; ++m) {
      bool first = true;
      for (int l = s.first; l < s.first + s.links; ++l) first = bring(g_.links[l], s, m, to + m * step, first);
      if (s.entry >= 0) enter(g_.entries[s.entry], m, size, to + m * step);
    }
    r.a = to;
    r.side_stride = matrices == 2 ? step : 0;
    return r;
  }

  bool bring(const GraphLink& l, const GraphStage& s, int m, float* to, bool first) {
    const GraphStage& from = g_.stages[l.source];
    const float* a = scaled(l.source) + (plan_.out[static_cast<size_t>(l.source)] == 2 ? m : 0) * apart(l.source);
    const int64_t numbers = n_ * size_of(s);
    if (l.kind == LinkKind::identity) {
      if (first) std::fill_n(to, numbers, 0.f);
      add_to(to, a, l.sign, numbers);
      return false;
    }
    if (l.kind == LinkKind::pick) {
      if (first) std::fill_n(to, numbers, 0.f);
      const int64_t size = size_of(from);
      for (int64_t i = 0; i < n_; ++i) {
        const int32_t* index = l.index + g_.example[begin_ + i] * size;
        for (int64_t j = 0; j < size; ++j) to[i * size_of(s) + index[j]] += a[i * size + j];
      }
      return false;
    }
    if (const Gather& gather = gathers_[&l - g_.links]; gather.serves) {
      float* out = first ? to : spare_.get();
      std::fill_n(bordered_.get(), gather.border.numbers(), 0.f);
      for (int64_t i = 0; i < n_; ++i) {
        gather.border.fill(a + i * size_of(from), bordered_.get());
        convolve_image(gather.border, bordered_.get(), s.channels / kLanes, gather.weight.get(), out + i * size_of(s),
                       [] {});
      }
      if (!first) add_to(to, spare_.get(), 1.f, numbers);
      return false;
    }
    SpreadArgs p;
    p.a = a, p.weight = l.weight, p.out = first ? to : spare_.get();
    p.count = n_;
    p.in_h = from.map_height, p.in_w = from.map_width, p.in_c = from.channels;
    p.out_h = s.map_height, p.out_w = s.map_width, p.out_c = s.channels;
    p.kernel_h = l.kernel_h, p.kernel_w = l.kernel_w, p.stride_y = l.stride_y, p.stride_x = l.stride_x;
    p.lanes = l.lanes, p.pad_y = l.pad_y, p.pad_x = l.pad_x;
    p.dilation_y = l.dilation_y, p.dilation_x = l.dilation_x, p.groups = l.groups;
    spread_items(p, 0, n_);
    if (!first) add_to(to, spare_.get(), 1.f, numbers);
    return false;
  }

  void enter(const GraphEntry& e, int m, int64_t size, float* to) const {
    for (int64_t i = 0; i < n_; ++i) {
      const float* a = e.a + m * e.side_stride;
      add_to(to + i * size, a + (e.pick != nullptr ? e.pick[begin_ + i] : begin_ + i) * size, 1.f, size);
      if (e.minus != nullptr) add_to(to + i * size, a + e.minus[begin_ + i] * size, -1.f, size);
    }
  }

  void lines(int i, const Rows& r) {
    const GraphStage& s = g_.stages[i];
    const int matrices = plan_.out[static_cast<size_t>(i)];
    float next[2 * kStageRows];
    BackArgs back;
    back.rows = r;
    if (s.shared) back.rows.example = zeros_;
    back.slopes = s.slopes, back.intercepts = s.intercepts;
    back.examples = s.shared ? 1 : g_.examples;
    back.slope_sides = s.slope_sides, back.sides_out = matrices;
    back.b = b_, back.b_out = next;
    // the kernel puts its matrices one after the other
    const bool direct = matrices == 1 || apart(i) == n_ * size_of(s);
    back.out = direct ? scaled(i) : spare_.get();
    back_rows(back, 0, n_);
    std::copy_n(next, g_.sides * n_, b_);
    if (direct) return;
    for (int m = 0; m < matrices; ++m)
      std::copy_n(spare_.get() + m * n_ * size_of(s), n_ * size_of(s), scaled(i) + m * apart(i));
  }

  void leave(const Rows& r) {
    for (int side = 0; side < g_.sides && g_.offset != nullptr; ++side)
      std::copy_n(b_ + side * n_, n_, g_.offset + side * g_.rows + begin_);
    if (g_.end.out == nullptr) return;
    float values[2 * kStageRows];
    ConcretizeArgs c = g_.end;
    c.rows = r;
    c.b = b_, c.out = values;
    concretize_rows(c, 0, n_);
    for (int side = 0; side < g_.sides; ++side)
      std::copy_n(values + side * n_, n_, g_.end.out + side * g_.rows + begin_);
  }

  const GraphArgs& g_;
  const StagePlan& plan_;
  const Gather* gathers_;  // of each link
  Floats bordered_;
  Floats scaled_, values_, spare_;
  int64_t begin_ = 0, n_ = 0, zeros_[kStageRows];
  float b_[2 * kStageRows];
};

}  // namespace

void stage_rows_cpu(const GraphArgs& g) {
  const StagePlan plan(g, false);
  int links = 0;
  for (int i = 0; i < g.count; ++i) links = std::max(links, g.stages[i].first + g.stages[i].links);
  const std::unique_ptr<Gather[]> gathers(new Gather[static_cast<size_t>(links + 1)]);
  int64_t bordered = 0;
  for (int i = 0; i < g.count; ++i)
    for (int k = g.stages[i].first; k < g.stages[i].first + g.stages[i].links; ++k) {
      gathers[static_cast<size_t>(k)].reset(g.links[k], g.stages[g.links[k].source], g.stages[i]);
      if (gathers[static_cast<size_t>(k)].serves)
        bordered = std::max(bordered, gathers[static_cast<size_t>(k)].border.numbers());
    }
  const int64_t blocks = (g.rows + plan.block - 1) / plan.block;
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    Block block(g, plan, gathers.get(), bordered);
    for (int64_t i = first; i < last; ++i) block.run(i * plan.block, std::min(plan.block, g.rows - i * plan.block));
  });
}

FR_NS_END
