// The bounds family's table of one instruction set.
#include "bounds/entry_cpu.h"

FR_NS_BEGIN
extern const BoundsTable bounds_table = {back_cpu,
                                         concretize_cpu,
                                         spread_cpu,
                                         interval_cpu,
                                         interval_step_cpu,
                                         interval_conv_cpu,
                                         interval_conv_work_cpu,
                                         chain_cpu,
                                         live_chain_cpu,
                                         live_dense_cpu,
                                         live_graph_cpu,
                                         chain_grad_cpu,
                                         interval_chain_work_cpu,
                                         interval_chain_cpu,
                                         conv_grad_cpu,
                                         pick_grad_cpu,
                                         live_grad_cpu,
                                         product_cpu,
                                         sign_product_cpu,
                                         interval_grad_cpu,
                                         relu_box_cpu,
                                         relu_box_grad_cpu,
                                         back_grad_cpu,
                                         concretize_grad_cpu,
                                         lines_cpu,
                                         lines_double_cpu,
                                         lines_grad_cpu,
                                         lines_grad_double_cpu,
                                         range_cpu};
FR_NS_END
