"""The loop of a gradient attack: runs from given starts, the best point per example, shrinking batches."""

from __future__ import annotations

import contextvars
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import _checks as ck
from . import _graph, _grid, _modes, _trust
from ._graph import Seen
from ._model import Victim
from ._objective import NO_GRADIENT, Objective


@dataclasses.dataclass
class Rows:
    """What the examples of a batch are attacked with. ``labels`` go into the loss with ``extra`` (clean logits for KL,
    target classes for DLR); ``truth`` is given when success means leaving the true class by whatever road
    (multi-targeted). Radius, step and box are numbers or tensors, (B,) or broadcasting to x; ``fixed``: what stays.
    """

    x0: Tensor
    labels: Tensor
    extra: Tensor | None
    truth: Tensor | None
    eps: float | Tensor
    step_size: float | Tensor
    lo: float | Tensor | None
    hi: float | Tensor | None
    fixed: Tensor | None
    example: Tensor | None = None  # where several rows are of one

    @property
    def clip(self) -> Any:
        return None if self.lo is None else (self.lo, self.hi)

    def take(self, index: Tensor) -> Rows:
        batch = len(self.x0)
        each = lambda v: isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == batch
        return Rows(*(v[index] if each(v) else v for v in self.inputs()))

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """Batches of one size, one behind the other."""
        batch = len(parts[0].x0)
        each = lambda v: isinstance(v, Tensor) and v.dim() > 0 and v.shape[0] == batch
        columns = zip(*(rows.inputs() for rows in parts), strict=True)
        return Rows(*(torch.cat(column) if each(column[0]) else column[0] for column in columns))

    def inputs(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in _FIELDS)


_FIELDS = dataclasses.fields(Rows)


class Best:
    """Per example, the best point so far: fooled before not fooled, then the larger loss."""

    def __init__(self, x: Tensor) -> None:
        self.x = x.clone()
        self.fooled = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
        self.loss = torch.full((x.shape[0],), -math.inf, dtype=x.dtype, device=x.device)
        self.fresh = True  # nothing is fooled yet, and nobody needs to ask

    def offer(self, index: Tensor, x: Tensor, fooled: Tensor, loss: Tensor) -> None:
        every = len(index) == len(self.x)  # in order, as any index is
        old_x, old_fooled, old_loss = self.x, self.fooled, self.loss
        if not every:
            old_x, old_fooled, old_loss = old_x[index], old_fooled[index], old_loss[index]
        loss = loss.to(old_loss.dtype).nan_to_num(-math.inf, math.inf, -math.inf)  # NaN is never the larger loss
        better = (fooled & ~old_fooled) | ((fooled == old_fooled) & (loss > old_loss))
        # no row is picked by its value, which would wait for the device
        x = torch.where(better.view(-1, *[1] * (x.dim() - 1)), x, old_x)
        fooled, loss = torch.where(better, fooled, old_fooled), torch.where(better, loss, old_loss)
        if every:
            self.x, self.fooled, self.loss = x, fooled, loss
        else:
            self.x[index], self.fooled[index], self.loss[index] = x, fooled, loss


runs_of_now: contextvars.ContextVar[list[Run] | None] = contextvars.ContextVar("runs_of_now", default=None)


@dataclasses.dataclass
class Run:
    """What every restart shares. Who wants to know about the runs that are made puts a list into ``runs_of_now``."""

    victim: Victim
    objective: Objective
    norm: float
    steps: int
    samples: int
    levels: Tensor | None
    track_best: bool
    compares: bool
    early_stop: bool
    need_fooled: bool
    check: bool
    check_labels: bool
    tick: Callable[[int], object]
    name: str = "pgd"
    queries: int = 0
    forwards: int = 0  # images that went through the model
    backwards: int = 0
    random: bool = False
    broken: list[tuple[float, int]] = dataclasses.field(default_factory=list)  # when examples left as fooled, how many
    last: tuple[Seen, Rows] | None = None

    def __post_init__(self) -> None:
        made = runs_of_now.get()
        if made is not None:
            made.append(self)

    def model(self, call: Callable[[Tensor], Any], x: Tensor) -> Any:
        """One pass: what ``call``, one of the victim's, gives. The first asks whether it draws random numbers."""
        first, self.queries = self.queries == 0, self.queries + 1
        self.forwards += len(x)
        watch = first and self.check and self.samples == 1 and not _trust.known_deterministic(self.victim.model)
        dice = _trust.Dice(x, self.victim.model) if watch else None
        try:
            found = call(x)
        except (RuntimeError, ValueError, IndexError) as error:
            if isinstance(error, RuntimeError) and "nference tensors cannot be saved" in str(error):
                raise ValueError(
                    "model: has inference tensors (made under torch.inference_mode), which have no gradient; make its "
                    "weights outside of inference_mode, or clone them"
                ) from error
            if isinstance(error, RuntimeError) and "Can't call numpy() on Tensor that requires grad" in str(error):
                raise ValueError(f"{NO_GRADIENT} ({error})") from error
            if first and x.dim() <= 3 and not isinstance(error, torch.OutOfMemoryError):
                raise ValueError(
                    f"model: fails on x of shape {tuple(x.shape)}, which is a batch of {len(x)}; one image is given as "
                    f"x[None]: {error}"
                ) from error
            raise
        if dice is not None:
            self._look_again(x, found[1] if isinstance(found, tuple) else found, dice)
        return found

    def _look_again(self, x: Tensor, outputs: Tensor, dice: _trust.Dice) -> None:
        """A second pass, where the first drew random numbers: they may belong to another thread, or not matter."""
        model = self.victim.model
        if any(m.training for m in _modes.modules_of(model)):
            return  # attacked in train mode by request
        if dice.rolled():
            with torch.no_grad():
                again = self.victim(x)
            self.queries, self.forwards = self.queries + 1, self.forwards + len(x)
            self.random = not torch.equal(outputs.detach().nan_to_num(), again.nan_to_num())
        if not self.random:
            _trust.note_deterministic(model)

    def leave(self, count: int) -> None:
        """So many examples leave the batch, fooled."""
        self.broken.append((time.perf_counter(), count))

    def gradient(self, x: Tensor, rows: Rows) -> Seen:
        """Outputs, loss, and the gradient with respect to x: means over the samples of a randomised model."""
        total: Seen | None = None
        for _ in range(self.samples):
            leaf, outputs = self.model(self.victim.differentiable, x)
            self.check_classes(rows.labels, outputs)
            value, grad = self.objective.value_and_grad(outputs, leaf, rows.labels, rows.extra)
            self.backwards += len(x)
            seen = Seen(outputs.detach(), value, grad)
            total = seen if total is None else Seen(*(a + b for a, b in zip(total, seen, strict=True)))
        assert total is not None
        if self.samples > 1:
            total = Seen(*(t / self.samples for t in total))
        if rows.fixed is not None:
            total = total._replace(grad=total.grad.masked_fill(rows.fixed, 0))
        self.last = total, rows
        return total

    def check_classes(self, labels: Tensor, outputs: Tensor) -> None:
        """Once: after a first forward pass the number of classes is known."""
        if self.check_labels:
            ck.check_label_values(labels, "y", outputs.shape[1])
            self.check_labels = False

    def judge(self, seen: Seen, rows: Rows) -> tuple[Tensor, Tensor]:
        """fooled and a score that is larger for better points."""
        outputs, value = seen.outputs, seen.value
        fooled = self.objective.success(outputs, rows.labels, rows.truth)
        if fooled is None:
            if self.need_fooled:
                raise ValueError(
                    f"fooled: got None, expected a callable(outputs, y) giving (B,) bool: for outputs "
                    f"{tuple(outputs.shape)} and y {ck.describe(rows.labels)} it is not plain what early_stop and "
                    "return_details shall call fooled"
                )
            fooled = torch.zeros(len(outputs), dtype=torch.bool, device=outputs.device)
        if rows.truth is not None:
            return fooled, ops.margin_loss(outputs, rows.truth, check=False).value
        if value.dim() == 0 and len(outputs) > 1 and self.compares:
            raise ValueError(
                "loss: returned one number, expected one value per example (reduction='none'): keep='best', restarts "
                "and targets compare examples"
            )
        value = -value if self.objective.targeted else value
        return fooled, value if value.dim() else value.expand(len(outputs))

    def look(self, x: Tensor, rows: Rows) -> Seen:
        """As :meth:`gradient`, without one: x stands in its place."""
        with torch.no_grad():
            outputs, value = self._outputs_and_value(x, rows)
            for _ in range(self.samples - 1):
                more = self._outputs_and_value(x, rows)
                outputs, value = outputs + more[0], value + more[1]
            if self.samples > 1:
                outputs, value = outputs / self.samples, value / self.samples
            if self.last is None:  # no step was made: there is this alone to report about
                self.last = Seen(outputs, value, torch.ones_like(x)), rows
            return Seen(outputs, value, x)

    def evaluate(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        return self.judge(self.look(x, rows), rows)

    def _outputs_and_value(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        outputs = self.model(self.victim, x)
        self.check_classes(rows.labels, outputs)
        return outputs, self.objective.value(outputs, rows.labels, rows.extra)

    def shown(self, x: Tensor, rows: Rows) -> Tensor:
        """The images that an iterate stands for: itself, or pixels of so many levels."""
        return x if self.levels is None else _grid.snap(x, rows.x0, self.levels, rows.eps, self.norm)

    def update(self, x: Tensor, grad: Tensor, rows: Rows) -> None:
        ops.pgd_step(
            x, rows.x0, grad, rows.step_size, rows.eps, self.norm, rows.clip, out=x, targeted=self.objective.targeted
        )

    def plain(self, x: Tensor, rows: Rows, graph: bool) -> Tensor:
        """The last iterate of one run: no bookkeeping, no synchronisation."""

        def step(t: tuple[Any, ...]) -> Seen:
            x, given = t[0], Rows(*t[1:])
            seen = self.gradient(self.shown(x, given), given)
            self.update(x, seen.grad, given)
            return seen

        inputs = (x, *rows.inputs())
        if graph:
            queries = self.queries + self.steps * self.samples
            recorded = _graph.captured(self.victim.model, self._key(), step, inputs)
            if self.check_labels:  # a graph from the cache
                ck.check_label_values(rows.labels, "y", recorded.seen.outputs.shape[1])
            x, seen = recorded.run(inputs, self.steps, self.tick)
            self.queries, self.last = queries, (seen, rows)
            return x
        for _ in range(self.steps):
            step(inputs)
            self.tick(1)
        return self.shown(x, rows)

    def _key(self) -> tuple[object, ...]:
        victim, objective = self.victim, self.objective
        flags = tuple(m.training for m in _modes.modules_of(victim.model))
        scale = (
            None
            if victim.mean is None or victim.std is None
            else (tuple(victim.mean.flatten().tolist()), tuple(victim.std.flatten().tolist()))
        )
        return (
            self.norm, objective.loss, objective.targeted, self.samples, flags, victim.autocast, victim.output, scale,
            getattr(victim.model, "generation", 0),  # a prepared victim has other weights after each
        )  # fmt: skip

    def full(self, x: Tensor, rows: Rows, index: Tensor, best: Best) -> None:
        """One run that offers points to ``best``; ``index`` says which examples the rows are."""
        for k in range(self.steps):
            here = self.shown(x, rows)
            seen = self.gradient(here, rows)
            grad = seen.grad
            if self.track_best or self.early_stop:
                fooled, score = self.judge(seen, rows)
                if self.track_best:
                    best.offer(index, here, fooled, score)
                if self.early_stop and bool(fooled.any()):  # these leave the batch with the point that fooled the model
                    done, left = fooled.nonzero()[:, 0], (~fooled).nonzero()[:, 0]
                    best.offer(index[done], here[done], fooled[done], score[done])
                    x, grad, index, rows = x[left], grad[left], index[left], rows.take(left)
                    if not len(left):
                        self.tick(self.steps - k)
                        return
            self.update(x, grad, rows)
            self.tick(1)
        here = self.shown(x, rows)
        best.offer(index, here, *self.evaluate(here, rows))

    def look_at_last(self, examples: int) -> None:
        """Of what the last step saw keeps, of each example, the last of its rows: a report counts examples."""
        if self.last is None or self.last[1].example is None:
            return
        seen, rows = self.last
        assert rows.example is not None
        at = torch.full((examples,), -1, device=rows.example.device)
        at.scatter_reduce_(0, rows.example, torch.arange(len(rows.example), device=at.device), "amax")
        kept = at[at >= 0]
        self.last = Seen(*(t[kept] for t in seen)), dataclasses.replace(rows.take(kept), example=None)

    def stuck(self, seen: Seen, rows: Rows) -> tuple[Tensor, Tensor]:
        """(B,) bool: whose gradient was zero or NaN, and who ought to have moved."""
        stuck = ~(seen.grad.abs() > 0).flatten(1).any(1)
        fooled = self.objective.success(seen.outputs, rows.labels, rows.truth)
        free = torch.ones_like(stuck) if fooled is None else ~fooled
        for room in (rows.eps, rows.step_size):  # who gave no room knows that nothing moves
            wide = room.flatten(1).amax(1) if isinstance(room, Tensor) and room.dim() > 1 else room
            free &= torch.as_tensor(wide, device=free.device) > 0
        if rows.fixed is not None:
            free &= ~rows.fixed.flatten(1).all(1)
        return stuck, free

    def report(self, adv: Tensor) -> None:
        """Warnings about what the last step saw, and about images that are none but the clean ones."""
        if self.random:
            _trust.warn_random()
        if self.last is None:
            return
        seen, rows = self.last
        same = self.steps > 0 and rows.x0.shape == adv.shape and torch.equal(adv, rows.x0)
        if _trust.nothing_to_report(*seen) and not same:
            return
        stuck, free = self.stuck(seen, rows)
        _trust.report(seen.outputs, seen.value, stuck & free, self.objective.name, self.name)
        if same and bool((free & ~stuck).any()):
            _trust.warn(
                f"{self.name}: no image differs from the clean one: is eps below the spacing of float32 numbers, or "
                "of another "
                "unit than x?"
            )


Climb = Callable[[Tensor, Rows, Tensor, Best], object]

# Images up to which runs are made side by side: passes of so few cost little more than those of one.
ABREAST = 64


def search(run: Run, climb: Climb, plan: list[Rows], starts: Any, best: Best) -> Best:
    """One run after the other, each on the examples that are not fooled yet; of few examples several runs at once."""
    batch, k = len(best.x), 0
    while k < len(plan):
        index = torch.arange(batch, device=best.x.device) if k == 0 and best.fresh else (~best.fooled).nonzero()[:, 0]
        if len(index) == 0:
            break
        count = abreast(len(index), len(plan) - k)
        side_by_side(run, climb, plan[k : k + count], [starts.draw(j) for j in range(k, k + count)], index, best)
        k += count
    return best


def abreast(examples: int, runs: int) -> int:
    """How many of so many runs are made at once."""
    return max(1, min(runs, ABREAST // max(examples, 1)))


def side_by_side(
    run: Run, climb: Climb, plan: list[Rows], starts: list[Tensor], index: Tensor, best: Best, better: bool = False
) -> None:
    """The runs of ``plan`` on the examples ``index``, as one batch; what they find is offered in their order, with the
    outcome of one after the other: an example that one has fooled is none of the next ones' business, unless ``better``
    points are looked for."""
    if len(index) < len(best.x):
        plan, starts = [rows.take(index) for rows in plan], [start[index] for start in starts]
    if len(plan) == 1:
        climb(starts[0], plan[0], index, best)
        return
    rows, n = Rows.joined(plan), len(index)
    rows.example = torch.arange(n, device=index.device).repeat(len(plan))
    wide = Best(rows.x0)
    climb(torch.cat(starts), rows, torch.arange(len(rows.x0), device=index.device), wide)
    run.tick((len(plan) - 1) * run.steps)
    run.look_at_last(n)
    for k in range(len(plan)):
        left = torch.arange(n, device=index.device) if better else (~best.fooled[index]).nonzero()[:, 0]
        part = left + k * n
        best.offer(index[left], wide.x[part], wide.fooled[part], wide.loss[part])
