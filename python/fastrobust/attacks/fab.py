"""Fast adaptive boundary attack: the smallest perturbation that fools (Croce & Hein 2020, arXiv 1907.02044)."""

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
from ..reference import pgd as reference
from . import _inputs
from ._model import Output, undisturbed, usable
from ._objective import NO_GRADIENT, Objective
from ._options import Boundary, Clip, Integer, Model, Norm, Values
from ._run import Best, Rows, Run, abreast, side_by_side
from ._task import AttackResult, Starts, no_tick, plan, read
from .apgd import begin

if TYPE_CHECKING:
    from typing_extensions import Unpack

INF = math.inf
_WIDE = {INF: 0.3, 2.0: 1.0, 1.0: 5.0}  # of random starts where neither a radius nor a distance is known


@overload
def fab(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values | None = None,
    return_details: Literal[False] = False, **options: Unpack[Boundary],
) -> Tensor: ...  # fmt: skip
@overload
def fab(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values | None = None,
    return_details: Literal[True], **options: Unpack[Boundary],
) -> AttackResult: ...  # fmt: skip
@overload
def fab(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values | None = None,
    return_details: bool, **options: Unpack[Boundary],
) -> Tensor | AttackResult: ...  # fmt: skip
@left_to_python
def fab(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Values | None = None,
    norm: Norm = INF,
    steps: Integer = 100,
    targets: Tensor | Integer | Literal["all"] | None = None,
    restarts: Integer = 1,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    early_stop: bool | None = None,
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
    r"""Fast adaptive boundary attack: looks for the smallest perturbation that changes the prediction.

    A step linearises the boundary to a class and projects the current point and x on that hyperplane, cut by the box
    (:func:`fastrobust.ops.polyhedral_distance`); the next point lies beyond both projections by ``eta``, nearer to x by
    the part ``alpha`` that their lengths give. A point that fools is noted, and the search goes on at ``beta`` of its
    distance.

    Args:
        model, x, y, norm, clip, normalize, autocast, output, model_mode, mask, tolerance, seed, first_example, check,
            prepare: as in :func:`pgd`; a point that the model itself does not fall for is no point.
        eps: points that are further away do not count; None: every point does.
        steps: of a run; one more pass judges the last point.
        targets: None linearises the boundary to every other class, a backward pass for each, and takes the nearest one;
            "all", a number of classes (the likeliest wrong ones on x) or a (B, T) tensor gives each a run with one
            backward pass a step. Success is leaving the class y by whatever road.
        restarts: runs (for each target); the first one starts at x, others at random.
        alpha_max, eta, beta: of the paper.
        early_stop: an example leaves with its first point inside ``eps``; None: where eps is given. False goes on for
            the smallest distance.
        return_details: return :class:`AttackResult` instead; ``loss`` is minus the distance, -inf where not fooled.

    Returns:
        Of each example the nearest point that fools the model and lies in ball and box exactly, and x where there is
        none.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    objective = Objective("margin", False)
    task = read(
        model, x, y, objective, eps=0.0 if eps is None else eps, norm=norm, clip=clip, normalize=normalize,
        autocast=autocast, output=output, mask=mask, tolerance=tolerance, seed=seed, first_example=first_example,
        check=check, prepare=prepare,
    )  # fmt: skip
    steps, restarts = _inputs.integer(steps, "steps", 1), _inputs.integer(restarts, "restarts", 1)
    targets = _inputs.check_targets(targets, task.x0.shape[0], task.x0.device)
    if y is None and targets is not None:
        raise ValueError("y: got None, expected the true labels (targets)")
    if isinstance(task.radius, Tensor) and task.radius.dim() > 1:
        raise ValueError(
            "eps: got one value per element, expected a number or one per example: distances have one norm"
        )
    setting = Setting(
        ck.check_number(alpha_max, "alpha_max", 0, 1),
        ck.check_number(eta, "eta", 0),
        ck.check_number(beta, "beta", 0, 1),
        eps is not None if early_stop is None else bool(early_stop),
    )
    if eps is None:
        task.radius = INF
    if task.x0.is_cpu:
        keep_pages()
    with undisturbed(model, model_mode), tqdm(disable=not progress, desc="fab", unit="step") as bar:
        task.x0 = usable(task.x0).contiguous()
        run = task.run("fab", steps, need_fooled=True, tick=bar.update if progress else no_tick)
        if task.x0.numel() == 0:
            return task.nothing() if return_details else task.nothing().adv
        clean = task.clean_outputs(run)
        rows = task.rows(task.labels_or(clean), None, 0.0)
        runs = [rows] if targets is None else plan(targets, rows, clean, True)
        bar.reset(total=restarts * len(runs) * steps)
        starts = task.starts(rows, True)
        best = begin(run, rows, clean)
        done = best.fooled.clone()
        best.loss = torch.where(done, 0.0, -INF).to(best.loss.dtype)
        climb = lambda x, rows, index, found: _hunt(run, setting, x, rows, index, found)
        # later restarts begin nearer, by what is known then
        turns = [(goal, restart) for goal in runs for restart in range(restarts)]
        k = 0
        while k < len(turns):
            index = (~(best.fooled if setting.early_stop else done)).nonzero()[:, 0]
            if not len(index):
                break
            count = abreast(len(index), len(turns) - k) if restarts == 1 else 1
            near = [
                goal.x0 if restart == 0 else _random_start(starts, best, task.radius, task.norm, k)
                for goal, restart in turns[k : k + count]
            ]
            goals = [goal for goal, _ in turns[k : k + count]]
            side_by_side(run, climb, goals, near, index, best, better=not setting.early_stop)
            k += count
        if check and run.random:
            run.report(best.x)
        return task.result(run, best, rows, return_details, scored=False)


@dataclasses.dataclass
class Setting:
    alpha_max: float
    eta: float
    beta: float
    early_stop: bool


def _random_start(starts: Starts, best: Best, radius: float | Tensor, norm: float, k: int) -> Tensor:
    """Within half of the radius, or of the distance that is known."""
    far = torch.as_tensor(radius, dtype=best.loss.dtype, device=best.loss.device).expand_as(best.loss)
    near = torch.minimum(far, -best.loss)
    return starts.within(torch.where(near < INF, near, _WIDE[norm]) / 2, k)


def _hunt(run: Run, setting: Setting, x: Tensor, rows: Rows, index: Tensor, best: Best) -> None:
    """One run from x, which offers the points that fool to ``best``."""
    for k in range(run.steps + 1):
        seen = _forward(run, x, rows)
        hits = seen.fooled.nonzero()[:, 0]
        if len(hits):
            inside, distance = _measure(x[hits], rows.take(hits), run.norm)
            best.offer(index[hits[inside]], x[hits[inside]], inside[inside], -distance[inside])
            if setting.early_stop and bool(inside.any()):
                left = torch.ones_like(seen.fooled)
                left[hits[inside]] = False
                run.leave(len(hits[inside]))
                left = left.nonzero()[:, 0]
                if len(left) and k < run.steps:
                    seen = seen.take(left)
                x, index, rows = x[left], index[left], rows.take(left)
                hits = seen.fooled.nonzero()[:, 0] if len(left) and k < run.steps else hits
        if not len(index):
            run.tick(run.steps - k)
            return
        if k == run.steps:
            return
        if len(hits):  # back towards x0, and a look at the boundary from there
            x = x.clone()
            x[hits] = rows.x0[hits] + setting.beta * (x[hits] - rows.x0[hits])
        if 3 * len(hits) > len(x):  # one pass over all costs less than one over them and one over most of them again
            gap, normal = _boundary(run, _forward(run, x, rows), rows)
        else:
            gap, normal = _boundary(run, seen, rows)
            if len(hits):
                some = rows.take(hits)
                gap[hits], normal[hits] = _boundary(run, _forward(run, x[hits], some), some)
        x = _next(x, gap, normal, rows, run.norm, setting)
        run.tick(1)


@dataclasses.dataclass
class Seen:
    """A pass that can be differentiated: ``rows`` of its leaf and outputs are still looked at."""

    leaf: Tensor
    outputs: Tensor
    fooled: Tensor
    rows: Tensor | None = None

    def take(self, left: Tensor) -> Seen:
        rows = left if self.rows is None else self.rows[left]
        return Seen(self.leaf, self.outputs, self.fooled[left], rows)


def _forward(run: Run, x: Tensor, rows: Rows) -> Seen:
    leaf, outputs = run.model(run.victim.differentiable, x)
    run.check_classes(rows.labels, outputs)
    if not outputs.requires_grad:
        raise ValueError(NO_GRADIENT)
    fooled = run.objective.success(outputs.detach(), rows.labels, rows.truth)
    assert fooled is not None
    return Seen(leaf, outputs, fooled)


def _boundary(run: Run, seen: Seen, rows: Rows) -> tuple[Tensor, Tensor]:
    """The linearised boundary: z_c - z_y (B,) and its gradient (B, n), for the target, or for the class whose boundary
    is nearest in the first order."""
    z = seen.outputs if seen.rows is None else seen.outputs[seen.rows]
    true = z.gather(1, rows.labels[:, None])
    if rows.extra is not None:
        return _difference(run, seen, z.gather(1, rows.extra[:, None]) - true, False)
    classes = torch.arange(z.shape[1] - 1, device=z.device)[None]
    others = classes + (classes >= rows.labels[:, None])
    differences = z.gather(1, others) - true
    dual = {INF: 1.0, 2.0: 2.0, 1.0: INF}[run.norm]
    gap = normal = nearest = None
    for c in range(differences.shape[1]):
        here, slope = _difference(run, seen, differences[:, c : c + 1], c + 1 < differences.shape[1])
        away = here.abs() / torch.linalg.vector_norm(slope, dual, 1).clamp_min(1e-12)
        if gap is None or normal is None or nearest is None:
            gap, normal, nearest = here, slope, away
        else:
            less = away < nearest
            gap, nearest = torch.where(less, here, gap), torch.where(less, away, nearest)
            normal = torch.where(less[:, None], slope, normal)
    assert gap is not None and normal is not None
    return gap, normal


def _difference(run: Run, seen: Seen, difference: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    (grad,) = torch.autograd.grad(difference.sum(), seen.leaf, retain_graph=again, allow_unused=True)
    if grad is None:
        raise ValueError(NO_GRADIENT)
    run.backwards += len(seen.leaf)
    grad = grad if seen.rows is None else grad[seen.rows]
    return difference.detach()[:, 0].clone(), reference.clean(grad, seen.leaf.dtype).flatten(1)


def _measure(x: Tensor, rows: Rows, norm: float) -> tuple[Tensor, Tensor]:
    """Which points lie in the ball, exactly, and how far they are."""
    distance = torch.linalg.vector_norm((x - rows.x0).flatten(1), norm, 1)
    if isinstance(rows.eps, float) and rows.eps == INF:
        return torch.ones_like(distance, dtype=torch.bool), distance
    kept = ops.project(x, rows.x0, rows.eps, norm, rows.clip) == x  # a point inside comes back bit for bit
    return kept.flatten(1).all(1), distance


def _next(x: Tensor, gap: Tensor, normal: Tensor, rows: Rows, norm: float, setting: Setting) -> Tensor:
    """Projections of x and x0 on {z_c - z_y >= 0}, linearised at x, in the box; the point beyond them."""
    if rows.fixed is not None:
        normal = normal.masked_fill(rows.fixed.flatten(1), 0)
    batch, shape = len(x), x.shape
    here, centre = x.flatten(1), rows.x0.flatten(1)
    from_centre = gap + ((centre - here).double() * normal.double()).sum(1).to(gap.dtype)
    points = torch.cat([here, centre])
    lower, upper = (side - points for side in _sides(rows, shape))
    slopes, gaps = torch.cat([normal, normal]), torch.cat([gap, from_centre]).nan_to_num(0.0, 0.0, 0.0)
    far = torch.where(gaps > 0, -1.0, 1.0).to(gaps.dtype)  # from the other side the plane is reached too
    _, moves = ops.polyhedral_distance(
        -far[:, None] * slopes, -far * gaps, lower, upper, norm, return_point=True
    )  # fmt: skip
    moves = moves.nan_to_num(0.0, 0.0, 0.0)
    length = torch.linalg.vector_norm(moves, norm, 1).clamp_min(1e-8)
    alpha = (length[:batch] / (length[:batch] + length[batch:])).clamp(0, setting.alpha_max)[:, None]
    new = (here + setting.eta * moves[:batch]) * (1 - alpha) + (centre + setting.eta * moves[batch:]) * alpha
    new = new.reshape(shape) if rows.lo is None else reference.clip_to(new.reshape(shape), rows.lo, rows.hi)
    return new if rows.fixed is None else torch.where(rows.fixed, rows.x0, new)


def _sides(rows: Rows, shape: torch.Size) -> tuple[Any, Any]:
    """Faces of the box for the points and the centres, one under the other."""
    if rows.lo is None:
        return -INF, INF
    twice = lambda side: torch.cat(2 * [side.expand(shape).flatten(1)]) if isinstance(side, Tensor) else side
    return twice(rows.lo), twice(rows.hi)
