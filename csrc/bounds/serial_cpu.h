// Parts of kernels on the calling thread: items [begin, end), or rows by their numbers.
#pragma once

#include "bounds/args.h"
#include "core/macros.h"

FR_NS_BEGIN
void back_rows(const BackArgs& g, int64_t begin, int64_t end);
void concretize_rows(const ConcretizeArgs& g, int64_t begin, int64_t end);
void spread_items(const SpreadArgs& g, int64_t begin, int64_t end);
void back_grad_rows(const BackGradArgs& g, const int64_t* rows, int64_t count);  // of one example
void concretize_grad_rows(const ConcretizeGradArgs& g, int64_t begin, int64_t end);
FR_NS_END
