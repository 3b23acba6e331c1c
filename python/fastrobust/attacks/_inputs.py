"""Checks and conversions of what an attack is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ops import _checks as ck

_HALF = (torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def images(x: Any, lo: float, hi: float, check: bool) -> tuple[Tensor, torch.dtype]:
    """The state (float32; half images are widened) and the dtype to hand back."""
    x = ck.need_tensor(x, "x")
    given = x.dtype
    if given in _HALF:
        x = x.float()
    x = ck.check_state(x, "x")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected a batch (B, ...)")
    if check:
        ck.check_values_in_box(x, "x", lo, hi)
    return x.detach(), given


def narrow_inward(x: Tensor, x0: Tensor, dtype: torch.dtype) -> Tensor:
    """x in a half dtype, each coordinate rounded towards x0 (which that dtype holds), so that the ball still holds."""
    near = x.to(dtype)
    bits = near.view(torch.int16)
    wide = near.to(x.dtype)
    past = torch.where(x < x0, wide < x, wide > x)  # compared exactly: a difference would round
    # one unit in the last place towards x0: up when the result lies below it, in the order of the magnitudes
    up = wide < x0
    away_from_zero = torch.where(up, wide > 0, wide < 0) | (wide == 0)
    moved = torch.where(away_from_zero, bits + 1, bits - 1)
    moved = torch.where(wide == 0, torch.where(up, 1, -32767).to(torch.int16), moved)
    return torch.where(past, moved, bits).view(dtype)


def default_step(eps: float | Tensor, steps: int) -> float | Tensor:
    """2.5 eps / steps (Madry et al. 2018): the ball can be crossed, and its surface explored."""
    return eps * (2.5 / max(steps, 1))


def integer(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: got {ck.describe(value)}, expected an integer")
    if value < least:
        raise ValueError(f"{name}: got {value}, expected at least {least}")
    return value


def take(value: float | Tensor, index: Tensor, batch: int) -> float | Tensor:
    """The rows of a per-example or per-element parameter."""
    if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == batch:
        return value[index]
    return value


def parameter(value: Any, name: str, x: Tensor, norm: float) -> float | Tensor:
    """The checked number, or tensor in x's dtype; a number that comes as a tensor on the host is moved once, here."""
    checked = ck.check_parameter(value, name, x, norm)
    if checked.tensor is not None:
        return checked.tensor
    if not math.isfinite(checked.value):
        raise ValueError(f"{name}: got {checked.value}, expected a finite number")
    return checked.value


def check_seed(seed: Any) -> int | None:
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise TypeError(f"seed: got {ck.describe(seed)}, expected an integer or None")
    return seed


def check_targets(targets: Any, batch: int, device: torch.device) -> None:
    """What can be said of ``targets`` before the number of classes is known."""
    if isinstance(targets, Tensor):
        if targets.dim() != 2 or targets.shape[0] != batch or not targets.shape[1] or targets.dtype not in _INTEGERS:
            raise ValueError(f"targets: got {ck.describe(targets)}, expected integer classes of shape ({batch}, T)")
        if targets.device != device:
            raise ValueError(f"targets: got device {targets.device}, expected x's device {device}")
    elif targets not in (None, "all") and (isinstance(targets, bool) or not isinstance(targets, int) or targets < 1):
        raise ValueError(f"targets: got {targets!r}, expected 'all', a number of classes or a (B, T) tensor")
