"""The step of Auto-PGD."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...reference import pgd as reference
from .. import _checks as ck
from . import _kernels as op
from ._box import Box
from .steps import Clip, _checked, pgd_step, project

INF = math.inf


def apgd_step(
    x: Tensor,
    previous: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: Clip = (0.0, 1.0),
    *,
    momentum: float = 0.75,
    keep: Tensor | None = None,
    targeted: bool = False,
) -> Tensor:
    r"""The step of Auto-PGD in one kernel (Croce & Hein 2020, algorithm 1, lines 7 and 8): a PGD step, averaged with
    the last move.

    .. math:: z = P(x + step\_size \cdot s(g)), \qquad x' = P(x + m (z - x) + (1 - m) (x - previous))

    with m the ``momentum``, P the projection on ball and box and s(g) the direction of :func:`pgd_step`; m = 1 gives z.
    For norm 1 (Croce & Hein 2021) s(g) is the sign of the ``keep`` coordinates of largest ``|g|``, ties with the last
    one included, over their number, and P the exact projection on ball and box together.

    Args:
        x, previous: (B, ...) the current point and the one before it, float32 (float64 for checking).
        x0, grad, step_size, eps, norm, clip, targeted: as in :func:`pgd_step`; for norm 1 the step size is a number or
            (B,).
        momentum: in [0, 1].
        keep: (B,) int64, at least 1: norm 1 alone; None moves along every coordinate of the gradient.

    Returns:
        x', inside ball and box exactly. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    x, x0, grad, p, box = _checked(x, x0, grad, norm, clip)
    previous = ck.check_like(previous, "previous", x, "x")
    m = ck.check_number(momentum, "momentum", 0, 1)
    keep = _check_keep(keep, x, p)
    step, eps_p = ck.check_parameter(step_size, "step_size", x, p), ck.check_parameter(eps, "eps", x, p)
    if not isinstance(box, Box):
        if targeted:
            step = ck.Parameter(None if step.tensor is None else -step.tensor, -step.value)
        return op.apgd_step(x, previous, x0, grad, *step, *eps_p, op.NORM_CODE[p], *box, m, keep)
    with torch.no_grad():  # faces of their own: the same from a step and projections
        if p == 1:
            length: Any = step.value if step.tensor is None else reference.as_rows(step.tensor, x)
            direction = reference.sparse_sign(reference.clean(grad, x.dtype), keep)
            z = project(x - length * direction if targeted else x + length * direction, x0, eps, p, clip)
        else:
            z = pgd_step(x, x0, grad, step_size, eps, p, clip, targeted=targeted)
        if m == 1:
            return z
        return project(reference.averaged(x, previous, z, m), x0, eps, p, clip)


def _check_keep(keep: Any, x: Tensor, norm: float) -> Tensor | None:
    if keep is None:
        return None
    if norm != 1:
        raise ValueError(f"keep: got a tensor for norm {norm:g}, expected None: only the step of norm 1 is sparse")
    keep = ck.need_dense(keep, "keep")
    if keep.dtype != torch.int64 or tuple(keep.shape) != (x.shape[0],):
        raise ValueError(f"keep: got {ck.describe(keep)}, expected a ({x.shape[0]},) int64 tensor")
    if keep.device != x.device:
        raise ValueError(f"keep: got device {keep.device}, expected x's device {x.device}")
    if keep.device.type == "cpu" and ck.has_values(keep) and bool((keep < 1).any()):
        raise ValueError(f"keep: got {int(keep.min())}, expected at least 1")
    return keep
