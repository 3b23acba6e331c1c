"""Training within B(R) and the networks of its theory (Gao et al. 2019): wide nets near their random start.

Clean and attacked inputs lie on the unit sphere; outputs are one number, labels 0 and 1 stand for the targets -1 and 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from .. import attacks
from ..attacks import _inputs
from ._passes import at, attacking, seed
from .method import Batch, Loss, Method
from .registry import register

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, tuple[Activation, Activation]] = {  # with their derivatives
    "softplus": (F.softplus, torch.sigmoid),
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z).square()),
    "quadratic-relu": (lambda z: F.relu(z).square(), lambda z: 2 * F.relu(z)),
    "relu": (F.relu, lambda z: (z > 0).to(z.dtype)),
}


def _activation(name: str) -> tuple[Activation, Activation]:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: got {name!r}, expected one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def to_sphere(x: Tensor) -> Tensor:
    """Every example on the unit sphere; zero stays zero."""
    norms = x.flatten(1).norm(dim=1).view(-1, *[1] * (x.dim() - 1))
    return x / norms.clamp_min(torch.finfo(x.dtype).tiny)


class TwoLayerNTK(nn.Module):
    r"""(4): ``f(x) = 1/sqrt(m) (sum_r a_r s(w_r . x) + sum_r a'_r s(w'_r . x))`` over m / 2 pairs with w' = w ~ N(0, I)
    and
    a' = -a = -+1 at the start, so that f = 0 there. Only w and w' are trained. (B, ...) gives (B,)."""

    ends: Tensor

    def __init__(self, features: int, width: int, activation: str = "softplus", seed: int | None = None) -> None:
        super().__init__()
        if _inputs.integer(width, "width", 2) % 2:
            raise ValueError(f"width: got {width}, expected an even number: neurons come in pairs")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        half = torch.randn(width // 2, features, generator=generator)
        signs = torch.randint(0, 2, (width // 2,), generator=generator) * 2.0 - 1
        self.weight = nn.Parameter(torch.cat([half, half]))
        self.register_buffer("ends", torch.cat([signs, -signs]))
        self.activation = activation
        self._act = _activation(activation)[0]

    def forward(self, x: Tensor) -> Tensor:
        # pairs first, whose difference is exactly zero at the start
        plus, minus = (self._act(x.flatten(1) @ self.weight.T) * self.ends).chunk(2, 1)
        return (plus + minus).sum(1) / math.sqrt(len(self.ends))


class DeepNTK(nn.Module):
    """(1): ``x0 = A x``, ``depth`` layers ``relu(W x)`` of width m, ``a . x``; A and W ~ N(0, 2/m), a ~ N(0, 1). A and
    a are fixed. (B, ...) gives (B,)."""

    first: Tensor
    ends: Tensor

    def __init__(self, features: int, width: int, depth: int, seed: int | None = None) -> None:
        super().__init__()
        m = _inputs.integer(width, "width", 1)
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        self.register_buffer("first", draw(m, features) * math.sqrt(2 / m))
        layers = [draw(m, m) * math.sqrt(2 / m) for _ in range(_inputs.integer(depth, "depth", 1))]
        self.layers = nn.ParameterList([nn.Parameter(w) for w in layers])
        self.register_buffer("ends", draw(m))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1) @ self.first.T
        for w in self.layers:
            x = F.relu(x @ w.T)
        return x @ self.ends


def _huber(f: Tensor, target: Tensor) -> Tensor:
    return F.smooth_l1_loss(f, target, reduction="none")


def _logistic(f: Tensor, target: Tensor) -> Tensor:
    return F.softplus(-target * f)


SURROGATES = {"huber": _huber, "logistic": _logistic}


@register("projected")
class Projected(Method):
    r"""Projected gradient descent for the surrogate loss (Gao et al. 2019, section 4):

    .. math:: V = W - \alpha \nabla L_A(W), \quad W = P_{B(R)}(V), \quad
              B(R) = \{\|W^{(h)} - W_0^{(h)}\|_F \le R / \sqrt{m}\ \forall h\}

    L_A is the loss at the attack's output, a constant to the gradient, on the unit sphere; the guarantee is on its
    minimum over the steps, ``least``. Theorem 4.1: rate O(eps / (m H^2)), Theta(R^2 / (m eps rate)) steps of plain
    gradient descent.

    radius: R, ``joint=True`` the set of section 5, ``||W - W_0||_F <= R`` over all layers; ``project=False`` only
    measures, as theorem 5.1 needs no projection. delta: the attack's l2 radius on the sphere (a chord, held exactly).
    loss: "huber" (Lipschitz, smooth, convex, zero at the target), "logistic", or a callable (f, target) -> (B,).
    attack: options of :func:`fastrobust.attacks.pgd`; ``steps=0`` is plain training.
    """

    def __init__(
        self,
        radius: float = 10.0,
        *,
        delta: float | Callable[[float], float] = 0.1,
        steps: int = 10,
        joint: bool = False,
        project: bool = True,
        loss: str | Callable[[Tensor, Tensor], Tensor] = "huber",
        **attack: Any,
    ) -> None:
        self.radius = _inputs.number(radius, "radius")
        self.delta = delta if callable(delta) else _inputs.number(delta, "delta")
        self.steps = _inputs.integer(steps, "steps", 0)
        self.joint, self.project, self.attack = bool(joint), bool(project), attack
        if isinstance(loss, str) and loss not in SURROGATES:
            raise ValueError(f"loss: got {loss!r}, expected one of {', '.join(SURROGATES)} or a callable(f, target)")
        self.surrogate = loss
        self._loss = SURROGATES[loss] if isinstance(loss, str) else loss
        self.least = math.inf
        self._start: list[Tensor] = []

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        self._start, self.least = [p.detach().clone() for p in self._layers(model)], math.inf

    @staticmethod
    def _layers(model: nn.Module) -> list[Tensor]:
        return [p for p in model.parameters() if p.requires_grad]

    def bound(self, layer: Tensor) -> float:
        """The largest distance of a layer (of all, when joint)."""
        return self.radius if self.joint else self.radius / math.sqrt(layer.shape[0])

    def distance(self, model: nn.Module) -> float:
        """The largest ratio of a layer's distance from its start to its bound; in B(R) it is at most 1."""
        moved = [(w.detach() - w0).norm() for w, w0 in zip(self._layers(model), self._start, strict=True)]
        if self.joint:
            return float(torch.stack(moved).norm()) / self.radius if self.radius else math.inf
        return max(float(d) / self.bound(w) for d, w in zip(moved, self._start, strict=True))

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        x, delta = to_sphere(batch.x), at(self.delta, batch)
        if delta == 0 or self.steps == 0:
            return x
        # a point within sin(t) of x is, brought to the sphere, at a chord of at most 2 sin(t / 2) = delta
        eps = delta * math.sqrt(1 - min(delta, 2) ** 2 / 4) if delta <= math.sqrt(2) else 1.0
        with attacking(model, "eval"):
            found = attacks.pgd(
                model, x, self._target(batch.y, x), loss=self._each, eps=eps, norm=2, steps=self.steps, clip=None,
                seed=seed(), check=False, **self.attack,
            )  # fmt: skip
        return to_sphere(found)

    @staticmethod
    def _target(y: Tensor, x: Tensor) -> Tensor:
        return y.to(x.dtype) * 2 - 1 if not y.is_floating_point() else y.to(x.dtype)

    def _each(self, f: Tensor, target: Tensor) -> Tensor:
        return self._loss(f.reshape(target.shape), target)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        f = model(adv).reshape(len(adv))
        value = self._each(f, self._target(batch.y, adv)).mean()
        self.least = min(self.least, float(value.detach()))
        return Loss(value, torch.stack([-f, f], 1).detach(), {"least": self.least})

    def step(self, model: nn.Module, batch: Batch, update: Callable[[Tensor], None]) -> Loss:
        if not self._start:
            self.begin(model, None, batch.epochs)
        found = super().step(model, batch, update)
        if self.project:
            self._into_ball(model)
        found.metrics["distance"] = self.distance(model)
        return found

    @torch.no_grad()
    def _into_ball(self, model: nn.Module) -> None:
        layers = self._layers(model)
        moved = [w - w0 for w, w0 in zip(layers, self._start, strict=True)]
        total = torch.stack([d.norm() for d in moved]).norm() if self.joint else None
        for w, w0, d in zip(layers, self._start, moved, strict=True):
            have, most = d.norm() if total is None else total, self.bound(w)
            if float(have) > most:
                w.copy_(w0 + d * (most / have))

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "least": self.least}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start, self.least = [t.clone() for t in state["start"]], state["least"]

    def settings(self) -> dict[str, Any]:
        found = super().settings() | {f"attack.{k}": v for k, v in self.attack.items()}
        found.pop("least")  # a result
        return found


def linearisation_gap(model: nn.Module, start: dict[str, Tensor], x: Tensor) -> Tensor:
    """(B,) ``|f(W, x) - f(W_0, x) - <grad f(W_0, x), W - W_0>|``, W_0 = ``start`` (of ``named_parameters``): how far
    the network is from its linear model, which vanishes as the width grows."""
    now = {name: p.detach() for name, p in model.named_parameters()}
    if start.keys() != now.keys():
        raise ValueError(f"start: got {sorted(start)}, expected the parameters {sorted(now)}")
    begun = {name: start[name].detach().clone().requires_grad_() for name in now}
    with torch.enable_grad():
        base = functional_call(model, begun, (x,)).reshape(len(x))
        weights = torch.ones_like(base, requires_grad=True)
        grads = torch.autograd.grad((weights * base).sum(), list(begun.values()), create_graph=True)
        along = [(g * (now[name] - begun[name].detach())).sum() for name, g in zip(begun, grads, strict=True)]
        # linear in the weights, so that its gradient is each example's own derivative along the way
        (slope,) = torch.autograd.grad(torch.stack(along).sum(), weights)
    with torch.no_grad():
        return (model(x).reshape(len(x)) - base - slope).abs()


def ntk(x: Tensor, y: Tensor, activation: str = "softplus", nodes: int = 40) -> Tensor:
    r"""(N, M) neural tangent kernel ``K(x, y) = <x, y> E_{w ~ N(0, I)} s'(w.x) s'(w.y)`` (definition 5.1).

    In closed form for "relu" and "quadratic-relu" (arc-cosine kernels), else by Gauss-Hermite quadrature of the two
    correlated normal numbers with nodes^2 points. Differentiable (the closed forms not where x and y are parallel)."""
    slope = _activation(activation)[1]
    x, y = x.flatten(1), y.flatten(1)
    inner = x @ y.T
    norms_x, norms_y = x.norm(dim=1)[:, None], y.norm(dim=1)[None]
    cosine = (inner / (norms_x * norms_y)).clamp(-1, 1)
    if activation in ("relu", "quadratic-relu"):
        angle = torch.arccos(cosine)
        if activation == "relu":
            return inner * (math.pi - angle) / (2 * math.pi)
        sine = (1 - cosine.square()).clamp_min(0).sqrt()
        return inner * 4 * norms_x * norms_y * (sine + (math.pi - angle) * cosine) / (2 * math.pi)
    points, weights = _hermite(nodes, x)
    sine = (1 - cosine.square()).clamp_min(torch.finfo(x.dtype).eps).sqrt()
    first = slope(norms_x * points)  # (N, nodes), of w . x / |x| = z_1
    mean = torch.zeros_like(inner)
    for z1, at_x, weight in zip(points.tolist(), first.unbind(1), weights.tolist(), strict=True):
        u = norms_y[..., None] * (cosine[..., None] * z1 + sine[..., None] * points)
        mean = mean + weight * at_x[:, None] * (slope(u) @ weights)
    return inner * mean


def _hermite(nodes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Points and weights of the mean over N(0, 1)."""
    import numpy as np

    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    weights = weights / weights.sum()
    return torch.tensor(points).to(like), torch.tensor(weights).to(like)


class RobustKernelFit(nn.Module):
    """A function of the kernel's space that fits targets on whole balls of the sphere: ``f(x) = sum_i c_i K(z_i, x)``.

    Assumption 5.2 in small: the fit begins at the clean points; in every round the points where each ball is fitted
    worst are added, and the least-norm interpolant is found anew. ``norm`` is ||f||_H, which is the radius R that a
    wide network needs; ``worst`` the largest |f(x') - y| that the attack found.
    """

    def __init__(
        self,
        x: Tensor,
        target: Tensor,
        delta: float,
        *,
        activation: str = "softplus",
        rounds: int = 5,
        steps: int = 10,
        ridge: float = 1e-6,
    ) -> None:
        super().__init__()
        self.activation, self.ridge = activation, ridge
        centres = to_sphere(x.flatten(1))
        self._fit(centres, target)
        for _ in range(_inputs.integer(rounds, "rounds", 0)):
            found = self.attack(centres, target, delta, steps)
            self._fit(torch.cat([self.points, found]), torch.cat([self.targets, target]))
        self.worst = float((self(self.attack(centres, target, delta, steps)) - target).detach().abs().max())

    def _fit(self, points: Tensor, targets: Tensor) -> None:
        with torch.no_grad():
            gram = ntk(points, points, self.activation).double()
            eye = torch.eye(len(points), dtype=torch.float64, device=points.device)
            found = torch.linalg.solve(gram + self.ridge * gram.diagonal().mean() * eye, targets.double())
            self.points, self.targets, self.coefficients = points, targets, found.to(points.dtype)
            self.norm = float((found @ gram @ found).clamp_min(0).sqrt())

    def attack(self, centres: Tensor, target: Tensor, delta: float, steps: int) -> Tensor:
        """Points of the balls where the fit is worst, by ascent of (f - y)^2 on the sphere."""
        fault = Projected(delta=delta, steps=steps, loss=lambda f, y: (f - y).square(), restarts=2, keep="best")
        return fault.perturb(self, Batch(centres, target))

    def forward(self, x: Tensor) -> Tensor:
        return ntk(x, self.points, self.activation) @ self.coefficients


__all__ = ["DeepNTK", "Projected", "RobustKernelFit", "TwoLayerNTK", "linearisation_gap", "ntk", "to_sphere"]
