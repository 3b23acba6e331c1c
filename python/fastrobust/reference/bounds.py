"""Interval and linear bound propagation in plain torch: the definition of every op of ``fastrobust.ops.bounds``.

Notation: B examples, S rows per example, R = rows of all examples, n the flattened size of a layer. The input set of
example i is {x_i + d : ||d||_p <= eps_i} for a scalar eps_i, {x_i + eps_i * v : ||v||_p <= 1} for a per-element eps_i
(thesis, section 3.2.1), intersected with the box ``clip``. q is the dual exponent, 1/p + 1/q = 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust._input_sets import Clip, dual_exponent, dual_norm, eps_like, input_box, row_norm
from fastrobust.reference.relaxations import interval_activation, relax

__all__ = [
    "Clip",
    "center_radius",
    "concretize",
    "concretize_rows",
    "dual_exponent",
    "dual_norm",
    "eps_like",
    "input_box",
    "interval_activation",
    "interval_ball_conv2d",
    "interval_ball_linear",
    "interval_conv2d",
    "interval_linear",
    "linear_back_step",
    "region",
    "relax",
    "room_of",
    "row_maps",
    "row_norm",
    "split_support",
]


def center_radius(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    return 0.5 * lower + 0.5 * upper, 0.5 * upper - 0.5 * lower  # sums of the ends may overflow


def interval_linear(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    params: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """W c + b -+ |W| r with c, r the centre and radius of [lower, upper]: (..., n) -> (..., m) (thesis, equation
    3.8)."""
    c, r = center_radius(lower, upper)
    c, r = F.linear(c, weight, bias), F.linear(r, weight.abs())
    return _finish(c - r, c + r, activation, params)


def interval_conv2d(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
    params: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The same for a convolution with zero padding: (B, C, H, W) -> (B, O, H', W')."""
    c, r = center_radius(lower, upper)
    c = F.conv2d(c, weight, bias, stride, padding, dilation, groups)
    r = F.conv2d(r, weight.abs(), None, stride, padding, dilation, groups)
    return _finish(c - r, c + r, activation, params)


def _finish(lower: Tensor, upper: Tensor, activation: str | None, params: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return (lower, upper) if activation is None else interval_activation(lower, upper, activation, params)


def interval_ball_linear(
    x: Tensor,
    eps: float | Tensor,
    norm: float,
    clip: Clip,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    params: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Bounds of W x' + b over the input set: W x + b -+ eps ||W||_q row by row (Algorithm 3.1, line 2) and, with
    ``clip``, the tighter of that and of the bounds over the clipped box. x: (B, n) or (B, *shape) with n elements."""
    e = eps_like(eps, x).expand_as(x)
    box: Any = None
    if clip is not None or norm == math.inf:
        low, up = input_box(x, e, clip)
        box = interval_linear(low.flatten(1), up.flatten(1), weight, bias)
    x, e = x.flatten(1), e.flatten(1)
    if norm != math.inf:
        c, r = F.linear(x, weight, bias), dual_norm(e, weight, dual_exponent(norm), F.linear, ())
        ball = (c - r, c + r)
        box = ball if box is None else (torch.maximum(box[0], ball[0]), torch.minimum(box[1], ball[1]))
    return _finish(box[0], box[1], activation, params)


def interval_ball_conv2d(
    x: Tensor,
    eps: float | Tensor,
    norm: float,
    clip: Clip,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
    params: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The same for a convolution of x: (B, C, H, W)."""
    conv = (stride, padding, dilation, groups)
    e = eps_like(eps, x).expand_as(x)
    box: Any = None
    if clip is not None or norm == math.inf:
        box = interval_conv2d(*input_box(x, e, clip), weight, bias, *conv)
    if norm != math.inf:
        c = F.conv2d(x, weight, bias, *conv)
        r = dual_norm(e, weight, dual_exponent(norm), lambda t, w: F.conv2d(t, w, None, *conv), conv)
        ball = (c - r, c + r)
        box = ball if box is None else (torch.maximum(box[0], ball[0]), torch.minimum(box[1], ball[1]))
    return _finish(box[0], box[1], activation, params)


Window = tuple[int, int, int, int, int]  # height, width, channels, map height, map width


def row_maps(t: Tensor, example: Tensor | None, corner: tuple[Tensor, Tensor] | None, window: Window | None) -> Tensor:
    """What each row sees of per-example maps t (m, B, map): (m, R, length).

    Without a window the row of its example. With one, map = map height * map width * channels (channels innermost) and
    each row sees ``height`` x ``width`` positions from its ``corner`` (y, x), zeros outside the map.
    """
    if window is None or corner is None:
        return t if example is None else t[:, example]
    height, width, channels, h, w = window
    yy = corner[0][:, None] + torch.arange(height, device=t.device)
    xx = corner[1][:, None] + torch.arange(width, device=t.device)
    inside = ((yy >= 0) & (yy < h))[:, :, None] & ((xx >= 0) & (xx < w))[:, None, :]
    yy, xx = yy.clamp(0, h - 1), xx.clamp(0, w - 1)
    if example is None:
        example = torch.arange(len(yy), device=t.device)
    seen = t.unflatten(2, (h, w, channels))[:, example[:, None, None], yy[:, :, None], xx[:, None, :]]
    return (seen * inside[..., None].to(t.dtype)).flatten(2)


def linear_back_step(
    A: Tensor,
    b: Tensor,
    slopes: Tensor,
    intercepts: Tensor,
    example: Tensor | None = None,
    rows: Tensor | None = None,
    corner: tuple[Tensor, Tensor] | None = None,
    window: Window | None = None,
    minus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves linear bounds from the output of an elementwise function to its input (thesis, equation 3.7; CROWN).

    A: (k, R, n), lower coefficients first; k = 1 means that one matrix serves every side. b: (m, R), m = 2 (lower,
    upper) or m = 1 (lower only, k = 1). slopes (1 or 2, B, map) and intercepts (2, B, map): the lines of the function,
    lower first. ``example``: (R,) int64, the row of slopes and intercepts that each row of A uses (default: its own, B
    = R). ``rows``: (R,) int64, the rows of A to start from (default: all), less the rows ``minus``. ``corner`` and
    ``window``: see ``row_maps``.

        lower: A' = A+ slopes[0] + A- slopes[-1],   b' = b + sum(A+ intercepts[0] + A- intercepts[1])
        upper: the same with the two lines exchanged.

    One slope keeps k; two slopes give k = m.
    """
    if rows is not None:
        A = A[:, rows] if minus is None else A[:, rows] - A[:, minus]
    s, i = row_maps(slopes, example, corner, window), row_maps(intercepts, example, corner, window)
    out, offsets = [], []
    for side in range(b.shape[0]):
        a = A[min(side, A.shape[0] - 1)]
        positive = a >= 0
        offsets.append(b[side] + (a * torch.where(positive, i[side], i[1 - side])).sum(-1))
        if s.shape[0] == 2:
            out.append(a * torch.where(positive, s[side], s[1 - side]))
    return (torch.stack(out) if out else A * s), torch.stack(offsets)


@torch.no_grad()
def split_support(w: Tensor, room: Tensor, q: float) -> tuple[Tensor, Tensor, Tensor]:
    """max w.v over ||v||_p <= 1 and 0 <= v <= room, for w, room >= 0 (..., n), 1/p + 1/q = 1: (ball, v, full).

    The support function of an intersection is the cheapest way to split w between the two sets (Rockafellar, Convex
    Analysis, corollary 16.4.1): the maximum is min over 0 <= ball <= w of room.(w - ball) + ||ball||_q. EVERY split is
    an upper bound, so rounding in the search costs tightness and never soundness. At the optimum v_i = min(t w_i^(q -
    1), room_i) with the t that makes ||v||_p = 1: coordinates are sorted by the t at which they meet the box
    (``full``); without such a t all do. p = 1 fills the largest w first.
    """
    if q == 1:
        full = (room < 1) & (w > 0)
        return torch.where(full, 0.0, w), room.clamp(max=1), full
    if q == math.inf:
        order = w.argsort(dim=-1, descending=True, stable=True)
        r, value = room.gather(-1, order), w.gather(-1, order)
        spent = r.cumsum(-1)
        step = torch.minimum(r, (1 - (spent - r)).clamp(min=0))
        at = (spent < 1).sum(-1, keepdim=True)  # the coordinate that is not used up
        level = torch.cat([value, torch.zeros_like(value[..., :1])], -1).gather(-1, at)
        return torch.minimum(w, level), torch.zeros_like(w).scatter(-1, order, step), w > level
    p = q / (q - 1)
    top = w.amax(-1, keepdim=True) if w.shape[-1] else w[..., :1]
    u = w / torch.where(top > 0, top, 1.0)
    s = u.pow(q - 1)
    meets = torch.where(s > 0, room / torch.where(s > 0, s, 1.0), math.inf)  # t at which the coordinate meets the box
    meets, order = meets.sort(dim=-1, stable=True)
    zero = torch.zeros_like(w[..., :1])
    fixed = torch.cat([zero, room.gather(-1, order).pow(p).cumsum(-1)], -1)  # sums over the first 0, 1, ... coordinates
    free = torch.cat([u.gather(-1, order).pow(q).flip(-1).cumsum(-1).flip(-1), zero], -1)  # and over the others
    count = (fixed[..., :-1] + meets.pow(p) * free[..., :-1] < 1).sum(-1, keepdim=True)
    left, rest = (1 - fixed.gather(-1, count)).clamp(min=0), free.gather(-1, count)
    t = torch.where(rest > 0, (left / torch.where(rest > 0, rest, 1.0)).pow(1 / p), math.inf)
    rank = torch.empty_like(order).scatter(-1, order, torch.arange(w.shape[-1], device=w.device).expand_as(order))
    full = (rank < count) & (w > 0)
    level = torch.where(room > 0, room / t, 0.0)  # where one coordinate uses up the ball t is 0, and so may room be
    ball = torch.where(full, torch.minimum(w, top * level.pow(p - 1)), w)
    return ball, torch.where(full, room, torch.where(s > 0, t * s, 0.0)), full


def room_of(a: Tensor, side: int, center: Tensor, radius: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """How far the extreme of a x on one side can go from x before it meets the box, in units of eps."""
    up = (a >= 0) == (side == 1)
    room = (radius + torch.where(up, center - x, x - center)).clamp(min=0)
    return torch.where(eps > 0, room / torch.where(eps > 0, eps, 1.0), 0.0)


def concretize_rows(
    A: Tensor,
    b: Tensor,
    example: Tensor | None,
    box: tuple[Tensor, Tensor] | None,
    ball: tuple[Tensor, Tensor] | None,
    q: float,
    rows: Tensor | None = None,
    corner: tuple[Tensor, Tensor] | None = None,
    window: Window | None = None,
    minus: Tensor | None = None,
) -> Tensor:
    """Minimum (row 0) and maximum (row 1) of A x + b: (m, R).

    A, b, example, rows, corner, window, minus as in ``linear_back_step``. box = (center, radius), each (B, map):
    A center -+ |A| radius; ball = (x, eps), each (B, map), with dual exponent q: A x -+ ||eps * A||_q. With both, the
    extreme over their intersection: one part of A is bounded over the box, the rest over the ball (``split_support``).
    """
    if rows is not None:
        A = A[:, rows] if minus is None else A[:, rows] - A[:, minus]
    box_maps = None if box is None else row_maps(torch.stack(box), example, corner, window)
    ball_maps = None if ball is None else row_maps(torch.stack(ball), example, corner, window)
    out = []
    for side in range(b.shape[0]):
        a, sign = A[min(side, A.shape[0] - 1)], 2.0 * side - 1.0
        on_box = on_ball = a
        step = None
        if box_maps is not None and ball_maps is not None:
            with torch.no_grad():
                room = room_of(a, side, *box_maps, *ball_maps)
                part, step, full = split_support((a * ball_maps[1]).abs(), room, q)
                part = a.sign() * part / torch.where(full, ball_maps[1], 1.0)
            on_ball = torch.where(full, part, a)
            on_box = a - on_ball
        value = b[side]
        if box_maps is not None:
            value = value + (on_box * box_maps[0]).sum(-1) + sign * (on_box.abs() * box_maps[1]).sum(-1)
        if ball_maps is not None:
            w = (on_ball * ball_maps[1]).abs()
            if step is not None and q in (1, math.inf):
                size = (step * w if q == math.inf else w).sum(-1)  # the derivative of a maximum that is attained often
            else:
                size = row_norm(w, q)
            value = value + (on_ball * ball_maps[0]).sum(-1) + sign * size
        out.append(value)
    return torch.stack(out)


def region(
    x: Tensor, eps: float | Tensor, norm: float, clip: Clip
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """(box, ball) of ``concretize_rows`` for an input set; x flattened to (B, n)."""
    e = eps_like(eps, x).expand_as(x)
    box: Any = None
    if clip is not None or norm == math.inf:
        low, up = input_box(x, e, clip)
        box = center_radius(low.flatten(1), up.flatten(1))
    return box, (None if norm == math.inf else (x.flatten(1), e.flatten(1)))


def concretize(
    A: Tensor, b: Tensor, x: Tensor, eps: float | Tensor, norm: float = math.inf, clip: Clip = None
) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of A x' + b over the input set: A (B, S, n), b (B, S), x (B, *shape) with n elements; two (B,
    S)."""
    batch, per = A.shape[:2]
    example = torch.arange(batch, device=A.device).repeat_interleave(per)
    offset = b.reshape(1, -1).expand(2, -1)
    out = concretize_rows(
        A.reshape(1, batch * per, math.prod(A.shape[2:])),
        offset,
        example,
        *region(x, eps, norm, clip),
        dual_exponent(norm),
    )
    return out[0].view(batch, per), out[1].view(batch, per)
