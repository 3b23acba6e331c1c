"""Complete verification: incomplete bounds and attacks, then branch and bound on ReLUs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust import ops
from fastrobust._input_sets import Clip, eps_like, input_box
from fastrobust.attacks._model import undisturbed
from fastrobust.attacks.pgd import pgd
from fastrobust.bounds import SlopeSearch, compute_bounds
from fastrobust.bounds.checks import check_inputs, check_labels, check_method, check_options, clip_of
from fastrobust.bounds.engine import METHODS, Engine
from fastrobust.bounds.region import Region
from fastrobust.certify._branch import Branching, Case, Options
from fastrobust.certify._milp import Leaves, available
from fastrobust.certify._relu_network import Network, Root, Sets, Unsupported
from fastrobust.certify._subproblems import Problems

from .._eager import left_to_python

MILP = ("auto", "never", "always")
_NO_HIGHS = "highspy is not installed, so subproblems are not handed to HiGHS (pip install highspy)"


@dataclass
class Verification:
    """What :func:`verify` found for B examples.

    status: "verified", "falsified" or "unknown" an example. stage: what settled it: "clean" (the prediction on x is not
    y), "bounds", "attack", "branch", or "". counterexamples: of x's shape; x itself where there is none. lower: (B,)
    float64, a lower bound of the smallest margin z_y - z_j over the set. subproblems: (B,) int64. seconds: (B,)
    float64, of branch and bound.
    note: why a part was left out, or "".
    """

    status: list[str]
    stage: list[str]
    counterexamples: Tensor
    lower: Tensor
    subproblems: Tensor
    seconds: Tensor
    note: str = ""

    def count(self, status: str) -> int:
        """How many examples have this status."""
        return self.status.count(status)


@dataclass
class _Task:
    """The arguments, checked."""

    model: Any
    x: Tensor
    y: Tensor
    eps: float | Tensor
    norm: float
    clip: Clip
    rounding: str

    def rows(self, index: Tensor) -> _Task:
        eps = self.eps[index] if isinstance(self.eps, Tensor) and self.eps.dim() and len(self.eps) > 1 else self.eps
        clip = clip_of(self.clip, index, self.x)
        return _Task(self.model, self.x[index], self.y[index], eps, self.norm, clip, self.rounding)

    def fooled(self, points: Tensor, y: Tensor) -> Tensor:
        """(N,) whether the model predicts otherwise: by batch, and then alone, as who checks a counterexample will."""
        wrong = self.model(points).argmax(1) != y
        for i in wrong.nonzero()[:, 0].tolist():
            wrong[i] = int(self.model(points[i : i + 1]).argmax(1)) != int(y[i])
        return wrong

    def sets(self) -> Sets:
        """In float64, with the ball only where it is not the box."""
        x = self.x.double()
        eps = self.eps.double() if isinstance(self.eps, Tensor) else float(self.eps)
        low, up = input_box(x, eps, self.clip)
        radius = eps_like(eps, x)
        radius = radius.flatten(1)[:, :1] if radius.dim() > 1 else radius.expand(1, 1)
        return Sets(low, up, x, radius.expand(len(x), 1), self.norm)


@torch.no_grad()
@left_to_python
def verify(
    model: nn.Module | Callable[[Tensor], Tensor], x: Tensor, y: Tensor, eps: float | Tensor, *,
    norm: float | str = math.inf, clip: Clip = (0.0, 1.0), timeout: float = 60.0, max_subproblems: int = 1_000_000,
    method: str = "crown", rounding: str = "nearest", restarts: int = 1, steps: int = 20, iterations: int = 8,
    milp: str = "auto", batch_size: int = 512, group: int = 32, max_memory: int = 1 << 30, seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Verification:  # fmt: skip
    """Whether the prediction is y on all of {x + d : ||d||_p <= eps, x + d in clip}; complete for ReLU networks, given
    time.

    In order: the clean prediction, incomplete bounds (intervals, and ``method``), attacks (PGD on the margin, then
    towards the likeliest other classes), and branch and bound on the signs of ReLUs with multipliers for the chosen
    signs (beta-CROWN, Wang et al. 2021). "falsified" comes with a counterexample inside ball and box that the model
    itself predicts otherwise. "verified" is proven; everything else is "unknown".

    Args:
        model: a module (modes are kept, evaluation mode is used) or a callable, from (B, *shape) to (B, K) logits.
            Branch and bound needs a graph of affine layers, batch norm, sums, concatenations, average and max pooling
            with ReLUs and leaky ReLUs; for others ``note`` says why, and bounds and attacks still answer.
        x, y: (B, *shape) float32 or float64, (B,) labels.
        eps: radius: a number, (B,), or for norm inf x's shape.
        norm: inf, 2, 1 or any p >= 1; attacks serve the first three. clip: (lo, hi) of valid inputs, or None.
        timeout, max_subproblems: per example, of branch and bound; the time of a batch is shared by its subproblems.
        method: of the incomplete bounds: "crown", "alpha-crown", ... rounding: "outward" proves real arithmetic and
            every float32 evaluation order of the network, by bounds and by branches; "nearest" as ``compute_bounds``,
            while branches prove real arithmetic.
        restarts, steps, seed: of the attacks. iterations: steps of the multipliers of a subproblem.
        milp: "auto": small subproblems that the bounds do not settle go to HiGHS (highspy), norm inf only; "never";
            "always": an example goes there as a whole.
        batch_size, group: subproblems a batch, and examples that share batches.
        progress: called with the number of examples that were just settled.

    Raises ValueError or TypeError naming the argument.
    """
    if not timeout > 0:
        raise ValueError(f"timeout: got {timeout}, expected more than 0 seconds")
    for name, value, least in (
        ("max_subproblems", max_subproblems, 0), ("batch_size", batch_size, 1), ("group", group, 1),
        ("restarts", restarts, 1), ("steps", steps, 0), ("iterations", iterations, 1),
    ):  # fmt: skip
        if value < least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")
    if milp not in MILP:
        raise ValueError(f"milp: got {milp!r}, expected one of {', '.join(MILP)}")
    if milp == "always" and not available():
        raise ValueError("milp: got 'always', expected 'auto' or 'never' without highspy (pip install highspy)")
    check_options(rounding, "unstable", False, max_memory)
    method = check_method(method, METHODS)
    x, eps, p, clip = check_inputs(x, eps, norm, clip)
    if isinstance(eps, Tensor) and eps.dim() > 1 and p != math.inf:
        raise ValueError(f"eps: got shape {tuple(eps.shape)}, expected a number or (B,) for norm {p:g}")
    y = check_labels(y, len(x), x.device)
    task = _Task(model, x.detach(), y, eps.detach() if isinstance(eps, Tensor) else eps, p, clip, rounding)
    n = len(x)
    found = Verification(
        ["unknown"] * n, [""] * n, x.detach().clone(), torch.full((n,), -math.inf, dtype=torch.float64),
        torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.float64),
    )  # fmt: skip
    if not n:
        return found
    tick = progress or (lambda count: None)
    with undisturbed(model, "eval"):
        left = _clean(task, found, tick)
        left = _bounded(task, left, found, method, max_memory, tick)
        left = _attacked(task, left, found, restarts, steps, seed, tick)
        if len(left):
            options = Options(
                rows=batch_size, steps=iterations, most=max_subproblems, timeout=timeout, outward=rounding == "outward"
            )
            _branched(task, left, found, options, (method, max_memory, milp, group), tick)
    return found


def _clean(task: _Task, found: Verification, tick: Callable[[int], None]) -> Tensor:
    wrong = torch.cat([task.fooled(a, b) for a, b in zip(task.x.split(500), task.y.split(500), strict=True)])
    for i in wrong.nonzero()[:, 0].tolist():
        found.status[i], found.stage[i] = "falsified", "clean"
    tick(int(wrong.sum()))
    return (~wrong).nonzero()[:, 0]


def _bounded(
    task: _Task, left: Tensor, found: Verification, method: str, max_memory: int, tick: Callable[[int], None]
) -> Tensor:
    """Intervals first: where they suffice nothing costs less."""
    open_ = []
    for part in left.split(200):
        for kind in dict.fromkeys(("ibp", method)):
            if not len(part):
                break
            own = task.rows(part)
            low = compute_bounds(
                task.model, own.x, own.eps, norm=own.norm, clip=own.clip, method=kind, labels=own.y, sides="lower",
                rounding=own.rounding, max_memory=max_memory, **_stop(kind),
            ).lower.detach().amin(1).double().cpu()  # fmt: skip
            there = part.cpu()
            found.lower[there] = torch.maximum(found.lower[there], low)
            proven = low > 0
            for i in there[proven].tolist():
                found.status[i], found.stage[i] = "verified", "bounds"
            tick(int(proven.sum()))
            part = part[(~proven).to(part.device)]
        open_.append(part)
    return torch.cat(open_) if open_ else left


def _stop(method: str) -> dict[str, Any]:
    return {"slopes": SlopeSearch(stop=0.0)} if method == "alpha-crown" else {}


def _attacked(
    task: _Task, left: Tensor, found: Verification, restarts: int, steps: int, seed: int, tick: Callable[[int], None]
) -> Tensor:
    """PGD on the margin, then on those that stand towards the three likeliest classes."""
    if task.norm not in (1.0, 2.0, math.inf):
        return left
    for targets in (None, 3):
        if not len(left):
            break
        own = task.rows(left)
        classes = task.model(own.x[:1]).shape[1]
        adv = pgd(
            task.model,
            own.x,
            own.y,
            eps=own.eps,
            norm=own.norm,
            clip=own.clip,
            loss="margin",
            restarts=restarts,
            steps=steps,
            targets=None if targets is None else min(targets, classes - 1),
            keep="best",
            early_stop=True,
            seed=seed,
            first_example=left,
            check=False,
        )
        hit = task.fooled(adv, own.y)
        for i, point in zip(left[hit].tolist(), adv[hit], strict=True):
            found.status[i], found.stage[i] = "falsified", "attack"
            found.counterexamples[i] = point
        tick(int(hit.sum()))
        left = left[~hit]
    return left


# -- branch and bound --------------------------------------------------------------------------------------------------
def _branched(
    task: _Task,
    left: Tensor,
    found: Verification,
    options: Options,
    how: tuple[str, int, str, int],
    tick: Callable[[int], None],
) -> None:
    method, max_memory, milp, group = how
    try:
        net = Network(task.model, task.x[:1])
    except Unsupported as why:
        found.note = f"branch and bound: left out, because {why}"
        return
    notes = {_NO_HIGHS} if milp == "auto" and not available() else set()
    for part in left.split(group):
        own = task.rows(part)
        sets = own.sets()
        root = _root(net, own, sets, method, max_memory)
        begun = time.monotonic()
        cases = _group(net, own, sets, root, options, milp, tick)
        spent = time.monotonic() - begun
        for i, c in zip(part.tolist(), cases, strict=True):
            found.status[i], found.subproblems[i] = c.status, c.count
            found.seconds[i] = c.seconds if c.count else spent / len(cases)
            found.stage[i] = "branch" if c.status != "unknown" else ""
            if c.status == "verified":
                found.lower[i] = max(float(found.lower[i]), c.worst if c.worst < math.inf else 0.0)
            if c.point is not None:
                found.counterexamples[i] = c.point
    found.note = "; ".join(sorted(notes)) if "unknown" in found.status else ""


def _root(net: Network, task: _Task, sets: Sets, method: str, max_memory: int) -> Root:
    """Bounds of all neurons in float64, with the best slopes where the method has them."""
    kind = "alpha-crown" if method == "alpha-crown" else "crown"

    def bound(graph: Any) -> dict[int, tuple[Tensor, Tensor]]:
        eps = task.eps.double() if isinstance(task.eps, Tensor) else task.eps
        region = Region(sets.center, eps, task.norm, task.clip)
        engine = Engine(graph, region, kind, max_memory, False, False, False, False, "unstable", SlopeSearch())
        engine.forward(max((r.node for r in net.relus), default=0))
        return {r.before: engine.boxes[r.before].ends for r in net.relus}

    return net.root(sets, bound)


def _group(
    net: Network, task: _Task, sets: Sets, root: Root, options: Options, milp: str, tick: Callable[[int], None]
) -> list[Case]:
    problems = Problems(net, sets, root, task.y)

    def confirm(i: int, points: Tensor) -> Tensor | None:
        own = task.rows(torch.tensor([i], device=task.x.device))
        x = own.x.expand(len(points), *own.x.shape[1:])
        points = points.to(x.dtype).reshape(x.shape)
        if task.norm in (1.0, 2.0, math.inf):
            eps = (
                own.eps.expand(len(x), *own.eps.shape[1:]) if isinstance(own.eps, Tensor) and own.eps.dim() else own.eps
            )
            points = ops.project(points, x, eps, task.norm, task.clip)
        else:
            return None
        wrong = (task.model(points).argmax(1) != own.y).nonzero()[:, 0].tolist()
        for k in wrong:
            if int(task.model(points[k : k + 1]).argmax(1)) != int(own.y):
                return points[k]
        return None

    leaves = Leaves(problems, options.outward, options.timeout) if milp != "never" and available() else None
    return Branching(problems, options, confirm, leaves, milp == "always").run(tick)
