"""Adversarial training of wide networks (Gao et al. 2019): the networks, the tangent kernel, and the theorems in small.

Inputs and attacked inputs lie on the unit sphere; the perturbations of x are the cap of points within ``reach`` of
it. Labels are -1 or +1, the loss is log(1 + exp(-y f)). Everything is float64. The theorems give orders, not
constants: what can be checked is that some width is enough, how far the weights went, and that the two sides come
nearer as it grows.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from .theory import Sides

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]


def smooth_relu(z: Tensor) -> Tensor:
    """z Phi(z) + phi(z), whose derivative is the normal distribution function Phi: Assumptions 5.1 and 5.3 with C =
    1."""
    return z * torch.special.ndtr(z) + torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)


class Deep(nn.Module):
    """Section 3.2: x0 = A x, then ``depth`` ReLU layers of width m, f = a^T x_H: (B, d) to (B,). A, W ~ N(0, 2/m), a
    ~ N(0, 1); only the W are parameters."""

    def __init__(self, inputs: int, width: int, depth: int = 2, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)
        self.register_buffer("first", normal(width, inputs) * (2 / width) ** 0.5)
        self.register_buffer("last", normal(width))
        self.layers = nn.ParameterList(normal(width, width) * (2 / width) ** 0.5 for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.get_buffer("first").T
        for weight in self.layers:
            x = (x @ weight.T).relu()
        return x @ self.get_buffer("last")


class Paired(nn.Module):
    """Equation 4: (1/sqrt(m)) sum_r a_r s(w_r . x), with neurons in pairs of equal w ~ N(0, I) and opposite a = +-1,
    so that f = 0 at the start: (B, d) to (B,). s is :func:`smooth_relu`; only w (m, d) is a parameter."""

    def __init__(self, inputs: int, width: int, seed: int = 0) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"width: got {width}, expected an even number")
        draw = torch.Generator().manual_seed(seed)
        w = torch.randn(width // 2, inputs, generator=draw, dtype=torch.float64)
        sign = 2.0 * torch.randint(0, 2, (width // 2,), generator=draw).double() - 1
        self.w = nn.Parameter(torch.cat([w, w]))
        self.register_buffer("a", torch.cat([sign, -sign]) / width**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return smooth_relu(x @ self.w.T) @ self.get_buffer("a")


def on_sphere(x: Tensor, *, bias: float = 1.0) -> Tensor:
    """(n, d) to (n, d + 1): rows scaled to norm 1, a constant ``bias`` beside them, and scaled again. Without the
    constant the kernel's functions have no odd part beyond the linear one, and Assumption 5.2 fails for many labels."""
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    wide = torch.cat([unit, torch.full_like(unit[:, :1], bias)], 1)
    return wide / wide.norm(dim=1, keepdim=True)


def cap(points: Tensor, x: Tensor, reach: float) -> Tensor:
    """The nearest points to ``points`` on the sphere within ``reach`` of x (rows of norm 1)."""
    unit = points / points.norm(dim=-1, keepdim=True)
    cosine = (unit * x).sum(-1, keepdim=True)
    least = 1 - reach**2 / 2
    side = unit - cosine * x
    edge = least * x + math.sqrt(1 - least**2) * side / side.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    return torch.where(cosine >= least, unit, edge)


def attack(reach: float, *, steps: int = 10, restarts: int = 1, seed: int = 0) -> Attack:
    """PGD on the cap: steps of 2.5 reach / ``steps`` along the unit gradient of the loss, the first restart from x
    itself, the others from random points; of each example the worst point that was seen. 0 steps: x."""

    def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        draw, worst, found = torch.Generator().manual_seed(seed), loss(model(x).detach(), y), x.clone()
        for restart in range(restarts if steps else 0):
            point = x
            if restart:
                noise = torch.randn(x.shape, generator=draw, dtype=torch.float64)
                point = cap(x + reach * noise / noise.norm(dim=1, keepdim=True), x, reach)
            for step in range(steps + 1):
                with torch.enable_grad():
                    here = point.detach().requires_grad_()
                    value = loss(model(here), y)
                    (grad,) = torch.autograd.grad(value.sum(), here)
                more = value.detach() > worst
                worst, found = torch.where(more, value.detach(), worst), torch.where(more[:, None], point, found)
                if step < steps:
                    length = 2.5 * reach / steps / grad.norm(dim=1, keepdim=True).clamp_min(1e-300)
                    point = cap(point + length * grad, x, reach)
        return found

    return run


def loss(outputs: Tensor, y: Tensor) -> Tensor:
    """log(1 + exp(-y f)), of each example."""
    return nn.functional.softplus(-y * outputs)


class Descent(NamedTuple):
    """``losses`` (T,): the surrogate loss L_A(W_t) of each step; ``distance``: how far the weights went from the start,
    ||W_T - W_0||_F, of the layer that went farthest, times sqrt(m) for :class:`Deep`; ``model``: the trained copy
    with the smallest L_A."""

    losses: Tensor
    distance: float
    model: nn.Module


def descend(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, *, lr: float, steps: int, radius: float | None = None
) -> Descent:
    """Gradient descent on the surrogate loss, the attack's points taken as constants, in a copy of the model.
    ``radius`` R: each layer is projected onto ||W - W_0||_F <= R / sqrt(m) (equation 2)."""
    net = copy.deepcopy(model)
    for p in net.parameters():
        p.grad = None
    best, least, losses = copy.deepcopy(net), math.inf, []
    start = [p.detach().clone() for p in net.parameters()]
    for _ in range(steps):
        adv = attack(net, x, y).detach()
        with torch.enable_grad():
            value = loss(net(adv), y).mean()
            grads = torch.autograd.grad(value, list(net.parameters()))
        losses.append(float(value.detach()))
        if losses[-1] < least:
            least = losses[-1]
            best.load_state_dict(net.state_dict())
        with torch.no_grad():
            for p, first, grad in zip(net.parameters(), start, grads, strict=True):
                moved = p - lr * grad - first
                if radius is not None:
                    moved = moved * min(1.0, radius / math.sqrt(len(p)) / max(float(moved.norm()), 1e-300))
                p.copy_(first + moved)
    scale = math.sqrt(len(start[0])) if isinstance(net, Deep) else 1.0
    pairs = zip(best.parameters(), start, strict=True)
    return Descent(torch.tensor(losses), scale * max(float((p.detach() - s).norm()) for p, s in pairs), best)


def theorem_4_1(
    x: Tensor, y: Tensor, width: int, *, reach: float = 0.1, eps: float = 0.1, radius: float = 10.0, depth: int = 2,
    steps: int = 200, step: float = 1.0, seed: int = 0,
) -> tuple[Descent, Sides]:  # fmt: skip
    """Theorem 4.1: projected gradient descent in B(R) finds min_t L_A(W_t) <= L_*(W_*) + eps. x (n, d) on the sphere.

    The step size is ``step`` / (m depth^2) (the theorem's O(eps / (m H^2)) for a fixed eps). The two sides are the
    smallest surrogate loss against eps, with L_* taken as the 0 that it is at least, and the distance of that network
    from its start in units of 1 / sqrt(m) against R.
    """
    net = Deep(x.shape[1], width, depth, seed)
    found = descend(
        net, x, y, attack(reach, seed=seed), lr=step / (width * depth**2), steps=steps, radius=radius
    )  # fmt: skip
    return found, _sides([float(found.losses.min()), found.distance], [eps, radius])


def theorem_5_1(
    x: Tensor, y: Tensor, width: int, *, reach: float = 0.1, eps: float = 0.1, radius: float = 10.0, steps: int = 200,
    step: float = 1.0, seed: int = 0,
) -> tuple[Descent, Sides]:  # fmt: skip
    """Theorem 5.1: the same of the two-layer network :class:`Paired`, without a projection; step size ``step``
    (O(eps)).

    T is Theta(sqrt(m) / step) in the theorem and Theta(R^2 / (eps step)) in Corollary 5.1: ``steps`` is for the
    caller to say.
    """
    net = Paired(x.shape[1], width, seed)
    found = descend(net, x, y, attack(reach, seed=seed), lr=step, steps=steps)
    return found, _sides([float(found.losses.min()), found.distance], [eps, radius])


def tangent_kernel(x: Tensor, z: Tensor) -> Tensor:
    """K(x, z) = E_w <x s'(w . x), z s'(w . z)> (Definition 5.1) of :func:`smooth_relu`, in closed form, (n, k):
    <x, z> (1/4 + asin(<x, z> / sqrt((1 + |x|^2)(1 + |z|^2))) / (2 pi))."""
    inner = x @ z.T
    scale = ((1 + (x**2).sum(1))[:, None] * (1 + (z**2).sum(1))).sqrt()
    return inner * (0.25 + torch.asin(inner / scale) / (2 * math.pi))


@dataclasses.dataclass(frozen=True)
class KernelFit:
    """f(x) = sum_j weights_j K(points_j, x); ``radius``: its norm in the kernel's space; ``worst``: the largest |f -
    y| that was found on the caps."""

    points: Tensor
    weights: Tensor
    radius: float
    worst: float

    def __call__(self, x: Tensor) -> Tensor:
        return tangent_kernel(x, self.points) @ self.weights


def robust_fit(
    x: Tensor, y: Tensor, reach: float, *, target: float = 1.0, tolerance: float = 0.1, rounds: int = 30, seed: int = 0
) -> KernelFit:
    """A function of the kernel's space that is ``target`` * y on every cap to ``tolerance`` (Assumption 5.2): the
    shortest that fits a set of points, to which the worst found points of the caps are added round by round.

    Raises:
        ValueError: none within the rounds.
    """
    points, wanted, draw = x, target * y, torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        kernel = tangent_kernel(points, points)
        weights = torch.linalg.solve(kernel + 1e-9 * torch.eye(len(kernel), dtype=kernel.dtype), wanted)
        fit = lambda at, p=points, w=weights: tangent_kernel(at, p) @ w
        worst, found = torch.zeros(len(x), dtype=x.dtype), x
        for sign in (1.0, -1.0):  # from above and from below
            noise = torch.randn(x.shape, generator=draw, dtype=torch.float64)
            point = cap(x + reach / 2 * noise / noise.norm(dim=1, keepdim=True), x, reach)
            for _ in range(20):
                here = point.detach().requires_grad_()
                with torch.enable_grad():
                    (grad,) = torch.autograd.grad(sign * fit(here).sum(), here)
                point = cap(point + 0.2 * reach * grad / grad.norm(dim=1, keepdim=True).clamp_min(1e-300), x, reach)
            away = (fit(point) - target * y).abs()
            worst, found = torch.maximum(worst, away), torch.where((away > worst)[:, None], point, found)
        if worst.max() <= tolerance:
            return KernelFit(points, weights, float((weights @ kernel @ weights).sqrt()), float(worst.max()))
        add = worst > tolerance / 2
        points = torch.cat([points, found[add]])
        wanted = torch.cat([wanted, target * y[add]])
    raise ValueError(f"reach: got {reach}, for which {rounds} rounds found no robust function, expected a smaller one")


def theorem_5_2(
    x: Tensor, y: Tensor, width: int, *, reach: float = 0.1, eps: float = 0.1, target: float = 4.0, seed: int = 0
) -> tuple[Paired, Sides]:
    """Theorem 5.2: a robust network within R of the start. R is the norm of :func:`robust_fit` in the kernel's space;
    the network is :class:`Paired` with w_r moved by a_r v(w_r) / sqrt(m), v(w) = sum_j weights_j x_j s'(w . x_j), as
    the proof has it by random features. The two sides are its robust loss against eps, and ||W - W_0||_F against 1.1
    R (it tends to R).
    """
    needed = -math.log(math.expm1(eps / 2))  # a margin whose loss is half of eps
    if not target > needed:
        raise ValueError(f"target: got {target}, expected more than {needed:.3g} for eps = {eps}")
    fit = robust_fit(x, y, reach, target=target, tolerance=target - needed, seed=seed)
    net = Paired(x.shape[1], width, seed)
    with torch.no_grad():
        slope = torch.special.ndtr(net.w @ fit.points.T)  # s'(w . x_j)
        move = net.get_buffer("a")[:, None] * ((slope * fit.weights) @ fit.points)
        net.w.add_(move)
    adv = attack(reach, steps=20, restarts=3, seed=seed)(net, x, y)
    with torch.no_grad():
        robust = float(loss(net(adv), y).mean())
    return net, _sides([robust, float(move.norm())], [eps, 1.1 * fit.radius])


def linearisation_gap(net: Paired, trained: nn.Module, points: Tensor) -> float:
    """The largest |f(W) - f(W_0) - <grad f(W_0), W - W_0>| over points (n, d): goes to 0 as the width grows."""
    with torch.no_grad():
        moved = dict(trained.named_parameters())["w"] - net.w
        slope = (torch.special.ndtr(points @ net.w.T) * (points @ moved.T)) @ net.get_buffer("a")
        return float((trained(points) - net(points) - slope).abs().max())


def theorem_6_1(n: int, inputs: int, reach: float = 1.0) -> tuple[Tensor, Sides]:
    """Theorem 6.1 by its construction: d floor(n / 2) points, (k, d), that every n-robust interpolation class
    shatters, so that its VC dimension is at least that many.

    In each of floor(n / 2) places d points t e_i; for every labelling of them two balls of radius ``reach`` with
    centres more than 2 reach apart hold the positive and the negative ones. A class that is robust at those n centres
    (for all places at once) gives every labelling. All 2^d labellings are tried. The two sides: the largest distance
    of a point to its ball's centre against reach, and 2 reach against the least distance of two centres; both margins
    above 0.
    """
    if n < 2 or not 2 <= inputs <= 16 or not reach > 0:
        raise ValueError(f"n, inputs, reach: got {n}, {inputs}, {reach}, expected >= 2, 2 to 16, > 0")
    d, gap = inputs, 1e-3
    t = reach / (2 * math.sqrt(d))
    local = t * np.eye(d)
    labels = 1.0 - 2.0 * ((np.arange(2**d)[:, None] >> np.arange(d)) & 1)
    # the hyperplane <v, x> = 0 with v = labels / sqrt(d) has every point at the height +-t / sqrt(d)
    away = (1 + gap * t / math.sqrt(d) / reach) * reach * labels / math.sqrt(d)
    centres = np.stack([away, -away])  # of +1 and of -1
    held, apart = 0.0, 2.0 * float(np.linalg.norm(away, axis=1).min())
    for side, sign in zip(centres, (1.0, -1.0), strict=True):
        distance = np.linalg.norm(side[:, None] - local[None], axis=2)
        held = max(held, float(distance[labels == sign].max(initial=0.0)))
    places = 8 * reach * np.arange(n // 2)[:, None] * np.eye(1, d)
    apart = min(apart, 8 * reach - 4 * reach * (1 + gap)) if n >= 4 else apart
    points = (places[:, None] + local[None]).reshape(-1, d)
    return torch.from_numpy(points), _sides([held, 2 * reach], [reach, apart])


def _sides(left: ArrayLike, right: ArrayLike) -> Sides:
    a, b = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    return Sides(a, b, float((b - a).min()))


__all__ = [
    "Deep", "Descent", "KernelFit", "Paired", "attack", "cap", "descend", "linearisation_gap", "loss", "on_sphere",
    "robust_fit", "smooth_relu", "tangent_kernel", "theorem_4_1", "theorem_5_1", "theorem_5_2", "theorem_6_1",
]  # fmt: skip
