// Python bindings of the binary family: raw addresses in, kernels launched on the CPU or on a CUDA stream.
#include <array>
#include <tuple>

#include "binary/kernels.h"
#include "bindings/bindings.h"
#include "runtime/device.h"

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
void gather(int device, Address stream, Address x, Address out, Address ptr, Address offsets, int64_t rows,
            int64_t segments, int64_t entries, int64_t blocks, int64_t x_block, int64_t x_origin, int64_t out_block,
            int64_t out_origin, int64_t out_plane, int64_t height, int64_t width, int64_t pitch, int64_t lanes,
            Address scale, Address shift, Address post, Address residual, Address gate, Address pre, int64_t channels,
            bool relu) {
  const int64_t size = blocks * rows * height * width;
  GatherArgs a;
  a.x = pointer<const float>(x, size * entries, "x");
  a.out = pointer<float>(out, size, "out");
  a.ptr = pointer<const int32_t>(ptr, 1, "ptr");
  a.offsets = pointer<const int32_t>(offsets, entries, "offsets");
  a.rows = rows;
  a.segments = segments;
  a.entries = entries;
  a.blocks = blocks;
  a.x_block = x_block;
  a.x_origin = x_origin;
  a.out_block = out_block;
  a.out_origin = out_origin;
  a.out_plane = out_plane;
  a.height = height;
  a.width = width;
  a.pitch = pitch;
  a.lanes = lanes;
  a.epilogue.scale = as<const float>(scale);
  a.epilogue.shift = as<const float>(shift);
  a.epilogue.post = as<const float>(post);
  a.epilogue.residual = as<const float>(residual);
  a.epilogue.gate = as<const float>(gate);
  a.epilogue.pre = as<float>(pre);
  a.epilogue.channels = channels;
  a.epilogue.relu = relu;
  if (device < 0) {
    without_gil(size, [&] { binary().gather(a); });
    return;
  }
#if defined(FASTROBUST_HAS_CUDA)
  const DeviceGuard guard(device);
  gather_cuda(a, as<void>(stream));
#else
  (void)stream;
  no_cuda();
#endif
}

// lanes, block, channel, row, col, phase, phases_h, phases_w, origin
using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int64_t>;

Layout layout(const LayoutTuple& t) {
  Layout l;
  std::tie(l.lanes, l.block, l.channel, l.row, l.col, l.phase, l.phases_h, l.phases_w, l.origin) = t;
  return l;
}

void relayout(int device, Address stream, Address src, Address dst, const LayoutTuple& from, const LayoutTuple& to,
              int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t plane) {
  const int64_t size = batch * channels * height * width;
  const RelayoutArgs a{pointer<const float>(src, size, "src"),
                       pointer<float>(dst, size, "dst"),
                       layout(from),
                       layout(to),
                       batch,
                       channels,
                       height,
                       width,
                       plane};
  if (size == 0) return;
  if (device < 0) {
    without_gil(size, [&] { binary().relayout(a); });
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

void plan(Address ptr, Address index, int64_t kept, const std::array<int64_t, 5>& shape,
          const std::array<int64_t, 6>& geometry, bool transposed, int64_t lanes, int64_t plane, int64_t pitch,
          int64_t segment, Address out_ptr, Address offsets) {
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
  bool fits = false;
  without_gil(kept, [&] { fits = binary().plan(a); });
  if (!fits)
    throw std::invalid_argument("x: one group of images is too large for 32-bit offsets; expected a smaller map");
}

// Counts first, then the lists: their length is data, so this is for the CPU. False for an entry not in {-1, 0, 1}.
bool pack(Address weight, int64_t rows, int64_t row_size, Address ptr, Address index, bool counting) {
  const PackArgs a{pointer<const float>(weight, rows * row_size, "weight"), rows, row_size,
                   pointer<int32_t>(ptr, 1, "ptr"), counting ? nullptr : as<int32_t>(index)};
  bool signs = true;
  without_gil(rows * row_size, [&] { signs = binary().pack(a); });
  return signs;
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

}  // namespace

void bind_binary(py::module_& m) {
  m.def("binary_gather", &gather);
  m.def("binary_relayout", &relayout);
  m.def("binary_plan", &plan);
  m.def("binary_pack", &pack);
  m.def("binary_topk", &topk);
  m.def("binary_topk_workspace", &topk_workspace);
}

}  // namespace fastrobust
