#pragma once

#include "pgd/args.h"

namespace fastrobust {
void linf_cuda(const StepArgs& a, void* stream);
// Steepest step in the box and exact projection, one block an example.
void l1_cuda(const StepArgs& a, void* stream);
}  // namespace fastrobust
