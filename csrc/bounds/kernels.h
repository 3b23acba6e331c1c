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
  void (*interval_conv)(const IntervalConvArgs&);
  int64_t (*interval_conv_work)(const IntervalConvArgs&);  // numbers that `work` must hold
  void (*live_chain)(const ChainArgs&);                    // leaves out neurons without lines
  void (*live_dense)(const ChainArgs&);                    // one step, a dense layer
  void (*live_graph)(const GraphArgs&);
  WindowSize (*live_graph_window)(const GraphArgs&);  // that holds every row at the input
  void (*stage_rows)(const GraphArgs&);               // all neurons
  void (*stage_grad)(const GraphGradArgs&);
  void (*chain_grad)(const ChainGradArgs&);
  int64_t (*interval_chain_work)(const IntervalChainArgs&);
  ChainResult (*interval_chain)(const IntervalChainArgs&);
  void (*conv_grad)(const ConvGradArgs&);
  void (*pick_grad)(const PickGradArgs&);
  void (*live_grad)(const LiveGradArgs&);
  void (*turn)(const float* from, float* to, int64_t count, int64_t rows, int64_t columns);  // [count, rows, columns]
  void (*product)(const ProductArgs&);
  bool (*sign_product)(const SignProductArgs&);  // false: not done, too many zeros or NaN
  void (*interval_grad)(const IntervalGradArgs&);
  void (*relu_box)(const ReluBoxArgs&);
  void (*relu_box_grad)(const ReluBoxGradArgs&);
  void (*back_grad)(const BackGradArgs&);
  void (*concretize_grad)(const ConcretizeGradArgs&);
  void (*lines)(const LinesArgs<float>&);
  void (*lines_double)(const LinesArgs<double>&);
  void (*lines_grad)(const LinesGradArgs<float>&);
  void (*lines_grad_double)(const LinesGradArgs<double>&);
  void (*range)(const RangeArgs<float>&);
  void (*support)(const SupportArgs<float>&);
  void (*support_double)(const SupportArgs<double>&);
};

FR_CPU_TABLE(BoundsTable, bounds)

// CUDA: enqueue on `stream` of the current device.
void back_cuda(const BackArgs& a, void* stream);
void concretize_cuda(const ConcretizeArgs& a, void* stream);
void interval_cuda(const IntervalArgs& a, void* stream);
void back_grad_cuda(const BackGradArgs& a, void* stream);
void concretize_grad_cuda(const ConcretizeGradArgs& a, void* stream);
void pick_grad_cuda(const PickGradArgs& a, void* stream);
void relu_box_cuda(const ReluBoxArgs& a, void* stream);
void relu_box_grad_cuda(const ReluBoxGradArgs& a, void* stream);
void interval_step_cuda(const IntervalStepArgs& a, void* stream);
template <class T>
void lines_cuda(const LinesArgs<T>& a, void* stream);
template <class T>
void lines_grad_cuda(const LinesGradArgs<T>& a, void* stream);
void range_cuda(const RangeArgs<float>& a, void* stream);
template <class T>
void support_cuda(const SupportArgs<T>& a, void* stream);

}  // namespace fastrobust
