#pragma once

#include "bounds/kernels.h"
#include "core/macros.h"

FR_NS_BEGIN
void back_cpu(const BackArgs& a);
void concretize_cpu(const ConcretizeArgs& a);
void spread_cpu(const SpreadArgs& a);
void interval_cpu(const IntervalArgs& a);
void interval_step_cpu(const IntervalStepArgs& a);
void interval_conv_cpu(const IntervalConvArgs& a);
int64_t interval_conv_work_cpu(const IntervalConvArgs& a);
void live_chain_cpu(const ChainArgs& a);
void live_dense_cpu(const ChainArgs& a);
void live_graph_cpu(const GraphArgs& a);
WindowSize live_graph_window_cpu(const GraphArgs& a);
void stage_rows_cpu(const GraphArgs& a);
void stage_grad_cpu(const GraphGradArgs& a);
void chain_grad_cpu(const ChainGradArgs& a);
int64_t interval_chain_work_cpu(const IntervalChainArgs& a);
ChainResult interval_chain_cpu(const IntervalChainArgs& a);
void conv_grad_cpu(const ConvGradArgs& a);
void pick_grad_cpu(const PickGradArgs& a);
void live_grad_cpu(const LiveGradArgs& a);
void turn_cpu(const float* from, float* to, int64_t count, int64_t rows, int64_t columns);
void product_cpu(const ProductArgs& a);
bool sign_product_cpu(const SignProductArgs& a);
void interval_grad_cpu(const IntervalGradArgs& a);
void relu_box_cpu(const ReluBoxArgs& a);
void relu_box_grad_cpu(const ReluBoxGradArgs& a);
void back_grad_cpu(const BackGradArgs& a);
void concretize_grad_cpu(const ConcretizeGradArgs& a);
void lines_cpu(const LinesArgs<float>& a);
void lines_double_cpu(const LinesArgs<double>& a);
void lines_grad_cpu(const LinesGradArgs<float>& a);
void lines_grad_double_cpu(const LinesGradArgs<double>& a);
void range_cpu(const RangeArgs<float>& a);
void support_cpu(const SupportArgs<float>& a);
void support_double_cpu(const SupportArgs<double>& a);
FR_NS_END
