"""Kernels of the CPU alone: gradients of row ops, interval convolutions, the adjoint of convolutions; against
float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds, intervals, ways
from fastrobust.bounds.decisions import recorded
from fastrobust.bounds.trace import trace
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds import _chain as _bounds_chain
from fastrobust.ops.bounds import intervals as interval_ops
from fastrobust.ops.bounds import linear as rows_ops
from fastrobust.reference import bounds as reference

from .nets import spied


def near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    if want.numel():
        scale = want.double().abs().max() + 1e-30
        assert (got.double() - want.double()).abs().max() <= tolerance * scale


def grads(outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor], seed: int) -> tuple[Tensor, ...]:
    """Gradients of a random combination of the outputs, the same for every dtype."""
    generator = torch.Generator().manual_seed(seed)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(total, inputs)


# ---- gradients of rows ----

CASES = list(itertools.product((1, 2), (1, 2), (1, 2), ("own", "indexed", "less", "window")))


@pytest.mark.parametrize("k,m,lines,form", [c for c in CASES if c[0] <= c[1]])
@pytest.mark.parametrize("count", [0, 1, 7, 30])
def test_gradients_of_rows(k: int, m: int, lines: int, form: str, count: int) -> None:
    torch.manual_seed(count)
    batch, channels, size, patch = 3, 5, (4, 6), (3, 2)
    n = channels * (math.prod(patch) if form == "window" else math.prod(size))
    maps = channels * math.prod(size)
    own = form == "own"
    batch = count if own else batch
    example = None if own else torch.randint(0, batch, (count,))
    rows = torch.randint(0, 4, (count,)) if form in ("indexed", "less") else None
    minus = torch.randint(0, 4, (count,)) if form == "less" else None
    window = corner = None
    if form == "window":
        window = (*patch, channels, *size)
        corner = (torch.randint(-3, 5, (count,)), torch.randint(-2, 7, (count,)))
    shapes = ((k, 4 if rows is not None else count, n), (m, count), (lines, batch, maps), (2, batch, maps))
    wide = [torch.randn(s, dtype=torch.float64) for s in shapes]
    wide[0][..., ::7] = 0.0  # the kink
    found = []
    for dtype, back, concretize in (
        (torch.float32, ops.linear_back_step, ops.concretize_rows),
        (torch.float64, reference.linear_back_step, reference.concretize_rows),
    ):
        t = [v.to(dtype).requires_grad_(True) for v in wide]
        place = (corner, window, minus)
        first = grads(back(*t, example, rows, *place), t, 5)
        box = (t[2][0], t[3][1])
        value = concretize(t[0], t[1], example, box, None, 1.0, rows, *place)
        found.append([*first, *grads(value, [t[0], t[1], t[2], t[3]], 6)])
    for got, want in zip(*found, strict=True):
        near(got, want)


def test_indices_of_any_stride() -> None:
    A, b, s, i = torch.randn(1, 4, 6), torch.zeros(1, 5), torch.rand(1, 3, 6), torch.rand(2, 3, 6)
    example, rows = torch.tensor(2).expand(5), torch.randint(0, 4, (10,))[::2]
    got = ops.linear_back_step(A, b, s, i, example, rows, minus=example)
    want = reference.linear_back_step(A, b, s, i, example, rows, minus=example)
    near(got[0], want[0])
    near(ops.concretize_rows(A, b, example, (s[0], i[0]), None, 1.0, rows, minus=example),
         reference.concretize_rows(A, b, example, (s[0], i[0]), None, 1.0, rows, minus=example))  # fmt: skip


def test_gradients_of_a_ball_and_of_a_box_alone() -> None:
    """Only what is asked for is computed; a ball beside the box runs by the definition."""
    A, b = torch.randn(1, 6, 8, requires_grad=True), torch.zeros(2, 6)
    c, r, example = torch.randn(2, 8), torch.rand(2, 8), torch.tensor([0, 0, 1, 1, 1, 1])
    for ball in (None, (c + 0.1, r * 2)):
        out = ops.concretize_rows(A, b, example, (c, r), ball, 2.0)
        got = grads(out, [A], 0)[0]
        D = A.detach().double().requires_grad_(True)
        wide = None if ball is None else (ball[0].double(), ball[1].double())
        want = grads(reference.concretize_rows(D, b.double(), example, (c.double(), r.double()), wide, 2.0), [D], 0)[0]
        near(got, want)


@pytest.mark.parametrize("channels", [1, 5, 16, 33])
@pytest.mark.parametrize("act,params", [("relu", ()), ("leaky_relu", (0.2,)), ("tanh", ())])
@pytest.mark.parametrize("kind", ["parallel", "crown"])
def test_a_bias_joins_the_intercepts(channels: int, act: str, params: tuple[float, ...], kind: str) -> None:
    """Flat, channels last, channels first (not in one pass), recorded."""
    flat, image, bias = torch.randn(7, channels), torch.randn(3, channels, 4, 5), torch.randn(channels)
    last = image.contiguous(memory_format=torch.channels_last)
    for l, b in (
        (flat, bias),
        (image, bias.view(-1, 1, 1)),
        (last, bias.view(-1, 1, 1)),
        (flat.clone().requires_grad_(), bias),
    ):
        u = l.detach() + 0.1 + torch.rand_like(l)
        got = ops.relax_behind(l, u, act, kind, params, b)
        want = ops.relax(l.double(), u.double(), act, kind, params)
        near(got.slopes, want.slopes)
        near(got.intercepts, want.intercepts + want.slopes * b.double())


# ---- interval products ----


@given(
    st.sampled_from([0, 1, 3, 7, 16]),
    st.sampled_from([1, 3, 16, 21]),
    st.sampled_from([1, 3, 15, 16, 17, 40]),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(0, 3), st.integers(0, 3)),
    st.sampled_from([ops.CENTER, ops.ENDS, ops.RELU]),
    st.booleans(),
    st.booleans(),
)
def test_interval_convolution(
    batch: int,
    channels: int,
    out: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    finish: int,
    shared: bool,
    last: bool,
) -> None:
    torch.manual_seed(0)
    c, r = torch.randn(batch, channels, 6, 5), torch.rand(1 if shared else batch, channels, 6, 5)
    if last:
        c = c.contiguous(memory_format=torch.channels_last)
    w, b = torch.randn(out, channels, *kernel), torch.randn(out) if out % 2 else None
    got = ops.center_conv2d(c, r, w, b, stride, padding, 1, 1, finish)
    mid = F.conv2d(c.double(), w.double(), None if b is None else b.double(), stride, padding)
    reach = F.conv2d(r.double(), w.double().abs(), None, stride, padding).expand_as(mid)
    low, up = mid - reach, mid + reach
    if finish == ops.RELU:
        want = reference.center_radius(low.relu(), up.relu())
    else:
        want = (mid, reach) if finish == ops.CENTER else (low, up)
    for g, v in zip(got, want, strict=True):
        near(g, v)
    if batch > 1 and not shared:  # values do not depend on what else is in the batch
        one = ops.center_conv2d(c[1:2], r[1:2], w, b, stride, padding, 1, 1, finish)
        assert torch.equal(one[0], got[0][1:2]) and torch.equal(one[1], got[1][1:2])


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("finish", [ops.CENTER, ops.ENDS, ops.RELU])
@pytest.mark.parametrize("channels,shared", [(2, False), (2, True), (9, False)])
def test_gradients_of_interval_convolutions(batch: int, finish: int, channels: int, shared: bool) -> None:
    c, r = torch.randn(batch, channels, 6, 5), torch.rand(1 if shared else batch, channels, 6, 5)
    w, b = torch.randn(4, channels, 3, 3), torch.randn(4)
    leaves = [v.requires_grad_(True) for v in (c, r, w, b)]
    wide = [v.detach().double().requires_grad_(True) for v in leaves]
    got = ops.center_conv2d(*leaves, 2, 1, 1, 1, finish)
    mid, reach = F.conv2d(wide[0], wide[2], wide[3], 2, 1), F.conv2d(wide[1], wide[2].abs(), None, 2, 1)
    want = (mid, reach.expand_as(mid)) if finish == ops.CENTER else (mid - reach, mid + reach)
    if finish == ops.RELU:
        want = reference.center_radius(want[0].relu(), want[1].relu())
    for g, v in zip(grads(got, leaves, 2), grads(want, wide, 2), strict=True):
        near(g, v)
    if batch == 1 and not shared:
        torch.library.opcheck(interval_ops._interval_conv.op, (*leaves, [2, 2], [1, 1], finish, [1, 1], 1))
        f = lambda *t: ops.center_conv2d(*t, 2, 1, 1, 1, finish)  # noqa: E731
        assert torch.autograd.gradcheck(f, [t.detach().requires_grad_(True) for t in wide], eps=1e-7, atol=1e-5)


def test_interval_convolution_refuses_a_kernel_larger_than_the_image() -> None:
    with pytest.raises(ValueError, match="weight"):
        ops.interval_conv2d(torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3), torch.ones(1, 1, 5, 5))


@pytest.mark.parametrize("batch", [0, 1, 2, 7, 40])
@pytest.mark.parametrize("finish", [ops.CENTER, ops.ENDS, ops.RELU])
def test_one_radius_for_every_example(batch: int, finish: int) -> None:
    c, r, w, b = torch.randn(batch, 37), torch.rand(1, 37), torch.randn(11, 37), torch.randn(11)
    got = ops.center_linear(c, r, w, b, finish)
    want = ops.center_linear(c.double(), r.double(), w.double(), b.double(), finish)
    for g, v in zip(got, want, strict=True):
        near(g, v)
    t = [v.requires_grad_(True) for v in (c, r, w, b)]
    wide = [v.detach().double().requires_grad_(True) for v in t]
    got = grads(ops.center_linear(*t, finish), t, 1)
    full = [wide[0], wide[1].expand(batch, -1), *wide[2:]]
    want = grads(ops.center_linear(*full, finish), wide, 1)
    for g, v in zip(got, want, strict=True):
        near(g, v)


# ---- the adjoint of a convolution ----

ADJOINTS = [
    (16, 1, 4, 2, 1),
    (5, 3, 3, 1, 1),
    (8, 3, 4, 2, 1),
    (4, 1, 8, 3, 0),
    (7, 2, 3, 2, 0),
    (6, 16, 3, 1, 1),
    (9, 16, 4, 2, 1),
    (3, 60, 3, 1, 0),
    (2, 300, 2, 1, 1),
    (5, 33, 3, 2, 1),
    (4, 16, 2, 3, 0),
    (3, 48, 5, 2, 2),
    (7, 14, 1, 2, 0),
    # four numbers a line, of several channels
    (5, 4, 1, 1, 0),
    (8, 4, 1, 3, 0),
    (5, 2, 2, 1, 1),
    (5, 2, 2, 2, 0),
]


@pytest.mark.parametrize("count", [0, 1, 6])
@pytest.mark.parametrize("o,c,k,stride,padding", ADJOINTS)
def test_spread_is_the_adjoint_of_the_convolution(
    count: int, o: int, c: int, k: int, stride: int, padding: int
) -> None:
    w, a = torch.randn(o, c, k, k, requires_grad=True), torch.randn(count, o, 9, 7, requires_grad=True)
    size = tuple((n - 1) * stride - 2 * padding + k + (stride > 1) for n in a.shape[2:])
    with torch.no_grad():
        got = ops.spread(a, w, (stride, stride), (padding, padding), size)
    wide = [t.detach().double().requires_grad_(True) for t in (a, w)]
    extra = int(stride > 1)
    want = F.conv_transpose2d(*wide, None, stride, padding, extra)
    near(got, want.detach())
    recorded = ops.spread(a, w, (stride, stride), (padding, padding), size)
    assert torch.equal(recorded, got)
    for g, v in zip(grads(recorded, [a, w], 3), grads(want, wide, 3), strict=True):
        near(g, v)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 3),
    st.integers(1, 20),
    st.tuples(st.integers(1, 6), st.integers(1, 19)),
    st.integers(1, 5),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(0, 2**16),
)
def test_spread_of_one_channel_four_wide(
    count: int,
    o: int,
    positions: tuple[int, int],
    height: int,
    stride: tuple[int, int],
    padding: tuple[int, int],
    beyond: tuple[int, int],
    seed: int,
) -> None:
    """Positions side by side as lines: every overlap, border and remainder."""
    torch.manual_seed(seed)
    kernel = (height, 4)
    extra = [min(b, s - 1) for b, s in zip(beyond, stride, strict=True)]
    size = [
        (n - 1) * s - 2 * p + k + b for n, s, p, k, b in zip(positions, stride, padding, kernel, extra, strict=True)
    ]
    assume(min(size) > 0 and all(p < k for p, k in zip(padding, kernel, strict=True)))
    w, a = torch.randn(o, 1, *kernel), torch.randn(count, o, *positions)
    got = ops.spread(a, w, stride, padding, size)
    near(got, F.conv_transpose2d(a.double(), w.double(), None, stride, padding, extra))


def test_spread_and_registration() -> None:
    a, w = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    torch.library.opcheck(interval_ops._spread.op, (a, w, [2, 2], [1, 1], [9, 9], [1, 1], 1))
    wide = [t.detach().double().requires_grad_(True) for t in (a, w)]
    assert torch.autograd.gradcheck(lambda a, w: ops.spread(a, w, (2, 2), (1, 1), (9, 9)), wide)
    compiled = torch.compile(lambda a, w: rows_and_spread(a, w), fullgraph=True, backend="aot_eager")
    near(compiled(a.detach(), w.detach()), rows_and_spread(a.detach(), w.detach()))


def rows_and_spread(a: Tensor, w: Tensor) -> Tensor:
    s, i = torch.ones(1, 2, 100), torch.zeros(2, 2, 100)
    out, _ = rows_ops.linear_back_step(a.flatten(1)[None], torch.zeros(1, 2), s, i)
    return ops.spread(out[0].view_as(a), w, (2, 2), (1, 1), (9, 9))


# ---- convolutions at once ----


@pytest.mark.parametrize("method", ["crown-ibp", "fast-lin", "crown"])
@pytest.mark.parametrize("norm,clip", [(math.inf, (0.0, 1.0)), (2.0, (0.0, 1.0)), (1.0, None)])
@pytest.mark.parametrize("sides", ["both", "lower"])
@pytest.mark.usefixtures("engine_alone")
def test_convolutions_at_once_equal_one_by_one(
    method: str, norm: float, clip: tuple[float, float] | None, sides: str
) -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(5, 18, (3, 2), 1, (1, 0)),
        nn.LeakyReLU(0.1),
        nn.Conv2d(18, 4, 3, (2, 1), 0),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 9),
        nn.ReLU(),
        nn.Linear(9, 4),
    )
    x, y = torch.rand(3, 2, 12, 14), torch.tensor([1, 0, 3])
    net[7] = nn.Linear(net[:7](x).shape[1], 9)
    net.requires_grad_(False)
    kwargs = {"eps": 0.02, "norm": norm, "clip": clip, "method": method, "labels": y, "sides": sides}
    with recorded() as log:
        got = compute_bounds(net, x, **kwargs)
    assert any(d.taken and d.way == "image kernel" for d in log)
    with ways(without=("image kernel", "neuron kernel")):
        want = compute_bounds(net, x, **kwargs)
    wide = compute_bounds(net.double(), x.double(), **kwargs)
    near(got.lower, want.lower)
    near(got.lower, wide.lower)
    if sides == "both":
        near(got.upper, want.upper)
        near(got.upper, wide.upper)


@pytest.mark.parametrize("kept", [0, 1 << 24])
@pytest.mark.parametrize("method", ["crown-ibp", "ibp-linear"])
@pytest.mark.parametrize(
    "norm,clip,sides", [(math.inf, (0.0, 1.0), "both"), (math.inf, None, "lower"), (2.0, (0.0, 1.0), "lower")]
)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.usefixtures("engine_alone")
def test_gradients_through_convolutions_at_once(
    method: str,
    norm: float,
    clip: tuple[float, float] | None,
    sides: str,
    flat: bool,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against float64, with and without a layer between the convolutions and the margins, with the rows between the
    layers kept and not."""
    torch.manual_seed(5)
    convs = [
        nn.Conv2d(2, 5, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(5, 18, (3, 2), 1, (1, 0)),
        nn.ReLU(),
        nn.Conv2d(18, 4, 3, (2, 1), 0),
        nn.ReLU(),
    ]
    tail = [nn.Flatten(), nn.Linear(32, 4)] if flat else [nn.Flatten(), nn.Linear(32, 9), nn.ReLU(), nn.Linear(9, 4)]
    net = nn.Sequential(*convs, *tail)
    monkeypatch.setattr(_bounds_chain, "_MOST_KEPT", kept)
    calls = []
    through = ops.concretize_through
    monkeypatch.setattr(ops, "concretize_through", lambda *a: calls.append(1) or through(*a))

    def grads(dtype: torch.dtype) -> list[torch.Tensor]:
        net.to(dtype)
        x = torch.linspace(0, 1, 3 * 2 * 12 * 14, dtype=dtype).sin().square().view(3, 2, 12, 14).requires_grad_(True)
        eps = torch.tensor([0.02, 0.0, 0.05], dtype=dtype, requires_grad=True)
        out = compute_bounds(
            net, x, eps, norm=norm, clip=clip, method=method, labels=torch.tensor([1, 0, 3]), sides=sides
        )
        value = (out.lower * torch.arange(9, dtype=dtype).view(3, 3)).sum()
        if sides == "both":
            value = value + (out.upper.square()).sum()
        return list(torch.autograd.grad(value, [x, eps, *net.parameters()]))

    got, wide = grads(torch.float32), grads(torch.float64)
    assert bool(calls) == (norm == math.inf)  # over balls node by node
    for g, w in zip(got, wide, strict=True):
        near(g, w, 1e-4)


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.parametrize("eps", [0.05, "each"])
@pytest.mark.parametrize("batch", [1, 3, 70])
def test_intervals_of_a_chain_equal_the_engine(
    clip: tuple[float, float] | None, eps: float | str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    net = nn.Sequential(
        nn.Conv2d(2, 5, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(5, 18, 3, 1, 1, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(540, 260),
        nn.ReLU(),
        nn.Linear(260, 40),
        nn.Linear(40, 30),
        nn.ReLU(),
        nn.Linear(30, 4),
    ).requires_grad_(False)
    x, y = torch.rand(batch, 2, 12, 10), torch.randint(0, 4, (batch,))
    radius = torch.rand(batch) * 0.1 if eps == "each" else eps
    taken = spied(monkeypatch, "margins_of_stages")
    got = compute_bounds(net, x, radius, clip=clip, method="ibp", labels=y)
    assert (batch <= intervals.SMALL_BATCH and eps != "each" or taken == [True]) and intervals.chain_of(
        trace(net, x).graph
    ) is not None
    merged = nn.Sequential(*net[:-2], net[-1])  # two linear layers at the end: the engine merges them
    assert intervals.chain_of(trace(merged, x).graph) is None
    with ways("walk"):
        want = compute_bounds(net, x, radius, clip=clip, method="ibp", labels=y)
    wide = compute_bounds(net.double(), x.double(), radius, clip=clip, method="ibp", labels=y)
    for other in (want, wide):
        near(got.lower, other.lower)
        near(got.upper, other.upper)


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
@pytest.mark.parametrize("batch", [1, 3, 16])
@pytest.mark.parametrize("sides", ["both", "lower"])
@pytest.mark.parametrize("name", ["fc", "one", "conv", "rgb"])
def test_small_batches_in_one_call(clip: tuple[float, float] | None, batch: int, sides: str, name: str) -> None:
    torch.manual_seed(5)
    shape, net = {
        "fc": ((1, 5, 7), nn.Sequential(nn.Flatten(), nn.Linear(35, 50), nn.ReLU(), nn.Linear(50, 4))),
        "one": ((6,), nn.Linear(6, 3)),
        "conv": (
            (1, 9, 8),
            nn.Sequential(
                nn.Conv2d(1, 17, 3, 2, 1, bias=False),
                nn.ReLU(),
                nn.Conv2d(17, 6, 2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(72, 4, bias=False),
            ),
        ),
        "rgb": (
            (3, 6, 6),
            nn.Sequential(
                nn.Conv2d(3, 40, 3, 1, 1),
                nn.BatchNorm2d(40),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(1440, 30),
                nn.Linear(30, 9),
                nn.ReLU(),
                nn.Linear(9, 3),
            ),
        ),
    }[name]
    net = net.eval().requires_grad_(False)
    x, y = torch.rand(batch, *shape), torch.randint(0, 3, (batch,))
    found = intervals.small_margins(net, x, 0.03, clip, y, 2)
    assert found is not None
    got = compute_bounds(net, x, 0.03, clip=clip, method="ibp", labels=y, sides=sides)
    assert torch.equal(got.lower, found[0]) and (
        got.upper is None if sides == "lower" else torch.equal(got.upper, found[1])
    )
    with ways("walk"):
        want = compute_bounds(net.double(), x.double(), 0.03, clip=clip, method="ibp", labels=y, sides=sides)
    near(got.lower, want.lower)
    if sides == "both":
        near(got.upper, want.upper)


def test_small_batches_leave_errors_to_the_longer_way() -> None:
    net = nn.Linear(6, 3).requires_grad_(False)
    x, y = torch.rand(2, 6), torch.tensor([0, 2])
    for bad, labels, clip in (
        (x * math.nan, y, None), (x / 0.0, y, (0.0, 1.0)), (x, y + 1, None), (x - 1, y, (0.0, 1.0)),
    ):  # fmt: skip
        assert intervals.small_margins(net, bad, 0.1, clip, labels, 1) is None
        with pytest.raises(ValueError):
            compute_bounds(net, bad, 0.1, clip=clip, method="ibp", labels=labels)


@pytest.mark.parametrize("rows,k,n", [(64, 32, 32), (65, 33, 70), (900, 100, 300), (3, 40, 40), (0, 40, 40)])
def test_products_and_their_gradients(rows: int, k: int, n: int) -> None:
    a, w, b = torch.randn(rows, k), torch.randn(k, n), torch.randn(n)
    for f, g, other in (
        (ops.product, lambda a, w: a @ w, [w]),
        (ops.product_with_transpose, F.linear, [w.t().contiguous(), b]),
    ):
        narrow = [t.clone().requires_grad_(True) for t in (a, *other)]
        wide = [t.double().requires_grad_(True) for t in (a, *other)]
        got, want = f(*narrow), g(*wide)
        near(got, want)
        for x, y in zip(grads(got, narrow, 2), grads(want, wide, 2), strict=True):
            near(x, y)


@pytest.mark.parametrize("kind", ["parallel", "crown"])
@pytest.mark.parametrize("activation,params", [("relu", ()), ("leaky_relu", (0.2,))])
@pytest.mark.parametrize("last", [False, True])
def test_gradients_of_relu_lines(kind: str, activation: str, params: tuple[float, ...], last: bool) -> None:
    torch.manual_seed(0)
    l = torch.randn(3, 5, 4, 7)
    u = l + torch.rand_like(l) * 2
    if last:
        l, u = (t.contiguous(memory_format=torch.channels_last) for t in (l, u))
    l[0, 0, 0], u[0, 0, 1], u[0, 0, 2] = 0.0, 0.0, l[0, 0, 2]  # kinks and points
    found = []
    for dtype in (torch.float32, torch.float64):
        t = [v.detach().to(dtype).requires_grad_(True) for v in (l, u)]
        found.append(grads(tuple(ops.relax(*t, activation, kind, params)), t, 7))
    for got, want in zip(*found, strict=True):
        near(got, want)
