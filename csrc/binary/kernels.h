// Entry points of the binary family.
#pragma once

#include "binary/args.h"
#include "runtime/dispatch.h"

namespace fastrobust {

// One table per instruction set.
struct BinaryTable {
  void (*gather)(const GatherArgs&);
  void (*relayout)(const RelayoutArgs&);
  bool (*plan)(const PlanArgs&);  // false: an offset does not fit in 32 bits
  void (*pack)(const PackArgs&);
  void (*topk)(const TopkArgs&);
};

FR_CPU_TABLE(BinaryTable, binary)

}  // namespace fastrobust
