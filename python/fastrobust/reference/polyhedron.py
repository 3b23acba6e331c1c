"""Distance to a hyperplane inside a box, in plain torch: the definition of ``ops.polyhedral_distance``.

Problem (3.14) of Liu's thesis (2022), section 3.3.1:

    minimise ||d||_p   subject to   a.d + b <= 0   and   lower <= d <= upper,   with lower <= 0 <= upper.

Every coordinate moves against the sign of its coefficient, by at most the room c_j that the box leaves on
that side, so with w = |a| the problem is to buy b units at rate w_j.

* p > 1: the optimum is d_j = min(t v_j, c_j) with v_j = w_j^(1/(p-1)) (v_j = 1 for p = inf) and the smallest t
  with F(t) = sum_j w_j min(t v_j, c_j) >= b (equation 3.19). The greedy Algorithm 3.4 fixes the coordinates
  that left the box and solves for the others; because F is concave this is Newton's method started on the
  left of the root. It is run until nothing more gets fixed, hence it is exact (theorem 3.1).
* p = 1: the coordinates are filled in the order of falling w_j.

Everything is computed in float64. The result is lowered by the rounding error that the sums can have
accumulated and rounded towards zero (signed: towards minus infinity), so that it never exceeds the exact value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Norm = float | int | str


def norm_value(norm: Norm) -> float:
    """The exponent p of ``norm``: a number >= 1, or "L1", "L2", "Linf", "inf"."""
    names = {"l1": 1.0, "l2": 2.0, "linf": math.inf, "inf": math.inf}
    if isinstance(norm, str):
        if norm.lower() not in names:
            raise ValueError(f"norm: expected a number >= 1 or one of L1, L2, Linf, got {norm!r}")
        return names[norm.lower()]
    if isinstance(norm, bool) or not isinstance(norm, (int, float)):
        raise TypeError(f"norm: expected a number >= 1 or one of L1, L2, Linf, got {type(norm).__name__}")
    if not norm >= 1:
        raise ValueError(f"norm: expected a number >= 1, got {norm}")
    return float(norm)


def round_down(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest number of ``dtype`` that is not above the float64 ``value``."""
    near = value.to(dtype)
    below = torch.nextafter(near, torch.full_like(near, -math.inf))
    down = torch.where(near.double() > value, below, near)
    # value plus the correction keeps the gradient of value
    return near + (down - near).detach() if near.requires_grad else down


def _fill_largest_first(b: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Norm 1: the step d (R, M) that uses the largest coefficients first, and its cost (R)."""
    order = w.detach().argsort(dim=-1, descending=True, stable=True)
    w_sorted, c_sorted = w.gather(-1, order), c.gather(-1, order)
    gain = torch.where(w_sorted > 0, w_sorted * c_sorted, 0.0)
    before = gain.detach().cumsum(-1) - gain.detach()
    full = (before + gain.detach() < b.detach()[..., None]) & (w_sorted > 0)
    rest = b - torch.where(full, gain, 0.0).sum(-1)
    # the first coordinate that is not used up takes the rest
    last = full.sum(-1, keepdim=True).clamp_max(w.shape[-1] - 1)
    w_last = w_sorted.gather(-1, last).squeeze(-1)
    part = rest / torch.where(w_last > 0, w_last, 1.0)
    spent = torch.where(full, c_sorted, 0.0)
    step = spent.scatter(-1, last, torch.where(full.gather(-1, last), spent.gather(-1, last), part[..., None]))
    cost = spent.sum(-1) + torch.where(full.all(-1), 0.0, part)
    return torch.zeros_like(w).scatter(-1, order, step), cost


def _fix_until_feasible(b: Tensor, w: Tensor, c: Tensor, p: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p > 1: Algorithm 3.4 to convergence. Returns t, v, the fixed set and the slope sum_free w v."""
    positive = w > 0
    log_w = torch.where(positive, w, 1.0).log()
    rate = 0.0 if p == math.inf else 1.0 / (p - 1.0)
    fixed = (c <= 0) | ~positive
    while True:
        # v is only defined up to a factor: the largest free one is 1, so that no power can overflow
        top = torch.where(fixed, -math.inf, log_w).amax(-1, keepdim=True).detach()
        scale = torch.where(top.isfinite(), top, 0.0)
        v = torch.where(fixed, 0.0, (rate * (log_w - scale).clamp_max(0.0)).exp())
        used = torch.where(fixed & positive, w * torch.where(positive, c, 0.0), 0.0).sum(-1)
        slope = torch.where(fixed, 0.0, w * v).sum(-1)
        t = (b - used) / torch.where(slope > 0, slope, 1.0)
        over = ~fixed & (c <= t.detach()[..., None] * v)
        if not bool(over.any()):
            return t, v, fixed, slope
        fixed = fixed | over


def _reach(b: Tensor, w: Tensor, c: Tensor, p: float, up: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Distance (R) of rows with b >= 0, the step d >= 0 (R, M) and the multiplier d distance / d b (R).

    In float64; the distance is rounded down, or up.
    """
    ulp = torch.finfo(torch.float64).eps
    gain = torch.where(w > 0, w * torch.where(w > 0, c, 0.0), 0.0).detach()
    error = 2 * (w.shape[-1] + 8) * ulp * b.detach()  # what b and the sums up to b are wrong by
    room = gain.sum(-1)
    unreachable = (room - error < b.detach()) if up else (room + error < b.detach())
    if p == 1:
        step, norm = _fill_largest_first(b, w, c)
        multiplier = derivative = 1.0 / torch.where(step.detach() > 0, w.detach(), math.inf).amin(-1)
    else:
        t, v, fixed, slope = _fix_until_feasible(b, w, c, p)
        step = torch.where(w > 0, torch.where(fixed, torch.where(w > 0, c, 0.0), t[..., None] * v), 0.0)
        some = slope > 0
        if p == math.inf:
            largest = v.amax(-1)
            norm = torch.where(some, t, step.amax(-1))
        else:
            largest = (v**p).sum(-1) ** (1.0 / p)
            top = step.detach().amax(-1)
            top = torch.where((top > 0) & top.isfinite(), top, 1.0)
            parts = torch.where(step > 0, step / top[..., None], 1.0)
            total = torch.where(step > 0, parts**p, 0.0).sum(-1)
            norm = top * torch.where(total > 0, total, 1.0) ** (1.0 / p)
            norm = torch.where(total > 0, norm, 0.0)
        # dnorm/db is (t ||v|| / norm)^(p - 1) ||v|| / slope, at most ||v||_p over the slope
        multiplier = torch.where(some, largest / torch.where(some, slope, 1.0), 0.0).detach()
        exponent = 0.0 if p == math.inf else p - 1.0
        bent = (t * largest / torch.where(norm > 0, norm, 1.0)).detach() ** exponent
        derivative = torch.where(norm.detach() > 0, multiplier * bent, multiplier)
    slack = error * multiplier + (w.shape[-1] + 64) * ulp * norm.detach()
    norm = norm + slack if up else (norm - slack).clamp_min(0.0)
    return torch.where(unreachable, math.inf, norm), step, torch.where(unreachable, 0.0, derivative)


def solve(
    a: Tensor, b: Tensor, lower: Tensor, upper: Tensor, norm: Norm, signed: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The distance (...), the multiplier d distance / d b (...) and the point (..., M) of
    :func:`polyhedral_distance`."""
    p = norm_value(norm)
    lower, upper = torch.as_tensor(lower).to(a), torch.as_tensor(upper).to(a)
    shape, dtype = a.shape, a.dtype
    coefficients, offset = a.double(), b.double()
    low, high = lower.double().expand(shape), upper.double().expand(shape)
    bad = ~(coefficients.isfinite().all(-1) & offset.isfinite() & (low <= 0).all(-1) & (high >= 0).all(-1))
    coefficients = torch.where(bad[..., None], 0.0, coefficients)
    offset = torch.where(bad, 0.0, offset)
    low, high = torch.where(bad[..., None], 0.0, low), torch.where(bad[..., None], 0.0, high)

    inside = offset < 0
    flip = torch.where(inside, -1.0, 1.0)
    direction = coefficients * flip[..., None]
    w = direction.abs()
    c = torch.where(direction > 0, -low, high)
    target = offset.abs()
    distance, step, multiplier = _reach(target, w, c, p, up=False)
    if signed:
        above, _, _ = _reach(target, w, c, p, up=True)
        distance = torch.where(inside, -above, distance)
    else:
        distance = torch.where(offset <= 0, 0.0, distance)
        multiplier = torch.where(offset <= 0, 0.0, multiplier)
    step = torch.where((offset == 0 if signed else offset <= 0)[..., None], 0.0, step)
    point = torch.where(direction > 0, -step, step)
    point = torch.where(bad[..., None], math.nan, torch.minimum(torch.maximum(point, low), high))
    distance, multiplier = torch.where(bad, math.nan, distance), torch.where(bad, math.nan, multiplier)
    return round_down(distance, dtype), multiplier.to(dtype), point.to(dtype)


def polyhedral_distance(
    a: Tensor,
    b: Tensor,
    lower: Tensor,
    upper: Tensor,
    norm: Norm,
    signed: bool = False,
    return_point: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """min ||d||_p subject to a.d + b <= 0 and lower <= d <= upper; see the module's text.

    Shapes: a (..., M); b (...); lower and upper broadcast to a, lower <= 0 <= upper, infinite sides allowed.
    Returns the distance (...), and with ``return_point`` the optimal d (..., M). b <= 0: distance 0, or with
    ``signed`` minus the distance of 0 to {a.d + b >= 0}. Unreachable: inf (signed: -inf), and d is the corner
    of the box that goes furthest. Rows with NaN or infinite a or b, or with an invalid box, give NaN.
    Differentiable in a, b, lower and upper through the closed form at the optimum.
    """
    distance, _, point = solve(a, b, lower, upper, norm, signed)
    return (distance, point) if return_point else distance
