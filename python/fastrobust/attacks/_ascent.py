"""Auto-PGD's ascent: momentum, step sizes halved at checkpoints, restarts from the best point, per example."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import _checks as ck
from ..ops.pgd import _kernels as kernels
from ._graph import Seen
from ._run import Best, Rows, Run


@dataclasses.dataclass
class Ascent:
    """Settings of a run: ``rho`` (share of the steps that must raise the loss), ``momentum``, and for norm 1 the share
    of coordinates that the first steps move; None takes it from those that the start changes."""

    rho: float = 0.75
    momentum: float = 0.75
    share: float | None = 0.2


def checkpoints(steps: int) -> list[int]:
    """w_j = ceil(p_j steps) with p = 0, 0.22, then gaps that shrink by 0.03 down to 0.06 (Croce & Hein 2020,
    section 3). Counted in hundredths, which do not round."""
    at, gap, found = 22, 22, []
    while at <= 100:
        found.append(-(-at * steps // 100))
        gap = max(gap - 3, 6)
        at += gap
    return sorted(set(found))


_ALPHA = {math.inf: 2.0, 2.0: 2.0, 1.0: 1.0}  # the first step, in radii
# Norm 1 (Croce & Hein 2021): a step is divided by 1.5, down to a tenth of the first, and moves a part of the
# coordinates that the best point changes; back to the first step where that point has become sparser by 5 %.
_SHRINK, _LEAST, _SPARSER = 1.5, 0.1, 0.95


@dataclasses.dataclass
class State:
    """Of each example in the batch, on the device; one row each."""

    x: Tensor
    previous: Tensor
    grad: Tensor
    value: Tensor  # what is ascended, at x
    best: Tensor  # the point of the largest value and its gradient, where that is not x
    best_grad: Tensor
    best_is_x: Tensor
    best_value: Tensor  # its value and score
    best_score: Tensor
    factor: Tensor  # of the first step
    length: Tensor | None  # of the next one, with the sign of the ascent; None: not known yet
    rises: Tensor  # steps since the last checkpoint that raised the value
    mark: Tensor  # best_value at the last checkpoint
    halved: Tensor  # was the step halved there?
    keep: Tensor | None = None  # norm 1: coordinates that a step moves, and those that best changed at the checkpoint
    support: Tensor | None = None

    def best_point(self) -> Tensor:
        return torch.where(as_rows(self.best_is_x, self.x), self.x, self.best)

    def note(self, seen: Seen, sign: float, score: Tensor, left: Tensor, left_grad: Tensor) -> None:
        """What was seen at x, to which a step led from ``left``."""
        value = seen.value if seen.value.dim() else seen.value.expand(len(left))
        kernels.ascent_note(
            value.to(left.dtype), score.to(left.dtype), sign, left, left_grad, self.best, self.best_grad, self.value,
            self.best_value, self.best_score, self.rises, self.best_is_x,
        )  # fmt: skip

    def take(self, index: Tensor) -> State:
        values = (getattr(self, field.name) for field in _FIELDS)
        return State(*(None if v is None else v[index] for v in values))  # type: ignore[arg-type]


_FIELDS = dataclasses.fields(State)


def as_rows(value: Tensor, x: Tensor) -> Tensor:
    return value.view(-1, *[1] * (x.dim() - 1))


def climb(run: Run, setting: Ascent, x: Tensor, rows: Rows, index: Tensor, best: Best | None) -> Tensor:
    """One run of ``run.steps`` steps from x, which offers points to ``best``; ``index`` says which examples the rows
    are. Returns the points of largest value: without ``best`` nothing leaves, so they are one for each row."""
    norm, sign = run.norm, -1.0 if run.objective.targeted else 1.0
    seen = run.gradient(x, rows)
    value = _per_example(run, sign * seen.value, len(x)).to(x.dtype)
    fooled, score = run.judge(seen, rows)
    zero = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    state = State(
        x, x, seen.grad, value.clone(), torch.empty_like(x), torch.empty_like(x), zero == 0, _finite(value),
        score.to(x.dtype, copy=True), torch.ones_like(value), None, zero, _finite(value), zero > 0,
    )  # fmt: skip
    if norm == 1:
        n = max(math.prod(x.shape[1:]), 1)
        support = (x != rows.x0).flatten(1).sum(1)
        known = setting.share is not None
        share = torch.full_like(value, setting.share) if known else support / (1.5 * n)  # type: ignore[arg-type]
        state.keep, state.support = _kept(share, n), torch.full_like(support, n) if known else support
    marks = _sparsity_checkpoints(run.steps) if norm == 1 else checkpoints(run.steps)
    state, rows, index = _note(run, state, rows, index, best, fooled, score)
    last = 0
    for k in range(run.steps):
        if not len(index):
            run.tick(run.steps - k)
            return state.best_point()
        moved = _step(state, rows, norm, sign, 1.0 if k == 0 or norm == 1 else setting.momentum)
        left, left_grad = state.x, state.grad
        state.previous, state.x = left, moved
        # the last point's gradient is asked for by nothing
        seen = run.gradient(moved, rows) if k + 1 < run.steps else run.look(moved, rows)
        fooled, score = run.judge(seen, rows)
        state.grad = seen.grad
        state.note(seen, sign, score, left, left_grad)
        state, rows, index = _note(run, state, rows, index, best, fooled, score)
        run.tick(1)
        if k + 1 in marks and k + 1 < run.steps and len(index):
            _check_sparsity(state, rows) if norm == 1 else _check_steps(state, setting.rho * (k + 1 - last))
            last = k + 1
    if best is not None and run.early_stop and len(index):
        best.offer(index, state.best_point(), torch.zeros_like(index, dtype=torch.bool), state.best_score)
    return state.best_point()


def _step(state: State, rows: Rows, norm: float, sign: float, momentum: float) -> Tensor:
    """``ops.apgd_step`` of arguments that are known to be right."""
    if state.length is None:
        state.length = sign * _length(state.factor, rows, norm)
    eps = rows.eps
    if isinstance(rows.lo, Tensor) or isinstance(rows.hi, Tensor):
        return ops.apgd_step(
            state.x, state.previous, rows.x0, state.grad, sign * state.length, eps, norm, rows.clip, momentum=momentum,
            keep=state.keep, targeted=sign < 0,
        )  # fmt: skip
    box: tuple[float, float] = (-math.inf, math.inf) if rows.lo is None or rows.hi is None else (rows.lo, rows.hi)
    if not isinstance(eps, Tensor) and norm != 1 and state.x.is_cpu:
        moved = kernels.quick_apgd_step(
            state.x, state.previous, rows.x0, state.grad, state.length, eps, norm, box, momentum
        )
        if moved is not None:
            return moved
    radius: tuple[Tensor | None, float] = (eps, 0.0) if isinstance(eps, Tensor) else (None, eps)
    return kernels.apgd_kernel(
        state.x, state.previous, rows.x0, state.grad, state.length, 0.0, *radius, kernels.NORM_CODE[norm], *box,
        momentum, state.keep,
    )  # fmt: skip


def _note(
    run: Run, state: State, rows: Rows, index: Tensor, best: Best | None, fooled: Tensor, score: Tensor
) -> tuple[State, Rows, Tensor]:
    """Offers the current points; with ``early_stop`` the fooled ones alone, which leave."""
    if best is None or not len(index):
        return state, rows, index
    if not run.early_stop:
        best.offer(index, state.x, fooled, score)
        return state, rows, index
    if not bool(fooled.any()):
        return state, rows, index
    done, left = fooled.nonzero()[:, 0], (~fooled).nonzero()[:, 0]
    best.offer(index[done], state.x[done], fooled[done], score[done])
    run.leave(len(done))
    return state.take(left), rows.take(left), index[left]


def _per_example(run: Run, value: Tensor, batch: int) -> Tensor:
    if value.dim() == 0 and batch > 1:
        raise ValueError(
            "loss: returned one number, expected one value per example (reduction='none'): Auto-PGD chooses each "
            "example's step by its own loss"
        )
    return value.expand(batch)


def _finite(value: Tensor) -> Tensor:
    return value.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _length(factor: Tensor, rows: Rows, norm: float) -> Any:
    eps = rows.eps
    if isinstance(eps, Tensor) and eps.dim() > 1:
        factor = as_rows(factor, rows.x0)
    return _ALPHA[norm] * eps * factor


def _kept(share: Tensor, n: int) -> Tensor:
    """How many coordinates of largest gradient a share is, as the authors' code counts them."""
    return n - ((1 - share) * n).clamp(0, n - 1).long()


def _sparsity_checkpoints(steps: int) -> set[int]:
    every = max(4 * steps // 100, 1)
    return set(range(every, steps + 1, every))


def _back_to_best(state: State, which: Tensor) -> None:
    which = which & ~state.best_is_x
    wide = as_rows(which, state.x)
    state.x, state.grad = torch.where(wide, state.best, state.x), torch.where(wide, state.best_grad, state.grad)
    state.value = torch.where(which, state.best_value, state.value)


def _check_steps(state: State, needed: float) -> None:
    """Halves the step, and goes back to the best point, where too few steps raised the loss, or where neither the step
    nor the best loss has changed since the last checkpoint."""
    state.length = None
    # written to: the point that a step made is the run's own, a gradient may lie anywhere
    fmt = ck.dense_format(state.x) or torch.contiguous_format
    state.x, state.grad = ck.lay_out(state.x, fmt), ck.lay_out(state.grad, fmt)
    kernels.ascent_check(
        needed, state.x, state.grad, state.best, state.best_grad, state.value, state.mark, state.best_value,
        state.factor, state.rises, state.best_is_x, state.halved,
    )  # fmt: skip


def _check_sparsity(state: State, rows: Rows) -> None:
    """Norm 1: the sparsity of the step follows that of the best point."""
    assert state.support is not None
    n = max(math.prod(state.x.shape[1:]), 1)
    state.length = None
    support = (state.best_point() != rows.x0).flatten(1).sum(1)
    sparser = support < _SPARSER * state.support
    state.keep, state.support = _kept(support / (1.5 * n), n), support
    state.factor = torch.where(sparser, 1.0, (state.factor / _SHRINK).clamp_min(_LEAST))
    _back_to_best(state, sparser)
