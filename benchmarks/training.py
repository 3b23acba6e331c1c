"""Epochs of training, attacked and certified: ours, in the papers' own style, in the leanest plain PyTorch, and
auto_LiRPA's.

Everybody trains the MNIST CNN from the same weights on the same batches (noise of MNIST's size: what a step costs does
not depend on what it shows) with the same random starts, and ends with the same weights: what they differ by is
compared with the way that they went. The floor of an attacked epoch is its passes alone. Images forwards and backwards
stand beside the times.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import models
from fastrobust.training import adversarial, certified, losses
from fastrobust.training._passes import normal_start
from fastrobust.training.method import Batch, Method

from .case import OURS, Agreement, Call, Candidate, Case, Compare, Context, Floor, Suite, Target, once, tensors
from .peers import auto_lirpa
from .training_speed import BATCH, EPS, STEPS, Batches, Epoch, lean, papers

PAPERS, LEAN, PEER = "papers' style", "lean torch", "auto_LiRPA"
CERTIFIED_EPS, TRADES_BETA = 0.1, 6.0
APART = 0.1  # of the way: the sign of a gradient near zero may fall either way, in ten steps a few do
Problem = tuple[nn.Module, Batches]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def problem(context: Context) -> Problem:
    batch, count = (4, 2) if context.level == "smoke" else (BATCH, 4)
    g = context.generator()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        model = models.mnist_cnn().to(context.device)
    x = torch.rand(batch * count, 1, 28, 28, generator=g).to(context.device)
    y = torch.randint(0, 10, (batch * count,), generator=g).to(context.device)
    return model, list(zip(x.split(batch), y.split(batch), strict=True))


def ours(method: Callable[[], Method]) -> Epoch:
    return lambda model, batches: fr.training.train(model, batches, method(), epochs=1, optimizer=sgd(model))


def trades(model: nn.Module, batches: Batches, steps: int, step_size: float) -> None:
    """As its authors wrote it, from the start that ours draws."""
    optimizer = sgd(model)
    for x, y in batches:
        model.eval()
        adv = fr.ops.project(normal_start(Batch(x, y), 0.001), x, EPS)
        for _ in range(steps):
            adv = adv.detach().requires_grad_()
            loss = F.kl_div(F.log_softmax(model(adv), 1), F.softmax(model(x), 1), reduction="sum")
            (grad,) = torch.autograd.grad(loss, adv)
            adv = adv.detach() + step_size * grad.sign()
            adv = torch.clamp(torch.min(torch.max(adv, x - EPS), x + EPS), 0.0, 1.0)
        model.train()
        optimizer.zero_grad()
        logits = model(x)
        robust = F.kl_div(F.log_softmax(model(adv.detach()), 1), F.softmax(logits, 1), reduction="batchmean")
        (F.cross_entropy(logits, y) + TRADES_BETA * robust).backward()
        optimizer.step()


def lirpa(model: nn.Module, batches: Batches, method: str) -> None:
    """The worst-case loss of its bounds; the bounded module is part of the first call alone."""
    optimizer = sgd(model)
    bounds = auto_lirpa.bounded(model, batches[0][0], method)
    for x, y in batches:
        model.train()
        lower = bounds(x, y, 10, CERTIFIED_EPS)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(certified.worst_case_logits(lower, y), y).backward()
        optimizer.step()


def passes_alone(given: Callable[[], Problem], steps: int) -> Call:
    """Gradients with respect to the images, and the update's own pass."""
    start, batches = given()
    model = copy.deepcopy(start)

    def call() -> None:
        optimizer = sgd(model)
        for x, y in batches:
            for _ in range(steps):
                leaf = x.detach().requires_grad_()
                torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()

    return call


def candidate(name: str, given: Callable[[], Problem], epoch: Epoch, counted: bool = True) -> Candidate:
    """Epochs from the same weights; the result is what the weights became. Bounds do not pass through the model: an
    epoch of theirs is not counted."""
    own = once(lambda: copy.deepcopy(given()[0]))

    def build() -> Call:
        start, batches = given()
        state, model = start.state_dict(), own()

        def call() -> list[Tensor]:
            model.load_state_dict(state)
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                epoch(model, batches)
            return [p.detach() for p in model.parameters()]

        return call

    return Candidate(name, build, own if counted else None)


def same_weights(given: Callable[[], Problem]) -> Compare:
    def compare(mine: Any, theirs: Any, tolerance: float) -> Agreement:
        ends = [torch.cat([t.double().flatten() for t in tensors(w)]) for w in (mine, theirs)]
        start = torch.cat([p.detach().double().flatten() for p in given()[0].parameters()])
        way = float((ends[0] - start).norm())
        gap = float((ends[0] - ends[1]).norm()) / way if way else math.inf
        return Agreement(gap, gap <= tolerance, "weights apart, of the way they went")

    return compare


Peers = Sequence[tuple[str, Epoch]]


def cases(context: Context) -> Iterator[Case]:
    smoke = context.level == "smoke"
    given = once(partial(problem, context))
    steps = 2 if smoke else STEPS

    def in_torch(count: int, size: float) -> Peers:
        return [(name, partial(way, steps=count, step_size=size)) for name, way in ((PAPERS, papers), (LEAN, lean))]

    step = EPS / 4
    attacked: list[tuple[str, int, Callable[[], Method], Peers, dict[str, float]]] = [
        (
            f"PGD-{steps}",
            steps,
            lambda: adversarial.PGD(EPS, steps=steps),
            in_torch(steps, step),
            {PAPERS: 1.3, LEAN: 1.0},
        ),
        ("FGSM-RS", 1, lambda: adversarial.FGSMRS(EPS), in_torch(1, 1.25 * EPS), {PAPERS: 1.0, LEAN: 1.0}),
        (
            f"TRADES-{steps}",
            steps,
            lambda: losses.TRADES(EPS, steps=steps, step_size=step, beta=TRADES_BETA),
            [(PAPERS, partial(trades, steps=steps, step_size=step))],
            {PAPERS: 1.3},
        ),
    ]
    for name, count, method, peers, bars in attacked:
        yield Case(
            name,
            {"network": "MNIST CNN", "batch": len(given()[1][0][0])},
            candidate(OURS, given, ours(method)),
            tuple(candidate(title, given, epoch) for title, epoch in peers),
            Floor(part=partial(passes_alone, given, count), part_name="passes"),
            APART,
            same_weights(given),
            () if smoke else tuple(Target(*bar) for bar in bars.items()),
        )
    for name in ("ibp", "crown-ibp"):
        worst = partial(certified.WorstCase, CERTIFIED_EPS, bounds=name, clip=None)
        yield Case(
            f"{name} worst case", {"network": "MNIST CNN", "batch": len(given()[1][0][0])},
            candidate(OURS, given, ours(worst), False), (candidate(PEER, given, partial(lirpa, method=name), False),),
            Floor(), APART, same_weights(given), () if smoke else (Target(PEER, 1.0 if name == "ibp" else 4.0),),
        )  # fmt: skip


SUITE = Suite(
    "training", cases, "epochs of attacked and certified training, against plain PyTorch and auto_LiRPA", default=False
)
