"""What compute_bounds takes and returns, with types."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypedDict, TypeVar

import torch
from torch import Tensor

from fastrobust._input_sets import Clip
from fastrobust.bounds.slopes import SlopeSearch


class Options(TypedDict, total=False):
    """The keyword arguments of compute_bounds but ``sides``, which decides what it returns."""

    norm: float | str
    clip: Clip
    method: str
    labels: Any
    spec: Tensor | None
    rounding: str
    return_linear: bool
    return_intermediate: bool
    intersect: bool
    exact_input: bool
    refine: str
    max_memory: int
    check: str
    slopes: SlopeSearch | None


@dataclass
class LinearBounds:
    """lower_A x' + lower_b <= margin(x') <= upper_A x' + upper_b for every x' of the input set.

    A: (B, S, *x.shape[1:]), b: (B, S); None for a side that was not asked for. With same-slope methods upper_A is
    lower_A. ``input_lower`` and ``input_upper``, of x's shape, are the box around the input set.
    """

    lower_A: Any
    lower_b: Any
    upper_A: Tensor | None
    upper_b: Tensor | None
    input_lower: Tensor
    input_upper: Tensor

    def lower_at(self, x: Tensor) -> Tensor:
        """The lower linear function at x (B, *shape): (B, S)."""
        if self.lower_A is None:
            raise ValueError("lower_at: these bounds were computed with sides='upper'")
        value: Tensor = torch.einsum("bsn,bn->bs", self.lower_A.flatten(2), x.flatten(1)) + self.lower_b
        return value

    def upper_at(self, x: Tensor) -> Tensor:
        if self.upper_A is None:
            raise ValueError("upper_at: these bounds were computed with sides='lower'")
        value = torch.einsum("bsn,bn->bs", self.upper_A.flatten(2), x.flatten(1))
        return value if self.upper_b is None else value + self.upper_b


L = TypeVar("L")
U = TypeVar("U")


@dataclass
class Bounds(Generic[L, U]):
    """lower <= f(x') <= upper for every x' of the input set; (B, S), or (B, *output shape) without labels and spec.
    None for a side that was not asked for."""

    lower: L  # a tensor, but for sides="upper"
    upper: U  # a tensor, but for sides="lower"
    linear: LinearBounds | None = None
    intermediate: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
