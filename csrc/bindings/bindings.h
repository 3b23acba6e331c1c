// Helpers of the bindings: addresses come from Python as integers, no torch header is seen.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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

void bind_bounds(pybind11::module_& m);
void bind_bounds_graph(pybind11::module_& m);
void bind_bounds_layers(pybind11::module_& m);
void bind_pgd(pybind11::module_& m);
void bind_polyhedron(pybind11::module_& m);
void bind_binary(pybind11::module_& m);

}  // namespace fastrobust
