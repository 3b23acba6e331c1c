"""Linear bounds at the input, specifications, outputs and intersections from the op of stages, against the engine in
float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds
from fastrobust.certify import polyhedral_envelope

from .nets import spied
from .test_margins import near
from .test_stage_activations import ACTIVATIONS, Net
from .test_stage_activations import IMAGE as SMALL
from .test_stage_margins import IMAGE, NETS, network


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    return spied(monkeypatch, "margins_of_stages")


def everything(found: Any) -> list[Tensor]:
    linear = (
        []
        if found.linear is None
        else [
            getattr(found.linear, k) for k in ("lower_A", "lower_b", "upper_A", "upper_b", "input_lower", "input_upper")
        ]
    )
    return [t for t in (found.lower, found.upper, *linear) if t is not None]


def run(net: nn.Module, x: Tensor, eps: float, dtype: torch.dtype, recorded: bool, **asked: Any) -> list[Tensor]:
    """All that was asked for and, where recorded, gradients of x, parameters and ``spec`` of a sum over it."""
    net, x = copy.deepcopy(net).to(dtype), x.to(dtype).requires_grad_(recorded)
    wanted = [x, *net.parameters()]
    if "spec" in asked:
        asked["spec"] = asked["spec"].to(dtype).requires_grad_(recorded)
        wanted.append(asked["spec"])
    with torch.set_grad_enabled(recorded):
        found = everything(compute_bounds(net, x, eps, **asked))
    if not recorded:
        return found
    value = sum((t * torch.linspace(1, 2, t.numel(), dtype=dtype).view_as(t)).sum() for t in found)
    return [*found, *torch.autograd.grad(value, wanted)]


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["crown-ibp", "ibp-linear"])
@pytest.mark.parametrize("sides", ["lower", "both", "upper"])
def test_what_is_asked_for_equals_the_engine(name: str, method: str, sides: str, taken: list[bool]) -> None:
    net = network(name)
    classes = net(torch.zeros(1, *IMAGE)).shape[1]
    for batch, recorded, kind in itertools.product((1, 3), (False, True), ("labels", "shared", "each", "outputs")):
        torch.manual_seed(batch)
        x = torch.rand(batch, *IMAGE)
        asked: dict[str, Any] = {
            "labels": {"labels": torch.randint(classes, (batch,))}, "shared": {"spec": torch.randn(3, classes)},
            "each": {"spec": torch.randn(batch, 2, classes)}, "outputs": {},
        }[kind]  # fmt: skip
        asked |= {
            "method": method,
            "sides": sides,
            "clip": None if batch == 1 else (0.0, 1.0),
            "return_linear": kind != "each",
            "intersect": kind != "labels",
        }
        taken.clear()
        got = run(net, x, 0.05, torch.float32, recorded, **asked)
        assert taken and all(taken)
        near(got, run(net, x, 0.05, torch.float64, recorded, **asked), 2e-4)


@pytest.mark.parametrize("name", ["tanh", "gelu", "leaky_relu"])
def test_linear_bounds_of_other_activations(name: str, taken: list[bool]) -> None:
    torch.manual_seed(3)
    net, x = Net(ACTIVATIONS[name]()).eval(), torch.rand(3, *SMALL)
    asked = {"method": "crown-ibp", "labels": torch.tensor([0, 3, 1]), "return_linear": True}
    got = run(net, x, 0.1, torch.float32, True, **asked)
    assert taken == [True]
    near(got, run(net, x, 0.1, torch.float64, True, **asked), 5e-4)


def test_a_linear_bound_holds(taken: list[bool]) -> None:
    torch.manual_seed(0)
    net, x, y = Net(nn.Tanh()).eval(), torch.rand(3, *SMALL), torch.tensor([0, 3, 1])
    found = compute_bounds(net, x, 0.1, method="crown-ibp", labels=y, return_linear=True)
    assert taken == [True]
    for point in (x, x + 0.1, x - 0.1 * torch.rand_like(x).sign()):
        z = net(point).detach()
        own = torch.stack([z[i, k] - torch.cat([z[i, :k], z[i, k + 1 :]]) for i, k in enumerate(y.tolist())])
        assert bool((found.linear.lower_at(point) <= own + 1e-4).all())
        assert bool((found.linear.upper_at(point) >= own - 1e-4).all())


def test_a_linear_bound_that_was_written_over_gives_no_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 4))
    found = compute_bounds(net, torch.rand(2, 7), 0.1, labels=torch.tensor([0, 3]), return_linear=True)
    with torch.no_grad():
        found.linear.lower_A.mul_(2)
    with pytest.raises(RuntimeError, match="modified"):
        found.lower.sum().backward()


def test_envelopes_go_this_way(taken: list[bool]) -> None:
    net, x = network("residual"), torch.rand(3, *IMAGE)
    y, found = net(x).argmax(1), []
    for dtype in (torch.float32, torch.float64):
        own, point = copy.deepcopy(net).to(dtype), x.to(dtype).requires_grad_()
        envelope = polyhedral_envelope(own, point, y, 0.02, clip=(-9.0, 9.0), method="crown-ibp", signed=True)
        grads = torch.autograd.grad(envelope.distances.sum(), [point, *own.parameters()])
        found.append([envelope.distances, *grads])
    assert taken == [True, False]
    near(*found, 1e-3)


def test_no_rows() -> None:
    net = network("dense")
    assert compute_bounds(net, torch.rand(2, *IMAGE), 0.1, spec=torch.zeros(0, 5)).lower.shape == (2, 0)


@pytest.mark.parametrize("name", ["forks", "dense", "mixed", "before activation", "tanh", "linear"])
@pytest.mark.parametrize("norm", [1, 2, 3.0])
def test_balls_equal_the_engine(name: str, norm: float, taken: list[bool]) -> None:
    torch.manual_seed(7)
    net, shape = (Net(nn.Tanh()).eval(), SMALL) if name == "tanh" else (None, IMAGE)
    if name == "linear":
        net = nn.Sequential(nn.Flatten(), nn.Linear(126, 30), nn.ReLU(), nn.Linear(30, 5))
    net = network(name) if net is None else net
    for method, clip, recorded, each in (
        ("crown-ibp", None, True, False),
        ("crown-ibp", (0.0, 1.0), True, True),
        ("ibp-linear", (0.0, 1.0), False, False),
        ("ibp", None, True, False),
        ("ibp", (0.0, 1.0), False, True),
    ):
        x = torch.rand(3, *shape)
        asked = {
            "method": method,
            "clip": clip,
            "norm": norm,
            "labels": torch.tensor([0, 3, 1]),
            "return_linear": method != "ibp" and not each,
        }
        eps: Any = torch.tensor([0.1, 0.3, 0.0]) if each else 0.2
        taken.clear()
        got = run(net, x, eps, torch.float32, recorded, **asked)
        # left to the engine: a ball behind a scaling of the input, and interval rows that end at the input itself
        assert taken == [name != "forks" and (name not in ("dense", "mixed") or method != "ibp")]
        wide = eps.double() if each else eps
        near(got, run(net, x, wide, torch.float64, recorded, **asked), 5e-4)
