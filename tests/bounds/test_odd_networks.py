"""Networks as people write them: every padding, transposed and one-dimensional convolutions, pooling of any stride,
normalisation in odd places, forks and scaled branches; against float64 and sampled points."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds

from .nets import ONE_PASS, points_of_set

C = nn.Conv2d


class Net(nn.Module):
    """Parts and a function of them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(3))


def before_activation(s: Any, x: Tensor) -> Tensor:
    h = s.a(x)
    return s.o((s.b(F.relu(s.b(F.relu(h)) + h)) - h).flatten(1))


def normalised(s: Any, x: Tensor) -> Tensor:
    deviation = torch.tensor([0.2, 0.3, 0.4]).to(x).view(1, 3, 1, 1)
    return s.o(F.relu(0.5 * s.a((x - 0.5) / deviation) - 0.1).flatten(1) * 2)


NETS: dict[str, tuple[tuple[int, ...], Callable[[], nn.Module]]] = {
    "transposed": (
        (3, 5, 6),
        lambda: sequence(
            nn.ConvTranspose2d(3, 4, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 3, groups=2), nn.ReLU()
        ),
    ),
    "transposed, dilated": ((3, 5, 6), lambda: sequence(nn.ConvTranspose2d(3, 4, 3, 1, 1, dilation=2), nn.ReLU())),
    "circular": (
        (3, 6, 7),
        lambda: sequence(
            C(3, 4, (2, 3), padding="same", padding_mode="circular"), nn.ReLU(), C(4, 4, 3, padding="valid"), nn.ReLU()
        ),
    ),
    "same, even kernel": (
        (3, 6, 7),
        lambda: sequence(
            C(3, 4, 4, padding="same"), nn.ReLU(), C(4, 4, 2, padding="same", padding_mode="replicate"), nn.ReLU()
        ),
    ),
    "one dimension": (
        (3, 15),
        lambda: sequence(
            nn.Conv1d(3, 6, 3, 2, 1),
            nn.ReLU(),
            nn.Conv1d(6, 6, 3, 1, 2, dilation=2),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.AvgPool1d(2),
            nn.ConvTranspose1d(6, 4, 3, 2),
            nn.ReLU(),
        ),
    ),
    "one dimension, residual": (
        (6, 15),
        lambda: Net(lambda s, x: s.o(F.relu(s.a(x) + x).flatten(1)), a=nn.Conv1d(6, 6, 3, 1, 1), o=nn.LazyLinear(3)),
    ),
    "max pooling": (
        (3, 9, 9),
        lambda: sequence(
            C(3, 4, 3), nn.MaxPool2d(3, 2, ceil_mode=True), nn.ReLU(), C(4, 4, 2), nn.MaxPool2d(2, 1, 1), nn.Tanh()
        ),
    ),
    "max pooling, dilated": (
        (3, 9, 9),
        lambda: sequence(C(3, 4, 3), nn.ReLU(), nn.MaxPool2d((2, 3), (1, 2), (1, 1), dilation=(2, 1))),
    ),
    "normalised first": (
        (3, 6, 6),
        lambda: nn.Sequential(
            nn.BatchNorm2d(3),
            nn.ReLU(),
            C(3, 5, 3),
            nn.BatchNorm2d(5),
            nn.ReLU(),
            nn.Flatten(),
            nn.BatchNorm1d(80),
            nn.Linear(80, 3),
        ),
    ),
    "normalised vectors": (
        (9,),
        lambda: nn.Sequential(nn.Linear(9, 12), nn.BatchNorm1d(12, affine=False), nn.ReLU(), nn.Linear(12, 3)),
    ),
    "separable": (
        (4, 8, 8),
        lambda: sequence(
            C(4, 4, 3, 1, 1, groups=4),
            nn.ReLU6(),
            C(4, 8, 1),
            nn.ReLU6(),
            C(8, 8, 3, 2, 1, groups=8),
            nn.Hardtanh(),
            nn.AdaptiveAvgPool2d((2, 3)),
        ),
    ),
    "concatenated": (
        (3, 6, 6),
        lambda: Net(
            lambda s, x: s.o(F.relu(s.b(torch.cat([x, F.relu(s.a(x))], 1))).mean((2, 3))),
            a=C(3, 4, 3, 1, 1),
            b=C(7, 5, 3, 1, 1),
            o=nn.Linear(5, 3),
        ),
    ),
    "shared, before activation": (
        (3, 6, 6),
        lambda: Net(before_activation, a=C(3, 4, 3, 1, 1), b=C(4, 4, 3, 1, 1), o=nn.LazyLinear(3)),
    ),
    "convolutions in a row": (
        (3, 6, 6),
        lambda: sequence(
            C(3, 4, 3, bias=False), C(4, 5, 1), nn.ReLU(), C(5, 5, 2, 2, bias=False), nn.ReLU(), C(5, 3, 2)
        ),
    ),
    "up and across": (
        (3, 8, 8),
        lambda: Net(
            lambda s, x: s.o(F.relu(s.c(torch.cat([s.up(F.relu(s.d(x))), x], 1)))),
            d=C(3, 4, 3, 2, 1),
            up=nn.Upsample(scale_factor=2),
            c=C(7, 4, 3, 1, 1),
            o=C(4, 2, 1),
        ),
    ),
    "normalised input": ((3, 6, 6), lambda: Net(normalised, a=C(3, 4, 3, 2, 1), o=nn.LazyLinear(3))),
    "smooth, two branches": (
        (3, 6, 6),
        lambda: Net(
            lambda s, x: s.o(F.gelu(F.silu(s.a(x)) + s.b(x)).flatten(1)),
            a=C(3, 4, 3, 1, 1),
            b=C(3, 4, 1),
            o=nn.LazyLinear(3),
        ),
    ),
    "negated": (
        (3, 6, 6),
        lambda: Net(
            lambda s, x: s.o(torch.relu(x.neg() + s.a(F.leaky_relu(s.a(x), 0.3) * -1.5)).flatten(1)),
            a=C(3, 3, 3, 1, 1),
            o=nn.LazyLinear(3),
        ),
    ),
    "one pixel": ((8, 1, 1), lambda: sequence(C(8, 6, 1), nn.ReLU(), C(6, 6, 3, 1, 1), nn.ReLU())),
    "permuted and cut": (
        (4, 5, 3),
        lambda: Net(
            lambda s, x: s.o(F.relu(s.a(x.permute(0, 3, 1, 2)))[:, :, 1:, ::2].flatten(1)),
            a=C(3, 5, 2),
            o=nn.LazyLinear(3),
        ),
    ),
    "large kernels": ((1, 12, 12), lambda: sequence(C(1, 3, 11, 1, 5), nn.ReLU(), C(3, 20, 9, 3, 4), nn.ReLU())),
    "pools added": (
        (3, 8, 8),
        lambda: Net(
            lambda s, x: s.o(F.relu(F.avg_pool2d(s.a(x), 2) + F.avg_pool2d(s.b(x), 2)).flatten(1)),
            a=C(3, 4, 3, 1, 1),
            b=C(3, 4, 1),
            o=nn.LazyLinear(3),
        ),
    ),
    "last dimension": ((5, 6), lambda: sequence(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 4), nn.ReLU())),
    "constants of one example": (
        (6,),
        lambda: Net(
            lambda s, x: s.b(F.relu(s.a(x) * s.f - s.f) + s.a(x)) / s.f,
            a=nn.Linear(6, 4),
            b=nn.Linear(4, 4),
            f=nn.Parameter(torch.rand(1, 4) + 0.5),
        ),
    ),
    "rectified vector": ((6,), lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU())),
    "linear": ((3, 4, 4), lambda: sequence()),
    "activation last": ((3, 6, 6), lambda: nn.Sequential(C(3, 4, 3), nn.ReLU(), C(4, 5, 3, 2, 1), nn.ReLU())),
    "activation first": ((3, 6, 6), lambda: sequence(nn.ReLU(), C(3, 4, 3), nn.ReLU(), C(4, 5, 3, 2, 1), nn.ReLU())),
}


@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize("p,eps,clip", [(math.inf, 0.05, (0, 1)), (2.0, 0.3, None)])
def test_holds_and_equals_float64(name: str, p: float, eps: float, clip: tuple[float, float] | None) -> None:
    shape, make = NETS[name]
    torch.manual_seed(1)
    net = make().eval()
    net(torch.zeros(2, *shape))
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    x = torch.rand(2, *shape)
    with torch.no_grad():
        z = net.double()(points_of_set(x.double(), eps, p, clip, 200).flatten(0, 1))
        z = z.view(200, 2, *z.shape[1:])
        for method in ONE_PASS:
            want = compute_bounds(net.double(), x.double(), eps, norm=p, clip=clip, method=method)
            got = compute_bounds(net.float(), x, eps, norm=p, clip=clip, method=method)
            outward = compute_bounds(net, x, eps, norm=p, clip=clip, method=method, rounding="outward")
            none = compute_bounds(net, x[:0], eps, norm=p, clip=clip, method=method)
            scale = 1e-4 * (1 + want.lower.abs().max())
            assert got.upper is not None and want.upper is not None and outward.upper is not None
            assert (got.lower - want.lower).abs().max() <= scale and (got.upper - want.upper).abs().max() <= scale
            assert (want.lower <= z.amin(0) + 1e-9).all() and (want.upper >= z.amax(0) - 1e-9).all()
            assert (outward.lower <= z.amin(0)).all() and (outward.upper >= z.amax(0)).all()
            assert none.lower.shape == (0, *got.lower.shape[1:])


@pytest.mark.parametrize("p,q", [(1.0, math.inf), (2.0, 2.0), (3.0, 1.5)])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_a_linear_layer_on_the_last_dimension_over_a_ball(p: float, q: float, clip: tuple[float, float] | None) -> None:
    """Each number reads one row of the input, so its radius is eps times the dual norm of the scaled weights."""
    torch.manual_seed(2)
    layer, x = nn.Linear(6, 7), torch.rand(2, 5, 6) * 0.4 + 0.3
    for eps in (0.1, torch.rand(2), torch.rand_like(x) / 5):
        e = eps.view(2, 1, 1) if isinstance(eps, Tensor) and eps.dim() == 1 else eps
        found = compute_bounds(layer, x, eps, norm=p, clip=clip, method="ibp")
        scaled = (layer.weight * (e * torch.ones_like(x)).unsqueeze(-2)).norm(p=q, dim=-1)
        low, up = layer(x) - scaled, layer(x) + scaled
        if clip is not None:
            box = compute_bounds(layer, x, eps, norm=math.inf, clip=clip, method="ibp")
            assert box.upper is not None
            low, up = torch.maximum(low, box.lower), torch.minimum(up, box.upper)
        assert found.upper is not None
        torch.testing.assert_close(found.lower, low, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.upper, up, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d((2, 3), divisor_override=5),
        nn.AvgPool2d(2, 1),
        nn.AvgPool2d(3, 2, 1),
        nn.AvgPool2d(3, 2, 1, count_include_pad=False),
        nn.AvgPool2d(2, 2, ceil_mode=True),
        nn.AdaptiveAvgPool2d((2, 3)),
        nn.AdaptiveAvgPool2d(1),
    ],
)
@pytest.mark.parametrize("size", [(6, 6), (7, 5)])
def test_adjoints_of_pooling(pool: nn.Module, size: tuple[int, int]) -> None:
    """Linear bounds of a pooling alone are its adjoint: against torch.func.vjp."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, *size, dtype=torch.float64)
    net = nn.Sequential(pool, nn.Flatten())
    A = compute_bounds(net, x, 0.1, method="crown", return_linear=True).linear
    assert A is not None and A.lower_A is not None
    rows = torch.func.vmap(torch.func.vjp(net, x)[1])(torch.eye(net(x).shape[1], dtype=torch.float64).unsqueeze(1))[0]
    torch.testing.assert_close(A.lower_A[0], rows[:, 0])


def test_constants_that_are_trained_are_read_anew() -> None:
    """A parameter that is subtracted, and values computed from parameters."""
    torch.manual_seed(0)
    p, w = nn.Parameter(torch.rand(4)), nn.Parameter(torch.randn(5, 4))
    net = Net(lambda s, x: F.linear(F.relu(s.a(x) - s.p) * s.p.exp(), s.w * 2.0), a=nn.Linear(6, 4), p=p, w=w).eval()
    net.a.bias.data += 2
    x = torch.rand(2, 6)
    for method in ("ibp", "crown-ibp", "crown"):
        with torch.no_grad():
            compute_bounds(net, x, 0.1, method=method)  # what was computed without gradients is not kept
        for _ in range(2):
            net.zero_grad()
            found = compute_bounds(net, x, 0.1, method=method)
            want = compute_bounds(net.double(), x.double(), 0.1, method=method)
            net.float()
            assert (found.lower - want.lower).abs().max() <= 1e-5
            with torch.no_grad():
                assert (compute_bounds(net, x, 0.0, method=method).lower - net(x)).abs().max() <= 1e-5
            compute_bounds(net, x, 0.1, method=method).lower.sum().backward()
            assert p.grad is not None and p.grad.abs().sum() > 0 and w.grad is not None
            with torch.no_grad():
                p *= 0.9
                w *= 0.9
