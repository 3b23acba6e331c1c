// Arguments of the bounds family, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

namespace fastrobust {

// R rows of coefficients. Each row is a window of `height` x `width` positions with `channels` numbers each, laid over
// a map of map_height x map_width positions of one example (channels innermost in both). A dense row is the whole map
// in one line.
struct Rows {
  const float* a = nullptr;           // [sides_a, rows of a, length]
  int64_t side_stride = 0;            // 0: one matrix serves both sides
  const int64_t* pick = nullptr;      // [count] row of `a`, or null: the row itself
  const int64_t* minus = nullptr;     // [count] row of `a` that is subtracted, or null: none
  const int64_t* example = nullptr;   // [count] row of the maps, or null: the row itself
  const int64_t* corner_y = nullptr;  // [count] upper left corner of the window, or null: 0
  const int64_t* corner_x = nullptr;
  int64_t count = 0, length = 0;  // length = height * width * channels
  int64_t height = 1, width = 0, channels = 1, map_height = 1, map_width = 0;
  int sides = 2;  // 2: lower and upper; 1: lower only
};

// A' = A times a line's slope by sign, b' = b + A times its intercept by sign. Outside the map A' is zero.
struct BackArgs {
  Rows rows;
  const float* slopes = nullptr;      // [slope_sides, examples, map]
  const float* intercepts = nullptr;  // [2, examples, map]
  int64_t examples = 0;
  int slope_sides = 1;
  const float* b = nullptr;  // [sides, count]
  float* b_out = nullptr;    // [sides, count]
  float* out = nullptr;      // [sides_out, count, length]
  int sides_out = 1;
};

enum class Dual : int { none, l1, l2, linf };  // the dual norm of the ball; none: box only
// out = b + the extreme of A x over a box, over a ball, or over their intersection.
struct ConcretizeArgs {
  Rows rows;
  const float* center = nullptr;  // [examples, map], null: no box
  const float* radius = nullptr;
  const float* x = nullptr;  // [examples, map], with dual != none
  const float* eps = nullptr;
  Dual dual = Dual::none;
  const float* b = nullptr;  // [sides, count]
  float* out = nullptr;      // [sides, count]
};

// Gradients of the two, from those of their results. Rows are visited example by example: those of example i are
// order[starts[i]], ..., order[starts[i + 1] - 1], or these numbers themselves without `order`. The gradients of the
// maps are added to what is there; those of the rows are written per row, before `pick` and `minus`.
struct BackGradArgs {
  Rows rows;
  const float* slopes = nullptr;
  const float* intercepts = nullptr;
  int64_t examples = 0;
  int slope_sides = 1, sides_out = 1;
  const float* from_out = nullptr;  // [sides_out, count, length]
  const float* from_b = nullptr;    // [sides, count]
  const int64_t* starts = nullptr;  // [examples + 1]
  const int64_t* order = nullptr;   // [count] or null
  float* to_a = nullptr;            // [matrices of rows, count, length]
  float* to_slopes = nullptr;       // [slope_sides, examples, map]
  float* to_intercepts = nullptr;   // [2, examples, map]
};
struct ConcretizeGradArgs {  // boxes only
  Rows rows;
  const float* center = nullptr;
  const float* radius = nullptr;
  int64_t examples = 0;
  const float* from = nullptr;  // [sides, count]
  const int64_t* starts = nullptr;
  const int64_t* order = nullptr;
  float* to_a = nullptr;
  float* to_center = nullptr;  // [examples, map], null: not wanted
  float* to_radius = nullptr;
};

// What an interval product returns: (c', r'); (c' - r', c' + r'); centre and radius of the ReLU of it.
enum class Finish : int { center, ends, relu_center };

// The adjoint of a convolution: [count, in_h, in_w, in_c] -> [count, out_h, out_w, out_c]. With groups a weight has the
// taps of one group's channels of the result.
constexpr int64_t kSpreadBuffer = 32768;  // the kernel's buffer: holds (in_w + 12) * lanes numbers
struct SpreadArgs {
  const float* a = nullptr;
  // [in_c, lanes], taps in order (ky, kx, channel), zero beyond kernel_h * kernel_w * out_c / groups; lanes % 16 == 0
  const float* weight = nullptr;
  float* out = nullptr;
  int64_t count = 0, in_h = 0, in_w = 0, in_c = 0, out_h = 0, out_w = 0, out_c = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_y = 1, stride_x = 1, pad_y = 0, pad_x = 0, lanes = 16;
  int64_t dilation_y = 1, dilation_x = 1, groups = 1;
};

// Rows at an activation of an image, through a chain of activation, convolution, activation, ..., convolution whose
// input is the network's, neurons without lines left out: out = the extremes over the input set.
struct ChainStep {
  const float* slopes = nullptr;  // as in BackArgs; the convolution's bias is in the intercepts
  const float* intercepts = nullptr;
  int slope_sides = 1;
  int64_t map_height = 0, map_width = 0, channels = 0;  // of the activation
  const float* weight = nullptr;                        // as in SpreadArgs
  int64_t out_height = 0, out_width = 0, out_channels = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_y = 1, stride_x = 1, pad_y = 0, pad_x = 0, lanes = 16;
  bool turned =
      false;  // the weight is [taps, channels] and lanes = channels, for all but the last step of a live chain
  float* kept = nullptr;  // [1 or 2, count, out map]: the rows below the convolution, for the gradients; or null
};
constexpr int64_t kMostLiveDense = 4096;  // neurons of the kernel of one dense layer
struct ChainArgs {
  Rows rows;
  const ChainStep* steps = nullptr;
  int count = 0;
  int64_t examples = 0;
  const float* b = nullptr;  // [sides, count]
  ConcretizeArgs end;        // box, ball and out; its rows and b are not used
  // Example by example as in BackGradArgs: whole maps, box or ball, and kernels of 64 lines at most. A dense layer is
  // the convolution of a map of one position whose kernel is the whole image.
  const int64_t* starts = nullptr;  // [examples + 1]
  const int64_t* order = nullptr;   // [count] or null
};

// Rows through any acyclic graph of activations and convolutions whose input is the network's, group by group: a group
// are rows of one example that need the same windows of every map. Stages are activations (or linear nodes, with their
// lines) in the order in which rows reach them, the network's input last; what a stage reads comes from earlier ones.
// Whole maps, a box or a ball.
// stage_rows takes the same with all neurons: rows of whole maps one after the other, `example` of each.
enum class LinkKind : int {
  identity,  // sign times the very coefficients
  conv,      // a convolution from this stage to the source, turned around
  pick,      // every neuron of the source follows one neuron of this stage (max pooling)
};
struct GraphLink {
  int source = -1;  // stage; -1: the rows themselves, unit vectors at the start
  LinkKind kind = LinkKind::conv;
  float sign = 1.f;  // of an identity
  // [kernel_h, kernel_w, channels of a group, channels of the source]; live_graph, of the last stage, but from the
  // start: [channels of the source, kernel_h, kernel_w, channels of a group]
  const float* weight = nullptr;
  // Of a convolution, and of the windows that a pick chooses from.
  int64_t kernel_h = 1, kernel_w = 1, stride_y = 1, stride_x = 1, pad_y = 0, pad_x = 0, dilation_y = 1, dilation_x = 1;
  int64_t groups = 1;
  int64_t lanes = 0;               // of stage_rows, whose weights are those of SpreadArgs
  const int32_t* index = nullptr;  // pick: [examples, map of the source], the number of the neuron of this stage
};
struct GraphStage {
  const float* slopes = nullptr;  // [slope_sides, examples, map]; null: the input
  const float* intercepts = nullptr;
  int slope_sides = 1;
  bool shared = false;  // one map for all examples
  int64_t map_height = 0, map_width = 0, channels = 0;
  int first = 0, links = 0;  // of GraphArgs::links
  int entry = -1;            // of GraphArgs::entries: rows that start here
  // stage_rows: [1 or 2, rows, map], what arrives (where there are links) and what leaves, for the gradients; or null
  float* kept_in = nullptr;
  float* kept_out = nullptr;

  int64_t numbers() const { return map_height * map_width * channels; }
};
struct GraphEntry {
  const float* a = nullptr;  // [sides_a, rows of a, map]
  int64_t side_stride = 0;
  const int64_t* pick = nullptr;  // as in Rows
  const int64_t* minus = nullptr;
};
struct GraphArgs {
  const GraphStage* stages = nullptr;
  const GraphLink* links = nullptr;
  const GraphEntry* entries = nullptr;
  int count = 0;
  int64_t examples = 0, rows = 0, groups = 0;
  int sides = 1;
  const int64_t* starts = nullptr;   // [groups + 1]: the rows of group i are starts[i], ..., starts[i + 1] - 1
  const int64_t* order = nullptr;    // [rows] or null: row i of the groups is row order[i] of the rest
  const int64_t* example = nullptr;  // [groups]
  const int64_t* y = nullptr;        // [groups], the position of the unit vectors; null: rows of whole maps
  const int64_t* x = nullptr;
  const int64_t* channel = nullptr;  // [rows], ascending within a group: of the unit vectors
  int64_t channels = 0;              // of their image
  const float* b = nullptr;          // [sides, rows]
  ConcretizeArgs end;                // box or ball, and out (live_graph: or null); its rows and b are not used
  // Or null: the linear bounds at the input, [1 or 2, rows, map] (of stage_rows they are what its last stage keeps) and
  // [sides, rows]. As many matrices as sides where any stage has two lines, or an entry two matrices. Without an input
  // set they are all that is wanted. live_graph: windows instead of maps where they have a size, at `map_y` and
  // `map_x`, [rows], which are written.
  float* map = nullptr;
  float* offset = nullptr;
  int64_t window_height = 0, window_width = 0;
  int64_t* map_y = nullptr;
  int64_t* map_x = nullptr;
};
struct WindowSize {
  int64_t height, width;
};

// Gradients of stage_rows from those of its result (over a box, or of `offset` without one) and of the rows at the
// input. graph: as it was taken down, with all that was kept, and `starts` [examples + 1] of the examples' rows. Of
// shared lines the gradients are those of all examples.
struct GraphGradStage {
  float* to_slopes = nullptr;      // [slope_sides, examples, map]
  float* to_intercepts = nullptr;  // [2, examples, map]
  float* to_a = nullptr;           // [1 or 2, rows, map]: of rows that start here; or null
};
struct GraphGradArgs {
  GraphArgs graph;
  const GraphGradStage* stages = nullptr;
  float* const* to_weights = nullptr;  // of each link, [channels of the source, lanes]
  const float* from = nullptr;         // [sides, rows]
  const float* from_map = nullptr;     // [1 or 2, rows, map] or null: of the rows at the input
  float* to_center = nullptr;          // [examples, map], null: not wanted
  float* to_radius = nullptr;
};

// Gradients of ChainArgs over whole images and a box, from those of its result. Rows are visited example by example, as
// in BackGradArgs.
constexpr int kMaxChain = 32;  // steps
struct ChainGradStep {
  ChainStep forward;
  float* to_slopes = nullptr;  // [slope_sides, examples, map]
  float* to_intercepts = nullptr;
  float* to_weight = nullptr;  // [channels, lanes], or null: not wanted
};
struct ChainGradArgs {
  Rows rows;
  const ChainGradStep* steps = nullptr;
  int count = 0;
  int64_t examples = 0;
  const float* center = nullptr;  // [examples, map]
  const float* radius = nullptr;
  const float* from = nullptr;      // [sides, count]
  const int64_t* starts = nullptr;  // [examples + 1]
  const int64_t* order = nullptr;   // [count] or null
  float* to_a = nullptr;            // [matrices of rows, count, length]
  float* to_center = nullptr;       // [examples, map], null: not wanted
  float* to_radius = nullptr;
  bool living =
      false;  // lines that are zero have no gradients (any numbers are returned), so their neurons can be left out
};

// The gradient of a convolution's weight: out[o][taps] = sum of a[o] * patch of x.
struct ConvGradArgs {
  const float* x = nullptr;  // [count, in_h, in_w, in_c]
  const float* a = nullptr;  // [count, out_h, out_w, out_c], the gradient of the convolution's result
  float* out = nullptr;      // [out_c, in_c / groups, kernel_h, kernel_w]
  // With the next, of w * x and |w| * radius: plus sign(weight) times the sum of radius_a[o] * patch of radius.
  const float* weight = nullptr;    // like out
  const float* radius = nullptr;    // [radius_count, in_h, in_w, in_c]
  const float* radius_a = nullptr;  // [radius_count, out_h, out_w, out_c]
  int64_t radius_count = 0;         // count, or 1: radius_a is summed over the examples
  int64_t count = 0, in_h = 0, in_w = 0, in_c = 0, out_h = 0, out_w = 0, out_c = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_y = 1, stride_x = 1, pad_y = 0, pad_x = 0;
  int64_t dilation_y = 1, dilation_x = 1, groups = 1;
};

// c' = w * c + b and r' = |w| * r for a convolution; c' alone without radius. Values in channels-last order.
struct IntervalConvArgs {
  const float* center = nullptr;  // [batch, in_h, in_w, in_c] at the strides below, in numbers
  const float* radius = nullptr;  // the same shape
  int64_t center_stride[4] = {};  // example, y, x, channel
  int64_t radius_stride[4] = {};  // 0 for the example: one radius for all
  const float* reach = nullptr;   // [out_h, out_w, out_c] instead of a radius: |w| * r, the same for every example
  const float* weight = nullptr;  // [out_c, in_c / groups, kernel_h, kernel_w]
  const float* bias = nullptr;    // [out_c] or null
  float* work = nullptr;          // interval_conv_work(...) numbers
  float* out_a = nullptr;         // [batch, out_h, out_w, out_c]
  float* out_b = nullptr;
  int64_t batch = 0, in_h = 0, in_w = 0, in_c = 0, out_h = 0, out_w = 0, out_c = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_y = 1, stride_x = 1, pad_y = 0, pad_x = 0;
  int64_t dilation_y = 1, dilation_x = 1, groups = 1;
  int64_t out_apart = 0;  // numbers from one position of the results to the next; 0: out_c
  Finish finish = Finish::ends;
};

// c' = W c + b, r' = |W| r in one read of W.
struct IntervalArgs {
  const float* center = nullptr;  // [batch, n]
  const float* radius = nullptr;
  const float* weight = nullptr;  // [m, n]
  const float* bias = nullptr;    // [m] or null
  float* out_a = nullptr;         // [batch, m]
  float* out_b = nullptr;
  int64_t batch = 0, n = 0, m = 0;
  bool shared = false;  // radius is [n], the same for every example
  Finish finish = Finish::ends;
};

// The gradient of a matrix whose rows are picked: out[pick[i]] += from[i], out[minus[i]] -= from[i].
struct PickGradArgs {
  const float* from = nullptr;     // [count, length]
  const int64_t* pick = nullptr;   // [count]
  const int64_t* minus = nullptr;  // [count] or null
  float* out = nullptr;            // [rows, length]
  int64_t count = 0, length = 0, rows = 0;
};

// Gradients of rows (A times a line's slope by sign) W, W of a dense layer, and of their bounds' part from intercepts:
// of A, lines and W, of the neurons of each row's example that have lines. Rows are visited example by example, as in
// BackGradArgs.
struct LiveGradArgs {
  ChainStep step;  // weight [channels][out map]
  Rows rows;
  int64_t examples = 0, matrices = 1;
  const float* from = nullptr;      // [matrices, count, out map]
  const float* from_b = nullptr;    // [sides, count]
  const int64_t* starts = nullptr;  // [examples + 1]
  const int64_t* order = nullptr;   // [count] or null
  int64_t picked = 0;               // rows of A that `pick` and `minus` pick from, or 0: to_a [., count, channels]
  float* to_a = nullptr;            // [picked, channels], or of each row
  float* to_slopes = nullptr;
  float* to_intercepts = nullptr;
  float* to_weight = nullptr;  // [channels][out map]
};

// out = a b: a [rows, count] at a[row * a_row + k * a_step], b [count, columns] likewise, with one of b's strides 1.
struct ProductArgs {
  const float* a = nullptr;
  const float* b = nullptr;
  float* out = nullptr;  // [rows, columns]
  int64_t rows = 0, count = 0, columns = 0;
  int64_t a_row = 0, a_step = 1, b_step = 0, b_column = 1;
};

// out = scale sign(x) b (+ base_scale base): x [rows, count] at x[row * x_row + k * x_step], b [count, columns], out
// [rows, columns] likewise, with one stride of each 1. sign(0) is 0.
struct SignProductArgs {
  const float* x = nullptr;
  const float* b = nullptr;
  const float* b_scale = nullptr;     // [count] or null: of b's rows
  const float* scale = nullptr;       // [rows]
  const float* base = nullptr;        // [., columns] or null
  const float* base_scale = nullptr;  // [rows]
  const int64_t* base_row = nullptr;  // [rows]
  float* out = nullptr;
  int64_t rows = 0, count = 0, columns = 0;
  int64_t x_row = 0, x_step = 1, b_step = 0, b_column = 1, out_row = 0, out_column = 1;
};

// Gradients of c' = W c and r' = |W| r from those of c' and r'.
struct IntervalGradArgs {
  const float* center = nullptr;                      // [batch, n]
  const float* radius = nullptr;                      // [radius_batch, n]
  const float* weight = nullptr;                      // [m, n]
  const float* from_center = nullptr;                 // [batch, m]
  const float* from_radius = nullptr;                 // [radius_batch, m]
  float* to_weight = nullptr;                         // [m, n]; added to what is there
  float* to_center = nullptr;                         // [batch, n], null: not wanted
  float* to_radius = nullptr;                         // [radius_batch, n]
  int64_t batch = 0, radius_batch = 0, n = 0, m = 0;  // radius_batch: batch, or 1 where one radius serves all examples
};

// What follows an interval product where a ReLU reads it: the ReLU's lines, their intercepts in terms of the product
// without its bias, and centre and radius of its range. Channels innermost.
struct ReluBoxArgs {
  const float* center = nullptr;  // [batch, n]
  const float* radius = nullptr;
  const float* bias = nullptr;   // [period] or null; n is a multiple of period
  float* slopes = nullptr;       // [1 or 2, batch, n], null: no lines are wanted, nor intercepts
  float* intercepts = nullptr;   // [2, batch, n]
  float* next_center = nullptr;  // [batch, n], null: not wanted
  float* next_radius = nullptr;
  int64_t* living = nullptr;  // [batch] neurons that have lines; not counted on CUDA
  int64_t batch = 0, n = 0, period = 1;
  bool adaptive = true;
  bool shared = false;  // radius is [n]
};
// Its gradients.
constexpr int64_t kReluBoxRuns = 16;
struct ReluBoxGradArgs {
  ReluBoxArgs forward;                     // without results
  const float* from_slopes = nullptr;      // [1 or 2, batch, n], null: there were no lines
  const float* from_intercepts = nullptr;  // [2, batch, n]
  const float* from_center = nullptr;      // [batch, n] of next_center, null: zero
  const float* from_radius = nullptr;
  float* to_center = nullptr;  // [batch, n]
  float* to_radius = nullptr;  // [batch, n], or with `shared` [n]
  float* to_bias = nullptr;    // [period] or null; what reaches the bias through the centre, too
  float* sums = nullptr;       // on CUDA: room for [1, with `shared` 2][kReluBoxRuns, n]
};

// Margins z_y - z_j, j ascending without y, of a chain of layers over [x - eps, x + eps] cut at [low, high].
enum class LayerKind : int { flatten, dense, conv };
struct IntervalLayer {
  LayerKind kind = LayerKind::flatten;
  Finish finish = Finish::center;
  const float* weight = nullptr;
  const float* bias = nullptr;
  int64_t n = 0, m = 0;   // dense
  IntervalConvArgs conv;  // its geometry; of flatten the sizes of what comes in
};
struct IntervalChainArgs {
  const float* x = nullptr;  // [batch, numbers], channels first
  int64_t batch = 0, numbers = 0;
  float eps = 0.f, low = 0.f, high = 0.f;
  const IntervalLayer* layers = nullptr;
  int count = 0;
  const float* weight = nullptr;  // [classes, n] of the last layer
  const float* bias = nullptr;    // [classes] or null
  int64_t classes = 0;
  const int64_t* labels = nullptr;  // [batch]
  float* work = nullptr;            // interval_chain_work(...) numbers
  float* out = nullptr;             // [sides, batch, classes - 1]
  int sides = 1;
};
// refused: an input is not finite or outside [low, high], a label is none, or a result is not finite.
enum class ChainResult : int { done, refused };

// One elementwise pass over intervals.
enum class IntervalStep : int {
  to_center,    // (lower, upper) -> (center, radius)
  from_center,  // (center, radius) -> (lower, upper)
  relu_center,  // (center, radius) -> centre and radius of the ReLU of the interval
  box,          // (x, eps): center and radius of [x - eps, x + eps] cut at [lo, hi]
  box_ends,     // the same, lower and upper
};
struct IntervalStepArgs {
  const float* a = nullptr;
  const float* b = nullptr;  // null with box: eps_value for all
  float* out_a = nullptr;
  float* out_b = nullptr;
  int64_t count = 0;
  float eps_value = 0.f, lo = 0.f, hi = 0.f;
  IntervalStep step = IntervalStep::to_center;
};

// relu: p0 is the slope below 0; hardtanh: p0 and p1 are the kinks; softplus: beta and threshold; elu: alpha.
enum class Activation : int { relu, hardtanh, sigmoid, tanh, arctan, softplus, elu, silu, gelu, gelu_tanh };
constexpr int kActivations = 10;

// Lines of an activation on [lower, upper], float or double.
template <class T>
struct LinesArgs {
  const T* lower = nullptr;  // [count]
  const T* upper = nullptr;
  T* slopes = nullptr;      // [1 or 2, count]
  T* intercepts = nullptr;  // [2, count]
  int64_t count = 0;
  Activation activation = Activation::relu;
  double p0 = 0., p1 = 0.;
  bool adaptive = false;
  const T* bias = nullptr;  // [period] or null: slope * bias[i % period] joins intercept i
  int64_t period = 1;
};
// Their gradients (without bias).
template <class T>
struct LinesGradArgs {
  const T* lower = nullptr;  // [count]
  const T* upper = nullptr;
  const T* from_slopes = nullptr;      // [1 or 2, count]
  const T* from_intercepts = nullptr;  // [2, count]
  T* to_lower = nullptr;
  T* to_upper = nullptr;
  int64_t count = 0;
  Activation activation = Activation::relu;
  double p0 = 0., p1 = 0.;
  bool adaptive = false;
};
// The tightest intercept of a line of a given slope on one side, and the point where it touches.
template <class T>
struct SupportArgs {
  const T* slopes = nullptr;  // [count]
  const T* lower = nullptr;
  const T* upper = nullptr;
  T* intercepts = nullptr;
  T* points = nullptr;
  int64_t count = 0;
  Activation activation = Activation::relu;
  double p0 = 0., p1 = 0.;
  bool above = false;
};
// The range of an activation over [lower, upper].
template <class T>
struct RangeArgs {
  const T* lower = nullptr;  // [count]
  const T* upper = nullptr;
  T* out_lower = nullptr;
  T* out_upper = nullptr;
  int64_t count = 0;
  Activation activation = Activation::relu;
  double p0 = 0., p1 = 0.;
};

}  // namespace fastrobust
