"""The Square attack: random search without gradients (Andriushchenko et al. 2020; norm 1: Croce & Hein 2021)."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from .._heap import keep_pages
from ..ops import _checks as ck
from ..ops.pgd.square import NO_WINDOW, Settle, Window, square_propose
from . import _inputs
from ._model import Output, undisturbed, usable
from ._objective import Objective
from ._options import BlackBox, Clip, Integer, Model, Norm, Values
from ._run import Best, Rows, Run
from ._task import AttackResult, no_tick, read
from ._windows import Dice, Shape, bump, indices, share_at
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
def square(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Values,
    norm: Norm = INF,
    queries: Integer = 5000,
    restarts: Integer = 1,
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

    Norm inf writes a corner of the ball into a window of each example; norms 2 and 1 move the perturbation of two windows
    into one. A proposal is kept where the loss grew. Every example has windows of its own, drawn from (seed, its number,
    query): results depend neither on the batch nor on which examples have left it. An example leaves once it is fooled;
    one that is wrong already leaves at once, as it is. x that is not (B, C, H, W) is searched over stretches of its
    flattened features.

    Args:
        model, x, y, eps, norm, clip, normalize, autocast, output, model_mode, mask, tolerance, seed, first_example,
            check, prepare: as in :func:`pgd`. The model needs no gradient.
        queries: forward passes of an example, for each restart.
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
    objective = Objective(loss, False)
    task = read(
        model, x, y, objective, eps=eps, norm=norm, clip=clip, normalize=normalize, autocast=autocast, output=output,
        mask=mask, tolerance=tolerance, seed=seed, first_example=first_example, check=check, prepare=prepare,
    )  # fmt: skip
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
        bar.reset(total=restarts * queries)
        key = task.seed
        if key is None:
            key = int(torch.randint(0, 2**62, (), dtype=torch.int64).item())
        for k in range(restarts):
            index = (~best.fooled).nonzero()[:, 0]
            if not len(index):
                break
            shape = Shape.of(task.x0)
            hunt = Search(run, shape, Dice((key + k) % 2**64, shape), first, bool(rescale), queries)
            hunt.run_from(rows.take(index), index, best, task.examples()[index])
        if check and run.random:
            run.report(best.x)
        return task.result(run, best, rows, return_details)


@dataclasses.dataclass
class Search:
    """One run of the random search."""

    run: Run
    shape: Shape
    dice: Dice
    first: float
    rescale: bool
    queries: int

    def run_from(self, rows: Rows, index: Tensor, best: Best, numbers: Tensor) -> None:
        every = 1 if rows.x0.is_cpu else 16  # on a device: how often it is asked who is done
        if self.run.norm == INF:
            self._run_corners(rows, index, best, numbers, every)
            return
        x = self._start(rows, None, numbers)
        seen = self.run.look(x, rows)
        fooled, score = self.run.judge(seen, rows)
        value = score
        for query in range(self.queries):
            if query % every == 0 and bool(fooled.any()):
                done, left = fooled.nonzero()[:, 0], (~fooled).nonzero()[:, 0]
                best.offer(index[done], x[done], fooled[done], value[done])
                self.run.leave(len(done))
                x, value, index, rows, numbers = x[left], value[left], index[left], rows.take(left), numbers[left]
                fooled = fooled[left]
                self.dice.take(left)
            if not len(index):
                self.run.tick(self.queries - query)
                return
            self.dice.places(query, numbers)
            share = share_at(query, self.queries, self.first, self.rescale)
            new = self._moved(x, rows, query, share)
            if rows.fixed is not None:
                new = torch.where(rows.fixed, rows.x0, new)
            hit, score = self.run.judge(self.run.look(new, rows), rows)
            better = ((score > value) | hit) & ~fooled
            x = torch.where(better.view(-1, *[1] * (x.dim() - 1)), new, x)
            value, fooled = torch.where(better, score, value), fooled | (hit & better)
            self.run.tick(1)
        best.offer(index, x, fooled, value)

    def _run_corners(self, rows: Rows, index: Tensor, best: Best, numbers: Tensor, every: int) -> None:
        """Norm inf: a window goes to one end of ball and box, a sign for each channel. x and new differ in the last
        window alone, and that is all that is copied and written a query."""
        faces = self._faces(rows)
        x = self._start(rows, faces, numbers)
        fooled, score = self.run.judge(self.run.look(x, rows), rows)
        fooled, value, new, numbers = fooled.clone(), score.clone(), x.clone(), numbers.contiguous()
        last, settled = NO_WINDOW, None
        image = lambda t: t.view(-1, *self.shape)
        views = lambda: (image(x), image(new), image(faces[0]), image(faces[1]))
        images = views()

        def propose(window: Window) -> None:
            square_propose(*images, numbers, self.dice.seed, last, window, settled)

        for query in range(self.queries):
            if query % every == 0:
                if settled is not None and (every > 1 or bool(settled.hit.any())):
                    propose(NO_WINDOW)
                    settled = None
                if bool(fooled.any()):
                    done, left = fooled.nonzero()[:, 0], (~fooled).nonzero()[:, 0]
                    best.offer(index[done], x[done], fooled[done], value[done])
                    self.run.leave(len(done))
                    x, value, index, rows, numbers = x[left], value[left], index[left], rows.take(left), numbers[left]
                    fooled, new, faces = fooled[left], new[left], (faces[0][left], faces[1][left])
                    images = views()
            if not len(index):
                self.run.tick(self.queries - query)
                return
            window = Window(query, *self.shape.side(share_at(query, self.queries, self.first, self.rescale), 1))
            propose(window)
            hit, score = self.run.judge(self.run.look(new, rows), rows)
            last, settled = window, Settle(score, hit, value, fooled)
            self.run.tick(1)
        propose(NO_WINDOW)
        best.offer(index, x, fooled, value)

    def _image(self, x: Tensor) -> Tensor:
        """(B, channels, height * width)"""
        return x.reshape(len(x), self.shape.channels, -1)

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
            signs = self.dice.signs(numbers, channels * width).view(-1, channels, 1, width)
            up = (signs > 0).expand(-1, -1, height, -1).reshape(x0.shape)
            x = torch.where(up, faces[1], faces[0])
        else:  # tiles, five in a row and in a column
            tall, wide = max(height // 5, 1), max(width // 5, 1)
            down, across = height // tall, width // wide
            signs = self.dice.signs(numbers, channels * down * across).view(-1, channels, down, 1, across, 1)
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

    def _moved(self, x: Tensor, rows: Rows, query: int, share: float) -> Tensor:
        """Norms 2 and 1: the perturbation of a second window, and what is left of the radius, go into a first one."""
        norm, shape = self.run.norm, self.shape
        height, width = shape.side(share, 3)
        first, second = (
            indices(*self.dice.corner(query, k, height, width), height, width, shape).expand(-1, shape.channels, -1)
            for k in range(2)
        )
        delta = self._image(x - rows.x0)
        size = lambda t: torch.linalg.vector_norm(t, norm, 2, keepdim=True)
        used = torch.linalg.vector_norm(delta.flatten(1), norm, 1).view(-1, 1, 1)
        old = delta.gather(2, first)
        rest = delta.scatter(2, first, 0.0)
        windows = torch.linalg.vector_norm(
            torch.cat([size(old), size(rest.gather(2, second))], 2), norm, 2, keepdim=True
        )
        pattern = self._pattern(query, height, width).to(x.dtype)
        fresh = pattern * self.dice.channel_signs(query)[:, :, None].to(x.dtype) + old / size(old).clamp_min(1e-12)
        eps = rows.eps.view(-1, 1, 1) if isinstance(rows.eps, Tensor) else rows.eps
        if norm == 2:
            room = ((eps**2 - used**2).clamp_min(0) / shape.channels + windows**2).sqrt()
        else:  # more than the ball holds: the projection takes from all coordinates
            room = (eps - used).clamp_min(0) + shape.channels * windows
        fresh = fresh / size(fresh).clamp_min(1e-12) * room
        moved = rest.scatter(2, second, 0.0).scatter(2, first, fresh)
        return self._on_sphere(moved.reshape(x.shape), rows)

    def _pattern(self, query: int, height: int, width: int) -> Tensor:
        """(B, 1, height * width), turned by a quarter for some."""
        flat = bump(height, width, self.run.norm).to(self.dice.turned(query).device)
        if height == 1 or height != width:
            return flat.reshape(1, 1, -1)
        return torch.where(self.dice.turned(query)[:, None, None], flat.T.reshape(1, 1, -1), flat.reshape(1, 1, -1))
