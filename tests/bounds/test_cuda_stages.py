"""The op of stages on a GPU: against the engine in float64, the same bits in every run, captured in a CUDA graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cuda_emulation.test_bounds_gradients import bounds_and_gradients, call_of_stages

from .test_stage_margins import IMAGE, network

NAMES, METHODS = ("residual", "dense", "mixed"), ("ibp", "crown-ibp", "ibp-linear")


def near(got: Any, want: Any, tolerance: float) -> None:
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            assert (g.cpu().double() - w.cpu().double()).abs().max() <= tolerance * (w.abs().max().item() + 1e-2)


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_bounds_and_gradients(name: str, method: str) -> None:
    net, x, y = network(name), torch.rand(7, *IMAGE), torch.tensor([0, 3, 1, 1, 2, 0, 3])
    want = bounds_and_gradients(net, x.double(), 0.05, method, y)
    net = net.float().cuda()
    runs = [bounds_and_gradients(net, x.cuda(), 0.05, method, y.cuda()) for _ in range(2)]
    near(runs[0], want, 1e-4)
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
def test_a_pass_and_its_gradients_are_captured(monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> None:
    net, x, y = network(name).cuda(), torch.rand(3, *IMAGE).cuda(), torch.tensor([0, 3, 1]).cuda()
    call = call_of_stages(monkeypatch, net, x, method, y)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # type: ignore[no-untyped-call]
        want = call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # what waits for the host is refused here
        got = call()
    graph.replay()
    torch.cuda.synchronize()
    near(got, want, 1e-5)
