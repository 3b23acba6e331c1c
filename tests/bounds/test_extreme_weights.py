"""l2 and lp sizes of tiny and huge weights: squares and powers that leave the floating-point range must not count."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from fastrobust.bounds import compute_bounds
from fastrobust.certify import polyhedral_envelope
from fastrobust.ops import bounds as ops
from fastrobust.reference import bounds as reference

SCALES = (1e-38, 1e-30, 1e-25, 1e-20, 1.0, 1e18, 1e25, 1e36)


def close(got: Tensor, want: Tensor, tolerance: float = 2e-5, least: float = 1e-42) -> None:
    """Relative to each row's own size; below ``least`` float32 has few digits."""
    assert ((got.double() - want).abs() <= tolerance * want.abs() + least).all(), (got, want)


def rows_of(count: int, n: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of one size, and with a few numbers of other sizes among them."""
    a = torch.randn(count, n) * scale
    if scale <= 1:
        a[0, ::3] *= 1e-4
    return a.to(dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", [2.0, 1.5, 3.0, 1.0])
@pytest.mark.parametrize("n", [3, 16, 45])
def test_concretize(scale: float, p: float, n: int) -> None:
    torch.manual_seed(0)
    A, b = rows_of(4, n, scale).view(1, 4, n), torch.zeros(1, 4)
    x, eps = torch.zeros(1, n), 0.3
    low, up = ops.concretize(A, b, x, eps, p)
    q = reference.dual_exponent(p)
    size = eps * torch.linalg.vector_norm(A.double() / scale, q, dim=2) * scale
    close(low, -size)
    close(up, size)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", [2.0, 1.0])
@pytest.mark.parametrize("reach", [0.02, 0.15, 10.0])
def test_concretize_over_a_ball_cut_by_a_box(scale: float, p: float, reach: float) -> None:
    """As tight as rows of ordinary size: the split between ball and box is the same."""
    torch.manual_seed(0)
    A, b, x = torch.randn(1, 4, 20), torch.zeros(1, 4), torch.zeros(1, 20)
    want = ops.concretize(A.double(), b.double(), x.double(), 0.3, p, (-reach, reach))
    got = ops.concretize((A * scale), b, x, 0.3, p, (-reach, reach))
    for g, w in zip(got, want, strict=True):
        close(g, w * scale, 2e-4)


def image_net(scale: float) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(54, 3)
    ).eval()
    return scaled(net, scale)


def vector_net(scale: float) -> nn.Module:
    torch.manual_seed(0)
    return scaled(nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 3)).eval(), scale)


def scaled(net: nn.Module, scale: float) -> nn.Module:
    """A first layer of this size; the network stays piecewise linear, so its bounds scale with it where the biases
    do."""
    with torch.no_grad():
        net[0].weight.mul_(scale)
        for layer in net:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                layer.bias.mul_(scale)
    return net.requires_grad_(False)


@pytest.mark.parametrize("build,shape", [(vector_net, (50,)), (image_net, (2, 6, 6))], ids=["vector", "image"])
@pytest.mark.parametrize("scale", [1e-36, 1e-25, 1e20, 1e34])
@pytest.mark.parametrize("p", [2.0, 1.5, 1.0])
def test_networks(build: object, shape: tuple[int, ...], scale: float, p: float) -> None:
    """Every way of the engine, at ordinary and at extreme sizes: the same bounds but for the factor."""
    x = torch.rand(3, *shape)
    usual, extreme = build(1.0).double(), build(scale)
    per_element = 0.1 + 0.2 * torch.rand(3, *shape)
    for method, eps, clip in itertools.product(
        ("ibp", "crown-ibp", "fast-lin", "crown"), (0.2, per_element), (None, (0, 1))
    ):
        wide = eps.double() if isinstance(eps, Tensor) else eps
        want = compute_bounds(usual, x.double(), wide, norm=p, clip=clip, method=method)
        got = compute_bounds(extreme, x, eps, norm=p, clip=clip, method=method)
        size = scale * max(want.lower.abs().max().item(), want.upper.abs().max().item())
        for g, w in zip((got.lower, got.upper), (want.lower, want.upper), strict=True):
            assert ((g.double() - scale * w).abs() <= 1e-4 * size + 1e-41).all(), (method, clip)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("p", [2.0, 1.5, 4.0])
def test_intervals_of_rows_of_different_sizes(conv: bool, p: float) -> None:
    """Each row of a layer by its own size, radii per element that undo the weights', and a radius that undoes a large
    weight."""
    torch.manual_seed(0)
    q = reference.dual_exponent(p)
    layer = nn.Conv2d(1, 6, (1, 20), bias=False) if conv else nn.Linear(20, 6, bias=False)
    weight = layer.weight.detach()
    weight.mul_(10.0 ** torch.tensor([-37.0, -25, 0, 10, 20, 37]).view(6, *[1] * (weight.dim() - 1)))
    x = torch.zeros(2, 1, 1, 20) if conv else torch.zeros(2, 20)
    f = ops.interval_ball_conv2d if conv else ops.interval_ball_linear
    wide = weight.double().flatten(1)
    for eps in (0.3, 1e-4, torch.tensor([1e-3, 1e-5]), 10.0 ** torch.randint(-20, 1, x.shape)):
        e = eps.double() if isinstance(eps, Tensor) else torch.tensor(eps, dtype=torch.float64)
        e = e.view(2, 1, -1).expand(2, 1, 20) if e.dim() else e.expand(2, 1, 20)
        products = (e * wide).abs()
        top = products.amax(2, keepdim=True)
        want = (top * torch.linalg.vector_norm(products / top, q, dim=2, keepdim=True))[..., 0]
        low, up = f(x, eps, p, None, weight)
        close(up.flatten(1), want, 1e-4)
        close(low.flatten(1), -want, 1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_gradients(scale: float) -> None:
    torch.manual_seed(0)
    A, eps = torch.randn(1, 3, 12), torch.tensor([0.4])
    a, e = (scale * A).requires_grad_(), eps.clone().requires_grad_()
    up = ops.concretize(a, torch.zeros(1, 3), torch.zeros(1, 12), e, 2.0)[1]
    to_a, to_eps = torch.autograd.grad((up / scale).sum(), (a, e))
    sizes = A.norm(dim=2)
    close(to_a * scale, (0.4 * A / sizes[..., None]).double(), 1e-4)
    close(to_eps, sizes.sum().double()[None], 1e-4)


@pytest.mark.parametrize("scale", [1e-37, 1e-25, 1e20, 1e35])
@pytest.mark.parametrize("p", [1, 2, 3, math.inf])
def test_radii_do_not_depend_on_the_size_of_the_weights(scale: float, p: float) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 4), torch.rand(5, 30)
    y = layer(x).argmax(1)
    want = polyhedral_envelope(layer, x, y, 5.0, norm=p, clip=(0, 1)).distance.detach()
    with torch.no_grad():
        layer.weight.mul_(scale)
        layer.bias.mul_(scale)
    close(polyhedral_envelope(layer, x, y, 5.0, norm=p, clip=(0, 1)).distance.detach(), want.double(), 1e-3)


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
def test_ends_whose_sum_overflows(method: str) -> None:
    """Values beyond half of float32's range: the centre of an interval is not the half of a sum."""
    net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for layer in net[::2]:
            layer.weight.uniform_(-0.4, 0.4)
        x = torch.tensor([[3e38, 2.5e38]])
        exact = net.double()(x.double())
        net.float()
        for p in (2.0, math.inf):
            b = compute_bounds(net, x, 1e30, norm=p, method=method)
            room = 1e-5 * 3e38
            assert (b.lower.double() <= exact + room).all() and (b.upper.double() >= exact - room).all()
