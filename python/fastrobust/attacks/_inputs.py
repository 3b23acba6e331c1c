"""Checks and conversions of what an attack is given."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import _checks as ck
from . import _grid

_HALF = (torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Bound = float | Tensor
Box = tuple[Bound, Bound]


class Share(float):
    """A step size given as a share of the radius, over the number of steps."""


MADRY = Share(2.5)  # Madry et al. 2018: the ball can be crossed, and its surface explored


def images(x: Any) -> tuple[Tensor, torch.dtype]:
    """The state (float32; half images are widened) and the dtype to hand back."""
    x = ck.need_tensor(x, "x")
    given = x.dtype
    if given in _HALF:
        x = x.float()
    x = ck.check_state(x, "x")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected a batch (B, ...)")
    return x.detach(), given


def box(clip: Any, x: Tensor) -> Box | None:
    """(lo, hi): two numbers, or two tensors with x's number of dimensions that broadcast to x."""
    if clip is None:
        return None
    try:
        if isinstance(clip, str):
            raise TypeError
        lo, hi = clip
        single = all(isinstance(c, numbers.Real) or getattr(c, "shape", None) == () for c in (lo, hi))
        if not single:
            lo, hi = (torch.as_tensor(c) for c in (lo, hi))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"clip: got {ck.describe(clip)}, expected (lo, hi), numbers or tensors that broadcast to x, or None"
        ) from None
    if single:
        return ck.parse_clip((lo, hi))
    try:
        fits = torch.broadcast_shapes(lo.shape, hi.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"clip: got shapes {tuple(lo.shape)} and {tuple(hi.shape)}, expected numbers or tensors that broadcast to "
            f"x's {tuple(x.shape)}"
        )
    if not bool((lo <= hi).all()):
        raise ValueError("clip: got lo > hi or NaN in some places, expected lo <= hi")
    return _side(lo, math.inf, x), _side(hi, -math.inf, x)


def _side(v: Tensor, inward: float, x: Tensor) -> Tensor:
    """In x's dtype, rounded into the box."""
    near = v.detach().to(x.dtype)
    if v.dtype == torch.float64 != x.dtype:
        past = near.double() < v if inward > 0 else near.double() > v
        near = torch.where(past, torch.nextafter(near, torch.full_like(near, inward)), near)
    return near.reshape(*[1] * (x.dim() - near.dim()), *near.shape).to(x.device)


def into_box(x: Tensor, clip: Box | None, tolerance: float, values: Tensor | None, check: bool) -> Tensor:
    """x with rounding of up to ``tolerance`` taken back: clamped to the box, brought to the grid where there is one.
    With ``check`` what lies elsewhere is refused."""
    if x.numel() == 0:
        return x
    if tolerance:
        near = x if clip is None else torch.clamp(x, *(_as_tensor(c, x) for c in clip))
        near = near if values is None else _grid.nearest(near, values)
        x = torch.where((near.double() - x.double()).abs() <= tolerance, near, x)
    if not check:
        return x
    if clip is not None and isinstance(clip[0], float) and isinstance(clip[1], float):
        least, most = (t.item() for t in torch.aminmax(x))
        if not (least >= clip[0] and most <= clip[1]):
            raise ValueError(
                f"x: got values from {_digits(least)} to {_digits(most)}, expected values in clip = "
                f"({clip[0]:g}, {clip[1]:g}); {_out_of_box(max(clip[0] - least, most - clip[1]), clip[1] - clip[0])}"
            )
    elif clip is not None:
        past = torch.maximum(clip[0] - x, x - clip[1]).amax().item()
        if not past <= 0:
            raise ValueError(f"x: got values outside clip by up to {past:.3g}; {_out_of_box(past, 1.0)}")
    elif bool(x.isnan().any()):
        raise ValueError("x: got NaN, expected numbers")
    if values is not None:
        off = (x - _grid.nearest(x, values)).abs().amax().item()
        if off != 0:
            raise ValueError(
                f"x: got values {off:.3g} off the grid of levels = {len(values)}, expected multiples of "
                f"{(values[1] - values[0]).item():g}; give tolerance= to round them to it first"
            )
    return x


def _as_tensor(c: Bound, x: Tensor) -> Tensor:
    return c if isinstance(c, Tensor) else torch.tensor(c, dtype=x.dtype, device=x.device)


def _digits(value: float) -> str:
    """As few as tell float32 numbers apart."""
    return str(np.float32(value)).removesuffix(".0")


def _out_of_box(past: float, width: float) -> str:
    if past <= 1e-4 * width:
        enough = 10.0 ** math.ceil(math.log10(past))
        return f"outside by {past:.3g}, as rounding does: pass tolerance={enough:.0e} to clamp it"
    return "scale the images (and give normalize= for a model that wants other units), or pass clip=None"


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


def integer(value: Any, name: str, least: int) -> int:
    """Any integral number: Python's, numpy's, an integer tensor of no dimension."""
    number = _index(value)
    if number is None:
        raise TypeError(f"{name}: got {ck.describe(value)}, expected an integer")
    if number < least:
        raise ValueError(f"{name}: got {number}, expected at least {least}")
    return number


def _index(value: Any) -> int | None:
    if isinstance(value, (bool, np.bool_)) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: got {ck.describe(value)}, expected a number >= 0")
    if not 0 <= float(value) < math.inf:
        raise ValueError(f"{name}: got {value}, expected a finite number >= 0")
    return float(value)


def parameter(value: Any, name: str, x: Tensor, norm: float) -> float | Tensor:
    """The checked number, or a tensor of shape (B,) or x's; a number that comes as a tensor on the host is moved once,
    here. Lists and arrays are taken as tensors are; (B,) is one value per example, other shapes broadcast to x."""
    if isinstance(value, (list, tuple, np.ndarray)):
        try:
            value = torch.as_tensor(value, dtype=None if isinstance(value, np.ndarray) else torch.float64)
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name}: got {ck.describe(value)}, expected a number >= 0 or a tensor") from None
        value = value.to(x.device)
    if isinstance(value, Tensor) and tuple(value.shape) not in ((), (x.shape[0],), tuple(x.shape)):
        value = _spread(value, x)
    checked = ck.check_parameter(value, name, x, norm)
    if checked.tensor is not None:
        return checked.tensor
    if not math.isfinite(checked.value):
        raise ValueError(f"{name}: got {checked.value}, expected a finite number")
    return checked.value


def _spread(value: Tensor, x: Tensor) -> Tensor:
    """(B,) where the value does not differ within examples, x's shape where it does."""
    full = (*[1] * (x.dim() - value.dim()), *value.shape)
    if len(full) != x.dim() or any(n not in (1, m) for n, m in zip(full, x.shape, strict=True)):
        return value  # of no shape that fits: refused with the parameter's name
    if all(n == 1 for n in full[1:]):
        return value.reshape(-1).expand(x.shape[0])
    return value.reshape(full).expand(x.shape)


def fixed_pixels(mask: Any, x: Tensor) -> Tensor | None:
    """Where x must stay, of x's shape, from the ``mask`` of the pixels that may move."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask) if isinstance(mask, (np.ndarray, list)) else ck.need_tensor(mask, "mask")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: got {ck.describe(mask)}, expected a bool tensor: True where pixels may change")
    try:
        return ~mask.detach().to(x.device).expand(x.shape)
    except RuntimeError:
        raise ValueError(
            f"mask: got shape {tuple(mask.shape)}, expected one that broadcasts to x's {tuple(x.shape)}"
        ) from None


def check_seed(seed: Any) -> int | None:
    """A 64-bit key."""
    if seed is None:
        return None
    value = _index(seed)
    if value is None:
        raise TypeError(f"seed: got {ck.describe(seed)}, expected an integer or None")
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"seed: got {value}, expected an integer of at most 64 bits")
    return value


def example_numbers(value: Any, x: Tensor) -> int | Tensor:
    """The number of the first example, or (B,) int64 on the host, one for each."""
    if not (isinstance(value, (Tensor, np.ndarray, list)) and np.ndim(value)):
        return integer(value, "first_example", 0)
    numbers = torch.as_tensor(value)
    if tuple(numbers.shape) != (x.shape[0],) or numbers.dtype not in _INTEGERS:
        raise ValueError(f"first_example: got {ck.describe(value)}, expected a number or integers ({x.shape[0]},)")
    numbers = numbers.long().cpu()
    if len(numbers) and int(numbers.min()) < 0:
        raise ValueError(f"first_example: got {int(numbers.min())}, expected at least 0")
    return numbers if len(numbers) else 0


def check_targets(targets: Any, batch: int, device: torch.device) -> Any:
    """What can be said of ``targets`` before the number of classes is known."""
    if isinstance(targets, (np.ndarray, list)) and np.ndim(targets):
        targets = torch.as_tensor(targets).to(device)
    if isinstance(targets, Tensor) and targets.dim():
        if targets.dim() != 2 or targets.shape[0] != batch or not targets.shape[1] or targets.dtype not in _INTEGERS:
            raise ValueError(f"targets: got {ck.describe(targets)}, expected integer classes of shape ({batch}, T)")
        if targets.device != device:
            raise ValueError(f"targets: got device {targets.device}, expected x's device {device}")
        return targets
    if targets is None or (isinstance(targets, str) and targets == "all"):
        return targets
    count = _index(targets)
    if count is None or count < 1:
        raise ValueError(f"targets: got {targets!r}, expected 'all', a number of classes or a (B, T) tensor")
    return count


def labels(y: Any, x: Tensor, named: bool) -> Tensor:
    """Class indices for a named loss; for a callable whatever it takes, with the batch first. Integers become int64."""
    batch = x.shape[0]
    if named:
        if isinstance(y, Tensor) and y.numel() == 1 and batch > 1 and x.dim() <= 3:
            raise ValueError(
                f"y: got one label, but x of shape {tuple(x.shape)} is a batch of {batch}; give one image as x[None]"
            )
        y = ck.check_labels(y, "y", batch, None, x.device)
    else:
        y = ck.need_tensor(y, "y")
        if y.dim() == 0 or y.shape[0] != batch:
            raise ValueError(f"y: got shape {tuple(y.shape)}, expected ({batch}, ...), the batch of x first")
        if y.device != x.device:
            raise ValueError(f"y: got device {y.device}, expected {x.device}")
        y = y.clone()  # a loss may write into it
    y = y.detach()
    return y if y.dtype == torch.bool or y.is_floating_point() or y.is_complex() else y.long()
