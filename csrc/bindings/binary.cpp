// Python bindings of the binary family: raw addresses in, kernels launched on the CPU or on a CUDA stream.
#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "binary/kernels.h"
#include "bindings/bindings.h"
#include "runtime/device.h"
#include "runtime/pages.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

using Address = uintptr_t;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

[[maybe_unused]] void no_cuda() {
  throw std::runtime_error("fastrobust was built without CUDA kernels; rebuild with nvcc on PATH (FASTROBUST_CUDA=ON)");
}

// device < 0 is the CPU.
void launch(int device, Address stream, const GatherArgs& a) {
  if (device < 0) {
    binary().gather(a);
    return;
  }
  if (a.order != nullptr) throw std::invalid_argument("order: expected the CPU, got device " + std::to_string(device));
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  gather_cuda(a, as<void>(stream));
#else
  (void)stream;
  no_cuda();
#endif
}

void launch(int device, Address stream, const RelayoutArgs& a) {
  if (a.batch * a.channels * a.height * a.width == 0) return;
  if (device < 0) {
    binary().relayout(a);
    return;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  relayout_cuda(a, as<void>(stream));
#else
  (void)stream;
  no_cuda();
#endif
}

void launch(int device, Address, const DirectArgs& a) {
  if (device >= 0) throw std::invalid_argument("direct: expected the CPU, got device " + std::to_string(device));
  binary().direct(a);
}

// What only the lists and the layouts decide: ptr, offsets, rows, segments, entries, blocks, x_block, x_origin,
// out_block, out_origin, out_plane, height, width, pitch, lanes, depth, x_pitch, x_stride, values, order
using GatherShape = std::array<int64_t, 20>;

// kind, a, b
using ActTuple = std::tuple<int32_t, float, float>;

Act act_of(const ActTuple& t, const char* name, bool sided) {
  const auto [kind, a, b] = t;
  if (kind < 0 || kind >= kActKinds)
    throw std::invalid_argument(std::string(name) + ": got kind " + std::to_string(kind) + ", expected 0 to " +
                                std::to_string(kActKinds - 1));
  const Act act{static_cast<ActKind>(kind), a, b};
  if (sided && act.kind != ActKind::relu && act.kind != ActKind::leaky_relu && act.kind != ActKind::hardtanh)
    throw std::invalid_argument(std::string(name) + ": got kind " + std::to_string(kind) +
                                " with bits of its sides, expected relu, leaky_relu or hardtanh");
  return act;
}

GatherArgs gather_args(Address x, Address out, const GatherShape& shape, Address scale, Address shift, Address post,
                       Address residual, Address gate, Address pre, Address passed, Address open, Address slopes,
                       int64_t channels, const ActTuple& act, const ActTuple& gate_act, bool borders) {
  GatherArgs a;
  a.rows = shape[2];
  a.segments = shape[3];
  a.entries = shape[4];
  a.blocks = shape[5];
  a.x_block = shape[6];
  a.x_origin = shape[7];
  a.out_block = shape[8];
  a.out_origin = shape[9];
  a.out_plane = shape[10];
  a.height = shape[11];
  a.width = shape[12];
  a.pitch = shape[13];
  a.lanes = shape[14];
  a.depth = shape[15];
  a.x_pitch = shape[16];
  a.x_stride = shape[17];
  if (a.x_stride != 1 && (a.x_stride != 2 || a.lanes != 16))
    throw std::invalid_argument("x_stride: expected 1, or 2 with sixteen lanes, got " + std::to_string(a.x_stride));
  const int64_t size = a.blocks * a.rows * a.height * a.width;
  a.x = pointer<const float>(x, size * a.entries, "x");
  a.out = pointer<float>(out, size, "out");
  a.ptr = pointer<const int32_t>(static_cast<Address>(shape[0]), 1, "ptr");
  a.offsets = pointer<const int32_t>(static_cast<Address>(shape[1]), a.entries, "offsets");
  a.values = as<const float>(static_cast<Address>(shape[18]));
  a.order = as<const int32_t>(static_cast<Address>(shape[19]));
  if (a.order != nullptr && (a.values == nullptr || a.segments != 1 || a.lanes != 1 || a.height * a.width > 1))
    throw std::invalid_argument("order: expected one pixel of one image and values, got " + std::to_string(a.lanes) +
                                " lanes of " + std::to_string(a.height) + "x" + std::to_string(a.width));
  a.borders = borders;
  a.epilogue.scale = as<const float>(scale);
  a.epilogue.shift = as<const float>(shift);
  a.epilogue.post = as<const float>(post);
  a.epilogue.residual = as<const float>(residual);
  a.epilogue.gate = as<const float>(gate);
  a.epilogue.pre = as<float>(pre);
  a.epilogue.passed = as<uint16_t>(passed);
  a.epilogue.open = as<const uint16_t>(open);
  a.epilogue.channels = channels;
  a.epilogue.slopes = as<float>(slopes);
  a.epilogue.act = act_of(act, "act", passed != 0);
  a.epilogue.gate_act = act_of(gate_act, "gate_act", open != 0);
  return a;
}

void gather(int device, Address stream, Address x, Address out, const GatherShape& shape, Address scale, Address shift,
            Address post, Address residual, Address gate, Address pre, Address slopes, int64_t channels,
            const ActTuple& act, const ActTuple& gate_act) {
  const GatherArgs a =
      gather_args(x, out, shape, scale, shift, post, residual, gate, pre, 0, 0, slopes, channels, act, gate_act, true);
  without_gil(a.blocks * a.rows * a.height * a.width, [&] { launch(device, stream, a); });
}

// ptr, offsets, taps, masks, rows, segments, entries, tap_count, batch, x_block, channels, in_height, in_width,
// stride_h, stride_w, phases, height, width, values
using DirectShape = std::array<int64_t, 19>;

DirectArgs direct_args(Address x, Address out, const DirectShape& shape, Address scale, Address shift, Address residual,
                       bool relu) {
  DirectArgs a;
  a.rows = shape[4];
  a.segments = shape[5];
  a.entries = shape[6];
  a.tap_count = shape[7];
  a.batch = shape[8];
  a.x_block = shape[9];
  a.channels = shape[10];
  a.in_height = shape[11];
  a.in_width = shape[12];
  a.stride_h = shape[13];
  a.stride_w = shape[14];
  a.phases = static_cast<uint64_t>(shape[15]);
  a.height = shape[16];
  a.width = shape[17];
  const int64_t size = a.batch * a.rows * a.height * a.width;
  a.x = pointer<const float>(x, size * a.entries, "x");
  a.out = pointer<float>(out, size, "out");
  a.ptr = pointer<const int32_t>(static_cast<Address>(shape[0]), 1, "ptr");
  a.offsets = pointer<const int32_t>(static_cast<Address>(shape[1]), a.entries, "offsets");
  a.values = as<const float>(static_cast<Address>(shape[18]));
  a.taps = pointer<const uint16_t>(static_cast<Address>(shape[2]), a.entries, "taps");
  a.masks = pointer<const uint16_t>(static_cast<Address>(shape[3]), size, "masks");
  a.scale = as<const float>(scale);
  a.shift = as<const float>(shift);
  a.residual = as<const float>(residual);
  a.relu = relu;
  return a;
}

// lanes, block, channel, row, col, phase, phases_h, phases_w, origin
using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int64_t>;

Layout layout(const LayoutTuple& t) {
  Layout l;
  std::tie(l.lanes, l.block, l.channel, l.row, l.col, l.phase, l.phases_h, l.phases_w, l.origin) = t;
  return l;
}

RelayoutArgs relayout_args(Address src, Address dst, const LayoutTuple& from, const LayoutTuple& to, int64_t batch,
                           int64_t channels, int64_t height, int64_t width, int64_t plane) {
  const int64_t size = batch * channels * height * width;
  return {pointer<const float>(src, size, "src"),
          pointer<float>(dst, size, "dst"),
          layout(from),
          layout(to),
          batch,
          channels,
          height,
          width,
          plane};
}

void relayout(int device, Address stream, Address src, Address dst, const LayoutTuple& from, const LayoutTuple& to,
              int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t plane) {
  const RelayoutArgs a = relayout_args(src, dst, from, to, batch, channels, height, width, plane);
  without_gil(batch * channels * height * width, [&] { launch(device, stream, a); });
}

// kernel, stride, padding, dilation, each by dimension
using PoolWindow = std::array<int64_t, 8>;

// sizes: of the pool's input and output.
PoolArgs pool_args(Address x, Address out, Address where, const LayoutTuple& from, const LayoutTuple& to, int64_t batch,
                   int64_t channels, const std::array<int64_t, 4>& sizes, const PoolWindow& window, int64_t plane) {
  PoolArgs a;
  a.from = layout(from);
  a.to = layout(to);
  for (const Layout* l : {&a.from, &a.to})
    if (l->lanes != a.from.lanes || l->col != l->lanes || l->lanes < 1 || 16 % l->lanes != 0 ||
        l->phases_h * l->phases_w != 1)
      throw std::invalid_argument("max_pool: got layouts of " + std::to_string(a.from.lanes) + " and " +
                                  std::to_string(a.to.lanes) +
                                  " lanes, expected equally many, 1, 2, 4, 8 or 16, without phases");
  a.batch = batch;
  a.channels = channels;
  std::tie(a.in_h, a.in_w, a.out_h, a.out_w) = std::tie(sizes[0], sizes[1], sizes[2], sizes[3]);
  std::tie(a.kernel_h, a.kernel_w, a.stride_h, a.stride_w) = std::tie(window[0], window[1], window[2], window[3]);
  std::tie(a.pad_h, a.pad_w, a.dilation_h, a.dilation_w) = std::tie(window[4], window[5], window[6], window[7]);
  if (std::min({a.kernel_h, a.kernel_w, a.stride_h, a.stride_w, a.dilation_h, a.dilation_w}) < 1 ||
      std::min(a.pad_h, a.pad_w) < 0 || (where != 0 && a.kernel_h * a.kernel_w > 255))
    throw std::invalid_argument("max_pool: got a window of " + std::to_string(a.kernel_h) + " x " +
                                std::to_string(a.kernel_w) +
                                ", expected positive sizes, and at most 255 pixels where a gradient is wanted");
  const int64_t size = batch * channels;
  a.x = pointer<const float>(x, size, "x");
  a.out = pointer<float>(out, size, "out");
  a.where = as<uint8_t>(where);
  a.plane = plane;
  return a;
}

struct PoolGradArgs : PoolArgs {};

void launch(int device, Address stream, const PoolArgs& a) {
  if (a.batch * a.channels * a.in_h * a.in_w * a.out_h * a.out_w == 0) return;
  if (device < 0) {
    binary().max_pool(a);
    return;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  max_pool_cuda(a, as<void>(stream));
#else
  (void)stream;
  no_cuda();
#endif
}

void launch(int device, Address stream, const PoolGradArgs& a) {
  if (a.batch * a.channels * a.in_h * a.in_w * a.out_h * a.out_w == 0) return;
  if (device < 0) {
    binary().max_pool_grad(a);
    return;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  max_pool_grad_cuda(a, as<void>(stream));
#else
  (void)stream;
  no_cuda();
#endif
}

// A sequence of gathers and copies that differs from run to run only in where its buffers lie, so that a network costs
// one call from Python. An address is absolute (weights, constants) or, with base b + 1 in its top byte, an offset into
// the b-th of the bases that `run` is given.
class Program {
 public:
  void gather(Address x, Address out, const GatherShape& shape, Address scale, Address shift, Address post,
              Address residual, Address gate, Address pre, Address passed, Address open, Address slopes,
              int64_t channels, const ActTuple& act, const ActTuple& gate_act, bool borders) {
    steps_.emplace_back(gather_args(x, out, shape, scale, shift, post, residual, gate, pre, passed, open, slopes,
                                    channels, act, gate_act, borders));
  }

  void direct(Address x, Address out, const DirectShape& shape, Address scale, Address shift, Address residual,
              bool relu) {
    steps_.emplace_back(direct_args(x, out, shape, scale, shift, residual, relu));
  }

  void relayout(Address src, Address dst, const LayoutTuple& from, const LayoutTuple& to, int64_t batch,
                int64_t channels, int64_t height, int64_t width, int64_t plane) {
    steps_.emplace_back(relayout_args(src, dst, from, to, batch, channels, height, width, plane));
  }

  void max_pool(Address x, Address out, Address where, const LayoutTuple& from, const LayoutTuple& to, int64_t batch,
                int64_t channels, const std::array<int64_t, 4>& sizes, const PoolWindow& window, int64_t plane) {
    steps_.emplace_back(pool_args(x, out, where, from, to, batch, channels, sizes, window, plane));
  }

  void max_pool_grad(Address grad, Address where, Address dx, const LayoutTuple& from, const LayoutTuple& to,
                     int64_t batch, int64_t channels, const std::array<int64_t, 4>& sizes, const PoolWindow& window,
                     int64_t plane) {
    pointer<const uint8_t>(where, batch * channels, "where");
    steps_.emplace_back(PoolGradArgs{pool_args(grad, dx, where, from, to, batch, channels, sizes, window, plane)});
  }

  void run(int device, Address stream, const std::vector<Address>& bases) const {
    py::gil_scoped_release release;
    for (const Step& step : steps_) std::visit([&](auto args) { launch(device, stream, place(args, bases)); }, step);
  }

 private:
  using Step = std::variant<GatherArgs, DirectArgs, RelayoutArgs, PoolArgs, PoolGradArgs>;

  template <class T>
  static void place(T*& p, const std::vector<Address>& bases) {
    const Address address = reinterpret_cast<Address>(p), base = address >> 56;
    if (base != 0) p = as<T>(bases.at(base - 1) + (address & ((Address{1} << 56) - 1)));
  }
  static GatherArgs place(GatherArgs a, const std::vector<Address>& bases) {
    place(a.x, bases);
    place(a.out, bases);
    place(a.epilogue.scale, bases);
    place(a.epilogue.shift, bases);
    place(a.epilogue.residual, bases);
    place(a.epilogue.gate, bases);
    place(a.epilogue.pre, bases);
    place(a.epilogue.passed, bases);
    place(a.epilogue.open, bases);
    place(a.epilogue.slopes, bases);
    return a;
  }
  static DirectArgs place(DirectArgs a, const std::vector<Address>& bases) {
    place(a.x, bases);
    place(a.out, bases);
    place(a.scale, bases);
    place(a.shift, bases);
    place(a.residual, bases);
    return a;
  }
  static RelayoutArgs place(RelayoutArgs a, const std::vector<Address>& bases) {
    place(a.src, bases);
    place(a.dst, bases);
    return a;
  }

  template <class Args, std::enable_if_t<std::is_base_of_v<PoolArgs, Args>, int> = 0>
  static Args place(Args a, const std::vector<Address>& bases) {
    place(a.x, bases);
    place(a.out, bases);
    place(a.where, bases);
    return a;
  }

  std::vector<Step> steps_;
};

void plan(Address ptr, Address index, int64_t kept, const std::array<int64_t, 5>& shape,
          const std::array<int64_t, 6>& geometry, bool transposed, int64_t lanes, int64_t plane, int64_t pitch,
          int64_t segment, Address out_ptr, Address offsets, Address taps, Address values, Address out_values) {
  PlanArgs a;
  a.ptr = pointer<const int32_t>(ptr, 1, "ptr");
  a.index = pointer<const int32_t>(index, kept, "index");
  a.out_channels = shape[0];
  a.in_channels = shape[1];
  a.kernel_h = shape[2];
  a.kernel_w = shape[3];
  a.groups = shape[4];
  a.stride_h = geometry[0];
  a.stride_w = geometry[1];
  a.pad_h = geometry[2];
  a.pad_w = geometry[3];
  a.dilation_h = geometry[4];
  a.dilation_w = geometry[5];
  a.transposed = transposed;
  a.lanes = lanes;
  a.plane = plane;
  a.pitch = pitch;
  a.segment = segment;
  a.out_ptr = pointer<int32_t>(out_ptr, 1, "out_ptr");
  a.offsets = pointer<int32_t>(offsets, kept, "offsets");
  a.taps = as<uint16_t>(taps);
  a.values = as<const float>(values);
  if (values != 0) a.out_values = pointer<float>(out_values, kept, "out_values");
  bool fits = false;
  without_gil(kept, [&] { fits = binary().plan(a); });
  if (!fits)
    throw std::invalid_argument("x: one group of images is too large for 32-bit offsets; expected a smaller map");
}

// Counts first, then the lists: their length is data, so this is for the CPU. Returns the number of an `Entries`.
int pack(Address weight, int64_t rows, int64_t row_size, Address ptr, Address index, Address values, bool counting) {
  const PackArgs a{pointer<const float>(weight, rows * row_size, "weight"),
                   rows,
                   row_size,
                   pointer<int32_t>(ptr, 1, "ptr"),
                   counting ? nullptr : as<int32_t>(index),
                   as<float>(values)};
  Entries entries = Entries::signs;
  without_gil(rows * row_size, [&] { entries = binary().pack(a); });
  return static_cast<int>(entries);
}

// CPU: returns false when a score is not finite, the mask is then untouched.
bool topk(int device, Address stream, Address scores, Address mask, int64_t n, int64_t keep, Address workspace) {
  int32_t bad = 0;
  TopkArgs a;
  a.scores = pointer<const float>(scores, n, "scores");
  a.mask = pointer<uint8_t>(mask, n, "mask");
  a.n = n;
  a.keep = keep;
  if (n == 0) return true;
  if (device < 0) {
    a.bad = &bad;
    without_gil(n, [&] { binary().topk(a); });
    return bad == 0;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  a.workspace = pointer<uint32_t>(workspace, 1, "workspace");
  topk_cuda(a, as<void>(stream));
#else
  (void)stream;
  (void)workspace;
  no_cuda();
#endif
  return true;
}

int64_t topk_workspace([[maybe_unused]] int64_t n) {
#if defined(FASTROBUST_HAS_CUDA)
  return topk_workspace_words(n);
#else
  return 0;
#endif
}

int64_t encode(Address mask, int64_t n, int64_t kept, Address bytes) {
  CodeArgs a{pointer<uint8_t>(mask, n, "mask"), n, kept, pointer<uint8_t>(bytes, 1, "bytes"), 0};
  int64_t size = 0;
  without_gil(n, [&] { size = binary().encode(a); });
  return size;
}

void decode(Address bytes, int64_t size, Address mask, int64_t n, int64_t kept) {
  CodeArgs a{pointer<uint8_t>(mask, n, "mask"), n, kept, pointer<uint8_t>(bytes, size, "bytes"), size};
  without_gil(n, [&] { binary().decode(a); });
}

}  // namespace

void bind_binary(py::module_& m) {
  py::class_<Program>(m, "BinaryProgram")
      .def(py::init<>())
      .def("gather", &Program::gather)
      .def("direct", &Program::direct)
      .def("relayout", &Program::relayout)
      .def("max_pool", &Program::max_pool)
      .def("max_pool_grad", &Program::max_pool_grad)
      .def("run", &Program::run);
  m.attr("huge_page") = kHugePage;
  m.def("prefer_huge_pages", &prefer_huge_pages);
  m.def("binary_strides", [] { return binary().strides; });
  m.def("binary_gather", &gather);
  m.def("binary_relayout", &relayout);
  m.def("binary_plan", &plan);
  m.def("binary_pack", &pack);
  m.def("binary_topk", &topk);
  m.def("binary_topk_workspace", &topk_workspace);
  m.def("binary_encode", &encode);
  m.def("binary_decode", &decode);
}

}  // namespace fastrobust
