// Entry points of the binary family.
#pragma once

#include "binary/args.h"
#include "runtime/dispatch.h"

namespace fastrobust {

// One table per instruction set.
struct BinaryTable {
  bool strides;  // whether gather takes x_stride 2
  void (*gather)(const GatherArgs&);
  void (*direct)(const DirectArgs&);
  void (*relayout)(const RelayoutArgs&);
  void (*max_pool)(const PoolArgs&);
  void (*max_pool_grad)(const PoolArgs&);
  bool (*plan)(const PlanArgs&);  // false: an offset does not fit in 32 bits
  Entries (*pack)(const PackArgs&);
  void (*topk)(const TopkArgs&);
  int64_t (*encode)(const CodeArgs&);  // into n / 8 + 32 bytes; how many were needed
  void (*decode)(const CodeArgs&);
};

FR_CPU_TABLE(BinaryTable, binary)

// CUDA: enqueue on `stream` of the current device. The top-k workspace is topk_workspace_words(n) zeros.
void gather_cuda(const GatherArgs& a, void* stream);
void relayout_cuda(const RelayoutArgs& a, void* stream);
void max_pool_cuda(const PoolArgs& a, void* stream);
void max_pool_grad_cuda(const PoolArgs& a, void* stream);
int64_t topk_workspace_words(int64_t n);
void topk_cuda(const TopkArgs& a, void* stream);

}  // namespace fastrobust
