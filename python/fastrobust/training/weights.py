"""Adversarial weight perturbation, around any method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ..attacks import _inputs
from ..attacks._modes import undisturbed
from .adversarial import PGD
from .method import Batch, Loss, Method, Wrapped
from .registry import METHODS, register


@register("awp")
class AWP(Wrapped):
    r"""AWP (Wu et al. 2020, eq. 8 to 11 and algorithm 1): the loss of a method is minimised at weights w + v that have
    been
    moved to make it worse, as far as a share of their norm.

    .. math:: v = \gamma \frac{\|w\|}{\|\nabla_w L\|} \nabla_w L

    for every parameter of two dimensions or more; after the update v is taken off again. The passes that find v move no
    running statistics. (The authors take a step of a copy at rate .01 and scale the difference, which is the same v.)

    method: an object or a name; PGD-10 when None. gamma .01 for adversarial training, .005 for TRADES; warmup: epochs
    without it (10 for TRADES). The method must be one of perturb and loss: not free training, not YOPO. Its loss is
    called twice a batch, which adaptive targets cannot be.
    """

    def __init__(self, method: Method | str | None = None, *, gamma: float = 0.01, warmup: int = 0) -> None:
        if isinstance(method, str):
            if method not in METHODS:
                raise ValueError(f"method: got {method!r}, expected one of {', '.join(sorted(METHODS))}")
            method = METHODS[method]()
        method = PGD() if method is None else method
        if not isinstance(method, Method):
            raise TypeError(f"method: got {type(method).__name__}, expected a training method or its name")
        if type(method).step is not Method.step:
            raise ValueError(
                f"method: got {method.name}, which updates in its own way; expected one of perturb and loss"
            )
        if not method.loss_repeats:
            raise ValueError(
                f"method: got {method.name}, whose loss moves what it keeps; expected one that may be called twice"
            )
        super().__init__(method)
        self.gamma, self.warmup = _inputs.number(gamma, "gamma"), _inputs.integer(warmup, "warmup", 0)

    def step(self, model: nn.Module, batch: Batch, update: Callable[[Tensor], None]) -> Loss:
        adv = self.perturb(model, batch)
        model.train()
        moved = self._worst(model, batch, adv) if batch.epoch >= self.warmup and self.gamma else []
        with torch.no_grad():
            for w, v in moved:
                w.add_(v)
        try:
            found = self.loss(model, batch, adv)
            update(found.value)
        finally:
            with torch.no_grad():
                for w, v in moved:
                    w.sub_(v)
        return found

    def _worst(self, model: nn.Module, batch: Batch, adv: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Every weight with the v that makes the loss worse."""
        weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        with undisturbed(model, "keep"):
            value = self.loss(model, batch, adv).value
            grads = torch.autograd.grad(value, weights, allow_unused=True)
        pairs = [(w.detach(), g) for w, g in zip(weights, grads, strict=True) if g is not None]
        if (
            distributed.is_available() and distributed.is_initialized()
        ):  # one v for all processes; only its direction counts
            for _, g in pairs:
                distributed.all_reduce(g.mul_(len(adv)))
        return [
            (w, g * (self.gamma * w.norm() / g.norm().clamp_min(torch.finfo(g.dtype).tiny)).to(g.dtype))
            for w, g in pairs
        ]

    def settings(self) -> dict[str, Any]:
        inner = {f"{self.method.name}.{name}": value for name, value in self.method.settings().items()}
        return super().settings() | {"method": self.method.name} | inner


__all__ = ["AWP"]
