// Arguments of polyhedral_distance, shared by the CPU and CUDA kernels.
#pragma once

#include <cstdint>

namespace fastrobust {

constexpr int kBoxDims = 6;

// One side of the box. It is broadcast to the rows of a by strides and never materialised: row r has the leading index
// (i_0, ..., i_{dims-1}) of a, and element j of its side lies at data[sum_k i_k stride[k] + j inner].
struct BoxSide {
  const float* data = nullptr;
  int64_t stride[kBoxDims] = {};
  int64_t inner = 1;  // 0 or 1
};

// The last two are how the CPU names lp with p = 3 and p = 1.5, where powers are products and square roots.
enum class Distance : int { l1, l2, linf, lp, l3, l3_2 };

struct DistanceArgs {
  const float* a = nullptr;  // [rows, m]
  const float* b = nullptr;  // [rows]
  BoxSide lower, upper;
  int dims = 0;  // leading dimensions of a
  int64_t size[kBoxDims] = {};
  int64_t rows = 0, m = 0;
  Distance kind = Distance::linf;
  double p = 0.;  // lp: the exponent, > 1
  bool is_signed = false;
  float* distance = nullptr;    // [rows]
  float* multiplier = nullptr;  // [rows] or null: d distance / d b
  float* point = nullptr;       // [rows, m] or null
};

// Offset of a row's side in elements.
inline
#if defined(__CUDACC__)
    __host__ __device__
#endif
        int64_t side_offset(const DistanceArgs& args, const BoxSide& side, int64_t row) {
  int64_t offset = 0;
  for (int k = args.dims - 1; k >= 0; --k) {
    offset += row % args.size[k] * side.stride[k];
    row /= args.size[k];
  }
  return offset;
}

}  // namespace fastrobust
