"""Additions with a chosen rounding direction in plain torch: Knuth's TwoSum tells on which side a sum fell."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    s = a + b
    bb = s - a
    return s, (a - (s - bb)) + (b - bb)


def add_up(a: Tensor, b: Tensor) -> Tensor:
    """The smallest representable number >= a + b."""
    s, error = _two_sum(a, b)
    return torch.where(error > 0, torch.nextafter(s, torch.full_like(s, math.inf)), s)


def add_down(a: Tensor, b: Tensor) -> Tensor:
    """The largest representable number <= a + b."""
    s, error = _two_sum(a, b)
    return torch.where(error < 0, torch.nextafter(s, torch.full_like(s, -math.inf)), s)


def add_inward(x0: Tensor, d: Tensor) -> Tensor:
    """x0 + d rounded towards x0, so that ``|result - x0| <= |d|`` holds exactly."""
    return torch.where(d > 0, add_down(x0, d), torch.where(d < 0, add_up(x0, d), x0))


def round_down(value: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` that is not above ``value``."""
    t = torch.tensor(value, dtype=dtype)
    if t.item() > value:
        t = torch.nextafter(t, torch.tensor(-math.inf, dtype=dtype))
    return t.item()


def round_up(value: float, dtype: torch.dtype) -> float:
    """The smallest number of ``dtype`` that is not below ``value``."""
    return -round_down(-value, dtype)
