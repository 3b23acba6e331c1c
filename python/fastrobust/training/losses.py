"""TRADES and MART: losses of the clean and of the attacked images together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..attacks import _inputs
from ._passes import Attacked, Scheduled, ascend, attacking, length, normal_start, optional_length
from .method import Batch, Loss
from .registry import register

_EPS, _STEP = 0.031, 0.007 / 0.031


class _FromNearby(Attacked):
    """Ascent from ``x + start_width N(0, I)``, as the authors of both begin."""

    def __init__(
        self, eps: Scheduled = _EPS, *, steps: int = 10, step_size: float | None = None, start_width: float = 0.001,
        beta: float = 6.0, **ball: Any,
    ) -> None:  # fmt: skip
        super().__init__(eps, **ball)
        self.steps = _inputs.integer(steps, "steps", 0)
        self.step_size = optional_length(step_size)
        self.start_width, self.beta = _inputs.number(start_width, "start_width"), _inputs.number(beta, "beta")

    def _climb(self, model: nn.Module, batch: Batch, by_kl: bool) -> Tensor:
        ball = self.ball(batch)
        with attacking(model, self.attack_mode):
            reference = None
            if by_kl:
                with torch.no_grad():
                    reference = model(batch.x)
            return ascend(
                model, batch, ops.project(normal_start(batch, self.start_width), batch.x, **ball), steps=self.steps,
                step_size=length(self.step_size, ball["eps"], _STEP), reference=reference, **ball,
            )  # fmt: skip


@register("trades")
class TRADES(_FromNearby):
    r"""TRADES (Zhang et al. 2019, eq. 5 and algorithm 1): the clean loss, and how far the output can be moved.

    .. math:: CE(f(x), y) + \beta \max_{x'} KL(softmax f(x) || softmax f(x'))

    The attack ascends the KL from the clean logits, which are computed once; the loss differentiates both arguments.
    Defaults of the paper: eps .031, 10 steps of .007, beta 6, starts of width .001."""

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._climb(model, batch, by_kl=True)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        clean, attacked = model(batch.x), model(adv)
        natural, robust = F.cross_entropy(clean, batch.y), ops.kl_divergence(attacked, clean).value.mean()
        return Loss(natural + self.beta * robust, attacked, {"natural": natural.detach(), "kl": robust.detach()})


@register("mart")
class MART(_FromNearby):
    r"""MART (Wang et al. 2020, eq. 8 to 11): a boosted cross-entropy, and a KL that weighs what is misclassified.

    With p' the probabilities of x', p those of x:

    .. math:: -\log p'_y - \log(1 - \max_{k \ne y} p'_k) + \beta KL(p || p') (1 - p_y)

    The weights 1 - p_y carry gradients, as in the paper. The second term is a difference of two logsumexp, exact where
    the authors' code adds 1e-4 inside the logarithm. PGD on the cross-entropy. Defaults: eps .031, 10 steps of
    .007; beta 6 (5 for ResNet-18)."""

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        return self._climb(model, batch, by_kl=False)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        clean, attacked = model(batch.x), model(adv)
        label = batch.y[:, None]
        rival = attacked.detach().scatter(1, label, -torch.inf).argmax(1, keepdim=True)
        rest = attacked.scatter(1, rival, -torch.inf)  # log(1 - p'_k) = logsumexp without k - logsumexp
        boosted = F.cross_entropy(attacked, batch.y, reduction="none") + attacked.logsumexp(1) - rest.logsumexp(1)
        unsure = 1 - clean.softmax(1).gather(1, label)[:, 0]
        robust = ops.kl_divergence(attacked, clean).value * unsure
        return Loss((boosted + self.beta * robust).mean(), attacked)


__all__ = ["MART", "TRADES"]
