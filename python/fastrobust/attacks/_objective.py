"""The losses an attack ascends, by name or as a callable, and what it calls fooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import _checks as ck
from ..ops.pgd.losses import agrees

LOSSES = ("ce", "margin", "dlr", "kl")
_ALIASES = {
    "ce": "ce", "cross_entropy": "ce", "margin": "margin", "cw": "margin", "dlr": "dlr", "kl": "kl", "trades": "kl",
}  # fmt: skip
NO_GRADIENT = "model: returned logits without a gradient to its input; does it detach, round, quantise or use no_grad?"
# what torch's backward says where an operation on the way has no derivative
_REFUSALS = (
    "does not require grad", "not implemented", "Inference tensors", "inference tensor", "is not differentiable",
    "use_reentrant=True",
    "Could not run",
)  # fmt: skip


class Objective:
    """value (B,) and gradient with respect to the input, to be ascended (``targeted``: descended)."""

    def __init__(
        self,
        loss: str | Callable[[Tensor, Tensor], Tensor],
        targeted: bool,
        multi: bool = False,
        fooled: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        if isinstance(loss, str):
            if loss not in _ALIASES:
                raise ValueError(
                    f"loss: got {loss!r}, expected one of {', '.join(LOSSES)} or a callable(outputs, labels)"
                )
            self.name: str | None = _ALIASES[loss]
        elif callable(loss):
            self.name = None
        else:
            raise TypeError(f"loss: got {type(loss).__name__}, expected a name or a callable(outputs, labels)")
        if fooled is not None and not callable(fooled):
            raise TypeError(f"fooled: got {ck.describe(fooled)}, expected a callable(outputs, labels) or None")
        self.loss = loss
        self.fooled = fooled
        self.reach = targeted  # y is what the model shall say
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

    def value_and_grad(self, outputs: Tensor, x: Tensor, labels: Tensor, extra: Tensor | None) -> tuple[Tensor, Tensor]:
        """Only the gradient with respect to x is computed, never the parameters'."""
        if not outputs.requires_grad:
            raise ValueError(NO_GRADIENT)
        if self.name is not None:
            found = self.compiled(outputs.detach(), labels, extra)
            value, root, upstream = found.value, outputs, found.grad
        else:
            value = self._custom(outputs, labels)
            if not value.requires_grad:
                raise ValueError("loss: returned a value without a gradient to the model's outputs")
            root, upstream = value.sum(), None
        try:
            (grad,) = torch.autograd.grad(root, x, upstream, allow_unused=True)
        except (RuntimeError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError) or not any(words in str(error) for words in _REFUSALS):
                raise
            raise ValueError(f"{NO_GRADIENT} ({str(error).splitlines()[0]})") from error
        if grad is None:
            raise ValueError(NO_GRADIENT)
        return value.detach(), grad

    def value(self, outputs: Tensor, labels: Tensor, extra: Tensor | None) -> Tensor:
        with torch.no_grad():
            return (
                self.compiled(outputs, labels, extra).value if self.name is not None else self._custom(outputs, labels)
            )

    def _custom(self, outputs: Tensor, labels: Tensor) -> Tensor:
        value: Any = self.loss(outputs.clone(), labels)  # type: ignore[operator]  # it may write into the outputs
        if not isinstance(value, Tensor) or value.dim() > 1 or (value.dim() == 1 and len(value) != len(outputs)):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss: returned {shape}, expected one value per example, or their sum or mean")
        return value

    def success(self, outputs: Tensor, labels: Tensor, truth: Tensor | None) -> Tensor | None:
        """(B,) bool: fooled (targeted: reached). None where no one has said what that is. ``truth`` is given when
        success means leaving the true class by whatever road (multi-targeted)."""
        aim = labels if truth is None else truth
        if self.fooled is not None:
            found: Any = self.fooled(outputs, aim)
            if not isinstance(found, Tensor) or found.dtype != torch.bool or tuple(found.shape) != (len(outputs),):
                raise ValueError(f"fooled: returned {ck.describe(found)}, expected a bool tensor ({len(outputs)},)")
            return found
        return _agrees(outputs, aim, self.reach)


def predictions(outputs: Tensor) -> Tensor:
    """The labels an attack uses where none are given."""
    if outputs.dim() != 2 or outputs.shape[1] < 2:
        raise ValueError(f"y: got None, expected targets: the outputs {tuple(outputs.shape)} name no class by argmax")
    return outputs.argmax(1)


def _agrees(outputs: Tensor, y: Tensor, wanted: bool) -> Tensor | None:
    """Whether outputs say y (``wanted`` False: do not): the largest logit for class indices; the signs of the logits
    for labels 0 and 1 of their shape (or one logit an example). None for float targets and other shapes."""
    if y.is_floating_point() or y.is_complex() or not outputs.is_floating_point():
        return None
    if outputs.dim() == 2 and outputs.shape[1] > 1 and y.dim() == 1:
        return agrees(outputs, y, wanted)
    if outputs.numel() == y.numel() and (outputs.shape == y.shape or y.dim() == 1 or outputs.dim() == 1):
        return ((outputs.reshape(y.shape) > 0) == (y > 0)).reshape(len(y), -1).all(1) == wanted
    return None
