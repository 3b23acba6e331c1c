// Gradients of rows through a graph of stages: a few rows of one example at a time go back up from the input, in a
// core's cache, with what the way down kept. Sums over examples are formed in blocks that do not depend on the threads.
#include <algorithm>
#include <memory>

#include "bounds/depthwise_cpu.h"
#include "bounds/entry_cpu.h"
#include "bounds/fma.h"
#include "bounds/patches_cpu.h"
#include "bounds/serial_cpu.h"
#include "bounds/stage_rows.h"
#include "core/floats.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

int64_t padded(int64_t channels) { return (channels + kLanes - 1) / kLanes * kLanes; }

// A convolution, seen from the image that its adjoint wrote to; with groups, that of one of them.
struct GradLink {
  Bordered border;
  Depthwise depthwise{};
  Floats turned;  // the weight, [groups][lanes][channels of the source, padded], or that of `depthwise`
  int64_t channels = 0, wide = 0, positions = 0, lanes = 0, groups = 1, weight_at = 0;
  bool direct = false;         // without patches
  bool by_channel = false;     // depthwise
  int64_t whole_channels = 0;  // of the source

  void reset(const GraphLink& l, const GraphStage& from, const GraphStage& to) {
    groups = l.groups, channels = from.channels / groups, wide = padded(channels), lanes = l.lanes;
    whole_channels = from.channels;
    positions = from.map_height * from.map_width;
    by_channel = groups > 1 && groups == from.channels && groups == to.channels;
    border = {from.map_height, from.map_width, to.map_height, to.map_width, to.channels / groups,
              l.kernel_h,      l.kernel_w,     l.stride_y,    l.stride_x,   l.pad_y,
              l.pad_x,         l.dilation_y,   l.dilation_x};
    if (by_channel) {
      depthwise = {from.map_height, from.map_width, to.map_height, to.map_width, to.channels,  l.kernel_h,  l.kernel_w,
                   l.stride_y,      l.stride_x,     l.pad_y,       l.pad_x,      l.dilation_y, l.dilation_x};
      turned = Floats(depthwise.numbers());
      depthwise.turn(l.weight, lanes, turned.get());
      return;
    }
    direct = border.whole_vectors() && wide <= kMostTaps * kLanes;
    turned = Floats::zeros(groups * lanes * wide);
    for (int64_t c = 0; c < from.channels; ++c)
      for (int64_t t = 0; t < lanes; ++t)
        turned[(c / channels * lanes + t) * wide + c % channels] = l.weight[c * lanes + t];
  }
  // Of the gradient of the weight, as it is summed.
  int64_t sums() const { return by_channel ? depthwise.numbers() : whole_channels * lanes; }
};

// Where things lie in a block's sums, and the links.
struct GradPlan {
  StagePlan stages;
  std::unique_ptr<GradLink[]> link;
  std::unique_ptr<int64_t[]> lines_at;  // of each stage
  int64_t sums = 0, patch = 0, spare = 0, slice = 0;

  GradPlan(const GraphGradArgs& a, int links)
      : stages(a.graph, true),
        link(new GradLink[static_cast<size_t>(links + 1)]),
        lines_at(new int64_t[static_cast<size_t>(a.graph.count)]) {
    const GraphArgs& g = a.graph;
    for (int i = 0; i < g.count; ++i) {
      const GraphStage& s = g.stages[i];
      lines_at[static_cast<size_t>(i)] = sums;
      if (s.shared) sums += 3 * size_of(s);
      for (int k = s.first; k < s.first + s.links; ++k) {
        const GraphLink& l = g.links[k];
        if (l.kind != LinkKind::conv) continue;
        GradLink& c = link[static_cast<size_t>(k)];
        c.reset(l, g.stages[l.source], s);
        c.weight_at = sums;
        sums += c.sums();
        if (c.by_channel) continue;
        if (!c.direct) patch = std::max(patch, c.positions * patch_stride(c.lanes));
        spare = std::max(spare, c.positions * c.wide);
        if (c.groups > 1) slice = std::max(slice, c.positions * c.channels);
      }
    }
  }
};

class Worker {
 public:
  Worker(const GraphGradArgs& a, const GradPlan& plan, int links)
      : a_(a),
        g_(a.graph),
        plan_(plan),
        grads_(new Floats[static_cast<size_t>(a.graph.count)]),
        bordered_(new Floats[static_cast<size_t>(links + 1)]),
        patch_(plan.patch),
        spare_(plan.spare),
        slice_(plan.slice),
        scaled_(plan.stages.block * a.graph.sides * plan.stages.widest) {
    for (int i = 0; i < g_.count; ++i) {
      const GraphStage& s = g_.stages[i];
      grads_[static_cast<size_t>(i)] = Floats(plan.stages.block * g_.sides * size_of(s));
      for (int k = s.first; k < s.first + s.links; ++k)
        if (g_.links[k].kind == LinkKind::conv)
          bordered_[static_cast<size_t>(k)] = Floats::zeros(plan.link[static_cast<size_t>(k)].border.numbers());
    }
    std::fill_n(zeros_, kStageRows, 0);
  }

  // Rows [begin, end) of one example; adds to `sums`.
  void run(int64_t begin, int64_t end, float* sums) {
    for (; begin < end; begin += plan_.stages.block) some(begin, std::min(plan_.stages.block, end - begin), sums);
  }

 private:
  void some(int64_t begin, int64_t n, float* sums) {
    begin_ = begin, n_ = n;
    for (int64_t k = 0; k < n; ++k) {
      id_[k] = begin + k;
      for (int side = 0; side < g_.sides; ++side) from_[side * n + k] = a_.from[side * g_.rows + begin + k];
    }
    const int input = g_.count - 1;
    ConcretizeGradArgs c;
    c.rows = rows_at(input);
    c.center = g_.end.center, c.radius = g_.end.radius;
    c.from = from_;
    c.to_a = grad(input), c.to_center = a_.to_center, c.to_radius = a_.to_radius;
    const int64_t size = size_of(g_.stages[input]);
    if (c.center != nullptr)
      concretize_grad_rows(c, 0, n);
    else
      std::fill_n(grad(input), in(input) * n * size, 0.f);
    for (int m = 0; m < in(input) && a_.from_map != nullptr; ++m)
      add_to(grad(input) + m * n * size, a_.from_map + (m * g_.rows + begin) * size, 1.f, n * size);
    entered(input);
    for (int i = input - 1; i >= 0; --i) up(i, sums);
  }

  float* grad(int i) const { return grads_[static_cast<size_t>(i)].get(); }
  int in(int i) const { return plan_.stages.in[static_cast<size_t>(i)]; }
  int out(int i) const { return plan_.stages.out[static_cast<size_t>(i)]; }

  // The rows that arrived at a stage on the way down.
  Rows rows_at(int i) {
    const GraphStage& s = g_.stages[i];
    Rows r;
    r.count = n_, r.length = size_of(s), r.sides = g_.sides;
    r.example = s.shared ? zeros_ : g_.example + begin_;
    if (s.links > 0) {
      r.a = s.kept_in, r.pick = id_;
      r.side_stride = in(i) == 2 ? g_.rows * r.length : 0;
      return r;
    }
    const GraphEntry& e = g_.entries[s.entry];
    r.a = e.a, r.side_stride = e.side_stride;
    r.pick = e.pick != nullptr ? e.pick + begin_ : id_;
    r.minus = e.minus != nullptr ? e.minus + begin_ : nullptr;
    return r;
  }

  // Gradients of the rows that start at a stage.
  void entered(int i) const {
    const int64_t size = size_of(g_.stages[i]);
    for (int m = 0; m < in(i) && a_.stages[i].to_a != nullptr; ++m)
      std::copy_n(grad(i) + m * n_ * size, n_ * size, a_.stages[i].to_a + (m * g_.rows + begin_) * size);
  }

  void up(int i, float* sums) {
    const GraphStage& s = g_.stages[i];
    const int64_t numbers = n_ * size_of(s);
    bool first = true;
    for (int j = i + 1; j < g_.count; ++j)
      for (int k = g_.stages[j].first; k < g_.stages[j].first + g_.stages[j].links; ++k)
        if (g_.links[k].source == i) {
          for (int m = 0; m < in(j); ++m) link_up(i, j, k, m, m < out(i) ? m : 0, first && m < out(i), sums);
          first = false;
        }
    if (first) std::fill_n(scaled_.get(), out(i) * numbers, 0.f);
    BackGradArgs b;
    b.rows = rows_at(i);
    b.slopes = s.slopes, b.intercepts = s.intercepts;
    b.examples = s.shared ? 1 : g_.examples;
    b.slope_sides = s.slope_sides, b.sides_out = out(i);
    b.from_out = scaled_.get(), b.from_b = from_;
    b.to_a = grad(i);
    float* own = sums + plan_.lines_at[static_cast<size_t>(i)];
    b.to_slopes = s.shared ? own : a_.stages[i].to_slopes;
    b.to_intercepts = s.shared ? own + size_of(s) : a_.stages[i].to_intercepts;
    int64_t rows[kStageRows];
    for (int64_t k = 0; k < n_; ++k) rows[k] = k;
    back_grad_rows(b, rows, n_);
    entered(i);
  }

  // Matrix m of what reached stage j through link k, as a gradient of matrix `to` of stage i.
  void link_up(int i, int j, int k, int m, int to, bool sets, float* sums) {
    const GraphLink& l = g_.links[k];
    const GraphStage &s = g_.stages[i], &t = g_.stages[j];
    const int64_t size = size_of(s), target = size_of(t);
    const float* from = grad(j) + m * n_ * target;
    float* result = scaled_.get() + to * n_ * size;
    if (l.kind == LinkKind::identity) {
      if (sets) std::fill_n(result, n_ * size, 0.f);
      add_to(result, from, l.sign, n_ * size);
      return;
    }
    if (l.kind == LinkKind::pick) {
      if (sets) std::fill_n(result, n_ * size, 0.f);
      for (int64_t row = 0; row < n_; ++row, from += target, result += size) {
        const int32_t* index = l.index + g_.example[begin_ + row] * size;
        for (int64_t p = 0; p < size; ++p) result[p] += from[index[p]];
      }
      return;
    }
    const GradLink& c = plan_.link[static_cast<size_t>(k)];
    const float* scaled = s.kept_out + (to * g_.rows + begin_) * size;
    for (int64_t row = 0; row < n_; ++row, from += target, scaled += size, result += size) {
      if (c.by_channel) {
        if (sets) std::fill_n(result, size, 0.f);
        c.depthwise.convolve(from, c.turned.get(), result);
        c.depthwise.add_sums(scaled, from, sums + c.weight_at);
        continue;
      }
      for (int64_t group = 0; group < c.groups; ++group)
        conv_up(c, group, from, t.channels, scaled, result, sets, bordered_[static_cast<size_t>(k)].get(),
                sums + c.weight_at);
    }
  }

  // One row of one group; `apart` channels of the image that `from` is.
  void conv_up(const GradLink& c, int64_t group, const float* from, int64_t apart, const float* scaled, float* result,
               bool sets, float* border, float* sums) {
    const bool in_place = sets && c.wide == c.whole_channels;
    const int64_t first = group * c.channels;
    const float* turned = c.turned.get() + group * c.lanes * c.wide;
    float* const found = in_place ? result : spare_.get();
    const auto nothing = [] {};
    sums += first * c.lanes;
    c.border.fill(from + group * c.border.channels, border, apart);
    if (c.groups > 1) {
      copy_channels(scaled + first, c.positions, c.channels, c.whole_channels, slice_.get(), c.channels);
      scaled = slice_.get();
    }
    if (c.direct) {
      convolve_image(c.border, border, c.wide / kLanes, turned, found, nothing);
      add_window_sums(c.border, scaled, c.channels, border, c.lanes, sums);
    } else {
      c.border.patches(border, c.lanes, patch_.get());
      convolve(patch_.get(), c.positions, c.lanes, turned, c.wide, found, nothing);
      add_sums_of_taps(scaled, c.channels, patch_.get(), c.positions, c.lanes, sums);
    }
    if (in_place) return;
    if (sets) {
      copy_channels(found, c.positions, c.channels, c.wide, result + first, c.whole_channels);
      return;
    }
    if (c.wide == c.whole_channels) {
      add_to(result, found, 1.f, c.positions * c.wide);
      return;
    }
    for (int64_t p = 0; p < c.positions; ++p)
      for (int64_t o = 0; o < c.channels; ++o) result[p * c.whole_channels + first + o] += found[p * c.wide + o];
  }

  const GraphGradArgs& a_;
  const GraphArgs& g_;
  const GradPlan& plan_;
  std::unique_ptr<Floats[]> grads_, bordered_;
  Floats patch_, spare_, slice_, scaled_;
  int64_t begin_ = 0, n_ = 0, id_[kStageRows], zeros_[kStageRows];
  float from_[2 * kStageRows];
};

// The gradients of an example's maps are sums over its rows.
void clear(const GraphGradArgs& a, int64_t example) {
  const GraphArgs& g = a.graph;
  const auto zero = [&](float* p, int sides, int64_t map) {
    for (int side = 0; side < sides && p != nullptr; ++side)
      std::fill_n(p + (side * g.examples + example) * map, map, 0.f);
  };
  for (int i = 0; i + 1 < g.count; ++i) {
    if (g.stages[i].shared) continue;
    zero(a.stages[i].to_slopes, g.stages[i].slope_sides, size_of(g.stages[i]));
    zero(a.stages[i].to_intercepts, 2, size_of(g.stages[i]));
  }
  zero(a.to_center, 1, size_of(g.stages[g.count - 1]));
  zero(a.to_radius, 1, size_of(g.stages[g.count - 1]));
}

}  // namespace

void stage_grad_cpu(const GraphGradArgs& a) {
  const GraphArgs& g = a.graph;
  int links = 0;
  for (int i = 0; i < g.count; ++i) links = std::max(links, g.stages[i].first + g.stages[i].links);
  const GradPlan plan(a, links);
  const int64_t per = std::max<int64_t>(4, (g.examples + 63) / 64), blocks = (g.examples + per - 1) / per;
  const Floats sums = Floats::zeros(std::max<int64_t>(1, blocks) * plan.sums);
  parallel_for(blocks, 1, [&](int64_t first, int64_t last) {
    Worker worker(a, plan, links);
    for (int64_t i = first; i < last; ++i)
      for (int64_t e = i * per; e < std::min(g.examples, (i + 1) * per); ++e) {
        clear(a, e);
        worker.run(g.starts[e], g.starts[e + 1], sums.get() + i * plan.sums);
      }
  });
  const auto total = [&](int64_t at, int64_t size, float* to) {
    for (int64_t k = 0; k < size; ++k) {
      float sum = 0.f;
      for (int64_t b = 0; b < blocks; ++b) sum += sums[b * plan.sums + at + k];
      to[k] = sum;
    }
  };
  for (int i = 0; i < g.count; ++i) {
    const GraphStage& s = g.stages[i];
    if (s.shared) {
      total(plan.lines_at[static_cast<size_t>(i)], size_of(s), a.stages[i].to_slopes);
      total(plan.lines_at[static_cast<size_t>(i)] + size_of(s), 2 * size_of(s), a.stages[i].to_intercepts);
    }
    for (int k = s.first; k < s.first + s.links; ++k) {
      if (g.links[k].kind != LinkKind::conv) continue;
      const GradLink& c = plan.link[static_cast<size_t>(k)];
      if (c.by_channel) {
        const Floats own(c.sums());
        total(c.weight_at, c.sums(), own.get());
        c.depthwise.turn_back(own.get(), c.lanes, a.to_weights[k]);
      } else {
        total(c.weight_at, c.sums(), a.to_weights[k]);
      }
    }
  }
}

FR_NS_END
