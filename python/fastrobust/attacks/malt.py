"""MALT: targeted Auto-PGD on the classes that are nearest in the first order (arXiv 2407.02240)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from .._eager import left_to_python
from . import _inputs, _trust
from ._model import Output, undisturbed, usable
from ._objective import Objective
from ._options import Clip, Integer, Model, Norm, Ranked, Values
from ._rank import malt_order
from ._task import AttackResult, Task, read
from .apgd import apgd

if TYPE_CHECKING:
    from typing_extensions import Unpack

INF = math.inf


@overload
def malt(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Values,
    return_details: Literal[False] = False,
    **options: Unpack[Ranked],
) -> Tensor: ...
@overload
def malt(
    model: Model, x: Tensor, y: Tensor, *, eps: Values, return_details: Literal[True], **options: Unpack[Ranked]
) -> AttackResult: ...
@overload
def malt(
    model: Model, x: Tensor, y: Tensor, *, eps: Values, return_details: bool, **options: Unpack[Ranked]
) -> Tensor | AttackResult: ...
@left_to_python
def malt(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    eps: Values,
    norm: Norm = INF,
    candidates: Integer = 100,
    targets: Integer = 9,
    steps: Integer = 100,
    restarts: Integer = 1,
    loss: Literal["dlr", "margin", "ce"] = "dlr",
    clip: Clip | None = (0.0, 1.0),
    normalize: tuple[Any, Any] | None = None,
    autocast: torch.dtype | None = None,
    output: Output | None = None,
    model_mode: Literal["eval", "keep"] = "eval",
    mask: Any = None,
    tolerance: float = 0.0,
    check: bool = True,
    prepare: bool = False,
    return_details: bool = False,
    **options: Any,
) -> Tensor | AttackResult:
    r"""MALT: targeted :func:`apgd` on the few classes that a linear model would reach first.

    The ``candidates`` likeliest wrong classes c of an example are put in the order of

    .. math:: \frac{z_y - z_c}{\| \nabla_x (z_y - z_c) \|_q}, \qquad 1/p + 1/q = 1

    at x, smallest first, and the first ``targets`` of them are attacked one after the other. The order costs one
    forward and ``candidates`` backward passes (all of one graph); on models of 100 or 1000 classes its few targets do
    what all the likeliest ones do.

    Args:
        model, x, y, eps, norm, clip, normalize, autocast, output, model_mode, mask, tolerance, check, prepare: as in
            :func:`pgd`; y must be given. The order is the model's own in any case.
        candidates: classes that are put in order.
        targets: classes that are attacked.
        steps, restarts, loss: of :func:`apgd`, for each target; "dlr" is its targeted DLR loss, which needs four
            classes: with fewer the margin takes its place, and a warning says so.
        **options: ``random_start``, ``rho``, ``momentum``, ``large_radii``, ``early_stop``, ``seed``, ``first_example``
            and ``progress``, as in :func:`apgd`.
        return_details: return :class:`AttackResult` instead; ``queries`` counts the pass of the order.

    Returns:
        Of each example the point that fools the model, and else the one of the largest margin: in ball and box exactly.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    if y is None:
        raise ValueError("y: got None, expected the true labels")
    if loss not in ("dlr", "margin", "ce"):
        raise ValueError(f"loss: got {loss!r}, expected 'dlr', 'margin' or 'ce'")
    unknown = sorted(set(options) - _OF_APGD)
    if unknown:
        raise TypeError(f"malt: got an unexpected option {unknown[0]!r}")
    shared: dict[str, Any] = {
        "eps": eps, "norm": norm, "clip": clip, "normalize": normalize, "autocast": autocast, "output": output,
        "mask": mask, "tolerance": tolerance, "check": check,
    }  # fmt: skip
    task = read(model, x, y, Objective("margin", False), **shared, seed=options.get("seed"), multi=True)
    among, count = _inputs.integer(candidates, "candidates", 1), _inputs.integer(targets, "targets", 1)
    shared |= {
        "model_mode": model_mode, "steps": steps, "restarts": restarts, "prepare": prepare, "return_details": True,
        **options,
    }  # fmt: skip
    if task.x0.numel() == 0:
        found: AttackResult = apgd(model, x, y, loss="margin", targets=1, **shared)
        return found if return_details else found.adv
    with undisturbed(model, model_mode):
        chosen, classes = _order(task, count, among)
        if loss == "dlr" and classes < 4:
            if check:
                _trust.warn(f"malt: the targeted DLR loss needs 4 classes, the model has {classes}; margin instead")
            loss = "margin"
        found = apgd(model, x, y, loss=loss, targets=chosen, **shared)
    return found._replace(queries=found.queries + 1) if return_details else found.adv


_OF_APGD = {"random_start", "rho", "momentum", "large_radii", "early_stop", "seed", "first_example", "progress"}


def _order(task: Task, count: int, among: int) -> tuple[Tensor, int]:
    """The targets of each example, and the number of the model's classes."""
    assert task.labels is not None
    x, run = usable(task.x0), task.run("malt", 0)
    leaf, z = run.model(task.victim.differentiable, x)
    run.check_classes(task.labels, z)
    chosen, _ = malt_order(leaf, z, usable(task.labels), min(count, among), task.norm, among, task.fixed)
    return chosen, z.shape[1]
