"""Every parameter of every activation: lines and ranges that hold, searched by brute force in float64, or a refusal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastrobust.bounds import METHODS, compute_bounds
from fastrobust.ops import bounds as ops
from fastrobust.reference import relaxations

PARAMETERS: list[tuple[str, tuple[float, ...]]] = [
    ("relu", ()),
    ("relu6", ()),
    ("sigmoid", ()),
    ("tanh", ()),
    ("arctan", ()),
    ("silu", ()),
    ("gelu", ()),
    ("gelu_tanh", ()),
    *(("leaky_relu", (a,)) for a in (0.0, 1e-7, 0.4, 1.0)),
    *(("hardtanh", p) for p in ((-2.0, 3.0), (0.25, 0.75), (-5.0, -4.5), (-1e-5, 1e-5), (-1e5, 1e5))),
    *(
        ("softplus", p)
        for p in ((1.0, 20.0), (2.0, 4.0), (0.5, 1.0), (1.0, 0.0), (30.0, 0.3), (1e-2, 20.0), (1e4, 20.0))
    ),
    *(("elu", (a,)) for a in (0.0, 0.3, 1.0, 4.0, 60.0)),
]
PIECEWISE = ("relu", "leaky_relu", "hardtanh", "relu6")


def intervals(activation: str, params: tuple[float, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Around 0, far out, and around every kink; from narrow to wide."""
    g = torch.Generator().manual_seed(1)
    at = [0.0, *relaxations.kinks(activation, params)]
    middle = torch.cat([k + s * torch.randn(60, generator=g) for k in at for s in (0.0, 1e-3, 0.3, 4.0, 40.0)])
    width = 10.0 ** torch.empty(len(middle)).uniform_(-5, 2, generator=g)
    share = torch.rand(len(middle), generator=g)
    return (middle - share * width).to(dtype), (middle + (1 - share) * width).to(dtype)


def points_of(l: Tensor, u: Tensor, at: list[float]) -> Tensor:
    l, u = l.double(), u.double()
    inner = l + torch.linspace(0, 1, 161, dtype=torch.float64)[:, None] * (u - l)
    special = [math.nextafter(k, way) for k in at for way in (-math.inf, k, math.inf)]
    return torch.cat([inner, *(torch.full_like(l, k)[None] for k in special)]).clamp(min=l, max=u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation,params", PARAMETERS)
def test_lines_and_ranges_hold(activation: str, params: tuple[float, ...], dtype: torch.dtype) -> None:
    full = relaxations.parameters_of(activation, params)
    l, u = intervals(activation, full, dtype)
    valley = [relaxations._VALLEY[activation][1]] if activation in relaxations._VALLEY else []
    x = points_of(l, u, [*relaxations.kinks(activation, full), *valley])
    s = relaxations.value(x, activation, full)
    reach = torch.maximum(l.abs(), u.abs()).double()
    rounding = 4 * torch.finfo(dtype).eps * (s.abs().amax(0) + reach)
    for module in (relaxations, ops):
        low, up = module.interval_activation(l, u, activation, params)
        assert (low.double() <= s.amin(0) + rounding).all() and (up.double() >= s.amax(0) - rounding).all()
        for kind in ("parallel", "crown"):
            slopes, intercepts = (t.double() for t in module.relax(l, u, activation, kind, params))
            room = 2.0**-50 * (s.abs().amax(0) + reach)  # of torch's own float64 values
            if activation in PIECEWISE or module is relaxations:  # not padded
                room = rounding * (1 + slopes.abs().amax(0))
            assert (slopes[0] * x + intercepts[0] <= s + room).all(), (module, kind)
            assert (slopes[-1] * x + intercepts[1] >= s - room).all(), (module, kind)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Softplus(3.0, 1.0),
        nn.Softplus(1.0, 0.0),
        nn.Softplus(40.0),
        nn.ELU(5.0),
        nn.LeakyReLU(1.0),
        nn.Hardtanh(0.2, 0.3),
        nn.GELU("tanh"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_networks_with_them(layer: nn.Module, rounding: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), layer, nn.Linear(6, 6), layer, nn.Linear(6, 3)).eval()
    x, eps = torch.randn(3, 2), 0.4
    side = torch.linspace(-1, 1, 101)
    grid = x[:, None] + eps * torch.cartesian_prod(side, side)
    with torch.no_grad():
        z = net(grid)
        for method in METHODS:
            b = compute_bounds(net, x, eps, method=method, rounding=rounding)
            room = 0.0 if rounding == "outward" else 1e-5 * (1 + z.abs().max())
            assert (b.lower <= z.amin(1) + room).all() and (b.upper >= z.amax(1) - room).all(), method


@pytest.mark.parametrize(
    "layer,said",
    [
        (nn.LeakyReLU(-0.2), "negative slope of -0.2"),
        (nn.LeakyReLU(1.5), "negative slope of 1.5"),
        (nn.LeakyReLU(math.nan), "finite"),
        (nn.ELU(-1.0), "alpha of -1.0"),
        (nn.ELU(math.inf), "finite"),
        (nn.Softplus(-2.0), "beta -2.0"),
        (nn.Softplus(0.0), "beta 0.0"),
        (nn.Softplus(1.0, -3.0), "threshold -3.0"),
        (nn.Softplus(1.0, math.nan), "finite"),
        (nn.Hardtanh(-math.inf, 1.0), "finite min < max"),
    ],
    ids=lambda v: str(v),
)
def test_what_the_formulas_do_not_cover_is_refused(layer: nn.Module, said: str) -> None:
    net = nn.Sequential(nn.Linear(2, 3), layer, nn.Linear(3, 2)).eval()
    with pytest.raises(ValueError, match=said):
        compute_bounds(net, torch.rand(1, 2), 0.1)


@pytest.mark.parametrize("activation", relaxations.ACTIVATIONS)
@pytest.mark.parametrize("ends", [(math.nan, math.nan), (math.nan, 1.0), (-1.0, math.nan)])
def test_nan_stays(activation: str, ends: tuple[float, float]) -> None:
    """A NaN that a range passed over would come out as a certificate."""
    l, u = (torch.full((19,), v) for v in ends)
    low, up = ops.interval_activation(l, u, activation)
    assert (low.isnan() | up.isnan()).all()
    for kind in ("parallel", "crown"):
        assert ops.relax(l, u, activation, kind).intercepts.isnan().all()


@pytest.mark.parametrize(
    "layer",
    [nn.Tanh(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Sigmoid(), nn.Softplus(), nn.Hardtanh(), nn.ReLU()],
    ids=str,
)
@pytest.mark.parametrize("where", ["0.weight", "0.bias", "2.weight"])
def test_networks_with_nan_are_refused(layer: nn.Module, where: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), layer, nn.Linear(5, 3)).eval().requires_grad_(False)
    dict(net.named_parameters())[where].view(-1)[0] = math.nan
    for method in METHODS:
        for norm in (1, 2, math.inf):
            for rounding in ("nearest", "outward"):
                with pytest.raises(ValueError, match=f"'{where}' holds NaN"):
                    compute_bounds(net, torch.rand(2, 4), 0.1, norm=norm, method=method, rounding=rounding)
