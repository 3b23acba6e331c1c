"""Schedules of the radius and of the rate, and periodic adversarial scheduling (thesis 4.2.4).

A schedule is any function of the share of the training that is done, in [0, 1). Methods take one for ``eps``; one with
``by_epoch`` is asked once an epoch, as the thesis does, others once a batch. One of the rate is what
:func:`fastrobust.training.train` takes as ``scheduler``; :func:`scheduler` makes a torch scheduler of it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..attacks import _inputs
from ._passes import CIFAR_EPS, ascend, at, attacking, length, noise
from .adversarial import PGD
from .method import Batch
from .registry import register

Schedule = Callable[[float], float]


@dataclasses.dataclass(frozen=True)
class WarmUp:
    r"""The radius grows and then stays (thesis eq. 4.29), d / D the share of the training or of the period:

    .. math:: \frac{1}{2} (1 - \cos(\pi d / D)) (high - low) + low \quad or \quad (high - low) d / D + low

    ("cosine" or "linear"), clipped to [0, target]. high None is 1.5 targets for "cosine" and 2 for "linear" (MNIST:
    .6 and .8 for .4); CIFAR-10 has 16/255 for 8/255 in both."""

    target: float
    shape: str = "cosine"
    high: float | None = None
    low: float = 0.0
    by_epoch: bool = True

    def __post_init__(self) -> None:
        _inputs.number(self.target, "target")
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f"shape: got {self.shape!r}, expected 'cosine' or 'linear'")

    def __call__(self, progress: float) -> float:
        high = self.target * (1.5 if self.shape == "cosine" else 2.0) if self.high is None else self.high
        share = (1 - math.cos(math.pi * progress)) / 2 if self.shape == "cosine" else progress
        return min(max((high - self.low) * share + self.low, 0.0), self.target)


@dataclasses.dataclass(frozen=True)
class Periodic:
    """``schedule`` begun anew at each of ``resets``, shares of the training, and scaled to each period. Defaults: the
    thesis' periods, 100 and 150 of 200 epochs."""

    schedule: Schedule
    resets: tuple[float, ...] = (0.5, 0.75)

    def __post_init__(self) -> None:
        edges = (0.0, *self.resets, 1.0)
        if any(a >= b for a, b in zip(edges[:-1], edges[1:], strict=True)):
            raise ValueError(f"resets: got {self.resets}, expected growing shares of the training in (0, 1)")

    @property
    def by_epoch(self) -> bool:
        return bool(getattr(self.schedule, "by_epoch", False))

    def __call__(self, progress: float) -> float:
        edges = (0.0, *self.resets, 1.0)
        # a reset may be a share that a float only comes close to
        start = max(e for e in edges[:-1] if e <= progress + 1e-9)
        end = edges[edges.index(start) + 1]
        return self.schedule(max(progress - start, 0.0) / (end - start))


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """``rate``, times ``factor`` at each of ``drops``, shares of the training: 24 and 28 of 30 epochs are
    (24 / 30, 28 / 30)."""

    drops: tuple[float, ...]
    rate: float = 1.0
    factor: float = 0.1

    def __call__(self, progress: float) -> float:
        return self.rate * self.factor ** sum(progress + 1e-9 >= drop for drop in self.drops)


@dataclasses.dataclass(frozen=True)
class Cyclic:
    """A triangle: 0 to ``rate`` at ``peak``, back to 0 at the end (Wong et al. 2020: .5; N-FGSM on SVHN: .4)."""

    rate: float = 1.0
    peak: float = 0.5

    def __call__(self, progress: float) -> float:
        return self.rate * (progress / self.peak if progress < self.peak else (1 - progress) / (1 - self.peak))


@dataclasses.dataclass(frozen=True)
class Cosine:
    """From ``rate`` to 0 as half a cosine."""

    rate: float = 1.0

    def __call__(self, progress: float) -> float:
        return self.rate * (1 + math.cos(math.pi * progress)) / 2


def scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The optimiser's rates times ``schedule``, for a loop that calls ``step()`` ``steps`` times in all (epochs, or
    batches)."""
    count = _inputs.integer(steps, "steps", 1)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: schedule(min(k / count, 1.0)))


class Ensemble(nn.Module):
    """The logarithm of the mean softmax of several models: logits whose softmax is that mean."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        if not models:
            raise ValueError("models: got none, expected at least one")
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.stack([model(x).log_softmax(1) for model in self.models])
        return each.logsumexp(0) - math.log(len(self.models))


@register("pas")
class PAS(PGD):
    """Periodic adversarial scheduling (thesis 4.2.4): PGD training whose radius grows by (4.29) in every period and is
    reset with the next (so is the rate of its recipe; of your own: ``Periodic(...)``); the model at the end of each
    period is kept, and :meth:`ensemble` predicts by the mean of their softmax. The step is a share of the radius of the
    moment.

    eps: the target. shape, high: of :class:`WarmUp`; "constant" keeps the radius. resets=() has one period, the thesis'
    setting for MNIST. start: "ball", a uniform point of it; "step", within a step of x, as in the author's code. Weight
    decay 1e-3.
    """

    def __init__(
        self, eps: float = CIFAR_EPS, *, shape: str = "cosine", high: float | None = None,
        resets: tuple[float, ...] = (0.5, 0.75), start: str = "ball", **options: Any,
    ) -> None:  # fmt: skip
        high = 2 * eps if high is None else high
        super().__init__(eps, **options)
        growth = (lambda _: eps) if shape == "constant" else WarmUp(eps, shape, high)
        self._radius = Periodic(growth, tuple(float(r) for r in resets))
        self.shape, self.high, self.resets, self.start = shape, high, self._radius.resets, start
        if start not in ("ball", "step"):
            raise ValueError(f"start: got {start!r}, expected 'ball' or 'step'")
        self._ends: list[dict[str, Tensor]] = []

    def radius(self, batch: Batch) -> float:
        return at(self._radius, batch)

    def perturb(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.start == "ball" or self.radius(batch) == 0:
            return super().perturb(model, batch)
        ball, step = self.ball(batch), length(self.step_size, self.radius(batch), 0.25)
        begun = noise(batch, min(step, ball["eps"]), self.norm, self.clip)
        with attacking(model, self.attack_mode):
            return ascend(model, batch, begun, steps=self.steps, step_size=step, **ball)

    def begin(self, model: nn.Module, examples: int | None, epochs: int) -> None:
        if any(round(r * epochs) in (0, epochs) for r in self.resets):
            raise ValueError(f"resets: got {self.resets}, expected an epoch in every period of {epochs} epochs")
        self._ends = []

    def begin_epoch(self, model: nn.Module, epoch: int, epochs: int) -> None:
        if epoch in {math.ceil(r * epochs - 1e-9) for r in self.resets}:
            state = model.state_dict()
            self._ends.append({name: value.detach().clone() for name, value in state.items()})

    @property
    def ends(self) -> int:
        """How many models are kept, of the ends of the periods before this one."""
        return len(self._ends)

    def ensemble(self, model: nn.Module) -> Ensemble:
        """Of the models at the ends of the periods; ``model`` is that of the last one."""
        models = [copy.deepcopy(model) for _ in range(len(self._ends) + 1)]
        for kept, state in zip(models, self._ends, strict=False):
            kept.load_state_dict(state)
        return Ensemble(models).eval()

    def state_dict(self) -> dict[str, Any]:
        return {f"period{k}": dict(state) for k, state in enumerate(self._ends)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._ends = [state[f"period{k}"] for k in range(len(state))]


__all__ = ["PAS", "Cosine", "Cyclic", "Ensemble", "Periodic", "Piecewise", "Schedule", "WarmUp", "scheduler"]
