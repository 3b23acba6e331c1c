"""Chains of ReLUs in one op: bounds and every gradient against the engine in float64, its kernels against their
definitions."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from combinations import combinations
from fastrobust import _C
from fastrobust.bounds import compute_bounds
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds import _autograd as gradients
from fastrobust.ops.bounds import _chain as _bounds_chain
from fastrobust.ops.bounds import _conv as conv
from fastrobust.ops.bounds import _stage_live as stage_live
from fastrobust.ops.bounds._relu_box import relu_box, relu_box_gradient
from fastrobust.ops.bounds._rows import turned
from variant_runs import outputs_by_variant

from .nets import spied

NETS: dict[str, tuple[tuple[int, ...], Any]] = {
    "one layer": ((7,), lambda: [nn.Linear(7, 12), nn.ReLU(), nn.Linear(12, 5)]),
    "dense": (
        (3, 5, 5),
        lambda: [
            nn.Flatten(),
            nn.Linear(75, 33),
            nn.ReLU(),
            nn.Linear(33, 17, bias=False),
            nn.ReLU(),
            nn.Linear(17, 5),
        ],
    ),
    "convolution": ((2, 5, 5), lambda: [nn.Conv2d(2, 5, 3, 1, 1), nn.ReLU(), nn.Flatten(), nn.Linear(125, 3)]),
    "mixed": (
        (3, 8, 8),
        lambda: [
            nn.Conv2d(3, 5, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(5, 19, (2, 3), 1, 0, bias=False),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(114, 21, bias=False),
            nn.ReLU(),
            nn.Linear(21, 13),
            nn.ReLU(),
            nn.Linear(13, 4),
        ],
    ),
}


def network(name: str) -> tuple[nn.Module, tuple[int, ...], int]:
    shape, layers = NETS[name]
    net = nn.Sequential(*layers())
    return net, shape, net[-1].out_features


def bounds_and_gradients(
    net: nn.Module, x: Tensor, eps: Any, y: Tensor | None, dtype: torch.dtype, input_too: bool, **kwargs: Any
) -> list[Tensor]:
    net, x = copy.deepcopy(net).to(dtype), x.to(dtype).requires_grad_(input_too)
    wanted = list(net.parameters()) + [x] * input_too
    if isinstance(eps, Tensor):
        eps = eps.to(dtype).requires_grad_(input_too)
        wanted += [eps] * input_too
    found = compute_bounds(net, x, eps, labels=y, **kwargs)
    ends = [e for e in (found.lower, found.upper) if e is not None]
    value = sum((e * torch.linspace(1, 2, e.numel(), dtype=dtype).view_as(e)).sum() for e in ends)
    with torch.no_grad():
        unrecorded = compute_bounds(net, x, eps, labels=y, **kwargs)
    again = [e for e in (unrecorded.lower, unrecorded.upper) if e is not None]
    return [*ends, *again, *torch.autograd.grad(value, wanted)]


def near(got: list[Tensor], want: list[Tensor], tolerance: float = 2e-5) -> None:
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert (g.detach().double() - w.detach()).abs().max() <= tolerance * w.detach().abs().max()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the op took each call in float32."""
    return spied(monkeypatch, "margins_of_stages")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["crown-ibp", "ibp-linear"])
@pytest.mark.parametrize("sides", ["lower", "both", "upper"])
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_bounds_and_gradients_equal_the_engine(
    name: str,
    method: str,
    sides: str,
    clip: tuple[float, float] | None,
    taken: list[bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for batch, eps_kind, input_too, kept in combinations((1, 3, 7, 16), ("all", "each"), (False, True), (0, 1 << 24)):
        monkeypatch.setattr(_bounds_chain, "_MOST_KEPT", kept)
        torch.manual_seed(batch)
        net, shape, classes = network(name)
        x, y = torch.rand(batch, *shape), torch.randint(classes, (batch,))
        eps = 0.05 if eps_kind == "all" else torch.rand_like(x) / 10
        labels = y if batch != 3 or sides == "upper" else None
        kwargs = {"method": method, "clip": clip, "sides": sides}
        taken.clear()
        got = bounds_and_gradients(net, x, eps, labels, torch.float32, input_too, **kwargs)
        assert taken == [True, True]
        near(got, bounds_and_gradients(net, x, eps, labels, torch.float64, input_too, **kwargs))
        assert taken == [True, True, False, False]  # float64 is the engine's


@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_unrecorded_bounds_without_dead_neurons(
    name: str, leave_out: bool, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_live, "leaving_out_pays", lambda *a: leave_out)
    torch.manual_seed(2)
    net, shape, classes = network(name)
    with torch.no_grad():
        for layer in net:
            if getattr(layer, "bias", None) is not None:
                layer.bias -= 0.2
        x, y = torch.rand(7, *shape), torch.randint(classes, (7,))
        for sides in ("lower", "both"):
            kwargs = {"method": "crown-ibp", "labels": y, "sides": sides}
            got = compute_bounds(net.float(), x, 0.03, **kwargs)
            assert taken.pop()
            want = compute_bounds(net.double(), x.double(), 0.03, **kwargs)
            near([got.lower], [want.lower])
            if sides == "both":
                near([got.upper], [want.upper])


@pytest.mark.parametrize("leave_out", [False, True])
@pytest.mark.parametrize("name", ["one layer", "dense"])
@pytest.mark.parametrize("method", ["crown-ibp", "ibp-linear"])
@pytest.mark.parametrize("sides", ["lower", "both"])
def test_gradients_without_dead_neurons(
    name: str, leave_out: bool, method: str, sides: str, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_live, "leaving_out_pays", lambda *a: leave_out)
    for batch, classes in itertools.product((1, 7), (2, 5, 21)):
        torch.manual_seed(batch)
        net, shape, _ = network(name)
        net[-1] = nn.Linear(net[-1].in_features, classes)
        with torch.no_grad():
            for layer in net[:-1]:
                if getattr(layer, "bias", None) is not None:
                    layer.bias -= 0.3
        x, y = torch.rand(batch, *shape), torch.randint(classes, (batch,))
        kwargs = {"method": method, "sides": sides, "clip": (0.0, 1.0)}
        got = bounds_and_gradients(net, x, 0.03, y, torch.float32, True, **kwargs)
        assert taken == [True, True]
        near(got, bounds_and_gradients(net, x, 0.03, y, torch.float64, True, **kwargs))
        taken.clear()


@pytest.mark.parametrize("method", ["crown-ibp", "ibp-linear"])
@pytest.mark.parametrize("sides", ["lower", "both"])
@pytest.mark.parametrize("dead", [0.0, 0.2, 100.0])  # none, most, all
@pytest.mark.parametrize("leave_out", [False, True])  # on the way down
def test_gradients_of_convolutions_without_dead_neurons(
    method: str, sides: str, dead: float, leave_out: bool, taken: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of whole vectors: neurons are taken one by one where few have lines; one side's and two sides' rows, in
    several turns."""
    monkeypatch.setattr(stage_live, "leaving_out_pays", lambda *a: leave_out)
    for batch, classes, kept in ((1, 2, 1 << 24), (3, 10, 0), (7, 10, 1 << 24), (2, 35, 1 << 24)):
        monkeypatch.setattr(_bounds_chain, "_MOST_KEPT", kept)
        torch.manual_seed(batch)
        net = nn.Sequential(
            nn.Conv2d(1, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 21, (3, 4), (1, 2), (1, 0)),
            nn.ReLU(),
            nn.Conv2d(21, 5, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(20, classes),
        )
        with torch.no_grad():
            net[2].bias -= dead
            net[0].bias[:4] -= 10 * dead
            net[2].weight[3], net[2].bias[3] = 0.0, 0.0  # constant
            net[2].weight[::2, ::3] = 0.0
        x, y = torch.rand(batch, 1, 10, 12), torch.randint(classes, (batch,))
        kwargs = {"method": method, "sides": sides, "clip": (0.0, 1.0)}
        got = bounds_and_gradients(net, x, 0.03, y, torch.float32, True, **kwargs)
        assert taken == [True, True]
        near(got, bounds_and_gradients(net, x, 0.03, y, torch.float64, True, **kwargs))
        taken.clear()


def test_weights_changed_in_place_are_noticed() -> None:
    net, shape, _ = network("mixed")
    low = compute_bounds(net, torch.rand(2, *shape), 0.1, method="crown-ibp").lower
    with torch.no_grad():
        net[0].weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        low.sum().backward()


def test_a_network_that_is_no_number() -> None:
    net, shape, _ = network("mixed")
    net[0].weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"'0.weight' holds NaN"):
        compute_bounds(net, torch.rand(2, *shape), 0.1, method="crown-ibp")


# ---- the kernels ----
@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 40), st.booleans())
def test_matrices_turned(count: int, rows: int, columns: int, strided: bool) -> None:
    t = torch.rand(count, rows, columns * 2)[:, :, ::2] if strided else torch.rand(count, rows, columns)
    got = turned(t, count, rows, columns)
    assert got.is_contiguous() and torch.equal(got, t.transpose(1, 2))


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 110), st.booleans(), st.booleans(), st.integers(0, 99))
def test_products_in_any_layout(rows: int, count: int, columns: int, turn_a: bool, turn_b: bool, seed: int) -> None:
    torch.manual_seed(seed)
    a = torch.randn(count, rows).t() if turn_a else torch.randn(rows, count + 3)[:, :count]
    b = torch.randn(columns, count).t() if turn_b else torch.randn(count, columns)
    out = torch.full((rows, columns), math.nan)
    _C.bounds_product(a.data_ptr(), b.data_ptr(), out.data_ptr(), rows, count, columns, (*a.stride(), *b.stride()))
    want = a.double() @ b.double()
    assert (out - want).abs().max() <= 1e-5 * (a.double().abs() @ b.double().abs()).max()


@given(st.integers(0, 30), st.integers(1, 140), st.integers(1, 9), st.booleans(), st.integers(0, 99))
def test_gradient_of_a_matrix_whose_rows_are_picked(count: int, n: int, rows: int, less: bool, seed: int) -> None:
    torch.manual_seed(seed)
    g, plus, minus = torch.randn(count, n), torch.randint(rows, (count,)), torch.randint(rows, (count,))
    got = gradients.pick_gradient(g, plus, minus if less else None, rows)
    want = torch.zeros(rows, n, dtype=torch.float64).index_add(0, plus, g.double())
    if less:
        want = want.index_add(0, minus, -g.double())
    assert torch.allclose(got.double(), want, atol=1e-5)


@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 15), st.booleans(), st.integers(0, 99))
def test_gradients_of_both_products(batch: int, n: int, m: int, one: bool, seed: int) -> None:
    torch.manual_seed(seed)
    r_batch = 1 if one else batch
    c, r, w = torch.randn(batch, n), torch.rand(r_batch, n), torch.randn(m, n)
    w[torch.rand(m, n) < 0.1] = 0.0
    g_c, g_r, start = torch.randn(batch, m), torch.randn(r_batch, m), torch.randn(m, n)
    to_w, to_c, to_r = start.clone(), torch.empty(batch, n), torch.empty(r_batch, n)
    tensors = [t.data_ptr() for t in (c, r, w, g_c, g_r, to_w, to_c, to_r)]
    _C.bounds_interval_grad(*tensors, batch, r_batch, n, m)
    c, r, w, g_c, g_r = (t.double() for t in (c, r, w, g_c, g_r))
    near([to_w, to_c, to_r], [start + g_c.t() @ c + w.sign() * (g_r.t() @ r), g_c @ w, g_r @ w.abs()], 1e-5)


@given(
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 18),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.integers(1, 2),
    st.integers(0, 1),
    st.booleans(),
    st.integers(0, 99),
)
def test_gradient_of_a_convolutions_weight(
    batch: int, channels: int, out: int, kernel: tuple[int, int], stride: int, padding: int, one: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    last = torch.channels_last
    w = torch.randn(out, channels, *kernel)
    w[torch.rand_like(w) < 0.1] = 0.0
    c, r = torch.randn(batch, channels, 7, 6), torch.rand(1 if one else batch, channels, 7, 6)
    shape = F.conv2d(c, w, None, stride, padding).shape
    g_c, g_r = torch.randn(shape), torch.randn(len(r), *shape[1:])
    maps = [t.contiguous(memory_format=last) for t in (c, r)], [t.contiguous(memory_format=last) for t in (g_c, g_r)]
    got = conv.interval_weight_gradient(*maps[0], w, *maps[1], (stride, stride), (padding, padding))
    wide = w.double().requires_grad_(True)
    value = (F.conv2d(c.double(), wide, None, stride, padding) * g_c).sum()
    value = value + (F.conv2d(r.double(), wide.abs(), None, stride, padding) * g_r).sum()
    near([got], list(torch.autograd.grad(value, [wide])), 1e-5)


@given(
    st.integers(0, 20),
    st.integers(1, 40),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_relu_and_its_lines_in_one_pass(
    batch: int, channels: int, positions: int, adaptive: bool, one: bool, more: bool, seed: int
) -> None:
    """Against ``relax`` in float64, with the bias of the product joined to the intercepts, and its gradients."""
    torch.manual_seed(seed)
    n = channels * positions
    c, r, bias = torch.randn(batch, n), torch.rand(1 if one else batch, n), torch.randn(channels)
    r[torch.rand_like(r) < 0.1] = 0.0
    box = relu_box(c, r, bias, channels, adaptive)
    assert box.living == int((c + r > 0).sum()) / max(1, c.numel())
    wide = [t.double().requires_grad_(True) for t in (c, r, bias)]
    low, up = wide[0] - wide[1], wide[0] + wide[1]
    lines = ops.relax(low, up, "relu", "crown" if adaptive else "parallel")
    joined = lines.intercepts + lines.slopes * wide[2].repeat(positions)
    middle, reach = (low.relu() + up.relu()) / 2, (up.relu() - low.relu()) / 2
    assert box.lines is not None and box.after is not None
    got = [*box.lines, *box.after]
    for g, w in zip(got, (lines.slopes, joined, middle, reach), strict=True):
        assert torch.allclose(g.double(), w, atol=1e-5)
    given_grads = [torch.randn_like(t) for t in got]
    sent = (given_grads[0], given_grads[1]), (given_grads[2], given_grads[3]) if more else None
    to_c, to_r, to_bias = relu_box_gradient(c, r, one, bias, channels, adaptive, *sent)
    outputs = [lines.slopes, joined] + [middle, reach] * more
    value = sum((o * g).sum() for o, g in zip(outputs, given_grads, strict=False))
    want = torch.autograd.grad(value, wide)
    for g, w in zip((to_c, to_r), want, strict=False):
        assert torch.allclose(g.double(), w, rtol=1e-4, atol=1e-4)
    whole = want[2] + want[0].view(batch, positions, channels).sum((0, 1))  # the centre holds the bias, too
    assert torch.allclose(to_bias.double(), whole, rtol=1e-4, atol=2e-4 * (1 + batch * positions))


_SCRIPT = """
import torch
import fastrobust as fr
from torch import nn
torch.manual_seed(1)
net = nn.Sequential(nn.Conv2d(1, 7, 4, 2, 1), nn.ReLU(), nn.Conv2d(7, 8, 2), nn.ReLU(), nn.Conv2d(8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(45, 33), nn.ReLU(), nn.Linear(33, 12))
net[4].bias.data -= 0.2  # neurons without lines
for method in ("crown-ibp", "ibp-linear"):
    net.zero_grad()
    found = fr.bounds.compute_bounds(net, torch.rand(5, 1, 11, 10), 0.05, method=method, labels=torch.arange(5))
    (found.lower.sum() - found.upper.sum()).backward()
    for v in (found.lower, found.upper, *(p.grad for p in net.parameters())):
        print(float(v.double().sum()), float(v.double().abs().sum()))
"""


def test_every_variant_gives_the_same_bounds_and_gradients() -> None:
    first, *others = (list(map(float, words)) for words in outputs_by_variant(_SCRIPT).values())
    for other in others:
        assert all(abs(a - b) <= 1e-4 * max(1.0, abs(a)) for a, b in zip(first, other, strict=True))
