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

// What a network applies to single values. Members of enum: the codes of python's ops/binary/_activation.py.
enum class ActKind : int32_t {
  none,
  relu,
  leaky_relu,  // a: slope below zero
  hardtanh,    // a, b: least and largest value
  silu,
  gelu,
  gelu_tanh,
  hardswish,
  elu,  // a: alpha
  tanh,
  sigmoid,
  hardsigmoid,
  softplus,  // a: beta, b: threshold
  mish,
};
constexpr int32_t kActKinds = 14;

struct Act {
  ActKind kind = ActKind::none;
  float a = 0.f, b = 0.f;
};

// What is applied to a sum before it is written, once:
//   v = sum * scale[channel] + shift[channel] + residual;  slopes = act'(v);  v = act(v);  v = v * (what gate tells);
//   pre = v;  out = v * post[channel]
// gate holds derivatives of gate_act, as slopes does; or, where they are 1 on one side and a constant >= 0 elsewhere,
// its results or arguments. On the CPU the sides of such an activation may be kept as bits, one for each of sixteen
// floats of the run of an output plane, in [blocks, rows, out_plane / 16]: `passed` is written (of act), `open` is read
// in place of gate.
struct Epilogue {
  const float* scale = nullptr;     // [channels] or null
  const float* shift = nullptr;     // [channels] or null
  const float* post = nullptr;      // [channels] or null
  const float* residual = nullptr;  // laid out as out, or null
  const float* gate = nullptr;      // laid out as out, or null
  float* pre = nullptr;             // laid out as out, or null
  float* slopes = nullptr;          // laid out as out, or null
  uint16_t* passed = nullptr;
  const uint16_t* open = nullptr;
  int64_t channels = 1;  // row r is channel r mod channels
  Act act, gate_act;
};

// out[row][i] = epilogue(sum over the plus list of x[offset + i] - sum over the minus list), i over a contiguous run.
// List (segment s, row r) adds offsets[ptr[2 (s rows + r)] ...] and subtracts offsets[ptr[2 (s rows + r) + 1] ...];
// the sum runs over the segments in order, in each over the plus list and then over the minus list. With `values`,
// entry e adds values[e] x[offsets[e] + i], the product rounded by itself; the minus lists are then empty.
// With `order`, on the CPU and where a row is one pixel of one image: lists of sixteen rows side by side, one a row in
// the order of its sum. Slice s holds rows order[16 s ...], -1 for none; number e of its row i is entry 16 (ptr[s] + e)
// + i, which has the value 0 where that row has ended.
struct GatherArgs {
  const float* x = nullptr;
  float* out = nullptr;
  const int32_t* ptr = nullptr;
  const int32_t* offsets = nullptr;
  const float* values = nullptr;   // [entries] or null: signs
  const int32_t* order = nullptr;  // [16 slices] or null
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
  const float* values = nullptr;     // [entries] or null, as in GatherArgs
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

// Max pooling between fast layouts of the same lanes without phases: out = the largest pixel of the window, NaN if
// there is one, and where = ky kernel_w + kx of the pixel taken: the first of the largest, the last NaN. Of the
// gradient: x is that of the output, out that of the input: the sum over the windows that took the pixel, in ascending
// order.
struct PoolArgs {
  const float* x = nullptr;
  float* out = nullptr;
  uint8_t* where = nullptr;  // one for each float of the pool's output, or null
  Layout from, to;           // of the pool's input and output
  int64_t batch = 0, channels = 0;
  int64_t in_h = 0, in_w = 0, out_h = 0, out_w = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  int64_t plane = 0;  // as in RelayoutArgs, of what is written
};

// Index lists of a weight to offsets into a fast layout (see build_plan in plan_cpu.cpp).
struct PlanArgs {
  const int32_t* ptr = nullptr;    // [2 K + 1]
  const int32_t* index = nullptr;  // [kept]
  const float* values = nullptr;   // [kept] or null
  int64_t out_channels = 0, in_channels = 0, kernel_h = 1, kernel_w = 1, groups = 1;
  int64_t stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0, dilation_h = 1, dilation_w = 1;
  bool transposed = false;  // the input gradient
  // of the layout that is read
  int64_t lanes = 1, plane = 0, pitch = 0;
  int64_t segment = 0;          // channels read per segment, 0: one segment
  int32_t* out_ptr = nullptr;   // [2 segments rows + 1]
  int32_t* offsets = nullptr;   // [kept]
  uint16_t* taps = nullptr;     // [kept] or null: the pixel of the kernel that each offset stands for
  float* out_values = nullptr;  // [kept] or null: the value of each offset
};

struct TopkArgs {
  const float* scores = nullptr;
  uint8_t* mask = nullptr;
  int64_t n = 0, keep = 0;
  int32_t* bad = nullptr;         // set to 1 if a score is not finite
  uint32_t* workspace = nullptr;  // CUDA
};

// What the entries of a weight are: its lists have values where they are not all in {-1, 0, 1}.
enum class Entries : int { signs, real, not_finite };

struct PackArgs {
  const float* weight = nullptr;  // [rows, row_size]
  int64_t rows = 0, row_size = 0;
  int32_t* ptr = nullptr;    // [2 rows + 1]
  int32_t* index = nullptr;  // [kept]; null: only ptr is written
  float* values = nullptr;   // [kept] of a real weight, null of signs
};

// A mask of `kept` of n entries and its code of `size` bytes.
struct CodeArgs {
  uint8_t* mask = nullptr;
  int64_t n = 0, kept = 0;
  uint8_t* bytes = nullptr;
  int64_t size = 0;
};

}  // namespace fastrobust
