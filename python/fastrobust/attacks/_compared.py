"""Two ways of running a model: how far their outputs and input gradients are apart, and what time they take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .._places import wave

_SECONDS, _ROUNDS = 1.5, (3, 60)  # the least of many: other work on the machine comes and goes


class Unfit(Exception):
    """A way of running the model, or every way, is left out; the text says why in one line."""


def step(run: Callable[[Tensor], Any], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """Outputs, and the gradient of a fixed combination of them with respect to the images."""
    leaf = x.detach().clone().requires_grad_()
    outputs = [t for t in tree_leaves(run(leaf.clone())) if isinstance(t, Tensor) and t.is_floating_point()]
    roots = [t for t in outputs if t.requires_grad]
    if not roots:
        raise Unfit("its outputs have no gradient to the images")
    (grad,) = torch.autograd.grad(roots, leaf, [1 + 0.5 * wave(t) for t in roots], allow_unused=True)
    if grad is None:
        raise Unfit("its outputs have no gradient to the images")
    return [t.detach() for t in outputs], grad


def outputs_apart(got: list[Tensor], want: list[Tensor]) -> float:
    if len(got) != len(want):
        return math.inf
    return max((apart(g, w, largest=True) for g, w in zip(got, want, strict=True)), default=0.0)


def apart(got: Tensor, want: Tensor, largest: bool = False) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return math.inf
    g, w = got.double(), want.double()
    if not bool((g.isfinite() == w.isfinite()).all()):
        return math.inf
    g, w = g.nan_to_num(0.0, 0.0, 0.0), w.nan_to_num(0.0, 0.0, 0.0)
    gap, size = ((g - w).abs().max(), w.abs().max()) if largest else ((g - w).norm(), w.norm())
    return 0.0 if float(gap) == 0 else float(gap / size) if float(size) > 0 else math.inf


def race(calls: dict[str, Callable[[], Any]], x: Tensor) -> dict[str, float]:
    """The least seconds of each, in rounds."""
    wait = torch.cuda.synchronize if x.is_cuda else lambda: None
    took = dict.fromkeys(calls, math.inf)
    begin = time.perf_counter()
    for call in calls.values():
        call()
    for k in range(_ROUNDS[1]):
        if k >= _ROUNDS[0] and time.perf_counter() - begin > _SECONDS:
            break
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            took[name] = min(took[name], time.perf_counter() - start)
    return took
