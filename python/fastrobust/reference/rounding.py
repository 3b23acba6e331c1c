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


def _two_product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a * b in float64 and its error (Dekker 1971)."""
    split = 2.0**27 + 1
    p, a1, b1 = a * b, a * split, b * split
    ah, bh = a1 - (a1 - a), b1 - (b1 - b)
    al, bl = a - ah, b - bh
    return p, ((ah * bh - p) + ah * bl + al * bh) + al * bl


def _exact_sum(terms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row: hi + lo is the sum but for bound, which is zero where every addition was exact."""
    hi = terms
    lo = bound = torch.zeros_like(terms)
    while hi.shape[1] != 1:
        if hi.shape[1] % 2 or not hi.shape[1]:
            hi, lo, bound = (torch.cat([t, torch.zeros_like(t[:, :1] if t.shape[1] else t.sum(1, True))], 1)
                             for t in (hi, lo, bound))  # fmt: skip
            continue
        hi, error = _two_sum(hi[:, ::2], hi[:, 1::2])
        low, error1 = _two_sum(lo[:, ::2], lo[:, 1::2])
        lo, error2 = _two_sum(low, error)
        bound = bound[:, ::2] + bound[:, 1::2] + error1.abs() + error2.abs()
    return hi[:, 0], lo[:, 0], bound[:, 0]


def in_ball(x: Tensor, x0: Tensor, radius: Tensor, norm: float) -> Tensor:
    """(B,) ``||x - x0|| <= radius`` for norm 2 or 1, decided without rounding; for points next to the sphere."""
    d, error = (t.reshape(x.shape[0], math.prod(x.shape[1:])).double() for t in _two_sum(x, -x0))
    limit, limit_error = radius.double(), torch.zeros_like(radius)
    if norm == 2:
        terms = [*_two_product(d, d), *_two_product(2 * d, error), *_two_product(error, error)]
        limit, limit_error = _two_product(limit, limit)
    else:
        terms = [d.abs(), torch.where(d < 0, -error, error)]
    hi, lo, bound = _exact_sum(torch.cat(terms, 1))
    slack = torch.where(bound > 0, 2 * bound + 2.0**-50 * lo.abs(), 0)
    return (hi - limit) + ((lo - limit_error) + slack) <= 0
