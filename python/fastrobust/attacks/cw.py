"""The attacks of Carlini & Wagner (2017): the smallest L2 perturbation, and PGD on their loss in the l-inf ball."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._eager import left_to_python
from .._heap import keep_pages
from . import _inputs
from ._graph import Seen
from ._model import Output, undisturbed, usable
from ._nearest import begin_near, offer_near, settle
from ._objective import Objective
from ._options import Carlini, CarliniInf, Clip, Integer, Model, Values
from ._run import Best, Rows, Run
from ._task import AttackResult, no_tick, read
from .pgd import pgd

if TYPE_CHECKING:
    from typing_extensions import Unpack

INF = math.inf


@overload
def cw_inf(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[False] = False, **options: Unpack[CarliniInf],
) -> Tensor: ...  # fmt: skip
@overload
def cw_inf(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[True], **options: Unpack[CarliniInf],
) -> AttackResult: ...  # fmt: skip
@overload
def cw_inf(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: bool, **options: Unpack[CarliniInf],
) -> Tensor | AttackResult: ...  # fmt: skip
@left_to_python
def cw_inf(model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values, **options: Any) -> Tensor | AttackResult:
    r"""C&W-inf of the tables of robust accuracy: :func:`pgd` for 30 steps on the margin loss
    ``max_{c != y} z_c - z_y`` in the ball (Wang et al. 2019, section 5.1; the loss is f_6 of Carlini & Wagner 2017,
    which Madry et al. 2018 ascend by PGD).

    Options as in :func:`pgd`, but for ``loss``; ``steps`` is 30 unless it is given.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    if "loss" in options:
        raise TypeError("loss: got one, but cw_inf is pgd on the margin loss; use pgd for another")
    options.setdefault("steps", 30)
    return pgd(model, x, y, eps=eps, loss="margin", **options)


@overload
def cw_l2(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values | None = None,
    return_details: Literal[False] = False, **options: Unpack[Carlini],
) -> Tensor: ...  # fmt: skip
@overload
def cw_l2(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values | None = None,
    return_details: Literal[True], **options: Unpack[Carlini],
) -> AttackResult: ...  # fmt: skip
@overload
def cw_l2(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values | None = None,
    return_details: bool, **options: Unpack[Carlini],
) -> Tensor | AttackResult: ...  # fmt: skip
@left_to_python
def cw_l2(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Values | None = None,
    steps: Integer = 1000,
    searches: Integer = 9,
    c: float = 1e-3,
    lr: float = 0.01,
    confidence: float = 0.0,
    targeted: bool = False,
    abort_early: bool = True,
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
    r"""The L2 attack of Carlini & Wagner (2017, sections 5 and 6): the smallest perturbation that fools.

    Adam minimises, for each example, ``|x' - x|_2^2 + c max(z_y - max_{k != y} z_k, -confidence)`` (targeted: the
    largest other logit minus that of y). Between the ``searches`` c is searched for each example: ten times as large
    until a search finds a point that fools, then by halving the interval. The box is held by projection (section 5.1.1,
    "projected gradient descent"): a change of variables by tanh has no gradient at pixels that are exactly 0 or 1,
    which most of MNIST's are.

    Args:
        model, x, y, clip, normalize, autocast, output, model_mode, mask, tolerance, check, prepare: as in :func:`pgd`.
            Nothing is drawn at random.
        eps: points further away than this in the L2 norm do not count; None: every point does.
        steps: of Adam in each search; one more pass judges the last point.
        searches: values of c tried for each example.
        c: the first value.
        lr: of Adam, in the units of x.
        confidence: by how much the wrong logit must lead (kappa).
        targeted: make the model predict y.
        abort_early: ten times in a search, an example whose cost has not fallen by a ten-thousandth since the last time
            leaves the search. The authors' code, and what follows it, asks that of the whole batch's cost.
        progress: a bar over the steps.
        return_details: return :class:`AttackResult` instead; ``loss`` is minus the L2 distance, -inf where not fooled.

    Returns:
        Of each example the nearest point found that fools the model (by ``confidence``) and lies in ball and box
        exactly, and x where there is none. The model has judged each point as it is handed back.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    objective = Objective("margin", targeted)
    task = read(
        model, x, y, objective, eps=0.0 if eps is None else eps, norm=2, clip=clip, normalize=normalize,
        autocast=autocast, output=output, mask=mask, tolerance=tolerance, check=check, prepare=prepare,
    )  # fmt: skip
    if y is None and targeted:
        raise ValueError("y: got None, expected the classes to reach (targeted)")
    steps, searches = _inputs.integer(steps, "steps", 1), _inputs.integer(searches, "searches", 1)
    setting = Setting(
        _positive(c, "c"), _positive(lr, "lr"), _inputs.number(confidence, "confidence"), bool(abort_early)
    )
    if eps is None:
        task.radius = INF
    if task.x0.is_cpu:
        keep_pages()
    with undisturbed(model, model_mode), tqdm(disable=not progress, desc="cw_l2", unit="step") as bar:
        task.x0 = usable(task.x0).contiguous()
        run = task.run("cw_l2", steps, need_fooled=True, tick=bar.update if progress else no_tick)
        if task.x0.numel() == 0:
            return task.nothing() if return_details else task.nothing().adv
        clean = task.clean_outputs(run)
        rows = task.rows(task.labels_or(clean), None, setting.lr)
        best = begin_near(run, rows, clean)
        if setting.confidence:  # leads count, not the prediction alone
            best.fooled = _leads(objective, clean, rows, setting.confidence)
            best.loss = torch.where(best.fooled, 0.0, -INF).to(best.loss.dtype)
        index = (~best.fooled).nonzero()[:, 0]
        bar.reset(total=searches * steps)
        if len(index):
            _search(run, setting, searches, rows.take(index), index, best)
        if check:
            run.report(best.x[:0])  # x come back where nothing was found is no fault of eps
        return settle(task, run, best, rows, return_details)


def _positive(value: Any, name: str) -> float:
    found = _inputs.number(value, name)
    if found == 0:
        raise ValueError(f"{name}: got {value}, expected a number > 0")
    return found


@dataclasses.dataclass
class Setting:
    c: float
    lr: float
    confidence: float
    abort_early: bool


def _leads(objective: Objective, outputs: Tensor, rows: Rows, confidence: float) -> Tensor:
    """Fooled, with the logit of y moved by ``confidence`` against the attack."""
    if confidence:
        shift = torch.full_like(outputs[:, :1], -confidence if objective.targeted else confidence)
        outputs = outputs.scatter_add(1, rows.labels[:, None], shift)
    fooled = objective.success(outputs, rows.labels, rows.truth)
    assert fooled is not None
    return fooled


def _search(run: Run, setting: Setting, searches: int, rows: Rows, index: Tensor, best: Best) -> None:
    """Values of c, one after the other, for each example."""
    low = torch.zeros(len(index), dtype=rows.x0.dtype, device=rows.x0.device)
    high, c = torch.full_like(low, INF), torch.full_like(low, setting.c)
    for _ in range(searches):
        found = _minimise(run, setting, c, rows, index, best)
        high = torch.where(found, torch.minimum(high, c), high)
        low = torch.where(found, low, torch.maximum(low, c))
        c = torch.where(high < INF, (low + high) / 2, 10 * c)


def _minimise(run: Run, setting: Setting, c: Tensor, rows: Rows, index: Tensor, best: Best) -> Tensor:
    """One run of Adam from x. Which examples it found a point for: one that fools, near or far, counts for the
    search."""
    found = torch.zeros(len(index), dtype=torch.bool, device=index.device)
    here = torch.arange(len(index), device=index.device)  # rows of this run among those of the search
    state = Adam(torch.zeros_like(rows.x0), torch.zeros_like(rows.x0))
    x, before = rows.x0, torch.full_like(c, INF)
    every, sign = max(run.steps // 10, 1), 1.0 if run.objective.targeted else -1.0
    for k in range(run.steps):
        seen = run.gradient(x, rows)
        _note(run, setting, x, seen, rows, index, here, best, found)
        loss = torch.clamp(sign * seen.value, min=-setting.confidence)
        cost = (x - rows.x0).square().flatten(1).sum(1) + c * loss
        if setting.abort_early and k % every == 0:
            # written so that a NaN cost does not keep an example
            left = (cost <= before - 1e-4 * before.abs()).nonzero()[:, 0] if k else here
            before = cost
            if len(left) < len(x):
                x, here, index, c, before = x[left], here[left], index[left], c[left], before[left]
                rows, state, loss, cost = rows.take(left), state.take(left), loss[left], cost[left]
                seen = Seen(seen.outputs[left], seen.value[left], seen.grad[left])
                if not len(left):
                    run.tick(run.steps - k)
                    return found
        weight = torch.where(loss > -setting.confidence, sign * c, 0.0)
        grad = 2 * (x - rows.x0) + _rows(weight, x) * seen.grad.nan_to_num(0.0, 0.0, 0.0)
        x = x - setting.lr * state.direction(grad, k + 1)
        if rows.lo is not None:
            x = torch.clamp(x, _tensor(rows.lo, x), _tensor(rows.hi, x))
        run.tick(1)
    _note(run, setting, x, run.look(x, rows), rows, index, here, best, found)
    return found


def _note(
    run: Run,
    setting: Setting,
    x: Tensor,
    seen: Seen,
    rows: Rows,
    index: Tensor,
    here: Tensor,
    best: Best,
    found: Tensor,
) -> None:
    fooled = _leads(run.objective, seen.outputs, rows, setting.confidence)
    found[here] = found[here] | fooled
    offer_near(best, index, x, fooled, rows, run.norm)


def _rows(values: Tensor, x: Tensor) -> Tensor:
    return values.view(-1, *[1] * (x.dim() - 1))


def _tensor(side: Any, x: Tensor) -> Tensor:
    return side if isinstance(side, Tensor) else torch.tensor(side, dtype=x.dtype, device=x.device)


@dataclasses.dataclass
class Adam:
    """Moments of the gradient (Kingma & Ba 2015): elementwise, so that an example can leave with its own."""

    first: Tensor
    second: Tensor

    def take(self, left: Tensor) -> Adam:
        return Adam(self.first[left], self.second[left])

    def direction(self, grad: Tensor, step: int) -> Tensor:
        self.first = 0.9 * self.first + 0.1 * grad
        self.second = 0.999 * self.second + 0.001 * grad.square()
        return (self.first / (1 - 0.9**step)) / ((self.second / (1 - 0.999**step)).sqrt() + 1e-8)
