// Arguments of the PGD family, shared by the CPU and CUDA kernels. All tensors are dense: `batch` examples of `n`
// elements each, one after the other, in one element order for all of them.
#pragma once

#include <cstdint>

namespace fastrobust {

// A number that may be one for all, one per example, or one per element.
enum class Per : int { all, example, element };
struct Param {
  const float* data = nullptr;
  float value = 0.f;
  Per per = Per::all;
};

enum class GradType : int { none, f32, f16, bf16 };  // none: projection only
enum class Norm : int { linf, l2, l1 };

struct StepArgs {
  const float* x = nullptr;    // [batch, n]
  const float* x0 = nullptr;   // [batch, n]
  const void* grad = nullptr;  // [batch, n]
  float* out = nullptr;        // [batch, n], may be x
  int64_t batch = 0, n = 0;
  Param step, eps;
  float lo = 0.f, hi = 0.f;         // the box; -inf, inf without one
  const uint8_t* active = nullptr;  // [batch] or null: examples with 0 keep x
  GradType grad_type = GradType::f32;
  bool normalize = true;  // l2: steps of length `step`; false: step * grad
  // FOSC (Wang et al. 2019, eq. 4), when asked for
  float* fosc = nullptr;          // [batch]
  uint8_t* active_out = nullptr;  // [batch]: who moves (fosc_moves); null: criterion only
  float threshold = 0.f;
  // ATAS (thesis alg. 5.3): step from the moving average of the squared gradient norm
  const float* v = nullptr;   // [batch]
  float* v_out = nullptr;     // [batch]
  float* step_out = nullptr;  // [batch], the adaptive step
  float beta = 0.f, c = 0.f, min_step = 0.f, max_step = 0.f;
  bool authors = false;
  // Auto-PGD (Croce and Hein 2020, algorithm 1): the point before x, or null; momentum 1 does not look at it
  const float* previous = nullptr;   // [batch, n], not out
  float momentum = 1.f, rest = 0.f;  // rest: 1 - momentum
  const int64_t* keep = nullptr;     // [batch] or null, l1: how many coordinates move
};

// What Auto-PGD keeps of each example. The best point is x itself where best_is_x says so, and else in `best`: a point
// is copied only once a step left it for a worse one.
struct AscentArgs {
  int64_t batch = 0, n = 0;
  const float *value = nullptr, *score = nullptr;  // [batch] at the point that a step led to; ascended is sign * value
  float sign = 1.f;
  const float *left = nullptr, *left_grad = nullptr;                          // [batch, n] before the step
  float *best = nullptr, *best_grad = nullptr;                                // [batch, n]
  float *last_value = nullptr, *best_value = nullptr, *best_score = nullptr;  // [batch]
  int64_t* rises = nullptr;                                                   // [batch] steps that raised the value
  uint8_t* best_is_x = nullptr;                                               // [batch]
};

// At a checkpoint (Croce and Hein 2020, section 3): steps are halved, and examples go back to their best points.
struct AscentCheckArgs {
  int64_t batch = 0, n = 0;
  float *x = nullptr, *grad = nullptr;                // [batch, n]
  const float *best = nullptr, *best_grad = nullptr;  // [batch, n]
  float *last_value = nullptr, *mark = nullptr;       // [batch], mark: best_value at the last checkpoint
  const float* best_value = nullptr;                  // [batch]
  float* factor = nullptr;                            // [batch] of the first step
  int64_t* rises = nullptr;                           // [batch]
  const uint8_t* best_is_x = nullptr;                 // [batch]
  uint8_t* halved = nullptr;                          // [batch]: was the step halved at the last checkpoint?
  float needed = 0.f;                                 // so many steps should have raised the value
};

struct RandomStartArgs {
  const float* x0 = nullptr;
  float* out = nullptr;
  int64_t batch = 0, n = 0;
  Param eps;
  float lo = 0.f, hi = 0.f;
  uint64_t seed = 0;
  int64_t first_example = 0;         // counter of the first row, so that a batch can be drawn in parts
  const int64_t* numbers = nullptr;  // [batch], in its place: the counter of each row
  Norm norm = Norm::linf;
};

struct SquareWindow {
  int64_t query = 0, height = 0, width = 0;  // height 0: none
};
// The Square attack: what a proposal of any norm is made of.
struct SquareRows {
  float *x = nullptr,
        *next = nullptr;  // [batch, channels, height, width]: the point, and what is proposed in its place
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  const int64_t* numbers = nullptr;  // [batch] of the examples
  uint64_t seed = 0;
  SquareWindow window;  // what is written
  // [batch], or null where nothing is settled: of `next`, then of x
  const float* score = nullptr;
  const uint8_t* hit = nullptr;
  float* value = nullptr;
  uint8_t* fooled = nullptr;
};
// Norm inf. `next` is x outside of the last window, which is settled.
struct SquareArgs : SquareRows {
  const float *low = nullptr, *high = nullptr;  // [batch, channels, height, width]: the ends of ball and box
  SquareWindow last;
};
// Norms 2 and 1. All of `next` is settled, and written.
struct SquareMoveArgs : SquareRows {
  const float* x0 = nullptr;
  Param eps;  // one for all, or one per example
  Norm norm = Norm::l2;
  const float* pattern = nullptr;  // [2, window.height * window.width]: upright, and turned by a quarter
};

enum class Loss : int { cross_entropy, margin, dlr, dlr_targeted, kl };
struct LossArgs {
  const float* logits = nullptr;     // [batch, classes]
  const float* reference = nullptr;  // [batch, classes], kl: logits of the clean example
  const int64_t* labels = nullptr;   // [batch]
  const int64_t* targets = nullptr;  // [batch], dlr_targeted
  float* value = nullptr;            // [batch]
  float* grad = nullptr;             // [batch, classes]
  int64_t batch = 0, classes = 0;
  Loss loss = Loss::cross_entropy;
};

// Is the label's logit the largest, the first among equals, as argmax says?
struct AgreesArgs {
  const float* logits = nullptr;    // [batch, classes]
  const int64_t* labels = nullptr;  // [batch]
  uint8_t* out = nullptr;           // [batch]: whether that is `wanted`
  int64_t batch = 0, classes = 0;
  bool wanted = true;
};

}  // namespace fastrobust
