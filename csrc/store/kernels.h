// Entry points of the store of perturbations.
#pragma once

#include "runtime/dispatch.h"
#include "store/args.h"

namespace fastrobust {

// One table per instruction set.
struct StoreTable {
  void (*gather)(const StoreArgs&);
  void (*scatter)(const StoreArgs&);
};

FR_CPU_TABLE(StoreTable, store)

void store_gather_cuda(const StoreArgs& a, void* stream);
void store_scatter_cuda(const StoreArgs& a, void* stream);

}  // namespace fastrobust
