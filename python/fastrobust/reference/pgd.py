"""The PGD family in plain torch: the definition of each op, and the oracle of the tests.

Every function takes examples along the first dimension, works in the dtype of ``x0`` on any device, and keeps
``||x' - x0|| <= eps`` and ``lo <= x' <= hi`` exactly (rounding towards ``x0``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import random as rnd
from .rounding import add_down, add_inward, add_up, in_ball, round_down, round_up

INF = math.inf
Clip = tuple[float, float] | tuple[Tensor, Tensor] | None
_LONGEST = 2.0**100  # of an L2 step: longer ones end at the same point of the ball, and their squares overflow
ACCEPT, SHRINK = 2.0**-23, 2.0**-21  # see csrc/pgd/step.h
_LEAST_RADIUS, _MOST_RADIUS = 2.0**-96, 2.0**100  # see csrc/pgd/random_start.h


def _narrow(value: Tensor, x: Tensor, name: str) -> Tensor:
    near = value.to(x.dtype)
    if name != "eps":
        return near
    below = torch.nextafter(near, torch.full_like(near, -INF))
    return torch.where(near.double() > value.double(), below, near)


def _per_example(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """(B,) of the parameter, in x's dtype; a radius is rounded down."""
    if not isinstance(value, Tensor):  # rounded as a tensor: older torch traces no Tensor.item
        value = torch.full((), value, dtype=torch.float64, device=x.device)
    return _narrow(value, x, name).expand(x.shape[0])


def per_element(value: float | Tensor, x: Tensor, name: str) -> Tensor:
    """The parameter with x's shape."""
    if isinstance(value, Tensor) and value.dim() == x.dim() and value.shape == x.shape and x.dim() != 1:
        return _narrow(value, x, name)
    return _per_example(value, x, name).view(-1, *[1] * (x.dim() - 1)).expand_as(x)


def as_rows(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.dim() - 1))


def _total(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], math.prod(t.shape[1:])).double().sum(1)


def _box(clip: Clip, dtype: torch.dtype) -> tuple[Any, Any]:
    """Its faces: numbers, rounded inwards, or tensors that are of that dtype and broadcast already."""
    if clip is None:
        return -INF, INF
    lo, hi = clip
    return (
        (lo, hi) if isinstance(lo, Tensor) or isinstance(hi, Tensor) else (round_up(lo, dtype), round_down(hi, dtype))
    )


def clip_to(y: Tensor, lo: Any, hi: Any) -> Tensor:
    """y moved to the box; a -0 on a face keeps its sign, a NaN stays."""
    return torch.where(y < lo, lo, torch.where(y > hi, hi, y))


def clean(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """NaN counts as 0, an infinite coordinate as the largest finite number."""
    top = torch.finfo(torch.float32).max
    return torch.nan_to_num(grad.to(dtype), nan=0.0, posinf=top, neginf=-top)


def _accepted(size: Tensor, radius: Tensor) -> Tensor:
    return (size <= radius * (1 - ACCEPT)) & (radius > 0)  # a radius of zero gives x0, whatever the sign of a zero in x


def _near_sphere(size: Tensor, radius: Tensor) -> Tensor:
    """Where the computed size does not tell on which side a point lies."""
    return (size > radius * (1 - ACCEPT)) & (size <= radius * (1 + ACCEPT))


def project(x: Tensor, x0: Tensor, eps: float | Tensor, norm: float = INF, clip: Clip = (0.0, 1.0)) -> Tensor:
    """Projection on the ball around x0, then on the box; for norm 1 exactly on their intersection."""
    lo, hi = _box(clip, x.dtype)
    if norm == INF:
        e = per_element(eps, x, "eps")
        return clip_to(torch.minimum(torch.maximum(x, add_up(x0, -e)), add_down(x0, e)), lo, hi)
    radius = _per_example(eps, x, "eps").double()
    d = x - x0
    if norm == 2:
        size = _total(d.double() ** 2).sqrt()
        factor = torch.where(size > 0, radius * (1 - SHRINK) / size.clamp_min(1e-300), 0).to(x.dtype)
        inside = _accepted(size, radius) | (_near_sphere(size, radius) & in_ball(x, x0, radius, 2))
        shrunk = add_inward(x0, d * as_rows(factor, x))
        return clip_to(torch.where(as_rows(inside, x), x, shrunk), lo, hi)
    room = torch.where(d > 0, hi - x0, x0 - lo)
    lengths = lambda lam: torch.minimum((d.abs() - as_rows(lam, x)).clamp_min(0), room)
    low = torch.zeros_like(radius)
    total = _total(lengths(low.to(x.dtype)))
    in_box = ((x >= lo) & (x <= hi)).reshape(x.shape[0], -1 if x.numel() else 0).all(1)
    inside = _accepted(total, radius) | (_near_sphere(total, radius) & in_box & in_ball(x, x0, radius, 1))
    high = d.abs().reshape(x.shape[0], -1).double().amax(1) if x.numel() else low
    for _ in range(100):  # bisection for sum min(max(|d| - lambda, 0), room) = eps
        mid = 0.5 * (low + high)
        fits = _total(lengths(mid.to(x.dtype))) <= radius * (1 - SHRINK)
        low, high = torch.where(fits, low, mid), torch.where(fits, mid, high)
    length = (d.abs() - as_rows(high.to(x.dtype), x)).clamp_min(0)
    shrunk = add_inward(x0, torch.where(d < 0, -length, length))
    return clip_to(torch.where(as_rows(inside, x), x, shrunk), lo, hi)


def _l1_ascend(x: Tensor, g: Tensor, step: Tensor, lo: Any, hi: Any) -> Tensor:
    """max <g, p> with ||p||_1 <= step inside the box: fill coordinates in order of |g| (ties: lower index first)."""
    n = math.prod(x.shape[1:])
    flat, gf = x.reshape(x.shape[0], n), g.reshape(x.shape[0], n)
    lo, hi = (side.expand_as(x).reshape(flat.shape) if isinstance(side, Tensor) else side for side in (lo, hi))
    room = torch.where(gf > 0, hi - flat, torch.where(gf < 0, flat - lo, 0)).clamp_min(0).double()
    order = gf.abs().argsort(dim=1, descending=True, stable=True)
    sorted_room = room.gather(1, order)
    before = torch.cat([torch.zeros_like(sorted_room[:, :1]), sorted_room.cumsum(1)[:, :-1]], 1)
    left = (step.double()[:, None] - before).nan_to_num(nan=0.0).clamp_min(0)  # inf - inf: nothing is left
    take = torch.zeros_like(room).scatter(1, order, torch.minimum(sorted_room, left))
    face = torch.where(gf > 0, hi, lo)
    moved = flat + take.to(x.dtype) * gf.sign()
    return torch.where((take >= room) & (room > 0), face, moved).to(x.dtype).reshape(x.shape)


def ascend(
    x: Tensor, grad: Tensor, step_size: float | Tensor, norm: float, lo: Any, hi: Any, normalize: bool
) -> Tensor:
    """The step before projection."""
    g = clean(grad, x.dtype)
    if norm == INF:
        return torch.where(g == 0, x, x + per_element(step_size, x, "step_size") * g.sign())  # an infinite step times 0
    step = _per_example(step_size, x, "step_size")
    if norm == 1:
        return _l1_ascend(x, g, step, lo, hi)
    if not normalize:
        return torch.where(g == 0, x, x + as_rows(step, x) * g)
    length = _total(g.double() ** 2).sqrt()
    far = step.double().clamp(-_LONGEST, _LONGEST)
    scaled = g.double() * as_rows(torch.where(length > 0, far / length.clamp_min(1e-300), 0), x)
    return x + scaled.to(x.dtype)


def pgd_step(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: float = INF,
    clip: Clip = (0.0, 1.0),
    active: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """``project(x + steepest ascent step of size step_size)`` (thesis eq. 2.2); see :func:`fastrobust.ops.pgd_step`."""
    lo, hi = _box(clip, x.dtype)
    y = project(ascend(x, grad, step_size, norm, lo, hi, normalize), x0, eps, norm, clip)
    return y if active is None else torch.where(as_rows(active, x), y, x)


def fosc(x: Tensor, x0: Tensor, grad: Tensor, eps: float | Tensor, norm: float = INF) -> Tensor:
    """``eps ||g||_* - <x - x0, g>`` (Wang et al. 2019, eq. 4), (B,)."""
    g = clean(grad, x.dtype).double()
    inner = _total((x - x0).double() * g)
    if norm == INF:
        dual = _total(g.abs() * per_element(eps, x, "eps").double())
    elif norm == 2:
        dual = _per_example(eps, x, "eps").double() * _total(g**2).sqrt()
    else:
        flat = g.abs().reshape(x.shape[0], math.prod(x.shape[1:]))
        top = flat.amax(1) if flat.shape[1] else flat.sum(1)
        dual = _per_example(eps, x, "eps").double() * top
    return (dual - inner).to(x.dtype)


def pgd_step_fosc(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    threshold: float,
    norm: float = INF,
    clip: Clip = (0.0, 1.0),
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration of Wang et al. 2019, algorithm 1: all move the first time, later the active with FOSC >
    threshold."""
    value = fosc(x, x0, grad, eps, norm)
    moves = torch.ones_like(value, dtype=torch.bool) if active is None else active & (value > threshold)
    return pgd_step(x, x0, grad, step_size, eps, norm, clip, moves), value, moves


def atas_step(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    v: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: float = INF,
    clip: Clip = (0.0, 1.0),
    beta: float = 0.5,
    c: float = 0.01,
    variant: str = "paper",
    step_range: tuple[float, float] | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Thesis algorithm 5.3: v' = beta v + (1 - beta) ||g||^2, step = alpha / sqrt(v' + c), then a PGD step."""
    norm2 = _total(clean(grad, x.dtype).double() ** 2)
    average = (beta * v.double() + (1 - beta) * norm2).to(v.dtype)
    if active is not None:
        average = torch.where(active, average, v)
    alpha = _per_example(step_size, x, "step_size").double()
    w = average.double()
    step = alpha / (1 + w.sqrt() / c) if variant == "authors" else alpha / (w + c).sqrt()
    step = step.to(x.dtype)
    if step_range is not None:
        step = step.clamp(*step_range)
    return pgd_step(x, x0, grad, step, eps, norm, clip, active), average, step


def sparse_sign(g: Tensor, keep: Tensor | None) -> Tensor:
    """The sign of the ``keep`` coordinates of largest |g| and of those equal to the last of them, over their number."""
    n = math.prod(g.shape[1:])
    size = g.abs().reshape(g.shape[0], n)
    if keep is not None and n:
        least = size.sort(1, descending=True).values.gather(1, keep.clamp(1, n)[:, None] - 1)
        size = torch.where(size >= least, size, 0)
    count = (size > 0).sum(1, keepdim=True).clamp_min(1).to(g.dtype)
    return torch.where((size > 0).reshape(g.shape), g.sign(), 0) / as_rows(count, g)


def averaged(x: Tensor, previous: Tensor, z: Tensor, momentum: float) -> Tensor:
    """``x + m (z - x) + (1 - m) (x - previous)``."""
    return x + momentum * (z - x) + (1 - momentum) * (x - previous)


def apgd_step(
    x: Tensor,
    previous: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: float = INF,
    clip: Clip = (0.0, 1.0),
    momentum: float = 0.75,
    keep: Tensor | None = None,
) -> Tensor:
    """Croce & Hein 2020, algorithm 1, lines 7 and 8 (norm 1: Croce & Hein 2021); see
    :func:`fastrobust.ops.apgd_step`."""
    if norm == 1:
        length = as_rows(_per_example(step_size, x, "step_size"), x)
        z = project(x + length * sparse_sign(clean(grad, x.dtype), keep), x0, eps, norm, clip)
    else:
        z = pgd_step(x, x0, grad, step_size, eps, norm, clip)
    return z if momentum == 1 else project(averaged(x, previous, z, momentum), x0, eps, norm, clip)


def ascent_note(
    value: Tensor, score: Tensor, sign: float, left: Tensor, left_grad: Tensor, best: Tensor, best_grad: Tensor,
    last_value: Tensor, best_value: Tensor, best_score: Tensor, rises: Tensor, best_is_x: Tensor,
) -> None:  # fmt: skip
    """What Auto-PGD notes after the step from ``left``, in place: the value there, whether it rose, the best value with
    its score. The best point is the current one where ``best_is_x``; one that was left for a worse is kept in ``best``.
    """
    value = sign * value
    rises += value > last_value
    last_value.copy_(value)
    better = value > best_value
    save = ~better & best_is_x
    best_value.copy_(torch.where(better, value, best_value))
    best_score.copy_(torch.where(better, score, best_score))
    for kept, point in ((best, left), (best_grad, left_grad)):
        kept.copy_(torch.where(as_rows(save, kept), point, kept))
    best_is_x.copy_(better)


def ascent_check(
    needed: float, x: Tensor, grad: Tensor, best: Tensor, best_grad: Tensor, last_value: Tensor, mark: Tensor,
    best_value: Tensor, factor: Tensor, rises: Tensor, best_is_x: Tensor, halved: Tensor,
) -> None:  # fmt: skip
    """Auto-PGD at a checkpoint (Croce & Hein 2020, section 3), in place: ``factor``, of the step, is halved, and x goes
    back to the best point, where fewer than ``needed`` steps raised the value, or where neither the step nor the best
    value (``mark``) has changed since the last checkpoint."""
    halve = (rises < needed) | (~halved & (best_value <= mark))
    factor.copy_(torch.where(halve, factor / 2, factor))
    back = halve & ~best_is_x
    for point, kept in ((x, best), (grad, best_grad)):
        point.copy_(torch.where(as_rows(back, point), kept, point))
    last_value.copy_(torch.where(back, best_value, last_value))
    halved.copy_(halve)
    mark.copy_(best_value)
    rises.zero_()


def random_start(
    x0: Tensor,
    eps: float | Tensor,
    norm: float = INF,
    clip: Clip = (0.0, 1.0),
    seed: int = 0,
    first_example: int | Tensor = 0,
) -> Tensor:
    """A point of the ball inside the box; see :func:`fastrobust.ops.random_start`."""
    batch, n = x0.shape[0], math.prod(x0.shape[1:])
    lo, hi = _box(clip, x0.dtype)
    u = rnd.words(seed, batch, n, first_example, 0, x0.device)
    if norm == INF:
        e = per_element(eps, x0, "eps")
        return spread(rnd.uniform(u).to(x0.dtype).reshape(x0.shape), x0, e, lo, hi)
    even = rnd.words(seed, batch, n + n % 2, first_example, 0, x0.device)
    t = (rnd.normals(even)[:, :n] if norm == 2 else rnd.laplace(u)).double()
    extra = -rnd.uniform_open(rnd.words(seed, batch, 1, first_example, 1, x0.device)[:, 0]).log()
    size = ((t**2).sum(1) + 2 * extra).sqrt() if norm == 2 else t.abs().sum(1) + extra
    radius = _per_example(eps, x0, "eps").double()
    radius = torch.where(radius < _LEAST_RADIUS, 0, radius.clamp_max(_MOST_RADIUS))
    d = (t * (radius * (1 - 2.0**-20) / size)[:, None]).to(x0.dtype).reshape(x0.shape)
    return reflect(d, x0, lo, hi)


def spread(u: Tensor, x0: Tensor, eps: Any, lo: Any, hi: Any) -> Tensor:
    """u in [0, 1) to the intersection of the L-inf ball and the box."""
    start, end = add_up(x0, -eps).clamp_min(lo), add_down(x0, eps).clamp_max(hi)
    return torch.minimum(torch.maximum(start + u * (end - start), start), end)


def reflect(d: Tensor, x0: Tensor, lo: Any, hi: Any) -> Tensor:
    """x0 + d, on the other side of x0 where it leaves the box and that side does not, and clipped otherwise."""
    above, below = hi - x0, x0 - lo
    d = torch.where(((d > above) & (d <= below)) | ((-d > below) & (-d <= above)), -d, d)
    return clip_to(add_inward(x0, d), lo, hi)
