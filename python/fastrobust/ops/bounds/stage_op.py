"""Bounds of rows of outputs through a graph of stages, with gradients where they are asked for."""

from __future__ import annotations

from torch import Tensor

from . import linear
from ._stage import Heads, Parameters, Rows, Stage
from ._stage_gradients import Margins
from .stages import forward


def stage_margins(
    stages: list[Stage],
    given: Parameters,
    heads: Heads,
    center: Tensor,
    radius: Tensor,
    shared: bool,
    rows: Rows,
    kind: str | None,
    keep: bool = False,
) -> tuple[Tensor, ...]:
    """Bounds (sides, R) of rows of outputs over [center - radius, center + radius].

    center, radius: (B, n), channels innermost; shared: radius is the same for every example and needs no gradient.
    kind: "crown" or "parallel" lines, None: intervals alone, from the stages at which the outputs' matrices stand. keep
    (with lines): instead the linear bounds at the input that they come from, coefficients (1 or 2, R, n) and offsets
    (sides, R).
    """
    tensors = (center, radius, heads.offset, *heads.matrices, *(t for part in given for t in part))
    if linear.needs_grad(*tensors):
        found: tuple[Tensor, ...] = Margins.apply(
            stages, heads.stages, shared, rows, kind, keep, [len(p) for p in given], *tensors
        )
        return found
    return forward(stages, given, heads, center, radius, shared, rows, kind, keep, None)
