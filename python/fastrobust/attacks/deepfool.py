"""DeepFool: steps to the nearest linearised boundary (Moosavi-Dezfooli et al. 2016)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from .._eager import left_to_python
from .._heap import keep_pages
from . import _inputs
from ._graph import Seen
from ._model import Output, undisturbed, usable
from ._nearest import begin_near, offer_near, settle
from ._objective import Objective
from ._options import Clip, Fool, Integer, Model, Norm
from ._rank import differences, likeliest
from ._run import Best, Rows, Run
from ._task import AttackResult, no_tick, read

if TYPE_CHECKING:
    from typing_extensions import Unpack

INF = math.inf
_CROSSED = 2.0**-20  # of the logits' size, eight units of float32: on the boundary itself the first class wins


@overload
def deepfool(
    model: Model, x: Tensor, y: Tensor | None = None, *,
    return_details: Literal[False] = False, **options: Unpack[Fool],
) -> Tensor: ...  # fmt: skip
@overload
def deepfool(
    model: Model, x: Tensor, y: Tensor | None = None, *, return_details: Literal[True], **options: Unpack[Fool]
) -> AttackResult: ...
@overload
def deepfool(
    model: Model, x: Tensor, y: Tensor | None = None, *, return_details: bool, **options: Unpack[Fool]
) -> Tensor | AttackResult: ...
@left_to_python
def deepfool(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    norm: Norm = 2,
    steps: Integer = 50,
    overshoot: float = 0.02,
    candidates: Integer | None = None,
    clip: Clip | None = (0.0, 1.0),
    normalize: tuple[Any, Any] | None = None,
    autocast: torch.dtype | None = None,
    output: Output | None = None,
    model_mode: Literal["eval", "keep"] = "eval",
    mask: Any = None,
    tolerance: float = 0.0,
    progress: bool = False,
    check: bool = True,
    prepare: bool = False,
    return_details: bool = False,
) -> Tensor | AttackResult:
    r"""DeepFool (Moosavi-Dezfooli et al. 2016, algorithm 2; section 3.3 for the other norms).

    A step linearises z_k - z_y for every class k at the current point, takes the class whose hyperplane is nearest, and
    goes there and beyond it by ``overshoot``. Where there is a box, nearest is meant inside it
    (:func:`fastrobust.ops.polyhedral_distance`), so that on a linear model the first step is the answer; without one
    this is the paper's ``|f_k| / |w_k|_q``. An example leaves with the first point that fools.

    Args:
        model, x, y, clip, normalize, autocast, output, model_mode, mask, tolerance, check, prepare: as in :func:`pgd`.
            Nothing is drawn at random.
        norm: 2 (the paper's), inf or 1.
        steps: at most; one more pass judges the last point.
        overshoot: share of a step by which it goes beyond the hyperplane (eta).
        candidates: only so many classes, the likeliest wrong ones on x, are looked at (the authors' code: 9); None:
            all. Each costs a backward pass a step.
        progress: a bar over the steps.
        return_details: return :class:`AttackResult` instead; ``loss`` is minus the distance, -inf where not fooled.

    Returns:
        Of each example a point in the box that fools the model, near x, and x where there is none. The model has judged
        each point as it is handed back.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    objective = Objective("margin", False)
    task = read(
        model, x, y, objective, eps=0.0, norm=norm, clip=clip, normalize=normalize, autocast=autocast, output=output,
        mask=mask, tolerance=tolerance, check=check, prepare=prepare,
    )  # fmt: skip
    steps, beyond = _inputs.integer(steps, "steps", 1), _inputs.number(overshoot, "overshoot")
    count = None if candidates is None else _inputs.integer(candidates, "candidates", 1)
    task.radius = INF
    if task.x0.is_cpu:
        keep_pages()
    with undisturbed(model, model_mode), tqdm(disable=not progress, desc="deepfool", unit="step") as bar:
        task.x0 = usable(task.x0).contiguous()
        run = task.run("deepfool", steps, need_fooled=True, tick=bar.update if progress else no_tick)
        if task.x0.numel() == 0:
            return task.nothing() if return_details else task.nothing().adv
        clean = task.clean_outputs(run)
        rows = task.rows(task.labels_or(clean), None, INF)
        best = begin_near(run, rows, clean)
        bar.reset(total=steps)
        index = (~best.fooled).nonzero()[:, 0]
        if len(index):
            some = rows.take(index)
            classes = likeliest(clean[index], some.labels, clean.shape[1] if count is None else count)
            _walk(run, beyond, some, classes, index, best)
        if check:
            run.report(best.x[:0])  # x come back where nothing was found is no fault of eps
        return settle(task, run, best, rows, return_details)


def _walk(run: Run, overshoot: float, rows: Rows, classes: Tensor, index: Tensor, best: Best) -> None:
    """Steps from x; ``classes`` (B, C) are the candidates of each example."""
    x = rows.x0
    for k in range(run.steps + 1):
        if k == 0:  # these are not fooled: that is known
            leaf, z = run.model(run.victim.differentiable, x)
        else:
            leaf, z = run.model(run.victim.differentiable, x) if k < run.steps else (x, run.look(x, rows).outputs)
            fooled = run.objective.success(z.detach(), rows.labels, None)
            assert fooled is not None
            offer_near(best, index, x, fooled, rows, run.norm)
            if k == run.steps:
                return
            if bool(fooled.any()):
                left = (~fooled).nonzero()[:, 0]
                if not len(left):
                    run.tick(run.steps - k)
                    return
                x, index, classes, rows = x[left], index[left], classes[left], rows.take(left)
                leaf, z = run.model(run.victim.differentiable, x)  # the many backward passes are of these alone
        x = _next(run, overshoot, x, leaf, z, rows, classes)
        run.tick(1)


def _next(run: Run, overshoot: float, x: Tensor, leaf: Tensor, z: Tensor, rows: Rows, classes: Tensor) -> Tensor:
    here, shape = x.flatten(1), x.shape
    lower: Any = -INF
    upper: Any = INF
    if rows.lo is not None:
        lower, upper = _side(rows.lo, x), _side(rows.hi, x)
        lower, upper = (side.expand(shape).flatten(1) - here for side in (lower, upper))
    size = z.detach().abs().amax(1)
    nearest, gap, normal = torch.full_like(size, INF), size, here
    for c, (far, slope) in enumerate(differences(leaf, z, rows.labels, classes)):
        run.backwards += len(x)
        slope = slope if rows.fixed is None else slope.masked_fill(rows.fixed.flatten(1), 0)
        far = (far - _CROSSED * size).nan_to_num(0.0, 0.0, 0.0)
        # a row without a gradient is nowhere near
        distance = ops.polyhedral_distance(-slope, -far, lower, upper, run.norm)
        assert isinstance(distance, Tensor)
        distance = distance.nan_to_num(INF)
        less = distance < nearest if c else torch.ones_like(distance, dtype=torch.bool)
        nearest, gap = torch.where(less, distance, nearest), torch.where(less, far, gap)
        normal = torch.where(less[:, None], slope, normal)
    run.last = Seen(z.detach(), gap, normal.reshape(shape)), rows
    _, move = ops.polyhedral_distance(-normal, -gap, lower, upper, run.norm, return_point=True)
    new = (here + (1 + overshoot) * move.nan_to_num(0.0, 0.0, 0.0)).reshape(shape)
    if rows.lo is not None:
        new = torch.minimum(torch.maximum(new, _side(rows.lo, x)), _side(rows.hi, x))
    return new if rows.fixed is None else torch.where(rows.fixed, rows.x0, new)


def _side(side: Any, x: Tensor) -> Tensor:
    return side if isinstance(side, Tensor) else torch.tensor(side, dtype=x.dtype, device=x.device)
