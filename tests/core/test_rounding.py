"""Directed additions against exact rational arithmetic; the compiled ones are seen through the L-inf step."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrobust import ops
from fastrobust.reference import rounding

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**100), max_value=2.0**100)


def is_directed(result: float, exact: Fraction, up: bool) -> bool:
    """result is the nearest float32 on the wanted side of exact."""
    r, other = (
        Fraction(result),
        torch.nextafter(torch.tensor(result), torch.tensor(-math.inf if up else math.inf)).item(),
    )
    return (r >= exact > Fraction(other)) if up else (r <= exact < Fraction(other))


@given(a=floats, b=floats)
def test_reference_additions_are_correctly_rounded(a, b) -> None:
    exact, x, y = Fraction(a) + Fraction(b), torch.tensor(a), torch.tensor(b)
    assert is_directed(rounding.add_up(x, y).item(), exact, True)
    assert is_directed(rounding.add_down(x, y).item(), exact, False)
    inward = rounding.add_inward(x, y).item()
    assert abs(Fraction(inward) - Fraction(a)) <= abs(Fraction(b))


@given(values=st.lists(st.tuples(floats, floats), min_size=1, max_size=40))
def test_compiled_faces_are_correctly_rounded(values) -> None:
    """A step far beyond the ball lands on its face: x0 + eps rounded down, x0 - eps rounded up."""
    x0 = torch.tensor([v[0] for v in values])[None]
    eps = torch.tensor([abs(v[1]) for v in values])[None]
    upper = ops.pgd_step(x0, x0, torch.ones_like(x0), 2.0**120, eps, clip=None)[0].tolist()
    lower = ops.pgd_step(x0, x0, -torch.ones_like(x0), 2.0**120, eps, clip=None)[0].tolist()
    for up, low, center, radius in zip(upper, lower, x0[0].tolist(), eps[0].tolist(), strict=True):
        assert is_directed(up, Fraction(center) + Fraction(radius), False)
        assert is_directed(low, Fraction(center) - Fraction(radius), True)


@given(value=st.floats(allow_nan=False, min_value=-3e38, max_value=3e38))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_numbers_are_rounded_downwards_and_upwards(dtype, value) -> None:
    if abs(value) > torch.finfo(dtype).max:
        return
    low, high = rounding.round_down(value, dtype), rounding.round_up(value, dtype)
    assert low <= value <= high
    assert (
        low == high == value
        or torch.nextafter(torch.tensor(low, dtype=dtype), torch.tensor(math.inf, dtype=dtype)).item() == high
    )


@pytest.mark.parametrize("eps", [0.1, 8 / 255, 0.3, 1 / 3, 1e-50, 0.7])
def test_python_radius_is_rounded_down(eps) -> None:
    face = ops.pgd_step(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), 1.0, eps, clip=None).item()
    assert face == rounding.round_down(eps, torch.float32) <= eps
