// Arguments of the binary family, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

namespace fastrobust {

// Where element (n, c, y, x) of a batch of feature maps lies. Plain tensors and the fast layout are two cases.
//
// The fast layout stores `lanes` images interleaved, [blocks, phases, channels, plane], a plane being
// [zeros][rows of `row` = pitch * lanes floats][zeros]. The columns from the width to the pitch are zero and serve as
// the right border of their row and the left border of the next one, so a convolution of stride 1 is a sum of shifted
// contiguous runs. A stride s > 1 becomes stride 1 on s * s phases: pixel (y, x) lies in phase (y mod s, x mod s).
struct Layout {
  int64_t lanes = 1;  // images side by side
  int64_t block = 0;  // floats from one group of `lanes` images to the next
  int64_t channel = 0, row = 0, col = 0;
  int64_t phase = 0;  // floats from one phase to the next
  int phases_h = 1, phases_w = 1;
  int64_t origin = 0;  // of pixel (0, 0)
};

struct RelayoutArgs {
  const float* src = nullptr;
  float* dst = nullptr;
  Layout from, to;
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  // Of a destination in the fast layout: its planes are filled whole, the borders with zeros. 0: only pixels are
  // written.
  int64_t plane = 0;
};

// What is applied to a sum before it is written, once:
//   v = sum * scale[channel] + shift[channel] + residual;  relu;  v = gate > 0 ? v : 0;  pre = v;  out = v *
//   post[channel]
// On the CPU the sides of a ReLU may be kept as bits, one for each of sixteen floats of the run of an output plane, in
// [blocks, rows, out_plane / 16]: `passed` is written (v > 0), `open` is read in place of gate.
struct Epilogue {
  const float* scale = nullptr;     // [channels] or null
  const float* shift = nullptr;     // [channels] or null
  const float* post = nullptr;      // [channels] or null
  const float* residual = nullptr;  // laid out as out, or null
  const float* gate = nullptr;      // laid out as out, or null
  float* pre = nullptr;             // laid out as out, or null
  uint16_t* passed = nullptr;
  const uint16_t* open = nullptr;
  int64_t channels = 1;  // row r is channel r mod channels
  bool relu = false;
};

// out[row][i] = epilogue(sum over the plus list of x[offset + i] - sum over the minus list), i over a contiguous run.
// List (segment s, row r) adds offsets[ptr[2 (s rows + r)] ...] and subtracts offsets[ptr[2 (s rows + r) + 1] ...];
// the sum runs over the segments in order, in each over the plus list and then over the minus list.
struct GatherArgs {
  const float* x = nullptr;
  float* out = nullptr;
  const int32_t* ptr = nullptr;
  const int32_t* offsets = nullptr;
  int64_t rows = 0, segments = 1, entries = 0;
  int64_t depth = 0;                  // channels read per segment
  int64_t blocks = 0;                 // groups of `lanes` images
  int64_t x_block = 0, x_origin = 0;  // floats
  int64_t out_block = 0, out_origin = 0, out_plane = 0;
  int64_t height = 0, width = 0, pitch = 0, lanes = 1;  // of the output
  // Of what is read, where a vector is a pixel of sixteen images: outputs may read every second pixel of every second
  // line.
  int64_t x_pitch = 0, x_stride = 1;
  bool borders = true;  // false: what lies before and after the run of an output plane is zero already
  Epilogue epilogue;
};

// The same sums from plain contiguous (N, C, H, W) tensors to such, on the CPU, for convolutions whose outputs are as
// wide as the phases of their inputs: then output p of a map reads input p + shift of a phase, whatever the tap, or
// nothing. Which of sixteen outputs read something is `masks[tap * vectors + p / 16]`, bit p % 16. With a stride, the
// phases that are read are written apart first, image by image.
struct DirectArgs {
  const float* x = nullptr;
  float* out = nullptr;
  const int32_t* ptr = nullptr;      // lists as in GatherArgs, into [phase][channel][phase_height][phase_width]
  const int32_t* offsets = nullptr;  // [entries]
  const uint16_t* taps = nullptr;    // [entries]
  const uint16_t* masks = nullptr;   // [tap_count, vectors]
  int64_t rows = 0, segments = 1, entries = 0, tap_count = 0;
  int64_t batch = 0, x_block = 0;  // floats from one image to the next
  int64_t channels = 0, in_height = 0, in_width = 0, stride_h = 1, stride_w = 1;
  uint64_t phases = 1;              // bit y stride_w + x: phase (y, x) is read
  int64_t height = 0, width = 0;    // of the output
  const float* scale = nullptr;     // [rows] or null
  const float* shift = nullptr;     // [rows] or null
  const float* residual = nullptr;  // laid out as out, or null
  bool relu = false;
};

// Index lists of a weight to offsets into a fast layout (see build_plan in plan_cpu.cpp).
struct PlanArgs {
  const int32_t* ptr = nullptr;    // [2 K + 1]
  const int32_t* index = nullptr;  // [kept]
  int64_t out_channels = 0, in_channels = 0, kernel_h = 1, kernel_w = 1, groups = 1;
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  bool transposed = false;  // the input gradient
  // of the layout that is read
  int64_t lanes = 1, plane = 0, pitch = 0;
  int64_t segment = 0;         // channels read per segment, 0: one segment
  int32_t* out_ptr = nullptr;  // [2 segments rows + 1]
  int32_t* offsets = nullptr;  // [kept]
  uint16_t* taps = nullptr;    // [kept] or null: the pixel of the kernel that each offset stands for
};

struct TopkArgs {
  const float* scores = nullptr;
  uint8_t* mask = nullptr;
  int64_t n = 0, keep = 0;
  int32_t* bad = nullptr;         // set to 1 if a score is not finite
  uint32_t* workspace = nullptr;  // CUDA
};

struct PackArgs {
  const float* weight = nullptr;  // [rows, row_size]
  int64_t rows = 0, row_size = 0;
  int32_t* ptr = nullptr;    // [2 rows + 1]
  int32_t* index = nullptr;  // [kept]; null: only ptr is written
};

// A mask of `kept` of n entries and its code of `size` bytes.
struct CodeArgs {
  uint8_t* mask = nullptr;
  int64_t n = 0, kept = 0;
  uint8_t* bytes = nullptr;
  int64_t size = 0;
};

}  // namespace fastrobust
