"""Bezier curves of low adversarial loss between two trained networks (thesis equation 4.28, figure 4.8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

from ._weights import Attack, Batches, copied, flat, noise, put


class Curve(NamedTuple):
    """``points`` (order + 1, P): theta_0, the trained points between, theta_n; each as by ``parameters()``."""

    points: Tensor

    def at(self, t: float) -> Tensor:
        """B(t) = sum_i C(n, i) (1 - t)^(n - i) t^i theta_i, (P,)."""
        n = len(self.points) - 1
        weights = [math.comb(n, i) * (1 - t) ** (n - i) * t**i for i in range(n + 1)]
        return self.points.new_tensor(weights) @ self.points if 0 < t < 1 else self.points[-1 if t else 0]


class Along(NamedTuple):
    """On a curve at ``t`` (n,): the mean adversarial ``loss`` (n,) and the adversarial ``error`` (n,), a share."""

    t: Tensor
    loss: Tensor
    error: Tensor


def connect(
    first: nn.Module, last: nn.Module, batches: Batches, attack: Attack, *, order: int = 2, epochs: int = 10,
    lr: float = 1e-3, seed: int = 0,
) -> Curve:  # fmt: skip
    """Train the points between the two networks on E_t loss(B(t)), one t ~ U[0, 1] a batch, by Adam; they start on the
    straight line. The attack is run against the network at B(t). ``batches`` is gone through once an epoch."""
    if order < 2:
        raise ValueError(f"order: got {order}, expected at least 2")
    other, draw = copied(first), torch.Generator().manual_seed(seed)
    ends = torch.stack([flat(first), flat(last)])
    shares = torch.arange(1, order).to(ends)[:, None] / order
    between = ((1 - shares) * ends[0] + shares * ends[1]).requires_grad_()
    names, sizes = [n for n, _ in other.named_parameters()], [p.numel() for p in other.parameters()]
    shapes = [p.shape for p in other.parameters()]
    adam = torch.optim.Adam([between], lr)
    with noise(first, seed):
        for _ in range(epochs):
            for x, y, *_ in batches:
                t = float(torch.rand((), generator=draw))
                with torch.enable_grad():
                    weights = Curve(torch.cat([ends[:1], between, ends[1:]])).at(t)
                    adv = attack(put(other, weights.detach()), x, y).detach()
                    parts = zip(names, shapes, weights.split(sizes), strict=True)
                    other.train()
                    loss = cross_entropy(functional_call(other, {n: p.view(s) for n, s, p in parts}, (adv,)), y)
                    other.eval()
                    adam.zero_grad()
                    loss.backward()
                adam.step()
    return Curve(torch.cat([ends[:1], between.detach(), ends[1:]]))


def along(
    model: nn.Module, curve: Curve, t: Sequence[float], x: Tensor, y: Tensor, attack: Attack, batches: Batches,
    *, seed: int = 0,
) -> Along:  # fmt: skip
    """Loss and error at (x, y) along the curve, in evaluation mode; the statistics of batch norm are estimated anew
    from ``batches`` (clean images, as in the thesis) at every t. ``model`` gives the architecture."""
    other, losses, errors = copied(model), [], []
    with noise(model, seed):
        for share in t:
            update_bn(batches, put(other, curve.at(share)))
            other.eval()
            adv = attack(other, x, y)
            with torch.no_grad():
                logits = other(adv)
            losses.append(float(cross_entropy(logits, y)))
            errors.append(float((logits.argmax(1) != y).double().mean()))
    return Along(torch.tensor(t), torch.tensor(losses), torch.tensor(errors))


def plot(found: dict[str, Along], figure: Any) -> None:
    left, right = figure.subplots(1, 2)
    for name, line in found.items():
        left.plot(line.t.tolist(), line.loss.tolist(), label=name)
        right.plot(line.t.tolist(), (100 * line.error).tolist(), label=name)
    left.set(xlabel="t", ylabel="adversarial loss"), right.set(xlabel="t", ylabel="adversarial error, %")
    left.legend(fontsize=7)
