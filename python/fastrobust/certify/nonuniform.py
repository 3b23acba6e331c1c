"""Certified regions with a bound per feature (Liu 2022, section 3.2.1, Algorithm 3.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.bounds import METHODS, compute_bounds
from fastrobust.bounds.checks import check_inputs, check_labels, check_method, check_options, clip_of, number
from fastrobust.reference.bounds import Clip

from .._eager import left_to_python

_LOG_RANGE = (-20.0, 6.0)  # log2 of the scales that the line search covers


@dataclass
class NonuniformRadius:
    """The region {x + eps * v : ||v||_p <= 1} of each example, in which the prediction is proved constant.

    eps: x's shape; zeros where not even a tiny region is certified.
    volume: (B,) the geometric mean of eps over the features (eps_avg of table 3.2).
    uniform: (B,) the largest certified eps with the same value for every feature.
    """

    eps: Tensor
    volume: Tensor
    uniform: Tensor


Margins = Callable[[Tensor, Tensor], Tensor]  # (examples, eps) -> (b, K - 1)


def _margin_function(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    elision: bool,
    clip: Clip,
    options: dict[str, Any],
) -> Margins:
    """Lower bounds of z_y - z_j; without elision lower z_y minus upper z_j, as (3.9) is written."""

    def margins(index: Tensor, eps: Tensor) -> Tensor:
        part, labels, box = x[index], y[index], clip_of(clip, index, x)
        if elision:
            return compute_bounds(model, part, eps, labels=labels, sides="lower", clip=box, **options).lower
        bounds = compute_bounds(model, part, eps, clip=box, **options)
        assert bounds.upper is not None
        own = bounds.lower.gather(1, labels[:, None])
        others = torch.ones_like(bounds.lower, dtype=torch.bool).scatter(1, labels[:, None], False)
        return own - bounds.upper[others].view(len(part), -1)

    return margins


def _largest_scale(
    margins: Margins, index: Tensor, direction: Tensor, delta: float, low: float, high: float, steps: int
) -> Tensor:
    """log2 of the largest certified multiple of each direction by bisection of the logarithm; -inf where low fails."""
    ones = (-1,) + (1,) * (direction.dim() - 1)

    def holds(exponent: Tensor) -> Tensor:
        return margins(index, direction * exponent.exp2().view(ones)).amin(1) >= delta

    bottom = torch.full((len(index),), low, dtype=direction.dtype, device=direction.device)
    top = torch.full_like(bottom, high)
    some, all_ = holds(bottom), holds(top)
    for _ in range(steps):
        middle = 0.5 * (bottom + top)
        good = holds(middle)
        bottom, top = torch.where(good, middle, bottom), torch.where(good, top, middle)
    bottom = torch.where(all_, torch.full_like(bottom, high), bottom)
    return torch.where(some, bottom, torch.full_like(bottom, -math.inf))


@left_to_python
def nonuniform_radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float | str = math.inf,
    clip: Clip = None,
    method: str = "fast-lin",
    uniform: bool = False,
    direction: Tensor | None = None,
    delta: float = 1e-4,
    elision: bool = True,
    rounding: str = "nearest",
    exact_input: bool = False,
    refine: str = "unstable",
    max_memory: int = 1 << 30,
    iterations: int = 200,
    step_size: float = 0.05,
    penalty: float = 1.0,
    growth: float = 5.0,
    grow_every: int = 40,
    multiplier_every: int = 5,
    decay: float = 0.99,
    progress: Callable[[int], None] | None = None,
) -> NonuniformRadius:
    r"""Maximise the volume of a certified region with one bound per feature (Algorithm 3.3, batched).

    .. math:: \min_\epsilon -\tfrac1M \sum_j \log \epsilon_j \quad\text{s.t.}\quad d_i(\epsilon) = \underline{z_y - z_i}
    - \delta \ge 0

    by the augmented Lagrangian method on the differentiable bounds: eps = zeta^2, Adam steps on zeta with gradients
    rescaled to length 1 at most, multipliers updated every ``multiplier_every`` iterations, the penalty multiplied by
    ``growth`` every ``grow_every``. The region is then scaled along its own direction to the largest certified
    multiple, shrunk by ``decay`` until the constraint holds, and is never smaller than the uniform one.

    Args:
        model, x, y, norm, clip, method: as for :func:`fastrobust.bounds.compute_bounds`; with ``clip`` no eps exceeds
        its width.
        uniform: only optimise one scalar per example (eps = scalar * 1).
        direction: x's shape or one example's: positive shape to start from, for instance the eps of another image.
        delta: margin that must be left, a small positive number.
        elision: bound the differences z_y - z_i; False bounds the outputs one by one, as (3.9) is written.
        rounding: "outward" certifies the regions, the uniform ones too, in real arithmetic and for every float32
            evaluation order (the optimisation on the way there rounds to nearest).
        exact_input, refine, max_memory: as for :func:`fastrobust.bounds.compute_bounds`.
        progress: called with the number of iterations done.

    Returns:
        :class:`NonuniformRadius`; an example that is not certified at any size gets zeros.
    """
    x, _, p, clip = check_inputs(x, 0.0, norm, clip)
    y = check_labels(y, x.shape[0], x.device)
    method = check_method(method, METHODS)
    delta = number(delta, "delta")
    if not delta >= 0:
        raise ValueError(f"delta: got {delta}, expected a number >= 0")
    if not 0 < decay < 1:
        raise ValueError(f"decay: got {decay}, expected a number between 0 and 1")
    if not growth >= 1 or not penalty > 0 or iterations < 0 or grow_every < 1 or multiplier_every < 1:
        raise ValueError(
            "penalty, growth, iterations, grow_every, multiplier_every: expected positive numbers, growth >= 1"
        )
    if direction is not None:
        if tuple(direction.shape) not in (tuple(x.shape), tuple(x.shape[1:])):
            raise ValueError(
                f"direction: got shape {tuple(direction.shape)}, expected {tuple(x.shape)} or {tuple(x.shape[1:])}"
            )
        if not bool((direction > 0).all() & direction.isfinite().all()):
            raise ValueError("direction: got values that are not positive and finite, expected positive ones")
    check_options(rounding, refine, exact_input, max_memory)
    options = {
        "norm": p,
        "method": method,
        "exact_input": exact_input,
        "refine": refine,
        "max_memory": max_memory,
    }
    margins = _margin_function(model, x, y, elision, clip, {**options, "rounding": rounding})
    smooth = _margin_function(model, x, y, elision, clip, {**options, "rounding": "nearest"})
    everyone = torch.arange(x.shape[0], device=x.device)
    ones = (-1,) + (1,) * (x.dim() - 1)
    with torch.no_grad():
        size = _largest_scale(margins, everyone, torch.ones_like(x), delta, *_LOG_RANGE, 22).exp2()
        width = _width(clip, x)
        size = torch.minimum(size, width.flatten(1).amax(1)) if isinstance(width, Tensor) else size.clamp_max(width)
    eps = size.view(ones).expand_as(x).clone()
    index = everyone[size > 0]
    if not uniform and index.numel():
        start = eps[index]
        if direction is not None:
            shape = direction.to(x).expand_as(x)[index]
            with torch.no_grad():
                scale = _largest_scale(margins, index, shape, delta, *_LOG_RANGE, 22).exp2()
            usable = scale > 0
            start = torch.where(usable.view(ones), shape * scale.view(ones), start)
        limit = width[index] if isinstance(width, Tensor) else width
        schedule = _Schedule(iterations, step_size, penalty, growth, grow_every, multiplier_every)
        found = _optimise(smooth, index, start, delta, limit, schedule, progress)
        eps[index] = _certify(margins, index, found, eps[index], delta, limit, decay)
    with torch.no_grad():
        volume = torch.where(size > 0, eps.flatten(1).clamp_min(torch.finfo(x.dtype).tiny).log().mean(1).exp(), 0.0)
    return NonuniformRadius(eps, volume, size)


def _width(clip: Clip, x: Tensor) -> float | Tensor:
    """How wide the box is, a number or of x's shape."""
    if clip is None:
        return math.inf
    low, high = clip
    return (
        (high - low).to(x).expand_as(x) if isinstance(low, Tensor) and isinstance(high, Tensor) else float(high - low)
    )


@dataclass
class _Schedule:
    iterations: int
    step_size: float
    penalty: float
    growth: float
    grow_every: int
    multiplier_every: int


def _optimise(
    margins: Margins,
    index: Tensor,
    start: Tensor,
    delta: float,
    limit: float | Tensor,
    schedule: _Schedule,
    progress: Callable[[int], None] | None,
) -> Tensor:
    """The augmented Lagrangian (3.11) from ``start``; all examples at once, none sees another."""
    penalty, step_size, iterations = schedule.penalty, schedule.step_size, schedule.iterations
    zeta = start.sqrt().detach()
    first, second = torch.zeros_like(zeta), torch.zeros_like(zeta)
    multiplier: Tensor | None = None
    unit = zeta.flatten(1).mean(1).view((-1,) + (1,) * (zeta.dim() - 1))  # steps are relative to the region's size
    for i in range(iterations):
        with torch.enable_grad():
            leaf = zeta.detach().requires_grad_()
            eps = leaf.square().clamp_max(limit)
            d = margins(index, eps) - delta
            if multiplier is None:
                multiplier = torch.zeros_like(d)
            rest = d - (d + multiplier / penalty).detach().clamp_min(0.0)  # d - c with the optimal c
            value = -eps.flatten(1).log().mean(1) + (multiplier * rest).sum(1) + 0.5 * penalty * rest.square().sum(1)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        grad = grad * unit
        length = grad.flatten(1).norm(dim=1).clamp_min(1.0)
        grad = grad / length.view(unit.shape)
        first = 0.9 * first + 0.1 * grad
        second = 0.99 * second + 0.01 * grad.square()
        rate = step_size * (1.0 - i / iterations)
        update = (first / (1 - 0.9 ** (i + 1))) / ((second / (1 - 0.99 ** (i + 1))).sqrt() + 1e-12)
        zeta = torch.maximum(zeta - rate * unit * update, 1e-3 * unit)
        if (i + 1) % schedule.multiplier_every == 0:
            multiplier = multiplier + penalty * rest.detach()
        if (i + 1) % schedule.grow_every == 0:
            penalty *= schedule.growth
        if progress:
            progress(1)
    return zeta.square().clamp_max(limit)


@torch.no_grad()
def _certify(
    margins: Margins, index: Tensor, found: Tensor, fallback: Tensor, delta: float, limit: float | Tensor, decay: float
) -> Tensor:
    """The largest certified multiple of ``found``; the uniform region where that has more volume."""
    ones = (-1,) + (1,) * (found.dim() - 1)
    scale = _largest_scale(margins, index, found, delta, -3.0, 1.0, 14)
    eps = (found * scale.clamp_min(-3.0).exp2().view(ones)).clamp_max(limit)
    for _ in range(1000):  # the clamp and the rounding may have moved it
        failing = ~(margins(index, eps).amin(1) >= delta)
        if not bool(failing.any()):
            break
        eps = torch.where(failing.view(ones), eps * decay, eps)
    proved = margins(index, eps).amin(1) >= delta
    larger = eps.flatten(1).log().mean(1) >= fallback.flatten(1).log().mean(1)
    return torch.where((proved & larger).view(ones), eps, fallback)
