"""Dynamic adversarial training (Wang et al. 2019)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..attacks import _inputs
from ._passes import CIFAR_EPS, Attacked, Scheduled, attacking, input_gradient, length, noise, optional_length
from .method import Batch, Loss
from .registry import register


@register("dynamic")
class DynamicAT(Attacked):
    r"""Dynamic adversarial training (Wang et al. 2019, algorithm 1): every example ascends by PGD until its first-order
    stationary condition has fallen to c_t, which goes to zero: weak examples come early, strong ones late.

    .. math:: c(x) = eps \|g\|_1 - \langle x - x_0, g \rangle, \quad c_t = \max(c_{max} - t\, c_{max} / T', 0)

    with g the gradient of the example's own loss (eq. 4) and t the epoch. All move at least once; c is taken at the new
    point and says whether that example takes another step. (The paper prints the mask as ``c <= c_t``, against its own
    comment; meant is ``c > c_t``.) Examples that stop leave the batch: their passes are not made. An example of s <
    steps moves costs s + 1 gradients, one of all ``steps`` moves as many.

    Defaults: PGD-10 from a uniform start with steps of eps / 4, c_max .5, T' = ``control`` = 5/6 of the epochs (100 of
    120 for CIFAR-10; 40 of 50 for MNIST: .8), or a number of epochs. ``clip=None`` is algorithm 1 as printed; with a
    box c stays above zero where a gradient points out of it.

    centre: "clean" measures ``x - x0`` from the image, "start" from the random start, as the authors' code. weighted:
    as in their code, from the second epoch on each example's loss is weighted by itself (here of the same pass, there
    of one more in eval mode).
    """

    def __init__(
        self, eps: Scheduled = CIFAR_EPS, *, steps: int = 10, step_size: float | None = None, c_max: float = 0.5,
        control: float = 5 / 6, centre: str = "clean", weighted: bool = False, **ball: Any,
    ) -> None:  # fmt: skip
        super().__init__(eps, **ball)
        self.steps = _inputs.integer(steps, "steps", 1)
        self.step_size = optional_length(step_size)
        self.c_max = _inputs.number(c_max, "c_max")
        self.control = _inputs.number(control, "control")
        if self.control == 0:
            raise ValueError("control: got 0, expected a share of the epochs, or a number of them")
        if centre not in ("clean", "start"):
            raise ValueError(f"centre: got {centre!r}, expected 'clean' or 'start'")
        self.centre, self.weighted = centre, bool(weighted)
        self._moves: Tensor | None = None

    def threshold(self, batch: Batch) -> float:
        """c_t. A ``control`` of 1 or less is a share of the epochs."""
        until = self.control * batch.epochs if self.control <= 1 else self.control
        return max(self.c_max - batch.epoch * self.c_max / until, 0.0)

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        ball, level = self.ball(batch), self.threshold(batch)
        eps, norm = ball["eps"], self.norm
        step = length(self.step_size, eps, 0.25)
        start = noise(batch, eps, norm, self.clip)
        x, centre = start.clone(), start if self.centre == "start" else batch.x
        moves = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        active = torch.arange(len(x), device=x.device)
        with attacking(model, self.attack_mode):
            for k in range(self.steps):
                here, clean = x[active], batch.x[active]
                grad = input_gradient(model, here, batch.y[active])
                if k:
                    goes_on = ops.fosc(here, centre[active], grad, eps, norm) > level
                    active, here, clean, grad = active[goes_on], here[goes_on], clean[goes_on], grad[goes_on]
                if not len(active):
                    break
                x[active] = ops.pgd_step(here, clean, grad, step, **ball)
                moves[active] += 1
        self._moves = moves
        return x

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        logits = model(adv)
        value = F.cross_entropy(logits, batch.y, reduction="none")
        value = (value.detach() * value if self.weighted and batch.epoch > 0 else value).mean()
        metrics: dict[str, Tensor | float] = {"fosc_threshold": self.threshold(batch)}
        if self._moves is not None:
            metrics["attack_steps"] = self._moves.double().mean()
        return Loss(value, logits, metrics)


__all__ = ["DynamicAT"]
