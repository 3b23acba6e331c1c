// What a dense CPU tensor holds, read without a torch header and without a Python attribute: torch hands out a table of
// C functions for it (DLPack 1.2, `torch.Tensor.__dlpack_c_exchange_api__`).
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fastrobust {

struct DenseView {
  float* data;
  int64_t elements;
  int ndim;
  const int64_t* shape;  // the tensor's own
};

// Takes the table from torch.Tensor; false where this torch has none.
bool learn_tensor_type(pybind11::object tensor_type);

// False unless t is exactly a torch.Tensor, float32, on the CPU, contiguous, with a dimension at least, and its memory
// holds its values (no lazy negation).
bool view_dense(pybind11::handle t, DenseView* out);

bool same_shape(const DenseView& a, const DenseView& b);

}  // namespace fastrobust
