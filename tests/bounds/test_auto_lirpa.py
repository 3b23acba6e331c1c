"""Equality with auto_LiRPA where it is installed, and its names on our engine."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
import torch.nn as nn

from fastrobust.bounds import auto_lirpa as ours
from fastrobust.bounds import compute_bounds

from .nets import make


def spec_of(y: torch.Tensor, k: int) -> torch.Tensor:
    eye = torch.eye(k)
    return torch.stack([torch.stack([eye[c] - eye[j] for j in range(k) if j != c]) for c in y.tolist()])


class PlainResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c0, self.c1, self.c2 = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 1, 1)
        self.b0, self.short, self.out = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1, 2, 0), nn.Linear(6 * 16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.b0(self.c0(x)))
        h = torch.relu(self.c2(torch.relu(self.c1(h))) + self.short(h))
        return self.out(torch.flatten(h, 1))


def net_of(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    if name == "unpadded":
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 6, 3, 1), nn.ReLU(), nn.Conv2d(6, 6, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5)]
        return nn.Sequential(*layers).eval(), (3, 8, 8)
    if name != "residual":
        return make(name)
    torch.manual_seed(0)
    net = PlainResidual().eval()
    net.b0.running_mean.normal_()
    net.b0.running_var.uniform_(0.5, 2)
    return net, (3, 8, 8)


@pytest.mark.parametrize("name", ["mlp-relu", "cnn", "unpadded", "residual"])
@pytest.mark.parametrize("norm,eps", [(math.inf, 0.01), (math.inf, 0.05), (2.0, 0.1)])
@pytest.mark.parametrize("lines", ["adaptive", "same-slope"])
def test_equals_auto_lirpa(name: str, norm: float, eps: float, lines: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = pytest.importorskip("auto_LiRPA", reason="auto_LiRPA is not installed")
    net, shape = net_of(name)
    x, y = torch.rand(3, *shape), torch.tensor([0, 3, 4])
    C = spec_of(y, 5)
    options = {"activation_bound_option": lines}
    theirs = peer.BoundedModule(net, x, bound_opts=options, verbose=False)
    their_x = peer.BoundedTensor(x, peer.PerturbationLpNorm(norm=norm, eps=eps))
    mine = ours.BoundedModule(net, x, bound_opts=options)
    my_x = ours.BoundedTensor(x, ours.PerturbationLpNorm(norm=norm, eps=eps))
    with torch.no_grad():
        for method in ("IBP", "CROWN-IBP", "CROWN"):
            a = mine.compute_bounds(x=(my_x,), C=C, method=method)
            b = theirs.compute_bounds(x=(their_x,), C=C, method=method)
            scale = b[0].abs().max()
            better = torch.stack([a[0] - b[0], b[1] - a[1]]) / scale
            assert better.min() >= -1e-6, (method, better.min())
            # in l2 a neuron at the border is bounded here without the weights that meet the padding
            padded = norm == 2 and (name == "cnn" or (name == "residual" and method != "CROWN"))
            assert better.max() <= (0.05 if padded else 1e-6), (method, better.max())


def test_names_return_what_compute_bounds_does() -> None:
    net, shape = make("cnn")
    x, y = torch.rand(2, *shape), torch.tensor([1, 2])
    model = ours.BoundedModule(net, x)
    assert torch.equal(model(x), net(x))
    bounded = ours.BoundedTensor(x, ours.PerturbationLpNorm(norm=2, eps=0.2))
    low, up, A = model.compute_bounds(x=(bounded,), C=spec_of(y, 5), method="CROWN-IBP", return_A=True)
    want = compute_bounds(net, x, 0.2, norm=2, method="crown-ibp", labels=y)
    torch.testing.assert_close(low, want.lower)
    torch.testing.assert_close(up, want.upper)
    inner = A["/output"]["/input"]
    assert inner["lA"].shape == (2, 4, *shape)
    at = torch.einsum("bsn,bn->bs", inner["lA"].flatten(2), x.flatten(1)) + inner["lbias"]
    assert (at >= low - 1e-4).all()
    assert model.compute_bounds(x=(bounded,), method="IBP", bound_upper=False)[1] is None


def test_boxes_and_what_is_not_covered() -> None:
    net, shape = make("mlp-relu")
    x = torch.rand(2, *shape)
    model = ours.BoundedModule(net, x)
    low, high = (x - 0.1).clamp(min=0), (x + 0.1).clamp(max=1)
    bounded = ours.BoundedTensor(x, ours.PerturbationLpNorm(x_L=low, x_U=high))
    got = model.compute_bounds(x=(bounded,), method="CROWN")
    want = compute_bounds(net, x, 0.1, clip=(0, 1), method="crown")
    torch.testing.assert_close(got[0], want.lower, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not covered"):
        model.compute_bounds(x=(bounded,), method="CROWN-Optimized")
    with pytest.raises(ValueError, match="BoundedTensor"):
        model.compute_bounds(x=(x,))
    with pytest.raises(ValueError, match="not covered"):
        ours.BoundedModule(net, x, bound_opts={"optimize_bound_args": {}})
