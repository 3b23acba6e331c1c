"""The CUDA kernel of polyhedral_distance, compiled for the CPU, against exact answers and the CPU kernel."""

from __future__ import annotations

import math

import pytest
import torch

from fastrobust.ops import polyhedral_distance
from polyhedron_cases import KINDS, rows, staircase
from polyhedron_oracle import NORMS, close_and_never_above, exact, exact_signed, sorted_float64


def distance(a, b, lower, upper, p, **kwargs):
    return polyhedral_distance(*map(torch.as_tensor, (a, b, lower, upper)), p, **kwargs)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_exact_rationals(on_device, kind, p):
    a, b, lower, upper = rows(kind, 3, 17)
    got = on_device(distance, a, b, lower, upper, p)
    close_and_never_above(got, [exact(*row, p) for row in zip(a, b, lower, upper, strict=True)])
    got = on_device(distance, a, -b, lower, upper, p, signed=True)
    close_and_never_above(got, [exact_signed(*row, p) for row in zip(a, -b, lower, upper, strict=True)])


@pytest.mark.parametrize("p", (1, 2, math.inf))
@pytest.mark.parametrize("size", (785, 6000))  # in shared memory, and too long for it
def test_long_rows(on_device, p, size):
    for kind in ("normal", "power"):
        a, b, lower, upper = rows(kind, 4, size)
        got = on_device(distance, a, b, lower, upper, p)
        close_and_never_above(got, sorted_float64(a, b, lower, upper, p))


@pytest.mark.parametrize("p", NORMS)
def test_agrees_with_the_cpu_kernel(on_device, p):
    a, b = torch.randn(5, 3, 50), torch.rand(5, 3) - 0.3
    x = torch.rand(5, 1, 50)
    got, point = on_device(polyhedral_distance, a, b, -x, 1 - x, p, signed=True, return_point=True)
    want, want_point = polyhedral_distance(a, b, -x, 1 - x, p, signed=True, return_point=True)
    torch.testing.assert_close(got, want, rtol=3e-7, atol=0)
    torch.testing.assert_close(point, want_point, rtol=1e-5, atol=1e-6)


def test_gradients(on_device):
    def gradients():
        torch.manual_seed(1)
        leaves = [
            t.requires_grad_() for t in (torch.randn(4, 30), torch.rand(4), -torch.rand(4, 30), torch.rand(4, 30))
        ]
        return torch.autograd.grad(polyhedral_distance(*leaves, 2).sum(), leaves)

    for got, want in zip(on_device(gradients), gradients(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_staircase_and_bad_rows(on_device):
    a, lower, upper = staircase()
    b = (abs(a) * upper).sum(1) * 0.999
    for p in NORMS:
        got = on_device(distance, a, b, lower, upper, p)
        close_and_never_above(got, [exact(a[0], b[0], lower[0], upper[0], p)])
        spoilt = a.repeat(3, 0)
        spoilt[1, 7] = math.nan
        got = on_device(distance, spoilt, b.repeat(3), lower, upper, p)
        assert got.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("p", NORMS)
def test_a_box_that_excludes_the_point_gives_nan_for_its_row_alone(on_device, p):
    """A GPU raises nothing here, because reading the values would stop it: the rows are NaN, and so are their
    points."""
    op = torch.ops.fastrobust.polyhedral_distance.default  # below the check that CPU tensors get
    a, b, lower, upper = (torch.tensor(t) for t in rows("normal", 4, 40))
    clean = on_device(op, a, b, lower, upper, p, False, False)[0]
    lower[1, 3], upper[1, 3] = 0.5, 0.25  # lower > upper
    lower[2, 39] = 0.125  # the point is not inside
    got, _, point = on_device(op, a, b, lower, upper, p, False, True)
    assert got.isnan().tolist() == [False, True, True, False]
    assert point.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
