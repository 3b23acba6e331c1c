"""Auto-PGD (Croce & Hein 2020; norm 1: Croce & Hein 2021)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from .._eager import left_to_python
from .._heap import keep_pages
from ..ops import _checks as ck
from . import _inputs
from ._ascent import Ascent, climb
from ._graph import Seen
from ._model import Output, undisturbed, usable
from ._objective import Objective
from ._options import Auto, Clip, Fooled, Integer, Loss, Model, Norm, Values
from ._run import Best, Rows, Run, search
from ._task import AttackResult, no_tick, plan, read

if TYPE_CHECKING:
    from typing_extensions import Unpack

INF = math.inf
# Norm 1: radii and shares of the steps of a run that begins in larger balls (Croce & Hein 2021, section 4.3)
_PHASES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))


@overload
def apgd(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[False] = False, **options: Unpack[Auto],
) -> Tensor: ...  # fmt: skip
@overload
def apgd(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[True], **options: Unpack[Auto],
) -> AttackResult: ...  # fmt: skip
@overload
def apgd(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: bool, **options: Unpack[Auto],
) -> Tensor | AttackResult: ...  # fmt: skip
@left_to_python
def apgd(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Values,
    norm: Norm = INF,
    steps: Integer = 100,
    loss: Loss = "ce",
    fooled: Fooled | None = None,
    targeted: bool = False,
    targets: Tensor | Integer | Literal["all"] | None = None,
    restarts: Integer = 1,
    random_start: bool = True,
    rho: float = 0.75,
    momentum: float = 0.75,
    large_radii: bool = False,
    early_stop: bool = True,
    eot_samples: Integer = 1,
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
    r"""Auto-PGD: projected gradient ascent that chooses its own steps (Croce & Hein 2020, algorithm 1).

    The first step is ``2 eps`` long. At checkpoints after 22, 41, 57, 70, 80, 87, 93 and 99 % of the steps an example's
    step is halved, and it goes back to its best point, where fewer than ``rho`` of the steps since the last checkpoint
    raised the loss, or where neither step nor best loss changed there. Each example has a step of its own, and all is
    decided on the device. :func:`fastrobust.ops.apgd_step` is one step. Norm 1 takes sparse steps of adaptive size
    (Croce & Hein 2021).

    Args:
        model, x, y, eps, norm, clip, loss, fooled, targeted, targets, normalize, autocast, output, model_mode, mask,
            tolerance, seed, first_example, check, prepare: as in :func:`pgd`. ``targets=9, loss="dlr"`` is the attack
            that AutoAttack calls APGD-T. A callable loss gives one value per example.
        steps: of a run; it makes one more pass through the model, at its start.
        restarts: runs from new random starts (for each target), points of the ball cut by the box; examples fooled
            already sit out.
        random_start: False starts at x, or within ``eps / 32`` of it for loss "kl", whose gradient is zero there.
        rho, momentum: of the paper; momentum 1 is none. Norm 1 has none.
        large_radii: norm 1 only: begin in balls of 3 and 2 eps, for 30 % of the steps each.
        early_stop: an example leaves as soon as it is fooled, one that is wrong already at once and as it is; this
            reads one number per step from the device. False goes on for the largest loss; nothing is then read.
        eot_samples: passes whose gradients, losses and outputs are averaged, for a randomised model.
        return_details: return :class:`AttackResult` instead.

    Returns:
        Of each example the point that fools the model, and else the one of largest loss: in ball and box exactly.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    targets_given = targets is not None
    objective = Objective(loss, targeted, targets_given, fooled)
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
    steps, restarts = _inputs.integer(steps, "steps", 0), _inputs.integer(restarts, "restarts", 1)
    samples = _inputs.integer(eot_samples, "eot_samples", 1)
    setting = Ascent(ck.check_number(rho, "rho", 0, 1), ck.check_number(momentum, "momentum", 0, 1))
    targets = _inputs.check_targets(targets, task.x0.shape[0], task.x0.device)
    if y is None and (targeted or targets_given):
        raise ValueError("y: got None, expected the classes to reach (targeted) or the true labels (targets)")
    if targeted and targets_given:
        raise ValueError("targets: got a multi-targeted attack together with targeted=True; give the true labels in y")
    if large_radii and task.norm != 1:
        raise ValueError(f"large_radii: got True for norm {task.norm:g}, expected norm 1")
    if task.x0.is_cpu:
        keep_pages()
    with undisturbed(model, model_mode), tqdm(disable=not progress, desc="apgd", unit="step") as bar:
        task.x0 = usable(task.x0)
        run = task.run(
            "apgd", steps, samples, early_stop=bool(early_stop), need_fooled=bool(early_stop) or return_details,
            tick=bar.update if progress else no_tick,
        )  # fmt: skip
        if task.x0.numel() == 0:
            return task.nothing() if return_details else task.nothing().adv
        clean = task.clean_outputs(run)
        rows = task.rows(task.labels_or(clean), clean if objective.name == "kl" else None, task.radius)
        runs = plan(targets, rows, clean, objective.name == "dlr") if targets_given else [rows]
        bar.reset(total=restarts * len(runs) * steps)
        off = objective.name == "kl" and not random_start
        starts = task.starts(rows, bool(random_start) or off, 1 / 32 if off else _PHASES[0][0] if large_radii else 1.0)
        starts.cut = True
        best = begin(run, runs[0], clean) if early_stop else Best(task.x0)
        runs = [r for r in runs for _ in range(restarts)]
        search(run, _climber(run, setting, bool(large_radii)), runs, starts, best)
        if check:
            run.report(best.x)
        return task.result(run, best, runs[0], return_details)


def begin(run: Run, rows: Rows, clean: Tensor) -> Best:
    """The images themselves, of which those that are wrong already are done."""
    best = Best(rows.x0)
    fooled = run.objective.success(clean, rows.labels, rows.truth)
    if fooled is not None:
        best.fooled, best.fresh = fooled, False
        seen = Seen(clean, run.objective.value(clean, rows.labels, rows.extra), rows.x0)
        best.loss = torch.where(fooled, run.judge(seen, rows)[1], best.loss)
    return best


def _climber(run: Run, setting: Ascent, large: bool) -> Callable[[Tensor, Rows, Tensor, Best], object]:
    if not large:
        return lambda x, rows, index, best: climb(run, setting, x, rows, index, best)

    def phases(x: Tensor, rows: Rows, index: Tensor, best: Best) -> None:
        steps, left = run.steps, run.steps
        for factor, share in _PHASES:
            here = dataclasses.replace(rows, eps=rows.eps * factor)
            run.steps = left if factor == 1 else min(math.ceil(share * steps), left)
            left -= run.steps
            x = ops.project(x, here.x0, here.eps, 1, here.clip)
            x = climb(run, dataclasses.replace(setting, share=None), x, here, index, best if factor == 1 else None)
        run.steps = steps

    return phases
