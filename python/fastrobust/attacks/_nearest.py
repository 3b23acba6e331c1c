"""Attacks that look for the nearest point that fools: how points are noted, and what is handed back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._run import Best, Rows, Run
from ._task import AttackResult, Task
from .apgd import begin
from .fab import _measure as measure

INF = math.inf


def begin_near(run: Run, rows: Rows, clean: Tensor) -> Best:
    """Of each example x itself: at distance 0 where it is wrong already, else nothing found."""
    best = begin(run, rows, clean)
    best.loss = torch.where(best.fooled, 0.0, -INF).to(best.loss.dtype)
    return best


def offer_near(best: Best, index: Tensor, x: Tensor, fooled: Tensor, rows: Rows, norm: float) -> None:
    """Notes the points that fool, lie in the ball, and are nearer than what is known. Nothing is read from the
    device."""
    inside, distance = measure(x, rows, norm)
    counts = fooled & inside
    best.offer(index, x, counts, torch.where(counts, -distance, -INF))


def settle(task: Task, run: Run, best: Best, rows: Rows, details: bool) -> Tensor | AttackResult:
    """``best``, judged once more as it is handed back, and by the model itself: what is searched on may be one prepared
    for it, the last bit of a network's outputs may differ with the batch, and half images were rounded. What does not
    fool then is x again."""
    out = task.hand_back(best.x)
    points = out.to(best.x.dtype)
    with torch.no_grad():
        outputs = run.model(task.victim, points)
    fooled = run.objective.success(outputs, rows.labels, rows.truth)
    assert fooled is not None
    fooled = fooled & best.fooled
    out = torch.where(fooled.view(-1, *[1] * (out.dim() - 1)), out, task.hand_back(task.x0))
    if not details:
        return out
    distance = torch.linalg.vector_norm((points - task.x0).flatten(1), run.norm, 1)
    return AttackResult(out, fooled, torch.where(fooled, -distance, -INF), run.queries)
