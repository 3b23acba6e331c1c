"""The Square attack: random search without gradients (Andriushchenko et al. 2020; norm 1: Croce & Hein 2021)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from .._eager import left_to_python
from .._heap import keep_pages
from ..ops import _checks as ck
from ..ops.pgd.square import NO_WINDOW, Settle, Window, square_move, square_propose
from . import _inputs
from ._model import Output, undisturbed, usable
from ._objective import Objective
from ._options import BlackBox, Clip, Integer, Model, Norm, Values
from ._run import Best, Rows, Run
from ._task import AttackResult, no_tick, plan, read
from ._windows import Shape, bump, patterns, share_at, start_signs
from .apgd import begin

if TYPE_CHECKING:
    from typing_extensions import Unpack

INF = math.inf


@overload
def square(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[False] = False, **options: Unpack[BlackBox],
) -> Tensor: ...  # fmt: skip
@overload
def square(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[True], **options: Unpack[BlackBox],
) -> AttackResult: ...  # fmt: skip
@overload
def square(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: bool, **options: Unpack[BlackBox],
) -> Tensor | AttackResult: ...  # fmt: skip
@left_to_python
def square(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Values,
    norm: Norm = INF,
    queries: Integer = 5000,
    restarts: Integer = 1,
    targeted: bool = False,
    targets: Tensor | Integer | Literal["all"] | None = None,
    loss: Literal["margin", "ce"] = "margin",
    share: float = 0.8,
    rescale: bool = False,
    clip: Clip | None = (0.0, 1.0),
    normalize: tuple[Any, Any] | None = None,
    autocast: torch.dtype | None = None,
    output: Output | None = None,
    model_mode: Literal["eval", "keep"] = "eval",
    mask: Any = None,
    tolerance: float = 0.0,
    seed: Integer | None = None,
    first_example: Any = 0,
    progress: bool = False,
    check: bool = True,
    prepare: bool = False,
    return_details: bool = False,
) -> Tensor | AttackResult:
    """Random search over square windows that asks the model for outputs alone, never for a gradient.

    Norm inf writes a corner of the ball into a window of each example; norms 2 and 1 move the perturbation of two
    windows into one. A proposal is kept where the loss grew. Every example has windows of its own, drawn from (seed,
    its number, query): results depend neither on the batch nor on which examples have left it. An example leaves once
    it is fooled; one that is wrong already leaves at once, as it is. x that is not (B, C, H, W) is searched over
    stretches of its flattened features.

    Args:
        model, x, y, eps, norm, clip, normalize, autocast, output, model_mode, mask, tolerance, seed, first_example,
            check, prepare: as in :func:`pgd`. The model needs no gradient.
        queries: forward passes of an example, for each restart (and each target).
        targeted: make the model predict y: the loss falls.
        targets: "all", a number of classes (the likeliest wrong ones on x) or a (B, T) tensor: a search towards each,
            one after the other. Success is leaving the class y by whatever road.
        loss: "margin" or "ce".
        share: of the pixels, in the first windows; it falls with the queries as in the paper.
        rescale: stretch that schedule, which is for 10 000 queries, over ``queries``.
        return_details: return :class:`AttackResult` instead.

    Returns:
        Of each example the point that fools the model, and else that of the largest loss: in ball and box exactly.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    if loss not in ("margin", "ce"):
        raise ValueError(f"loss: got {loss!r}, expected 'margin' or 'ce'")
    targets_given = targets is not None
    objective = Objective(loss, targeted, targets_given)
    task = read(
        model,
        x,
        y,
        objective,
        eps=eps,
        norm=norm,
        clip=clip,
        normalize=normalize,
        autocast=autocast,
        output=output,
        mask=mask,
        tolerance=tolerance,
        seed=seed,
        first_example=first_example,
        check=check,
        multi=targets_given,
        prepare=prepare,
    )
    targets = _inputs.check_targets(targets, task.x0.shape[0], task.x0.device)
    if y is None and (targeted or targets_given):
        raise ValueError("y: got None, expected the classes to reach (targeted) or the true labels (targets)")
    if targeted and targets_given:
        raise ValueError("targets: got a multi-targeted attack together with targeted=True; give the true labels in y")
    queries, restarts = _inputs.integer(queries, "queries", 1), _inputs.integer(restarts, "restarts", 1)
    first = ck.check_number(share, "share", 0, 1)
    if task.x0.is_cpu:
        keep_pages()
    with (
        undisturbed(model, model_mode),
        tqdm(disable=not progress, desc="square", unit="query") as bar,
        torch.no_grad(),
    ):
        task.x0 = usable(task.x0).contiguous()
        run = task.run("square", queries, early_stop=True, need_fooled=True, tick=bar.update if progress else no_tick)
        if task.x0.numel() == 0:
            return task.nothing() if return_details else task.nothing().adv
        clean = task.clean_outputs(run)
        rows = task.rows(task.labels_or(clean), None, 0.0)
        best = begin(run, rows, clean)
        runs = [
            run for run in (plan(targets, rows, clean, False) if targets_given else [rows]) for _ in range(restarts)
        ]
        bar.reset(total=len(runs) * queries)
        key = task.seed
        if key is None:
            key = int(torch.randint(0, 2**62, (), dtype=torch.int64).item())
        for k, goal in enumerate(runs):
            index = (~best.fooled).nonzero()[:, 0]
            if not len(index):
                break
            shape = Shape.of(task.x0)
            hunt = Search(run, shape, (key + k) % 2**64, first, bool(rescale), queries)
            hunt.run_from(goal.take(index), index, best, task.examples()[index])
        if check and run.random:
            run.report(best.x)
        return task.result(run, best, runs[0], return_details)


@dataclasses.dataclass
class Search:
    """One run of the random search."""

    run: Run
    shape: Shape
    seed: int
    first: float
    rescale: bool
    queries: int

    def run_from(self, rows: Rows, index: Tensor, best: Best, numbers: Tensor) -> None:
        every = 1 if rows.x0.is_cpu else 16  # on a device: how often it is asked who is done
        faces = self._faces(rows) if self.run.norm == INF else None
        x = self._start(rows, faces, numbers)
        fooled, score = self._judged(x, rows)
        value, fooled, numbers = score.clone(), fooled.clone(), numbers.contiguous()
        propose: Corners | Moves = (
            Moves(self, x, rows, numbers) if faces is None else Corners(self, x, rows, numbers, faces)
        )
        settled = None
        for query in range(self.queries):
            if query % every == 0:
                if settled is not None and (every > 1 or bool(settled.hit.any())):
                    propose(NO_WINDOW, settled)
                    settled = None
                if bool(fooled.any()):
                    done, left = fooled.nonzero()[:, 0], (~fooled).nonzero()[:, 0]
                    self._offer(best, index[done], propose.x[done], fooled[done], value[done], propose.rows, done)
                    self.run.leave(len(done))
                    value, index, fooled = value[left], index[left], fooled[left]
                    propose = propose.take(left)
            if not len(index):
                self.run.tick(self.queries - query)
                return
            share = share_at(query, self.queries, self.first, self.rescale)
            propose(Window(query, *self.shape.side(share, propose.least)), settled)
            hit, score = self._judged(propose.new, propose.rows)
            settled = Settle(score, hit, value, fooled)
            self.run.tick(1)
        propose(NO_WINDOW, settled)
        self._offer(best, index, propose.x, fooled, value, propose.rows)

    def _judged(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """fooled, and what the search raises: of several targets the loss of this one."""
        seen = self.run.look(x, rows)
        fooled, score = self.run.judge(seen, rows)
        return fooled, score if rows.truth is None else -seen.value

    def _offer(
        self,
        best: Best,
        index: Tensor,
        x: Tensor,
        fooled: Tensor,
        value: Tensor,
        rows: Rows,
        some: Tensor | None = None,
    ) -> None:
        if rows.truth is not None:  # another pass: what is compared over the targets is not what was searched by
            value = self.run.evaluate(x, rows if some is None else rows.take(some))[1]
        best.offer(index, x, fooled, value)

    def _faces(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The ends of ball and box in every coordinate."""
        wide = rows.eps
        if isinstance(wide, Tensor) and wide.dim() == 1:
            wide = wide.view(-1, *[1] * (rows.x0.dim() - 1))
        low, high = (ops.project(rows.x0 + 2 * side * wide, rows.x0, rows.eps, INF, rows.clip) for side in (-1, 1))
        if rows.fixed is not None:
            low, high = (torch.where(rows.fixed, rows.x0, face) for face in (low, high))
        return low.contiguous(), high.contiguous()

    def _start(self, rows: Rows, faces: tuple[Tensor, Tensor] | None, numbers: Tensor) -> Tensor:
        x0, (channels, height, width) = rows.x0, self.shape
        if faces is not None:  # stripes
            signs = start_signs(self.seed, numbers, channels * width).view(-1, channels, 1, width)
            up = (signs > 0).expand(-1, -1, height, -1).reshape(x0.shape)
            x = torch.where(up, faces[1], faces[0])
        else:  # tiles, five in a row and in a column
            tall, wide = max(height // 5, 1), max(width // 5, 1)
            down, across = height // tall, width // wide
            signs = start_signs(self.seed, numbers, channels * down * across).view(-1, channels, down, 1, across, 1)
            tile = bump(tall, wide, self.run.norm).to(x0)
            delta = x0.new_zeros(len(x0), channels, height, width)
            top, left = (height - down * tall) // 2, (width - across * wide) // 2
            tiles = (signs * tile[None, None, None, :, None, :]).reshape(-1, channels, down * tall, across * wide)
            delta[:, :, top : top + down * tall, left : left + across * wide] = tiles
            x = self._on_sphere(delta.reshape(x0.shape), rows)
        return x if rows.fixed is None else torch.where(rows.fixed, x0, x)

    def _on_sphere(self, delta: Tensor, rows: Rows) -> Tensor:
        """x0 + delta at the radius: norm 2 stretched to it, norm 1 projected."""
        if self.run.norm == 2:
            length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12)
            delta = delta * (rows.eps / length).view(-1, *[1] * (delta.dim() - 1))
        return ops.project(rows.x0 + delta, rows.x0, rows.eps, self.run.norm, rows.clip)


class Corners:
    """Norm inf: a window goes to one end of ball and box, a sign for each channel. x and new differ in the last window
    alone, and that is all that is copied and written a query."""

    least = 1  # side of a window

    def __init__(self, search: Search, x: Tensor, rows: Rows, numbers: Tensor, faces: tuple[Tensor, Tensor]) -> None:
        self.search, self.x, self.rows, self.numbers, self.faces = search, x, rows, numbers, faces
        self.new, self.last = x.clone(), NO_WINDOW
        image = search.shape.images
        self.images = image(x), image(self.new), image(faces[0]), image(faces[1])

    def __call__(self, window: Window, settled: Settle | None) -> None:
        square_propose(*self.images, self.numbers, self.search.seed, self.last, window, settled)
        self.last = window

    def take(self, left: Tensor) -> Corners:
        """Of settled ones."""
        faces = self.faces[0][left], self.faces[1][left]
        return Corners(self.search, self.x[left], self.rows.take(left), self.numbers[left], faces)


class Moves:
    """Norms 2 and 1: the perturbation of two windows, and what is left of the radius, go into one."""

    least = 3  # a window has a middle

    def __init__(self, search: Search, x: Tensor, rows: Rows, numbers: Tensor) -> None:
        self.search, self.x, self.rows, self.numbers = search, x, rows, numbers
        self.new = torch.empty_like(x)
        image = search.shape.images
        self.images = image(x), image(self.new), image(rows.x0)
        self.pattern: Tensor | None = None

    def __call__(self, window: Window, settled: Settle | None) -> None:
        norm, rows = self.search.run.norm, self.rows
        if self.pattern is None or (window.height and self.pattern.shape[1:] != window[1:]):
            self.pattern = patterns(window.height, window.width, norm).to(self.x)
        square_move(*self.images, self.numbers, self.search.seed, window, norm, rows.eps, self.pattern, settled)
        if window.height:
            ops.project(self.new, rows.x0, rows.eps, norm, rows.clip, out=self.new)
            if rows.fixed is not None:
                torch.where(rows.fixed, rows.x0, self.new, out=self.new)

    def take(self, left: Tensor) -> Moves:
        """Of settled ones."""
        return Moves(self.search, self.x[left], self.rows.take(left), self.numbers[left])
