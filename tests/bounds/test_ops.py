"""The ops: kernels against the definition in float64, opcheck, gradcheck, compile, every instruction set."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastrobust as fr
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds import intervals as interval_ops
from fastrobust.ops.bounds import linear as linear_bounds
from fastrobust.reference import bounds as reference
from fastrobust.reference import relaxations
from variant_runs import outputs_by_variant

SIZES = st.sampled_from([0, 1, 3, 7, 16])
NORMS = (1.0, 2.0, math.inf)


def near(got: Tensor, want: Tensor, tolerance: float = 1e-5, terms: float = 1e-30) -> None:
    """``terms``: the size of what is summed up, which rounding is relative to where sums cancel."""
    assert got.shape == want.shape
    if want.numel():
        scale = want.double().abs().max().clamp(min=terms)
        assert (got.double() - want.double()).abs().max() <= tolerance * scale


@given(
    SIZES,
    st.sampled_from([1, 5, 16, 37, 130]),
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 2),
    st.booleans(),
    st.integers(0, 9),
)
def test_linear_back_step(count: int, n: int, k: int, m: int, lines: int, indexed: bool, seed: int) -> None:
    if k > m:
        return
    torch.manual_seed(seed)
    batch = 3 if indexed else count
    example = torch.randint(0, 3, (count,)) if indexed else None
    rows = torch.randint(0, 4, (count,)) if indexed else None
    A, b = torch.randn(k, 4 if indexed else count, n), torch.randn(m, count)
    slopes, intercepts = torch.randn(lines, batch, n), torch.randn(2, batch, n)
    for minus in (None, torch.randint(0, 4, (count,))) if indexed else (None,):
        got = ops.linear_back_step(A, b, slopes, intercepts, example, rows, minus=minus)
        want = reference.linear_back_step(*(t.double() for t in (A, b, slopes, intercepts)), example, rows, minus=minus)
        for g, w in zip(got, want, strict=False):
            near(g, w, terms=1.0)
        box = (torch.randn(batch, n), torch.rand(batch, n))
        got = ops.concretize_rows(A, b, example, box, None, 1.0, rows, minus=minus)
        near(
            got,
            reference.concretize_rows(
                A.double(), b.double(), example, (box[0].double(), box[1].double()), None, 1.0, rows, minus=minus
            ),
            terms=1.0,
        )


@given(st.integers(1, 2), st.integers(1, 2), st.integers(0, 20))
def test_windows_over_the_border(m: int, lines: int, seed: int) -> None:
    torch.manual_seed(seed)
    c, h, w, ph, pw, count = 5, 6, 7, 3, 4, 9
    window, size = (ph, pw, c, h, w), h * w * c
    corner = (torch.randint(-4, h + 2, (count,)), torch.randint(-5, w + 2, (count,)))
    example = torch.randint(0, 2, (count,))
    A, b = torch.randn(1, count, ph * pw * c), torch.randn(m, count)
    slopes, intercepts = torch.randn(lines, 2, size), torch.randn(2, 2, size)
    got = ops.linear_back_step(A, b, slopes, intercepts, example, None, corner, window)
    want = reference.linear_back_step(*(t.double() for t in (A, b, slopes, intercepts)), example, None, corner, window)
    for g, w_ in zip(got, want, strict=False):
        near(g, w_)
    box = (torch.randn(2, size), torch.rand(2, size))
    near(
        ops.concretize_rows(A, b, example, box, None, 1.0, None, corner, window),
        reference.concretize_rows(
            A.double(), b.double(), example, (box[0].double(), box[1].double()), None, 1.0, None, corner, window
        ),
    )


@given(SIZES, st.sampled_from([1, 5, 33, 200]), st.sampled_from(NORMS + (3.0,)), st.booleans(), st.integers(0, 9))
def test_concretize(batch: int, n: int, p: float, clipped: bool, seed: int) -> None:
    torch.manual_seed(seed)
    A, b, x = torch.randn(batch, 3, n), torch.randn(batch, 3), torch.rand(batch, n)
    clip = (0.0, 1.0) if clipped else None
    for eps in (0.0, 0.2, torch.rand(batch), torch.rand(batch, n)):
        wide = eps.double() if isinstance(eps, Tensor) else eps
        got = fr.ops.concretize(A, b, x, eps, p, clip)
        want = reference.concretize(A.double(), b.double(), x.double(), wide, p, clip)
        near(got[0], want[0])
        near(got[1], want[1])
        assert (got[0] <= got[1]).all()


@given(
    st.sampled_from([0, 1, 2, 3, 5, 8, 16, 33]),
    st.sampled_from([1, 15, 16, 100, 785]),
    st.sampled_from([1, 2, 3, 10, 31]),
    st.booleans(),
)
def test_interval_linear(batch: int, n: int, m: int, bias: bool) -> None:
    lower = torch.randn(batch, n)
    upper = lower + torch.rand(batch, n)
    w, b = torch.randn(m, n), torch.randn(m) if bias else None
    for act in (None, "relu", "tanh"):
        got = fr.ops.interval_linear(lower, upper, w, b, activation=act)
        want = reference.interval_linear(
            lower.double(), upper.double(), w.double(), None if b is None else b.double(), act
        )
        near(torch.stack(got), torch.stack(want))  # lower bounds alone may all be next to 0


def test_interval_linear_does_not_depend_on_the_batch() -> None:
    lower = torch.randn(33, 200)
    upper, w = lower + 1, torch.randn(31, 200)
    whole = fr.ops.interval_linear(lower, upper, w)
    for i in range(0, 33, 5):
        one = fr.ops.interval_linear(lower[i : i + 1], upper[i : i + 1], w)
        assert torch.equal(one[0], whole[0][i : i + 1]) and torch.equal(one[1], whole[1][i : i + 1])


@pytest.mark.parametrize("stride,padding,dilation,groups", [(1, 0, 1, 1), (2, 1, 1, 2), ((2, 1), (0, 2), 2, 1)])
def test_interval_conv2d(stride: object, padding: object, dilation: int, groups: int) -> None:
    lower = torch.randn(3, 4, 9, 8)
    upper, w, b = lower + torch.rand_like(lower), torch.randn(6, 4 // groups, 3, 3), torch.randn(6)
    got = fr.ops.interval_conv2d(lower, upper, w, b, stride, padding, dilation, groups)
    want = reference.interval_conv2d(
        lower.double(), upper.double(), w.double(), b.double(), stride, padding, dilation, groups
    )
    near(got[0], want[0])
    near(got[1], want[1])
    inside = lower + (upper - lower) * torch.rand(lower.shape)
    z = torch.nn.functional.conv2d(inside, w, b, stride, padding, dilation, groups)
    assert (z >= got[0] - 1e-4).all() and (z <= got[1] + 1e-4).all()


@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_interval_ball(p: float, clip: tuple[float, float] | None) -> None:
    x, w, b = torch.rand(3, 2, 6, 6), torch.randn(5, 72), torch.randn(5)
    kernel, kb = torch.randn(4, 2, 3, 3), torch.randn(4)
    for eps in (0.0, 0.3, torch.rand(3), torch.rand(3, 2, 6, 6)):
        wide = eps.double() if isinstance(eps, Tensor) else eps
        got = fr.ops.interval_ball_linear(x, eps, p, clip, w, b)
        want = reference.interval_ball_linear(x.double(), wide, p, clip, w.double(), b.double())
        near(got[0], want[0])
        near(got[1], want[1])
        got = fr.ops.interval_ball_conv2d(x, eps, p, clip, kernel, kb, 2, 1)
        want = reference.interval_ball_conv2d(x.double(), wide, p, clip, kernel.double(), kb.double(), 2, 1)
        near(got[0], want[0])
        near(got[1], want[1])


@pytest.mark.parametrize("act", relaxations.ACTIVATIONS)
@pytest.mark.parametrize("kind", ["parallel", "crown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_relax_is_valid_also_where_intervals_degenerate(act: str, kind: str, dtype: torch.dtype) -> None:
    for width in (0.0, 1e-9, 1e-6, 1e-3, 0.1, 1.0, 5.0, 30.0, 1000.0):
        c, w = torch.randn(500, dtype=dtype) * 3, torch.rand(500, dtype=dtype) * width
        l, u = c - w, c + w
        l[:20], u[:20] = 0, w[:20]
        l[20:40], u[20:40] = -w[20:40], 0
        slopes, intercepts = fr.ops.relax(l, u, act, kind)
        assert slopes.shape == ((2 if kind == "crown" else 1), 500) and intercepts.shape == (2, 500)
        assert slopes.isfinite().all() and intercepts.isfinite().all()
        t = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None]
        x = (l.double() + (u.double() - l.double()) * t).clamp(l.double(), u.double())
        y = relaxations.value(x, act)
        low = slopes[0].double() * x + intercepts[0].double()
        up = slopes[-1].double() * x + intercepts[1].double()
        slack = (1 + x.abs()) * (4e-7 if dtype == torch.float32 else 1e-14)
        assert (low <= y + slack).all() and (up >= y - slack).all(), width


@pytest.mark.parametrize("act", relaxations.ACTIVATIONS)
def test_adaptive_lines_leave_less_area_than_parallel_ones(act: str) -> None:
    l = torch.randn(4000, dtype=torch.float64) * 3
    u = l + torch.rand(4000, dtype=torch.float64) * 6
    area = {}
    for kind in ("parallel", "crown"):
        slopes, intercepts = fr.ops.relax(l, u, act, kind)
        mid = 0.5 * (l + u)
        area[kind] = (u - l) * (slopes[-1] * mid + intercepts[1] - slopes[0] * mid - intercepts[0])
    assert (area["crown"] <= area["parallel"] * (1 + 1e-9) + 1e-12).all()
    assert area["crown"].mean() < 0.99 * area["parallel"].mean()


@pytest.mark.parametrize("act", ["sigmoid", "tanh", "arctan", "softplus"])
def test_adaptive_lines_are_as_tight_at_the_midpoint_as_any_line(act: str) -> None:
    """Brute force: for 400 slopes the lines that touch the function somewhere on a grid."""
    l = torch.randn(150, dtype=torch.float64) * 2
    u = l + 0.05 + torch.rand(150, dtype=torch.float64) * 6
    mid = 0.5 * (l + u)
    x = l + (u - l) * torch.linspace(0, 1, 801, dtype=torch.float64)[:, None]
    y = relaxations.value(x, act)
    low, up = torch.full_like(l, -math.inf), torch.full_like(l, math.inf)
    for d in torch.linspace(0, 1.0, 401, dtype=torch.float64):
        gap = y - d * (x - mid)
        low, up = torch.maximum(low, gap.amin(0)), torch.minimum(up, gap.amax(0))
    slopes, intercepts = fr.ops.relax(l, u, act, "crown")
    steps = 1e-4 * (u - l)  # what the grids of slopes and points miss
    assert (slopes[0] * mid + intercepts[0] >= low - steps).all()
    assert (slopes[1] * mid + intercepts[1] <= up + steps).all()


@pytest.mark.parametrize("act", ["relu", "leaky_relu"])
@pytest.mark.parametrize("kind", ["parallel", "crown"])
def test_relu_lines_kernel_equals_the_definition(act: str, kind: str) -> None:
    l = torch.randn(1000) * 3
    u = l + torch.rand(1000) * 4
    special = torch.tensor([0.0, -1.0, 1.0, -math.inf, -math.inf, 1.0, -2.0, 0.0])
    l[:8], u[:8] = special, torch.tensor([0.0, 0.0, 1.0, math.inf, 2.0, math.inf, math.inf, math.inf])
    got = fr.ops.relax(l, u, act, kind)
    want = relaxations.relax(l.double(), u.double(), act, kind)
    torch.testing.assert_close(got.slopes.double(), want.slopes, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.intercepts.double(), want.intercepts, rtol=1e-6, atol=1e-6)
    bad = fr.ops.relax(torch.tensor([math.nan, 0.0]), torch.tensor([1.0, math.nan]), act, kind)
    assert bad.slopes.isnan().all() or bad.intercepts.isnan().all()


# ---- autograd, registration ----


def _row_inputs(dtype: torch.dtype, grad: bool) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(
        t.to(dtype).requires_grad_(grad)
        for t in (torch.randn(2, 4, 6), torch.randn(2, 4), torch.rand(2, 3, 6), torch.randn(2, 3, 6))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype: torch.dtype) -> None:
    A, b, slopes, intercepts = _row_inputs(dtype, True)
    example = torch.tensor([0, 2, 1, 1])
    torch.library.opcheck(linear_bounds._back.op, (A, b, slopes, intercepts, example, None, None, None, None, []))
    c, r = (torch.rand(3, 6, dtype=dtype, requires_grad=True) for _ in range(2))
    torch.library.opcheck(linear_bounds._concretize.op, (A, b, example, None, None, c, r, c, r, 2.0, None, None, []))
    w = torch.randn(5, 6, dtype=dtype, requires_grad=True)
    bias = torch.randn(5, dtype=dtype, requires_grad=True)
    for finish in (0, 1, 2):
        torch.library.opcheck(interval_ops._interval.op, (c, r, w, bias, finish))


def test_gradcheck_of_the_ops() -> None:
    A, b, slopes, intercepts = _row_inputs(torch.float64, True)
    example, rows, minus = torch.tensor([0, 2, 1, 1]), torch.tensor([3, 0, 0, 1]), torch.tensor([0, 1, 2, 2])
    assert torch.autograd.gradcheck(lambda *t: ops.linear_back_step(*t, example, rows), (A, b, slopes, intercepts))
    assert torch.autograd.gradcheck(
        lambda *t: ops.linear_back_step(*t, example, rows, minus=minus), (A, b, slopes[:1], intercepts)
    )
    c, r = (
        torch.randn(3, 6, dtype=torch.float64, requires_grad=True),
        torch.rand(3, 6, dtype=torch.float64, requires_grad=True),
    )
    for q in (1.0, 2.0, math.inf):
        assert torch.autograd.gradcheck(
            lambda *t, q=q: ops.concretize_rows(t[0], t[1], example, (t[2], t[3]), (t[2], t[3]), q), (A, b, c, r)
        )
    w = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    for finish in (0, 1, 2):
        assert torch.autograd.gradcheck(lambda *t, finish=finish: ops.center_linear(*t, None, finish), (c, r, w))


@pytest.mark.parametrize("act", relaxations.ACTIVATIONS)
@pytest.mark.parametrize("kind", ["parallel", "crown"])
def test_gradcheck_of_relax(act: str, kind: str) -> None:
    torch.manual_seed(1)
    l = (torch.randn(12, dtype=torch.float64) * 2).requires_grad_(True)
    u = (l.detach() + 0.2 + torch.rand(12, dtype=torch.float64) * 3).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda l, u: tuple(fr.ops.relax(l, u, act, kind)), (l, u), atol=1e-5)


def test_compile_fullgraph() -> None:
    A, b, slopes, intercepts = _row_inputs(torch.float32, False)
    example = torch.tensor([0, 2, 1, 1])
    low = torch.rand(4, 6)
    w = torch.randn(5, 6)

    def f(A: Tensor, b: Tensor, slopes: Tensor, intercepts: Tensor, low: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        c = ops.linear_back_step(A, b, slopes, intercepts, example)
        lines = fr.ops.relax(low, low + 1, "relu", "crown")
        return (*c, *fr.ops.interval_linear(low, low + 1, w), *lines)

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for g, want in zip(compiled(A, b, slopes, intercepts, low, w), f(A, b, slopes, intercepts, low, w), strict=False):
        torch.testing.assert_close(g, want)


def test_inference_mode() -> None:
    with torch.inference_mode():
        low, up = fr.ops.interval_linear(torch.zeros(2, 3), torch.ones(2, 3), torch.randn(4, 3))
    assert (low <= up).all()


VARIANT = """
import math, torch, fastrobust as fr
from fastrobust.ops import bounds as ops
torch.manual_seed(0)
A, b, s, i = torch.randn(2, 9, 37), torch.randn(2, 9), torch.randn(2, 3, 37), torch.randn(2, 3, 37)
e = torch.randint(0, 3, (9,))
out = [*ops.linear_back_step(A, b, s, i, e)]
for p in (1, 2, math.inf):
    out += fr.ops.concretize(A[:1].view(3, 3, 37), b[0].view(3, 3), torch.rand(3, 37), 0.1, p, (0, 1))
l = torch.randn(11, 37)
out += fr.ops.interval_linear(l, l + 1, torch.randn(8, 37)) + tuple(fr.ops.relax(l, l + 1, "relu", "crown"))
out += fr.ops.interval_conv2d(torch.zeros(4, 3, 7, 7), torch.ones(4, 3, 7, 7), torch.randn(18, 3, 3, 3), None, 2, 1)
out.append(ops.spread(torch.randn(4, 6, 5, 5), torch.randn(6, 3, 3, 3), (2, 2), (1, 1), (9, 9)))
net = torch.nn.Sequential(
    torch.nn.Conv2d(2, 5, 4, 2, 1), torch.nn.ReLU(), torch.nn.Conv2d(5, 18, 3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(162, 4)
)
low = fr.bounds.compute_bounds(net, torch.rand(5, 2, 12, 12), 0.01, labels=torch.arange(5) % 4).lower
out += [g.abs() for g in torch.autograd.grad(low.sum(), list(net.parameters()))]
print(*[repr(t.double().sum().item()) for t in out])
"""


def test_every_instruction_set_agrees() -> None:
    outputs = outputs_by_variant(VARIANT)
    results = {variant: [float(word) for word in words] for variant, words in outputs.items()}
    first = next(iter(results.values()))
    for other in results.values():
        assert other == pytest.approx(first, rel=2e-5, abs=1e-5)


# ---- bad input ----


@pytest.mark.parametrize(
    "call,error,name",
    [
        (lambda: fr.ops.interval_linear(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(5, 3)), ValueError, "upper"),
        (lambda: fr.ops.interval_linear(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(5, 4)), ValueError, "weight"),
        (
            lambda: fr.ops.interval_linear(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), torch.zeros(5, 3)),
            TypeError,
            "lower",
        ),
        (
            lambda: fr.ops.interval_conv2d(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(5, 3, 3, 3)),
            ValueError,
            "lower",
        ),
        (lambda: fr.ops.interval_ball_linear(torch.zeros(2, 3), -1.0, 2, None, torch.zeros(5, 3)), ValueError, "eps"),
        (
            lambda: fr.ops.interval_ball_linear(torch.zeros(2, 3), math.nan, 2, None, torch.zeros(5, 3)),
            ValueError,
            "eps",
        ),
        (lambda: fr.ops.interval_ball_linear(torch.zeros(2, 3), 0.1, 0.5, None, torch.zeros(5, 3)), ValueError, "norm"),
        (lambda: fr.ops.relax(torch.zeros(3), torch.zeros(3), "swish"), ValueError, "activation"),
        (lambda: fr.ops.relax(torch.zeros(3), torch.zeros(3), "relu", "best"), ValueError, "kind"),
        (lambda: fr.ops.relax(torch.zeros(3), torch.zeros(3), "leaky_relu", params=(2.0,)), ValueError, "params"),
        (lambda: fr.ops.concretize(torch.zeros(2, 3, 4), torch.zeros(2, 3), torch.zeros(2, 5), 0.1), ValueError, "A"),
        (
            lambda: fr.ops.linear_back_step(
                torch.zeros(2, 3, 4), torch.zeros(1, 3), torch.zeros(1, 3, 4), torch.zeros(2, 3, 4)
            ),
            ValueError,
            "A",
        ),
        (
            lambda: fr.ops.linear_back_step(
                torch.zeros(1, 3, 4), torch.zeros(2, 3), torch.zeros(1, 3, 5), torch.zeros(2, 3, 4)
            ),
            ValueError,
            "slopes",
        ),
    ],
)
def test_bad_input(call: object, error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        call()


@pytest.mark.cuda
@pytest.mark.parametrize("p", NORMS)
def test_cuda_equals_the_definition(p: float) -> None:
    torch.manual_seed(0)
    A, b, s, i = torch.randn(2, 50, 3072), torch.randn(2, 50), torch.randn(2, 5, 3072), torch.randn(2, 5, 3072)
    e = torch.arange(5).repeat_interleave(10)
    got = ops.linear_back_step(*(t.cuda() for t in (A, b, s, i, e)))
    for g, w in zip(got, reference.linear_back_step(A.double(), b.double(), s.double(), i.double(), e), strict=False):
        near(g.cpu(), w)
    x = torch.rand(5, 3072)
    got = fr.ops.concretize(A[0].view(5, 10, -1).cuda(), b[0].view(5, 10).cuda(), x.cuda(), 0.1, p, (0, 1))
    for g, w in zip(
        got,
        reference.concretize(A[0].view(5, 10, -1).double(), b[0].view(5, 10).double(), x.double(), 0.1, p, (0, 1)),
        strict=False,
    ):
        near(g.cpu(), w)
    l, w_ = torch.randn(9, 300), torch.randn(70, 300)
    for g, w in zip(
        fr.ops.interval_linear(l.cuda(), (l + 1).cuda(), w_.cuda()),
        reference.interval_linear(l.double(), l.double() + 1, w_.double()),
        strict=False,
    ):
        near(g.cpu(), w)
    for kind in ("parallel", "crown"):
        for g, w in zip(
            fr.ops.relax(l.cuda(), (l + 1).cuda(), "relu", kind),
            relaxations.relax(l, l + 1, "relu", kind),
            strict=False,
        ):
            near(g.cpu(), w)
