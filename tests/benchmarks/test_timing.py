"""Percentiles, paired ratios, and the order in which candidates are sampled."""

import gc

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrobust.benchmarks import timing

positive = st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=40)


@given(positive, st.floats(0, 1))
def test_percentile_is_numpys_linear_one(values, share):
    assert timing.percentile(values, share) == pytest.approx(np.percentile(values, 100 * share), rel=1e-9)


def test_percentile_of_nothing_says_so():
    with pytest.raises(ValueError, match="values is empty"):
        timing.percentile([], 0.5)


def test_spread_and_noise():
    spread = timing.spread([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (spread.median, spread.low, spread.high) == (3.5, 2.0, 5.0)
    assert spread.noise == pytest.approx(1.5 / 3.5)


def test_ratio_is_taken_within_rounds():
    """Both grow tenfold during the row; the ratio of medians over mixed rounds would still be 3, its spread not 0."""
    ours = [1.0, 2.0, 5.0, 10.0]
    theirs = [3 * value for value in ours]
    assert timing.ratio(theirs, ours) == timing.Spread(3.0, 3.0, 3.0)


def test_ratio_of_a_slow_candidate_uses_the_rounds_it_took_part_in():
    # ours slows down after the two rounds that the peer was in: those later rounds must not count
    assert timing.ratio([10.0, 10.0], [1.0, 1.0, 5.0, 5.0, 5.0]) == timing.Spread(10.0, 10.0, 10.0)


class FakeClock:
    """Costs by call, in seconds; logs who was sampled."""

    def __init__(self, costs):
        self.costs, self.log, self.factor = costs, [], 1.0

    def sample(self, call, repeats):
        call()
        name = call()
        self.log.append((name, repeats))
        return self.costs[name] * self.factor


def calls(*names):
    return {name: (lambda name=name: name) for name in names}


def test_every_round_samples_everybody_once_in_orders_that_change():
    clock = FakeClock({"a": 1.0, "b": 1.0, "c": 1.0})
    effort = timing.Effort(seconds=36.0, rounds=4, least=2, sample_seconds=0.5)
    samples = timing.interleave(calls("a", "b", "c"), clock, effort)
    order = [name for name, _ in clock.log[3:]]  # the first three are the calibration
    rounds = [tuple(order[i : i + 3]) for i in range(0, 12, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1
    assert {name: len(taken) for name, taken in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_slow_candidates_get_fewer_samples_but_never_less_than_three():
    clock = FakeClock({"fast": 0.01, "slow": 10.0})
    effort = timing.Effort(seconds=1.0, rounds=20, least=5, sample_seconds=0.001)
    samples = timing.interleave(calls("fast", "slow"), clock, effort)
    assert len(samples["fast"]) == 20
    assert len(samples["slow"]) == 3


def test_one_sample_is_enough_of_what_takes_many_seconds():
    clock = FakeClock({"fast": 0.01, "slow": 2 * timing.SLOW_SECONDS})
    made = []
    given = {"fast": lambda: "fast", "slow": lambda: made.append(1) or "slow"}
    samples = timing.interleave(given, clock, timing.Effort(1.0, rounds=4, least=4, sample_seconds=0.001))
    assert (len(samples["fast"]), len(samples["slow"])) == (4, 1)
    assert len(made) == 2  # the clock here calls twice: the calibration is the sample


def test_short_calls_are_repeated_until_a_sample_is_long_enough():
    clock = FakeClock({"short": 1e-6})
    repeats, cost = timing.calibrate(clock, calls("short")["short"], sample_seconds=1e-4)
    assert cost == 1e-6
    assert 100 <= repeats <= 200
    assert timing.calibrate(clock, calls("short")["short"], sample_seconds=1e-7)[0] == 1


def test_the_collector_is_off_while_sampling_and_on_again_after():
    seen = []

    class Clock(FakeClock):
        def sample(self, call, repeats):
            seen.append(gc.isenabled())
            return super().sample(call, repeats)

    timing.interleave(calls("a"), Clock({"a": 1.0}), timing.Effort(5.0, rounds=2, least=2))
    assert seen[0] and not any(seen[1:])  # the calibration comes first
    assert gc.isenabled()


def test_the_collector_comes_back_when_a_call_raises():
    state = {"calls": 0}

    def breaks():
        state["calls"] += 1
        if state["calls"] > 2:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        timing.interleave({"breaks": breaks}, timing.HostClock(), timing.Effort(1.0, sample_seconds=0.0))
    assert gc.isenabled()


def test_host_clock_counts_a_call_not_the_repeats():
    done = []
    seconds = timing.HostClock().sample(lambda: done.append(1), 50)
    assert len(done) == 50
    assert 0 < seconds < 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_clock_measures_the_device():
    device = torch.device("cuda")
    a = torch.rand(4096, 4096, device=device)
    clock = timing.clock_for(device)
    clock.sample(lambda: a @ a, 3)
    assert clock.sample(lambda: a @ a, 3) > clock.sample(lambda: a[:8, :8] @ a[:8, :8], 3)
