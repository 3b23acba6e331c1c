"""What .ci/check-sass expects of each CUDA kernel.

Names are patterns (*, ?); the first row that fits counts. Template arguments are numbers: the type of the gradient
(0 none, 1 float32, 2 float16, 3 bfloat16), the activation, the dual norm, the loss, the distance. The last `true` is
the variant for memory that lies at multiples of 16 bytes, `false` the one for any other.
"""

from __future__ import annotations

from dataclasses import dataclass

ANY = None


@dataclass(frozen=True)
class Row:
    name: str
    wide_loads: int = 0  # at least, in the whole kernel
    wide_stores: int = 0
    loads: int | None = ANY  # at most, narrower than 16 bytes, in the main loops
    stores: int | None = ANY
    registers: int = 64


def streams(name: str, loads: int, stores: int, registers: int = 64, narrow: int = 0) -> Row:
    """A kernel whose main loops read and write by 16 bytes."""
    return Row(name, loads, stores, narrow, 0, registers)


ROWS = (
    # pgd: twice four elements a thread, so two accesses for each array and one for the rest of a row
    streams("linf_kernel<0, true>", 9, 6, 64),  # x, x0, eps by element; out where the step is taken and where not
    streams("linf_kernel<1, true>", 15, 6, 64),
    streams("linf_kernel<[23], true>", 9, 4, 64),
    streams("grad_norm_kernel<1, true>", 3, 0, 40),
    streams("grad_norm_kernel<[23], true>", 1, 0, 40),
    streams("l2_distance_kernel<0, true>", 6, 0, 48),
    streams("l2_distance_kernel<1, true>", 9, 0, 48),
    streams("l2_distance_kernel<[23], true>", 5, 0, 48),
    streams("l2_sphere_kernel<0, true>", 6, 0, 64),
    streams("l2_sphere_kernel<1, true>", 9, 0, 64),
    streams("l2_sphere_kernel<[23], true>", 5, 0, 64),
    streams("apgd_linf_kernel<1, true>", 12, 3, 64),
    streams("apgd_linf_kernel<[23], true>", 7, 2, 72),
    streams("l2_average_kernel<1, true>", 12, 3, 64),
    streams("l2_average_kernel<[23], true>", 7, 2, 64),
    streams("ascent_save_kernel<true>", 6, 6, 64),
    streams("apgd_l1_kernel<?, true>", 60, 10, 128),
    Row("ascent_note_kernel"),
    Row("ascent_check_kernel"),
    streams("agrees_kernel<true>", 3, 0, 40),
    Row("square_kernel"),  # windows: short pieces of lines, at any place
    Row("square_move_kernel", registers=128),  # the same, and passes over an example that find it in cache
    Row("apgd_l1_kernel<*, false>", registers=128),
    streams("l2_write_kernel<0, true>", 6, 3, 48),
    streams("l2_write_kernel<1, true>", 9, 3, 48),
    streams("l2_write_kernel<[23], true>", 5, 2, 48),
    streams("fosc_kernel<[01], true>", 12, 3, 104),
    streams("fosc_kernel<[23], true>", 11, 2, 104),
    streams("l1_kernel<?, true>", 60, 18, 120),
    streams("loss_kernel<0, true>", 13, 18, 64),
    streams("loss_kernel<1, true>", 14, 18, 64),
    streams("loss_kernel<[23], true>", 34, 18, 64),
    streams("loss_kernel<4, true>", 26, 18, 64),
    streams("linf_kernel<true>", 2, 1, 40, narrow=3),  # random start; the radius and the number of an example
    streams("ball_sum_kernel<true>", 0, 1, 40, narrow=1),
    streams("ball_write_kernel<true>", 2, 1, 40, narrow=4),
    # bounds
    streams("interval_kernel<true>", 9, 0, 64),
    streams("interval_step_kernel<true>", 6, 6, 48),
    streams("back_kernel<true>", 24, 6, 128),
    streams("concretize_kernel<0, true, true>", 12, 0, 96),
    streams("concretize_kernel<?, false, true>", 12, 0, 96),
    streams("concretize_kernel<?, true, true>", 48, 0, 128),
    streams("lines_kernel<*, true, float>", 9, 12, 64),
    streams("lines_kernel<*, true, double>", 18, 24, 128),
    streams("lines_grad_kernel<*, true, float>", 12, 6, 96),
    streams("lines_grad_kernel<*, true, double>", 24, 12, 128),
    streams("range_kernel<*, true>", 6, 6, 48),
    streams("support_kernel<*, true, float>", 9, 6, 64),
    streams("support_kernel<*, true, double>", 18, 12, 128),
    streams("relu_box_kernel<true>", 9, 18, 80),
    streams("relu_box_grad_kernel<true>", 9, 4, 80),
    streams(
        "back_grad_kernel<*, false, true>", 9, 4, 80, narrow=8
    ),  # of each row: where it lies, its bounds' gradients
    streams("back_grad_kernel<*, true, true>", 12, 5, 80, narrow=8),
    streams("concretize_grad_kernel<false, true>", 6, 3, 64, narrow=8),
    streams("concretize_grad_kernel<true, true>", 8, 4, 64, narrow=8),
    streams("pick_grad_kernel<true>", 1, 1, 48),
    # polyhedron: rows kept in shared memory, and longer ones
    streams("distance_kernel<?, true, true>", 9, 3, 128),
    streams("distance_kernel<?, false, true>", 18, 3, 128),
    # binary
    streams("histogram_kernel<true>", 3, 0, 40),
    streams("mask_kernel<true>", 4, 1, 40),
    streams("gather_kernel<?*, Four>", 12, 5, 64, narrow=16),  # the lists of offsets and values
    Row("gather_kernel<?*, One>"),
    streams("pool_kernel<Four>", 1, 1, 88),  # the codes beside it are bytes
    streams("pool_grad_kernel<Four>", 1, 1, 80, narrow=4),
    Row("pool_kernel<One>"),
    Row("pool_grad_kernel<One>"),
    streams("fill_kernel<*Four*>", 1, 1, 80, narrow=4),  # four images side by side, from plain tensors one by one
    Row("fill_kernel<*One*>"),
    streams("turn_kernel", 4, 4, 96),
    Row("copy_kernel"),
    # store: the images; its own rows are read where the move puts them
    Row("gather_rows_kernel<*, true>", 3, 3),
    Row("scatter_rows_kernel<*>"),
    # a few numbers for each example
    Row("atas_kernel"),
    Row("fosc_end_kernel"),
    Row("select_kernel"),
    Row("ties_kernel"),
    Row("column_sum_kernel<*>"),  # what runs of examples added up to
    # memory that does not lie at multiples of 16 bytes
    Row("concretize_kernel<*, false>", registers=96),
    Row("distance_kernel<*, false>", registers=128),
    Row("l1_kernel<*, false>", registers=96),
    Row("fosc_kernel<*, false>", registers=80),
    Row("lines_grad_kernel<*, false, double>", registers=128),
    Row("lines_kernel<*, false, double>", registers=96),
    Row("back_kernel<false>", registers=96),
    Row("*<*false*>"),
)
