"""What every attack is given, checked, and the points and classes it begins with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import _checks as ck
from . import _grid, _inputs, _trust
from ._model import Output, Victim, usable
from ._objective import Objective, predictions
from ._run import Best, Rows, Run


class AttackResult(NamedTuple):
    """``adv`` (B, ...); ``fooled`` (B,) bool and ``loss`` (B,) at ``adv``, the score that is ascended (targeted: minus
    the loss; multi-targeted: the margin of y); ``queries``: forward passes of the batch."""

    adv: Tensor
    fooled: Tensor
    loss: Tensor
    queries: int


@dataclasses.dataclass
class Task:
    """Images, labels, radius and box of an attack, the model as it sees it, and where its random numbers begin."""

    victim: Victim
    objective: Objective
    x0: Tensor  # the state: float32 or float64
    given: torch.dtype  # of the images that came
    norm: float
    radius: float | Tensor
    box: _inputs.Box | None
    grid: Tensor | None
    fixed: Tensor | None
    labels: Tensor | None
    seed: int | None
    numbers: int | Tensor  # of the first example, or of each
    check: bool
    prepare: bool = False

    def run(self, name: str, steps: int, samples: int = 1, **options: Any) -> Run:
        tick = options.pop("tick", no_tick)
        defaults = {"track_best": False, "compares": True, "early_stop": False, "need_fooled": False}
        return Run(
            self.searched(),
            self.objective,
            self.norm,
            steps,
            samples,
            self.grid,
            **(defaults | options),
            check=self.check,
            check_labels=self.check and self.labels is not None and self.victim.logits,
            tick=tick,
            name=name,
        )

    def searched(self) -> Victim:
        """What the search runs on: the model, or on request one prepared for it."""
        if not self.prepare or not self.x0.numel():
            return self.victim
        victim, why = self.victim.prepared(self.x0)
        if why:
            _trust.warn(f"prepare: the model itself is attacked: {why}", UserWarning)
        return victim

    def verdict(self, run: Run, adv: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """fooled and score, by the model itself."""
        run.victim = self.victim
        return run.evaluate(adv, rows)

    def rows(self, labels: Tensor, extra: Tensor | None, step: float | Tensor) -> Rows:
        lo, hi = (None, None) if self.box is None else self.box
        return Rows(self.x0, usable(labels), extra, None, self.radius, step, lo, hi, self.fixed)

    def clean_outputs(self, run: Run) -> Tensor:
        """The model's outputs for the images, averaged over the samples of a randomised one."""
        with torch.no_grad():
            outputs = run.model(self.victim, self.x0)
            for _ in range(run.samples - 1):
                outputs = outputs + run.model(self.victim, self.x0)
        outputs = outputs if run.samples == 1 else outputs / run.samples
        if self.check and outputs.is_floating_point():
            _trust.warn_broken(outputs, "clean images")
        if self.labels is not None:
            run.check_classes(self.labels, outputs)
        return outputs

    def labels_or(self, clean: Tensor | None) -> Tensor:
        """y, or the model's own predictions."""
        if self.labels is not None:
            return self.labels
        return torch.zeros(0, dtype=torch.int64, device=self.x0.device) if clean is None else predictions(clean)

    def starts(self, rows: Rows, random: bool, share: float = 1.0) -> Starts:
        return Starts(rows, self.norm, random, share, self.seed, self.numbers)

    def examples(self) -> Tensor:
        """(B,) numbers of the examples, on their device."""
        if isinstance(self.numbers, Tensor):
            return self.numbers.to(self.x0.device)
        return self.numbers + torch.arange(len(self.x0), device=self.x0.device)

    def nothing(self) -> AttackResult:
        """Of an empty batch, or of images without a pixel."""
        batch = self.x0.shape[0]
        none = torch.zeros(batch, dtype=torch.bool, device=self.x0.device)
        return AttackResult(self.hand_back(self.x0.clone()), none, self.x0.new_zeros(batch), 0)

    def hand_back(self, adv: Tensor) -> Tensor:
        """In the dtype of the images, rounded towards them."""
        if self.fixed is not None:
            adv = torch.where(self.fixed, self.x0, adv)
        return adv if self.given == adv.dtype else _inputs.narrow_inward(adv, self.x0, self.given)

    def result(self, run: Run, best: Best, rows: Rows, details: bool, scored: bool = True) -> Tensor | AttackResult:
        """``best``, handed back; what rounding to half images made of it is judged again, and by the model itself what
        was found on a prepared one."""
        out = self.hand_back(best.x)
        searched = run.victim is not self.victim
        if not details and not (searched and not scored):
            return out
        fooled, score = best.fooled, best.loss
        if self.given != best.x.dtype or searched:
            fooled, there = self.verdict(run, out.to(best.x.dtype), rows)
            score = there if scored else score
        if searched and not scored:  # a boundary attack hands back the image itself where nothing fools
            missed = best.fooled & ~fooled
            out = torch.where(missed.view(-1, *[1] * (out.dim() - 1)), self.hand_back(self.x0), out)
            score = score.masked_fill(missed, -math.inf)
            if not details:
                return out
        return AttackResult(out, fooled, score, run.queries)


def read(
    model: Callable[[Tensor], Any],
    x: Any,
    y: Any,
    objective: Objective,
    *,
    eps: Any,
    norm: Any,
    clip: Any,
    normalize: Any = None,
    autocast: torch.dtype | None = None,
    output: Output | None = None,
    mask: Any = None,
    levels: Any = None,
    tolerance: float = 0.0,
    seed: Any = None,
    first_example: Any = 0,
    check: bool = True,
    multi: bool = False,
    prepare: bool = False,
) -> Task:
    """Checks what all attacks take; nothing is run and nothing is drawn."""
    if not isinstance(prepare, bool):
        raise TypeError(f"prepare: got {ck.describe(prepare)}, expected a bool")
    p = ck.parse_norm(norm)
    x0, given = _inputs.images(x)
    box = _inputs.box(clip, x0)
    grid = _levels(levels, box, x0, given)
    x0 = _inputs.into_box(x0, box, _inputs.number(tolerance, "tolerance"), grid, check)
    radius = _inputs.parameter(eps, "eps", x0, p)
    fixed = _inputs.fixed_pixels(mask, x0)
    if fixed is not None and check and fixed.numel() and bool(fixed.all()):
        raise ValueError("mask: got no True, expected at least one pixel that may change")
    numbers = _inputs.example_numbers(first_example, x0)
    named = objective.name is not None or multi
    victim = Victim(model, normalize, autocast, x0, output, logits=named)
    labels = None if y is None else _inputs.labels(y, x0, named)
    return Task(
        victim, objective, x0, given, p, radius, box, grid, fixed, labels, _inputs.check_seed(seed), numbers, check,
        prepare,
    )  # fmt: skip


def _levels(levels: Any, box: Any, x: Tensor, given: torch.dtype) -> Tensor | None:
    if levels is None:
        return None
    count = _inputs.integer(levels, "levels", 2)
    if box is None or isinstance(box[0], Tensor) or not box[1] - box[0] < math.inf or not box[0] < box[1]:
        raise ValueError(f"clip: got {'None' if box is None else box}, expected two numbers lo < hi for levels")
    return _grid.table(count, box[0], box[1], given, x)


def no_tick(_: int) -> None:
    return None


@dataclasses.dataclass
class Starts:
    """The starting point of each run, drawn from one seed: run k uses the key seed + k."""

    rows: Rows
    norm: float
    random: bool
    share: float  # of the radius
    seed: int | None
    numbers: int | Tensor
    cut: bool = (
        False  # Auto-PGD's: points of the whole ball (norm 1: normal ones), projected; many lie on the box's faces
    )

    def draw(self, k: int) -> Tensor:
        rows = self.rows
        if not self.random:
            return rows.x0.clone()
        radius = rows.eps * self.share
        if not self.cut:
            return self.within(radius, k)
        if self.norm == 1:
            return self.sparse(radius, k)
        return ops.project(self._points(radius, self.norm, k, False), rows.x0, radius, self.norm, rows.clip)

    def within(self, radius: float | Tensor, k: int) -> Tensor:
        """A random point of the ball of that radius."""
        return self._points(radius, self.norm, k, self.rows.lo is not None)

    def sparse(self, radius: float | Tensor, k: int) -> Tensor:
        """A normal point, as wide as the box, projected on the L1 ball of that radius (Croce & Hein 2021)."""
        rows = self.rows
        width = rows.hi - rows.lo if isinstance(rows.lo, float) and isinstance(rows.hi, float) else 1.0
        far = math.sqrt(math.prod(rows.x0.shape[1:])) * (width if width < math.inf else 1.0)
        return ops.project(self._points(far, 2.0, k, False), rows.x0, radius, 1, rows.clip)

    def _points(self, radius: float | Tensor, norm: float, k: int, boxed: bool) -> Tensor:
        rows = self.rows
        if self.seed is None:
            self.seed = int(torch.randint(0, 2**62, (), dtype=torch.int64).item())
        key = (self.seed + k) % 2**64
        clip = rows.clip if boxed else None
        start = ops.random_start(rows.x0, radius, norm, clip, key, self.numbers)
        return start if rows.fixed is None else torch.where(rows.fixed, rows.x0, start)


def plan(targets: Any, rows: Rows, clean: Tensor, beside: bool) -> list[Rows]:
    """One run per target: "all", a number of the likeliest wrong classes, or a (B, T) tensor. ``beside``: the targets
    stand beside the labels, not in their place."""
    classes, truth = clean.shape[1], rows.labels
    if isinstance(targets, Tensor):
        ck.check_label_values(targets, "targets", classes)
        chosen = usable(targets.detach()).long()
    else:
        count = classes - 1 if targets == "all" else min(targets, classes - 1)
        others = clean.scatter(1, truth[:, None], -math.inf)
        chosen = others.topk(count, 1).indices
    columns = [chosen[:, t].contiguous() for t in range(chosen.shape[1])]
    if beside:
        return [dataclasses.replace(rows, extra=c, truth=truth) for c in columns]
    return [dataclasses.replace(rows, labels=c, truth=truth) for c in columns]
