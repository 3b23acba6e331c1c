"""A small call of every family, which gives the same bits each time: run again and again, by several threads, in forked
processes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastrobust as fr

Job = Callable[[], list[Tensor]]


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 12),
        nn.ReLU(),
        nn.Linear(12, 5),
    ).eval()


def jobs() -> dict[str, Job]:
    """By name. All share one network, as a user's calls do."""
    model, masked = network(), fr.nn.convert(network(), 0.5, 0.5).eval()
    frozen = fr.nn.freeze(masked)
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(6, 1, 8, 8, generator=g), torch.tensor([0, 1, 2, 3, 4, 0])
    direction = torch.randn(x.shape, generator=g)
    rows, offsets = torch.randn(30, 64, generator=g), torch.randn(30, generator=g)
    box = -torch.rand(30, 64, generator=g), torch.rand(30, 64, generator=g)
    given: dict[str, Any] = {"eps": 0.1, "seed": 0}

    def bounds(method: str, **options: Any) -> Job:
        def run() -> list[Tensor]:
            found = fr.bounds.compute_bounds(model, x, 0.05, method=method, labels=y, **options)
            ends = [e for e in (found.lower, found.upper) if e is not None]
            return [*(e.detach() for e in ends), *torch.autograd.grad(ends[0].square().sum(), [*model.parameters()])]

        return run

    def network_of(net: Callable[[Tensor], Tensor]) -> Job:
        def run() -> list[Tensor]:
            leaf = x.clone().requires_grad_()
            z = net(leaf)
            return [z.detach(), *torch.autograd.grad(z.square().sum(), leaf)]

        return run

    def call(f: Callable[..., Any], *args: Any, **options: Any) -> Job:
        return lambda: [t for t in tree_leaves(f(*args, **options)) if isinstance(t, Tensor)]

    def envelope() -> list[Tensor]:
        found = fr.certify.polyhedral_envelope(model, x, y, 0.05, norm=2, clip=(0, 1))
        return [t for t in vars(found).values() if isinstance(t, Tensor)]

    a, o = fr.attacks, fr.ops
    return {
        "steps": call(lambda: [o.pgd_step(x, x, direction, 0.1, 0.3, norm) for norm in (math.inf, 2, 1)]),
        "start": call(o.random_start, x, 0.1, seed=4),
        "loss": call(lambda: tuple(o.cross_entropy(x.flatten(1)[:, :9], y))),
        "shift": call(o.shift_flip, x, torch.tensor([[1, -2], [0, 0], [9, 0], [-1, 1], [2, 2], [0, -1]]), y > 1),
        "store": call(o.store_gather, direction, torch.arange(6), x, 0.1),
        "pgd": call(a.pgd, model, x, y, steps=3, norm=2, **given),
        "apgd": call(a.apgd, model, x, y, steps=4, **given),
        "fab": call(a.fab, model, x, y, steps=3, **given),
        "square": call(a.square, model, x, y, queries=15, **given),
        "ibp": bounds("ibp"),
        "crown": bounds("crown", sides="lower"),
        "crown-ibp": bounds("crown-ibp"),
        "envelope": envelope,
        "distance": call(o.polyhedral_distance, rows, offsets, *box, 2),
        "frozen": network_of(frozen),
        "masked": network_of(masked),
    }


def run_quietly(job: Job) -> list[Tensor]:
    """Attacks on six random images warn that they cannot be trusted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fr.attacks.AttackWarning)
        return job()


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))
