// Graphs of stages that rows of coefficients pass (bounds/args.h): what Python tells of them, field by field.
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"
#include "bounds/kernels.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

using Pair = std::array<int64_t, 2>;
using Address = uintptr_t;

template <class T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

GraphLink make_link(int source, LinkKind kind, float sign, Address weight, Pair kernel, Pair stride, Pair padding,
                    Pair dilation, int64_t groups, int64_t lanes, Address index) {
  GraphLink l;
  l.source = source, l.kind = kind, l.sign = sign;
  l.weight = at(weight), l.index = at<const int32_t>(index);
  l.kernel_h = kernel[0], l.kernel_w = kernel[1], l.stride_y = stride[0], l.stride_x = stride[1];
  l.pad_y = padding[0], l.pad_x = padding[1], l.dilation_y = dilation[0], l.dilation_x = dilation[1];
  l.groups = groups, l.lanes = lanes;
  if (kind == LinkKind::conv && l.weight == nullptr)
    throw std::invalid_argument("weight: got none, expected that of a convolution");
  if (groups < 1) throw std::invalid_argument("groups: got " + std::to_string(groups) + ", expected a positive number");
  if (kind == LinkKind::pick && l.index == nullptr)
    throw std::invalid_argument("index: got none, expected the neurons that are picked");
  return l;
}

GraphStage make_stage(std::array<int64_t, 3> map, int first, int links, Address slopes, int slope_sides,
                      Address intercepts, bool shared, int entry, Address kept_in, Address kept_out) {
  GraphStage s;
  s.map_height = map[0], s.map_width = map[1], s.channels = map[2];
  s.first = first, s.links = links;
  s.slopes = at(slopes), s.slope_sides = slope_sides, s.intercepts = at(intercepts), s.shared = shared;
  s.entry = entry, s.kept_in = at(kept_in), s.kept_out = at(kept_out);
  return s;
}

GraphEntry make_entry(Address a, int64_t side_stride, Address pick, Address minus) {
  return {at(a), side_stride, at<const int64_t>(pick), at<const int64_t>(minus)};
}

// What both kinds of rows take; lives as long as the lists that it points into.
struct Graph {
  std::vector<GraphStage> stages;
  std::vector<GraphLink> links;
  std::vector<GraphEntry> entries;
  GraphArgs args;

  Graph(std::vector<GraphStage> stage_list, std::vector<GraphLink> link_list, std::vector<GraphEntry> entry_list,
        int64_t examples, int64_t rows, int sides, Address center, Address radius, Address x, Address eps, int dual)
      : stages(std::move(stage_list)), links(std::move(link_list)), entries(std::move(entry_list)) {
    for (size_t i = 0; i < stages.size(); ++i) {
      const GraphStage& s = stages[i];
      if (i + 1 < stages.size() && (s.slopes == nullptr || s.intercepts == nullptr))
        throw std::invalid_argument("stages: got one without lines, expected lines of all but the last");
      if (s.links == 0 && s.entry < 0)
        throw std::invalid_argument("stages: got one that nothing reaches, expected links or an entry");
      if (s.first < 0 || s.first + s.links > static_cast<int>(links.size()) ||
          s.entry >= static_cast<int>(entries.size()))
        throw std::invalid_argument("stages: got links or entries that there are not");
      for (int k = s.first; k < s.first + s.links; ++k)
        if (links[static_cast<size_t>(k)].source >= static_cast<int>(i))
          throw std::invalid_argument("links: got a source that comes later, expected an earlier stage");
      for (int k = s.first; k < s.first + s.links; ++k) {
        const GraphLink& l = links[static_cast<size_t>(k)];
        if (l.kind == LinkKind::conv && l.source >= 0)
          check_apart({l.dilation_y, l.dilation_x, l.groups}, stages[static_cast<size_t>(l.source)].channels,
                      s.channels);
      }
    }
    args.stages = stages.data(), args.links = links.data(), args.entries = entries.data();
    args.count = static_cast<int>(stages.size());
    args.examples = examples, args.rows = rows, args.sides = sides;
    args.end.center = at(center), args.end.radius = at(radius), args.end.x = at(x), args.end.eps = at(eps);
    args.end.dual = static_cast<Dual>(dual);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  bool empty() const { return args.rows == 0 || stages.empty(); }
};

// Groups of rows of one example, and for unit vectors the position that they share, the rows' channels and how many
// channels their image has.
struct Groups {
  int64_t count;
  Address starts, order, example, y, x, channel;
  int64_t channels;
};

GraphArgs with_groups(const Graph& graph, const Groups& groups) {
  GraphArgs g = graph.args;
  g.groups = groups.count;
  g.starts = pointer<const int64_t>(groups.starts, 1, "starts");
  g.order = at<const int64_t>(groups.order);
  g.example = pointer<const int64_t>(groups.example, 1, "example");
  g.y = at<const int64_t>(groups.y), g.x = at<const int64_t>(groups.x), g.channel = at<const int64_t>(groups.channel);
  g.channels = groups.channels;
  return g;
}

void live_graph(const Graph& graph, const Groups& groups, Address b, Address out, Address map, Address offset,
                Pair window, Address corner_y, Address corner_x) {
  if (graph.empty()) return;
  GraphArgs g = with_groups(graph, groups);
  g.b = pointer<const float>(b, g.rows, "b");
  g.end.out = at(out), g.map = at(map);
  if (g.map != nullptr) g.offset = pointer<float>(offset, g.rows, "offset");
  if (g.map != nullptr && window[0] > 0) {
    g.window_height = window[0], g.window_width = window[1];
    g.map_y = pointer<int64_t>(corner_y, g.rows, "corner_y");
    g.map_x = pointer<int64_t>(corner_x, g.rows, "corner_x");
  }
  without_gil(kReleaseGilAbove + 1, [&] { bounds().live_graph(g); });
}

// Height and width of windows that hold what every row has at the input.
Pair live_graph_window(const Graph& graph, const Groups& groups) {
  if (graph.empty()) return {1, 1};
  const WindowSize size = bounds().live_graph_window(with_groups(graph, groups));
  return {size.height, size.width};
}

GraphArgs with_examples(const Graph& graph, Address example) {
  for (const GraphLink& l : graph.links) {
    if (l.source < 0) throw std::invalid_argument("links: got no source, expected a stage");
    if (l.kind == LinkKind::conv &&
        (graph.stages[static_cast<size_t>(l.source)].map_width + 12) * l.lanes > kSpreadBuffer)
      throw std::invalid_argument("links: got a position with too many taps");
  }
  GraphArgs g = graph.args;
  g.example = pointer<const int64_t>(example, g.rows, "example");
  return g;
}

bool has_end(const GraphArgs& g) { return g.end.center != nullptr || g.end.dual != Dual::none; }

// out: the bounds, 0 without an input set; offset: b at the input, or 0.
void stage_rows(const Graph& graph, Address example, Address b, Address out, Address offset) {
  if (graph.empty()) return;
  GraphArgs g = with_examples(graph, example);
  g.b = pointer<const float>(b, g.rows, "b");
  g.end.out = at(out), g.offset = at(offset);
  if (has_end(g) != (out != 0))
    throw std::invalid_argument(out == 0 ? "out: got none, expected room for the bounds over the input set"
                                         : "out: got room for bounds, expected an input set with it");
  without_gil(kReleaseGilAbove + 1, [&] { bounds().stage_rows(g); });
}

// to_stages: (slopes, intercepts, rows that start there or 0) of each stage; to_weights: of each link, 0 but for
// convolutions. from_: of the bounds, or of b at the input without an input set; from_map: of the rows there, or 0.
void stage_grad(const Graph& graph, Address example, Address starts, Address from,
                const std::vector<std::array<Address, 3>>& to_stages, const std::vector<Address>& to_weights,
                Address to_center, Address to_radius, Address from_map) {
  if (graph.empty()) return;
  GraphGradArgs g;
  g.graph = with_examples(graph, example);
  if (g.graph.end.dual != Dual::none)
    throw std::invalid_argument("dual: got a ball, expected a box, or no input set and the gradient of the rows there");
  g.graph.starts = pointer<const int64_t>(starts, g.graph.rows, "starts");
  const size_t count = graph.stages.size();
  std::vector<GraphGradStage> to(count);
  std::vector<float*> weights(graph.links.size());
  if (to_stages.size() != count || to_weights.size() != weights.size())
    throw std::invalid_argument("to_stages: got another number than there are stages, or of weights than links");
  for (size_t i = 0; i < count; ++i) {
    to[i] = {at(to_stages[i][0]), at(to_stages[i][1]), at(to_stages[i][2])};
    const GraphStage& s = graph.stages[i];
    if ((s.links > 0 && s.kept_in == nullptr) || (i + 1 < count && s.kept_out == nullptr))
      throw std::invalid_argument("stages: got nothing kept, expected what the way down keeps");
    if (i + 1 < count && (to[i].to_slopes == nullptr || to[i].to_intercepts == nullptr))
      throw std::invalid_argument("to_stages: got no room for lines, expected it for all but the last");
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    weights[i] = at(to_weights[i]);
    if (graph.links[i].kind == LinkKind::conv && weights[i] == nullptr)
      throw std::invalid_argument("to_weights: got none of a convolution");
  }
  g.stages = to.data(), g.to_weights = weights.data();
  g.from = pointer<const float>(from, g.graph.rows, "from");
  g.from_map = at<const float>(from_map);
  g.to_center = at(to_center), g.to_radius = at(to_radius);
  without_gil(kReleaseGilAbove + 1, [&] { bounds().stage_grad(g); });
}

}  // namespace

void bind_bounds_graph(py::module_& m) {
  using py::arg;
  const Pair one{1, 1}, none{0, 0};
  // module_local: a second module, of the same kernels for tests, may be loaded beside this one
  py::enum_<LinkKind>(m, "LinkKind", py::module_local())
      .value("identity", LinkKind::identity)
      .value("conv", LinkKind::conv)
      .value("pick", LinkKind::pick);
  py::class_<GraphLink>(m, "GraphLink", py::module_local())
      .def(py::init(&make_link), arg("source"), arg("kind"), arg("sign") = 1.f, arg("weight") = Address{0},
           arg("kernel") = one, arg("stride") = one, arg("padding") = none, arg("dilation") = one,
           arg("groups") = int64_t{1}, arg("lanes") = int64_t{0}, arg("index") = Address{0})
      .def_readonly("kind", &GraphLink::kind)
      .def_readonly("lanes", &GraphLink::lanes);
  py::class_<GraphStage>(m, "GraphStage", py::module_local())
      .def(py::init(&make_stage), arg("map"), arg("first"), arg("links"), arg("slopes") = Address{0},
           arg("slope_sides") = 1, arg("intercepts") = Address{0}, arg("shared") = false, arg("entry") = -1,
           arg("kept_in") = Address{0}, arg("kept_out") = Address{0})
      .def_readonly("slope_sides", &GraphStage::slope_sides)
      .def_readonly("shared", &GraphStage::shared)
      .def_readonly("entry", &GraphStage::entry);
  py::class_<GraphEntry>(m, "GraphEntry", py::module_local())
      .def(py::init(&make_entry), arg("a"), arg("side_stride") = int64_t{0}, arg("pick") = Address{0},
           arg("minus") = Address{0});
  py::class_<Graph>(m, "Graph", py::module_local())
      .def(py::init<std::vector<GraphStage>, std::vector<GraphLink>, std::vector<GraphEntry>, int64_t, int64_t, int,
                    Address, Address, Address, Address, int>(),
           arg("stages"), arg("links"), arg("entries"), arg("examples"), arg("rows"), arg("sides"),
           arg("center") = Address{0}, arg("radius") = Address{0}, arg("x") = Address{0}, arg("eps") = Address{0},
           arg("dual") = 0);
  py::class_<Groups>(m, "Groups", py::module_local())
      .def(py::init([](int64_t count, Address starts, Address order, Address example, Address y, Address x,
                       Address channel,
                       int64_t channels) { return Groups{count, starts, order, example, y, x, channel, channels}; }),
           arg("count"), arg("starts"), arg("order"), arg("example"), arg("y") = Address{0}, arg("x") = Address{0},
           arg("channel") = Address{0}, arg("channels") = int64_t{0});
  m.def("bounds_live_graph", &live_graph, arg("graph"), arg("groups"), arg("b"), arg("out"), arg("map") = Address{0},
        arg("offset") = Address{0}, arg("window") = none, arg("corner_y") = Address{0}, arg("corner_x") = Address{0});
  m.def("bounds_live_graph_window", &live_graph_window, arg("graph"), arg("groups"));
  m.def("bounds_stage_rows", &stage_rows, arg("graph"), arg("example"), arg("b"), arg("out"),
        arg("offset") = Address{0});
  m.def("bounds_stage_grad", &stage_grad, arg("graph"), arg("example"), arg("starts"), arg("from_"), arg("to_stages"),
        arg("to_weights"), arg("to_center"), arg("to_radius"), arg("from_map") = Address{0});
}

}  // namespace fastrobust
