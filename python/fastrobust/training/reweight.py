"""Easy and hard examples treated unlike: reweighting and adaptive targets on ATTA (thesis, algorithm 4.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._passes import label_weights
from .fast import ATTA
from .method import Batch, Loss
from .registry import register


@register("reweight")
class Reweight(ATTA):
    """ATTA whose loss counts each example by the probability that the adversarial output gives its label:
    ``sum_i w_i L_i / sum_i w_i``, ``w_i = softmax(f(x'_i))_{y_i}``, constants in the gradient. In the first ``warm_up``
    epochs all count alike (figure 4.25): before it has learnt anything a model would learn one class, the one that it
    says."""

    def __init__(
        self, eps: float = 8 / 255, step_size: float | None = None, *, warm_up: int = 5, resets: tuple[int, ...] = (),
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(eps, step_size, resets=resets, **options)
        if self.kind != "ce":
            raise ValueError(f"loss: got {self.kind!r}, expected 'ce'")
        self.warm_up = warm_up

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        if batch.epoch < self.warm_up:
            return super().loss(model, batch, adv)
        logits = model(adv)
        each = F.cross_entropy(logits, batch.y, reduction="none")
        return Loss((label_weights(logits, batch.y) * each).sum(), logits)


@register("adaptive-targets")
class AdaptiveTargets(ATTA):
    """ATTA on targets that follow the adversarial outputs o' of each example:
    ``t~ <- rho t~ + (1 - rho) o'`` (t~ begins as the label), ``t = beta 1_y + (1 - beta) t~``, the loss CE(f(x'), t).

    In the first ``warm_up`` epochs the targets are the labels, and t~ stays. ``reweight`` weighs as :class:`Reweight`,
    too. Options otherwise as for :class:`ATTA`, whose TRADES loss does not apply.
    """

    loss_repeats = False  # each call moves the targets

    def __init__(
        self, eps: float = 8 / 255, step_size: float | None = None, *, rho: float = 0.9, beta: float = 0.1,
        warm_up: int = 5, reweight: bool = False, resets: tuple[int, ...] = (), **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(eps, step_size, resets=resets, **options)
        if self.kind != "ce":
            raise ValueError(f"loss: got {self.kind!r}, expected 'ce'")
        for name, value in (("rho", rho), ("beta", beta)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: got {value}, expected a number from 0 to 1")
        self.rho, self.beta, self.warm_up, self.reweight = rho, beta, warm_up, reweight
        self._targets: Tensor | None = None
        self._seen: Tensor | None = None

    def _target(self, batch: Batch, output: Tensor) -> Tensor:
        """t of each example, its moving average moved on."""
        label = F.one_hot(batch.y, output.shape[1]).to(output.dtype)
        if batch.epoch < self.warm_up:
            return label
        assert self._store is not None and batch.index is not None
        if self._targets is None or self._seen is None:
            self._targets = output.new_zeros(len(self._store), output.shape[1])
            self._seen = torch.zeros(len(self._store), dtype=torch.bool, device=output.device)
        index = batch.index.to(output.device)
        before = torch.where(self._seen[index, None], self._targets[index], label)
        moved = self.rho * before + (1 - self.rho) * output
        self._targets[index], self._seen[index] = moved, True
        return self.beta * label + (1 - self.beta) * moved

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        logits = model(adv)
        output = logits.detach().float().softmax(1)
        each = F.cross_entropy(logits, self._target(batch, output), reduction="none")
        weighted = self.reweight and batch.epoch >= self.warm_up
        return Loss((label_weights(logits, batch.y) * each).sum() if weighted else each.mean(), logits)

    def kept(self) -> list[Tensor]:
        return super().kept() + ([] if self._targets is None or self._seen is None else [self._targets, self._seen])

    def state_dict(self) -> dict[str, Any]:
        own = {} if self._targets is None else {"targets": self._targets, "seen": self._seen}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "targets" in state:
            self._targets, self._seen = state["targets"].clone(), state["seen"].clone()


__all__ = ["AdaptiveTargets", "Reweight"]
