"""Outward rounding against float64, shuffled float32 evaluation orders, and exact rational arithmetic."""

from __future__ import annotations

import copy
import math
from fractions import Fraction

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from combinations import THOROUGH
from fastrobust.bounds import compute_bounds
from fastrobust.bounds.outward import round_down, round_up

from .nets import NETS, ONE_PASS, make, margins, points_of_set


@pytest.mark.parametrize("name", list(NETS))
def test_contains_the_float64_bounds(name: str) -> None:
    net, shape = make(name)
    exact = copy.deepcopy(net).double()
    x, y = torch.rand(2, *shape), torch.tensor([0, 3])
    with torch.no_grad():
        for p, eps, clip in ((math.inf, 0.1, (0, 1)), (2.0, 0.3, None), (1.0, 0.8, (0, 1)), (math.inf, 0.0, None)):
            for method in ONE_PASS:
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


ORDERS = ("shuffled", "fused", "pairwise", "blocked")


def product(x: Tensor, weight: Tensor, bias: Tensor, order: str, g: torch.Generator) -> Tensor:
    """x (T, n) times weight (m, n) plus bias in float32, one rounded operation at a time, in an order of additions."""
    n = weight.shape[1]
    where = torch.randperm(n, generator=g)
    if order == "fused":  # the bias first, products without their own rounding
        total = bias.expand(len(x), -1)
        for k in where.tolist():
            total = (total.double() + x[:, k, None].double() * weight[:, k].double()).float()
        return total
    if order == "shuffled":
        at = int(torch.randint(n, (1,), generator=g))
        total = torch.zeros(len(x), len(weight))
        for i, k in enumerate(where.tolist()):
            total = total + x[:, k, None] * weight[:, k]
            total = total + bias if i == at else total
        return total
    terms = [x[:, k, None] * weight[:, k] for k in where.tolist()] + [bias.expand(len(x), -1)]
    if order == "blocked":
        parts = [terms[i : i + 7] for i in range(0, len(terms), 7)]
        terms = []
        for part in parts:
            total = part[0]
            for t in part[1:]:
                total = total + t
            terms.append(total)
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=False)] + (terms[-1:] if len(terms) % 2 else [])
    return terms[0]


def in_order(net: nn.Sequential, x: Tensor, order: str, g: torch.Generator) -> Tensor:
    for layer in net:
        if isinstance(layer, nn.Linear):
            x = product(x, layer.weight, layer.bias, order, g)
        elif isinstance(layer, nn.Conv2d):
            cols = torch.nn.functional.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride)
            size = [
                (s + 2 * p - k) // d + 1
                for s, p, k, d in zip(x.shape[2:], layer.padding, layer.kernel_size, layer.stride, strict=True)
            ]
            flat = cols.transpose(1, 2).flatten(0, 1)
            z = product(flat, layer.weight.flatten(1), layer.bias, order, g)
            x = z.view(len(x), -1, layer.out_channels).transpose(1, 2).unflatten(2, size)
        else:
            x = layer(x)
    return x


def float32_points(x: Tensor, eps: float, p: float, count: int) -> Tensor:
    """float32 points whose distance from x is at most eps in exact arithmetic, most of them nearly at eps."""
    points = points_of_set(x.double(), eps, p, (0.0, 1.0), count)
    near = points.float()
    beyond = (near.double() - x.double()).abs() > (points - x.double()).abs()
    near = torch.where(beyond, torch.nextafter(near, x.expand_as(near)), near)  # every coordinate towards x
    assert ((near.double() - x.double()).flatten(2).norm(p=p, dim=2) <= eps * (1 + 1e-15)).all()
    return near


def small_nets(kind: str) -> tuple[nn.Sequential, tuple[int, ...]]:
    torch.manual_seed(0)
    if kind == "cnn":
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5)
        )
        shape: tuple[int, ...] = (2, 5, 5)
    else:
        act = {"relu": nn.ReLU(), "tanh": nn.Tanh(), "sigmoid": nn.Sigmoid(), "gelu": nn.GELU(), "elu": nn.ELU()}[kind]
        net = nn.Sequential(nn.Linear(30, 24), act, nn.Linear(24, 24), act, nn.Linear(24, 5))
        shape = (30,)
    for q in net.parameters():
        q.data *= 2
    return net.eval(), shape


@pytest.mark.parametrize("kind", ["relu", "tanh", "sigmoid", "gelu", "elu", "cnn"])
@pytest.mark.parametrize(
    "p,eps", [(math.inf, 0.0), (math.inf, 1e-6), (math.inf, 0.02), (2.0, 1e-6), (2.0, 0.1), (1.0, 0.2)]
)
def test_float32_evaluations_of_many_points_stay_inside(kind: str, p: float, eps: float) -> None:
    net, shape = small_nets(kind)
    x, g = torch.rand(2, *shape), torch.Generator().manual_seed(1)
    count = 10_000 if kind == "cnn" or not THOROUGH else 100_000 // 2
    parts = 8  # each with its own order of additions
    with torch.no_grad():
        points = x.expand(count, *x.shape) if eps == 0 else float32_points(x, eps, p, count)
        low, up = torch.full((2, 5), math.inf), torch.full((2, 5), -math.inf)
        for i, part in enumerate(points.chunk(parts)):
            z = in_order(net, part.flatten(0, 1), ORDERS[i % 4], g).view(*part.shape[:2], 5)
            low, up = torch.minimum(low, z.amin(0)), torch.maximum(up, z.amax(0))
        for method in ONE_PASS:
            got = compute_bounds(net, x, eps, norm=p, clip=(0, 1), method=method, rounding="outward")
            assert (got.lower <= low).all() and (got.upper >= up).all(), method
        if eps == 0:  # bounds that are rounded to nearest do not hold for every order
            near = compute_bounds(net, x, eps, clip=(0, 1), method="ibp")
            assert ((near.lower > low) | (near.upper < up)).any()


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return self.c(torch.nn.functional.leaky_relu(self.b(h), 0.25) + h)

    def exact(self, x: list[Fraction]) -> list[Fraction]:
        def linear(layer: nn.Linear, v: list[Fraction]) -> list[Fraction]:
            rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            return [sum((Fraction(w) * t for w, t in zip(row, v, strict=True)), Fraction(b)) for row, b in rows]

        h = [max(v, Fraction(0)) for v in linear(self.a, x)]
        mid = [v if v > 0 else v / 4 for v in linear(self.b, h)]
        return linear(self.c, [s + t for s, t in zip(mid, h, strict=True)])


# rational directions of norm 1
DIRECTIONS = {
    math.inf: [
        (1, 1, 1, 1),
        (1, -1, 1, -1),
        (-1, -1, -1, -1),
        (Fraction(1, 3), -1, 1, 0),
        (-1, 1, 1, 1),
        (1, 1, -1, -1),
    ],
    2.0: [
        (1, 0, 0, 0),
        (0, -1, 0, 0),
        (Fraction(3, 5), Fraction(-4, 5), 0, 0),
        (Fraction(1, 2),) * 4,
        (Fraction(-1, 2), Fraction(1, 2), Fraction(-1, 2), Fraction(1, 2)),
        (0, Fraction(5, 13), 0, Fraction(12, 13)),
    ],
    1.0: [
        (1, 0, 0, 0),
        (0, 0, -1, 0),
        (Fraction(1, 4), Fraction(-1, 4), Fraction(1, 4), Fraction(-1, 4)),
        (0, 0, 0, 1),
    ],
}


@pytest.mark.parametrize("p", list(DIRECTIONS))
@pytest.mark.parametrize("eps", [0.0, 1e-7, 0.1, 0.7])
@pytest.mark.parametrize("seed", range(4))
def test_contains_exact_rational_values(p: float, eps: float, seed: int) -> None:
    torch.manual_seed(seed)
    net, x = Skip(), torch.rand(1, 4)
    if seed == 3:
        x = x.round()  # on the faces of the box
    base, radius = [Fraction(v) for v in x[0].tolist()], Fraction(eps)
    points = []
    for direction in DIRECTIONS[p]:
        for scale in (Fraction(1), Fraction(-1), Fraction(1, 7)):
            moved = [b + scale * radius * d for b, d in zip(base, direction, strict=True)]
            points.append([min(max(v, Fraction(0)), Fraction(1)) for v in moved])  # towards x, which lies in the box
    values = [net.exact(point) for point in points]
    with torch.no_grad():
        for method in ONE_PASS:
            b = compute_bounds(
                net, x, eps, norm=p, clip=(0, 1), method=method, rounding="outward", return_linear=method != "ibp"
            )
            for k in range(3):
                low, up = Fraction(b.lower[0, k].item()), Fraction(b.upper[0, k].item())
                assert all(low <= z[k] <= up for z in values), method
                if b.linear is None:
                    continue
                for A, c, sign in ((b.linear.lower_A, b.linear.lower_b, 1), (b.linear.upper_A, b.linear.upper_b, -1)):
                    row, shift = [Fraction(v) for v in A[0, k].tolist()], Fraction(c[0, k].item())
                    for point, z in zip(points, values, strict=True):
                        line = sum((r * v for r, v in zip(row, point, strict=True)), shift)
                        assert sign * (z[k] - line) >= 0, method


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


@pytest.mark.parametrize("method", ["fast-lin", "crown"])
def test_an_interval_that_begins_at_zero_is_not_given_up(method: str) -> None:
    """Behind a ReLU weights that are not negative give intervals that begin at 0, widened a little: as stable as
    without rounding."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)
    ).requires_grad_(False)  # fmt: skip
    net[2].weight.abs_()
    x = torch.rand(3, 4)
    near, outward = (compute_bounds(net, x, 2.0, method=method, rounding=r) for r in ("nearest", "outward"))
    assert (compute_bounds(net[:3], x, 2.0, method="ibp").lower == 0).any()
    assert (outward.lower <= near.lower).all() and (outward.upper >= near.upper).all()
    torch.testing.assert_close(outward.lower, near.lower, rtol=0, atol=1e-4)
    torch.testing.assert_close(outward.upper, near.upper, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown", "alpha-crown"])
def test_margins_of_log_softmax_hold_what_float32_rounds(method: str) -> None:
    """Real margins are those of the logits; evaluated ones differ by the two subtractions of each output."""
    torch.manual_seed(0)
    logits = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 6)).eval()
    with torch.no_grad():
        logits[2].bias.add_(torch.tensor([300.0, -200.0, 0.0, 7.0, 0.3, 250.0]))
    model = nn.Sequential(*logits, nn.LogSoftmax(1)).eval()
    x, y = torch.rand(16, 5), torch.arange(16) % 6
    spec = torch.tensor([[1.0, -1.0, 0, 0, 0, 0], [0.25, 0.5, 0.25, 0.0, 0.0, -1.0]])
    with torch.no_grad():
        for eps in (0.0, 0.01):
            found = compute_bounds(model, x, eps, method=method, labels=y, rounding="outward")
            rows = compute_bounds(model, x, eps, method=method, spec=spec, rounding="outward")
            for step in range(50):
                points = x + 0.999 * eps * torch.empty_like(x).uniform_(-1, 1) * (step > 0)
                exact = copy.deepcopy(model).double()(points.double())
                z = model(points)
                for out in (z, exact):
                    own = out.gather(1, y[:, None]).double() - out.double()
                    margins = own[torch.arange(6) != y[:, None]].view(16, 5)
                    assert (found.lower.double() <= margins).all() and (margins <= found.upper.double()).all()
                combined = z @ spec.t()
                assert (rows.lower <= combined).all() and (combined <= rows.upper).all()
            bare = compute_bounds(logits, x, eps, method=method, labels=y, rounding="outward")
            assert (found.lower <= bare.lower).all() and (found.lower >= bare.lower - 1e-3).all()
