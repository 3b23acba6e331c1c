"""The CUDA kernel on a device; tests/cuda_emulation runs the same source on the CPU."""

from __future__ import annotations

import pytest
import torch

from fastrobust.ops import polyhedral_distance
from polyhedron_cases import KINDS, rows
from polyhedron_oracle import NORMS


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


@pytest.mark.cuda
@pytest.mark.parametrize("p", NORMS)
def test_a_box_that_excludes_the_point_gives_nan_for_its_row_alone(p):
    a, b, lower, upper = (torch.tensor(t).cuda() for t in rows("normal", 4, 785))
    clean = polyhedral_distance(a, b, lower, upper, p)
    lower[1, 3], upper[1, 3] = 0.5, 0.25
    got = polyhedral_distance(a, b, lower, upper, p)
    assert got.isnan().tolist() == [False, True, False, False]
    assert torch.equal(got[[0, 2, 3]], clean[[0, 2, 3]])
