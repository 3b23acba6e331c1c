"""Adaptive pruning (thesis, equation 5.11)."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastrobust import nn as fnn

RESNET34 = [m.numel() for m in fnn.resnet34().parameters()]

sizes = st.lists(st.integers(0, 20_000), min_size=1, max_size=12)
rates = st.floats(0, 1).map(lambda r: round(r, 4))


@given(sizes=sizes, rate=rates, gamma=st.floats(0, 1))
def test_exact_solves_the_equations(sizes: list[int], rate: float, gamma: float) -> None:
    kept = fnn.allocate(sizes, rate, gamma)
    assert all(0 <= m <= n for m, n in zip(kept, sizes, strict=True))
    assert sum(kept) == math.floor((1 - Fraction(repr(rate))) * sum(sizes))
    # Water filling found independently, by bisection on the common constant c of m = min(n, c n^gamma).
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        if sum(min(n, c * n**gamma) for n in sizes if n) < sum(kept):
            low = c
        else:
            high = c
    for m, n in zip(kept, sizes, strict=True):
        if n:
            assert abs(m - min(n, high * n**gamma)) < 1 + 1e-6 * n


def test_extremes() -> None:
    assert fnn.allocate([10, 100, 1000], 0.0, 0.3) == [10, 100, 1000]
    assert fnn.allocate([10, 100, 1000], 1.0, 0.3) == [0, 0, 0]
    assert fnn.allocate([10, 100, 1000], 0.9, 1.0) == [1, 10, 100]
    assert fnn.allocate([10, 100, 1000], 0.97, 0.0) == [10, 12, 11]
    assert fnn.allocate([100], 0.9, 0.5) == [10]  # (1 - 0.9) 100 is below 10 in doubles
    assert fnn.allocate([], 0.9, 0.5) == []


def test_resnet34_has_the_weights_of_the_thesis_and_the_authors_counts() -> None:
    assert sum(RESNET34) == 21_265_088
    assert sum(fnn.allocate(RESNET34, 0.99, 0.1)) == 212_650
    kept = fnn.allocate(RESNET34, 0.99, 0.1, method="sequential")
    assert sum(kept) == 212_685
    share = {n: m / n for n, m in zip(RESNET34, kept, strict=True)}
    for size, percent in ((1728, 100), (36_864, 13.1), (147_456, 3.8), (589_824, 1.1), (2_359_296, 0.31), (5120, 77)):
        assert 100 * share[size] == pytest.approx(percent, rel=0.02)


def test_bad_arguments() -> None:
    for rate in (-0.1, 1.1, float("nan"), "0.5"):
        with pytest.raises(ValueError, match="rate: expected a pruning rate in"):
            fnn.allocate([10], rate, 0.1)
    with pytest.raises(ValueError, match="gamma: expected"):
        fnn.allocate([10], 0.5, 1.5)
    with pytest.raises(ValueError, match="sizes: expected"):
        fnn.allocate([10, -1], 0.5, 0.5)
    with pytest.raises(ValueError, match="method: expected 'exact', 'sequential' or 'layerwise', got 'fast'"):
        fnn.allocate([10], 0.5, 0.5, method="fast")


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_layerwise(rate: float) -> None:
    """Each layer by itself: all but int((1 - k) n) of its weights, k the decimal that was meant."""
    share = round(1 - rate, 2)
    for sizes in (RESNET34, [1, 7, 100, 0]):
        kept = fnn.allocate(sizes, rate, 1.0, method="layerwise")
        assert kept == [n - int((1 - share) * n) for n in sizes]
