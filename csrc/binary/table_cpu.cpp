// The binary family's entry points of one instruction set.
#include "binary/kernels.h"
#include "core/macros.h"

FR_NS_BEGIN

void gather_cpu(const GatherArgs&);
void direct_cpu(const DirectArgs&);
void relayout_cpu(const RelayoutArgs&);
void max_pool_cpu(const PoolArgs&);
void max_pool_grad_cpu(const PoolArgs&);
bool plan_cpu(const PlanArgs&);
Entries pack_cpu(const PackArgs&);
void topk_cpu(const TopkArgs&);
int64_t encode_cpu(const CodeArgs&);
void decode_cpu(const CodeArgs&);

extern const BinaryTable binary_table;
#if defined(__AVX512F__)
constexpr bool kStrides = true;  // a pixel of sixteen images is a register
#else
constexpr bool kStrides = false;
#endif
const BinaryTable binary_table = {kStrides, gather_cpu, direct_cpu, relayout_cpu, max_pool_cpu, max_pool_grad_cpu,
                                  plan_cpu, pack_cpu,   topk_cpu,   encode_cpu,   decode_cpu};

FR_NS_END
