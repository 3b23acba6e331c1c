"""The way of devices that must not be waited for: all neurons of a layer are bounded, nothing on the way reads a
value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrobust.bounds import compute_bounds, engine

from .nets import NETS, make

READS = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "equal.default", "is_nonzero")


class Reads(TorchDispatchMode):
    """Operators that make the host wait for a device, or whose result has a size that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(f) for name in READS):
            self.found.append(str(f))
        return f(*args, **(kwargs or {}))


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Reads:
    """CPU tensors take the way of CUDA, and what the propagation reads is listed."""
    reads = Reads()
    monkeypatch.setattr(engine, "sizes_must_be_known", lambda device: True)
    for name in ("forward", "final"):
        plain = getattr(engine.Engine, name)

        def watched(*args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            with reads:
                return plain(*args, **kwargs)

        monkeypatch.setattr(engine.Engine, name, watched)
    return reads


def pooled() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.LazyLinear(6), nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    net(torch.rand(1, 3, 8, 8))
    return net.requires_grad_(False)


@pytest.mark.parametrize("name", [*NETS, "pooled"])
@pytest.mark.parametrize("method", ["crown-ibp", "fast-lin", "crown"])
@pytest.mark.parametrize("norm", [float("inf"), 2.0])
def test_equals_the_picked_way_and_reads_nothing(
    name: str, method: str, norm: float, request: pytest.FixtureRequest
) -> None:
    net, shape = (pooled(), (3, 8, 8)) if name == "pooled" else make(name)
    x = torch.rand(2, *shape)
    options = {"norm": norm, "method": method, "return_linear": True, "check": "none"}
    with torch.no_grad():
        want = compute_bounds(net, x, 0.05, **options)
        reads = request.getfixturevalue("forced")
        got = compute_bounds(net, x, 0.05, **options)
    assert reads.found == []
    torch.testing.assert_close(got.lower, want.lower, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.upper, want.upper, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.linear.lower_A, want.linear.lower_A, rtol=1e-3, atol=1e-4)


def test_intermediate_bounds_and_gradients_are_those_of_the_picked_way(request: pytest.FixtureRequest) -> None:
    net = pooled().double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    results = []
    for way in ("picked", "forced"):
        if way == "forced":
            request.getfixturevalue("forced")
        eps = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
        found = compute_bounds(net, x, eps, method="crown", return_intermediate=True)
        (grad,) = torch.autograd.grad(found.lower.sum(), eps)
        results.append((found.lower, grad, dict(found.intermediate)))
    torch.testing.assert_close(results[0], results[1])
