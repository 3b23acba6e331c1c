"""How far attacks are from converged, and what that says of their strength (Wang et al. 2019, figures 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .. import attacks, ops
from ._weights import copied


class Measured(NamedTuple):
    """Of N examples: the criterion ``fosc`` (N,), the cross-entropy ``loss`` (N,), ``fooled`` (N,) bool; with a
    dimension of the settings in front where there are several."""

    fosc: Tensor
    loss: Tensor
    fooled: Tensor


class Groups(NamedTuple):
    """``edges`` (G + 1,); in each group [edge, next): ``examples`` (G,), how many, ``success`` (G,) of the attack, a
    share, and the mean ``loss`` (G,); NaN where a group is empty. The last group holds its upper edge."""

    edges: Tensor
    examples: Tensor
    success: Tensor
    loss: Tensor


def measure(
    model: nn.Module, adv: Tensor, x: Tensor, y: Tensor, eps: float, norm: float | str = "Linf", batch_size: int = 500
) -> Measured:
    """FOSC (equation 4) of adversarial examples around the *clean* x, by the gradient of each example's own
    cross-entropy in evaluation mode. The ball alone is the set: where an attack is kept in a box as well, gradients
    that point out of the box keep FOSC above 0."""
    other, found = copied(model), []
    for part in torch.arange(len(x), device=x.device).split(batch_size):
        with torch.inference_mode(False), torch.enable_grad():
            point = adv[part].detach().clone().requires_grad_()
            logits = other(point)
            loss = cross_entropy(logits, y[part], reduction="none")
            (grad,) = torch.autograd.grad(loss.sum(), point)
        value = ops.fosc(point.detach(), x[part], grad, eps, norm)
        found.append((value, loss.detach(), logits.detach().argmax(1) != y[part]))
    return Measured(*(torch.cat(rows) for rows in zip(*found, strict=True)))


def by_attack(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, settings: Sequence[tuple[int, float]], *, seed: int = 0,
    **options: Any,
) -> Measured:  # fmt: skip
    """(S, N) of PGD by (steps, step size) of each setting, with the same random start (figure 2; with 1, 2, ... steps
    of one length, figure 1b). Options as of :func:`fastrobust.attacks.pgd`: ``clip=None`` is the paper's Algorithm
    1."""
    norm, other = options.get("norm", "Linf"), copied(model)
    attack = lambda steps, step: attacks.pgd(other, x, y, eps=eps, steps=steps, step_size=step, seed=seed, **options)
    rows = [measure(other, attack(steps, step), x, y, eps, norm) for steps, step in settings]
    return Measured(*(torch.stack(part) for part in zip(*rows, strict=True)))


def groups(found: Measured, edges: Sequence[float] | Tensor) -> Groups:
    """Success and loss by FOSC (figure 1a: 20 equal groups from 0 to 0.1)."""
    edges = torch.as_tensor(edges, dtype=found.fosc.dtype)
    place = torch.bucketize(found.fosc, edges, right=True) - 1
    place = torch.where(found.fosc == edges[-1], len(edges) - 2, place)
    inside = torch.stack([place == g for g in range(len(edges) - 1)])
    mean = lambda values: torch.stack([values[rows].double().mean() for rows in inside])
    return Groups(edges, inside.sum(1), mean(found.fooled), mean(found.loss))


def plot(found: dict[str, Tensor], grouped: Groups, figure: Any, bins: int = 40) -> None:
    """Densities of FOSC by name on the left, success and loss by group on the right."""
    left, right = figure.subplots(1, 2)
    top = float(torch.cat([v.flatten() for v in found.values()]).quantile(0.98))
    for name, values in found.items():
        share = torch.histc(values.clamp(max=top), bins, 0, top) / len(values)
        left.step([top * i / bins for i in range(bins)], share.tolist(), where="post", label=name)
    left.set(xlabel="FOSC", ylabel="share of examples")
    left.legend(fontsize=7)
    middle = ((grouped.edges[1:] + grouped.edges[:-1]) / 2).tolist()
    right.plot(middle, (100 * grouped.success).tolist(), "o-", color="tab:red")
    right.set(xlabel="FOSC", ylabel="success, %")
    other = right.twinx()
    other.plot(middle, grouped.loss.tolist(), "s-", color="tab:blue", markersize=3)
    other.set_ylabel("loss")
