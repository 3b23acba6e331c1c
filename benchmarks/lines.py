"""Lines around activations against their definition in plain torch, and whole certificates of networks that need
them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.reference import relaxations

from . import margins
from .case import OURS, Agreement, Call, Candidate, Case, Context, Floor, Target, once

SMOOTH = ("hardtanh", "sigmoid", "tanh", "arctan", "softplus", "elu", "silu", "gelu", "gelu_tanh")
TOLERANCE = 1e-5
Interval = tuple[Tensor, Tensor]


def interval(context: Context, count: int) -> Interval:
    """Centres of pre-activations and radii as intervals give them: a quarter wide, a quarter narrow."""
    rng = context.generator()
    center = torch.randn(count, generator=rng)
    radius = 0.5 * torch.randn(count, generator=rng).exp() * torch.rand(count, generator=rng) ** 2
    return (center - radius).to(context.device), (center + radius).to(context.device)


def heights(
    given: Callable[[], Interval], ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float
) -> Agreement:
    """Lines are compared by their heights at the midpoint: either of two slopes that leave the same area may be
    taken."""
    l, u = given()
    mid, (slopes, intercepts), (other_slopes, other_intercepts) = 0.5 * (l + u), ours, theirs
    reach = 1 + torch.maximum(l.abs(), u.abs())
    gaps = [
        (slopes[k] * mid + intercepts[i] - other_slopes[k] * mid - other_intercepts[i]).abs() / reach
        for i, k in ((0, 0), (1, -1))
    ]
    gap = float(torch.stack(gaps).amax())
    return Agreement(gap, gap <= tolerance, "max relative")


def lines(
    given: Callable[[], Interval], activation: str, kind: str, backward: bool, relax: Callable[..., relaxations.Lines]
) -> Call:
    l, u = given()

    def call() -> relaxations.Lines:
        if not backward:
            with torch.no_grad():
                return relax(l, u, activation, kind)
        a, b = l.detach().requires_grad_(True), u.detach().requires_grad_(True)
        found = relax(a, b, activation, kind)
        (found.slopes.sum() + found.intercepts.sum()).backward()
        return relaxations.Lines(found.slopes.detach(), found.intercepts.detach())

    return call


def lines_case(context: Context, activation: str, kind: str, count: int, backward: bool = False) -> Case:
    given = once(partial(interval, context, count))
    sides = 2 if kind == "crown" else 1
    numbers = (2 + sides + 2) * count * (3 if backward else 1)
    return Case(
        "lines and gradients" if backward else "lines",
        {"activation": activation, "kind": kind, "count": count},
        Candidate(OURS, partial(lines, given, activation, kind, backward, fr.ops.relax)),
        (Candidate("definition in torch", partial(lines, given, activation, kind, backward, relaxations.relax)),),
        Floor(bytes=4 * numbers),
        TOLERANCE,
        partial(heights, given),
        (Target("definition in torch", 10.0),) if kind == "crown" and context.level != "smoke" else (),
    )


def network(activation: type[nn.Module]) -> nn.Module:
    """The certification papers' MNIST CNN with another activation."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), activation(), nn.Conv2d(16, 32, 4, 2, 1), activation(), nn.Flatten(),
        nn.Linear(1568, 100), activation(), nn.Linear(100, 10),
    )  # fmt: skip


def never_looser(ours: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
    """Our adaptive lines leave less area than CROWN's tangents, so that bounds differ; ours must not be the lower ones
    on the whole."""
    gap = float((theirs - ours).double().mean())
    return Agreement(gap, gap <= tolerance, "mean looser by")


def whole_case(
    context: Context, name: str, activation: type[nn.Module], method: str, batch: int, backward: bool
) -> Case:
    def make() -> tuple[nn.Module, Tensor, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(context.seed)
            net = network(activation).eval().requires_grad_(backward).to(context.device)
        x = torch.rand(batch, 1, 28, 28, generator=context.generator()).to(context.device)
        return net, x, torch.randint(0, 10, (batch,), generator=context.generator()).to(context.device)

    given = once(make)

    return Case(
        f"{method} bounds and backward" if backward else f"{method} margins",
        {"model": f"CNN {name}", "batch": batch},
        Candidate(OURS, partial(margins.ours, given, 0.1, method, backward)),
        (Candidate("auto_LiRPA", partial(margins.peer, given, 0.1, method, backward)),),
        Floor(),
        1e-3,
        never_looser,
    )


def cases(context: Context) -> Iterator[Case]:
    if not context.at_least("default"):
        yield lines_case(context, "tanh", "crown", 1000)
        return
    full = context.at_least("full")
    for activation in SMOOTH if full else ("tanh", "gelu"):
        yield lines_case(context, activation, "crown", 1_000_000 if full else 20_000)
    if full:
        for activation in ("sigmoid", "gelu"):
            yield lines_case(context, activation, "parallel", 1_000_000)
        for activation in ("tanh", "gelu"):
            yield lines_case(context, activation, "crown", 1_000_000, backward=True)
        for name, layer in (("tanh", nn.Tanh), ("sigmoid", nn.Sigmoid)):
            yield whole_case(context, name, layer, "crown-ibp", 100, False)
            yield whole_case(context, name, layer, "crown-ibp", 100, True)
