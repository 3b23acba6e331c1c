"""Differences of logits and their gradients, and the order in which target classes are tried."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..reference import pgd as reference
from ._model import Victim
from ._objective import NO_GRADIENT

_MOST = 100  # candidates
DUAL = {math.inf: 1.0, 2.0: 2.0, 1.0: math.inf}


def likeliest(z: Tensor, y: Tensor, count: int) -> Tensor:
    """(B, count) wrong classes, the largest logits first; fewer where there are fewer."""
    return z.detach().scatter(1, y[:, None], -math.inf).topk(min(count, z.shape[1] - 1), 1).indices


def differences(leaf: Tensor, z: Tensor, y: Tensor, classes: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For each column of ``classes`` (B, C): z_c - z_y (B,) and its gradient (B, n), from one graph. A backward pass
    gives a column of all examples, each with a class of its own, and the difference at once: C passes for C classes,
    where a Jacobian takes C + 1 and a subtraction."""
    if not z.requires_grad:
        raise ValueError(NO_GRADIENT)
    gaps = z.gather(1, classes) - z.gather(1, y[:, None])
    count = classes.shape[1]
    for c in range(count):
        (grad,) = torch.autograd.grad(gaps[:, c].sum(), leaf, retain_graph=c + 1 < count, allow_unused=True)
        if grad is None:
            raise ValueError(NO_GRADIENT)
        yield gaps[:, c].detach(), reference.clean(grad, leaf.dtype).flatten(1)


def malt_order(
    leaf: Tensor, z: Tensor, y: Tensor, count: int, norm: float, candidates: int = _MOST, fixed: Tensor | None = None
) -> tuple[Tensor, int]:
    """(B, count) classes in the order of MALT (arXiv 2407.02240): the gap z_y - z_c over the dual norm of the gradient
    of z_c - z_y, smallest first, among the likeliest wrong classes; and the number of backward passes. ``fixed``:
    pixels that may not change, whose gradient does not count."""
    classes = likeliest(z, y, candidates)
    far = []
    for gap, slope in differences(leaf, z, y, classes):
        if fixed is not None:
            slope = slope.masked_fill(fixed.flatten(1), 0)
        far.append(gap.abs() / torch.linalg.vector_norm(slope, DUAL[norm], 1).clamp_min(1e-12))
    order = torch.stack(far, 1).argsort(dim=1, stable=True)[:, :count]
    return classes.gather(1, order), classes.shape[1]


def malt_targets(victim: Victim, x: Tensor, y: Tensor, count: int, norm: float) -> tuple[Tensor, int]:
    """:func:`malt_order` at x, with a pass of its own."""
    leaf, z = victim.differentiable(x)
    return malt_order(leaf, z, y, count, norm)
