"""Boxes with faces of their own per channel or per pixel.

The kernels know boxes of two numbers. Clipping comes last in every step but the L1 one, and moves a point of the ball
towards x0, which lies in the box: a kernel without a box and a clip behind it are the step, bit for bit. The L1 step
and projection depend on the box as a whole; they run as their definition in plain torch.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...reference import pgd as reference
from .. import _checks as ck
from . import _kernels as op

INF = math.inf


class Box(NamedTuple):
    """Faces that broadcast to x, of its dtype, rounded inwards."""

    lo: Tensor
    hi: Tensor


def parse_box(clip: Any, x: Tensor, name: str = "clip") -> tuple[float, float] | Box:
    """(lo, hi) of a clip of two numbers or None; a Box where a side is a tensor, an array or a list."""
    if clip is None:
        return -INF, INF
    if type(clip) is tuple and len(clip) == 2 and type(clip[0]) is type(clip[1]) is float and clip[0] <= clip[1]:
        return clip
    try:
        sides = list(clip)
    except TypeError:
        sides = []
    if len(sides) != 2 or not any(isinstance(side, (Tensor, np.ndarray, list, tuple)) for side in sides):
        return ck.parse_clip(clip, name)
    if not any(map(_many, sides)):
        return ck.parse_clip([side.item() if hasattr(side, "item") else side for side in sides], name)
    lo, hi = (_side(side, name, x) for side in sides)
    lo, hi = _inwards(lo, x.dtype, INF), _inwards(hi, x.dtype, -INF)
    if ck.has_values(lo) and ck.has_values(hi) and lo.device.type == "cpu" and not bool((lo <= hi).all()):
        raise ValueError(f"{name}: got lower faces above upper ones, or NaN, expected lo <= hi everywhere in {x.dtype}")
    return Box(lo, hi)


def _many(side: Any) -> bool:
    """More than a number whose value may be read."""
    if isinstance(side, Tensor):
        return side.numel() != 1 or side.device.type != "cpu" or not ck.has_values(side)
    return isinstance(side, (list, tuple)) or (isinstance(side, np.ndarray) and side.size != 1)


def _side(side: Any, name: str, x: Tensor) -> Tensor:
    if isinstance(side, numbers.Real) and not isinstance(side, bool):
        return torch.full((), float(side), dtype=torch.float64, device=x.device)
    if not isinstance(side, Tensor):
        side = ck.as_tensor(side, name, x.device, "(lo, hi), each a number or a tensor that broadcasts to x")
    ck.need_dense(side, name)
    if side.dtype == torch.bool or side.dtype.is_complex:
        raise TypeError(f"{name}: got {ck.describe(side)}, expected real numbers")
    if side.device != x.device and side.dim():
        raise ValueError(f"{name}: got device {side.device}, expected x's device {x.device}")
    if side.numel() == 1:
        return side.detach().reshape(()).to(x.device)
    if not ck.fits(tuple(side.shape), tuple(x.shape)):
        raise ValueError(
            f"{name}: got shape {tuple(side.shape)}, expected a number or a shape that broadcasts to x's "
            f"{tuple(x.shape)}, with as many dimensions as x or one example"
        )
    return side.detach()


def _inwards(side: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    near = side.to(dtype)
    if side.dtype == dtype:
        return near
    wide = side.double()
    outside = near.double() < wide if towards > 0 else near.double() > wide
    return torch.where(outside, torch.nextafter(near, torch.full_like(near, towards)), near)


def is_finite(box: tuple[float, float] | Box) -> bool:
    """Are all faces finite? A CUDA tensor's are not read, and count as finite."""
    if not isinstance(box, Box):
        return box[0] > -INF and box[1] < INF
    return all(not ck.has_values(t) or t.device.type != "cpu" or bool(t.isfinite().all()) for t in box)


def _value(p: ck.Parameter) -> Any:
    return p.value if p.tensor is None else p.tensor


def step(
    x: Tensor,
    x0: Tensor,
    grad: Tensor | None,
    step_size: ck.Parameter,
    eps: ck.Parameter,
    norm: float,
    box: Box,
    active: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """``pgd_step``, or ``project`` where grad is None."""
    with torch.no_grad():
        if norm != 1 and x.dtype == torch.float32:
            code = op.NORM_CODE[norm]
            moved = op.pgd_step(x, x0, grad, *step_size, *eps, code, -INF, INF, active, normalize)
            return clip(moved, x, box, active)
        if grad is None:
            y = reference.project(x, x0, _value(eps), norm, box)
        else:
            y = reference.pgd_step(x, x0, grad, _value(step_size), _value(eps), norm, box, active, normalize)
        return y.contiguous(memory_format=ck.dense_format(x) or torch.contiguous_format)


def clip(moved: Tensor, x: Tensor, box: Box, active: Tensor | None) -> Tensor:
    """What a step without a box made of x, clipped; examples that are not active stay as they are."""
    y = reference.clip_to(moved, *box)
    return y if active is None else torch.where(reference.as_rows(active, x), y, x)


def random_start(x0: Tensor, eps: ck.Parameter, norm: float, box: Box, seed: tuple[Any, ...]) -> Tensor:
    """``random_start`` from the kernel's own numbers: u of [0, 1) for norm inf, else a point of the ball around 0."""
    with torch.no_grad():
        code = op.NORM_CODE[norm]
        if norm != INF:
            d = op.random_start(torch.zeros_like(x0), *eps, code, -INF, INF, *seed)
            return reference.reflect(d, x0, *box)
        half = torch.full_like(x0, 0.5)
        u = op.random_start(half, None, 0.5, code, 0.0, 1.0, *seed)
        return reference.spread(u, x0, reference.per_element(_value(eps), x0, "eps"), *box)
