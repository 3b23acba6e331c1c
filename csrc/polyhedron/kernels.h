// Entry points of the polyhedron family.
#pragma once

#include "polyhedron/args.h"
#include "runtime/dispatch.h"

namespace fastrobust {

// One table per instruction set.
struct PolyhedronTable {
  void (*distance)(const DistanceArgs&);
};

FR_CPU_TABLE(PolyhedronTable, polyhedron)

#if defined(FASTROBUST_HAS_CUDA)
void polyhedral_distance_cuda(const DistanceArgs& args, void* stream);
#endif

}  // namespace fastrobust
