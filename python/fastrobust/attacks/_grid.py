"""Pixels of so many levels, as 8-bit files hold them: the point of the grid that an iterate stands for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def table(levels: int, lo: float, hi: float, dtype: torch.dtype, x: Tensor) -> Tensor:
    """The pixel values lo + k (hi - lo) / (levels - 1), rounded to ``dtype`` as torchvision's ``k / 255`` is."""
    k = torch.arange(levels, dtype=torch.float64, device=x.device)
    return (lo + k * (hi - lo) / (levels - 1)).to(dtype).to(x.dtype).clamp(_above(lo, x), -_above(-hi, x))


def _above(value: float, x: Tensor) -> float:
    """The least number of x's dtype that is not below value."""
    near = torch.tensor(value, dtype=torch.float64).to(x.dtype)
    return (torch.nextafter(near, torch.full_like(near, math.inf)) if near.item() < value else near).item()


def nearest(x: Tensor, values: Tensor) -> Tensor:
    up = torch.bucketize(x, values).clamp(1, len(values) - 1)
    below, above = values[up - 1], values[up]
    return torch.where(x - below <= above - x, below, above)


def snap(x: Tensor, x0: Tensor, values: Tensor, eps: float | Tensor, norm: float) -> Tensor:
    """A grid point near x in the ball around x0, which lies on the grid; x lies in the ball.

    Each coordinate has an inner neighbour, between x0 and x, and an outer one beyond x. The inner ones are in the ball
    whatever the norm. Norm inf takes the outer one where it is nearer and in the ball; norms 2 and 1 take outer ones in
    the order of their nearness up to the length that x has, so that small perturbations do not vanish by rounding.
    """
    rising, last = x >= x0, len(values) - 1
    inner = torch.where(rising, torch.bucketize(x, values, right=True) - 1, torch.bucketize(x, values)).clamp(0, last)
    outer = (inner + torch.where(rising, 1, -1)).clamp(0, last)
    low, high = values[inner], values[outer]
    start, here, near, far = (t.double() for t in (x0, x, low, high))
    part = ((here - near).abs() / (far - near).abs()).nan_to_num(0.0, 0.0)  # 0 at the inner neighbour, 1 at the outer
    if norm == math.inf:
        radius: Any = eps
        if isinstance(eps, Tensor):
            radius = (eps.reshape(-1, *[1] * (x.dim() - 1)) if eps.dim() == 1 else eps).double()
        return torch.where((part > 0.5) & ((far - start).abs() <= radius), high, low)
    length = lambda t: (t - start).flatten(1).abs().pow(norm)
    part, base = part.flatten(1), length(near)
    order = part.argsort(1, descending=True)
    spent = base.sum(1, keepdim=True) + (length(far) - base).gather(1, order).cumsum(1)
    room = length(here).sum(1, keepdim=True) * (1 - 1e-9)  # the sums round
    chosen = torch.zeros_like(part, dtype=torch.bool).scatter(1, order, (spent <= room) & (part.gather(1, order) > 0))
    return torch.where(chosen.view_as(x), high, low)
