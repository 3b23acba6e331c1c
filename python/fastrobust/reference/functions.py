"""Ranges and lines of functions of one number that are no activations of the kernels, in plain torch.

As in :mod:`fastrobust.reference.relaxations`: whatever the slope d, intercepts are the extremes of s(x) - d x over the
ends of the interval and the points inside where s' = d or where s has a kink, so every line holds on all of [l, u].
Kind "parallel": the chord's slope on both sides; "crown": of convex functions the tangent at the midpoint below and the
chord above, of concave ones the reverse, of others the better of the two at the midpoint.

exp, log, sqrt, rsqrt, reciprocal (of positive numbers), square, hardswish: x relu6(x + 3) / 6, mish: x tanh(ln(1+e^x)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.reference.relaxations import Lines


class Function(NamedTuple):
    """value and derivative; ``meets``: the points with s' = d; ``bend``: 1 convex, -1 concave, 0 neither; ``least``:
    where s is smallest, where that is inside; ``starts``: the end of its domain, and whether that belongs to it."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    meets: Callable[[Tensor], list[Tensor]]
    bend: int
    kinks: tuple[float, ...] = ()
    least: float | None = None
    starts: tuple[float, bool] | None = None


# s'' = 0 of mish, the place of its minimum, and where its derivative has become 0 or 1 (float64)
_MISH = (-2.256376396396079, 1.4905711794854285, -1.1924312145154952, 50.0)


def _mish(x: Tensor) -> Tensor:
    x = x.clamp(min=-1e3)
    t = torch.tanh(F.softplus(x))
    return t + x * (1 - t * t) * torch.sigmoid(x)


def _mish_meets(d: Tensor) -> list[Tensor]:
    low, high, _, far = _MISH
    found = []
    for a, b, rising in ((-far, low, False), (low, high, True), (high, far, False)):
        left, right = torch.full_like(d, a), torch.full_like(d, b)
        for _ in range(56 if d.dtype == torch.float64 else 34):
            mid = 0.5 * (left + right)
            over = (_mish(mid) < d) == rising
            left, right = torch.where(over, mid, left), torch.where(over, right, mid)
        found.append(0.5 * (left + right))
    return found


def _positive(d: Tensor) -> Tensor:
    return d.clamp(min=torch.finfo(d.dtype).tiny)


FUNCTIONS: dict[str, Function] = {
    "exp": Function(torch.exp, torch.exp, lambda d: [_positive(d).log()], 1),
    "log": Function(torch.log, torch.reciprocal, lambda d: [_positive(d).reciprocal()], -1, starts=(0.0, False)),
    "sqrt": Function(
        torch.sqrt, lambda x: 0.5 * torch.rsqrt(x), lambda d: [(2 * _positive(d)) ** -2], -1, starts=(0.0, True)
    ),
    "rsqrt": Function(
        torch.rsqrt, lambda x: -0.5 * x**-1.5, lambda d: [(2 * _positive(-d)) ** (-2 / 3)], 1, starts=(0.0, False)
    ),
    "reciprocal": Function(
        torch.reciprocal, lambda x: -(x**-2), lambda d: [torch.rsqrt(_positive(-d))], 1, starts=(0.0, False)
    ),
    "square": Function(torch.square, lambda x: 2 * x, lambda d: [0.5 * d], 1, least=0.0),
    "hardswish": Function(
        lambda x: F.hardswish(x.clamp(min=-3)),  # 0 at minus infinity, too
        lambda x: torch.where(x <= -3, 0.0, torch.where(x >= 3, 1.0, (2 * x + 3) / 6)),
        lambda d: [3 * d - 1.5],
        0,
        (-3.0, 3.0),
        -1.5,
    ),
    "mish": Function(lambda x: F.mish(x.clamp(min=-1e3)), _mish, _mish_meets, 0, (), _MISH[2]),
}


def outside(lower: Tensor, name: str) -> Tensor:
    """Where an interval that begins at ``lower`` leaves the domain."""
    starts = FUNCTIONS[name].starts
    if starts is None:
        return torch.zeros_like(lower, dtype=torch.bool)
    return lower < starts[0] if starts[1] else lower <= starts[0]


def interval(lower: Tensor, upper: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """[min s, max s] over [lower, upper] within the domain."""
    f = FUNCTIONS[name]
    sl, su = f.value(lower), f.value(upper)
    low, high = torch.minimum(sl, su), torch.maximum(sl, su)
    if f.least is None:
        return low, high
    t = torch.full_like(lower, f.least)
    return torch.where((lower <= t) & (t <= upper), f.value(t), low), high


def _intercepts(f: Function, d: Tensor, l: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    sl, su = f.value(l), f.value(u)
    values = [sl - d * l, su - d * u]
    with torch.no_grad():
        points = [torch.full_like(d, k) for k in f.kinks] + f.meets(d)
        inside = [(l < t) & (t < u) for t in points]
        size = d.abs() * torch.maximum(l.abs(), u.abs()) + torch.maximum(sl.abs(), su.abs())
        pad = 8 * torch.finfo(d.dtype).eps * size + 1e-28  # also where products vanish
    for t, m in zip(points, inside, strict=True):
        values.append(torch.where(m, f.value(torch.where(m, t, l)) - d * t.where(m, l), values[0]))
    found = torch.stack(values)
    return found.amin(0) - pad, found.amax(0) + pad


def relax(lower: Tensor, upper: Tensor, name: str, kind: str = "parallel") -> Lines:
    """Lines around a function on [lower, upper] within its domain, lower <= upper: slopes (1 or 2, *shape), intercepts
    (2, *shape). Where ends, values or slopes are not finite: horizontal lines at the range."""
    f = FUNCTIONS[name]
    low, high = interval(lower, upper, name)
    mid = lower + 0.5 * (upper - lower)
    tangent = f.derivative(mid)
    width = upper - lower
    most = torch.finfo(lower.dtype).max ** 0.5
    fine = (low.abs() < most) & (high.abs() < most) & (tangent.abs() < most) & (width < most)
    # of functions that begin somewhere widths count relative to the place
    narrow = width < (1e-2 if f.starts is None else 1e-2 * upper)
    safe = fine & ~narrow
    chord = torch.where(safe, (f.value(upper) - f.value(lower)) / torch.where(safe, width, 1.0), tangent)
    base = torch.ones_like(lower)  # inside every domain
    l, u = torch.where(fine, lower, base), torch.where(fine, upper, base)
    chord, tangent = torch.where(fine, chord, 0.0), torch.where(fine, tangent, 0.0)
    if kind == "parallel":
        slopes, ends = chord[None], torch.stack(_intercepts(f, chord, l, u))
    elif f.bend:
        slopes = torch.stack([tangent, chord] if f.bend > 0 else [chord, tangent])
        ends = torch.stack([_intercepts(f, slopes[0], l, u)[0], _intercepts(f, slopes[1], l, u)[1]])
    else:
        both = torch.stack([chord, tangent])
        found = [_intercepts(f, d, l, u) for d in both.unbind(0)]
        below, above = torch.stack([e[0] for e in found]), torch.stack([e[1] for e in found])
        at = torch.where(fine, mid, base)
        which = (both * at + below).detach().argmax(0, True), (both * at + above).detach().argmin(0, True)
        slopes = torch.stack([both.gather(0, w)[0] for w in which])
        ends = torch.stack([t.gather(0, w)[0] for t, w in zip((below, above), which, strict=True)])
    pad = 8 * torch.finfo(lower.dtype).eps
    flat = torch.stack([low - pad * low.abs(), high + pad * high.abs()])
    return Lines(slopes, torch.where(fine, ends, flat))


__all__ = ["FUNCTIONS", "Function", "interval", "outside", "relax"]
