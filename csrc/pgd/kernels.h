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
  void (*agrees)(const AgreesArgs&);
  void (*ascent)(const AscentArgs&);
  void (*ascent_check)(const AscentCheckArgs&);
  void (*square)(const SquareArgs&);
  void (*square_move)(const SquareMoveArgs&);
};

FR_CPU_TABLE(PgdTable, pgd)

// CUDA: enqueue on `stream` of the current device. `workspace` holds pgd_workspace_doubles() doubles on the device.
int64_t pgd_workspace_doubles(const StepArgs& a);
void linf_cuda(const StepArgs& a, void* stream);
void rows_cuda(const StepArgs& a, Norm norm, double* workspace, void* stream);
void random_start_cuda(const RandomStartArgs& a, int64_t* workspace, void* stream);
void square_cuda(const SquareArgs& a, void* stream);
void square_move_cuda(const SquareMoveArgs& a, void* stream);
void loss_cuda(const LossArgs& a, void* stream);
void agrees_cuda(const AgreesArgs& a, void* stream);
// workspace: [batch]
void ascent_cuda(const AscentArgs& a, uint8_t* workspace, void* stream);
void ascent_check_cuda(const AscentCheckArgs& a, uint8_t* workspace, void* stream);

}  // namespace fastrobust
