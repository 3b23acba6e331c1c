"""The loop of a gradient attack: runs from given starts, the best point per example, shrinking batches."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import _checks as ck
from . import _graph, _inputs
from ._model import Victim
from ._objective import Objective


@dataclasses.dataclass
class Goal:
    """What the rows of a batch aim at. ``labels`` go into the loss with ``extra`` (clean logits for KL, target classes
    for DLR); ``truth`` is given when success means leaving the true class by whatever road (multi-targeted)."""

    labels: Tensor
    extra: Tensor | None = None
    truth: Tensor | None = None

    def rows(self, index: Tensor) -> Goal:
        pick = lambda t: None if t is None else t[index]
        return Goal(self.labels[index], pick(self.extra), pick(self.truth))


class Best:
    """Per example, the best point so far: fooled before not fooled, then the larger loss."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.clone()
        self.fooled = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        self.loss = torch.full((x.shape[0],), -math.inf, dtype=x.dtype, device=x.device)

    def offer(self, index: Tensor, x: Tensor, fooled: Tensor, loss: Tensor) -> None:
        old_fooled, old_loss = self.fooled[index], self.loss[index]
        loss = loss.to(old_loss.dtype).nan_to_num(nan=-math.inf)  # NaN is never the larger loss
        better = (fooled & ~old_fooled) | ((fooled == old_fooled) & (loss > old_loss))
        rows = index[better]
        self.x[rows], self.fooled[rows], self.loss[rows] = x[better], fooled[better], loss[better]


@dataclasses.dataclass
class Run:
    """What every restart shares."""

    victim: Victim
    eps: float | Tensor
    step_size: float | Tensor
    norm: float
    clip: tuple[float, float] | None
    steps: int
    track_best: bool
    early_stop: bool
    cuda_graph: bool
    check_labels: bool
    tick: Callable[[int], object]
    queries: int = 0
    last_loss: Tensor | None = None

    def gradient(self, objective: Objective, x: Tensor, goal: Goal) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, per-example loss, and the gradient with respect to x."""
        leaf = x.detach().requires_grad_()
        logits = self.victim(leaf)
        self.queries += 1
        self.check_classes(goal.labels, logits)
        if not logits.requires_grad:
            raise ValueError("model: returned logits without a gradient to its input; does it detach, or use no_grad?")
        value, grad = objective.value_and_grad(logits, leaf, goal.labels, goal.extra)
        self.last_loss = value
        return logits.detach(), value, grad

    def check_classes(self, labels: Tensor, logits: Tensor) -> None:
        """Once: after a first forward pass the number of classes is known."""
        if self.check_labels:
            ck.check_label_values(labels, "y", logits.shape[1])
            self.check_labels = False

    def judge(self, objective: Objective, logits: Tensor, value: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        """fooled and a score that is larger for better points."""
        if goal.truth is not None:
            return logits.argmax(1) != goal.truth, ops.margin_loss(logits, goal.truth, check=False).value
        hit = logits.argmax(1) == goal.labels
        score = -value if objective.targeted else value
        return (hit if objective.targeted else ~hit), score.expand(logits.shape[0])

    def evaluate(self, objective: Objective, x: Tensor, goal: Goal) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            logits = self.victim(x)
            self.queries += 1
            self.check_classes(goal.labels, logits)
            return self.judge(objective, logits, objective.value(logits, goal.labels, goal.extra), goal)

    def update(
        self, objective: Objective, x: Tensor, x0: Tensor, grad: Tensor, step: float | Tensor, eps: float | Tensor
    ) -> None:
        ops.pgd_step(x, x0, grad, step, eps, self.norm, self.clip, out=x, targeted=objective.targeted)

    def plain(self, objective: Objective, x: Tensor, x0: Tensor, goal: Goal) -> Tensor:
        """The last iterate of one run: no bookkeeping, no synchronisation."""

        def step(t: tuple[Any, ...]) -> tuple[Tensor, int]:
            x, x0, labels, extra, step_size, eps = t
            logits, value, grad = self.gradient(objective, x, Goal(labels, extra))
            self.update(objective, x, x0, grad, step_size, eps)
            return value, logits.shape[1]

        inputs = (x, x0, goal.labels, goal.extra, self.step_size, self.eps)
        if self.cuda_graph:
            queries = self.queries + self.steps
            graph = _graph.captured(self.victim.model, self._key(objective), step, inputs)
            if self.check_labels:  # a graph from the cache
                ck.check_label_values(goal.labels, "y", graph.classes)
            x = graph.run(inputs, self.steps, self.tick)
            self.queries, self.last_loss = queries, graph.loss
            return x
        for _ in range(self.steps):
            step(inputs)
            self.tick(1)
        return x

    def _key(self, objective: Objective) -> tuple[object, ...]:
        model, victim = self.victim.model, self.victim
        flags = tuple(m.training for m in model.modules()) if isinstance(model, torch.nn.Module) else ()
        scale = (
            None
            if victim.mean is None or victim.std is None
            else (tuple(victim.mean.flatten().tolist()), tuple(victim.std.flatten().tolist()))
        )
        return (
            self.norm,
            self.clip,
            objective.loss,
            objective.targeted,
            flags,
            victim.autocast,
            scale,
        )

    def full(self, objective: Objective, x: Tensor, x0: Tensor, index: Tensor, goal: Goal, best: Best) -> None:
        """One run that offers points to ``best``; ``index`` says which examples the rows are."""
        batch = best.x.shape[0]
        eps, step = self.eps, self.step_size
        if len(index) != batch:
            eps, step = _inputs.take(eps, index, batch), _inputs.take(step, index, batch)
        for k in range(self.steps):
            logits, value, grad = self.gradient(objective, x, goal)
            if self.track_best or self.early_stop:
                fooled, score = self.judge(objective, logits, value, goal)
                if self.track_best:
                    best.offer(index, x, fooled, score)
                if self.early_stop and bool(fooled.any()):  # these leave the batch with the point that fooled the model
                    done, left = fooled.nonzero()[:, 0], (~fooled).nonzero()[:, 0]
                    best.offer(index[done], x[done], fooled[done], score[done])
                    eps, step = (_inputs.take(p, left, len(fooled)) for p in (eps, step))
                    x, x0, grad, index, goal = x[left], x0[left], grad[left], index[left], goal.rows(left)
                    if not len(left):
                        self.tick(self.steps - k)
                        return
            self.update(objective, x, x0, grad, step, eps)
            self.tick(1)
        best.offer(index, x, *self.evaluate(objective, x, goal))
