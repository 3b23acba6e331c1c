"""FGSM, IFGSM and PGD (thesis section 2.1) on the fused steps."""

from __future__ import annotations

import dataclasses
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .. import ops
from .._heap import keep_pages
from ..ops import _checks as ck
from . import _inputs
from ._model import Victim, undisturbed, usable
from ._objective import Objective
from ._run import Best, Goal, Run

INF = math.inf
Loss = str | Callable[[Tensor, Tensor], Tensor]


class AttackResult(NamedTuple):
    """``adv`` (B, ...); ``fooled`` (B,) bool and ``loss`` (B,) at ``adv``, the score that is ascended (targeted: minus the
    loss; multi-targeted: the margin of y); ``queries``: forward passes of the batch."""

    adv: Tensor
    fooled: Tensor
    loss: Tensor
    queries: int


def pgd(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor | None = None,
    *,
    eps: float | Tensor,
    norm: float | str = INF,
    steps: int = 10,
    step_size: float | Tensor | None = None,
    clip: tuple[float, float] | None = (0.0, 1.0),
    loss: Loss = "ce",
    targeted: bool = False,
    targets: Tensor | int | str | None = None,
    restarts: int = 1,
    random_start: bool = True,
    keep: str = "last",
    early_stop: bool = False,
    normalize: tuple[Any, Any] | None = None,
    autocast: torch.dtype | None = None,
    model_mode: str = "eval",
    seed: int | None = None,
    first_example: int = 0,
    cuda_graph: bool = False,
    progress: bool = False,
    check: bool = True,
    return_details: bool = False,
) -> Any:
    r"""Projected gradient descent (Madry et al. 2018; thesis eq. 2.2 with random initialisation and restarts).

    Repeats ``x' = project(x + step_size * s(grad))`` from a random start of the ball; :func:`fastrobust.ops.pgd_step`
    gives the step for each norm and its exact guarantees. Only the gradient with respect to the input is computed: no
    parameter gets a gradient, no module changes mode, no running statistic moves, and the global random state is drawn
    from once (not at all with a ``seed``). Works under ``no_grad`` and ``inference_mode``.

    Args:
        model: an nn.Module or any callable from images to (B, K) logits. Half-precision weights get half inputs.
        x: (B, ...) images inside ``clip``. float16/bfloat16 images are attacked in float32 and handed back in their
            dtype, rounded towards x; float64 images run the plain-torch steps.
        y: (B,) labels, or the classes to reach with ``targeted``. None: the model's own predictions (untargeted only).
        eps: radius: a number, (B,), or for norm inf a tensor of x's shape; in the units of x.
        norm: inf, 2, 1 or "Linf", "L2", "L1".
        steps, step_size: iterations and their length; the default length is ``2.5 eps / steps``.
        clip: (lo, hi) of valid images, or None.
        loss: "ce", "margin" (CW), "dlr", "kl" (against the clean prediction, TRADES), or a callable(logits, labels)
            giving (B,) values, to be ascended (descended with ``targeted``).
        targeted: make the model predict y.
        targets: multi-targeted attack on the labels y: "all", a number of classes (the likeliest wrong ones on x), or a
            (B, T) tensor. Each target is a run of ``restarts``; with loss "dlr" the targeted DLR is used.
        restarts: runs from new random starts; examples fooled already sit out.
        random_start: False starts at x.
        keep: "last" keeps the last iterate of a run, "best" the iterate with the largest loss (fooled ones first);
            between restarts the better of them is kept in the same order.
        early_stop: an example leaves the batch as soon as it is fooled. Reads one number per step from the device.
        normalize: (mean, std) applied before the model, per channel; x, eps and clip stay in image units.
        autocast: dtype for ``torch.autocast`` around the model alone.
        model_mode: "eval" attacks in eval mode and restores every module's flag; "keep" leaves the modes and restores the
            buffers.
        seed: of the random starts (see :func:`fastrobust.ops.random_start`).
        first_example: number of x's first example in the data set: with a ``seed``, a set attacked in batches of any
            size gets the starts that it gets in one piece.
        cuda_graph: record a step once and replay it (CUDA, one run, keep="last", no early stop); graphs are cached on the
            model. Elsewhere it is ignored with a warning.
        progress: a tqdm bar over steps.
        check: read the values of x and y once to check them, and warn of non-finite losses; on a GPU this synchronises.
        return_details: return :class:`AttackResult` instead (one more forward pass).

    Returns:
        Adversarial examples, of x's shape and dtype. Detached.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
    """
    p = ck.parse_norm(norm)
    lo, hi = ck.parse_clip(clip)
    x0, given = _inputs.images(x, lo, hi, check)
    steps, restarts = _inputs.integer(steps, "steps", 0), _inputs.integer(restarts, "restarts", 1)
    if keep not in ("last", "best"):
        raise ValueError(f"keep: got {keep!r}, expected 'last' or 'best'")
    if y is None and (targeted or targets is not None):
        raise ValueError("y: got None, expected the classes to reach (targeted) or the true labels (targets)")
    if targeted and targets is not None:
        raise ValueError("targets: got a multi-targeted attack together with targeted=True; give the true labels in y")
    eps = _inputs.parameter(eps, "eps", x0, p)
    step = _inputs.default_step(eps, steps) if step_size is None else step_size
    step = _inputs.parameter(step, "step_size", x0, p)
    seed, first_example = _inputs.check_seed(seed), _inputs.integer(first_example, "first_example", 0)
    _inputs.check_targets(targets, x0.shape[0], x0.device)
    multi = targets is not None
    objective = Objective(loss, targeted, multi)
    victim = Victim(model, normalize, autocast, x0)
    labels = None if y is None else ck.check_labels(y, "y", x0.shape[0], None, x0.device).detach()

    if x0.is_cpu:
        keep_pages()
    with undisturbed(model, model_mode), tqdm(disable=not progress, desc="pgd", unit="step") as bar:
        x0 = usable(x0)
        labels = None if labels is None else usable(labels).long()
        run = Run(
            victim, eps, step, p, None if clip is None else (lo, hi), steps, keep == "best", early_stop,
            cuda_graph=False, check_labels=check and labels is not None, tick=bar.update if progress else _no_tick,
        )  # fmt: skip
        clean = None
        if x0.shape[0] and (labels is None or multi or objective.name == "kl"):
            with torch.no_grad():
                clean = victim(x0.clone())  # a model may write into its input
            run.queries += 1
            if labels is not None:
                run.check_classes(labels, clean)
        if labels is None:
            labels = torch.zeros(0, dtype=torch.int64, device=x0.device) if clean is None else clean.argmax(1)
        goals = [Goal(labels, clean if objective.name == "kl" else None)]
        if multi and clean is not None:
            goals = _goals(targets, labels, clean, objective)
        bar.reset(total=restarts * len(goals) * steps)
        starts = _Starts(x0, eps, p, run.clip, random_start, seed, first_example)
        details: tuple[Tensor, Tensor] | None = None
        if x0.numel() == 0:
            adv = x0.clone()
            details = (torch.zeros(x0.shape[0], dtype=torch.bool, device=x0.device), x0.new_zeros(x0.shape[0]))
        elif restarts * len(goals) == 1 and keep == "last" and not early_stop:
            run.cuda_graph = cuda_graph and _on_gpu(x0)
            adv = run.plain(objective, starts.draw(0), x0, goals[0])
            if return_details:
                details = run.evaluate(objective, adv, goals[0])
        else:
            if cuda_graph:
                warnings.warn(
                    "cuda_graph: one run with keep='last' and no early stop can be replayed; running eagerly",
                    stacklevel=2,
                )
            best = Best(x0)
            for k in range(restarts * len(goals)):
                goal = goals[k % len(goals)]
                index = torch.arange(len(x0), device=x0.device) if k == 0 else (~best.fooled).nonzero()[:, 0]
                if len(index) == 0:
                    break
                start = starts.draw(k)
                if len(index) == len(x0):
                    run.full(objective, start, x0, index, goal, best)
                else:
                    run.full(objective, start[index], x0[index], index, goal.rows(index), best)
            adv, details = best.x, (best.fooled, best.loss)
    if check and run.last_loss is not None:
        _warn_non_finite(run.last_loss)
    out = adv if given == adv.dtype else _inputs.narrow_inward(adv, x0, given)
    if return_details:
        assert details is not None
        return AttackResult(out, *details, run.queries)
    return out


def _no_tick(_: int) -> None:
    return None


def _on_gpu(x: Tensor) -> bool:
    if not x.is_cuda:
        warnings.warn(f"cuda_graph: the images are on {x.device}; running eagerly", stacklevel=3)
    return x.is_cuda


def _warn_non_finite(loss: Tensor) -> None:
    bad = int((~torch.isfinite(loss)).sum().item())
    if bad:
        warnings.warn(
            f"pgd: the loss of {bad} of {loss.numel()} examples was not finite in the last step; "
            "NaN gradient coordinates did not move, so the attack is weaker than it looks",
            stacklevel=3,
        )


@dataclasses.dataclass
class _Starts:
    """The starting point of each run, drawn from one seed: run k uses the key seed + k."""

    x0: Tensor
    eps: float | Tensor
    norm: float
    clip: tuple[float, float] | None
    random: bool
    seed: int | None
    first_example: int

    def draw(self, k: int) -> Tensor:
        if not self.random:
            return self.x0.clone()
        if self.seed is None:
            self.seed = int(torch.randint(0, 2**62, (), dtype=torch.int64).item())
        return ops.random_start(self.x0, self.eps, self.norm, self.clip, self.seed + k, self.first_example)


def _goals(targets: Any, labels: Tensor, clean: Tensor, objective: Objective) -> list[Goal]:
    """One goal per target: "all", a number of the likeliest wrong classes, or a (B, T) tensor."""
    classes = clean.shape[1]
    if isinstance(targets, Tensor):
        ck.check_label_values(targets, "targets", classes)
        plan = usable(targets.detach()).long()
    else:
        count = classes - 1 if targets == "all" else min(targets, classes - 1)
        others = clean.scatter(1, labels[:, None], -math.inf)
        plan = others.topk(count, 1).indices
    columns = [plan[:, t].contiguous() for t in range(plan.shape[1])]
    if objective.name == "dlr":
        return [Goal(labels, c, labels) for c in columns]
    return [Goal(c, None, labels) for c in columns]


def ifgsm(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None = None, *, eps: float | Tensor, **options: Any
) -> Any:
    """Iterative FGSM (Kurakin et al. 2017; thesis eq. 2.2): :func:`pgd` from x itself, with steps of ``eps / steps`` unless
    ``step_size`` is given. Options as in :func:`pgd`."""
    steps = options.setdefault("steps", 10)
    options.setdefault("random_start", False)
    if options.get("step_size") is None:
        if not isinstance(eps, (Tensor, numbers.Real)):
            raise TypeError(f"eps: got {ck.describe(eps)}, expected a number >= 0 or a tensor")
        options["step_size"] = eps / max(_inputs.integer(steps, "steps", 0), 1)
    return pgd(model, x, y, eps=eps, **options)


def fgsm(
    model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor | None = None, *, eps: float | Tensor, **options: Any
) -> Any:
    r"""Fast gradient sign method (Goodfellow et al. 2015; thesis eq. 2.1): one step of length eps from x.

    For norms 2 and 1 the step is the steepest one of that length. ``random_start=True, step_size=1.25 * eps`` is the
    one-step attack of FGSM-RS. Options as in :func:`pgd`, without ``steps``.
    """
    if "steps" in options:
        raise TypeError("steps: fgsm takes one step; use ifgsm or pgd for more")
    options.setdefault("random_start", False)
    if options.get("step_size") is None:
        options["step_size"] = eps
    return pgd(model, x, y, eps=eps, steps=1, **options)
