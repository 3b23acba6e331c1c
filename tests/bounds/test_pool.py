"""Max pooling: lines against the definition and brute force, the neurons that are bounded for it, bounds of
networks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.bounds import compute_bounds
from fastrobust.ops.bounds import PoolWindow, relax_max_pool
from fastrobust.ops.bounds import _pool as pool
from fastrobust.reference import pooling as reference

both_kinds = pytest.mark.parametrize("kind", ["parallel", "crown"])


@st.composite
def geometries(draw: st.DrawFn) -> tuple[tuple[int, int], PoolWindow]:
    """A size and a window of which every placement reaches into the image."""
    axes = []
    for _ in range(2):
        k, s, d = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
        axes.append((draw(st.integers(d * (k - 1) + 1, 8)), k, s, draw(st.integers(0, k // 2)), d))
    size, *rest = zip(*axes, strict=True)
    return size, PoolWindow(*rest, ceil_mode=draw(st.booleans()))


def box(size: tuple[int, int], seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Ends that are often equal, intervals that are often points, zeros of both signs."""
    rng = torch.Generator().manual_seed(seed)
    ends = torch.randint(-3, 4, (2, 2, 2, *size), generator=rng).to(dtype) * 0.5
    fine = torch.rand(ends.shape, generator=rng, dtype=torch.float64).to(dtype) * (seed % 2)
    l, u = (ends + fine).sort(0).values.unbind(0)
    point = torch.rand(l.shape, generator=rng) < 0.2
    u = torch.where(point, l, u)
    minus = torch.rand(l.shape, generator=rng) < 0.5
    return torch.where(minus & (l == 0), -0.0, l), torch.where(minus & (u == 0), -0.0, u)


@given(
    geometry=geometries(), seed=st.integers(0, 99), kind=st.sampled_from(["parallel", "crown"]), double=st.booleans()
)
def test_equals_the_definition(
    geometry: tuple[tuple[int, int], PoolWindow], seed: int, kind: str, double: bool
) -> None:
    size, window = geometry
    l, u = box(size, seed, torch.float64 if double else torch.float32)
    got = relax_max_pool(l, u, window, kind)
    want = reference.relax_max_pool(l, u, window, kind)
    assert torch.equal(got.source, want[2])
    torch.testing.assert_close(got.slopes, want[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.intercepts, want[1], rtol=1e-6, atol=1e-6)
    top = nn.functional.max_pool2d(l, *window)
    torch.testing.assert_close(l.flatten(2).gather(2, got.source).view(top.shape), top, rtol=0, atol=0)
    kernel, plain = pool._picks_kernel(l, u, [n for p in window[:4] for n in p], window.ceil_mode), None
    plain = pool._picks_in_torch(l, u, window)  # what other devices run
    assert torch.equal(kernel[0], plain[0])
    rivals = [torch.where(r < 0, -math.inf, u.flatten(2).gather(2, r.clamp(min=0))) for r in (kernel[1], plain[1])]
    assert torch.equal(*rivals)


@given(geometry=geometries(), seed=st.integers(0, 99), kind=st.sampled_from(["parallel", "crown"]))
def test_holds_on_samples_and_corners(geometry: tuple[tuple[int, int], PoolWindow], seed: int, kind: str) -> None:
    size, window = geometry
    l, u = box(size, seed, torch.float64)
    lines = relax_max_pool(l, u, window, kind)
    at = torch.rand(200, *l.shape, dtype=torch.float64)
    at[:100] = at[:100].round()  # corners
    x = l + at * (u - l)
    y = nn.functional.max_pool2d(x.flatten(0, 1), *window).view(len(x), *lines.slopes.shape[1:])
    followed = x.flatten(3).gather(3, lines.source.expand(len(x), -1, -1, -1)).view(y.shape)
    assert (lines.slopes[0] * followed + lines.intercepts[0] <= y + 1e-12).all()
    assert (lines.slopes[-1] * followed + lines.intercepts[1] >= y - 1e-12).all()


@given(seed=st.integers(0, 99))
def test_the_chord_lies_below_the_constant_and_the_parallel_line(seed: int) -> None:
    window = PoolWindow((2, 3), (1, 2), (1, 1))
    l, u = box((6, 7), seed, torch.float64)
    chord, parallel = (relax_max_pool(l, u, window, kind) for kind in ("crown", "parallel"))
    top = nn.functional.max_pool2d(u, *window)
    for end in (l, u):
        x = end.flatten(2).gather(2, chord.source).view(top.shape)
        line = chord.slopes[1] * x + chord.intercepts[1]
        assert (line <= top + 1e-12).all()
        assert (line <= x + parallel.intercepts[1] + 1e-12).all()
    assert (chord.slopes[1] < 1).any()


@both_kinds
@pytest.mark.parametrize("window", [PoolWindow((2, 2), (2, 2)), PoolWindow((3, 2), (2, 1), (1, 1), (1, 2), True)])
def test_gradients(kind: str, window: PoolWindow) -> None:
    torch.manual_seed(0)
    l = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    u = l + 2 * torch.rand_like(l)
    ends = (l.requires_grad_(True), u.requires_grad_(True))
    lines = relax_max_pool(*ends, window, kind)
    assert (lines.intercepts[1] > 0).any() and (lines.intercepts[1] == 0).any()
    assert torch.autograd.gradcheck(lambda l, u: relax_max_pool(l, u, window, kind)[:2], ends)
    weights = [torch.randn_like(t) for t in lines[:2]]
    grads = []
    for f in (relax_max_pool, reference.relax_max_pool):
        found = f(*ends, window, kind)
        grads.append(torch.autograd.grad(sum((w * t).sum() for w, t in zip(weights, found[:2], strict=True)), ends))
    torch.testing.assert_close(*grads)


def test_ends_that_are_not_finite() -> None:
    inf, nan = math.inf, math.nan
    l = torch.tensor([[0.0, 1.0], [-inf, -inf], [0.0, -inf], [2.0, -inf], [0.0, nan]]).view(5, 1, 1, 2)
    u = torch.tensor([[inf, 2.0], [1.0, 3.0], [1.0, inf], [3.0, 1.0], [1.0, nan]]).view(5, 1, 1, 2)
    slopes, intercepts, source = relax_max_pool(l, u, PoolWindow((1, 2), (1, 2)), "crown")
    assert source.flatten()[:4].tolist() == [1, 1, 0, 0]
    assert slopes[1].flatten()[:4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert intercepts[1].flatten()[:4].tolist() == [inf, 3.0, inf, 0.0]
    assert intercepts[1].flatten()[4].isnan()


def test_a_window_of_one_input_is_that_input() -> None:
    l, u = box((4, 4), 1, torch.float32)
    for window in (PoolWindow((1, 1), (2, 3)), PoolWindow((2, 2), (4, 4), (1, 1))):
        for kind in ("parallel", "crown"):
            lines = relax_max_pool(l, u, window, kind)
            alone = lines.slopes[:, :, :, 0, 0], lines.intercepts[:, :, :, 0, 0]
            assert torch.equal(alone[0], torch.ones_like(alone[0]))
            assert torch.equal(alone[1], torch.zeros_like(alone[1]))
            assert (lines.source[..., 0] == 0).all()


@pytest.mark.parametrize(
    "lower,upper,window,kind,error,match",
    [
        (torch.rand(4, 4), torch.rand(4, 4), PoolWindow((2, 2), (2, 2)), "crown", ValueError, "lower: got shape"),
        (torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 5), PoolWindow((2, 2), (2, 2)), "crown", ValueError, "upper"),
        (torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4, 4), PoolWindow((2, 2), (2, 2)), "best", ValueError, "kind: got"),
        (
            torch.rand(1, 1, 4, 4),
            torch.rand(1, 1, 4, 4),
            PoolWindow((5, 2), (2, 2)),
            "crown",
            ValueError,
            "window: got",
        ),
        (
            torch.rand(1, 1, 1, 4),
            torch.rand(1, 1, 1, 4),
            PoolWindow((2, 1), (1, 1), (1, 0), (2, 1)),
            "crown",
            ValueError,
            "window: got",
        ),
        (
            torch.zeros(1, 1, 4, 4).half(),
            torch.zeros(1, 1, 4, 4).half(),
            PoolWindow((2, 2), (2, 2)),
            "crown",
            TypeError,
            "lower",
        ),
    ],
)
def test_bad_input(lower: Tensor, upper: Tensor, window: PoolWindow, kind: str, error: type, match: str) -> None:
    with pytest.raises(error, match=match):
        relax_max_pool(lower, upper, window, kind)


@both_kinds
def test_compiles_whole(kind: str) -> None:
    l, u = box((6, 6), 3, torch.float32)
    window = PoolWindow((3, 3), (2, 2), (1, 1))
    f = torch.compile(lambda l, u: relax_max_pool(l, u, window, kind), fullgraph=True, backend="aot_eager")
    for got, want in zip(f(l, u), relax_max_pool(l, u, window, kind), strict=True):
        assert torch.equal(got, want)


def test_layouts_of_memory_do_not_matter() -> None:
    l, u = box((6, 6), 5, torch.float32)
    window = PoolWindow((2, 2), (2, 2))
    want = relax_max_pool(l, u, window, "crown")
    for change in (lambda t: t.to(memory_format=torch.channels_last), lambda t: t.mT.contiguous().mT):
        for got, w in zip(relax_max_pool(change(l), change(u), window, "crown"), want, strict=True):
            assert torch.equal(got, w)


# -- networks ----------------------------------------------------------------------------------------------------------
def network(name: str) -> nn.Sequential:
    act = {"leaky": lambda: nn.LeakyReLU(0.2), "tanh": nn.Tanh}.get(name, nn.ReLU)
    window = {
        "overlapping": nn.MaxPool2d(3, 2), "padded": nn.MaxPool2d(2, 2, 1), "ceil": nn.MaxPool2d(3, 3, ceil_mode=True),
        "dilated": nn.MaxPool2d(2, 2, dilation=2),
    }.get(name, nn.MaxPool2d(2))  # fmt: skip
    middle: list[nn.Module] = [act(), window]
    if name == "before":
        middle.reverse()
    elif name == "two":
        middle += [nn.MaxPool2d(2, 1), nn.ReLU6()]
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1), *middle, nn.Conv2d(4, 6, 3, 1, 1), act(), nn.MaxPool2d(2), nn.Flatten(),
        nn.LazyLinear(12), act(), nn.Linear(12, 4),
    )  # fmt: skip


NAMES = ["relu", "leaky", "tanh", "overlapping", "padded", "ceil", "dilated", "before", "two"]


def made(name: str, seed: int = 0) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    net, x = network(name), torch.rand(3, 2, 10, 10)
    net(x)
    return net.eval().requires_grad_(False), x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["crown-ibp", "ibp-linear", "crown", "fast-lin"])
@pytest.mark.parametrize("rounding", ["nearest", "outward"])
def test_bounds_of_networks_hold(name: str, method: str, rounding: str) -> None:
    net, x = made(name)
    found = compute_bounds(net, x, 0.05, method=method, rounding=rounding)
    d = 0.05 * (2 * torch.rand(300, *x.shape) - 1)
    d[:150] = 0.05 * d[:150].sign()
    z = torch.stack([net(x + e) for e in d])
    assert (z >= found.lower - 1e-5).all() and (z <= found.upper + 1e-5).all()
    assert (found.upper - found.lower).max() > (z.amax(0) - z.amin(0)).max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["crown", "fast-lin"])
@pytest.mark.parametrize("seed", range(2))
def test_bounding_what_matters_is_as_tight_as_bounding_all(name: str, method: str, seed: int) -> None:
    """Stable neurons that a pooling reads count, too: without them the margins of these networks lose up to a tenth."""
    net, x = made(name, seed)
    some, every = (
        compute_bounds(net, x, 0.02, method=method, refine=r, intersect=True).lower for r in ("unstable", "all")
    )
    # intervals of later layers differ a little: 2.3e-3 is the most that was seen
    assert (some - every).min() >= -4e-3 * every.abs().max()


def test_intermediate_bounds_are_linear_ones_and_leave_the_result_alone() -> None:
    net, x = made("relu")
    plain, shown = (compute_bounds(net, x, 0.02, method="crown", return_intermediate=i) for i in (False, True))
    torch.testing.assert_close((plain.lower, plain.upper), (shown.lower, shown.upper), rtol=1e-6, atol=1e-6)
    every = compute_bounds(net, x, 0.02, method="crown", refine="all", intersect=True, return_intermediate=True)
    assert shown.intermediate.keys() == every.intermediate.keys()
    for name, (low, up) in shown.intermediate.items():
        assert (low >= every.intermediate[name][0] - 1e-5).all() and (up <= every.intermediate[name][1] + 1e-5).all()


@pytest.mark.parametrize("method", ["crown-ibp", "crown"])
@pytest.mark.parametrize("eps", [0.01, 0.04])
@pytest.mark.parametrize("name", ["relu", "leaky", "tanh", "before"])
def test_never_looser_than_auto_lirpa(name: str, eps: float, method: str) -> None:
    peer = pytest.importorskip("auto_LiRPA")
    for seed in range(3):
        net, x = made(name, seed)
        ball = peer.BoundedTensor(x, peer.PerturbationLpNorm(norm=math.inf, eps=eps))
        theirs = peer.BoundedModule(net, x).compute_bounds(x=(ball,), method=method.upper())
        ours = compute_bounds(net, x, eps, method=method)
        slack = 1e-5 * theirs[0].abs().max()
        assert (ours.lower >= theirs[0] - slack).all() and (ours.upper <= theirs[1] + slack).all()


@pytest.mark.parametrize("name", ["relu", "overlapping"])
def test_training_through_a_pooling(name: str) -> None:
    """The gradient of a bound through windows that are contested, against differences."""
    net, x = made(name)
    net, x = net.double(), x.double()
    weight = net[0].weight.requires_grad_(True)
    low = compute_bounds(net, x, 0.05, method="crown", check="none").lower.sum()
    (grad,) = torch.autograd.grad(low, weight)
    step = torch.randn_like(weight)
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            weight += sign * 1e-6 * step
            ends.append(compute_bounds(net, x, 0.05, method="crown", check="none").lower.sum())
            weight -= sign * 1e-6 * step
    torch.testing.assert_close((grad * step).sum(), (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-4)


def test_the_face_has_it() -> None:
    assert fr.ops.bounds.relax_max_pool is relax_max_pool
    assert list(itertools.chain(PoolWindow((1, 1), (1, 1)))) == [(1, 1), (1, 1), (0, 0), (1, 1), False]
