"""The plain-torch definition against exact rationals, and its gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrobust.reference.polyhedron import norm_value, polyhedral_distance
from polyhedron_cases import KINDS, check_signed, rows, short_rows, staircase
from polyhedron_oracle import NORMS, close_and_never_above, exact, sorted_float64


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_exact_rationals(kind, p):
    for size in (1, 9):
        a, b, lower, upper = rows(kind, 7, size)
        got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
        close_and_never_above(got, [exact(*row, p) for row in zip(a, b, lower, upper, strict=False)])


@pytest.mark.parametrize("p", (1, 2, math.inf))
@pytest.mark.parametrize("kind", KINDS)
def test_equals_sorting_on_long_rows(kind, p):
    a, b, lower, upper = rows(kind, 16, 785)
    got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
    close_and_never_above(got, sorted_float64(a, b, lower, upper, p))


@pytest.mark.parametrize("p", NORMS)
def test_staircase_that_needs_many_iterations(p):
    a, lower, upper = staircase()
    room = float((np.abs(a) * upper).sum())
    for fraction in (0.5, 0.99, 0.99999):
        b = np.float32([room * fraction])
        got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
        close_and_never_above(got, [exact(a[0], b[0], lower[0], upper[0], p)])


@given(p=st.sampled_from(NORMS), row=short_rows(6), b=st.floats(-2, 2, width=32))
def test_signed_property(p, row, b):
    check_signed(polyhedral_distance, p, row, b)


@pytest.mark.parametrize("p", NORMS)
def test_point_is_optimal(p):
    a, b, lower, upper = (torch.tensor(v) for v in rows("normal", 16, 33))
    b = b.clamp_max(0.9 * (a.abs() * torch.where(a > 0, -lower, upper)).sum(-1))
    distance, point = polyhedral_distance(a, b, lower, upper, p, return_point=True)
    assert bool(((lower <= point) & (point <= upper)).all())
    scale = (a * point).abs().sum(-1) + b
    assert bool((((a * point).double().sum(-1) + b).abs() <= 1e-6 * scale).all())
    torch.testing.assert_close(torch.linalg.vector_norm(point, p, -1), distance, rtol=2e-6, atol=0)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("sign", (1, -1))
def test_gradients(p, sign):
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    x = torch.rand(4, 9, dtype=torch.float64, generator=generator)
    b = sign * torch.tensor([0.05, 0.2, 0.4, 0.8], dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (a, b, -x, 1 - x)]
    assert torch.autograd.gradcheck(lambda *args: polyhedral_distance(*args, p, signed=True), tensors)


def test_bad_rows_stay_alone():
    a, b, lower, upper = (torch.tensor(v) for v in rows("normal", 7, 12))
    clean = polyhedral_distance(a, b, lower, upper, 2)
    a[1, 3], b[2], lower[4, 0], upper[5, 1] = math.nan, math.inf, 0.5, -0.5
    got = polyhedral_distance(a, b, lower, upper, 2)
    bad = torch.tensor([False, True, True, False, True, True, False])
    assert bool(got[bad].isnan().all())
    assert torch.equal(got[~bad], clean[~bad])


@pytest.mark.parametrize("norm", (0.5, -1, math.nan, "L3"))
def test_norm_is_checked(norm):
    with pytest.raises(ValueError, match="norm"):
        norm_value(norm)
    with pytest.raises(TypeError, match="norm"):
        norm_value(None)
