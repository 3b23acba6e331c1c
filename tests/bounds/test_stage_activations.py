"""Every activation in the op of stages: bounds and every gradient against the engine in float64, and samples inside."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds

from .nets import margins, points_of_set, spied
from .test_margins import bounds_and_gradients, near

IMAGE = (2, 6, 5)
ACTIVATIONS: dict[str, Any] = {
    "relu": nn.ReLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.15),
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.4),
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": lambda: nn.Softplus(2.0),
    "elu": lambda: nn.ELU(0.7),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
}


class Net(nn.Module):
    """A convolution, a residual sum with a scaled branch, a dense layer behind an image and one behind a vector."""

    def __init__(self, *acts: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.acts = nn.ModuleList(acts)
        self.a, self.b = nn.Conv2d(2, 5, 3, 1, 1, bias=bias), nn.Conv2d(5, 5, 3, 2, 1, bias=bias)
        self.c, self.d = nn.Conv2d(5, 5, 1, 2, bias=bias), nn.Linear(45, 11, bias=bias)
        self.out = nn.Linear(11, 4, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.acts[0](self.a(x))
        h = self.acts[1 % len(self.acts)](self.b(h) - 0.5 * self.c(h))
        return self.out(self.acts[2 % len(self.acts)](self.d(h.flatten(1))))


class Arctan(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.arctan(2 * x)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return spied(monkeypatch, "margins_of_stages")


@pytest.mark.parametrize("name", [*ACTIVATIONS, "arctan"])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "ibp-linear"])
def test_bounds_and_gradients_equal_the_engine(name: str, method: str, taken: list[bool]) -> None:
    for batch, each, input_too, sides in (
        (1, False, False, "both"),
        (3, True, True, "lower"),
        (7, False, True, "upper"),
    ):
        torch.manual_seed(batch)
        net = Net(Arctan() if name == "arctan" else ACTIVATIONS[name]()).eval()
        x, y = torch.rand(batch, *IMAGE), torch.randint(4, (batch,))
        eps = torch.rand_like(x) / 8 if each else 0.1
        labels = y if batch != 3 or method == "ibp" else None
        taken.clear()
        kwargs = {"method": method, "sides": sides, "clip": None if batch < 7 else (0.0, 1.0)}
        got = bounds_and_gradients(net, x, eps, labels, torch.float32, input_too, **kwargs)
        assert taken == [True, True]
        near(got, bounds_and_gradients(net, x, eps, labels, torch.float64, input_too, **kwargs), 5e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(ACTIVATIONS)), min_size=3, max_size=3),
    st.sampled_from(["ibp", "crown-ibp", "ibp-linear"]),
    st.sampled_from([0.0, 1e-6, 0.05, 3.0]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_mixed_activations_hold_samples(names: list[str], method: str, eps: float, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    net = Net(*(ACTIVATIONS[n]() for n in names), bias=bias).eval()
    x, y = torch.randn(3, *IMAGE), torch.randint(4, (3,))
    found = compute_bounds(net, x, eps, method=method, labels=y)
    points = points_of_set(x, eps, float("inf"), None, 40)
    with torch.no_grad():
        values = margins(net(points.flatten(0, 1)).unflatten(0, points.shape[:2]), y)
    slack = 1e-4 * (1 + values.abs().max())
    assert bool((values >= found.lower - slack).all()) and bool((values <= found.upper + slack).all())
    want = compute_bounds(net.double(), x.double(), eps, method=method, labels=y)
    near([found.lower, found.upper], [want.lower, want.upper], 2e-4)


def test_a_bias_may_be_stored_with_gaps() -> None:
    torch.manual_seed(2)
    net = Net(nn.Tanh(), nn.ReLU(), nn.ReLU()).eval()
    for layer in (net.a, net.d):
        wide = torch.randn(len(layer.bias), 3)
        layer.bias = nn.Parameter(wide[:, 1])
        assert layer.bias.stride() == (3,)
    x, y = torch.rand(3, *IMAGE), torch.tensor([0, 3, 1])
    for method in ("crown-ibp", "ibp"):
        got = compute_bounds(net, x, 0.1, labels=y, method=method)
        want = compute_bounds(copy.deepcopy(net).double(), x.double(), 0.1, labels=y, method=method)
        near([got.lower, got.upper], [want.lower, want.upper], 2e-4)
