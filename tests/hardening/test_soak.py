"""The calls of every family, again and again: what a process holds does not grow."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable

import pytest
import torch

import fastrobust as fr
from combinations import THOROUGH
from fastrobust.benchmarks.memory import _resident
from hardening_jobs import jobs, network, run_quietly

ROUNDS = 400 if THOROUGH else 12
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the resident set from /proc")


def held() -> tuple[Counter[str], int]:
    """Objects by type, and bytes of the resident set."""
    gc.collect()
    gc.collect()  # tuples leave the collector's lists in the second
    return Counter(f"{type(o).__module__}.{type(o).__qualname__}" for o in gc.get_objects()), _resident()[0]


def growth(work: Callable[[int], object], rounds: int) -> tuple[dict[str, int], int]:
    """Types of which ``rounds`` calls leave one object for each call, and the bytes that came on top."""
    for number in range(8):  # caches, programs and the allocator's own blocks, also those of looking
        work(number)
        held()
    objects, size = held()
    for number in range(rounds):
        work(number)
    after, now = held()
    return {name: n for name, n in (after - objects).items() if n >= rounds}, now - size


def test_a_leak_is_seen() -> None:
    kept: list[object] = []
    assert growth(lambda _: kept.append([]), 12)[0] == {"builtins.list": 12}


@linux
def test_calls_leave_neither_objects_nor_memory() -> None:
    every = jobs()
    objects, size = growth(lambda _: [run_quietly(job) for job in every.values()], ROUNDS)
    assert not objects
    assert size < (64 << 10) * ROUNDS + (4 << 20)  # a round's tensors are 300 KB


@linux
def test_networks_go_with_all_that_was_made_for_them() -> None:
    labels = torch.tensor([0, 1])

    def once(number: int) -> None:
        size = 8 + number % 8
        frozen = fr.nn.freeze(fr.nn.convert(network()[:4], 0.5, 0.5).eval())
        frozen(torch.rand(2, 1, size, size))
        fr.bounds.compute_bounds(network(), torch.rand(2, 1, 8, 8), 0.1, method="crown-ibp", labels=labels)
        fr.attacks.pgd(network(), torch.rand(2, 1, 8, 8), labels, eps=0.1, steps=1, seed=0)

    objects, size = growth(once, rounds := 200 if THOROUGH else 15)
    assert not objects
    assert size < (64 << 10) * rounds + (4 << 20)


@linux
def test_a_frozen_network_that_is_updated_and_attacked_again_and_again() -> None:
    """Each update makes a program anew, whose first gradient is proven by hooks."""
    model = fr.nn.convert(network(), 0.5, 0.5).eval()
    frozen, x, labels = fr.nn.freeze(model), torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    scores = [p for name, p in model.named_parameters() if "scores" in name]
    assert scores

    def once(number: int) -> None:
        with torch.no_grad():
            for p in scores:
                p.copy_(torch.rand(p.shape, generator=torch.Generator().manual_seed(number)))
        frozen.update()
        fr.attacks.pgd(frozen, x, labels, eps=0.1, steps=2, seed=0)

    objects, size = growth(once, rounds := 200 if THOROUGH else 15)
    assert not objects
    assert size < (64 << 10) * rounds + (4 << 20)
