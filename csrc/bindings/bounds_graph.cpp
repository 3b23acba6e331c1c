#include <array>
#include <vector>

#include "bindings/bindings.h"
#include "bounds/kernels.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

// stages: (slopes or 0, slope_sides, intercepts, shared, map_height, map_width, channels, first link, links, entry or
// -1) links: (source, identity, weight, kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x, 1 or -1) entries: (A,
// side_stride, pick or 0, minus or 0); groups: (starts, order, example, y, x, channel) and of the start (height, width,
// channels)
void live_graph(const std::vector<std::array<int64_t, 10>>& stages, const std::vector<std::array<int64_t, 10>>& links,
                const std::vector<std::array<int64_t, 4>>& entries, const std::array<uintptr_t, 6>& groups,
                int64_t channels, int64_t count, int64_t rows, int sides, int64_t examples, uintptr_t center,
                uintptr_t radius, uintptr_t x, uintptr_t eps, int dual, uintptr_t b, uintptr_t out) {
  std::vector<GraphStage> stage_list(stages.size());
  std::vector<GraphLink> link_list(links.size());
  std::vector<GraphEntry> entry_list(entries.size());
  for (size_t i = 0; i < stages.size(); ++i) {
    const auto& t = stages[i];
    GraphStage& s = stage_list[i];
    const bool last = i + 1 == stages.size();
    s.slopes = reinterpret_cast<const float*>(static_cast<uintptr_t>(t[0]));
    s.slope_sides = static_cast<int>(t[1]);
    s.intercepts = reinterpret_cast<const float*>(static_cast<uintptr_t>(t[2]));
    s.shared = t[3] != 0;
    s.map_height = t[4], s.map_width = t[5], s.channels = t[6];
    s.first = static_cast<int>(t[7]), s.links = static_cast<int>(t[8]), s.entry = static_cast<int>(t[9]);
    if (!last && (s.slopes == nullptr || s.intercepts == nullptr))
      throw std::invalid_argument("stages: all but the last need lines");
  }
  for (size_t i = 0; i < links.size(); ++i) {
    const auto& t = links[i];
    GraphLink& l = link_list[i];
    l.source = static_cast<int>(t[0]);
    l.identity = t[1] != 0;
    l.weight = reinterpret_cast<const float*>(static_cast<uintptr_t>(t[2]));
    l.kernel_h = t[3], l.kernel_w = t[4], l.stride_y = t[5], l.stride_x = t[6], l.pad_y = t[7], l.pad_x = t[8];
    l.sign = static_cast<float>(t[9]);
    if (!l.identity && (l.weight == nullptr || l.kernel_h > 64))
      throw std::invalid_argument("links: a convolution needs weights of at most 64 lines");
  }
  for (size_t i = 0; i < entries.size(); ++i) {
    const auto& t = entries[i];
    entry_list[i] = {reinterpret_cast<const float*>(static_cast<uintptr_t>(t[0])), t[1],
                     reinterpret_cast<const int64_t*>(static_cast<uintptr_t>(t[2])),
                     reinterpret_cast<const int64_t*>(static_cast<uintptr_t>(t[3]))};
  }
  GraphArgs g;
  g.stages = stage_list.data(), g.links = link_list.data(), g.entries = entry_list.data();
  g.count = static_cast<int>(stages.size());
  g.examples = examples, g.rows = rows, g.groups = count, g.sides = sides;
  if (rows == 0 || stages.empty()) return;
  g.starts = pointer<const int64_t>(groups[0], 1, "starts");
  g.order = reinterpret_cast<const int64_t*>(groups[1]);
  g.example = pointer<const int64_t>(groups[2], 1, "example");
  g.y = reinterpret_cast<const int64_t*>(groups[3]);
  g.x = reinterpret_cast<const int64_t*>(groups[4]);
  g.channel = reinterpret_cast<const int64_t*>(groups[5]);
  g.channels = channels;
  g.b = pointer<const float>(b, rows, "b");
  g.end.center = reinterpret_cast<const float*>(center);
  g.end.radius = reinterpret_cast<const float*>(radius);
  g.end.x = reinterpret_cast<const float*>(x);
  g.end.eps = reinterpret_cast<const float*>(eps);
  g.end.dual = static_cast<Dual>(dual);
  g.end.out = pointer<float>(out, rows, "out");
  without_gil(kReleaseGilAbove + 1, [&] { bounds().live_graph(g); });
}

// stages: (slopes or 0, slope_sides, intercepts, shared, map_height, map_width, channels, first link, links, entry or
// -1, kept in, kept out); links: (source, identity, weight, kernel_h, kernel_w, stride_y, stride_x, pad_y, pad_x, 1 or
// -1, lanes); entries as above
struct StageRows {
  using Stages = std::vector<std::array<int64_t, 12>>;
  using Links = std::vector<std::array<int64_t, 11>>;
  using Entries = std::vector<std::array<int64_t, 4>>;
  std::vector<GraphStage> stages;
  std::vector<GraphLink> links;
  std::vector<GraphEntry> entries;
  GraphArgs args;

  StageRows(const Stages& stage_list, const Links& link_list, const Entries& entry_list, uintptr_t example,
            int64_t rows, int sides, int64_t examples, uintptr_t center, uintptr_t radius)
      : stages(stage_list.size()), links(link_list.size()), entries(entry_list.size()) {
    for (size_t i = 0; i < stages.size(); ++i) {
      const auto& t = stage_list[i];
      GraphStage& s = stages[i];
      s.slopes = at(t[0]), s.slope_sides = static_cast<int>(t[1]), s.intercepts = at(t[2]);
      s.shared = t[3] != 0;
      s.map_height = t[4], s.map_width = t[5], s.channels = t[6];
      s.first = static_cast<int>(t[7]), s.links = static_cast<int>(t[8]), s.entry = static_cast<int>(t[9]);
      s.kept_in = at(t[10]), s.kept_out = at(t[11]);
      if (i + 1 < stages.size() && (s.slopes == nullptr || s.intercepts == nullptr))
        throw std::invalid_argument("stages: all but the last need lines");
      if (s.links == 0 && s.entry < 0) throw std::invalid_argument("stages: nothing reaches one of them");
    }
    for (size_t i = 0; i < links.size(); ++i) {
      const auto& t = link_list[i];
      GraphLink& l = links[i];
      l.source = static_cast<int>(t[0]), l.identity = t[1] != 0, l.weight = at(t[2]);
      l.kernel_h = t[3], l.kernel_w = t[4], l.stride_y = t[5], l.stride_x = t[6], l.pad_y = t[7], l.pad_x = t[8];
      l.sign = static_cast<float>(t[9]), l.lanes = t[10];
      if (l.source < 0) throw std::invalid_argument("links: got no source");
      if (!l.identity && l.weight == nullptr) throw std::invalid_argument("links: a convolution needs weights");
      if (!l.identity && (stages[static_cast<size_t>(l.source)].map_width + 12) * l.lanes > kSpreadBuffer)
        throw std::invalid_argument("links: a position has too many taps");
    }
    for (size_t i = 0; i < entries.size(); ++i) {
      const auto& t = entry_list[i];
      entries[i] = {at(t[0]), t[1], reinterpret_cast<const int64_t*>(static_cast<uintptr_t>(t[2])),
                    reinterpret_cast<const int64_t*>(static_cast<uintptr_t>(t[3]))};
    }
    args.stages = stages.data(), args.links = links.data(), args.entries = entries.data();
    args.count = static_cast<int>(stages.size());
    args.examples = examples, args.rows = rows, args.sides = sides;
    args.example = pointer<const int64_t>(example, rows, "example");
    args.end.center = pointer<const float>(center, rows, "center");
    args.end.radius = pointer<const float>(radius, rows, "radius");
  }
  static float* at(int64_t address) { return reinterpret_cast<float*>(static_cast<uintptr_t>(address)); }
};

void stage_rows(const StageRows::Stages& stages, const StageRows::Links& links, const StageRows::Entries& entries,
                uintptr_t example, int64_t rows, int sides, int64_t examples, uintptr_t center, uintptr_t radius,
                uintptr_t b, uintptr_t out) {
  if (rows == 0 || stages.empty()) return;
  StageRows all(stages, links, entries, example, rows, sides, examples, center, radius);
  all.args.b = pointer<const float>(b, rows, "b");
  all.args.end.out = pointer<float>(out, rows, "out");
  without_gil(kReleaseGilAbove + 1, [&] { bounds().stage_rows(all.args); });
}

// to_stages: (slopes, intercepts, rows that start there or 0) of each stage; to_weights: of each link, 0 for identities
void stage_grad(const StageRows::Stages& stages, const StageRows::Links& links, const StageRows::Entries& entries,
                uintptr_t example, int64_t rows, int sides, int64_t examples, uintptr_t center, uintptr_t radius,
                uintptr_t starts, uintptr_t from, const std::vector<std::array<uintptr_t, 3>>& to_stages,
                const std::vector<uintptr_t>& to_weights, uintptr_t to_center, uintptr_t to_radius) {
  if (rows == 0 || stages.empty()) return;
  StageRows all(stages, links, entries, example, rows, sides, examples, center, radius);
  all.args.starts = pointer<const int64_t>(starts, rows, "starts");
  std::vector<GraphGradStage> to(stages.size());
  std::vector<float*> weights(links.size());
  if (to_stages.size() != to.size() || to_weights.size() != weights.size())
    throw std::invalid_argument("to_stages: not as many as there are stages, or weights as links");
  for (size_t i = 0; i < to.size(); ++i) {
    const auto address = [&](size_t k) { return reinterpret_cast<float*>(to_stages[i][k]); };
    to[i] = {address(0), address(1), address(2)};
    const bool kept = (all.stages[i].links == 0 || all.stages[i].kept_in != nullptr) &&
                      (i + 1 == to.size() || all.stages[i].kept_out != nullptr);
    if (!kept) throw std::invalid_argument("stages: the way down kept nothing");
    if (i + 1 < to.size() && (to[i].to_slopes == nullptr || to[i].to_intercepts == nullptr))
      throw std::invalid_argument("to_stages: all but the last have lines");
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] = reinterpret_cast<float*>(to_weights[i]);
    if (!all.links[i].identity && weights[i] == nullptr)
      throw std::invalid_argument("to_weights: got none of a convolution");
  }
  GraphGradArgs g;
  g.graph = all.args, g.stages = to.data(), g.to_weights = weights.data();
  g.from = pointer<const float>(from, rows, "from");
  g.to_center = reinterpret_cast<float*>(to_center), g.to_radius = reinterpret_cast<float*>(to_radius);
  without_gil(kReleaseGilAbove + 1, [&] { bounds().stage_grad(g); });
}

}  // namespace

void bind_bounds_graph(py::module_& m) {
  m.def("bounds_live_graph", &live_graph);
  m.def("bounds_stage_rows", &stage_rows);
  m.def("bounds_stage_grad", &stage_grad);
}

}  // namespace fastrobust
