"""The CUDA kernel: on a GPU where there is one, and compiled for the CPU by tests/cuda_emulation (FASTROBUST_EMULATED)."""

from __future__ import annotations

import importlib.util
import math
import os
import sys

import numpy as np
import pytest
import torch

sys.path.insert(0, os.path.dirname(__file__))
from cases import KINDS, rows, staircase  # noqa: E402
from oracle import exact, exact_signed, sorted_float64  # noqa: E402

from fastrobust.ops import polyhedral_distance  # noqa: E402

NORMS = (1, 1.5, 2, 3, math.inf)


def close_and_never_above(got: torch.Tensor, want, relative: float = 1e-6) -> None:
    for value, truth in zip(got.double().flatten().tolist(), want, strict=False):
        if math.isinf(truth):
            assert value == truth
        else:
            assert not value > truth, (value, truth)
            assert abs(value - float(truth)) <= relative * max(abs(float(truth)), 1e-38), (value, float(truth))


@pytest.fixture(scope="module")
def emulated():
    """The module built with -DFASTROBUST_CUDA_EMULATION=ON: its device 0 is this processor."""
    path = os.environ.get("FASTROBUST_EMULATED")
    if not path:
        pytest.skip("needs FASTROBUST_EMULATED, the _C module of a build with FASTROBUST_CUDA_EMULATION=ON")
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(a, b, lower, upper, p, signed=False):
        a, b, lower, upper = (torch.as_tensor(t).contiguous() for t in (a, b, lower, upper))
        m = a.shape[-1]
        out, multiplier, point = torch.empty_like(b), torch.empty_like(b), torch.empty_like(a)
        sides = [
            (t.data_ptr(), list(t.expand(a.shape).stride()[:-1]), 1 if t.shape[-1] > 1 else 0) for t in (lower, upper)
        ]
        module.polyhedral_distance(
            0, 0, a.data_ptr(), b.data_ptr(), *sides, list(a.shape[:-1]), m, float(p), signed,
            out.data_ptr(), multiplier.data_ptr(), point.data_ptr(),
        )  # fmt: skip
        return out, multiplier, point

    return call


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_emulated_kernel_is_exact(emulated, kind, p):
    a, b, lower, upper = rows(kind, 3, 17)
    close_and_never_above(
        emulated(a, b, lower, upper, p)[0], [exact(*row, p) for row in zip(a, b, lower, upper, strict=False)]
    )
    got = emulated(a, -b, lower, upper, p, True)[0]
    close_and_never_above(got, [exact_signed(*row, p) for row in zip(a, -b, lower, upper, strict=False)])


@pytest.mark.parametrize("p", (1, 2, math.inf))
@pytest.mark.parametrize("size", (785, 6000))  # in shared memory, and too long for it
def test_emulated_kernel_on_long_rows(emulated, p, size):
    for kind in ("normal", "power"):
        a, b, lower, upper = rows(kind, 4, size)
        close_and_never_above(emulated(a, b, lower, upper, p)[0], sorted_float64(a, b, lower, upper, p))


@pytest.mark.parametrize("p", NORMS)
def test_emulated_kernel_agrees_with_the_cpu_kernel(emulated, p):
    a, b = torch.randn(5, 3, 50), torch.rand(5, 3) - 0.3
    x = torch.rand(5, 1, 50)
    distance, _, point = emulated(a, b, -x, 1 - x, p, True)
    want, want_point = polyhedral_distance(a, b, -x, 1 - x, p, signed=True, return_point=True)
    torch.testing.assert_close(distance, want, rtol=3e-7, atol=0)
    torch.testing.assert_close(point, want_point, rtol=1e-5, atol=1e-6)


def test_emulated_kernel_on_the_staircase_and_bad_rows(emulated):
    a, lower, upper = staircase()
    b = (abs(a) * upper).sum(1) * 0.999
    for p in NORMS:
        close_and_never_above(emulated(a, b, lower, upper, p)[0], [exact(a[0], b[0], lower[0], upper[0], p)])
        got = emulated(
            a.repeat(3, 0), b.repeat(3), (-upper * np.array([[1], [math.nan], [-1]])).astype(np.float32), upper, p
        )[0]
        assert got.isnan().tolist() == [False, True, True]


@pytest.mark.cuda
@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_device(kind, p):
    for size in (1, 785, 150_528):
        a, b, lower, upper = (torch.tensor(t) for t in rows(kind, 5, size))
        want = polyhedral_distance(a, b, lower, upper, p, signed=True)
        got, point = polyhedral_distance(*(t.cuda() for t in (a, b, lower, upper)), p, signed=True, return_point=True)
        torch.testing.assert_close(got.cpu(), want, rtol=3e-7, atol=0)
        assert bool(((lower.cuda() <= point) & (point <= upper.cuda())).all())


@pytest.mark.cuda
def test_no_synchronisation_and_graph_capture():
    a, b, x = torch.randn(64, 3072).cuda(), torch.rand(64).cuda(), torch.rand(64, 3072).cuda()
    want = polyhedral_distance(a, b, -x, 1 - x, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = polyhedral_distance(a, b, -x, 1 - x, 2)
    graph.replay()
    assert torch.equal(got, want)
