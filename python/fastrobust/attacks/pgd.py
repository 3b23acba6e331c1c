"""FGSM, IFGSM and PGD (thesis section 2.1) on the fused steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._eager import left_to_python
from .._heap import keep_pages
from . import _inputs, _trust
from ._model import Output, undisturbed, usable
from ._objective import Objective
from ._options import Clip, Fooled, Integer, Loss, ManySteps, Model, Norm, OneStep, Values
from ._run import Best, search
from ._task import AttackResult, no_tick, plan, read

if TYPE_CHECKING:
    from typing_extensions import Unpack

INF = math.inf


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
@left_to_python
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
    first_example: Any = 0,
    cuda_graph: bool = False,
    progress: bool = False,
    check: bool = True,
    prepare: bool = False,
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
        first_example: number of x's first example in the data set, or (B,) the numbers of all: with a ``seed``, a set
            attacked in batches of any size gets the starts that it gets in one piece.
        cuda_graph: record a step once and replay it (CUDA, one run, keep="last", no early stop); graphs are cached on
            the model. Elsewhere it is ignored with a warning.
        progress: a tqdm bar over steps.
        check: read the values of x and y once to check them, and warn (:class:`AttackWarning`) where the attack may be
            weaker than it looks: a zero gradient, NaN, outputs after softmax, a randomised model; on a GPU this
            synchronises.
        prepare: search on the model as :func:`prepare` makes it ready; what that is is measured in the first attack on
            a model, in seconds, and kept with it. What is fooled in the details is the model's own verdict.
        return_details: return :class:`AttackResult` instead (one more forward pass).

    Returns:
        Adversarial examples, of x's shape and dtype. Detached.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    multi = targets is not None
    objective = Objective(loss, targeted, multi, fooled)
    task = read(
        model, x, y, objective, eps=eps, norm=norm, clip=clip, normalize=normalize, autocast=autocast, output=output,
        mask=mask, levels=levels, tolerance=tolerance, seed=seed, first_example=first_example, check=check, multi=multi,
        prepare=prepare,
    )  # fmt: skip
    x0, p, radius, victim, labels = task.x0, task.norm, task.radius, task.victim, task.labels
    steps, restarts = _inputs.integer(steps, "steps", 0), _inputs.integer(restarts, "restarts", 1)
    samples = _inputs.integer(eot_samples, "eot_samples", 1)
    if keep not in ("last", "best"):
        raise ValueError(f"keep: got {keep!r}, expected 'last' or 'best'")
    targets = _inputs.check_targets(targets, x0.shape[0], x0.device)
    if y is None and (targeted or multi):
        raise ValueError("y: got None, expected the classes to reach (targeted) or the true labels (targets)")
    if targeted and multi:
        raise ValueError("targets: got a multi-targeted attack together with targeted=True; give the true labels in y")
    step = _inputs.MADRY if step_size is None else step_size
    if isinstance(step, _inputs.Share):
        length: float | Tensor = radius * (float(step) / max(steps, 1))
    else:
        length = _inputs.parameter(step, "step_size", x0, p)
    if task.grid is not None and check:
        _warn_below_a_level(radius, task.grid)
    one = restarts == 1 and not multi and keep == "last" and not early_stop
    graph = bool(cuda_graph) and _can_replay(x0, one, task.grid)

    if x0.is_cpu:
        keep_pages()
    with undisturbed(model, model_mode), tqdm(disable=not progress, desc="pgd", unit="step") as bar:
        task.x0 = x0 = usable(x0)
        run = task.run(
            "pgd", steps, samples, track_best=keep == "best", compares=keep == "best" or restarts > 1 or multi,
            early_stop=early_stop, need_fooled=early_stop or return_details, tick=bar.update if progress else no_tick,
        )  # fmt: skip
        clean = None
        if x0.shape[0] and (labels is None or multi or objective.name == "kl"):
            with torch.no_grad():
                clean = run.model(victim, x0)
            if labels is not None:
                run.check_classes(labels, clean)
        rows = task.rows(task.labels_or(clean), clean if objective.name == "kl" else None, length)
        runs = plan(targets, rows, clean, objective.name == "dlr") if multi and clean is not None else [rows]
        bar.reset(total=restarts * len(runs) * steps)
        off = objective.name == "kl" and not random_start
        starts = task.starts(rows, bool(random_start) or off, 1 / 32 if off else 1.0)
        details: tuple[Tensor, Tensor] | None = None
        if x0.numel() == 0:
            adv = x0.clone()
            details = (torch.zeros(x0.shape[0], dtype=torch.bool, device=x0.device), x0.new_zeros(x0.shape[0]))
        elif one:
            adv = run.plain(starts.draw(0), rows, graph)
            if return_details:
                details = task.verdict(run, adv, rows)
        else:
            best = search(run, run.full, runs * restarts, starts, Best(x0))
            adv, details = best.x, (best.fooled, best.loss)
            if return_details and run.victim is not victim:
                details = task.verdict(run, adv, runs[0])
        if check:
            run.report(adv)
    out = task.hand_back(adv)
    if return_details:
        assert details is not None
        return AttackResult(out, *details, run.queries)
    return out


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
@left_to_python
def ifgsm(model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values, **options: Any) -> Tensor | AttackResult:
    """Iterative FGSM (Kurakin et al. 2017; thesis eq. 2.2): :func:`pgd` from x itself, with steps of ``eps / steps``
    unless ``step_size`` is given. Options as in :func:`pgd`."""
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
@left_to_python
def fgsm(model: Model, x: Tensor, y: Tensor | None = None, *, eps: Values, **options: Any) -> Tensor | AttackResult:
    r"""Fast gradient sign method (Goodfellow et al. 2015; thesis eq. 2.1): one step of length eps from x.

    For norms 2 and 1 the step is the steepest one of that length. ``random_start=True, step_size=1.25 * eps`` is the
    one-step attack of FGSM-RS. Options as in :func:`pgd`, without ``steps``.
    """
    if "steps" in options:
        raise TypeError("steps: fgsm takes one step; use ifgsm or pgd for more")
    return _from_x(model, x, y, {"eps": eps, "steps": 1, **options})
