"""The polyhedron family: distances to hyperplanes inside a box, and certificates of whole batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastrobust as fr

from .case import FLOOR, OURS, Candidate, Case, Context, Floor, Suite, Target, once, relative_difference

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def greedy(a: Tensor, b: Tensor, lower: Tensor, upper: Tensor, p: float) -> Tensor:
    """Algorithm 3.4 as one writes it in torch: clip what left the box, solve for the rest, at most 20 times."""
    if p == math.inf:
        weight, rate = a.abs(), a.sign()
    elif p == 2:
        weight, rate = a * a, a
    else:
        weight, rate = a.abs() ** (p / (p - 1.0)), a.sign() * a.abs() ** (1.0 / (p - 1.0))
    fixed = torch.zeros_like(a, dtype=torch.bool)
    d = torch.zeros_like(a)
    for _ in range(20):
        missing = b + (a * d * fixed).sum(-1)
        d = torch.where(fixed, d, -(missing / (weight * ~fixed).sum(-1).clamp_min(1e-12))[..., None] * rate)
        outside = ((d < lower) | (d > upper)) & ~fixed
        if not outside.any():
            break
        d = torch.minimum(torch.maximum(d, lower), upper)
        fixed |= outside
    return d.abs().amax(-1) if p == math.inf else torch.linalg.vector_norm(d, p, -1)


def sorted_projection(a: Tensor, b: Tensor, lower: Tensor, upper: Tensor, p: float) -> Tensor:
    """The projection of the FAB attack (Croce and Hein 2020) in torch: sort the breakpoints, accumulate, find the
    piece."""
    w, c = a.abs(), torch.where(a > 0, -lower, upper)
    if p == 1:
        w, order = w.sort(dim=-1, descending=True)
        c = c.gather(-1, order)
        gain = (w * c).cumsum(-1)
        k = torch.searchsorted(gain, b[..., None]).clamp_max(a.shape[-1] - 1)
        before = gain.gather(-1, k) - (w * c).gather(-1, k)
        cost = c.cumsum(-1).gather(-1, k) - c.gather(-1, k)
        return (cost + (b[..., None] - before) / w.gather(-1, k)).squeeze(-1)
    steps, order = (c if p == math.inf else c / w).sort(dim=-1)
    w, c = w.gather(-1, order), c.gather(-1, order)
    weight = w if p == math.inf else w * w
    used, slope = (w * c).cumsum(-1), weight.flip(-1).cumsum(-1).flip(-1)
    reached = used - w * c + steps * slope  # what is gained when the k-th coordinate meets the box
    k = torch.searchsorted(reached, b[..., None]).clamp_max(a.shape[-1] - 1)
    t = (b[..., None] - (used - w * c).gather(-1, k)) / slope.gather(-1, k)
    if p == math.inf:
        return t.squeeze(-1)
    squares = ((c * c).cumsum(-1) - c * c).gather(-1, k) + t * t * slope.gather(-1, k)
    return squares.sqrt().squeeze(-1)


def distance_inputs(context: Context, batch: int, classes: int, size: int) -> Rows:
    """Hyperplanes of `classes` other labels for each image; the box is shared by an image's rows."""
    generator = context.generator()
    x = torch.rand(batch, 1, size, generator=generator)
    a = torch.randn(batch, classes, size, generator=generator)
    b = torch.rand(batch, classes, generator=generator) * 0.1 * a.abs().sum(-1)
    a, b, lower, upper = (t.to(context.device) for t in (a, b, -x, 1 - x))
    return a, b, lower, upper


def distance_cases(context: Context) -> Iterator[Case]:
    shapes = [(2, 3, 40)] if context.level == "smoke" else [(100, 9, 3072), (100, 9, 784)]
    if context.at_least("default"):
        shapes.append((1000, 9, 3072))  # from DRAM, against the floor alone: the peers take seconds
    if context.at_least("full"):
        shapes.append((4, 9, 150_528))
    for batch, classes, size in shapes:
        inputs = once(partial(distance_inputs, context, batch, classes, size))
        for p in (math.inf, 2.0, 1.0, 3.0):
            peers: list[tuple[str, Callable[..., Tensor]]] = []
            if p in (1.0, 2.0, math.inf) and batch <= 100:
                peers.append(("FAB sort", sorted_projection))
            if p > 1 and batch <= 100:
                peers.insert(0, ("greedy torch", greedy))
            rows = batch * classes
            large = size == 3072 and p in (2.0, math.inf)
            targets = [Target(name, 50.0) for name, _ in peers] if large and context.device.type == "cpu" else []
            if large and p == math.inf:
                targets.append(Target(FLOOR, 0.4 if context.device.type == "cpu" else 0.6))

            def build(
                function: Callable[..., Any], inputs: Callable[[], Any] = inputs, p: float = p
            ) -> Callable[[], Any]:
                return partial(function, *inputs(), p)

            yield Case(
                "polyhedral_distance",
                {"rows": f"{rows}x{size}", "norm": f"L{p:g}"},
                Candidate(OURS, partial(build, fr.ops.polyhedral_distance)),
                tuple(Candidate(name, partial(build, function)) for name, function in peers),
                Floor(bytes=4 * (rows * size + 2 * batch * size + 2 * rows)),
                1e-4,
                relative_difference,
                tuple(targets),
            )


def certificate_cases(context: Context) -> Iterator[Case]:
    """One-shot certificates of a batch: the linear bounds are part of any implementation."""
    batch, size, hidden = (4, 20, 16) if context.level == "smoke" else (100, 784, 1024)

    def make() -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(context.seed)
        model = nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, 10)).to(
            context.device
        )
        x = torch.rand(batch, size, generator=context.generator()).to(context.device)
        with torch.no_grad():
            return model.eval(), x, model(x).argmax(1)

    inputs = once(make)

    def ours() -> Callable[[], Tensor]:
        model, x, y = inputs()

        def call() -> Tensor:
            with torch.no_grad():
                return fr.certify.polyhedral_envelope(model, x, y, 0.01, clip=(0, 1)).radius

        return call

    def peer() -> Callable[[], Tensor]:
        model, x, y = inputs()

        def call() -> Tensor:
            with torch.no_grad():
                bounds = fr.bounds.compute_bounds(
                    model, x, 0.01, clip=(0, 1), method="fast-lin", labels=y, return_linear=True, sides="lower"
                )
                assert bounds.linear is not None
                flat = x.flatten(1)[:, None]
                margins = bounds.linear.lower_at(x)
                found = greedy(bounds.linear.lower_A.flatten(2), margins.clamp_min(0), -flat, 1 - flat, math.inf)
                return found.amin(1).clamp_max(0.01)

        return call

    def bounds_alone() -> Callable[[], object]:
        model, x, y = inputs()

        def call() -> object:
            with torch.no_grad():
                return fr.bounds.compute_bounds(
                    model, x, 0.01, clip=(0, 1), method="fast-lin", labels=y, return_linear=True, sides="lower"
                )

        return call

    yield Case(
        "polyhedral_envelope",
        {"net": f"{size}-{hidden}-10", "batch": batch},
        Candidate(OURS, ours),
        (Candidate("greedy torch", peer),),
        Floor(part=bounds_alone, part_name="the linear bounds"),
        1e-4,
        relative_difference,
    )


def cases(context: Context) -> Iterator[Case]:
    yield from distance_cases(context)
    yield from certificate_cases(context)


SUITE = Suite("polyhedron", cases, "distances to hyperplanes inside a box, polyhedral envelope certificates")
