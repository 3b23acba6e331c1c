"""What may steer the learning rate: torch's schedulers, one rate an epoch, or a function of the training's progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .method import Batch

Rate = Callable[[float], float]


class Rates:
    """``scheduler`` as :func:`train` takes it: None; a torch scheduler, stepped after each epoch (OneCycleLR and
    CyclicLR after each batch); a sequence of one rate for each epoch; or a callable(progress) that gives the rate of a
    batch."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, epochs: int, steps: int) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.torch = hasattr(scheduler, "step") and hasattr(scheduler, "state_dict")
        by_batch = (torch.optim.lr_scheduler.OneCycleLR, torch.optim.lr_scheduler.CyclicLR)
        self.by_batch = isinstance(scheduler, by_batch)
        if self.torch and getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError("scheduler: got one of another optimizer, expected one of the optimizer that is given")
        if (
            isinstance(scheduler, torch.optim.lr_scheduler.OneCycleLR)
            and steps
            and scheduler.total_steps != epochs * steps
        ):
            raise ValueError(
                f"scheduler: got one of {scheduler.total_steps} steps, expected {epochs * steps} ({epochs} epochs of "
                f"{steps})"
            )
        if isinstance(scheduler, Sequence):
            if isinstance(scheduler, str):
                raise TypeError(f"scheduler: got {scheduler!r}, expected a scheduler, one rate an epoch, or a callable")
            if len(scheduler) != epochs:
                raise ValueError(f"scheduler: got {len(scheduler)} rates, expected one for each of the {epochs} epochs")
        elif scheduler is not None and not self.torch and not callable(scheduler):
            raise TypeError(
                f"scheduler: got {type(scheduler).__name__}, expected a torch scheduler, one rate an epoch, or a "
                "callable"
            )

    def before(self, batch: Batch) -> None:
        if self.scheduler is None or self.torch:
            return
        sequence = isinstance(self.scheduler, Sequence)
        rate = float(self.scheduler[batch.epoch] if sequence else self.scheduler(batch.progress))
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def after_batch(self) -> None:
        if self.by_batch:
            self.scheduler.step()

    def after_epoch(self) -> None:
        if self.torch and not self.by_batch:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict() if self.torch else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.torch:
            self.scheduler.load_state_dict(state)


__all__ = ["Rate", "Rates"]
