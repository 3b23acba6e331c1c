"""Arguments as people have them, and searches that end: bounds and certificates."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds
from fastrobust.certify import nonuniform_radius, polyhedral_envelope, search_radius

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval().requires_grad_(False)


@pytest.fixture
def batch(net: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.rand(4, 3, 5, 5)
    return x, net(x).argmax(1)


@pytest.mark.parametrize("tol", [1e-8, 1e-30])
@pytest.mark.parametrize(
    "strategy,method", [("pec", "fast-lin"), ("pec", "crown"), ("bisection", "crown"), ("bisection", "ibp")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("low,high", [(0.0, 1e-3), (0.01, 0.3)])
def test_a_search_ends_between_neighbours(
    net: nn.Module,
    batch: tuple[Tensor, Tensor],
    tol: float,
    strategy: str,
    method: str,
    dtype: torch.dtype,
    low: float,
    high: float,
) -> None:
    x, y = batch[0].to(dtype), batch[1]
    found = search_radius(net.to(dtype), x, y, low=low, high=high, tol=tol, strategy=strategy, method=method)
    assert found.evaluations.max() <= (60 if dtype == torch.float32 else 1100)
    gap = found.upper.double() - found.radius.double()
    ulp = torch.nextafter(found.radius, torch.full_like(found.radius, math.inf)).double() - found.radius.double()
    assert (gap <= torch.maximum(2 * ulp, torch.full_like(ulp, tol))).all()
    assert (found.radius.double() <= max(high, low)).all()


def test_a_radius_is_not_rounded_up(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    low = 0.1  # float32's nearest number is larger
    found = search_radius(net, *batch, low=low, high=low, tol=1e-3)
    assert (found.radius.double() <= low).all() and (found.upper.double() >= low).all()


@pytest.mark.parametrize(
    "eps",
    [np.float32(0.25), np.float64(0.25), np.array(0.25), np.array([0.25]), torch.tensor([0.25]), torch.tensor(0.25)],
)
def test_kinds_of_eps(net: nn.Module, batch: tuple[Tensor, Tensor], eps: Any) -> None:
    x, y = batch
    for norm in (np.inf, np.float32(2), np.int64(1), "L2", "2", 1.5):
        same = norm if isinstance(norm, str) else float(norm)
        torch.testing.assert_close(
            compute_bounds(net, x, eps, norm=norm, labels=y).lower,
            compute_bounds(net, x, 0.25, norm=same, labels=y).lower,
        )
    assert torch.equal(polyhedral_envelope(net, x, y, eps).radius, polyhedral_envelope(net, x, y, 0.25).radius)
    found = search_radius(net, x, y, high=np.float32(0.25), tol=np.float64(1e-3))
    assert torch.equal(found.radius, search_radius(net, x, y, high=0.25, tol=1e-3).radius)


def test_eps_of_a_shape_that_broadcasts(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x = batch[0]
    channel = torch.tensor([0.1, 0.2, 0.05]).view(3, 1, 1)
    want = compute_bounds(net, x, channel.expand_as(x), method="crown")
    assert torch.equal(compute_bounds(net, x, channel, method="crown").lower, want.lower)
    with pytest.raises(ValueError, match=r"eps: got shape \(3,\)"):
        compute_bounds(net, x, channel.flatten())


@pytest.mark.parametrize(
    "kind", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, np.int64, np.uint8, list]
)
def test_kinds_of_labels(net: nn.Module, batch: tuple[Tensor, Tensor], kind: Any) -> None:
    x, y = batch
    given = y.tolist() if kind is list else y.to(kind) if isinstance(kind, torch.dtype) else y.numpy().astype(kind)
    if kind is list:
        with pytest.raises(TypeError, match="labels: got list, expected a tensor of integers"):
            compute_bounds(net, x, 0.1, labels=given)
        return
    for method in ("ibp", "crown"):
        assert torch.equal(
            compute_bounds(net, x, 0.1, labels=given, method=method).lower,
            compute_bounds(net, x, 0.1, labels=y, method=method).lower,
        )
    assert torch.equal(polyhedral_envelope(net, x, given, 0.1).radius, polyhedral_envelope(net, x, y, 0.1).radius)
    assert torch.equal(
        search_radius(net, x, given, high=0.1, tol=0.02).radius, search_radius(net, x, y, high=0.1, tol=0.02).radius
    )
    for elision in (True, False):
        regions = [nonuniform_radius(net, x, t, iterations=3, elision=elision).eps for t in (given, y)]
        assert torch.equal(*regions)


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.zeros(4, dtype=torch.bool), np.zeros(4), "0123"])
def test_what_is_no_label(net: nn.Module, batch: tuple[Tensor, Tensor], labels: Any) -> None:
    for call in (
        lambda: compute_bounds(net, batch[0], 0.1, labels=labels),
        lambda: polyhedral_envelope(net, batch[0], labels, 0.1),
        lambda: search_radius(net, batch[0], labels, high=0.1, tol=0.1),
        lambda: nonuniform_radius(net, batch[0], labels),
    ):
        with pytest.raises(TypeError, match="labels: got"):
            call()


@pytest.mark.parametrize("method", ["CROWN", "Crown-IBP", "fast_lin", "IBP"])
def test_names_of_methods(net: nn.Module, batch: tuple[Tensor, Tensor], method: str) -> None:
    plain = method.lower().replace("_", "-")
    x, y = batch
    assert torch.equal(
        compute_bounds(net, x, 0.1, method=method).lower, compute_bounds(net, x, 0.1, method=plain).lower
    )
    if plain != "ibp":
        assert torch.equal(
            polyhedral_envelope(net, x, y, 0.1, method=method).radius,
            polyhedral_envelope(net, x, y, 0.1, method=plain).radius,
        )
    with pytest.raises(ValueError, match="method: got 'deep', expected one of"):
        compute_bounds(net, x, 0.1, method="deep")


@pytest.mark.parametrize("norm", [1, 2, 3, math.inf])
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_box_per_channel_is_the_box_of_the_network_before_normalisation(
    norm: float, rounding: str, flat: bool
) -> None:
    """A network on normalised inputs against the one with the normalisation as its first layer."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    if flat:
        layers = [nn.Unflatten(1, (3, 5, 5)), *layers]
    inner = nn.Sequential(*layers).eval().requires_grad_(False)
    shape = (75,) if flat else (3, 5, 5)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x - mean) / std)

    mean, std = (t.expand(3, 5, 5).reshape(shape) if flat else t for t in (MEAN, STD))
    x = torch.rand(2, *shape)
    z, eps, clip = (x - mean) / std, (0.25 / std).expand_as(x), (-mean / std, (1 - mean) / std)
    y = inner(z).argmax(1)
    for method in ("ibp", "crown-ibp", "crown"):
        got = compute_bounds(inner, z, eps, norm=norm, clip=clip, method=method, labels=y, rounding=rounding)
        want = compute_bounds(Whole(), x, 0.25, norm=norm, clip=(0, 1), method=method, labels=y, rounding=rounding)
        torch.testing.assert_close(got.lower, want.lower, rtol=1e-3, atol=1e-3)
    per_example = tuple(c.expand(2, *shape).contiguous() for c in clip)
    as_arrays = tuple(c.numpy() for c in clip)
    uniform = polyhedral_envelope(inner, z, y, 0.5, norm=norm, clip=clip, rounding=rounding).radius
    for box in (per_example, as_arrays, (clip[0].double(), clip[1].double())):
        assert torch.equal(
            polyhedral_envelope(inner, z, y, 0.5, norm=norm, clip=box, rounding=rounding).radius, uniform
        )
    found = search_radius(inner, z, y, high=1.0, tol=0.05, norm=norm, clip=per_example, rounding=rounding)
    assert (found.radius >= 0).all()
    regions = nonuniform_radius(inner, z, y, norm=norm, clip=clip, iterations=5, rounding=rounding)
    assert torch.isfinite(regions.eps).all()


@pytest.mark.parametrize(
    "clip,said",
    [
        ((0.0,), "clip"),
        ((1.0, 0.0), "low < high"),
        ((torch.zeros(2), 1.0), "broadcasts"),
        ((torch.ones(3, 1, 1), torch.zeros(3, 1, 1)), "low < high"),
        ((torch.full((3, 1, 1), math.nan), 1.0), "low < high"),
        ((0.5, torch.ones(3, 1, 1)), "outside|expected all in clip"),
        ("01x", "clip"),
    ],
)
def test_boxes_that_are_none(net: nn.Module, batch: tuple[Tensor, Tensor], clip: Any, said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        compute_bounds(net, batch[0], 0.1, clip=clip)


def test_networks_that_overflow_prove_nothing() -> None:
    """Bounds that are no numbers are an error, whatever made them: never a certificate."""
    torch.manual_seed(0)
    x = torch.rand(2, 4)
    for value in (math.nan, math.inf, -math.inf, 3e38):
        for layer in (0, 2):
            net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval().requires_grad_(False)
            net[layer].bias.fill_(value)
            net[layer].weight.mul_(1e38)
            for method in ("ibp", "crown-ibp", "fast-lin", "crown"):
                for norm in (1, 2, math.inf):
                    try:
                        b = compute_bounds(net, x, 0.1, norm=norm, method=method, labels=torch.tensor([0, 1]))
                    except ValueError as error:
                        assert "NaN" in str(error) or "overflow" in str(error)
                    else:
                        z = copy.deepcopy(net).double()(x.double())
                        own = z[[0, 1], [0, 1]][:, None] - torch.stack([z[0, [1, 2]], z[1, [0, 2]]])
                        room = 1e-3 * z.abs().max()
                        assert (b.lower <= own + room).all() and (b.upper >= own - room).all()
