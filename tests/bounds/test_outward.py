"""Outward rounding against float64, shuffled float32 evaluation orders, and exact rational arithmetic."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from fastrobust.bounds import METHODS, compute_bounds
from fastrobust.bounds.outward import round_down, round_up

from .nets import NETS, make, margins, points_of_set


@pytest.mark.parametrize("name", list(NETS))
def test_contains_the_float64_bounds(name: str) -> None:
    net, shape = make(name)
    exact = copy.deepcopy(net).double()
    x, y = torch.rand(2, *shape), torch.tensor([0, 3])
    with torch.no_grad():
        for p, eps, clip in ((math.inf, 0.1, (0, 1)), (2.0, 0.3, None), (1.0, 0.8, (0, 1)), (math.inf, 0.0, None)):
            for method in METHODS:
                got = compute_bounds(net, x, eps, norm=p, clip=clip, method=method, labels=y, rounding="outward")
                want = compute_bounds(exact, x.double(), eps, norm=p, clip=clip, method=method, labels=y)
                assert got.lower.dtype == torch.float32
                if name.endswith(("relu", "cnn", "residual", "grouped")):  # the same lines: the comparison is one-sided
                    assert (got.lower.double() <= want.lower).all() and (got.upper.double() >= want.upper).all(), (
                        p,
                        method,
                    )
                size = want.upper.abs().max() + want.lower.abs().max()
                assert (want.lower - got.lower.double()).max() <= 0.02 * size + 1e-3, (p, method)
            z = margins(exact(points_of_set(x.double(), eps, p, clip, 50).flatten(0, 1)).view(50, 2, -1), y)
            assert (got.lower.double() <= z.amin(0)).all() and (got.upper.double() >= z.amax(0)).all()


def shuffled(net: nn.Sequential, x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 evaluation of an MLP, each sum in a random order, one addition at a time."""
    for layer in net:
        if not isinstance(layer, nn.Linear):
            x = layer(x)
            continue
        order = torch.randperm(layer.in_features + 1, generator=generator)
        terms = torch.cat([x[:, None, :] * layer.weight, layer.bias.expand(len(x), -1).unsqueeze(2)], 2)[..., order]
        total = terms[..., 0]
        for k in range(1, terms.shape[2]):
            total = total + terms[..., k]
        x = total
    return x


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Tanh()])
def test_every_evaluation_order_stays_inside_at_eps_zero(act: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 64), act, nn.Linear(64, 64), act, nn.Linear(64, 5)).eval()
    for p in net.parameters():
        p.data *= 3
    x, generator = torch.rand(4, 40), torch.Generator().manual_seed(1)
    with torch.no_grad():
        z = torch.stack([shuffled(net, x, generator) for _ in range(200)])
        near = compute_bounds(net, x, 0.0, method="ibp")
        assert ((near.lower > z.amin(0)) | (near.upper < z.amax(0))).any()  # rounding to nearest does not give this
        for method in METHODS:
            got = compute_bounds(net, x, 0.0, method=method, rounding="outward")
            assert (got.lower <= z.amin(0)).all() and (got.upper >= z.amax(0)).all(), method


def test_contains_exact_rational_values() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    x, eps = torch.rand(1, 3), 0.1

    def exact(point: list[Fraction]) -> list[Fraction]:
        values = point
        for layer in net:
            if isinstance(layer, nn.ReLU):
                values = [max(v, Fraction(0)) for v in values]
            else:
                w, b = layer.weight.tolist(), layer.bias.tolist()
                values = [
                    sum((Fraction(a) * v for a, v in zip(row, values, strict=False)), Fraction(c))
                    for row, c in zip(w, b, strict=False)
                ]
        return values

    base = [Fraction(v) for v in x[0].tolist()]
    radius = Fraction(eps)
    with torch.no_grad():
        found = {m: compute_bounds(net, x, eps, method=m, rounding="outward") for m in METHODS}
    for a in range(3**3):
        point = [v + radius * (a // 3**i % 3 - 1) for i, v in enumerate(base)]
        z = exact(point)
        for method, b in found.items():
            for k in range(3):
                assert Fraction(b.lower[0, k].item()) <= z[k] <= Fraction(b.upper[0, k].item()), method


def test_linear_bounds_hold_with_their_float32_coefficients() -> None:
    net, shape = make("cnn")
    exact = copy.deepcopy(net).double()
    x, y = torch.rand(2, *shape), torch.tensor([0, 3])
    points = points_of_set(x.double(), 0.05, math.inf, (0, 1), 200)
    with torch.no_grad():
        linear = compute_bounds(
            net, x, 0.05, clip=(0, 1), method="crown", labels=y, rounding="outward", return_linear=True
        ).linear
        z = margins(exact(points.flatten(0, 1)).view(200, 2, -1), y)
    for s in range(200):
        low = (
            torch.einsum("bsn,bn->bs", linear.lower_A.double().flatten(2), points[s].flatten(1))
            + linear.lower_b.double()
        )
        up = (
            torch.einsum("bsn,bn->bs", linear.upper_A.double().flatten(2), points[s].flatten(1))
            + linear.upper_b.double()
        )
        assert (low <= z[s] + 1e-12).all() and (up >= z[s] - 1e-12).all()


def test_rounding_of_the_result() -> None:
    x = torch.tensor([1.0 + 2**-30, -1.0 - 2**-30, 0.5, 1e300, -1e300], dtype=torch.float64)
    assert (round_down(x).double() <= x).all() and (round_up(x).double() >= x).all()
    assert round_down(x)[2] == 0.5 and round_up(x)[2] == 0.5
