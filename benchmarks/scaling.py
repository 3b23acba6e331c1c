"""How times grow: batch, size of the images, depth of a network, density of a mask, threads; one curve a group of rows.

The rendered report (`fastrobust bench --report FILE.json --html OUT.html`) draws such rows as curves, of this and of
any suite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from . import binary, margins, metadata, pgd
from .case import OURS, Candidate, Case, Context, Floor, Suite, once
from .margins import Problem
from .peers import eager

PEER = "auto_LiRPA"
BATCHES = (1, 4, 16, 64, 256, 1024)
SIDES = (8, 16, 32, 64, 128, 256)
DEPTHS = (2, 4, 8, 12)
DENSITIES = (0.002, 0.01, 0.05, 0.2, 0.5, 1.0)
THREADED = (64, 3, 224, 224)  # beyond the caches
DEPTH_EPS, DEPTH_WIDTH = 0.002, 256


def step_case(context: Context, axis: str, value: int, shape: tuple[int, ...], threads: int | None = None) -> Case:
    inputs = once(partial(pgd.step_inputs, context, shape))
    return Case(
        f"pgd_step by {axis}", {"norm": "Linf", axis: value}, pgd.ours_step(inputs, math.inf, pgd.STEP, pgd.EPS),
        (
            pgd.candidate("eager torch", inputs, eager.linf_step, pgd.STEP, pgd.EPS),
            pgd.tuned(inputs, eager.tuned_linf_step, pgd.STEP, pgd.EPS),
        ),
        Floor(bytes=16 * math.prod(shape)), pgd.STEP_TOLERANCE, threads=threads, weight=0.5,
    )  # fmt: skip


def dense(context: Context, depth: int, width: int, batch: int) -> Problem:
    """``depth`` layers with weights, ReLU between them."""
    sizes = [784, *[width] * (depth - 1), 10]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        layers: list[nn.Module] = [nn.Flatten()]
        for a, b in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(a, b), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval().requires_grad_(False).to(context.device)
    x: Tensor = torch.rand(batch, 1, 28, 28, generator=context.generator()).to(context.device)
    return model, x, model(x).argmax(1)


def bound_case(
    given: Callable[[], Problem], method: str, axis: str, value: int, threads: int | None = None, peer: bool = True
) -> Case:
    options = (given, DEPTH_EPS, method, False)
    return Case(
        f"{method} margins by {axis}",
        {axis: value},
        Candidate(OURS, partial(margins.ours, *options)),
        (Candidate(PEER, partial(margins.peer, *options)),) if peer else (),
        tolerance=1e-2,
        threads=threads,
        weight=0.5,
    )


def thread_counts(context: Context) -> list[int]:
    """Powers of two up to the CPUs, and all of them."""
    cpus = metadata.usable_cpus()
    return sorted({*(2**k for k in range(cpus.bit_length()) if 2**k <= cpus), cpus})


def cases(context: Context) -> Iterator[Case]:
    smoke = context.level == "smoke"
    for batch in (1, 2, 3) if smoke else BATCHES:
        yield step_case(context, "batch", batch, (batch, 3, 8, 8) if smoke else (batch, 3, 32, 32))
    for side in (4, 8, 16) if smoke else SIDES:
        yield step_case(context, "side", side, (2 if smoke else 16, 3, side, side))
    width, batch = (8, 2) if smoke else (DEPTH_WIDTH, 16)
    for method in ("crown-ibp",) if smoke else ("ibp", "crown-ibp", "crown"):
        for depth in (2, 3, 4) if smoke else DEPTHS:
            yield bound_case(once(partial(dense, context, depth, width, batch)), method, "depth", depth)
    layer = binary.Layer(8, 8, 3, 1, 8, 0.1) if smoke else binary.LAYERS[1]
    for density in (0.1, 0.5, 1.0) if smoke else DENSITIES:
        case = binary.layer_case(context, layer._replace(density=density), 2 if smoke else 16, False, 0.5)
        yield replace(case, work="masked conv by density", targets=())
    if context.device.type != "cpu":
        return
    for threads in thread_counts(context):
        yield step_case(context, "threads", threads, (2, 3, 8, 8) if smoke else THREADED, threads)
    given = once(partial(dense, context, 3 if smoke else 6, 8 if smoke else 1024, 2 if smoke else 32))
    for threads in thread_counts(context):
        yield bound_case(given, "crown", "threads", threads, threads, peer=False)


SUITE = Suite("scaling", cases, "how times grow with batch, size, depth, density and threads; minutes", default=False)
