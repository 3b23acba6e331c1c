"""Whole PGD attacks on a small network against the attack libraries: same model, start, eps, step size and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastrobust as fr

from . import models
from .case import OURS, Agreement, Call, Candidate, Case, Compare, Context, Floor, Target, once
from .peers import art, eager, foolbox, torchattacks

STEPS = 10
# (norm, eps, step size): the usual MNIST settings
SETTINGS = ((math.inf, 0.1, 0.025), (2.0, 1.5, 0.375))
PEERS = {"eager torch": eager, "torchattacks": torchattacks, "foolbox": foolbox, "ART": art}

Problem = tuple[nn.Module, Tensor, Tensor]


def random_problem(context: Context) -> Problem:
    batch = 4 if context.level == "smoke" else 128
    images, labels = models.random_batch(context, batch)
    return models.frozen(models.small_cnn(seed=context.seed)).to(context.device), images, labels


def digits_problem(context: Context) -> Problem:
    images, labels = models.digits()
    batch, last = (4, 512) if context.level == "smoke" else (128, len(images))
    model = models.trained_cnn(images[256:last], labels[256:last], seed=context.seed)
    return models.frozen(model).to(context.device), images[:batch].to(context.device), labels[:batch].to(context.device)


def same_strength(problem: Callable[[], Problem], norm: float, eps: float) -> Compare:
    """Both results must lie in the ball and the box, and reach the same mean loss.

    Signs of gradients near zero flip with the last bit of a rounding, so after ten steps single pixels may differ
    by a step although both followed the same rule; the loss they reach does not.
    """

    def compare(ours: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
        model, images, labels = problem()
        measure = "mean loss, relative"
        losses = []
        for result in (ours, theirs):
            result = result.to(images.device)
            if result.shape != images.shape or not bool(((result >= 0) & (result <= 1)).all()):
                return Agreement(math.inf, False, "shape and box")
            sizes = (result - images).double().flatten(1).norm(p=norm, dim=1)
            # peers overshoot the ball by roundings; what counts here is that none searches a larger one
            if float(sizes.max()) > eps * (1 + 1e-5):
                return Agreement(math.inf, False, "ball")
            with torch.no_grad():
                losses.append(float(functional.cross_entropy(model(result), labels)))
        gap = abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-12)
        return Agreement(gap, gap <= tolerance, measure)

    return compare


def model_alone(problem: Callable[[], Problem]) -> Call:
    """The passes that no PGD can do without: STEPS forward passes and gradients with respect to the input."""
    model, images, labels = problem()

    def call() -> Tensor:
        gradient = images
        for _ in range(STEPS):
            leaf = images.detach().requires_grad_()
            loss = functional.cross_entropy(model(leaf), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient

    return call


def cases(context: Context) -> Iterator[Case]:
    """PGD-10 from the clean images (no random start, so that everybody starts at the same point)."""
    problems = {"random weights": random_problem, "digits": digits_problem}
    for name, make in problems.items():
        problem = once(partial(make, context))
        for norm, eps, step_size in SETTINGS:
            settings: dict[str, Any] = {"norm": norm, "eps": eps, "step_size": step_size, "steps": STEPS}

            def ours(problem: Callable[[], Problem] = problem, settings: dict[str, Any] = settings) -> Call:
                model, images, labels = problem()
                return lambda: fr.attacks.pgd(model, images, labels, random_start=False, **settings)

            def peer(
                module: object, problem: Callable[[], Problem] = problem, settings: dict[str, Any] = settings
            ) -> Call:
                model, images, labels = problem()
                return module.pgd(model, images, labels, **settings)  # type: ignore[attr-defined]

            yield Case(
                "PGD-10",
                {"norm": "Linf" if norm == math.inf else "L2", "model": name},
                Candidate(OURS, ours),
                tuple(Candidate(title, partial(peer, module)) for title, module in PEERS.items()),
                Floor(part=partial(model_alone, problem), part_name="model"),
                0.01,
                same_strength(problem, norm, eps),
                tuple(Target(title, 1.0) for title in PEERS if title != "eager torch"),
                weight=5.0,  # the model takes nine tenths of everybody's time
            )
