// The store's table of one instruction set.
#include "store/kernels.h"
#include "store/rows_cpu.h"

FR_NS_BEGIN
extern const StoreTable store_table;
const StoreTable store_table = {store_gather_cpu, store_scatter_cpu};
FR_NS_END
