"""Certificates against float64, exact oracles and attacks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.certify import polyhedral_envelope, search_radius
from fastrobust.certify.envelope import LINEAR_METHODS
from polyhedron_oracle import exact

NORMS = (1, 2, math.inf)


def network(activation=nn.ReLU, seed=0, inputs=12, classes=4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, 16), activation(), nn.Linear(16, 12), activation(), nn.Linear(12, classes)
    ).eval()


def batch(count=16, inputs=12, model=None):
    x = torch.rand(count, inputs, generator=torch.Generator().manual_seed(1))
    y = torch.zeros(count, dtype=torch.int64) if model is None else model(x).argmax(1)
    return x, y


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", LINEAR_METHODS)
@pytest.mark.parametrize("clip", (None, (0.0, 1.0)))
def test_radius_is_the_exact_distance_to_the_linear_bounds(norm, method, clip):
    """Rebuilt from U and p with rationals: never above, within 1e-5 (U x + p cancels)."""
    model = network()
    x, y = batch(6, model=model)
    y[0] = (y[0] + 1) % 4  # a misclassified example
    eps = 0.3
    found = polyhedral_envelope(model, x, y, eps, norm=norm, clip=clip, method=method)
    bounds = fr.bounds.compute_bounds(
        model, x, eps, norm=norm, clip=clip, method=method, labels=y, return_linear=True, sides="lower"
    )
    for i in range(len(x)):
        distances = []
        for u, p in zip(bounds.linear.lower_A[i], bounds.linear.lower_b[i], strict=False):
            u, p = u.detach().double(), p.detach().double()
            # in units that keep the rationals exact enough: float64 margin, exact box
            margin = float(u @ x[i].double() + p)
            low = [-math.inf] * 12 if clip is None else [-float(v) for v in x[i]]
            high = [math.inf] * 12 if clip is None else [1.0 - float(v) for v in x[i]]
            distances.append(float(exact(u.tolist(), margin, low, high, norm)))
        want = min(distances)
        got = found.distance[i].item()
        if math.isinf(want):
            assert math.isinf(got)
        else:
            assert got <= want * (1 + 1e-12)
            assert abs(got - want) <= 1e-6 * max(want, 1e-3)
        certified = bool((bounds.lower[i] > 0).all())
        assert bool(found.certified[i]) == certified
        assert found.radius[i].item() <= eps
        limit = 0.0 if want <= 0 else min(eps, want)
        assert abs(found.radius[i].item() - (eps if certified else limit)) <= 1e-5
    assert found.radius[0] == 0 and not found.certified[0]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", (nn.ReLU, nn.Tanh, nn.Sigmoid))
def test_no_adversarial_example_inside_the_radius(norm, activation):
    model = network(activation, seed=2)
    x, y = batch(model=model)
    radius = polyhedral_envelope(model, x, y, 0.05 if norm == math.inf else 0.2, norm=norm, clip=(0, 1)).radius.detach()
    assert (radius > 0).double().mean() > 0.6
    for trial in range(40):
        start = fr.ops.random_start(x, radius, norm, (0.0, 1.0), seed=trial)
        if trial % 4 == 0:  # and a few gradient steps
            for _ in range(10):
                z = start.detach().requires_grad_()
                loss = nn.functional.cross_entropy(model(z), y, reduction="sum")
                (grad,) = torch.autograd.grad(loss, z)
                start = fr.ops.pgd_step(start.detach(), x, grad, radius / 4, radius, norm, (0.0, 1.0))
        assert torch.equal(model(start).argmax(1), y)


def test_partial_certificates_beyond_the_first_phase():
    """Where the margins fail somewhere in the ball, the distance to the envelope still is a radius (figure 3.6)."""
    model = network()
    x, y = batch(model=model)
    seen = 0
    for eps in (0.02, 0.05, 0.1, 0.2):
        found = polyhedral_envelope(model, x, y, eps, norm=math.inf, clip=(0, 1))
        partial = ~found.certified & (found.radius > 0)
        assert (found.radius[partial] < eps).all()
        seen += int(partial.sum())
    assert seen > 0


def test_vanilla_is_the_formula_of_lemma_3_1():
    model = network()
    x, y = batch(model=model)
    found = polyhedral_envelope(model, x, y, 0.2, norm=2)
    bounds = fr.bounds.compute_bounds(model, x, 0.2, norm=2, method="fast-lin", labels=y, return_linear=True)
    want = (bounds.linear.lower_at(x) / bounds.linear.lower_A.norm(dim=2)).amin(1).clamp_min(0)
    torch.testing.assert_close(found.distance, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_of_a_whole_certificate_by_finite_differences(norm):
    model = network(nn.Tanh).double()
    x, y = batch(4, model=model.float())
    model.double()
    x = x.double().requires_grad_()
    eps = torch.full((4,), 0.5, dtype=torch.float64, requires_grad=True)
    weight = model[1].weight

    def radius(x, eps):
        return polyhedral_envelope(model, x, y, eps, norm=norm, clip=(0, 1)).distance

    value = radius(x, eps)
    grads = torch.autograd.grad(value.sum(), (x, eps, weight))
    step = 1e-6
    generator = torch.Generator().manual_seed(0)
    for leaf, grad in zip((x, eps, weight), grads, strict=False):
        for _ in range(5):
            direction = torch.randn(leaf.shape, dtype=torch.float64, generator=generator)
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    leaf += sign * step * direction
                    ends.append(radius(x, eps).sum().item())
                    leaf -= sign * step * direction
            numeric = (ends[0] - ends[1]) / (2 * step)
            assert abs(numeric - (grad * direction).sum().item()) <= 1e-5 * max(1.0, abs(numeric))


def test_examples_do_not_see_each_other():
    model = network()
    x, y = batch(model=model)
    together = polyhedral_envelope(model, x, y, 0.3, clip=(0, 1)).radius
    alone = torch.cat(
        [polyhedral_envelope(model, x[i : i + 1], y[i : i + 1], 0.3, clip=(0, 1)).radius for i in range(len(x))]
    )
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-7)
    eps = torch.linspace(0.05, 0.6, len(x))
    mixed = polyhedral_envelope(model, x, y, eps, clip=(0, 1)).radius
    for i in range(len(x)):
        one = polyhedral_envelope(model, x[i : i + 1], y[i : i + 1], float(eps[i]), clip=(0, 1)).radius
        torch.testing.assert_close(mixed[i : i + 1], one, rtol=1e-5, atol=1e-7)


def test_empty_batch():
    found = polyhedral_envelope(network(), torch.empty(0, 12), torch.empty(0, dtype=torch.int64), 0.1, clip=(0, 1))
    assert found.radius.shape == (0,)


def test_errors_name_the_argument():
    model = network()
    x, y = batch(model=model)
    with pytest.raises(ValueError, match="x: got values"):
        polyhedral_envelope(model, x + 1, y, 0.1, clip=(0, 1))
    with pytest.raises(ValueError, match="x: got NaN"):
        polyhedral_envelope(model, x * math.nan, y, 0.1, clip=(0, 1))
    with pytest.raises(ValueError, match="method"):
        polyhedral_envelope(model, x, y, 0.1, method="ibp")
    with pytest.raises(ValueError, match="norm"):
        polyhedral_envelope(model, x, y, 0.1, norm=0.5)
    with pytest.raises(ValueError, match="eps"):
        polyhedral_envelope(model, x, y, -0.1)
    with pytest.raises(ValueError, match="eps: got shape"):
        polyhedral_envelope(model, x, y, torch.full_like(x, 0.1))
    with pytest.raises(ValueError, match="labels"):
        polyhedral_envelope(model, x, y[:3], 0.1)
    with pytest.raises(ValueError, match="strategy"):
        search_radius(model, x, y, high=0.4, tol=1e-3, strategy="newton")
    with pytest.raises(ValueError, match="low, high"):
        search_radius(model, x, y, low=0.5, high=0.4, tol=1e-3)
    with pytest.raises(ValueError, match="tol"):
        search_radius(model, x, y, high=0.4, tol=0)


@pytest.mark.parametrize("norm", (2, math.inf))
def test_search_finds_what_a_float64_bisection_finds(norm):
    model = network()
    x, y = batch(model=model)
    y[3] = (y[3] + 1) % 4
    tol = 1e-4
    pec = search_radius(model, x, y, high=1.0, tol=tol, norm=norm, clip=(0, 1))
    plain = search_radius(model, x, y, high=1.0, tol=tol, norm=norm, clip=(0, 1), strategy="bisection")
    steps = math.ceil(math.log2(1.0 / tol))
    assert (plain.evaluations == steps).all()
    assert (pec.evaluations <= steps).all()
    assert pec.evaluations.double().mean() < steps - 1
    assert pec.radius[3] == 0 and plain.radius[3] == 0
    assert (pec.upper - pec.radius <= tol * 1.01).all()
    # oracle: one example at a time, float64, bisection
    model.double()
    for i in range(len(x)):
        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = 0.5 * (low + high)
            lower = fr.bounds.compute_bounds(
                model, x[i : i + 1].double(), middle, norm=norm, clip=(0, 1), method="fast-lin", labels=y[i : i + 1]
            ).lower
            low, high = (middle, high) if (lower > 0).all() else (low, middle)
        assert low - tol - 1e-5 <= plain.radius[i].item() <= low + 1e-5
        assert abs(plain.midpoint[i].item() - low) <= tol
        assert low - tol - 1e-5 <= pec.radius[i].item()
        if norm == math.inf:  # for the others the distance in ball and box together may prove more than the margins
            assert pec.radius[i].item() <= low + 1e-5
    again = polyhedral_envelope(model, x.double(), y, pec.radius.double(), norm=norm, clip=(0, 1)).radius
    assert (again >= pec.radius * (1 - 1e-5) - 1e-6).all()


def test_search_with_ibp_and_progress():
    model = network()
    x, y = batch(model=model)
    done = []
    found = search_radius(
        model,
        x,
        y,
        high=0.4,
        tol=1e-2,
        method="ibp",
        strategy="bisection",
        clip=(0, 1),
        batch_size=5,
        progress=done.append,
    )
    assert sum(done) == len(x)
    assert (found.evaluations == 6).all()
    whole = search_radius(model, x, y, high=0.4, tol=1e-2, method="ibp", strategy="bisection", clip=(0, 1))
    torch.testing.assert_close(found.radius, whole.radius, rtol=1e-5, atol=1e-6)
