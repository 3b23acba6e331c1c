"""Complete verification: attack, incomplete bounds, then branch and bound on ReLUs."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.attacks.pgd import pgd
from fastrobust.bounds import compute_bounds
from fastrobust.certify._branch import Chain, chain

_SLACK = 1e-7  # what a float64 bound must exceed, relative to 1 + the size of the outputs' bounds


@dataclass
class Verification:
    """``status``: one of "verified", "falsified", "unknown" an example; ``stage``: "clean", "attack", "bounds", "branch" or ""."""

    status: list[str]
    stage: list[str]
    counterexamples: Tensor
    lower: Tensor
    subproblems: Tensor
    seconds: Tensor


@torch.no_grad()
def verify(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, *, norm: Any = math.inf,
    clip: tuple[float, float] | None = (0.0, 1.0), timeout: float = 60.0, max_subproblems: int = 10000,
    batch_size: int = 64, method: str = "crown", rounding: str = "nearest", restarts: int = 2, steps: int = 20,
    iterations: int = 10, seed: int = 0,
) -> Verification:  # fmt: skip
    """Whether the prediction is y on all of the ball (cut by ``clip``).

    "falsified" comes with a counterexample inside ball and box that the model itself predicts otherwise. "verified" in stage
    "bounds" is as sound as ``compute_bounds(rounding=...)``; in stage "branch" it is computed in float64 with a slack and holds
    up to float64 rounding, whatever ``rounding`` says. Everything else is "unknown". Branch and bound covers norm inf and
    Sequentials of Linear, Conv2d, ReLU and Flatten; other models and norms end after the bounds. ``timeout``: seconds per
    example of branch and bound. x float32 or float64 on any device; ``counterexamples`` is x where there is none.
    """
    if timeout <= 0:
        raise ValueError(f"timeout: got {timeout}, expected more than 0 seconds")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if max_subproblems < 0:
        raise ValueError(f"max_subproblems: got {max_subproblems}, expected at least 0")
    n = len(x)
    status, stage = ["unknown"] * n, [""] * n
    lower = torch.full((n,), -math.inf, dtype=torch.float64)
    count, seconds = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.float64)
    found = x.detach().clone()
    inf = norm in (math.inf, "inf", "Linf")
    wrong = model(x).argmax(1) != y
    adv = pgd(
        model, x, y, eps=eps, norm=norm, clip=clip, loss="margin", targets="all", restarts=restarts, steps=steps,
        keep="best", seed=seed, check=False,
    )  # fmt: skip
    fooled = model(adv).argmax(1) != y
    for i in range(n):
        # alone, as who checks it will: a batch may round otherwise
        if wrong[i] or (fooled[i] and int(model(adv[i : i + 1]).argmax(1)) != int(y[i])):
            status[i], stage[i] = "falsified", "clean" if wrong[i] else "attack"
            found[i] = x[i] if wrong[i] else adv[i]
    left = [i for i in range(n) if status[i] == "unknown"]
    if left:
        b = compute_bounds(
            model, x[left], eps, norm=norm, clip=clip, method=method, labels=y[left], sides="lower", rounding=rounding
        ).lower  # fmt: skip
        for i, low in zip(left, b.amin(1).tolist(), strict=False):
            lower[i] = low
            if low > 0:
                status[i], stage[i] = "verified", "bounds"
    layers = chain(model) if inf else None
    for i in left if layers is not None else []:
        if status[i] == "unknown":
            start = time.monotonic()
            try:
                net = Chain(layers or [], x[i : i + 1])
            except ValueError:
                break
            status[i], low, count[i], point = _branch(
                net, model, x[i : i + 1], int(y[i]), eps, clip, start + timeout, max_subproblems, batch_size, iterations
            )
            lower[i] = max(float(lower[i]), low)
            stage[i] = "branch" if status[i] != "unknown" else ""
            seconds[i] = time.monotonic() - start
            if point is not None:
                found[i] = point[0]
    return Verification(status, stage, found, lower, count, seconds)


def _branch(
    net: Chain, model: Any, x: Tensor, y: int, eps: float, clip: Any, end: float, most: int, size: int, steps: int
) -> tuple[str, float, int, Tensor | None]:
    center = x.flatten(1).double()
    lo, hi = center - eps, center + eps
    if clip is not None:
        lo, hi = lo.clamp(min=clip[0]), hi.clamp(max=clip[1])
    base = net.root(lo, hi)
    classes = net.maps[-1].weight.shape[0]
    wide = net.maps[-1].interval(*([v.clamp(min=0) for v in base[-1]] if base else (lo, hi)))
    slack = _SLACK * (1 + max(float(w.abs().max()) for w in wide))
    worst, count = math.inf, 0
    queue = [
        (t, [v[0] for v, _ in base], [v[0] for _, v in base], [torch.zeros_like(v[0]) for v, _ in base])
        for t in range(classes) if t != y
    ]  # fmt: skip
    while queue:
        if count >= most or time.monotonic() > end:
            return "unknown", -math.inf, count, None
        part, queue = queue[-size:], queue[:-size]
        count += len(part)
        split = [torch.stack(s) for s in zip(*(p[3] for p in part), strict=False)]
        known = [
            (torch.stack(a), torch.stack(b))
            for a, b in zip(
                zip(*(p[1] for p in part), strict=False), zip(*(p[2] for p in part), strict=False), strict=False
            )
        ]
        low_x, up_x = lo.expand(len(part), -1), hi.expand(len(part), -1)
        bounds = net.intervals(low_x, up_x, known)
        # a chosen side holds on the whole subproblem
        bounds = [
            (torch.where(s > 0, a.clamp(min=0), a), torch.where(s < 0, b.clamp(max=0), b))
            for (a, b), s in zip(bounds, split, strict=False)
        ]
        spec = x.new_zeros(len(part), 1, classes, dtype=torch.float64)
        spec[:, 0, y] = 1
        for r, p in enumerate(part):
            spec[r, 0, p[0]] = -1
        best = torch.full((len(part),), -math.inf, dtype=torch.float64, device=x.device)
        alpha = [(b > -a).double() for a, b in bounds]
        beta = [torch.zeros_like(a) for a in alpha]
        for step in range(steps):
            with torch.enable_grad():
                for v in alpha + beta:
                    v.requires_grad_(True)
                low, a = net.lower(spec, low_x, up_x, bounds, len(net.maps) - 1, alpha, beta, split)
                grads = torch.autograd.grad(low.sum(), alpha + beta, allow_unused=True) if alpha else ()
            best = torch.maximum(best, low.detach()[:, 0])
            rate = 0.3 * 0.9**step
            k = len(alpha)
            new = [
                v.detach() if g is None else v.detach() + rate * g / (g.abs().amax(1, keepdim=True) + 1e-30)
                for v, g in zip(alpha + beta, grads, strict=False)
            ]
            alpha, beta = [v.clamp(0, 1) for v in new[:k]], [v.clamp(min=0) for v in new[k:]]
            if not alpha:
                break
        # the minimiser of the linear bound is a candidate
        point = torch.where(a.detach()[:, 0] > 0, low_x, up_x).to(x.dtype)
        start = x.flatten(1).expand_as(point)
        outside = (point.double() < low_x) | (point.double() > up_x)
        point = torch.where(outside, torch.nextafter(point, start), point)
        inside = ((point.double() >= low_x) & (point.double() <= up_x)).all(1)
        shown = point.reshape(-1, *x.shape[1:])
        hit = (model(shown).argmax(1) != y) & inside
        for row in hit.nonzero()[:, 0].tolist():
            point = shown[row : row + 1]
            if int(model(point).argmax(1)) != y:
                return "falsified", -math.inf, count, point
        for r, p in enumerate(part):
            if float(best[r]) > slack:
                worst = min(worst, float(best[r]))
                continue
            score = [
                torch.where((a[r] < 0) & (b[r] > 0), torch.minimum(-a[r], b[r]), -1.0) for a, b in bounds
            ]  # the triangle's smaller side
            where = max(range(len(score)), key=lambda k: float(score[k].max()), default=None)
            if where is None or float(score[where].max()) <= 0:
                return "unknown", -math.inf, count, None  # all neurons are fixed and the multipliers did not settle it
            j = int(score[where].argmax())
            for side in (1.0, -1.0):
                s = [v.clone() for v in p[3]]
                s[where][j] = side
                queue.append((p[0], [a[r] for a, _ in bounds], [b[r] for _, b in bounds], s))
    return "verified", worst, count, None
