"""What certificates and envelope training cost beyond the bounds that they are made of.

Both keep the rows at the input. A certificate's peer is the margins alone and the distance op on rows that are there
already; a training step's (polyhedral envelope regularisation, section 3.3.3) is the step through the margins alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastrobust as fr
from fastrobust.certify.envelope import box_around, margins_at

from . import margins
from .case import OURS, Agreement, Call, Candidate, Case, Context, Target, once, relative_difference

CERTIFICATE, STEP = 1.3, 2.0  # times what they are made of
ALONE, MARGINS_STEP = "margins plus distance", "step through the margins"
CLIP = (0.0, 1.0)

Given = Callable[[], margins.Problem]


def envelope(given: Given, eps: float, method: str) -> Call:
    net, x, y = given()

    def call() -> Tensor:
        with torch.no_grad():
            return fr.certify.polyhedral_envelope(net, x, y, eps, clip=CLIP, method=method).distances

    return call


def margins_and_distance(given: Given, eps: float, method: str) -> Call:
    net, x, y = given()
    options: dict[str, Any] = {"clip": CLIP, "method": method, "labels": y, "sides": "lower"}
    with torch.no_grad():
        linear = fr.bounds.compute_bounds(net, x, eps, return_linear=True, **options).linear
        assert linear is not None
        rows, at, (low, high) = linear.lower_A.flatten(2).contiguous(), margins_at(linear, x), box_around(x, CLIP)

    def call() -> Tensor:
        with torch.no_grad():
            fr.bounds.compute_bounds(net, x, eps, **options)
            distances = fr.ops.polyhedral_distance(rows, at, low, high, math.inf)
            assert isinstance(distances, Tensor)
            return distances

    return call


def envelope_step(given: Given, eps: float, method: str) -> Call:
    """Bounds with their rows, signed distances, and gradients of what is short of eps. Without a box, where the way
    back to the envelope always exists."""
    net, x, y = given()

    def call() -> Tensor:
        for p in net.parameters():
            p.grad = None
        found = fr.certify.polyhedral_envelope(net, x, y, eps, method=method, signed=True)
        (eps - found.distances).relu().sum().backward()
        return found.distances.detach()

    return call


def margins_step(given: Given, eps: float, method: str) -> Call:
    net, x, y = given()

    def call() -> Tensor:
        for p in net.parameters():
            p.grad = None
        low = fr.bounds.compute_bounds(net, x, eps, method=method, labels=y, sides="lower").lower
        low.sum().backward()
        return low.detach()

    return call


def other_work(ours: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
    """The two do different things; either must give finite numbers of one shape."""
    fits = ours.shape == theirs.shape and bool(ours.isfinite().all() and theirs.isfinite().all())
    return Agreement(0.0 if fits else float("inf"), fits, "other work")


def cases(context: Context, problem: Callable[..., margins.Problem], eps: dict[str, float]) -> Iterator[Case]:
    """problem(context, name, batch, grad) makes the networks of the suite."""
    if not context.at_least("default") and context.level != "smoke":
        return
    smoke, full = context.level == "smoke", context.at_least("full")
    batch = 2 if smoke else 100
    for name in ("FC1", "CNN"):
        for method in ("ibp-linear", "crown-ibp", "fast-lin", "crown") if full else ("crown-ibp", "fast-lin"):
            given = once(partial(problem, context, name, batch, False))
            yield Case(
                f"{method} polyhedral_envelope",
                {"model": name, "batch": batch},
                Candidate(OURS, partial(envelope, given, eps[name], method)),
                (Candidate(ALONE, partial(margins_and_distance, given, eps[name], method)),),
                tolerance=1e-4,
                compare=relative_difference,
                targets=() if smoke else (Target(ALONE, 1 / CERTIFICATE),),
            )
        given = once(partial(problem, context, name, batch, True))
        yield Case(
            "crown-ibp envelope and backward",
            {"model": name, "batch": batch},
            Candidate(OURS, partial(envelope_step, given, eps[name], "crown-ibp")),
            (Candidate(MARGINS_STEP, partial(margins_step, given, eps[name], "crown-ibp")),),
            compare=other_work,
            targets=() if smoke else (Target(MARGINS_STEP, 1 / STEP),),
        )
