"""Types of what the attacks take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from ._model import Output

Model = Callable[[Tensor], Any]
Loss = Literal["ce", "cross_entropy", "margin", "cw", "dlr", "kl", "trades"] | Callable[[Tensor, Tensor], Tensor]
Fooled = Callable[[Tensor, Tensor], Tensor]
Norm = float | Literal["inf", "Linf", "linf", "2", "L2", "l2", "1", "L1", "l1"]
Values = float | Sequence[float] | np.ndarray[Any, Any] | Tensor
Clip = tuple[Values, Values] | np.ndarray[Any, Any] | Tensor
Integer = int | np.integer[Any]


class OneStep(TypedDict, total=False):
    """Options of :func:`fgsm`, with the meanings that :func:`pgd` gives them."""

    norm: Norm
    step_size: Values | None
    clip: Clip | None
    loss: Loss
    fooled: Fooled | None
    targeted: bool
    targets: Tensor | Integer | Literal["all"] | None
    restarts: Integer
    random_start: bool
    keep: Literal["last", "best"]
    early_stop: bool
    normalize: tuple[Any, Any] | None
    autocast: torch.dtype | None
    output: Output | None
    model_mode: Literal["eval", "keep"]
    eot_samples: Integer
    mask: Tensor | np.ndarray[Any, Any] | None
    levels: Integer | None
    tolerance: float
    seed: Integer | None
    first_example: Integer
    cuda_graph: bool
    progress: bool
    check: bool


class ManySteps(OneStep, total=False):
    """Options of :func:`ifgsm` and :func:`pgd`."""

    steps: Integer
