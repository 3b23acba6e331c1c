"""What a training method answers: how it makes its examples, and what it minimises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch and where in the training it stands.

    ``x`` (B, ...) images; ``y`` (B,) int64 labels; ``index`` (B,) int64, the examples' numbers in the data set, where
    the loader tells them; ``epoch`` of ``epochs`` and ``step`` of ``steps`` in the epoch, counted from 0 (``steps`` is
    0 where the loader does not know its length).
    """

    x: Tensor
    y: Tensor
    index: Tensor | None = None
    epoch: int = 0
    epochs: int = 1
    step: int = 0
    steps: int = 0

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1)."""
        return (self.epoch + (self.step / self.steps if self.steps else 0.0)) / max(self.epochs, 1)


class Loss(NamedTuple):
    """``value``: a number to minimise. ``logits`` (B, K) of the examples trained on, for the training accuracy
    (``labels`` where they are not the batch's). ``metrics``: numbers to average over the epoch into the history."""

    value: Tensor
    logits: Tensor
    metrics: dict[str, Tensor | float] = {}
    labels: Tensor | None = None


class Method:
    """Base class of the training methods: plain training.

    A method overrides :meth:`perturb`, :meth:`loss`, or both; :meth:`step` only where the two alternate otherwise (free
    training, weight perturbation). Whatever it keeps between batches goes through :meth:`state_dict`, so that a
    training resumes with the same bits.
    """

    name = "plain"
    needs_index = False  # whether batches must tell the numbers of their examples
    loss_repeats = True  # whether a second call of loss on one batch changes nothing

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "name" not in vars(cls):  # until it is registered
            cls.name = cls.__name__

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        """Before the first epoch (and before :meth:`load_state_dict` when resuming): ``examples`` in the data set, if
        known."""

    def begin_epoch(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Before each epoch, counted from 0."""

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        """The examples that the loss sees. Leaves modes, statistics and parameter gradients as they were."""
        return batch.x

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        """What is minimised; the model is in train mode."""
        logits = model(adv)
        return Loss(F.cross_entropy(logits, batch.y), logits)

    def step(self, model: nn.Module, batch: Batch, update: Callable[[Tensor], None]) -> Loss:
        """One batch. ``update(loss)`` clears the gradients, goes backward and moves the parameters."""
        adv = self.perturb(model, batch)
        model.train()
        loss = self.loss(model, batch, adv)
        update(loss.value)
        return loss

    def settings(self) -> dict[str, Any]:
        """The method's own hyperparameters, for the log: public attributes that are plain values."""
        return {
            k: v for k, v in vars(self).items() if not k.startswith("_") and isinstance(v, (int, float, str, tuple))
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that the next batch depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"state: got {sorted(state)}, expected nothing: {self.name} keeps no state")


class Wrapped(Method):
    """A method around another, which answers whatever this one does not."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.needs_index, self.loss_repeats = method.needs_index, method.loss_repeats

    def __getattr__(self, name: str) -> Any:
        if name in ("eps", "norm", "clip"):  # what an evaluation asks of a method
            return getattr(self.method, name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        self.method.begin(model, examples, epochs)

    def begin_epoch(self, model: nn.Module, epoch: int, epochs: int) -> None:
        self.method.begin_epoch(model, epoch, epochs)

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.method.perturb(model, batch)

    def loss(self, model: nn.Module, batch: Batch, adv: Tensor) -> Loss:
        return self.method.loss(model, batch, adv)

    def state_dict(self) -> dict[str, Any]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state)


__all__ = ["Batch", "Loss", "Method", "Wrapped"]
