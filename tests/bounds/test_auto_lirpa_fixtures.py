"""The bounds that auto_LiRPA's own tests store, from a checkout of it (FASTROBUST_AUTO_LIRPA names its folder)."""

from __future__ import annotations

import math
import os
import pathlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds


def load(kind: str, name: str) -> dict[str, Any]:
    folder = os.environ.get("FASTROBUST_AUTO_LIRPA")
    if not folder:
        pytest.skip("needs FASTROBUST_AUTO_LIRPA, a checkout of auto_LiRPA")
    file = pathlib.Path(folder) / "tests" / kind / name
    if not file.exists():
        pytest.skip(f"needs {kind}/{name} in the checkout of auto_LiRPA")

    class Plain(Tensor):  # stands for their tensor subclass, so that nothing of theirs has to run
        pass

    class Set:
        pass

    names = [
        (Plain, "auto_LiRPA.bounded_tensor.BoundedTensor"),
        (Set, "auto_LiRPA.perturbations.PerturbationLpNorm"),
        (torch._tensor._rebuild_from_type, "torch.tensor._rebuild_from_type"),  # of an older torch
    ]
    with torch.serialization.safe_globals(names):
        found = torch.load(file, map_location="cpu", weights_only=True)
    return {k: v.as_subclass(Tensor).detach() if isinstance(v, Tensor) else v for k, v in found.items()}


def fill(net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """Their parameters, in their order."""
    own = net.state_dict()
    assert len(own) == len(state)
    values = (v.reshape(w.shape) for v, w in zip(state.values(), own.values(), strict=True))
    net.load_state_dict(dict(zip(own, values, strict=True)))
    return net.eval()


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn = nn.Conv2d(3, 3, 4, 2, 1), nn.BatchNorm2d(3)
        self.shortcut, self.conv2 = nn.Conv2d(3, 3, 4, 2, 1), nn.Conv2d(3, 3, 4, 2, 1)
        self.fc1 = nn.Linear(192, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.conv1(self.bn(x))) + self.shortcut(x)
        return self.fc1(torch.flatten(torch.relu(self.conv2(h)), 1))


METHODS = {"IBP": "ibp", "CROWN-IBP": "crown-ibp", "CROWN": "crown", "CROWN-same-slope": "fast-lin"}


@pytest.mark.parametrize("kind", ["data", "data_64"])
@pytest.mark.parametrize("norm,key", [(math.inf, "l_inf"), (2.0, "l_2")])
def test_vision_bounds_and_gradients(kind: str, norm: float, key: str) -> None:
    stored = load(kind, "vision_test_data")
    dtype = torch.float32 if kind == "data" else torch.float64
    net = fill(Vision(), stored["model"]).to(dtype)
    tolerance = 1e-5 if kind == "data" else 1e-9
    before = torch.zeros_like(stored["data"], dtype=dtype)
    for theirs, method in METHODS.items():
        x = stored["data"].to(dtype).requires_grad_(True)
        b = compute_bounds(net, x, 0.01, norm=norm, method=method)
        assert b.upper is not None
        low, up = stored[f"{key}_{theirs}_lb"], stored[f"{key}_{theirs}_ub"]
        size = torch.maximum(up.abs(), low.abs()).max()
        want = stored[f"{key}_{theirs}_grad"] - before  # theirs add up from method to method
        before = stored[f"{key}_{theirs}_grad"]
        better = torch.stack([b.lower - low, up - b.upper])
        assert (better >= -tolerance * size).all(), theirs
        if norm == 2 and "IBP" in theirs:
            # their l2 norm of a neuron at the border counts the weights that meet the padding, too
            assert (better <= 0.03 * size).all(), theirs
            continue
        assert (better <= tolerance * size).all(), theirs
        if theirs != "CROWN-same-slope":  # their own test leaves this gradient out
            (g,) = torch.autograd.grad((b.upper - b.lower).sum(), x)
            assert (g - want).abs().max() <= 10 * tolerance * want.abs().max(), theirs


@pytest.mark.parametrize("kind", ["data", "data_64"])
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [2, 3])
def test_one_dimensional_convolutions(kind: str, kernel: int, padding: int, stride: int) -> None:
    stored = load(kind, f"conv1d_test_data_{kernel}-{padding}-{stride}")
    dtype = torch.float32 if kind == "data" else torch.float64
    x = stored["input"].to(dtype)
    conv = lambda: nn.Conv1d(1, 1, kernel, stride, padding)
    features = stored["model"]["n_n_linear.weight"].shape[1]
    net = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv(), nn.ReLU(), nn.Flatten(), nn.Linear(features, 2))
    compare(fill(net, stored["model"]).to(dtype), x, stored, 1e-5 if kind == "data" else 1e-7)


class Permute(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


@pytest.mark.parametrize("kind", ["data", "data_64"])
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("conv_padding", [0, 1])
def test_max_pooling(kind: str, kernel: int, padding: int, conv_padding: int) -> None:
    stored = load(kind, f"maxpool_test_data_{kernel}-{padding}-{kernel}-{conv_padding}")
    dtype = torch.float32 if kind == "data" else torch.float64
    features = stored["model"]["n_n_dense.weight"].shape[1]
    net = nn.Sequential(
        nn.Conv2d(1, 1, 2, 1, conv_padding), nn.ReLU(), nn.MaxPool2d(kernel, kernel, padding),
        nn.Conv2d(1, 1, 2, 1, conv_padding), nn.ReLU(), Permute(), nn.Flatten(), nn.Linear(features, 2),
    )  # fmt: skip
    tolerance = 1e-5 if kind == "data" else 1e-7
    compare(fill(net, stored["model"]).to(dtype), stored["input"].to(dtype), stored, tolerance, padding > 0)


def compare(net: nn.Module, x: Tensor, stored: dict[str, Any], tolerance: float, padded: bool = False) -> None:
    """Never looser; equal but for neurons that intervals prove stable, which keep their intervals here."""
    with torch.no_grad():
        b = compute_bounds(net, x, 0.3, method="crown")
    assert b.upper is not None
    size = torch.maximum(stored["ub"].abs(), stored["lb"].abs()).max()
    better = torch.stack([b.lower - stored["lb"], stored["ub"] - b.upper])
    if padded:  # their padded zeros win ties of lower bounds and give the line 0, where ours follows an input
        assert better.mean() >= 0
        return
    assert (better >= -tolerance * size).all(), (better.min() / size).item()
    assert (better <= 0.02 * size).all(), (better.max() / size).item()
    assert (better.abs() <= tolerance * size).double().mean() >= 0.25
