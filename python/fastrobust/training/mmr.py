"""Maximum margin regularisation of linear regions (Croce, Andriushchenko and Hein, AISTATS 2019)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._input_sets import dual_exponent
from ..attacks import _inputs
from ._clean_statistics import clean_pass, fixed
from ._passes import Attacked, length
from .method import Batch, Loss
from .registry import register

_LEAST = 1e-5  # of a normal vector's norm: a nearly constant difference of logits would divide by nothing
_ALIKE = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout2d,
    nn.Flatten,
    nn.Unflatten,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.ZeroPad2d,
)


class Distances(NamedTuple):
    """``region`` (B, N): of x to the hyperplane where each of the N ReLUs changes sides, at least 0. ``decision``
    (B, K - 1): signed, to where the region's linear classifier is undecided between y and each other class, ascending
    without y; negative where that class wins. Infinite where there is no hyperplane: the unit, or the difference, is
    constant in the region."""

    region: Tensor
    decision: Tensor


def linear_region_distances(model: nn.Module, x: Tensor, y: Tensor, norm: float = math.inf) -> Distances:
    r"""l_p distances of x to the boundaries of its linear region and to the decision boundaries of the linear
    classifier there.

    In the region of x every pre-activation is ``f_j(x') = <v_j, x'> + a_j``, and

    .. math:: d^B_j = |f_j(x)| / \|v_j\|_q, \qquad d^D_s = (f_y(x) - f_s(x)) / \|v_y - v_s\|_q, \quad 1/p + 1/q = 1

    (theorem 3.1 of the paper: no adversarial example is closer than the smaller of the least of each). The box of the
    images plays no part. Differentiable, with the pattern of the ReLUs a constant. All v are carried through the
    network from the input, which takes memory of B times n_in times a layer's width.

    Args:
        model: nested ``nn.Sequential`` of affine layers (linear, convolution, batch normalisation in eval mode, average
            pooling, flatten) and ``nn.ReLU``. x: (B, ...); y: (B,) labels. norm: p of the distances, at least 1.

    Raises:
        ValueError: naming the layer that is none of these.
    """
    q, many, region = dual_exponent(norm), x[0].numel(), [x.new_zeros(len(x), 0)]
    # d value / d x, (1 or B, n_in, ...): one for all examples up to the first ReLU
    value, rows = x, torch.eye(many, dtype=x.dtype, device=x.device).view(1, many, *x.shape[1:])
    for layer in _chain(model):
        if isinstance(layer, nn.ReLU):
            region.append(_apart(value.abs().flatten(1), rows.flatten(2), q))
            on = (value > 0).to(value.dtype)
            value, rows = value * on, rows * on.unsqueeze(1)
        else:
            moved = _linear_part(layer, rows.flatten(0, 1))
            value, rows = layer(value), moved.view(len(rows), many, *moved.shape[1:])
    if value.dim() != 2:
        raise ValueError(f"model: got an output of shape {tuple(value.shape)}, expected (B, K)")
    other = torch.arange(value.shape[1] - 1, device=y.device).expand(len(y), -1)
    other = other + (other >= y[:, None]).long()
    own = y[:, None].expand_as(other)
    margins = value.gather(1, own) - value.gather(1, other)
    rows = rows.expand(len(y), -1, -1)
    pick = lambda at: rows.gather(2, at.unsqueeze(1).expand(-1, many, -1))
    return Distances(torch.cat(region, 1), _apart(margins, pick(own) - pick(other), q))


def _apart(values: Tensor, rows: Tensor, q: float) -> Tensor:
    """(B, N) values over the q-norms of the rows (1 or B, n_in, N)."""
    size = torch.linalg.vector_norm(rows, q, dim=1)
    found = values / size.clamp_min(_LEAST)
    return torch.where(size > 0, found, found.new_full((), math.inf))


def _chain(model: nn.Module) -> Iterator[nn.Module]:
    if isinstance(model, nn.Sequential):
        for layer in model:
            yield from _chain(layer)
    elif isinstance(model, (nn.ReLU, nn.Linear, nn.Conv1d, nn.Conv2d, _BatchNorm, *_ALIKE)):
        yield model
    else:
        raise ValueError(
            f"model: got a layer {type(model).__name__}, expected nn.Sequential of affine layers and nn.ReLU"
        )


def _linear_part(layer: nn.Module, v: Tensor) -> Tensor:
    """The layer without its offset."""
    if isinstance(layer, nn.Linear):
        return F.linear(v, layer.weight)
    if isinstance(layer, (nn.Conv1d, nn.Conv2d)):
        return layer._conv_forward(v, layer.weight, None)
    if isinstance(layer, _BatchNorm):
        if layer.training or layer.running_var is None or layer.running_mean is None:
            raise ValueError("model: got batch normalisation on batch statistics, expected eval mode")
        factor = (layer.running_var + layer.eps).rsqrt()
        factor = factor if layer.weight is None else factor * layer.weight
        return v * factor.view(-1, *[1] * (v.dim() - 2))
    out: Tensor = layer(v)
    return out


def mmr_hinge(distances: Tensor, gamma: float, count: int) -> Tensor:
    r"""(B,) ``1/count sum_{j <= count} max(0, 1 - d_j / gamma)`` over the ``count`` smallest distances (all, if
    fewer)."""
    count = min(count, distances.shape[1])
    if count == 0:
        return distances.new_zeros(len(distances))
    nearest = distances.topk(count, dim=1, largest=False).values
    return (1 - nearest / gamma).clamp_min(0).mean(1)


@register("mmr")
class MMR(Attacked):
    r"""Maximum margin regularisation (Croce et al. 2019): boundaries of the linear regions, and the decision
    boundaries, are
    pushed away from the examples, for networks that are chains of affine layers and ReLUs.

    .. math:: L(f(x), y) + \lambda \Big[ \frac{1}{k_B} \sum_{j \le k_B} \max(0, 1 - d^B_j / \gamma_B)
              + \frac{1}{k_D} \sum_{s \le k_D} \max(0, 1 - d^D_s / \gamma_D) \Big]

    over the nearest k_B region and k_D decision boundaries (:func:`linear_region_distances`). As the authors' code
    anneals: k_B goes linearly from ``nearest[0]`` to ``nearest[1]`` of the ReLUs over the training, the weight lambda
    from nothing over the share ``warm_up`` of it. k_D: all other classes when None (their code divides by K where K - 1
    terms can differ from zero).

    gamma, gamma_decision: None is 2 eps, as for their MNIST CNN (l-inf, eps .1, gamma .2, lambda .5); one gamma serves
    both.
    eps: of the threat model, .1 (MNIST, l-inf; .3 for l2). norm: p of the distances, "Linf", "L2" or "L1". subsample:
    number of examples of each batch that are regularised (None: all). Settings: Adam 1e-3 (l2 on MNIST 1e-4), batches
    of 128, 100 epochs, the last tenth at a tenth of the rate.
    """

    share = 0.0  # of each batch, replaced by attacked examples

    def __init__(
        self, eps: float = 0.1, *, weight: float = 0.5, gamma: float | None = None, gamma_decision: float | None = None,
        nearest: tuple[float, float] = (0.1, 0.02), count: int | None = None, warm_up: float = 0.1,
        subsample: int | None = None, attack_steps: int = 40, step_size: float | None = None, **ball: Any,
    ) -> None:  # fmt: skip
        super().__init__(eps, **ball)
        self.weight = _inputs.number(weight, "weight")
        self.gamma = 2 * _inputs.number(eps, "eps") if gamma is None else _inputs.number(gamma, "gamma")
        self.gamma_decision = self.gamma if gamma_decision is None else _inputs.number(gamma_decision, "gamma_decision")
        for name, value in (("gamma", self.gamma), ("gamma_decision", self.gamma_decision)):
            if not value > 0:
                raise ValueError(f"{name}: got {value}, expected a number > 0")
        if len(nearest) != 2 or not all(0 <= v <= 1 for v in nearest):
            raise ValueError(f"nearest: got {nearest}, expected two shares of the ReLUs in [0, 1], first and last")
        if not 0 <= warm_up <= 1:
            raise ValueError(f"warm_up: got {warm_up}, expected a share of the training in [0, 1]")
        self.nearest, self.warm_up = (float(nearest[0]), float(nearest[1])), float(warm_up)
        self.count = None if count is None else _inputs.integer(count, "count", 1)
        self.subsample = None if subsample is None else _inputs.integer(subsample, "subsample", 1)
        self.attack_steps = _inputs.integer(attack_steps, "attack_steps", 1)
        self.step_size = None if step_size is None else _inputs.number(step_size, "step_size")

    def strength(self, batch: Batch) -> float:
        """lambda of this epoch; it reaches ``weight`` in the last epoch of the warm-up."""
        warming = self.warm_up * batch.epochs
        return self.weight * (min((batch.epoch + 1) / warming, 1.0) if warming else 1.0)

    def nearest_regions(self, batch: Batch, units: int) -> int:
        """k_B of this epoch."""
        first, last = (int(v * units) for v in self.nearest)
        return max(1, int(first + (last - first) * (batch.epoch + 1) / batch.epochs))

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        attacked = int(self.share * len(batch.x))
        if attacked == 0:
            return batch.x
        index = None if batch.index is None else batch.index[:attacked]
        part = Batch(batch.x[:attacked], batch.y[:attacked], index, batch.epoch, batch.epochs, batch.step, batch.steps)
        step = length(self.step_size, self.radius(batch), 2 / self.attack_steps)
        found = self.attack(model, part, steps=self.attack_steps, step_size=step, random_start=True)
        return torch.cat([found, batch.x[attacked:]])

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        logits, seen = clean_pass(model, adv)
        value = F.cross_entropy(logits, batch.y)
        rows = slice(None) if self.subsample is None else torch.randperm(len(adv))[: self.subsample].to(adv.device)
        with fixed(model, seen):
            region, decision = linear_region_distances(model, adv[rows], batch.y[rows], self.norm)
        nearest = self.nearest_regions(batch, region.shape[1])
        regions = mmr_hinge(region, self.gamma, nearest).mean()
        decisions = mmr_hinge(decision, self.gamma_decision, self.count or decision.shape[1]).mean()
        told: dict[str, Tensor | float] = {
            "cross_entropy": value.detach(), "regions": regions.detach(), "decisions": decisions.detach()
        }  # fmt: skip
        return Loss(value + self.strength(batch) * (regions + decisions), logits, told)


@register("mmr+at")
class MMRat(MMR):
    """MMR with adversarial training: half of every batch are PGD examples of ``attack_steps`` (40; their code 7 outside
    MNIST) steps of 2 eps / attack_steps, and the regulariser is taken where the examples then are."""

    share = 0.5


__all__ = ["MMR", "Distances", "MMRat", "linear_region_distances", "mmr_hinge"]
