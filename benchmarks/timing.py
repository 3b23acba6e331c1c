"""Interleaved sampling, percentiles and paired ratios.

All candidates of a row are sampled in turns, one sample each a round, so that a machine that grows faster or
slower during the row does so for all of them; ratios are formed within rounds.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from .case import Call


@dataclass(frozen=True)
class Spread:
    """A median with its 20th and 80th percentiles."""

    median: float
    low: float
    high: float

    @property
    def noise(self) -> float:
        """Half the distance of the percentiles, relative to the median."""
        return (self.high - self.low) / (2 * self.median) if self.median else math.inf


def percentile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the order statistics, `share` in [0, 1]."""
    if not values:
        raise ValueError("values is empty; a percentile needs at least one")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def spread(values: Sequence[float]) -> Spread:
    return Spread(percentile(values, 0.5), percentile(values, 0.2), percentile(values, 0.8))


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of numerator[i] / denominator[i]: samples of the same round, so that drift cancels.

    Candidates too slow for every round have fewer samples; the rounds both took part in are the first ones.
    """
    pairs = min(len(numerator), len(denominator))
    return spread([numerator[i] / denominator[i] for i in range(pairs)])


class Clock(Protocol):
    def sample(self, call: Call, repeats: int) -> float:
        """Seconds a call, averaged over `repeats` calls in a row."""
        ...


class HostClock:
    """Wall time of the calling thread."""

    def sample(self, call: Call, repeats: int) -> float:
        begin = time.perf_counter_ns()
        for _ in range(repeats):
            call()
        return (time.perf_counter_ns() - begin) * 1e-9 / repeats


class CudaClock:
    """Device time between two events on the current stream; the host waits only after the second."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sample(self, call: Call, repeats: int) -> float:
        with torch.cuda.device(self.device):
            begin = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) * 1e-3 / repeats


def clock_for(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else HostClock()


@dataclass(frozen=True)
class Effort:
    """How long a row is sampled: at most `seconds`, at most `rounds` rounds, at least `least` samples each."""

    seconds: float
    rounds: int = 60
    least: int = 5
    sample_seconds: float = 5e-4  # a sample of a shorter call repeats it until it takes this long


EFFORT = {
    "smoke": Effort(0.02, rounds=3, least=3, sample_seconds=5e-5),
    "quick": Effort(0.4, rounds=30, least=5),
    "default": Effort(0.9, rounds=60, least=5),
    "full": Effort(6.0, rounds=200, least=9, sample_seconds=2e-3),
}


# One sample is enough of a call that takes longer: the one that told its cost, before which it was called already.
SLOW_SECONDS = 10.0
# Calls shorter than this are made a few times before their cost is believed, and once before each sample.
WARM_SECONDS = 0.05


def calibrate(clock: Clock, call: Call, sample_seconds: float) -> tuple[int, float]:
    """How often a sample repeats the call, and the seconds one call takes (also the warm-up).

    The first calls find cold caches and pages that were handed back: a count made of them would be too small.
    """
    cost = clock.sample(call, 1)
    for _ in range(3):
        if cost < WARM_SECONDS:
            cost = clock.sample(call, 1)
    repeats = 1
    while cost * repeats < sample_seconds and repeats < 1 << 20:
        repeats = max(repeats * 2, min(1 << 20, math.ceil(sample_seconds / max(cost, 1e-9))))
        cost = clock.sample(call, repeats)
    return repeats, cost


def interleave(
    calls: Mapping[str, Call], clock: Clock, effort: Effort, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Samples of every call, taken in turns; each round in another order.

    What a call finds in the caches and on the heap depends on the one before it: in one order a 0.3 ms convolution took
    1.3 to 1.6 times as long in the place behind the copies of the floor as in the place behind another convolution.
    A call that runs long gets fewer samples, taken in the first rounds: never fewer than effort.least, or three
    where that many would take longer than the whole row should, or one of a call of more than SLOW_SECONDS, which is
    not called again for it.
    """
    plan: dict[str, tuple[int, int]] = {}
    found: dict[str, tuple[int, float]] = {}
    for name, call in calls.items():
        found[name] = calibrate(clock, call, effort.sample_seconds)
        tick()
    # Where one candidate is short, a warm-up call goes before the samples of all: behind another candidate that ran for
    # 0.1 s it would find nothing of its own in the caches, which is not how a loop runs.
    warm = any(repeats > 1 or cost < WARM_SECONDS for repeats, cost in found.values())
    for name, (repeats, cost) in found.items():
        share = effort.seconds / len(calls)
        calls_a_round = repeats + warm
        wanted = int(share / max(cost * calls_a_round, 1e-9))
        least = effort.least if cost * effort.least <= effort.seconds else min(3, effort.least)
        plan[name] = (repeats, 0 if cost > SLOW_SECONDS else max(least, min(effort.rounds, wanted)))
    samples: dict[str, list[float]] = {name: [cost] if cost > SLOW_SECONDS else [] for name, (_, cost) in found.items()}
    names = list(calls)
    orders = random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for number in range(max((count for _, count in plan.values()), default=0)):
            orders.shuffle(names)
            for name in names:
                repeats, count = plan[name]
                if number >= count:
                    continue
                if warm and found[name][1] <= SLOW_SECONDS:
                    calls[name]()  # bring the inputs back into the cache the previous candidate used
                samples[name].append(clock.sample(calls[name], repeats))
            tick()
    finally:
        if collecting:
            gc.enable()
    return samples


def fastest(calls: Sequence[Call], clock: Clock, seconds: float = 0.2) -> Call:
    """The call with the least time of a few rounds: for a candidate that has several ways to the same result.

    What it took to find out is not part of the row's samples, so that the choice does not favour it.
    """
    for call in calls:
        call()  # plans and warms up
    cost = sum(clock.sample(call, 1) for call in calls)
    rounds = max(2, min(8, int(seconds / max(cost, 1e-9))))
    taken = [[clock.sample(call, 1) for call in calls] for _ in range(rounds)]
    best = [min(row[i] for row in taken) for i in range(len(calls))]
    return calls[best.index(min(best))]
