// Entry points of the bounds family.
#pragma once

#include "bounds/args.h"
#include "runtime/dispatch.h"

namespace fastrobust {

struct BoundsTable {
  void (*back)(const BackArgs&);
  void (*concretize)(const ConcretizeArgs&);
  void (*spread)(const SpreadArgs&);
  void (*interval)(const IntervalArgs&);
  void (*interval_step)(const IntervalStepArgs&);
  void (*relu_lines)(const ReluLinesArgs&);
  void (*interval_conv)(const IntervalConvArgs&);
  int64_t (*interval_conv_work)(const IntervalConvArgs&);  // numbers that `work` must hold
  void (*chain)(const ChainArgs&);
  void (*live_chain)(const ChainArgs&);  // leaves out neurons without lines
  void (*live_dense)(const ChainArgs&);  // one step, a dense layer
  void (*chain_grad)(const ChainGradArgs&);
  int64_t (*interval_chain_work)(const IntervalChainArgs&);
  ChainResult (*interval_chain)(const IntervalChainArgs&);
  void (*conv_grad)(const ConvGradArgs&);
  void (*relu_lines_grad)(const ReluLinesGradArgs&);
  void (*back_grad)(const BackGradArgs&);
  void (*concretize_grad)(const ConcretizeGradArgs&);
};

FR_CPU_TABLE(BoundsTable, bounds)

// CUDA: enqueue on `stream` of the current device.
void back_cuda(const BackArgs& a, void* stream);
void concretize_cuda(const ConcretizeArgs& a, void* stream);
void interval_cuda(const IntervalArgs& a, void* stream);
void interval_step_cuda(const IntervalStepArgs& a, void* stream);
void relu_lines_cuda(const ReluLinesArgs& a, void* stream);

}  // namespace fastrobust
