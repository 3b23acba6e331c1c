"""Convolutions of stride 2 inside frozen networks: read where the pixels lie, or in the phases of the stride."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.ops.binary import _conv_cost as cost
from fastrobust.ops.binary import _feature_maps as fm
from fastrobust.ops.binary._activation import NONE, RELU

GEOMETRIES = [(1, 0, 1), (3, 1, 1), (3, 0, 1), (3, 2, 2), (5, 2, 1), (2, 0, 1), (2, 1, 1), (7, 3, 1)]


@pytest.mark.skipif(not fm._C.binary_strides(), reason="this CPU variant reads phases")
@pytest.mark.parametrize("kernel, padding, dilation", GEOMETRIES)
@pytest.mark.parametrize("size", [(16, 16), (9, 14), (17, 11)])
@pytest.mark.parametrize("init", ["binary", "given"])
def test_strided_reads_equal_phases(kernel, padding, dilation, size, init, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", "sparse")
    monkeypatch.setattr(cost, "LANES", (16,))
    torch.manual_seed(kernel)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 9, kernel, 2, padding, dilation), nn.ReLU(),
        nn.Conv2d(9, 40, 3, 2, 1),
    )  # fmt: skip
    model = fr.nn.convert(net, 0.6, 1.0, init=init).eval()
    x = torch.randn(19, 3, *size)
    made = []
    real = fm.strided_plan
    monkeypatch.setattr(fm, "strided_plan", lambda *args: made.append(real(*args)) or made[-1])
    with torch.no_grad():
        ours = fr.nn.freeze(model)(x)
        assert sum(plan is not None for plan in made) >= 1
        monkeypatch.setattr(fm, "strided_plan", lambda *args: None)
        phases = fr.nn.freeze(model)(x)
        exact = fr.nn.dense_copy(model).double()(x.double())
    assert torch.equal(ours, phases)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)
    # With a gradient the forward reads phases: the same bits again.
    assert torch.equal(fr.nn.freeze(model)(x.clone().requires_grad_()).detach(), ours)


def test_only_sixteen_lanes_are_read_with_a_stride() -> None:
    program = fm.new_program()
    shape = (1 << 60,) * 2 + (4, 1, 0, 1, 64, 0, 64, 0, 16, 2, 2, 3, 8, 1, 5, 2, 0, 0)
    with pytest.raises(ValueError, match="x_stride: expected 1, or 2 with sixteen lanes, got 2"):
        program.gather(1 << 56, 2 << 56, shape, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, NONE.code, RELU.code, False)
