"""The PGD family in eager torch: as it is usually written, and as fast as eager torch can be made to run.

`*_step` and the losses are the usual formulas (the ones of the attack libraries); they are also what torch.compile
gets. `tuned_*` write into buffers made beforehand and compute nothing twice; they are the strongest eager peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..case import Call

TINY = 1e-10


def per_example(value: Tensor, like: Tensor) -> Tensor:
    """(B,) viewed so that it broadcasts against (B, ...)."""
    return value.view(-1, *[1] * (like.dim() - 1))


# ---- steps ----
def linf_step(x: Tensor, x0: Tensor, grad: Tensor, step_size: float, eps: float) -> Tensor:
    """clip(x0 + clip(x + step sign(g) - x0, -eps, eps), 0, 1)."""
    return torch.clamp(x0 + torch.clamp(x + step_size * grad.sign() - x0, -eps, eps), 0, 1)


def l2_step(x: Tensor, x0: Tensor, grad: Tensor, step_size: float, eps: float) -> Tensor:
    """x + step g / ||g||, shrunk to the ball, clipped to the box."""
    norms = grad.flatten(1).norm(p=2, dim=1) + TINY
    delta = x + step_size * grad / per_example(norms, grad) - x0
    sizes = delta.flatten(1).norm(p=2, dim=1)
    factor = torch.minimum(eps / (sizes + TINY), torch.ones_like(sizes))
    return torch.clamp(x0 + delta * per_example(factor, delta), 0, 1)


def knapsack(gain: Tensor, room: Tensor, budget: float) -> Tensor:
    """Lengths 0 <= p <= room, sum p <= budget, that maximise sum gain p; rows of gain and room (B, n)."""
    order = gain.argsort(dim=1, descending=True, stable=True)
    sorted_room = room.gather(1, order)
    before = sorted_room.cumsum(1) - sorted_room
    spent = torch.minimum((budget - before).clamp_min(0), sorted_room)
    return torch.zeros_like(room).scatter_(1, order, spent)


def l1_project(d: Tensor, room: Tensor, eps: float) -> Tensor:
    """Projection of rows d onto {|z|_1 <= eps, |z_i| <= room_i} by one sort of the breakpoints of lambda.

    The projected length is f(lambda) = sum clip(|d| - lambda, 0, room), piecewise linear and falling; its slope
    changes at |d_i| (a coordinate leaves zero) and at |d_i| - room_i (it reaches the face).
    """
    size = d.abs()
    inside = torch.minimum(size, room).sum(1) <= eps
    points = torch.cat([size, (size - room).clamp_min(0)], 1)
    slope = torch.cat([torch.ones_like(size), -torch.ones_like(size)], 1)
    points, order = points.sort(dim=1, descending=True)
    # going down from the largest breakpoint, `slope` coordinates grow between neighbouring breakpoints
    slope = slope.gather(1, order).cumsum(1)
    gaps = points[:, :-1] - points[:, 1:]
    length = torch.cat([torch.zeros_like(points[:, :1]), (slope[:, :-1] * gaps).cumsum(1)], 1)
    last = (length <= eps).sum(1, keepdim=True) - 1
    at, have, rate = points.gather(1, last), length.gather(1, last), slope.gather(1, last)
    threshold = torch.where(rate > 0, at - (eps - have) / rate.clamp_min(1), at).clamp_min(0)
    threshold = torch.where(inside[:, None], torch.zeros_like(threshold), threshold)
    return d.sign() * torch.minimum((size - threshold).clamp_min(0), room)


def l1_step(x: Tensor, x0: Tensor, grad: Tensor, step_size: float, eps: float) -> Tensor:
    """Steepest ascent inside the box (a fractional knapsack), then the projection on ball and box."""
    g, flat, flat0 = grad.flatten(1), x.flatten(1), x0.flatten(1)
    room = torch.where(g > 0, 1 - flat, torch.where(g < 0, flat, torch.zeros_like(g)))
    d = flat + g.sign() * knapsack(g.abs(), room, step_size) - flat0
    z = l1_project(d, torch.where(d > 0, 1 - flat0, flat0), eps)
    return (flat0 + z).clamp(0, 1).view_as(x)


Step = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, grad, out) -> out, out neither x nor grad


def tuned_linf_step(x0: Tensor, step_size: float, eps: float) -> Step:
    """Ball and box intersected once (they do not change during an attack); three kernels a step, no allocation."""
    low, high = (x0 - eps).clamp_(min=0), (x0 + eps).clamp_(max=1)

    def step(x: Tensor, grad: Tensor, out: Tensor) -> Tensor:
        torch.sign(grad, out=out)
        torch.add(x, out, alpha=step_size, out=out)
        return torch.clamp(out, low, high, out=out)

    return step


def tuned_l2_step(x0: Tensor, step_size: float, eps: float) -> Step:
    """In place on one buffer: two norms, and four passes over the tensor."""

    def step(x: Tensor, grad: Tensor, out: Tensor) -> Tensor:
        scale = torch.linalg.vector_norm(grad.flatten(1), dim=1).add_(TINY).reciprocal_().mul_(step_size)
        torch.addcmul(x, grad, per_example(scale, grad), out=out).sub_(x0)
        factor = torch.linalg.vector_norm(out.flatten(1), dim=1).add_(TINY).reciprocal_().mul_(eps).clamp_(max=1)
        return torch.addcmul(x0, out, per_example(factor, out), out=out).clamp_(0, 1)

    return step


# ---- starts, criterion, ATAS ----
def linf_random_start(x0: Tensor, eps: float) -> Tensor:
    return torch.clamp(x0 + torch.empty_like(x0).uniform_(-eps, eps), 0, 1)


def l2_random_start(x0: Tensor, eps: float) -> Tensor:
    """Uniform in the ball: a normal direction, the radius eps U^(1/n)."""
    direction = torch.randn_like(x0)
    sizes = direction.flatten(1).norm(p=2, dim=1)
    radius = eps * torch.rand_like(sizes) ** (1 / x0[0].numel())
    return torch.clamp(x0 + direction * per_example(radius / sizes, x0), 0, 1)


def fosc(x: Tensor, x0: Tensor, grad: Tensor, eps: float) -> Tensor:
    """eps ||g||_1 - <x - x0, g> of each example."""
    return eps * grad.abs().flatten(1).sum(1) - ((x - x0) * grad).flatten(1).sum(1)


def linf_step_fosc(
    x: Tensor, x0: Tensor, grad: Tensor, step_size: float, eps: float, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The criterion at the incoming x, and the step of the examples above the threshold."""
    criterion = fosc(x, x0, grad, eps)
    moves = criterion > threshold
    return torch.where(per_example(moves, x), linf_step(x, x0, grad, step_size, eps), x), criterion, moves


def atas_step(
    x: Tensor, x0: Tensor, grad: Tensor, v: Tensor, step_size: float, eps: float, beta: float, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """v' = beta v + (1 - beta) ||g||^2, alpha = step_size / sqrt(v' + c), the Linf step (thesis eqs. 5.15, 5.16)."""
    average = beta * v + (1 - beta) * grad.flatten(1).square().sum(1)
    alpha = step_size / (average + c).sqrt()
    moved = x + per_example(alpha, x) * grad.sign()
    return torch.clamp(x0 + torch.clamp(moved - x0, -eps, eps), 0, 1), average, alpha


# ---- losses: value and gradient with respect to the logits ----
def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y (Carlini and Wagner 2017, without the constant)."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    return logits.scatter(1, labels[:, None], -math.inf).amax(1) - own


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """-(z_y - max_{j != y} z_j) / (z_(1) - z_(3)) (Croce and Hein 2020)."""
    ordered, order = logits.sort(dim=1)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    first = (order[:, -1] == labels).to(logits.dtype)
    other = ordered[:, -2] * first + ordered[:, -1] * (1 - first)
    return -(own - other) / (ordered[:, -1] - ordered[:, -3] + 1e-12)


def kl(logits: Tensor, reference: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)) of each example (TRADES)."""
    p = functional.log_softmax(reference, 1)
    return functional.kl_div(functional.log_softmax(logits, 1), p, reduction="none", log_target=True).sum(1)


def with_gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, other: Tensor) -> Call:
    """Value and gradient by autograd."""
    leaf = logits.clone().requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        value = loss(leaf, other)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), gradient

    return call


# ---- the whole attack ----
def pgd(model: torch.nn.Module, x: Tensor, y: Tensor, *, norm: float, eps: float, step_size: float, steps: int) -> Call:
    """Plain PGD from x with the tuned steps; no parameter gradients, no bookkeeping."""
    step = (tuned_linf_step if norm == math.inf else tuned_l2_step)(x, step_size, eps)

    def call() -> Tensor:
        state, buffers = x, (torch.empty_like(x), torch.empty_like(x))
        for number in range(steps):
            leaf = state.detach().requires_grad_()
            loss = functional.cross_entropy(model(leaf), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
            state = step(state, gradient, buffers[number % 2])
        return state

    return call
