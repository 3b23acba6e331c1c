"""Whole evaluations by several attacks beside the public AutoAttack: same model, points, radius, steps and queries.

A plain and a PGD-trained CNN of MNIST (with --full of CIFAR-10's subset, too; trained here, at the first row that needs
it), three norms; the fast version beside
the standard one; and a published provably trained network, of which bounds prove most examples before any attack. The
agreement of a row tells both robust accuracies, on how many points the verdicts are the same, and the passes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import data

from . import attack_steps, models
from .case import OURS, Agreement, Call, Candidate, Case, Compare, Context, Suite, Target, Unavailable, once
from .peers import auto_attack

PEER = "AutoAttack"
RADII = {math.inf: 0.2, 2.0: 2.0, 1.0: 10.0}
RADII_OF = {"mnist": RADII, "cifar10": {math.inf: 4 / 255, 2.0: 0.25, 1.0: 6.0}}
BARS = {"plain": 3.0, "PGD-trained": 1.3}
PROVEN_BAR, PROVEN_EPS = 10.0, 0.1
FAST_SHARE = 0.2  # of the standard version's passes, at most, where attacks have to go on to their end
LUCK = 2  # examples: different random numbers break others


class Problem(NamedTuple):
    model: nn.Module
    images: Tensor
    labels: Tensor


def images_of(context: Context, name: str, split: str, limit: int) -> tuple[Tensor, Tensor]:
    try:
        found = data.load(name, split, folder=None if context.data is None else Path(context.data), limit=limit)
    except (OSError, ValueError) as error:
        raise Unavailable(f"no {name}: {error}") from None
    return found.images.to(context.device), found.labels.to(context.device)


def trained(context: Context, name: str, robust: bool) -> nn.Module:
    """small_cnn after an epoch of Adam on 20 000 images (CIFAR-10: eight); PGD-trained: two more on PGD-7 examples,
    whose radius grows."""
    images, labels = images_of(context, name, "train", 20_000)
    model = models.small_cnn(images.shape[1], images.shape[2], seed=context.seed).to(context.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    order, eps = torch.Generator().manual_seed(context.seed), RADII_OF[name][math.inf]
    plain = 1 if name == "mnist" else 8
    steps = -(-len(images) // 128)
    for epoch in range(plain + 2 * robust):
        for k, rows in enumerate(torch.randperm(len(images), generator=order).split(128)):
            x, y = images[rows.to(context.device)], labels[rows.to(context.device)]
            if epoch >= plain:
                radius = eps * min(1.0, ((epoch - plain) * steps + k + 20) / 200)
                x = fr.attacks.pgd(model, x, y, eps=radius, steps=7, step_size=0.3 * radius, seed=k, check=False)
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
            optimiser.step()
    return models.frozen(model.eval())


def trained_problem(context: Context, name: str, robust: bool, points: int) -> Problem:
    """At the smoke level random images and weights, which need no data."""
    if context.level == "smoke":
        images, _ = models.random_batch(context, 4)
        model = models.frozen(models.small_cnn(seed=context.seed)).to(context.device)
        return Problem(model, images, model(images).argmax(1))
    return Problem(trained(context, name, robust), *images_of(context, name, "test", points))


def published_problem(context: Context, points: int) -> Problem:
    """A dense network trained by Kolter & Wong's bounds and published with the polyhedral envelopes."""
    file = Path(context.data or "") / "polyenvelope" / "relu_linf" / "mnist_fc1_l1_kw.ckpt"
    if context.data is None or not file.is_file():
        raise Unavailable(f"there is no {file.name} in the data folder")
    kept = torch.load(file, map_location="cpu", weights_only=True)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))
    place = {"1": "main_block.layer_0.layer", "3": "output.layer"}
    model.load_state_dict({f"{k}.{part}": kept[f"{v}.{part}"] for k, v in place.items() for part in ("weight", "bias")})
    return Problem(models.frozen(model.eval()).to(context.device), *images_of(context, "mnist", "test", points))


def ours(problem: Callable[[], Problem], version: Any, norm: float, eps: float, certify: bool = False) -> Call:
    model, images, labels = problem()

    def call() -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = fr.attacks.autoattack(
                model, images, labels, eps=eps, norm=norm, version=version, certify_first=certify,
                batch_size=len(images), return_details=True,
            )  # fmt: skip
        return {"adv": found.adv, "forwards": found.report.forwards, "backwards": found.report.backwards}

    return call


def same_accuracy(problem: Callable[[], Problem], norm: float, eps: float, share: float | None = None) -> Compare:
    """Both lie in ball and box, ours is not easier on the model than luck allows, and needs at most ``share`` of the
    passes."""

    def compare(mine: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> Agreement:
        model, images, labels = problem()
        held = []
        for result in (mine, theirs):
            adv = result["adv"].to(images.device)
            if adv.shape != images.shape or not bool(((adv >= 0) & (adv <= 1)).all()):
                return Agreement(math.inf, False, "shape and box")
            # the peer overshoots the ball by roundings; what counts here is that none searches a larger one
            if float((adv - images).double().flatten(1).norm(p=norm, dim=1).max()) > eps * (1 + 1e-5):
                return Agreement(math.inf, False, "ball")
            with torch.no_grad():
                held.append(model(adv).argmax(1) == labels)
        first, second = (100 * float(h.double().mean()) for h in held)
        passes = [r["forwards"] + r["backwards"] for r in (mine, theirs)]
        measure = (
            f"points of robust accuracy: {first:.1f} % and {second:.1f} %, {int((held[0] == held[1]).sum())} of "
            f"{len(labels)} "
            f"verdicts alike; forwards {mine['forwards']} and {theirs['forwards']}, backwards {mine['backwards']} and "
            f"{theirs['backwards']}"
        )
        few = share is None or passes[0] <= share * passes[1]
        return Agreement(abs(first - second), abs(first - second) <= tolerance and few, measure)

    return compare


def cases(context: Context) -> Iterator[Case]:
    smoke = context.level == "smoke"
    steps, queries = (3, 5) if smoke else (None, None)
    most = 3 if smoke or context.at_least("default") else 1  # norms
    points = {"smoke": 4, "quick": 16, "default": 32, "full": 200}[context.level]
    standard: Any = "standard"
    if smoke:
        few: dict[str, Any] = {"steps": steps}
        standard = [
            ("apgd-ce", few),
            ("apgd-t", few | {"targets": 9}),
            ("fab-t", few),
            ("square", {"queries": queries}),
        ]
    for name, kind in product(RADII_OF if context.at_least("full") else ("mnist",), BARS):
        robust = kind == "PGD-trained"
        # an undefended model is broken in a moment
        problem = once(partial(trained_problem, context, name, robust, points if robust else 2 * points))
        for norm, eps in list(RADII_OF[name].items())[:most]:
            title = kind if name == "mnist" else f"{kind}, CIFAR-10"
            axes: dict[str, str | int | float] = {"norm": auto_attack.NAMES[norm], "model": title}
            luck = 100 * LUCK / (points if robust or smoke else 2 * points)

            def peer(problem: Callable[[], Problem] = problem, norm: float = norm, eps: float = eps) -> Call:
                return auto_attack.standard(*problem(), norm=norm, eps=eps, steps=steps, queries=queries)

            yield Case(
                "standard",
                axes,
                Candidate(OURS, partial(ours, problem, standard, norm, eps)),
                (Candidate(PEER, peer),),
                tolerance=100.0 if smoke else luck,
                compare=same_accuracy(problem, norm, eps),
                targets=(Target(PEER, BARS[kind]),),
            )
            if smoke or (norm != math.inf and not context.at_least("full")):
                continue  # it is timed beside another run of the standard one
            yield Case(
                "fast",
                axes,
                Candidate(OURS, partial(ours, problem, "fast", norm, eps)),
                (Candidate("standard", partial(ours, problem, "standard", norm, eps)),),
                tolerance=luck,
                compare=same_accuracy(problem, norm, eps, FAST_SHARE if robust else None),
            )
    yield from attack_steps.cases(context)
    if not smoke:
        problem = once(partial(published_problem, context, points))

        def public() -> Call:
            return auto_attack.standard(*problem(), norm=math.inf, eps=PROVEN_EPS, steps=None, queries=None)

        yield Case(
            "certify first", {"norm": "Linf", "model": "provably trained"},
            Candidate(OURS, partial(ours, problem, "standard", math.inf, PROVEN_EPS, True)), (Candidate(PEER, public),),
            tolerance=100 * LUCK / points, compare=same_accuracy(problem, math.inf, PROVEN_EPS),
            targets=(Target(PEER, PROVEN_BAR),),
        )  # fmt: skip


SUITE = Suite(
    "attacks",
    cases,
    "whole evaluations (AutoAttack, its fast version, proofs first) of MNIST networks; minutes",
    default=False,
)
