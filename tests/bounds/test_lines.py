"""Lines around activations: the kernels against the definition in float64, soundness without slack, gradients,
registration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastrobust as fr
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds import _lines as lines
from fastrobust.reference import relaxations
from variant_runs import outputs_by_variant

CASES: list[tuple[str, tuple[float, ...]]] = [(a, ()) for a in relaxations.ACTIVATIONS]
CASES += [
    ("leaky_relu", (0.3,)),
    ("hardtanh", (-0.5, 2.5)),
    ("softplus", (3.0, 8.0)),
    ("softplus", (0.2, 20.0)),
    ("elu", (0.4,)),
    ("elu", (2.5,)),
    ("elu", (0.0,)),
]
PIECEWISE = ("relu", "leaky_relu", "hardtanh", "relu6")
case = pytest.mark.parametrize("act,params", CASES)
both_kinds = pytest.mark.parametrize("kind", ["parallel", "crown"])
SPECIAL = (
    0.0,
    1e-40,
    1e-30,
    1e-7,
    0.5,
    1.0,
    6.0,
    0.7517915,
    1.2784646,
    1.4142135,
    2.3993573,
    20.0,
    20.1,
    87.0,
    88.1,
    103.5,
    1e4,
    1e30,
)


def intervals(seed: int, dtype: torch.dtype, count: int = 16) -> tuple[Tensor, Tensor]:
    """Of every width and place: points, ends at kinks and inflection points and next to them, tails, one-sided ones."""
    rng = torch.Generator().manual_seed(seed)
    low, up = [], []
    for width in (0.0, 1e-9, 1e-6, 1e-3, 9.9e-3, 1.1e-2, 0.1, 1.0, 5.0, 30.0, 1000.0):
        for spread in (0.0, 1.0, 4.0, 40.0):
            c = torch.randn(count, generator=rng, dtype=torch.float64) * spread
            w = torch.rand(2, count, generator=rng, dtype=torch.float64) * width
            low.append(c - w[0])
            up.append(c + w[1])
    ends = torch.tensor([s * v for v in SPECIAL for s in (-1.0, 1.0)], dtype=torch.float64)
    a, b = torch.meshgrid(ends, ends, indexing="ij")
    low.append(a[a <= b])
    up.append(b[a <= b])
    near = ends[:, None] + torch.randn(len(ends), 8, generator=rng, dtype=torch.float64) * 1e-3
    low.append(near.flatten())
    up.append((near + torch.rand(near.shape, generator=rng, dtype=torch.float64) * 3).flatten())
    l, u = torch.cat(low).to(dtype), torch.cat(up).to(dtype)
    return l, torch.maximum(l, u)


def exact(x: Tensor, act: str, params: tuple[float, ...]) -> Tensor:
    """s(x) with small relative errors in the tails, too, where torch's GELU has none."""
    if act == "gelu":
        return 0.5 * x * torch.erfc(-x / math.sqrt(2.0))
    if act == "gelu_tanh":
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return relaxations.value(x, act, params)


def violation(l: Tensor, u: Tensor, slopes: Tensor, intercepts: Tensor, act: str, params: tuple[float, ...]) -> Tensor:
    """By how much the lines fail at 101 points of each interval, at kinks, and where the gap to a line is least."""
    l, u, slopes, intercepts = (t.double() for t in (l, u, slopes, intercepts))
    params = relaxations.parameters_of(act, params)
    points = [l + (u - l) * torch.linspace(0, 1, 101, dtype=torch.float64).view(-1, *[1] * l.dim())]
    points += [torch.full_like(l, k)[None] for k in relaxations.kinks(act, params)]
    points += [t[None] for d in slopes for t in relaxations._critical(d, act, params)]
    x = torch.cat(points).clamp(l, u)
    y = exact(x, act, params)
    low, up = slopes[0] * x + intercepts[0], slopes[-1] * x + intercepts[1]
    return torch.maximum(low - y, y - up).amax(0)


def scale_of(l: Tensor, u: Tensor, act: str, params: tuple[float, ...]) -> Tensor:
    """What rounding errors of the lines are proportional to."""
    slopes, intercepts = relaxations.relax(l, u, act, "crown", params)
    ends = torch.maximum(relaxations.value(l, act, params).abs(), relaxations.value(u, act, params).abs())
    return slopes.abs().amax(0) * torch.maximum(l.abs(), u.abs()) + ends + intercepts.abs().amax(0)


@case
@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_lines_hold_in_real_arithmetic(act: str, params: tuple[float, ...], kind: str, dtype: torch.dtype) -> None:
    """No slack: what the kernel rounds is in the intercepts. Piecewise linear ones round to nearest. In float64 the
    samples themselves are rounded."""
    for seed in range(2):
        l, u = intervals(seed, dtype)
        slopes, intercepts = fr.ops.relax(l, u, act, kind, params)
        assert slopes.isfinite().all() and intercepts.isfinite().all()
        wrong = violation(l, u, slopes, intercepts, act, params)
        slack = torch.zeros_like(wrong)
        if act in PIECEWISE or dtype == torch.float64:
            size = intercepts.abs().amax(0) + slopes.abs().amax(0) * torch.maximum(l.abs(), u.abs())
            slack = 1e-22 + 4 * torch.finfo(dtype).eps * size.double()
        i = (wrong - slack).argmax()
        assert wrong[i] <= slack[i], (l[i].item(), u[i].item(), wrong[i].item())


@case
@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_equals_the_definition(act: str, params: tuple[float, ...], kind: str, dtype: torch.dtype) -> None:
    """The heights of the lines at the midpoint (at the ends they depend on which of two equal lines was taken)."""
    l, u = intervals(7, dtype)
    u = torch.where((l == u) | (u - l > 1e-6), u, l)
    moderate = torch.maximum(l.abs(), u.abs()) < 1e3
    l, u = l[moderate], u[moderate]
    got = fr.ops.relax(l, u, act, kind, params)
    L, U = l.double(), u.double()
    want = relaxations.relax(L, U, act, kind, params)
    mid, eps = 0.5 * (L + U), torch.finfo(dtype).eps
    for side in (0, 1):
        g = got.slopes[-side].double() * mid + got.intercepts[side].double()
        w = want.slopes[-side] * mid + want.intercepts[side]
        jump = math.exp(-relaxations.parameters_of(act, params)[1]) if act == "softplus" else 0.0
        off = ((g - w).abs() - jump - 1e-15) / (scale_of(L, U, act, params) + 1e-30)
        i = off.argmax()
        assert off[i] <= 40 * eps, (side, l[i].item(), u[i].item(), g[i].item(), w[i].item())
    if kind == "parallel":
        wide = (u - l) > 0.02
        torch.testing.assert_close(got.slopes[:, wide].double(), want.slopes[:, wide], rtol=400 * eps, atol=400 * eps)


def slopes_within(l: Tensor, u: Tensor, act: str, params: tuple[float, ...], seed: int) -> Tensor:
    """Of lines that may touch inside, and a tenth of them beyond."""
    low, high = relaxations.derivative_range(l, u, act, params)
    share = torch.rand(l.shape, generator=torch.Generator().manual_seed(seed), dtype=l.dtype)
    return low + (1.2 * share - 0.1) * (high - low)


@case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_line_of_any_slope(act: str, params: tuple[float, ...], dtype: torch.dtype) -> None:
    """It holds without slack, as ``relax`` does, and is as high as the definition's in float64."""
    l, u = intervals(5, dtype, 6)
    moderate = torch.maximum(l.abs(), u.abs()) < 1e3
    l, u = l[moderate], u[moderate]
    d = slopes_within(l, u, act, params, 3)
    ends = [fr.ops.bounds.support(d, l, u, act, params, above) for above in (False, True)]
    b = torch.stack([e[0] for e in ends])
    wrong = violation(l, u, d[None], b, act, params)
    size = b.abs().amax(0) + d.abs() * torch.maximum(l.abs(), u.abs())
    slack = 4 * torch.finfo(dtype).eps * size.double() + 1e-22 if act in PIECEWISE or dtype == torch.float64 else 0.0
    assert bool((wrong <= slack).all())
    beta, threshold = relaxations.parameters_of(act, params) if act == "softplus" else (1.0, math.inf)
    jump = math.exp(-threshold) / beta
    for above, (got, point) in zip((False, True), ends, strict=True):
        want, _ = relaxations.support(d.double(), l.double(), u.double(), act, params, above)
        scale = scale_of(l.double(), u.double(), act, params) + size.double() + 1e-30
        assert ((got.double() - want).abs() <= 40 * torch.finfo(dtype).eps * scale + jump + 1e-15).all()
        assert bool(((l <= point) & (point <= u)).all())
        height = exact(point.double(), act, params) - d.double() * point.double()  # there the line touches
        assert ((got.double() - height).abs() <= 40 * torch.finfo(dtype).eps * scale + jump + 1e-15).all()


@case
@pytest.mark.parametrize("above", [False, True])
def test_gradients_of_a_line_of_any_slope(act: str, params: tuple[float, ...], above: bool) -> None:
    l = torch.tensor([-2.0, -0.7, 0.3, -3.1, -0.2], dtype=torch.float64)
    u = l + torch.tensor([1.6, 2.1, 0.9, 4.4, 0.6], dtype=torch.float64)
    d = slopes_within(l, u, act, params, 1)
    args = [t.requires_grad_() for t in (d, l, u)]
    torch.autograd.gradcheck(lambda *a: ops.support(*a, act, params, above)[0], args, eps=1e-6, atol=1e-4)
    plain = lines.told(act, params)
    torch.library.opcheck(lines._support.op, (*args, *plain, above))


@pytest.mark.parametrize("shape", [(0, 3), (1,), (3, 5, 7), (7, 16), (16, 33)])
def test_a_line_of_any_slope_of_views(shape: tuple[int, ...]) -> None:
    """Slopes, ends in any order in memory, broadcast slopes; mismatches are refused."""
    g = torch.Generator().manual_seed(0)
    l = torch.randn(*shape[::-1], generator=g).permute(*reversed(range(len(shape))))
    u, d = l + torch.rand(shape, generator=g), torch.full((1,) * len(shape), 0.3).expand(shape)
    for got, want in zip(
        ops.support(d, l, u, "silu"), ops.support(d.contiguous(), l.contiguous(), u.contiguous(), "silu"), strict=True
    ):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="slopes: got"):
        ops.support(d.new_zeros(2, *shape), l, u, "silu")
    with pytest.raises((TypeError, ValueError), match="slopes: got"):
        ops.support(d.double(), l, u, "silu")


@given(
    st.sampled_from(CASES),
    st.sampled_from(["parallel", "crown"]),
    st.sampled_from([0, 1, 3, 7, 16]),
    st.sampled_from([1, 5, 15, 16, 17, 33]),
    st.floats(-50, 50, width=32),
    st.floats(0, 60, width=32),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_batches_and_orders_in_memory(
    of: tuple[str, tuple[float, ...]],
    kind: str,
    batch: int,
    channels: int,
    center: float,
    width: float,
    seed: int,
    last: bool,
) -> None:
    """An interval gives the same bits wherever it lies, and lines that hold; outputs keep the order of the inputs."""
    act, params = of
    rng = torch.Generator().manual_seed(seed)
    l = center + torch.randn(batch, channels, 2, 3, generator=rng)
    u = l + width * torch.rand(batch, channels, 2, 3, generator=rng)
    if last:
        l, u = (t.contiguous(memory_format=torch.channels_last) for t in (l, u))
    got = fr.ops.relax(l, u, act, kind, params)
    assert got.slopes.shape == (2 if kind == "crown" else 1, *l.shape) and got.intercepts.shape == (2, *l.shape)
    for t in (*got.slopes, *got.intercepts):
        assert not batch or t.stride() == l.stride()
    single = fr.ops.relax(l[:1, -1, -1:, 1:2], u[:1, -1, -1:, 1:2], act, kind, params)
    assert torch.equal(single.slopes, got.slopes[:, :1, -1, -1:, 1:2])
    assert torch.equal(single.intercepts, got.intercepts[:, :1, -1, -1:, 1:2])
    if batch:
        slack = 1e-6 * (1 + torch.maximum(l.abs(), u.abs())) if act in PIECEWISE else torch.zeros_like(l)
        assert (violation(l, u, *got, act, params) <= slack).all()


@case
@both_kinds
def test_ends_that_are_not_finite(act: str, params: tuple[float, ...], kind: str) -> None:
    inf, nan = math.inf, math.nan
    l = torch.tensor([-inf, -inf, 1.0, -3e38, nan, 0.0, nan, -1.0])
    u = torch.tensor([inf, 2.0, inf, 3e38, 1.0, nan, nan, 1.0])
    slopes, intercepts = fr.ops.relax(l, u, act, kind, params)
    assert (
        intercepts[:, 4:7].isnan().all() and not intercepts[:, :4].isnan().any() and intercepts[:, 7].isfinite().all()
    )
    assert (slopes[:, :4] == 0).all()  # horizontal
    x = torch.cat([-torch.logspace(-3, 30, 200), torch.logspace(-3, 30, 200)]).double()
    y = relaxations.value(x, act, params)
    for i in range(4):
        inside = y[(x >= l[i]) & (x <= u[i])]
        assert (intercepts[0, i] - 1e-6 <= inside).all() and (
            inside <= intercepts[1, i].double() * (1 + 1e-6) + 1e-6
        ).all()


@case
def test_ranges(act: str, params: tuple[float, ...]) -> None:
    """Of every activation, in one pass where that pays: to float32 rounding those in float64, with and without a
    graph."""
    l, u = intervals(4, torch.float32)
    want = relaxations.interval_activation(l.double(), u.double(), act, params)
    bottom = torch.tensor([relaxations._VALLEY[act][1] if act in relaxations._VALLEY else 0.0], dtype=torch.float64)
    least = exact(bottom, act, params)
    for recorded in (False, True):
        got = fr.ops.interval_activation(l.clone().requires_grad_(recorded), u, act, params)
        assert (got[0] <= got[1]).all() and got[0].requires_grad == recorded
        for g, w in zip(got, want, strict=True):
            assert ((g - w).abs() <= 1e-6 * (w.abs() + 1)).all()
        if act in relaxations._VALLEY:
            assert (got[0] >= least * (1 + 1e-6)).all()
    for shape in ((0, 3), (5, 17), (2, 3, 4, 5)):
        l = torch.randn(shape)
        if len(shape) == 4:
            l = l.contiguous(memory_format=torch.channels_last)
        for g, w in zip(
            fr.ops.interval_activation(l, l + 1, act, params),
            relaxations.interval_activation(l, l + 1, act, params),
            strict=True,
        ):
            torch.testing.assert_close(g, w, rtol=2e-6, atol=1e-6)
            assert g.stride() == w.stride()


# ---- gradients ----


def gradients_of(l: Tensor, u: Tensor, act: str, kind: str, params: tuple[float, ...], f: object) -> list[Tensor]:
    l, u = (t.detach().clone().requires_grad_(True) for t in (l, u))
    slopes, intercepts = f(l, u, act, kind, params)  # type: ignore[operator]
    rng = torch.Generator().manual_seed(3)
    total = (slopes * torch.randn(slopes.shape, generator=rng).to(slopes)).sum()
    total = total + (intercepts * torch.randn(intercepts.shape, generator=rng).to(slopes)).sum()
    return list(torch.autograd.grad(total, (l, u)))


def smooth_places(l: Tensor, u: Tensor, act: str, kind: str, params: tuple[float, ...]) -> Tensor:
    """Where moving the ends a little leaves the lines near where they are, on both sides."""
    base = relaxations.relax(l, u, act, kind, params)
    keep = (u - l - 0.01).abs() > 1e-3
    for k in (*relaxations.kinks(act, params), 0.0):
        keep &= ((l - k).abs() > 1e-2) & ((u - k).abs() > 1e-2) & ((l + u - 2 * k).abs() > 1e-2)
    if act == "softplus":  # torch's jumps down there, and points on either side of the jump may be taken
        keep &= u * params[0] < params[1] if params else u < 20
    for a in (-1e-5, 1e-5):
        for b in (-1e-5, 1e-5):
            moved = relaxations.relax(l + a, u + b, act, kind, params)
            keep &= (moved.slopes - base.slopes).abs().amax(0) < 1e-3
    return keep


@case
@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_equal_those_of_the_definition(
    act: str, params: tuple[float, ...], kind: str, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(0)
    l = (torch.randn(400, generator=rng) * 3).double()
    u = l + 4 * torch.rand(400, generator=rng).double()
    u[:40] = l[:40] + 1e-3
    keep = smooth_places(l, u, act, kind, params)
    assert keep.sum() > 200
    l, u = l[keep].to(dtype), u[keep].to(dtype)
    got = gradients_of(l, u, act, kind, params, fr.ops.relax)
    want = gradients_of(l.double(), u.double(), act, kind, params, relaxations.relax)
    # where two lines leave the same area either may be taken; chords of narrow intervals are differences
    lines_ = [
        f(l.to(t), u.to(t), act, kind, params) for f, t in ((fr.ops.relax, dtype), (relaxations.relax, torch.float64))
    ]
    same = (lines_[0].slopes - lines_[1].slopes).abs().amax(0) < 1e-5
    assert same.sum() > 150
    size = 1 + torch.maximum(relaxations.value(l, act, params).abs(), relaxations.value(u, act, params).abs()).double()
    tolerance = (1e-9 if dtype == torch.float64 else 1e-3) + torch.finfo(dtype).eps * 40 * size * (
        1 + 1 / (u - l).double().clamp(min=1e-2) ** 2
    )
    for g, w in zip(got, want, strict=True):
        assert ((g - w).abs() <= tolerance * (1 + w.abs()))[same].all()


@case
@both_kinds
def test_gradcheck(act: str, params: tuple[float, ...], kind: str) -> None:
    rng = torch.Generator().manual_seed(1)
    l = torch.randn(60, generator=rng).double() * 2
    u = l + 0.2 + torch.rand(60, generator=rng).double() * 3
    keep = smooth_places(l, u, act, kind, params)
    l, u = l[keep][:12].requires_grad_(True), u[keep][:12].requires_grad_(True)
    assert torch.autograd.gradcheck(lambda l, u: tuple(fr.ops.relax(l, u, act, kind, params)), (l, u), atol=1e-5)


@both_kinds
@pytest.mark.parametrize("act", ["relu", "hardtanh", "tanh", "softplus", "elu", "silu"])
def test_gradients_keep_the_order_in_memory(act: str, kind: str) -> None:
    torch.manual_seed(0)
    l = torch.randn(3, 5, 4, 7)
    u = l + torch.rand_like(l) * 2
    want = gradients_of(l, u, act, kind, (), fr.ops.relax)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (l, u)]
    for g, w in zip(gradients_of(*last, act, kind, (), fr.ops.relax), want, strict=True):
        assert torch.equal(g, w)


@both_kinds
def test_gradients_of_intervals_without_a_line_are_zero(kind: str) -> None:
    l = torch.tensor([-math.inf, 0.0, math.nan])
    u = torch.tensor([1.0, math.inf, 1.0])
    for g in gradients_of(l, u, "tanh", kind, (), fr.ops.relax):
        assert (g[:2] == 0).all()


# ---- registration, variants, devices ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("act", ["leaky_relu", "hardtanh", "tanh", "gelu"])
def test_opcheck(act: str, dtype: torch.dtype) -> None:
    plain = lines.told(act, ())
    for form in (torch.contiguous_format, torch.channels_last):
        l = torch.randn(2, 3, 4, 5, dtype=dtype).contiguous(memory_format=form).requires_grad_(True)
        u = (l.detach() + 1).contiguous(memory_format=form).requires_grad_(True)
        for adaptive in (False, True):
            torch.library.opcheck(lines._lines.op, (l, u, *plain, adaptive))
            slopes, intercepts = (t.detach() for t in lines._lines(l, u, *plain, adaptive))
            given_ = (l.detach(), u.detach(), slopes, intercepts, *plain, adaptive)
            torch.library.opcheck(lines._lines_grad.op, given_)


@pytest.mark.parametrize("act", ["tanh", "gelu"])
def test_compile_fullgraph_with_gradients(act: str) -> None:
    def f(l: Tensor, u: Tensor) -> Tensor:
        slopes, intercepts = fr.ops.relax(l, u, act, "crown")
        return slopes.sum() + (intercepts * intercepts).sum()

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    found = []
    for g in (f, compiled):
        l = torch.linspace(-3, 2, 21).requires_grad_(True)
        u = (l.detach() + 1).requires_grad_(True)
        g(l, u).backward()
        found.append((l.grad, u.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@both_kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bias_joins_the_intercepts_of_any_activation(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    l, bias = torch.randn(7, 21, dtype=dtype), torch.randn(21, dtype=dtype)
    u = l + 1
    for act, params in CASES:
        got = ops.relax_behind(l, u, act, kind, params, bias)
        plain = ops.relax(l, u, act, kind, params)
        assert torch.equal(got.slopes, plain.slopes)
        torch.testing.assert_close(got.intercepts, plain.intercepts + plain.slopes * bias)


VARIANT = """
import hashlib, torch, fastrobust as fr
from bounds.test_lines import CASES, intervals, gradients_of
l, u = intervals(1, torch.float32)
for act, params in CASES:
    for kind in ("parallel", "crown"):
        seen = hashlib.sha256()
        for t in (*fr.ops.relax(l, u, act, kind, params), *gradients_of(l, u, act, kind, params, fr.ops.relax)):
            seen.update((t + 0.0).numpy().tobytes())
        print(seen.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    results = outputs_by_variant(VARIANT, PYTHONPATH=str(Path(__file__).parents[1]))
    first = next(iter(results.values()))
    assert len(first) == 2 * len(CASES)
    for variant, other in results.items():
        assert other == first, variant


@pytest.mark.cuda
@case
@both_kinds
def test_cuda_equals_the_cpu(act: str, params: tuple[float, ...], kind: str) -> None:
    for dtype in (torch.float32, torch.float64):
        l, u = intervals(2, dtype)
        got = fr.ops.relax(l.cuda(), u.cuda(), act, kind, params)
        want = fr.ops.relax(l, u, act, kind, params)
        assert torch.equal(got.slopes.cpu(), want.slopes) or dtype == torch.float64
        wrong = violation(l, u, got.slopes.cpu(), got.intercepts.cpu(), act, params)
        slack = 1e-6 * (1 + want.intercepts.abs().amax(0).double())
        assert (wrong <= slack).all()
        there = gradients_of(l.cuda(), u.cuda(), act, kind, params, fr.ops.relax)
        ranges = fr.ops.interval_activation(l.cuda(), u.cuda(), act, params)
        for g, w in zip(ranges, fr.ops.interval_activation(l, u, act, params), strict=True):
            torch.testing.assert_close(g.cpu(), w, rtol=1e-6, atol=1e-6)
        for g, w in zip(there, gradients_of(l, u, act, kind, params, fr.ops.relax), strict=True):
            torch.testing.assert_close(g.cpu(), w, rtol=1e-4, atol=1e-4, equal_nan=True)
