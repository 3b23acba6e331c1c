"""Frozen networks of other people against torch's dense network: every batch, rate and pass, losses included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

import fastrobust as fr

from .binary import norm_difference
from .case import BEST_PEER, OURS, Call, Candidate, Case, Context, Floor, Suite, Target, once
from .harness import FAILED, MET, MISSED, NOT_JUDGED, Row, Verdict
from .models_of_others import NETWORKS, WITH_ACTIVATIONS, masked, variants
from .timing import clock_for, fastest

BATCHES = (1, 8, 16, 17, 100)
RATES = (0.9, 0.95, 0.99)
GAMMA = 0.1
FORWARD, GRADIENT = "forward", "forward and input gradient"
PASSES = (FORWARD, GRADIENT)
AT_LEAST = 0.95
# Of the ratio that the same network has with ReLU.
RELU, SHARE = "the gain with ReLU", 0.8
# A ReLU whose input is zero up to rounding falls on either side: torch's own layouts differ by up to 4e-2 of the norm
# here (MobileNetV2, one image). What the formulas are is tested on small networks, away from all kinks, to 1e-4.
GRADIENT_TOLERANCE = 0.1
# network, activation, rate, batch, pass: one of each kind of trouble, and both sides of a share
DEFAULT_ROWS = (
    ("WRN-28-4", "ReLU", 0.95, 8, FORWARD),
    ("MobileNetV2", "ReLU6", 0.95, 8, FORWARD),
    ("MLP", "ReLU", 0.95, 1, FORWARD),
    ("LeNet-5", "ReLU", 0.9, 17, GRADIENT),
    ("U-Net", "ReLU", 0.95, 1, FORWARD),
    ("ResNet-18", "ReLU", 0.95, 8, FORWARD),
    ("ResNet-18", "SiLU", 0.95, 8, FORWARD),
)  # fmt: skip
QUICK = ("MLP", "LeNet-5", "MobileNetV2")
SMOKE_SHARE = "ResNet-18", "SiLU"

# What the candidates of a row share: the masked model in eval mode, and its images.
Problem = tuple[nn.Module, Tensor]


def run_of(network: Callable[[Tensor], Tensor], images: Tensor, work: str) -> Call:
    if work == FORWARD:
        return torch.no_grad()(lambda: network(images))

    def step() -> Tensor:
        given = images.detach().requires_grad_()
        return torch.autograd.grad(network(given).square().sum(), given)[0]

    return step


def in_format(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    return x.contiguous(memory_format=memory_format)


def ours(given: Callable[[], Problem], work: str) -> Call:
    """With images in the layout that suits us better, as the better of torch's two is what we are compared with."""
    model, x = given()
    frozen = fr.nn.freeze(model)
    layouts = (torch.contiguous_format, torch.channels_last)
    return fastest([run_of(frozen, in_format(x, layout), work) for layout in layouts], clock_for(x.device))


def dense(given: Callable[[], Problem], work: str, memory_format: torch.memory_format) -> Call:
    """The network with the masked weights written out, in eval mode; no parameter asks for a gradient."""
    model, x = given()
    network = fr.nn.dense_copy(model).eval().requires_grad_(False)
    network.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing from torch's stubs
    return run_of(network, in_format(x, memory_format), work)


def network_case(
    context: Context,
    name: str,
    activation: str,
    rate: float,
    batch: int,
    work: str,
    model: Callable[[], tuple[nn.Module, tuple[int, ...]]],
) -> Case:
    def problem() -> Problem:
        made, shape = model()
        x = torch.rand(batch, *shape, generator=context.generator())
        return made.to(context.device), x.to(context.device)

    given = once(problem)
    smoke = context.level == "smoke"
    return Case(
        work,
        {"network": name, "activation": activation, "r": rate, "batch": batch},
        Candidate(OURS, partial(ours, given, work)),
        (
            Candidate("dense NCHW", partial(dense, given, work, torch.contiguous_format)),
            Candidate("dense NHWC", partial(dense, given, work, torch.channels_last)),
        ),
        Floor(),
        GRADIENT_TOLERANCE if work == GRADIENT else 1e-3,
        norm_difference,
        () if smoke else (Target(BEST_PEER, AT_LEAST),),
        # A full run has many rows of little time each, a default run few.
        0.25 if context.at_least("full") else 0.5,
    )


def chosen(context: Context) -> list[tuple[str, str, float, int, str]]:
    """Rows of the level. Activations of one network come one after the other, to find the machine in the same mood."""
    if context.level == "smoke":
        rows = [(name, network.activation, 0.9, 2, PASSES[i % 2]) for i, (name, network) in enumerate(NETWORKS.items())]
        return [*rows, (*SMOKE_SHARE, 0.9, 2, rows[-1][4])]
    if not context.at_least("full"):
        return [row for row in DEFAULT_ROWS if context.at_least("default") or row[0] in QUICK]
    rows = []
    for network in dict.fromkeys(name for name, _ in variants()):
        activations = [act for name, act in variants() if name == network]
        for rate in RATES:
            rows += [(network, act, rate, batch, work) for batch in BATCHES for work in PASSES for act in activations]
    return rows


def cases(context: Context) -> Iterator[Case]:
    small = context.level == "smoke"
    models: dict[tuple[str, str, float], Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {}
    for name, activation, rate, batch, work in chosen(context):
        key = name, activation, rate
        make = once(partial(masked, *key, GAMMA, small=small, seed=context.seed))
        yield network_case(context, *key, batch, work, models.setdefault(key, make))


def gain(row: Row) -> float | None:
    """The time of torch's better layout over ours."""
    best = row.best_peer
    return best.ratio.median if best is not None and best.ratio is not None else None


def review(rows: Sequence[Row]) -> None:
    """What share of its ratio a network keeps with another activation than ReLU."""

    def key(row: Row) -> tuple[object, ...]:
        return row.work, row.axes["network"], row.axes["r"], row.axes["batch"]

    with_relu = {key(row): gain(row) for row in rows if row.axes["activation"] == "ReLU"}
    for row in rows:
        if row.axes["network"] not in WITH_ACTIVATIONS or row.axes["activation"] == "ReLU":
            continue
        ours, relu = gain(row), with_relu.get(key(row))
        share = None if ours is None or relu is None else ours / relu
        verdict = NOT_JUDGED if share is None else MET if share >= SHARE else MISSED
        if row.ours.status == FAILED:
            verdict = MISSED
        row.verdicts.append(Verdict(Target(RELU, SHARE), share, verdict))


SUITE = Suite("networks", cases, "frozen networks of other people against torch's dense network", review=review)
