"""rounding="outward" against exact rationals: no certificate reaches past what real arithmetic allows."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

import fastrobust as fr
from fastrobust.certify import nonuniform_radius, polyhedral_envelope, search_radius
from polyhedron_oracle import exact


def fractions(values: torch.Tensor) -> list:
    return [Fraction(v) for v in values.double().tolist()]


def margins_of_linear(model: nn.Linear, y: int) -> list[tuple[list[Fraction], Fraction]]:
    """(row, offset) of z_y - z_j for every other j, exactly."""
    rows, offsets = [fractions(row) for row in model.weight.detach()], fractions(model.bias.detach())
    return [
        ([u - v for u, v in zip(rows[y], rows[j], strict=True)], offsets[y] - offsets[j])
        for j in range(len(rows))
        if j != y
    ]


def at(row: list[Fraction], offset: Fraction, x: list[Fraction]) -> Fraction:
    return sum((u * v for u, v in zip(row, x, strict=True)), offset)


@pytest.mark.parametrize("norm", (1, 2, math.inf))
@pytest.mark.parametrize("scale", (1.0, 1e3))
@pytest.mark.parametrize("clip", (None, (0.0, 1.0)))
def test_linear_models_have_an_exact_distance(norm, scale, clip):
    """Large weights that nearly cancel in the differences: float32 margins are off by much of their size."""
    torch.manual_seed(0)
    for _ in range(2 if norm == 2 else 8):  # square roots of long fractions take their time
        model = nn.Linear(12, 4)
        with torch.no_grad():
            model.weight += scale
            model.bias -= scale
        x = torch.rand(8, 12)
        y = model.double()(x.double()).argmax(1)
        model.float()
        found = polyhedral_envelope(model, x, y, 1.0, norm=norm, clip=clip, rounding="outward")
        for i in range(8):
            point = fractions(x[i])
            low = [-math.inf] * 12 if clip is None else [-v for v in point]
            high = [math.inf] * 12 if clip is None else [1 - v for v in point]
            rows = margins_of_linear(model, int(y[i]))
            want = min(exact(row, at(row, offset, point), low, high, norm) for row, offset in rows)
            got = found.radius[i].item()
            assert got <= want
            # what float32 evaluation of two outputs can be wrong by on the input set is all that is given up
            far = [v + 1 for v in point]
            wrong = [
                at([abs(w) for w in fractions(r)], abs(b), far)
                for r, b in zip(model.weight, fractions(model.bias), strict=True)
            ]
            lost = Fraction(2 * 15, 2**24) * max(wrong)
            rest = [(row, max(at(row, offset, point) - lost, Fraction(0))) for row, offset in rows]
            least = min(float(exact(row, margin, low, high, norm)) for row, margin in rest)
            assert got >= 0.9 * min(least, 1.0) - 1e-5


def smallest_margin(model: nn.Sequential, y: int, low: Fraction, high: Fraction) -> Fraction:
    """The exact minimum of min_j z_y - z_j over [low, high] of a ReLU network with one input.

    The network is linear between knots; a ReLU adds the knots where one of its inputs changes sign.
    """
    knots = [low, high]
    values = [[low], [high]]  # of all neurons of the layer, at each knot
    for layer in model:
        if isinstance(layer, nn.Linear):
            rows, offsets = [fractions(r) for r in layer.weight.detach()], fractions(layer.bias.detach())
            values = [[at(r, o, v) for r, o in zip(rows, offsets, strict=True)] for v in values]
        elif isinstance(layer, nn.ReLU):
            new_knots, new_values = knots[:1], values[:1]
            for k in range(1, len(knots)):
                before, after, width = values[k - 1], values[k], knots[k] - knots[k - 1]
                shares = sorted({u / (u - v) for u, v in zip(before, after, strict=True) if u * v < 0})
                new_knots += [knots[k - 1] + s * width for s in shares] + [knots[k]]
                new_values += [[u + s * (v - u) for u, v in zip(before, after, strict=True)] for s in shares] + [after]
            knots, values = new_knots, [[max(v, Fraction(0)) for v in row] for row in new_values]
    return min(v[y] - v[j] for v in values for j in range(len(v)) if j != y)


@pytest.mark.parametrize("method", ("fast-lin", "crown", "crown-ibp", "ibp-linear"))
@pytest.mark.parametrize("offset", (0.0, 300.0))
def test_networks_with_one_input(method, offset):
    torch.manual_seed(1)
    checked = 0
    for _ in range(4):
        model = nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()
        with torch.no_grad():  # large terms that cancel behind the ReLUs
            model[0].bias += offset
            model[2].bias -= offset * model[2].weight.sum(1)
        x = torch.rand(6, 1)
        y = model.double()(x.double()).argmax(1)
        model.float()
        radii = [polyhedral_envelope(model, x, y, eps, method=method, rounding="outward").radius for eps in (0.1, 0.7)]
        radii.append(search_radius(model, x, y, high=1.0, tol=1e-3, method=method, rounding="outward").radius)
        for radius in radii:
            for i in torch.nonzero(radius > 0).flatten().tolist():
                middle, r = Fraction(x[i].item()), Fraction(radius[i].item())
                assert smallest_margin(model, int(y[i]), middle - r, middle + r) >= 0
                inside = (x[i] + radius[i] * torch.linspace(-0.999, 0.999, 101))[:, None]
                assert bool((model(inside).argmax(1) == y[i]).all())
                checked += 1
    assert checked > 10


def test_outward_gives_up_little():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 5)).eval()
    x = torch.rand(16, 20)
    y = model(x).argmax(1)
    for norm in (2, math.inf):
        near = polyhedral_envelope(model, x, y, 0.3, norm=norm, clip=(0, 1)).distance
        out = polyhedral_envelope(model, x, y, 0.3, norm=norm, clip=(0, 1), rounding="outward").distance
        assert (out <= near * (1 + 1e-5) + 1e-6).all()
        torch.testing.assert_close(out, near, rtol=1e-3, atol=1e-5)


def test_nonuniform_regions_of_a_linear_model():
    torch.manual_seed(3)
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight += 100.0
    x = torch.rand(5, 6)
    y = model.double()(x.double()).argmax(1)
    model.float()
    found = nonuniform_radius(model, x, y, delta=0.0, iterations=40, rounding="outward")
    assert (found.volume > 0).any()
    for i in range(5):
        for eps in (fractions(found.eps[i]), fractions(found.uniform[i].expand(6))):
            for row, offset in margins_of_linear(model, int(y[i])):
                slack = at(row, offset, fractions(x[i])) - sum(abs(u) * e for u, e in zip(row, eps, strict=True))
                assert slack >= 0


def test_the_argument_is_checked():
    model, x = nn.Linear(3, 2), torch.rand(2, 3)
    y = model(x).argmax(1)
    with pytest.raises(ValueError, match="rounding"):
        polyhedral_envelope(model, x, y, 0.1, rounding="up")
    with pytest.raises(TypeError, match="float32"):
        polyhedral_envelope(model.double(), x.double(), y, 0.1, rounding="outward")


def test_box_is_rounded_outwards():
    """1 - x is no float64 for tiny x: the room must not come out too small."""
    x = torch.tensor([[1e-30, 2.0**-60, 0.5, 1.0, 0.0, 1 / 3]])
    low, high = fr.certify.envelope.box_around(x, (0.0, 1.0))
    for v, lo, hi in zip(fractions(x[0]), fractions(low.flatten()), fractions(high.flatten()), strict=True):
        assert lo <= -v
        assert hi >= 1 - v
    low, high = fr.certify.envelope.box_around(-x, (-1.0, 2.0**-80))
    for v, lo, hi in zip(fractions(-x[0]), fractions(low.flatten()), fractions(high.flatten()), strict=True):
        assert lo <= -1 - v
        assert hi >= Fraction(2) ** -80 - v
