"""Comparing results, keeping them, and the levels of a run."""

import math

import pytest
import torch

from fastrobust.benchmarks import case


@pytest.mark.parametrize(
    ("ours", "theirs", "gap"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.5),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), 0.0),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0]), math.inf),
        (torch.tensor([math.inf, -math.inf]), torch.tensor([math.inf, -math.inf]), 0.0),
        (torch.tensor([math.inf]), torch.tensor([-math.inf]), math.inf),
        (torch.zeros(2), torch.zeros(3), math.inf),
        (torch.zeros(0), torch.zeros(0), 0.0),
        (torch.tensor([True, False]), torch.tensor([True, True]), 1.0),
        ((torch.zeros(2), 1.0), [torch.ones(2), 1.25], 1.0),
        ((torch.zeros(2),), (torch.zeros(2), torch.zeros(2)), math.inf),
        ({"lower": torch.zeros(1)}, {"lower": torch.full((1,), -2.0)}, 2.0),
        ({"lower": torch.zeros(1)}, {"upper": torch.zeros(1)}, math.inf),
        (torch.zeros(1), "text", math.inf),
    ],
)
def test_difference(ours, theirs, gap):
    assert case.difference(ours, theirs) == gap
    assert case.difference(theirs, ours) == gap


def test_difference_is_taken_in_float64():
    # 2^24 + 1 does not exist in float32
    assert case.difference(torch.tensor([2.0**24]), torch.tensor([2.0**24 + 1], dtype=torch.float64)) == 1.0


def test_agreement_at_the_tolerance_and_beyond():
    assert case.max_abs_difference(torch.zeros(1), torch.full((1,), 0.5), 0.5).agrees
    assert not case.max_abs_difference(torch.zeros(1), torch.full((1,), 0.5), 0.25).agrees


def test_relative_agreement_scales_with_the_result():
    large, one = torch.tensor([1e6, math.inf]), torch.tensor([1e6 + 1, math.inf])
    assert case.relative_difference(large, one, 2e-6).agrees
    assert not case.relative_difference(large, one, 5e-7).agrees
    assert not case.relative_difference(large, torch.tensor([1e6, -math.inf]), 1.0).agrees
    assert not case.relative_difference(torch.zeros(2), torch.zeros(3), 1.0).agrees
    assert not case.relative_difference((torch.zeros(2),), (torch.zeros(2), torch.zeros(2)), 1.0).agrees
    assert case.relative_difference(
        (torch.zeros(1), torch.ones(1)), [torch.zeros(1), torch.full((1,), 3.0)], 1.0
    ).agrees


def test_kept_results_do_not_change_with_the_buffer_they_came_from():
    out = torch.zeros(3)
    kept = case.keep({"x": (out, [out])})
    out.fill_(7)
    assert case.difference(kept, {"x": (torch.zeros(3), [torch.zeros(3)])}) == 0


def test_once_makes_its_value_at_the_first_call_only():
    made = []
    get = case.once(lambda: made.append(1) or torch.zeros(2))
    assert made == []
    assert get() is get()
    assert made == [1]


def test_levels_are_ordered():
    levels = [case.Context(level=level) for level in case.LEVELS]
    for place, context in enumerate(levels):
        assert [context.at_least(level) for level in case.LEVELS] == [place >= other for other in range(len(levels))]


def test_a_context_draws_the_same_numbers_each_time():
    context = case.Context(seed=5)
    first = torch.rand(4, generator=context.generator())
    assert torch.equal(first, torch.rand(4, generator=context.generator()))
    assert not torch.equal(first, torch.rand(4, generator=case.Context(seed=6).generator()))
