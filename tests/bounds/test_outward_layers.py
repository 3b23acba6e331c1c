"""Outward rounding to the last layer: linear models and linear tails against float32 sums in unfavourable orders, and
exactly."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import compute_bounds

from .nets import ONE_PASS

ORDERS = ("rising", "falling", "as they come", "fused", "pairs", "signs apart")


def ordered_sum(terms: Tensor, order: str) -> Tensor:
    """The float32 sum of the last dimension of terms (..., n), one rounded addition at a time."""
    if order == "pairs":
        while terms.shape[-1] > 1:
            odd = terms[..., 2 * (terms.shape[-1] // 2) :]
            terms = torch.cat([terms[..., :-1:2] + terms[..., 1::2], odd], -1)
        return terms[..., 0]
    if order == "signs apart":
        return ordered_sum(terms.clamp(min=0), "rising") + ordered_sum(terms.clamp(max=0), "falling")
    if order in ("rising", "falling"):
        terms = terms.sort(-1, descending=order == "falling").values
    total = torch.zeros_like(terms[..., 0])
    for term in terms.unbind(-1):
        total = total + term
    return total


class Ordered(nn.Module):
    """A linear layer (or a convolution as one) whose float32 sums run in an order."""

    def __init__(self, layer: nn.Module, order: str) -> None:
        super().__init__()
        self.layer, self.order = layer, order

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (..., n), weight (m, n), bias (m,)."""
        if self.order == "fused":  # from the bias on, without rounded products
            total = torch.zeros(*x.shape[:-1], len(weight)) if bias is None else bias.expand(*x.shape[:-1], -1)
            for k in range(x.shape[-1]):
                total = (total.double() + x[..., k, None].double() * weight[:, k].double()).float()
            return total
        total = ordered_sum(x.unsqueeze(-2) * weight, self.order)
        return total if bias is None else total + bias

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return self.product(x, layer.weight, layer.bias)
        assert isinstance(layer, nn.Conv2d)
        columns = F.unfold(x, layer.kernel_size, 1, layer.padding, layer.stride).transpose(1, 2)
        out = self.product(columns, layer.weight.flatten(1), layer.bias)
        side = (x.shape[2] + 2 * int(layer.padding[0]) - layer.kernel_size[0]) // layer.stride[0] + 1
        return out.transpose(1, 2).unflatten(2, (side, -1))


def in_order(net: nn.Module, order: str) -> nn.Module:
    net = copy.deepcopy(net)
    for name, layer in list(net.named_modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            if not name:
                return Ordered(layer, order)
            net.set_submodule(name, Ordered(layer, order))
    return net


def rows_of(z: Tensor, y: Tensor) -> Tensor:
    """Margins z_y - z_j of (B, K), in exact arithmetic: float64 holds the difference of two float32 numbers of like
    sizes."""
    z = z.double()
    own = z.gather(1, y[:, None])
    return (own - z)[~F.one_hot(y, z.shape[1]).bool()].view(len(z), -1)


def check(net: nn.Module, x: Tensor, methods: tuple[str, ...] = tuple(ONE_PASS)) -> None:
    """Outputs, margins and products with a spec of x itself lie inside the outward bounds of the point."""
    y = torch.arange(len(x)) % net(x).shape[1]
    spec = torch.randn(3, net(x).shape[1]) * 10.0 ** torch.randint(-3, 3, (3, 1))
    for method in methods:
        plain = compute_bounds(net, x, 0.0, method=method, rounding="outward")
        margin = compute_bounds(net, x, 0.0, method=method, rounding="outward", labels=y)
        rows = compute_bounds(net, x, 0.0, norm=2, method=method, rounding="outward", spec=spec)
        linear = compute_bounds(
            net, x, 0.0, norm=1, method=method, rounding="outward", return_linear=method != "ibp"
        ).linear
        for order in ORDERS:
            z = in_order(net, order)(x)
            assert ((plain.lower <= z) & (z <= plain.upper)).all(), (method, order)
            m = rows_of(z, y)
            assert ((margin.lower <= m) & (m <= margin.upper)).all(), (method, order)
            s = ordered_sum(z.unsqueeze(1) * spec, order if order != "fused" else "falling")
            assert ((rows.lower <= s) & (s <= rows.upper)).all(), (method, order)
            if linear is not None:
                at = torch.einsum("bsn,bn->bs", linear.lower_A.double().flatten(2), x.double().flatten(1))
                size = (linear.lower_A.abs().double().flatten(2) @ x.double().abs().flatten(1)[:, :, None])[..., 0]
                assert (at + linear.lower_b.double() <= z.double() + 1e-14 * size).all(), (method, order)


@pytest.fixture(autouse=True)
def _no_gradients() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("width", [1, 2, 3, 17, 256, 4096])
@pytest.mark.parametrize("weights", ["even", "cancelling", "mixed sizes"])
def test_linear_models(width: int, weights: str) -> None:
    net, x = nn.Linear(width, 4).eval(), torch.rand(2, width)
    if weights == "cancelling":  # sums of 1e6 that leave less than 1
        half = width // 2
        net.weight.normal_().mul_(1e6)
        net.weight[:, half : 2 * half] = -net.weight[:, :half]
        x[:, half : 2 * half] = x[:, :half]
    elif weights == "mixed sizes":
        net.weight.mul_(10.0 ** torch.randint(-20, 20, net.weight.shape).float())
    check(net, x, ("ibp", "crown") if width > 1000 else tuple(ONE_PASS))


class ResidualTail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(6, 30), nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(60, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        tail = self.b(h) + h - 0.3 * self.c(h)
        return self.d(torch.cat([tail, h], 1)) / 0.7 + 0.1


class Sums(nn.Module):
    """No activation at all: branches of the input, reshaped, scaled and added."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 20), nn.Linear(6, 20), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = (self.a(x) * 1e4 - self.b(x) * 3.0).reshape(-1, 4, 5)
        return self.c(h).flatten(1)


def two_layers() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 1500), nn.ReLU(), nn.Linear(1500, 4))
    net[0].weight.zero_(), net[0].bias.fill_(1.0), net[2].weight.normal_(), net[2].bias.zero_()
    return net


TAILS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "two layers": ((3,), two_layers),
    "three linear layers": (
        (5,),
        lambda: nn.Sequential(nn.Linear(5, 40), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40), nn.Linear(40, 4)),
    ),
    "residual": ((6,), ResidualTail),
    "sums": ((6,), Sums),
    "convolution": (
        (2, 5, 5),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, 1, 1), nn.Flatten()),
    ),
    "pooling": (
        (2, 6, 6),
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3, 1, 1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(72, 4)),
    ),
    "normalised": (
        (2, 4, 4),
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4)
        ),
    ),
}


@pytest.mark.parametrize("name", list(TAILS))
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-41])
def test_linear_tails(name: str, scale: float) -> None:
    """1e-41: inputs and products are subnormal."""
    shape, build = TAILS[name]
    net = build().eval()
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)
        elif isinstance(m, nn.Linear) and scale < 1:
            m.bias.mul_(1e-40)
    check(net, scale * torch.rand(2, *shape), ("ibp", "crown-ibp", "fast-lin"))


@pytest.mark.parametrize("method", ONE_PASS)
def test_the_exact_value_lies_inside(method: str) -> None:
    """Sums whose exact value the float64 propagation itself cannot hold."""
    net = nn.Linear(40, 3).eval()
    net.weight.normal_().mul_(2.0 ** torch.randint(-60, 60, net.weight.shape).float())
    net.weight[:, 20:] = -net.weight[:, :20] * (1 + 2.0**-20)
    x = torch.rand(2, 40)
    x[:, 20:] = x[:, :20]
    b = compute_bounds(net, x, 0.0, method=method, rounding="outward")
    for i in range(2):
        for k in range(3):
            pairs = zip(net.weight[k].tolist(), x[i].tolist(), strict=True)
            exact = sum((Fraction(w) * Fraction(v) for w, v in pairs), Fraction(net.bias[k].item()))
            assert Fraction(b.lower[i, k].item()) <= exact <= Fraction(b.upper[i, k].item())


def test_flushed_subnormals() -> None:
    """A subnormal weight is lost where subnormals are flushed, however large its input."""
    net = nn.Linear(8, 3, bias=False).eval()
    net.weight.uniform_(-1, 1).mul_(1e-39)
    x = 1e30 * torch.rand(2, 8)
    b = compute_bounds(net, x, 0.0, method="crown", rounding="outward")
    assert ((b.lower <= 0) & (b.upper >= 0)).all()
    z = net(x)
    assert ((b.lower <= z) & (z <= b.upper)).all()


def test_sums_that_overflow() -> None:
    """The exact sum is 0, a float32 order of it is not finite: no finite bound holds."""
    net = nn.Linear(4, 2, bias=False).eval()
    net.weight.copy_(torch.tensor([[3e38, 3e38, -3e38, -3e38], [1.0, 1.0, 1.0, 1.0]]))
    b = compute_bounds(net, torch.ones(1, 4), 0.0, method="ibp", rounding="outward")
    assert b.lower[0, 0] == -math.inf and b.upper[0, 0] == math.inf
    assert b.lower[0, 1] <= 4 <= b.upper[0, 1]


def test_nothing_is_lost_to_tightness() -> None:
    """The width of a point's bounds is what float32 sums can be wrong by, twice."""
    net, x = nn.Linear(100, 5).eval(), torch.rand(3, 100)
    size = F.linear(x.double(), net.weight.double().abs(), net.bias.double().abs())
    for method in ONE_PASS:
        b = compute_bounds(net, x, 0.0, method=method, rounding="outward")
        assert (b.upper.double() - b.lower.double() <= 2 * 104 * 2.0**-24 * size + 2.0**-22 * size).all()
