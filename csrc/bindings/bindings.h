// Helpers of the bindings: addresses come from Python as integers, no torch header is seen.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastrobust {

// A tensor without memory (fake or meta) has address 0: refuse it instead of crashing.
template <class T>
T* pointer(uintptr_t address, int64_t elements, const char* name) {
  if (address == 0 && elements > 0)
    throw std::invalid_argument(std::string(name) + ": got a tensor without memory (address 0), expected real data");
  return reinterpret_cast<T*>(address);
}

// Long kernels let other Python threads run; for short ones the lock costs more than it gives.
constexpr int64_t kReleaseGilAbove = int64_t{1} << 16;
template <class F>
void without_gil(int64_t work, const F& f) {
  if (work > kReleaseGilAbove) {
    pybind11::gil_scoped_release release;
    f();
  } else {
    f();
  }
}

// Of a convolution: (dilation_y, dilation_x, groups).
using Apart = std::array<int64_t, 3>;
inline void check_apart(const Apart& apart, int64_t in_c, int64_t out_c) {
  if (apart[0] < 1 || apart[1] < 1)
    throw std::invalid_argument("dilation: got " + std::to_string(std::min(apart[0], apart[1])) +
                                ", expected 1 or more");
  if (apart[2] < 1 || in_c % apart[2] != 0 || out_c % apart[2] != 0)
    throw std::invalid_argument("groups: got " + std::to_string(apart[2]) + ", expected a divisor of " +
                                std::to_string(in_c) + " and " + std::to_string(out_c) + " channels");
}
template <class Args>
void tell_apart(const Apart& apart, Args& g) {
  check_apart(apart, g.in_c, g.out_c);
  g.dilation_y = apart[0], g.dilation_x = apart[1], g.groups = apart[2];
}

void bind_bounds(pybind11::module_& m);
void bind_bounds_graph(pybind11::module_& m);
void bind_bounds_layers(pybind11::module_& m);
void bind_pgd(pybind11::module_& m);
void bind_polyhedron(pybind11::module_& m);
void bind_store(pybind11::module_& m);
void bind_binary(pybind11::module_& m);

}  // namespace fastrobust
