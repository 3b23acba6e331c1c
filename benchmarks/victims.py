"""PGD on networks with batch normalisation: on the prepared model, on the model as it is, and torchattacks' PGD on it.

Everybody has the same weights (none asks for a gradient), images, start, radius and steps. What is prepared is measured
before the first sample, as in a second attack on the same model. At the levels below full, PGD on 128 images of the two
large networks has 1 step instead of 10: a step takes as long as the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastrobust as fr

from . import models
from .case import OURS, Call, Candidate, Case, Context, Suite, Target, once
from .models_of_others import NETWORKS, settle
from .peers import torchattacks
from .pgd_attacks import Problem, same_strength

UNPREPARED, PEER = "unprepared", "torchattacks"
NEVER_SLOWER = 0.98  # of the unprepared model: what rounds of equal work differ by
# network: (least ratio to torchattacks, eps, step size)
ROWS: dict[str, tuple[float, float, float]] = {
    "ResNet-18": (1.2, 8 / 255, 2 / 255),
    "MobileNetV2": (1.7, 8 / 255, 2 / 255),
    "MNIST CNN": (1.0, 0.1, 0.025),
}
BATCHES, STEPS, FEWER = (32, 128), 10, 1


def network(name: str, small: bool, seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    if name not in NETWORKS:
        return models.small_cnn(seed=seed).eval(), (1, 28, 28)
    of = NETWORKS[name]
    torch.manual_seed(seed)
    shape = of.small_shape if small else of.shape
    return settle(of.make(**(of.small if small else {})), shape), shape


def cases(context: Context) -> Iterator[Case]:
    small = context.level == "smoke"
    for name, (bar, eps, step_size) in ROWS.items():
        made = once(partial(network, name, small, context.seed))
        for batch in (2,) if small else BATCHES:
            large = name in NETWORKS and batch == max(BATCHES) and not context.at_least("full")
            steps = FEWER if large or small else STEPS
            options: dict[str, Any] = {"norm": math.inf, "eps": eps, "step_size": step_size, "steps": steps}

            def problem(made: Callable[[], tuple[nn.Module, tuple[int, ...]]] = made, batch: int = batch) -> Problem:
                model, shape = made()
                x: Tensor = torch.rand(batch, *shape, generator=context.generator()).to(context.device)
                model = models.frozen(model).to(context.device)
                with torch.no_grad():
                    return model, x, model(x).argmax(1)

            given = once(problem)

            def ours(prepare: bool, given: Callable[[], Problem] = given, options: dict[str, Any] = options) -> Call:
                model, x, y = given()
                return lambda: fr.attacks.pgd(model, x, y, random_start=False, prepare=prepare, **options)

            def peer(given: Callable[[], Problem] = given, options: dict[str, Any] = options) -> Call:
                return torchattacks.pgd(*given(), **options)

            yield Case(
                f"PGD-{steps}", {"network": name, "batch": batch}, Candidate(OURS, partial(ours, True)),
                (Candidate(UNPREPARED, partial(ours, False)), Candidate(PEER, peer)), tolerance=0.01,
                compare=same_strength(given, math.inf, eps),
                targets=() if small else (Target(PEER, bar), Target(UNPREPARED, NEVER_SLOWER)),
            )  # fmt: skip


SUITE = Suite(
    "victims", cases, "PGD on prepared and unprepared networks with batch normalisation; minutes", default=False
)
