// Python bindings of the binary family: raw addresses in, kernels launched on the CPU or on a CUDA stream.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>

#include "binary/kernels.h"

namespace py = pybind11;

namespace fastrobust {
namespace {

using Address = uintptr_t;

template <class T>
T* as(Address address) {
  return reinterpret_cast<T*>(address);
}

// A fake or meta tensor has address 0: it must never reach a kernel.
void require(Address address, int64_t count, const char* name) {
  if (address == 0 && count > 0) throw std::invalid_argument(std::string(name) + ": the tensor has no storage");
}

void gather(Address x, Address out, Address ptr, Address offsets, int64_t rows, int64_t segments, int64_t entries,
            int64_t blocks, int64_t x_block, int64_t x_origin, int64_t out_block, int64_t out_origin, int64_t out_plane,
            int64_t height, int64_t width, int64_t pitch, int64_t lanes, Address scale, Address shift, Address post,
            Address residual, Address gate, Address pre, int64_t channels, bool relu) {
  const int64_t size = blocks * rows * height * width;
  require(x, size * entries, "x");
  require(out, size, "out");
  require(ptr, 1, "ptr");
  require(offsets, entries, "offsets");
  GatherArgs a;
  a.x = as<const float>(x);
  a.out = as<float>(out);
  a.ptr = as<const int32_t>(ptr);
  a.offsets = as<const int32_t>(offsets);
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
  py::gil_scoped_release unlocked;
  binary().gather(a);
}

// lanes, block, channel, row, col, phase, phases_h, phases_w, origin
using LayoutTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int, int, int64_t>;

Layout layout(const LayoutTuple& t) {
  Layout l;
  std::tie(l.lanes, l.block, l.channel, l.row, l.col, l.phase, l.phases_h, l.phases_w, l.origin) = t;
  return l;
}

void relayout(Address src, Address dst, const LayoutTuple& from, const LayoutTuple& to, int64_t batch,
              int64_t channels, int64_t height, int64_t width, int64_t plane) {
  require(src, batch * channels * height * width, "src");
  require(dst, batch * channels * height * width, "dst");
  const RelayoutArgs a{as<const float>(src), as<float>(dst), layout(from), layout(to), batch, channels, height, width,
                       plane};
  py::gil_scoped_release unlocked;
  binary().relayout(a);
}

void plan(Address ptr, Address index, int64_t kept, const std::array<int64_t, 5>& shape,
          const std::array<int64_t, 6>& geometry, bool transposed, int64_t lanes, int64_t plane, int64_t pitch,
          int64_t segment, Address out_ptr, Address offsets) {
  require(ptr, 1, "ptr");
  require(index, kept, "index");
  require(out_ptr, 1, "out_ptr");
  require(offsets, kept, "offsets");
  PlanArgs a;
  a.ptr = as<const int32_t>(ptr);
  a.index = as<const int32_t>(index);
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
  a.out_ptr = as<int32_t>(out_ptr);
  a.offsets = as<int32_t>(offsets);
  bool fits;
  {
    py::gil_scoped_release unlocked;
    fits = binary().plan(a);
  }
  if (!fits) throw std::invalid_argument("x: one group of images is too large for 32-bit offsets; expected a smaller map");
}

void pack(Address weight, int64_t rows, int64_t row_size, Address ptr, Address index, bool counting) {
  require(weight, rows * row_size, "weight");
  require(ptr, 1, "ptr");
  const PackArgs a{as<const float>(weight), rows, row_size, as<int32_t>(ptr), counting ? nullptr : as<int32_t>(index)};
  py::gil_scoped_release unlocked;
  binary().pack(a);
}

// False when a score is not finite; the mask is then untouched.
bool topk(Address scores, Address mask, int64_t n, int64_t keep) {
  require(scores, n, "scores");
  require(mask, n, "mask");
  int32_t bad = 0;
  TopkArgs a;
  a.scores = as<const float>(scores);
  a.mask = as<uint8_t>(mask);
  a.n = n;
  a.keep = keep;
  a.bad = &bad;
  py::gil_scoped_release unlocked;
  binary().topk(a);
  return bad == 0;
}

}  // namespace

void bind_binary(py::module_& m) {
  m.def("binary_gather", &gather);
  m.def("binary_relayout", &relayout);
  m.def("binary_plan", &plan);
  m.def("binary_pack", &pack);
  m.def("binary_topk", &topk);
}

}  // namespace fastrobust
