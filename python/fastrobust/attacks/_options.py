"""Types of what the attacks take."""

from __future__ import annotations

import os
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
Version = Literal["standard", "plus", "rand", "fast"] | Sequence[str | tuple[str, dict[str, Any]]]


class Shared(TypedDict, total=False):
    """Options that every attack takes, with the meanings that :func:`pgd` gives them."""

    norm: Norm
    clip: Clip | None
    normalize: tuple[Any, Any] | None
    autocast: torch.dtype | None
    output: Output | None
    model_mode: Literal["eval", "keep"]
    mask: Tensor | np.ndarray[Any, Any] | None
    tolerance: float
    seed: Integer | None
    first_example: Integer | Tensor | Sequence[int] | np.ndarray[Any, Any]
    progress: bool
    check: bool
    prepare: bool


class Climbing(Shared, total=False):
    """Options of attacks that ascend by a gradient, whatever the loss is."""

    fooled: Fooled | None
    targets: Tensor | Integer | Literal["all"] | None
    restarts: Integer
    random_start: bool
    early_stop: bool
    eot_samples: Integer


class Ascending(Climbing, total=False):
    """Options of attacks that ascend a loss by its gradient."""

    loss: Loss


class OneStep(Ascending, total=False):
    """Options of :func:`fgsm`."""

    step_size: Values | None
    targeted: bool
    keep: Literal["last", "best"]
    levels: Integer | None
    cuda_graph: bool


class ManySteps(OneStep, total=False):
    """Options of :func:`ifgsm` and :func:`pgd`."""

    steps: Integer


class CarliniInf(Climbing, total=False):
    """Options of :func:`cw_inf`."""

    steps: Integer
    step_size: Values | None
    targeted: bool
    keep: Literal["last", "best"]
    levels: Integer | None
    cuda_graph: bool


class Auto(Ascending, total=False):
    """Options of :func:`apgd`."""

    steps: Integer
    targeted: bool
    rho: float
    momentum: float
    large_radii: bool


class Boundary(Shared, total=False):
    """Options of :func:`fab`."""

    steps: Integer
    targets: Tensor | Integer | Literal["all"] | None
    restarts: Integer
    alpha_max: float
    eta: float
    beta: float
    early_stop: bool | None


class Suite(TypedDict, total=False):
    """Options of :func:`autoattack`."""

    norm: Norm
    version: Version
    certify_first: bool | str
    batch_size: Integer
    seed: Integer
    first_example: Integer | Tensor
    state: str | os.PathLike[str] | None
    clip: Clip | None
    normalize: tuple[Any, Any] | None
    autocast: torch.dtype | None
    output: Output | None
    model_mode: Literal["eval", "keep"]
    mask: Tensor | np.ndarray[Any, Any] | None
    tolerance: float
    progress: bool
    check: bool
    prepare: bool


class BlackBox(Shared, total=False):
    """Options of :func:`square`."""

    targeted: bool
    targets: Tensor | Integer | Literal["all"] | None
    queries: Integer
    restarts: Integer
    loss: Literal["margin", "ce"]
    share: float
    rescale: bool


class Nearest(TypedDict, total=False):
    """Options of attacks that look for the nearest point and draw nothing at random."""

    clip: Clip | None
    normalize: tuple[Any, Any] | None
    autocast: torch.dtype | None
    output: Output | None
    model_mode: Literal["eval", "keep"]
    mask: Tensor | np.ndarray[Any, Any] | None
    tolerance: float
    progress: bool
    check: bool
    prepare: bool
    steps: Integer


class Carlini(Nearest, total=False):
    """Options of :func:`cw_l2`."""

    searches: Integer
    c: float
    lr: float
    confidence: float
    targeted: bool
    abort_early: bool


class Fool(Nearest, total=False):
    """Options of :func:`deepfool`."""

    norm: Norm
    candidates: Integer | None
    overshoot: float


class Ranked(Shared, total=False):
    """Options of :func:`malt`."""

    candidates: Integer
    targets: Integer
    steps: Integer
    restarts: Integer
    loss: Literal["dlr", "margin", "ce"]
    random_start: bool
    rho: float
    momentum: float
    large_radii: bool
    early_stop: bool
