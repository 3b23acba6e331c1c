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
  uint8_t* active_out = nullptr;  // [batch]: active & (fosc > threshold)
  float threshold = 0.f;
  // ATAS (thesis alg. 5.3): step from the moving average of the squared gradient norm
  const float* v = nullptr;   // [batch]
  float* v_out = nullptr;     // [batch]
  float* step_out = nullptr;  // [batch], the adaptive step
  float beta = 0.f, c = 0.f, min_step = 0.f, max_step = 0.f;
  bool authors = false;
};

struct RandomStartArgs {
  const float* x0 = nullptr;
  float* out = nullptr;
  int64_t batch = 0, n = 0;
  Param eps;
  float lo = 0.f, hi = 0.f;
  uint64_t seed = 0;
  int64_t first_example = 0;  // counter of the first row, so that a batch can be drawn in parts
  Norm norm = Norm::linf;
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

}  // namespace fastrobust
