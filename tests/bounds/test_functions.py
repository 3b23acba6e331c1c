"""Ranges and lines of the functions of one number, against samples in float64."""

from __future__ import annotations

import pytest
import torch

from fastrobust.reference import functions

POSITIVE = ("log", "sqrt", "rsqrt", "reciprocal")


def _ends(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Intervals of every width and place, single points among them."""
    g = torch.Generator().manual_seed(3)
    width = 10.0 ** (torch.rand(400, generator=g, dtype=torch.float64) * 9 - 6)
    width[::7] = 0
    if name in POSITIVE:
        low = 10.0 ** (torch.rand(400, generator=g, dtype=torch.float64) * 8 - 5)
        width = width * low
    else:
        reach = 3.0 if name == "exp" else 10.0
        low = torch.randn(400, generator=g, dtype=torch.float64) * reach - 0.3 * width
        if name == "exp":
            width = width.clamp(max=20)
    low = low.to(dtype)
    return low, (low.double() + width).to(dtype)


@pytest.mark.parametrize("kind", ["parallel", "crown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(functions.FUNCTIONS))
def test_lines_and_ranges_hold_everywhere(name: str, dtype: torch.dtype, kind: str) -> None:
    low, up = _ends(name, dtype)
    lines = functions.relax(low, up, name, kind)
    assert torch.isfinite(lines.slopes).all() and torch.isfinite(lines.intercepts).all()
    t = torch.linspace(0, 1, 501, dtype=torch.float64)
    x = low.double() + (up.double() - low.double()) * t[:, None]
    for point in (*functions.FUNCTIONS[name].kinks, functions.FUNCTIONS[name].least or 0.0):
        x = torch.cat([x, torch.maximum(torch.minimum(torch.full_like(low, point), up), low)[None].double()])
    y = functions.FUNCTIONS[name].value(x)
    assert (lines.slopes[0].double() * x + lines.intercepts[0].double() <= y).all()
    assert (lines.slopes[-1].double() * x + lines.intercepts[1].double() >= y).all()
    below, above = functions.interval(low, up, name)
    room = 4 * torch.finfo(dtype).eps * y.abs() + torch.finfo(dtype).tiny
    assert (below.double() <= y + room).all() and (above.double() >= y - room).all()
    assert (below.double() >= y.amin(0) - 1e-3 * (1 + y.abs().amax(0))).all()  # and no wider


@pytest.mark.parametrize("name", list(functions.FUNCTIONS))
def test_derivatives_are_those_of_the_values(name: str) -> None:
    low, up = _ends(name, torch.float64)
    x = (0.5 * low + 0.5 * up).requires_grad_()
    f = functions.FUNCTIONS[name]
    (found,) = torch.autograd.grad(f.value(x).sum(), x)
    assert torch.allclose(f.derivative(x), found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", list(functions.FUNCTIONS))
def test_lines_of_wide_and_infinite_intervals_hold(name: str) -> None:
    low = torch.tensor([1e-30, 1e-12, 1e-3] if name in POSITIVE else [-torch.inf, -1e30, -300.0])
    up = torch.tensor([torch.inf, 1e30, 300.0])
    for kind in ("parallel", "crown"):
        slopes, ends = functions.relax(low, up, name, kind)
        assert not slopes.isnan().any() and not ends.isnan().any()
        x = low[1:].double() + (up[1:].double() - low[1:].double()) * torch.linspace(0, 1, 99).double()[:, None]
        y = functions.FUNCTIONS[name].value(x)
        assert (slopes[0, 1:].double() * x + ends[0, 1:].double() <= y).all()
        assert (slopes[-1, 1:].double() * x + ends[1, 1:].double() >= y).all()


def test_curved_lines_are_tight() -> None:
    """Tangent below and chord above a convex function touch it."""
    low, up = torch.tensor([0.5], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64)
    for name in ("exp", "square", "reciprocal", "rsqrt"):
        slopes, ends = functions.relax(low, up, name, "crown")
        f, mid = functions.FUNCTIONS[name].value, 0.5 * (low + up)
        assert torch.allclose(slopes[0] * mid + ends[0], f(mid), atol=1e-12)
        assert torch.allclose(slopes[1] * low + ends[1], f(low), atol=1e-12)
        assert torch.allclose(slopes[1] * up + ends[1], f(up), atol=1e-12)


def test_domains() -> None:
    low = torch.tensor([-1.0, 0.0, 1.0])
    assert functions.outside(low, "reciprocal").tolist() == [True, True, False]
    assert functions.outside(low, "sqrt").tolist() == [True, False, False]
    assert not functions.outside(low, "exp").any()
