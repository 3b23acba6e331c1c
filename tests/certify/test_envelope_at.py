"""Envelopes of the ball around x, measured from another point."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.certify import polyhedral_envelope
from polyhedron_oracle import exact

EPS = {1: 1.0, 2: 0.4, math.inf: 0.15}


def network(seed=0, dtype=torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10), nn.ReLU(), nn.Linear(10, 4)]
    model = nn.Sequential(*layers)
    with torch.no_grad():  # classes about equally likely, so that rows are near
        for layer in (model[1], model[3], model[5]):
            layer.weight.mul_(2)
        model[5].bias.sub_(model(torch.rand(200, 12)).mean(0))
    return model.to(dtype).eval()


def points(model, norm, count=10, dtype=torch.float32):
    x = torch.rand(count, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 4
    return x, y, fr.attacks.pgd(model, x, y, eps=EPS[norm], norm=norm, seed=3, check=False)


@pytest.mark.parametrize("clip", (None, (0.0, 1.0)))
@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize("signed", (False, True))
def test_distances_from_another_point(norm, clip, signed):
    """Rows of the ball around x, margins and box from x', row by row in rationals."""
    model = network()
    x, y, at = points(model, norm)
    found = polyhedral_envelope(model, x, y, EPS[norm], norm=norm, clip=clip, at=at, signed=signed)
    bounds = fr.bounds.compute_bounds(
        model, x, EPS[norm], norm=norm, clip=clip, method="fast-lin", labels=y, return_linear=True, sides="lower"
    )
    infinite = 0
    for i in range(len(x)):
        low = [-math.inf] * 12 if clip is None else [-float(v) for v in at[i]]
        high = [math.inf] * 12 if clip is None else [1.0 - float(v) for v in at[i]]
        for j, (u, p) in enumerate(zip(bounds.linear.lower_A[i], bounds.linear.lower_b[i], strict=True)):
            u, p = u.detach().double(), p.detach().double()
            margin = float(u @ at[i].double() + p)
            want = float(exact(u.tolist(), margin, low, high, norm)) if margin > 0 else 0.0
            if signed and margin < 0:
                want = -float(exact((-u).tolist(), -margin, low, high, norm))
            got = found.distances[i, j].item()
            infinite += math.isinf(want)
            assert got == want if math.isinf(want) else abs(got - want) <= 1e-5 * max(1.0, abs(want))
    assert torch.equal(found.certified, (bounds.lower > 0).all(1))
    assert infinite < found.distances.numel()
    here = polyhedral_envelope(model, x, y, EPS[norm], norm=norm, clip=clip, signed=signed)
    same = polyhedral_envelope(model, x, y, EPS[norm], norm=norm, clip=clip, signed=signed, at=x)
    for name in ("radius", "distance", "certified", "distances"):
        assert torch.equal(getattr(here, name), getattr(same, name))


@pytest.mark.parametrize("norm", EPS)
def test_the_radius_holds_around_the_other_point(norm):
    model = network(seed=4)
    x, y, _ = points(model, norm, 40)
    eps = 0.25 * EPS[norm]
    at = fr.ops.random_start(x, 0.4 * eps, norm, (0.0, 1.0), seed=5)
    radius = polyhedral_envelope(model, x, y, eps, norm=norm, clip=(0, 1), at=at).radius.detach()
    away = (at.double() - x.double()).flatten(1).norm(norm, 1)
    assert bool((radius.double() <= (eps - away).clamp(min=0)).all())
    assert (radius > 0).double().mean() > 0.25
    for trial in range(20):
        start = fr.ops.random_start(at, radius, norm, (0.0, 1.0), seed=trial)
        assert bool((model(start).argmax(1) == y)[radius > 0].all())
    hit = fr.attacks.pgd(model, at, y, eps=radius, norm=norm, steps=20, check=False)
    assert bool((model(hit).argmax(1) == y)[radius > 0].all())


@pytest.mark.parametrize("norm", EPS)
def test_gradients_against_differences(norm):
    """Of all distances with respect to the point, the centre, the radius and a weight, in float64."""
    model = network(seed=2, dtype=torch.float64)
    x, y, at = points(model, norm, 4, torch.float64)
    at, x = at.mul(0.98).add(0.01).requires_grad_(), x.mul(0.98).add(0.01).requires_grad_()  # off the faces of the box
    eps = torch.tensor(EPS[norm], dtype=torch.float64, requires_grad=True)
    weight = model[3].weight

    def total() -> torch.Tensor:
        found = polyhedral_envelope(model, x, y, eps, norm=norm, clip=(0, 1), at=at, signed=True).distances
        return found[found.isfinite()].sum()

    grads = torch.autograd.grad(total(), (at, x, eps, weight))
    generator = torch.Generator().manual_seed(0)
    for t, g in zip((at, x, eps, weight), grads, strict=True):
        way = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                t.add_(sign * 1e-6 * way)
                ends.append(float(total()))
                t.sub_(sign * 1e-6 * way)
        slope = (ends[0] - ends[1]) / 2e-6
        assert abs(slope - float((g * way).sum())) <= 1e-4 * max(1.0, abs(slope))


def test_bad_points():
    model = network()
    x, y, at = points(model, 2)
    with pytest.raises(TypeError, match="at: got list, expected"):
        polyhedral_envelope(model, x, y, 0.1, at=at.tolist())
    with pytest.raises(ValueError, match=r"at: got \(3, 12\)"):
        polyhedral_envelope(model, x, y, 0.1, at=at[:3])
    with pytest.raises(ValueError, match="at: got torch.Size|at: got .*float64"):
        polyhedral_envelope(model, x, y, 0.1, at=at.double())
    with pytest.raises(ValueError, match="at: got values in"):
        polyhedral_envelope(model, x, y, 0.1, at=at + 2, clip=(0, 1))
    with pytest.raises(ValueError, match="at: got NaN"):
        polyhedral_envelope(model, x, y, 0.1, at=at * math.nan)
