"""The losses an attack ascends, by name or as a callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops

LOSSES = ("ce", "margin", "dlr", "kl")
_ALIASES = {
    "ce": "ce", "cross_entropy": "ce", "margin": "margin", "cw": "margin", "dlr": "dlr", "kl": "kl", "trades": "kl",
}  # fmt: skip


class Objective:
    """value (B,) and gradient with respect to the input, to be ascended (``sign`` = -1: descended)."""

    def __init__(self, loss: str | Callable[[Tensor, Tensor], Tensor], targeted: bool, multi: bool = False) -> None:
        if isinstance(loss, str):
            if loss not in _ALIASES:
                raise ValueError(
                    f"loss: got {loss!r}, expected one of {', '.join(LOSSES)} or a callable(logits, labels)"
                )
            self.name: str | None = _ALIASES[loss]
        elif callable(loss):
            self.name = None
        else:
            raise TypeError(f"loss: got {type(loss).__name__}, expected a name or a callable(logits, labels)")
        self.loss = loss
        # a multi-targeted attack descends to each class; the targeted DLR is ascended and knows both classes
        self.targeted = targeted or (multi and self.name != "dlr")
        if self.name == "kl" and (targeted or multi):
            raise ValueError("loss: got 'kl', which has no target class, for a targeted attack; use 'ce' or 'margin'")
        if self.name == "dlr" and targeted:
            raise ValueError(
                "targeted: got True with loss 'dlr'; its targeted form needs the true labels: give targets="
            )

    def compiled(self, logits: Tensor, labels: Tensor, extra: Tensor | None) -> ops.LossValue:
        """A named loss: value and logit gradient from one kernel. ``extra``: targets (dlr) or clean logits (kl)."""
        if self.name == "ce":
            return ops.cross_entropy(logits, labels, check=False)
        if self.name == "margin":
            return ops.margin_loss(logits, labels, check=False)
        if self.name == "kl":
            assert extra is not None
            return ops.kl_divergence(logits, extra)
        if extra is not None:
            return ops.dlr_targeted_loss(logits, labels, extra, check=False)
        return ops.dlr_loss(logits, labels, check=False)

    def value_and_grad(self, logits: Tensor, x: Tensor, labels: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        """Only the gradient with respect to x is computed, never the parameters'."""
        if self.name is not None:
            found = self.compiled(logits.detach(), labels, extra)
            (grad,) = torch.autograd.grad(logits, x, found.grad)
            return found.value, grad
        value = self._custom(logits, labels)
        (grad,) = torch.autograd.grad(value.sum(), x)
        return value.detach(), grad

    def value(self, logits: Tensor, labels: Tensor, extra: Tensor | None) -> Tensor:
        with torch.no_grad():
            return self.compiled(logits, labels, extra).value if self.name is not None else self._custom(logits, labels)

    def _custom(self, logits: Tensor, labels: Tensor) -> Tensor:
        value: Any = self.loss(logits, labels)  # type: ignore[operator]
        if not isinstance(value, Tensor) or value.dim() > 1 or (value.dim() == 1 and value.shape != labels.shape):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: returned {shape}, expected one value per example, or their sum or mean")
        return value
