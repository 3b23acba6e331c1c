"""Regions with a bound per feature: optimal where the answer is known, proved independently everywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.certify import nonuniform_radius


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


def test_linear_model_has_a_closed_form():
    """One hyperplane a.x + b: the largest volume has eps_j = margin / (M |a_j|)."""
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    x = torch.randn(5, 6)
    y = model(x).argmax(1)
    found = nonuniform_radius(model, x, y, delta=0.0, iterations=300)
    a = model.weight[0] - model.weight[1]
    margin = (model(x)[:, 0] - model(x)[:, 1]).abs().detach()
    want = margin[:, None] / (6 * a.abs())
    torch.testing.assert_close(found.volume, want.log().mean(1).exp().detach(), rtol=2e-2, atol=0)
    assert (found.volume <= want.log().mean(1).exp() * (1 + 1e-5)).all()
    torch.testing.assert_close(found.uniform, (margin / a.abs().sum()).detach(), rtol=1e-3, atol=0)
    assert (found.volume > found.uniform).all()


@pytest.mark.parametrize("norm", (2, math.inf))
@pytest.mark.parametrize("elision", (True, False))
def test_every_region_is_certified_again_in_float64(norm, elision):
    model = network()
    with torch.no_grad():
        model[0].weight *= torch.linspace(0.1, 2, 8)  # features of different weight
    x = torch.randn(6, 8)
    y = model(x).argmax(1)
    y[2] = (y[2] + 1) % 3  # cannot be certified
    found = nonuniform_radius(model, x, y, norm=norm, iterations=60, elision=elision)
    assert found.eps[2].eq(0).all()
    assert found.volume[2] == 0
    assert found.uniform[2] == 0
    keep = torch.arange(6) != 2
    assert (found.volume[keep] >= found.uniform[keep] * (1 - 1e-6)).all()
    assert found.volume[keep].mean() > 1.1 * found.uniform[keep].mean()
    model.double()
    lower = fr.bounds.compute_bounds(
        model, x[keep].double(), found.eps[keep].double(), norm=norm, method="fast-lin", labels=y[keep]
    ).lower
    assert (lower > 0).all()
    # and no sample of the region changes the prediction
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        v = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        v = v / torch.linalg.vector_norm(v, norm, 1, keepdim=True)
        assert torch.equal(model(x[keep].double() + found.eps[keep].double() * v).argmax(1), y[keep])


def test_uniform_mode_and_direction():
    model = network()
    x = torch.randn(4, 8)
    y = model(x).argmax(1)
    uniform = nonuniform_radius(model, x, y, uniform=True, delta=0.0)
    assert torch.equal(uniform.eps, uniform.uniform[:, None].expand(4, 8))
    torch.testing.assert_close(uniform.volume, uniform.uniform, rtol=1e-5, atol=0)
    search = fr.certify.search_radius(model, x, y, high=4.0, tol=1e-5)
    torch.testing.assert_close(uniform.uniform, search.radius, rtol=2e-3, atol=1e-4)
    full = nonuniform_radius(model, x, y, iterations=150)
    # a known direction: the start alone is as good, without a single step
    again = nonuniform_radius(model, x, y, direction=full.eps, iterations=0)
    torch.testing.assert_close(again.volume, full.volume, rtol=1e-3, atol=0)


def test_clip_limits_the_region():
    model = network()
    x = torch.rand(4, 8)
    y = model(x).argmax(1)
    found = nonuniform_radius(model, x, y, clip=(0, 1), iterations=40)
    assert (found.eps <= 1).all()
    lower = fr.bounds.compute_bounds(model, x, found.eps, clip=(0, 1), method="fast-lin", labels=y).lower
    assert (lower[found.uniform > 0] > 0).all()


def test_examples_do_not_see_each_other():
    model = network()
    x = torch.randn(3, 8)
    y = model(x).argmax(1)
    together = nonuniform_radius(model, x, y, iterations=30)
    for i in range(3):
        alone = nonuniform_radius(model, x[i : i + 1], y[i : i + 1], iterations=30)
        torch.testing.assert_close(together.volume[i : i + 1], alone.volume, rtol=2e-3, atol=1e-6)


def test_errors_name_the_argument():
    model, x = network(), torch.randn(2, 8)
    y = model(x).argmax(1)
    with pytest.raises(ValueError, match="method"):
        nonuniform_radius(model, x, y, method="exact")
    with pytest.raises(ValueError, match="direction: got shape"):
        nonuniform_radius(model, x, y, direction=torch.ones(3))
    with pytest.raises(ValueError, match="direction: got values"):
        nonuniform_radius(model, x, y, direction=torch.zeros(8))
    with pytest.raises(ValueError, match="decay"):
        nonuniform_radius(model, x, y, decay=1.5)
    with pytest.raises(ValueError, match="delta"):
        nonuniform_radius(model, x, y, delta=-1.0)
