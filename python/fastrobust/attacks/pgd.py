"""FGSM, IFGSM and PGD (thesis section 2.1) on the fused steps."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from .._heap import keep_pages
from ..ops import _checks as ck
from . import _grid, _inputs, _trust
from ._model import Output, Victim, undisturbed, usable
from ._objective import Objective, predictions
from ._options import Clip, Fooled, Integer, Loss, ManySteps, Model, Norm, OneStep, Values
from ._run import Best, Rows, Run

if TYPE_CHECKING:
    from typing_extensions import Unpack

INF = math.inf


class AttackResult(NamedTuple):
    """``adv`` (B, ...); ``fooled`` (B,) bool and ``loss`` (B,) at ``adv``, the score that is ascended (targeted: minus the
    loss; multi-targeted: the margin of y); ``queries``: forward passes of the batch."""

    adv: Tensor
    fooled: Tensor
    loss: Tensor
    queries: int


@overload
def pgd(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[False] = False, **options: Unpack[ManySteps],
) -> Tensor: ...  # fmt: skip
@overload
def pgd(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[True], **options: Unpack[ManySteps],
) -> AttackResult: ...  # fmt: skip
@overload
def pgd(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: bool, **options: Unpack[ManySteps],
) -> Tensor | AttackResult: ...  # fmt: skip
def pgd(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: Values,
    norm: Norm = INF,
    steps: Integer = 10,
    step_size: Values | None = None,
    clip: Clip | None = (0.0, 1.0),
    loss: Loss = "ce",
    fooled: Fooled | None = None,
    targeted: bool = False,
    targets: Tensor | Integer | Literal["all"] | None = None,
    restarts: Integer = 1,
    random_start: bool = True,
    keep: Literal["last", "best"] = "last",
    early_stop: bool = False,
    normalize: tuple[Any, Any] | None = None,
    autocast: torch.dtype | None = None,
    output: Output | None = None,
    model_mode: Literal["eval", "keep"] = "eval",
    eot_samples: Integer = 1,
    mask: Any = None,
    levels: Integer | None = None,
    tolerance: float = 0.0,
    seed: Integer | None = None,
    first_example: Integer = 0,
    cuda_graph: bool = False,
    progress: bool = False,
    check: bool = True,
    return_details: bool = False,
) -> Tensor | AttackResult:
    r"""Projected gradient descent (Madry et al. 2018; thesis eq. 2.2 with random initialisation and restarts).

    Repeats ``x' = project(x + step_size * s(grad))`` from a random start of the ball; :func:`fastrobust.ops.pgd_step`
    gives the step for each norm and its exact guarantees. Only the gradient with respect to the input is computed: no
    parameter gets a gradient, no module changes mode, no running statistic moves, and the global random state is drawn
    from once (not at all with a ``seed``). Works under ``no_grad`` and ``inference_mode``.

    Args:
        model: an nn.Module or any callable from images to (B, K) logits. Half-precision weights get half inputs. It is
            given copies of the iterates, into which it may write. A DistributedDataParallel is run as its module.
        x: (B, ...) images inside ``clip``. float16/bfloat16 images are attacked in float32 and handed back in their
            dtype, rounded towards x; float64 images run the plain-torch steps.
        y: (B,) labels, or the classes to reach with ``targeted``; for a callable loss any tensor with the batch first.
            None: the model's own predictions (untargeted only).
        eps: radius: a number, (B,), or for norm inf anything that broadcasts to x; in the units of x.
        norm: inf, 2, 1 or "Linf", "L2", "L1".
        steps, step_size: iterations and their length; the default length is ``2.5 eps / steps``.
        clip: (lo, hi) of valid images, numbers or tensors that broadcast to x, or None.
        loss: "ce", "margin" (CW), "dlr", "kl" (against the clean prediction, TRADES), or a callable(outputs, y)
            giving (B,) values, or their sum or mean, to be ascended (descended with ``targeted``). A callable may be of
            any outputs: one logit, many labels, maps, numbers.
        fooled: a callable(outputs, y) giving (B,) bool: the attack has reached its goal (``targeted``: its target).
            Without it: the largest logit is not y, or for integer y of the outputs' shape a logit's sign is not y's.
            Other outputs have no such meaning: ``early_stop`` and ``return_details`` then need it.
        targeted: make the model predict y.
        targets: multi-targeted attack on the labels y: "all", a number of classes (the likeliest wrong ones on x), or a
            (B, T) tensor. Each target is a run of ``restarts``; with loss "dlr" the targeted DLR is used.
        restarts: runs from new random starts; examples fooled already sit out.
        random_start: False starts at x; loss "kl", whose gradient is zero there, within ``eps / 32`` of x.
        keep: "last" keeps the last iterate of a run, "best" the iterate with the largest loss (fooled ones first);
            between restarts the better of them is kept in the same order.
        early_stop: an example leaves the batch as soon as it is fooled. Reads one number per step from the device.
        normalize: (mean, std) applied before the model, per channel; x, eps and clip stay in image units.
        autocast: dtype for ``torch.autocast`` around the model alone.
        output: what of the model's output is attacked: a key or attribute, an index, or a callable.
        model_mode: "eval" attacks in eval mode and restores every module's flag; "keep" leaves the modes and restores
            the buffers.
        eot_samples: passes whose gradients, losses and outputs are averaged in every step, for a randomised model
            (expectation over transformation, Athalye et al. 2018).
        mask: bool, broadcasting to x: True where pixels may change. The others come back bit for bit.
        levels: results are pixels lo + k (hi - lo) / (levels - 1), 256 for 8-bit images, and x must be. The model is
            shown such pixels in every step; ball and box hold exactly.
        tolerance: values of x outside ``clip`` (or off the grid of ``levels``) by at most this are moved there first;
            the ball is around the result.
        seed: of the random starts (see :func:`fastrobust.ops.random_start`).
        first_example: number of x's first example in the data set: with a ``seed``, a set attacked in batches of any
            size gets the starts that it gets in one piece.
        cuda_graph: record a step once and replay it (CUDA, one run, keep="last", no early stop); graphs are cached on
            the model. Elsewhere it is ignored with a warning.
        progress: a tqdm bar over steps.
        check: read the values of x and y once to check them, and warn (:class:`AttackWarning`) where the attack may be
            weaker than it looks: a zero gradient, NaN, outputs after softmax, a randomised model; on a GPU this
            synchronises.
        return_details: return :class:`AttackResult` instead (one more forward pass).

    Returns:
        Adversarial examples, of x's shape and dtype. Detached.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    p = ck.parse_norm(norm)
    x0, given = _inputs.images(x)
    box = _inputs.box(clip, x0)
    grid = _levels(levels, box, x0, given)
    x0 = _inputs.into_box(x0, box, _inputs.number(tolerance, "tolerance"), grid, check)
    steps, restarts = _inputs.integer(steps, "steps", 0), _inputs.integer(restarts, "restarts", 1)
    samples = _inputs.integer(eot_samples, "eot_samples", 1)
    if keep not in ("last", "best"):
        raise ValueError(f"keep: got {keep!r}, expected 'last' or 'best'")
    targets = _inputs.check_targets(targets, x0.shape[0], x0.device)
    multi = targets is not None
    if y is None and (targeted or multi):
        raise ValueError("y: got None, expected the classes to reach (targeted) or the true labels (targets)")
    if targeted and multi:
        raise ValueError("targets: got a multi-targeted attack together with targeted=True; give the true labels in y")
    radius = _inputs.parameter(eps, "eps", x0, p)
    step = _inputs.MADRY if step_size is None else step_size
    if isinstance(step, _inputs.Share):
        length: float | Tensor = radius * (float(step) / max(steps, 1))
    else:
        length = _inputs.parameter(step, "step_size", x0, p)
    if grid is not None and check:
        _warn_below_a_level(radius, grid)
    fixed = _inputs.fixed_pixels(mask, x0)
    if fixed is not None and check and fixed.numel() and bool(fixed.all()):
        raise ValueError("mask: got no True, expected at least one pixel that may change")
    first = _inputs.integer(first_example, "first_example", 0)
    key = _inputs.check_seed(seed)
    objective = Objective(loss, targeted, multi, fooled)
    victim = Victim(model, normalize, autocast, x0, output, logits=objective.name is not None or multi)
    labels = None if y is None else _inputs.labels(y, x0, objective.name is not None or multi)
    one = restarts == 1 and not multi and keep == "last" and not early_stop
    graph = bool(cuda_graph) and _can_replay(x0, one, grid)

    if x0.is_cpu:
        keep_pages()
    with undisturbed(model, model_mode), tqdm(disable=not progress, desc="pgd", unit="step") as bar:
        x0 = usable(x0)
        run = Run(
            victim, objective, p, steps, samples, grid, track_best=keep == "best",
            compares=keep == "best" or restarts > 1 or multi,
            early_stop=early_stop, need_fooled=early_stop or return_details, check=check,
            check_labels=check and labels is not None and victim.logits, tick=bar.update if progress else _no_tick,
        )  # fmt: skip
        clean = None
        if x0.shape[0] and (labels is None or multi or objective.name == "kl"):
            with torch.no_grad():
                clean = run.model(victim, x0)
            if labels is not None:
                run.check_classes(labels, clean)
        if labels is None:
            labels = torch.zeros(0, dtype=torch.int64, device=x0.device) if clean is None else predictions(clean)
        lo, hi = (None, None) if box is None else box
        reference = clean if objective.name == "kl" else None
        rows = Rows(x0, usable(labels), reference, None, radius, length, lo, hi, fixed)
        plan = [rows]
        if multi and clean is not None:
            plan = _plan(targets, rows, clean, objective)
        bar.reset(total=restarts * len(plan) * steps)
        off = objective.name == "kl" and not random_start
        starts = _Starts(rows, p, bool(random_start) or off, 1 / 32 if off else 1.0, key, first)
        details: tuple[Tensor, Tensor] | None = None
        if x0.numel() == 0:
            adv = x0.clone()
            details = (torch.zeros(x0.shape[0], dtype=torch.bool, device=x0.device), x0.new_zeros(x0.shape[0]))
        elif one:
            adv = run.plain(starts.draw(0), rows, graph)
            if return_details:
                hit, value = run.evaluate(adv, rows)
                details = (hit, value)
        else:
            best = _search(run, plan * restarts, starts)
            adv, details = best.x, (best.fooled, best.loss)
        if check:
            run.report(adv)
    if fixed is not None:
        adv = torch.where(fixed, x0, adv)
    out = adv if given == adv.dtype else _inputs.narrow_inward(adv, x0, given)
    if return_details:
        assert details is not None
        return AttackResult(out, *details, run.queries)
    return out


def _search(run: Run, plan: list[Rows], starts: _Starts) -> Best:
    """One run after the other, each on the examples that are not fooled yet."""
    best = Best(starts.rows.x0)
    batch = len(best.x)
    for k, rows in enumerate(plan):
        index = torch.arange(batch, device=best.x.device) if k == 0 else (~best.fooled).nonzero()[:, 0]
        if len(index) == 0:
            break
        start = starts.draw(k)
        if len(index) == batch:
            run.full(start, rows, index, best)
        else:
            run.full(start[index], rows.take(index), index, best)
    return best


def _no_tick(_: int) -> None:
    return None


def _levels(levels: Any, box: Any, x: Tensor, given: torch.dtype) -> Tensor | None:
    if levels is None:
        return None
    count = _inputs.integer(levels, "levels", 2)
    if box is None or isinstance(box[0], Tensor) or not box[1] - box[0] < INF or not box[0] < box[1]:
        raise ValueError(f"clip: got {'None' if box is None else box}, expected two numbers lo < hi for levels")
    return _grid.table(count, box[0], box[1], given, x)


def _warn_below_a_level(radius: float | Tensor, grid: Tensor) -> None:
    most = radius.max().item() if isinstance(radius, Tensor) and radius.numel() else radius
    level = (grid[1:] - grid[:-1]).min().item()
    if isinstance(most, float) and 0 < most < level:
        _trust.warn(f"eps: got {most:.4g}, less than one of levels' steps, {level:.4g}: no pixel can change")


def _can_replay(x: Tensor, one: bool, grid: Tensor | None) -> bool:
    """Whether a step can be recorded and replayed; says why where it cannot."""
    if not one or grid is not None:
        why = "one run with keep='last', no early stop and no levels can be replayed"
    elif not _on_gpu(x):
        why = f"the images are on {x.device}"
    else:
        return True
    _trust.warn(f"cuda_graph: {why}; running eagerly", UserWarning)
    return False


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


@dataclasses.dataclass
class _Starts:
    """The starting point of each run, drawn from one seed: run k uses the key seed + k."""

    rows: Rows
    norm: float
    random: bool
    share: float  # of the radius
    seed: int | None
    first_example: int

    def draw(self, k: int) -> Tensor:
        rows = self.rows
        if not self.random:
            return rows.x0.clone()
        if self.seed is None:
            self.seed = int(torch.randint(0, 2**62, (), dtype=torch.int64).item())
        radius, key = rows.eps * self.share, (self.seed + k) % 2**64
        start = ops.random_start(rows.x0, radius, self.norm, rows.clip, key, self.first_example)
        return start if rows.fixed is None else torch.where(rows.fixed, rows.x0, start)


def _plan(targets: Any, rows: Rows, clean: Tensor, objective: Objective) -> list[Rows]:
    """One run per target: "all", a number of the likeliest wrong classes, or a (B, T) tensor."""
    classes, truth = clean.shape[1], rows.labels
    if isinstance(targets, Tensor):
        ck.check_label_values(targets, "targets", classes)
        chosen = usable(targets.detach()).long()
    else:
        count = classes - 1 if targets == "all" else min(targets, classes - 1)
        others = clean.scatter(1, truth[:, None], -math.inf)
        chosen = others.topk(count, 1).indices
    columns = [chosen[:, t].contiguous() for t in range(chosen.shape[1])]
    if objective.name == "dlr":
        return [dataclasses.replace(rows, extra=c, truth=truth) for c in columns]
    return [dataclasses.replace(rows, labels=c, truth=truth) for c in columns]


def _from_x(model: Model, x: Tensor, y: Tensor | None, options: dict[str, Any]) -> Tensor | AttackResult:
    options.setdefault("random_start", False)
    if options.get("step_size") is None:
        options["step_size"] = _inputs.Share(1.0)
    return pgd(model, x, y, **options)


@overload
def ifgsm(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[False] = False, **options: Unpack[ManySteps],
) -> Tensor: ...  # fmt: skip
@overload
def ifgsm(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[True], **options: Unpack[ManySteps],
) -> AttackResult: ...  # fmt: skip
@overload
def ifgsm(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: bool, **options: Unpack[ManySteps],
) -> Tensor | AttackResult: ...  # fmt: skip
def ifgsm(model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values, **options: Any) -> Tensor | AttackResult:
    """Iterative FGSM (Kurakin et al. 2017; thesis eq. 2.2): :func:`pgd` from x itself, with steps of ``eps / steps`` unless
    ``step_size`` is given. Options as in :func:`pgd`."""
    return _from_x(model, x, y, {"eps": eps, **options})


@overload
def fgsm(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[False] = False, **options: Unpack[OneStep],
) -> Tensor: ...  # fmt: skip
@overload
def fgsm(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: Literal[True], **options: Unpack[OneStep],
) -> AttackResult: ...  # fmt: skip
@overload
def fgsm(
    model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values,
    return_details: bool, **options: Unpack[OneStep],
) -> Tensor | AttackResult: ...  # fmt: skip
def fgsm(model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values, **options: Any) -> Tensor | AttackResult:
    r"""Fast gradient sign method (Goodfellow et al. 2015; thesis eq. 2.1): one step of length eps from x.

    For norms 2 and 1 the step is the steepest one of that length. ``random_start=True, step_size=1.25 * eps`` is the
    one-step attack of FGSM-RS. Options as in :func:`pgd`, without ``steps``.
    """
    if "steps" in options:
        raise TypeError("steps: fgsm takes one step; use ifgsm or pgd for more")
    return _from_x(model, x, y, {"eps": eps, "steps": 1, **options})
