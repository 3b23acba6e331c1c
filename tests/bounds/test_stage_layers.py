"""Convolutions with groups and dilation, max pooling and one-dimensional layers in the op of stages, against the engine
in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds

from .nets import margins, points_of_set, spied
from .test_margins import bounds_and_gradients, near
from .test_stage_linear import run

IMAGE = (4, 9, 8)


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 6, 3, 1, 1, groups=2),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, 2, 1, groups=6),
        nn.Tanh(),
        nn.Conv2d(6, 9, 1),
        nn.ReLU(),
        nn.Conv2d(9, 9, 3, 1, 2, dilation=2, groups=3, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(180, 4),
    )


def pooled() -> nn.Module:
    """Behind a ReLU and behind a product; overlapping windows, padding, ceil_mode; a dense layer behind an image."""
    return nn.Sequential(
        nn.Conv2d(4, 5, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, 1, 1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.ELU(),
        nn.Conv2d(6, 3, 2),
        nn.Flatten(),
        nn.Linear(12, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )


class Skips(nn.Module):
    """A pooled branch beside a strided one, pooling of the input, of a sum and of a value that others read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 3, 1, 1), nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.Conv2d(4, 4, 1)
        self.out = nn.Linear(4 * 20, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(x, 3, 1, 1)
        h = torch.relu(self.a(h))
        k = F.max_pool2d(self.c(h) - h, 2, ceil_mode=True)
        k = k + self.b(h) + F.max_pool2d(h, 2, ceil_mode=True)
        return self.out(torch.relu(k).flatten(1))


NETS: dict[str, Any] = {"grouped": grouped, "pooled": pooled, "skips": Skips}


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return spied(monkeypatch, "margins_of_stages")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "ibp-linear"])
def test_bounds_and_gradients_equal_the_engine(name: str, method: str, taken: list[bool]) -> None:
    for batch, input_too, sides in ((1, False, "both"), (3, True, "lower"), (7, True, "both")):
        torch.manual_seed(batch)
        net, x, y = NETS[name]().eval(), torch.rand(batch, *IMAGE), torch.randint(4, (batch,))
        eps = torch.rand_like(x) / 8 if batch == 3 else 0.05
        labels = y if batch != 3 or method == "ibp" else None
        taken.clear()
        kwargs = {"method": method, "sides": sides, "clip": None if batch < 7 else (0.0, 1.0)}
        got = bounds_and_gradients(net, x, eps, labels, torch.float32, input_too, **kwargs)
        assert taken == [True, True]
        near(got, bounds_and_gradients(net, x, eps, labels, torch.float64, input_too, **kwargs), 5e-4)


@pytest.mark.parametrize("name", NETS)
def test_linear_bounds_and_their_gradients(name: str, taken: list[bool]) -> None:
    for method, recorded in itertools.product(("crown-ibp", "ibp-linear"), (False, True)):
        torch.manual_seed(1)
        net, x = NETS[name]().eval(), torch.rand(3, *IMAGE)
        asked = {"method": method, "labels": torch.tensor([0, 3, 1]), "return_linear": True, "intersect": True}
        taken.clear()
        got = run(net, x, 0.05, torch.float32, recorded, **asked)
        assert all(taken)
        near(got, run(net, x, 0.05, torch.float64, recorded, **asked), 5e-4)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
    st.integers(2, 3),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["ibp", "crown-ibp", "ibp-linear"]),
    st.sampled_from([0.0, 0.1, 2.0]),
    st.integers(0, 99),
)
def test_any_geometry_holds_samples(
    groups: int,
    kernel: int,
    stride: int,
    padding: int,
    dilation: int,
    window: int,
    step: int,
    ceil: bool,
    method: str,
    eps: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups),
        nn.ReLU(),
        nn.MaxPool2d(window, step, min(padding, window // 2), ceil_mode=ceil),
        nn.Conv2d(8, 4, 1, groups=groups),
        nn.LeakyReLU(0.1),
        nn.Flatten(),
        nn.LazyLinear(3),
    ).eval()
    x, y = torch.randn(2, *IMAGE), torch.randint(3, (2,))
    net(x)
    found = compute_bounds(net, x, eps, method=method, labels=y)
    points = points_of_set(x, eps, float("inf"), None, 40)
    with torch.no_grad():
        values = margins(net(points.flatten(0, 1)).unflatten(0, points.shape[:2]), y)
    slack = 1e-4 * (1 + values.abs().max())
    assert bool((values >= found.lower - slack).all()) and bool((values <= found.upper + slack).all())
    want = compute_bounds(copy.deepcopy(net).double(), x.double(), eps, method=method, labels=y)
    near([found.lower, found.upper], [want.lower, want.upper], 2e-4)


def test_layers_of_one_dimension(taken: list[bool]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(4, 5, 4, 2, 1),
        nn.ReLU(),
        nn.MaxPool1d(3, 2, 1),
        nn.Conv1d(5, 4, 3, dilation=2),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(20, 4),
    )
    x, y = torch.rand(3, 4, 36), torch.tensor([0, 3, 1])
    for method in ("ibp", "crown-ibp"):
        got = bounds_and_gradients(net, x, 0.1, y, torch.float32, True, method=method)
        near(got, bounds_and_gradients(net, x, 0.1, y, torch.float64, True, method=method), 5e-4)
    assert taken == [True, True, False, False] * 2
