// The PGD family's table of one instruction set.
#include "pgd/kernels.h"
#include "pgd/row_cpu.h"

FR_NS_BEGIN
extern const PgdTable pgd_table;
const PgdTable pgd_table = {linf_cpu,   rows_cpu,         random_start_cpu, loss_cpu,       agrees_cpu,
                            ascent_cpu, ascent_check_cpu, square_cpu,       square_move_cpu};
FR_NS_END
