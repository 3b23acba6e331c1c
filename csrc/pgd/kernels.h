// Entry points of the PGD family.
#pragma once

#include "pgd/args.h"
#include "runtime/dispatch.h"

namespace fastrobust {

// One table per instruction set.
struct PgdTable {
  void (*linf)(const StepArgs&);
  void (*rows)(const StepArgs&, Norm);  // l2 and l1 steps, FOSC, ATAS and Auto-PGD: whole examples
  void (*random_start)(const RandomStartArgs&);
  void (*loss)(const LossArgs&);
  void (*ascent)(const AscentArgs&);
  void (*square)(const SquareArgs&);
};

FR_CPU_TABLE(PgdTable, pgd)

// CUDA: enqueue on `stream` of the current device. `workspace` holds pgd_workspace_doubles() doubles on the device.
int64_t pgd_workspace_doubles(const StepArgs& a);
void linf_cuda(const StepArgs& a, void* stream);
void rows_cuda(const StepArgs& a, Norm norm, double* workspace, void* stream);
void random_start_cuda(const RandomStartArgs& a, int64_t* workspace, void* stream);
void square_cuda(const SquareArgs& a, void* stream);
void loss_cuda(const LossArgs& a, void* stream);
void ascent_cuda(const AscentArgs& a, uint8_t* workspace, void* stream);  // workspace: [batch]

}  // namespace fastrobust
