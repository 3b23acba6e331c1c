"""The CUDA kernels of the bounds family, run on the CPU, against the definitions in float64 and the CPU kernels."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrobust.ops.bounds as ops
from bounds.nets import make
from bounds.test_lines import CASES, gradients_of, intervals
from fastrobust.bounds import METHODS, compute_bounds
from fastrobust.reference import bounds as reference


def near(got: Tensor, want: Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == want.shape and got.dtype == torch.float32
    scale = want.double().abs().max() + 1e-30
    assert (got.double() - want.double()).abs().max() <= tolerance * scale


def wide(t: Any) -> Any:
    if isinstance(t, tuple):
        return tuple(wide(v) for v in t)
    return t.double() if isinstance(t, Tensor) and t.dtype == torch.float32 else t


COUNT, BATCH = 9, 3
PLACED = ("dense", "indexed", "minus", "window")


def rows(placed: str, n: int, k: int, m: int) -> tuple[Tensor, Tensor, dict[str, Any], int]:
    """A, b, where the rows lie, and the size of a map."""
    example = torch.randint(0, BATCH, (COUNT,))
    if placed == "window":
        c, h, w, ph, pw = 5, 6, 7, 3, 4
        corner = (torch.randint(-4, h + 2, (COUNT,)), torch.randint(-5, w + 2, (COUNT,)))
        place = {"example": example, "corner": corner, "window": (ph, pw, c, h, w)}
        return torch.randn(k, COUNT, ph * pw * c), torch.randn(m, COUNT), place, h * w * c
    A, b = torch.randn(k, COUNT if placed == "dense" else 4, n), torch.randn(m, COUNT)
    place = {"example": example}
    if placed != "dense":
        place["rows"] = torch.randint(0, 4, (COUNT,))
    if placed == "minus":
        place["minus"] = torch.randint(0, 4, (COUNT,))
    return A, b, place, n


@pytest.mark.parametrize("n", (1, 127, 300))
@pytest.mark.parametrize("placed", PLACED)
@pytest.mark.parametrize("k,m,lines", [(1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 2, 1), (2, 2, 2)])
def test_back_step(bounds_on_device, n, placed, k, m, lines):
    A, b, place, size = rows(placed, n, k, m)
    args = (A, b, torch.randn(lines, BATCH, size), torch.randn(2, BATCH, size))
    got = bounds_on_device(ops.linear_back_step, *args, **place)
    want = reference.linear_back_step(*wide(args), **place)
    plain = ops.linear_back_step(*args, **place)
    for g, w, p in zip(got, want, plain, strict=True):
        near(g, w)
        near(p, w)
    assert torch.equal(got[0], plain[0])  # no sum: the same bits


@pytest.mark.parametrize("q", (1.0, 2.0, math.inf))
@pytest.mark.parametrize("region", ("box", "ball", "both"))
@pytest.mark.parametrize("placed", PLACED)
def test_concretize(bounds_on_device, placed, region, q):
    for n, k, m in ((1, 1, 1), (127, 1, 2), (300, 2, 2)):
        A, b, place, size = rows(placed, n, k, m)
        x, eps = torch.rand(BATCH, size), 0.3 * torch.rand(BATCH, size)
        eps[0] *= 0.01
        eps[:, ::3] = 0
        ball = None if region == "box" else (x, eps)
        box = None if region == "ball" else reference.center_radius((x - eps).clamp(min=0), (x + eps).clamp(max=1))
        example = place["example"]
        other = {key: value for key, value in place.items() if key != "example"}
        got = bounds_on_device(ops.concretize_rows, A, b, example, box, ball, q, **other)
        near(got, reference.concretize_rows(*wide((A, b)), example, wide(box), wide(ball), q, **other))
        near(got, ops.concretize_rows(A, b, example, box, ball, q, **other))


@pytest.mark.parametrize("spoilt", range(5))
@pytest.mark.parametrize("q", (1.0, 2.0, math.inf))
def test_concretize_says_nan_where_an_input_is(bounds_on_device, spoilt, q):
    x, eps = torch.rand(3, 40), torch.full((3, 40), 0.2)
    parts = [torch.randn(1, 3, 40), *reference.center_radius((x - eps).clamp(min=0), (x + eps).clamp(max=1)), x, eps]
    parts[spoilt].view(3, 40)[1, 37] = math.nan
    A, c, r, x, eps = parts
    for region in (((c, r), (x, eps)), ((c, r), None), (None, (x, eps))):
        if (region[0] is None and spoilt in (1, 2)) or (region[1] is None and spoilt in (3, 4)):
            continue
        for run in (bounds_on_device, lambda f, *args: f(*args)):
            got = run(ops.concretize_rows, A, torch.zeros(2, 3), torch.arange(3), *region, q)
            assert got.isnan().tolist() == [[False, True, False]] * 2, region


@pytest.mark.parametrize("batch", (1, 3, 8, 16))
@pytest.mark.parametrize("finish", (ops.CENTER, ops.ENDS, ops.RELU))
def test_interval_product(bounds_on_device, batch, finish):
    for n, m, bias in ((1, 1, True), (33, 9, False), (200, 21, True)):
        c, r, w = torch.randn(batch, n), torch.rand(batch, n), torch.randn(m, n)
        b = torch.randn(m) if bias else None
        got = bounds_on_device(ops.center_linear, c, r, w, b, finish)
        for g, want in zip(got, ops.center_linear(*wide((c, r, w, b)), finish), strict=True):
            near(g, want)


def test_interval_passes(bounds_on_device):
    lower = torch.randn(3, 7, 5)
    upper = lower + torch.rand(3, 7, 5)
    x = torch.rand(3, 7, 5)
    for f, args in (
        (ops.to_center, (lower, upper)), (ops.from_center, (lower, upper)), (ops.relu_center, (lower, upper - lower)),
        (ops.box_center, (x, 0.2, (0.0, 1.0))), (ops.box_center, (x, 0.2, None)),
        (ops.box_center, (x, torch.rand(3, 7, 5), (0.0, 1.0))),
    ):  # fmt: skip
        for got, want in zip(bounds_on_device(f, *args), f(*args), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("activation,params", CASES)
@pytest.mark.parametrize("kind", ("parallel", "crown"))
def test_lines_and_their_gradients(bounds_on_device, activation, params, kind):
    for dtype in (torch.float32, torch.float64):
        lower, upper = intervals(5, dtype, 8)
        lower[:4] = torch.tensor([-math.inf, 1.0, math.nan, -math.inf])
        upper[:4] = torch.tensor([math.inf, math.inf, 1.0, 2.0])
        got = bounds_on_device(ops.relax, lower, upper, activation, kind, params)
        found = bounds_on_device(gradients_of, lower, upper, activation, kind, params, ops.relax)
        want = ops.relax(lower, upper, activation, kind, params)
        for g, w in zip(
            (*got, *found), (*want, *gradients_of(lower, upper, activation, kind, params, ops.relax)), strict=True
        ):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)  # the same operations: the same bits
        ranges = bounds_on_device(ops.interval_activation, lower, upper, activation, params)
        for g, w in zip(ranges, ops.interval_activation(lower, upper, activation, params), strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
        l, u = lower[4:], upper[4:]
        slopes = torch.rand(l.shape, dtype=dtype)
        for above in (False, True):
            found = bounds_on_device(ops.support, slopes, l, u, activation, params, above)
            for g, w in zip(found, ops.support(slopes, l, u, activation, params, above), strict=True):
                torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
    bias = torch.randn(7)
    lower, upper = torch.randn(5, 7), torch.randn(5, 7).abs() + 3
    got = bounds_on_device(ops.relax_behind, lower, upper, activation, kind, params, bias)
    want = wide(tuple(ops.relax(lower, upper, activation, kind, params)))
    near(got.intercepts, want[1] + want[0] * bias)


@pytest.mark.parametrize("name", ("mlp-relu", "mlp-tanh", "cnn", "residual", "mixed"))
@pytest.mark.parametrize("p,eps,clip", [(math.inf, 0.05, (0.0, 1.0)), (2.0, 0.3, (0.0, 1.0)), (1.0, 0.6, None)])
def test_the_engine(bounds_on_device, name, p, eps, clip):
    net, shape = make(name)
    x, y = torch.rand(2, *shape), torch.tensor([0, 3])
    large = name in ("residual", "mixed")
    if large:
        x, y = x[:1], y[:1]
    with torch.no_grad():
        for method in ("ibp", "crown") if large else METHODS:
            options = {"norm": p, "clip": clip, "method": method, "labels": y}
            got = bounds_on_device(compute_bounds, net, x, eps, **options)
            want = compute_bounds(net.double(), x.double(), eps, **options)
            net.float()
            near(got.lower, want.lower, 5e-5)
            near(got.upper, want.upper, 5e-5)
