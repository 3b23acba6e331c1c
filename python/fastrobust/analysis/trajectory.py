"""The adversary's landscape on an l2 sphere and the way of projected gradient ascent over it (Deng et al. 2020).

``loss`` is everywhere a callable from points (B, ...) to (B,) losses of the adversary, which *ascends* it; the paper
writes L = -loss and descends, so that its local maxima are the minima here, and the other way round. Nothing is
clipped to a box.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Objective = Callable[[Tensor], Tensor]


class TwoLayer(nn.Module):
    """f(x) = sum_r a_r softplus(w_r . x), w_r ~ N(0, I/d), a_r = +-1/sqrt(m) with equal odds, float64: (B, d) to
    (B,)."""

    def __init__(self, inputs: int = 2, width: int = 1000, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        w = torch.randn(width, inputs, generator=draw, dtype=torch.float64) / inputs**0.5
        sign = 2 * torch.randint(0, 2, (width,), generator=draw) - 1
        self.w, self.a = nn.Parameter(w), nn.Parameter(sign.double() / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x @ self.w.T) @ self.a


class Optimality(NamedTuple):
    """At delta (B, d), |delta| = eps: ``gradient`` (B, d) = dL; ``multiplier`` (B,) = <dL, delta> / (2 eps^2);
    ``tangent`` (B, d), Gamma = dL - 2 multiplier delta; ``curvature`` (B, d - 1), the eigenvalues of Xi = d2L - 2
    multiplier I on the tangent space, smallest first. L is the adversary's loss (the paper's signs are all turned)."""

    gradient: Tensor
    multiplier: Tensor
    tangent: Tensor
    curvature: Tensor

    def maximum(self, tolerance: float = 1e-3) -> Tensor:
        """(B,) bool: a local maximum of the ball: gradient outwards, |Gamma| <= tolerance |dL|, curvature < 0."""
        return self._flat(tolerance) & (self.multiplier >= 0) & (self.curvature[:, -1] < 0)

    def minimum(self, tolerance: float = 1e-3) -> Tensor:
        """(B,) bool: a local minimum on the sphere: |Gamma| <= tolerance |dL|, curvature > 0."""
        return self._flat(tolerance) & (self.curvature[:, 0] > 0)

    def _flat(self, tolerance: float) -> Tensor:
        return self.tangent.norm(dim=1) <= tolerance * self.gradient.norm(dim=1)


class Path(NamedTuple):
    """``deltas`` (steps + 1, B, ...) and ``losses`` (steps + 1, B), the start first."""

    deltas: Tensor
    losses: Tensor


class Study(NamedTuple):
    """For S scales, R ratios, T steps, B examples: ``losses`` (S, R, T + 1, B) on the way from a minimum on the sphere;
    ``best`` (S, R, B), the largest loss that was seen anywhere; ``half`` (S, R, B), the steps to half of the way from
    the first loss to the best, T + 1 where that is not reached; ``passed`` (S, R, B) bool: the end is a local
    maximum."""

    scales: Tensor
    ratios: Tensor
    losses: Tensor
    best: Tensor
    half: Tensor
    passed: Tensor


def optimality(loss: Objective, x: Tensor, delta: Tensor) -> Optimality:
    """First- and second-order conditions on the sphere through delta (Deng et al., section 4). Costs d backward
    passes of the batch, and d^2 numbers an example."""
    with torch.inference_mode(False), torch.enable_grad():
        point = (x + delta).detach().clone().requires_grad_()
        grad = torch.autograd.grad(loss(point).sum(), point, create_graph=True)[0].flatten(1)
        again = lambda i: torch.autograd.grad(grad[:, i].sum(), point, retain_graph=True, materialize_grads=True)[0]
        hessian = torch.stack([again(i).flatten(1) for i in range(grad.shape[1])], 1)
    g, d = grad.detach(), delta.detach().flatten(1)
    twice = (g * d).sum(1) / (d * d).sum(1)
    basis = torch.linalg.qr(d[:, :, None], mode="complete").Q[:, :, 1:]
    inner = basis.mT @ hessian @ basis - twice[:, None, None] * torch.eye(d.shape[1] - 1).to(d)
    return Optimality(g, twice / 2, g - twice[:, None] * d, torch.linalg.eigvalsh(inner))


def ascend(loss: Objective, x: Tensor, delta: Tensor, eps: float, step_size: float, steps: int) -> Path:
    """delta <- project(delta + step_size dL), with the raw gradient, onto the l2 ball of eps around x."""
    deltas, losses = [delta], []
    for _ in range(steps):
        value, grad = _gradient(loss, x + deltas[-1])
        moved = deltas[-1] + step_size * grad
        deltas.append(moved * (eps / _norm(moved).clamp_min(eps)))
        losses.append(value)
    losses.append(_gradient(loss, x + deltas[-1])[0])
    return Path(torch.stack(deltas), torch.stack(losses))


def search(
    loss: Objective, x: Tensor, eps: float, *, lowest: bool = False, steps: int = 300, restarts: int = 4, seed: int = 0
) -> Tensor:
    """delta (B, ...) on the sphere: the largest (``lowest``: smallest) of the local optima that ``restarts`` searches
    from random points reach, each along the sphere with a step length of its own that shrinks where the loss does not
    gain."""
    draw, sign = torch.Generator().manual_seed(seed), -1.0 if lowest else 1.0
    best, found = None, None
    for _ in range(restarts):
        delta = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)
        delta = delta * (eps / _norm(delta))
        angle = torch.full_like(_norm(delta), 0.5)
        value, grad = _gradient(loss, x + delta)
        for _ in range(steps):
            along = sign * grad
            along = along - (_inner(along, delta) / eps**2) * delta
            # the angle shrinks with the tangent's share of the gradient, or steps near the optimum would be too long
            turn = angle * eps * along / _norm(grad).clamp_min(1e-300)
            trial = delta + turn
            trial = trial * (eps / _norm(trial))
            new, new_grad = _gradient(loss, x + trial)
            gain = _like(sign * new >= sign * value, x)
            delta, grad = torch.where(gain, trial, delta), torch.where(gain, new_grad, grad)
            value = torch.where(gain.flatten(), new, value)
            angle = torch.where(gain, 1.2 * angle, 0.5 * angle)
        if best is None or found is None:
            best, found = value, delta
        else:
            more = sign * value > sign * best
            best, found = torch.where(more, value, best), torch.where(_like(more, x), delta, found)
    assert found is not None
    return found


def circle(loss: Objective, x: Tensor, eps: float, points: int = 720) -> tuple[Tensor, Tensor, int]:
    """Of one point x (2,): angles and losses (points,) on the circle of eps, and how many local maxima they have."""
    angles = torch.arange(points, dtype=x.dtype, device=x.device) * (2 * torch.pi / points)
    with torch.no_grad():
        values = loss(x + eps * torch.stack([angles.cos(), angles.sin()], 1))
    peaks = (values > values.roll(1)) & (values >= values.roll(-1))
    return angles, values, int(peaks.sum())


def study(
    loss: Objective, x: Tensor, scales: Sequence[float], ratios: Sequence[float], *, steps: int = 100,
    relative_step: float = 0.1, nudge: float = 1e-3, seed: int = 0,
) -> Study:  # fmt: skip
    """Trajectories from minima to maxima of the adversary's loss, by input scale and ratio (Deng et al., figures 1, 2).

    x (B, ...) is scaled to a mean l2 norm of each scale, eps = ratio * scale. A trajectory starts on the sphere at its
    lowest point found, moved by ``nudge`` eps in a random direction (in the minimum itself nothing moves). The step
    size is ``relative_step`` * eps / mean |dL| at the clean points: the paper prints none; this one is in radians of
    a sphere.
    """
    draw, size = torch.Generator().manual_seed(seed), _norm(x).mean()
    losses: list[Tensor] = []
    best: list[Tensor] = []
    half: list[Tensor] = []
    passed: list[Tensor] = []
    for scale in scales:
        for ratio in ratios:
            points, eps = x * (scale / size), ratio * scale
            low = search(loss, points, eps, lowest=True, seed=seed)
            away = torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x)
            start = low + nudge * eps * away / _norm(away)
            start = start * (eps / _norm(start))
            slope = _norm(_gradient(loss, points)[1]).mean()
            path = ascend(loss, points, start, eps, float(relative_step * eps / slope), steps)
            high = _gradient(loss, points + search(loss, points, eps, seed=seed))[0]
            top = torch.maximum(high, path.losses.max(0).values)
            there = path.losses >= (path.losses[0] + top) / 2
            reached = torch.where(there.any(0), there.int().argmax(0), steps + 1)
            rows = (path.losses, top, reached, optimality(loss, points, path.deltas[-1]).maximum(0.05))
            for kept, row in zip((losses, best, half, passed), rows, strict=True):
                kept.append(row)
    fold = lambda found: torch.stack(found).unflatten(0, (len(scales), len(ratios)))
    return Study(torch.tensor(scales), torch.tensor(ratios), fold(losses), fold(best), fold(half), fold(passed))


def plot(found: Study, figure: Any, name: str = "input scale") -> None:
    """Share of the way to the best loss by step, a panel a scale (or what ``name`` says), a line a ratio (mean over the
    examples)."""
    first = found.losses[:, :, :1]
    share = ((found.losses - first) / (found.best[:, :, None] - first).clamp_min(1e-300)).mean(-1)
    panels = figure.subplots(1, len(found.scales), sharey=True, squeeze=False)[0]
    for panel, scale, lines in zip(panels, found.scales.tolist(), share.tolist(), strict=True):
        for ratio, line in zip(found.ratios.tolist(), lines, strict=True):
            panel.plot(line, label=f"ratio {ratio:g}")
        panel.set(title=f"{name} {scale:g}", xlabel="step")
    panels[0].set_ylabel("share of the way from minimum to best")
    panels[0].legend(fontsize=7)


def _gradient(loss: Objective, points: Tensor) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        points = points.detach().clone().requires_grad_()
        value = loss(points)
        return value.detach(), torch.autograd.grad(value.sum(), points)[0]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    return _like((a * b).flatten(1).sum(1), a)


def _norm(t: Tensor) -> Tensor:
    return _inner(t, t).sqrt()


def _like(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 1))
