"""Convolutions with groups and dilation, and rows through graphs of stages: kernels against float64 in plain torch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrobust import _C
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds import intervals as interval_ops
from fastrobust.ops.bounds._rows import address, lanes_of, taps_of
from fastrobust.reference import bounds as reference
from variant_runs import outputs_by_variant

Pair = tuple[int, int]


def near(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    if want.numel():
        assert (got.double() - want.double()).abs().max() <= tolerance * (want.double().abs().max() + 1e-30)


def grads(outputs: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of a fixed random combination of the outputs."""
    generator = torch.Generator().manual_seed(7)
    total = sum((o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(total, inputs)


pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
GROUPS = [
    (1, 1, 3),
    (1, 17, 3),
    (2, 8, 16),
    (2, 3, 5),
    (3, 1, 1),
    (8, 1, 1),
    (17, 1, 1),
    (33, 1, 1),
    (4, 1, 2),
    (3, 2, 1),
    (2, 17, 8),
]
geometries = st.fixed_dictionaries(
    {
        "groups": st.sampled_from(GROUPS),  # how many, channels of one before and behind the convolution
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "stride": pairs, "dilation": pairs, "padding": st.tuples(st.integers(0, 4), st.integers(0, 4)),
        "image": st.tuples(st.integers(3, 11), st.integers(3, 11)), "batch": st.sampled_from([0, 1, 3, 7]),
    }
)  # fmt: skip


def layer_of(g: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], tuple[int, ...], tuple[int, ...]]:
    """Weight, (stride, padding, dilation, groups), shapes of the input and of the result without the batch."""
    count, before, behind = g["groups"]
    shape = []
    for n, k, s, d, p in zip(g["image"], g["kernel"], g["stride"], g["dilation"], g["padding"], strict=True):
        if n + 2 * p < (k - 1) * d + 1:
            reject()
        shape.append((n + 2 * p - (k - 1) * d - 1) // s + 1)
    w = torch.randn(count * behind, before, *g["kernel"])
    conv = (g["stride"], g["padding"], g["dilation"], count)
    return w, conv, (count * before, *g["image"]), (count * behind, *shape)


@settings(deadline=None)
@given(geometries, st.sampled_from([ops.CENTER, ops.ENDS, ops.RELU]), st.booleans(), st.booleans())
def test_interval_convolution(g: dict[str, Any], finish: int, shared: bool, last: bool) -> None:
    torch.manual_seed(0)
    w, conv, before, _ = layer_of(g)
    batch = g["batch"]
    c, r, b = torch.randn(batch, *before), torch.rand(1 if shared else batch, *before), torch.randn(len(w))
    if last:
        c = c.contiguous(memory_format=torch.channels_last)
    leaves = [t.requires_grad_(True) for t in (c, r, w, b)]
    wide = [t.detach().double().requires_grad_(True) for t in leaves]
    got = ops.center_conv2d(*leaves, *conv, finish)
    mid = F.conv2d(wide[0], wide[2], wide[3], *conv)
    reach = F.conv2d(wide[1], wide[2].abs(), None, *conv).expand_as(mid)
    low, up = mid - reach, mid + reach
    if finish == ops.RELU:
        want = reference.center_radius(low.relu(), up.relu())
    else:
        want = (mid, reach) if finish == ops.CENTER else (low, up)
    with torch.no_grad():
        plain = ops.center_conv2d(*leaves, *conv, finish)
    for own, v, p in zip(got, want, plain, strict=True):
        near(own.detach(), v.detach())
        assert torch.equal(own.detach(), p)
    if finish != ops.RELU:  # behind a ReLU a rounding decides whether a neuron has a gradient
        for own, v in zip(grads(got, leaves), grads(want, wide), strict=True):
            near(own, v)
    if batch > 1 and not shared:  # values do not depend on what else is in the batch
        one = ops.center_conv2d(c.detach()[1:2], r.detach()[1:2], w.detach(), b.detach(), *conv, finish)
        assert torch.equal(one[0], plain[0][1:2]) and torch.equal(one[1], plain[1][1:2])


@settings(deadline=None)
@given(geometries)
def test_spread_is_the_adjoint(g: dict[str, Any]) -> None:
    torch.manual_seed(1)
    w, conv, before, behind = layer_of(g)
    a = torch.randn(g["batch"], *behind)
    stride, padding, dilation, groups = conv
    wide = [t.double().requires_grad_(True) for t in (a, w)]
    zeros = torch.zeros(g["batch"], *before, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(
        (F.conv2d(zeros, wide[1], None, *conv) * wide[0]).sum(), zeros, create_graph=True, allow_unused=True
    )[0]
    near(ops.spread(a, w, stride, padding, before[1:], dilation, groups), want.detach())
    leaves = [t.requires_grad_(True) for t in (a, w)]
    got = ops.spread(*leaves, stride, padding, before[1:], dilation, groups)
    near(got.detach(), want.detach())
    if g["batch"]:
        for own, v in zip(grads([got], leaves), grads([want], wide), strict=True):
            near(own, v)


def test_registration() -> None:
    a, w = torch.randn(2, 4, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    torch.library.opcheck(interval_ops._spread.op, (a, w, [2, 2], [1, 1], [12, 10], [2, 1], 2))
    c, r = torch.randn(2, 6, 6, 5, requires_grad=True), torch.rand(2, 6, 6, 5, requires_grad=True)
    torch.library.opcheck(interval_ops._interval_conv.op, (c, r, w, None, [2, 2], [1, 1], ops.ENDS, [1, 2], 2))
    wide = [t.detach().double().requires_grad_(True) for t in (a, w)]
    f = lambda a, w: ops.spread(a, w, (2, 2), (1, 1), (12, 10), (2, 1), 2)  # noqa: E731
    assert torch.autograd.gradcheck(f, wide)
    c, r = torch.randn(1, 6, 6, 5, dtype=torch.float64), torch.rand(1, 6, 6, 5, dtype=torch.float64)
    f = lambda *t: ops.center_conv2d(*t, None, 2, 1, (1, 2), 2, ops.ENDS)  # noqa: E731
    assert torch.autograd.gradcheck(f, [c.requires_grad_(), r.requires_grad_(), wide[1]], eps=1e-7, atol=1e-5)


# ---- rows through graphs of stages ----


class Net:
    """Stages from the rows on, the input last: (channels, height, width) of each, and links (stage, source, kind,
    weight, how)."""

    def __init__(
        self,
        images: list[tuple[int, int, int]],
        slope_sides: list[int],
        links: list[tuple[Any, ...]],
        batch: int,
        rows: int,
        sides: int,
        entries: dict[int, int],
    ) -> None:
        self.images, self.links, self.batch, self.rows, self.sides = images, links, batch, rows, sides
        self.sizes = [math.prod(i) for i in images]
        self.example = torch.arange(batch).repeat_interleave(rows)
        self.count = batch * rows
        self.lines = [
            (torch.rand(k, batch, n), torch.randn(2, batch, n)) for k, n in zip(slope_sides, self.sizes, strict=False)
        ]
        self.entries = {i: torch.randn(k, self.count, self.sizes[i]) for i, k in entries.items()}
        self.weights = [link[3] for link in links if link[2] == "conv"]
        self.box = torch.randn(batch, self.sizes[-1]), torch.rand(batch, self.sizes[-1])
        self.b = torch.randn(sides, self.count)

    def tensors(self) -> list[Tensor]:
        return [*self.box, *(t for pair in self.lines for t in pair), *self.entries.values(), *self.weights]

    def definition(self, tensors: list[Tensor], b: Tensor) -> tuple[Tensor, Tensor]:
        """The rows at the input and b there, of plain operations."""
        rest = list(tensors[2:])
        lines = [(rest.pop(0), rest.pop(0)) for _ in self.lines]
        arrived: dict[int, Tensor] = {i: rest.pop(0) for i in self.entries}
        weights = iter(rest)
        of_link = [next(weights) if link[2] == "conv" else None for link in self.links]
        scaled: dict[int, Tensor] = {}
        for i in range(len(self.images)):
            for (stage, source, kind, _, how), w in zip(self.links, of_link, strict=True):
                if stage != i:
                    continue
                found = self.link(kind, how, w, scaled[source], source, i)
                own = arrived.get(i)
                arrived[i] = found if own is None else own + found
            if i + 1 < len(self.images):
                scaled[i], b = reference.linear_back_step(arrived[i], b, *lines[i], self.example)
        return arrived[len(self.images) - 1], b

    def link(self, kind: str, how: Any, w: Any, a: Tensor, source: int, stage: int) -> Tensor:
        if kind == "identity":
            return how * a
        (c, h, v), k = self.images[source], a.shape[0]
        if kind == "pick":
            index = how[self.example].long().expand(k, -1, -1)
            return torch.zeros(k, self.count, self.sizes[stage], dtype=a.dtype).scatter_add(2, index, a)
        image = a.reshape(-1, h, v, c).permute(0, 3, 1, 2)
        (stride, padding, dilation, groups), before = how, self.images[stage]
        span = [(n - 1) * d + 1 for n, d in zip(w.shape[2:], dilation, strict=True)]
        extra = [
            n - ((m - 1) * s - 2 * p + q)
            for n, m, s, p, q in zip(before[1:], (h, v), stride, padding, span, strict=True)
        ]
        out = F.conv_transpose2d(image, w, None, stride, padding, extra, groups, dilation)
        return out.permute(0, 2, 3, 1).reshape(k, self.count, -1)

    def graph(self, x: tuple[Any, ...] = (), dual: int = 0, box: bool = True) -> Any:
        """The compiled module's graph and what it keeps."""
        self.alive: list[Any] = []
        self.kept: list[Any] = []
        stages, links, entries, leaving = [], [], [], []
        for i, (c, h, w) in enumerate(self.images):
            first, k, entry = len(links), 1, -1
            if i in self.entries:
                a = self.entries[i]
                entry, k = len(entries), len(a)
                entries.append(_C.GraphEntry(a.data_ptr(), a[0].numel() if k == 2 else 0))
            for stage, source, kind, weight, how in self.links:
                if stage != i:
                    continue
                k = max(k, leaving[source])
                if kind == "identity":
                    links.append(_C.GraphLink(source, _C.LinkKind.identity, how))
                elif kind == "pick":
                    links.append(_C.GraphLink(source, _C.LinkKind.pick, index=how.data_ptr()))
                else:
                    lanes = lanes_of(weight)
                    self.alive.append(taps_of(weight, lanes))
                    told = dict(zip(("stride", "padding", "dilation", "groups"), how, strict=True))
                    links.append(_C.GraphLink(source, _C.LinkKind.conv, weight=self.alive[-1].data_ptr(),
                                              kernel=weight.shape[2:], lanes=lanes, **told))  # fmt: skip
            last = i + 1 == len(self.images)
            slopes, intercepts = (None, None) if last else self.lines[i]
            leaving.append(self.sides if slopes is not None and len(slopes) == 2 else k)
            linked = len(links) > first
            kept = (torch.empty(k, self.count, c * h * w) if linked else None,
                    None if last else torch.empty(leaving[-1], self.count, c * h * w))  # fmt: skip
            self.kept.append((k, kept, entry >= 0))
            sides = 1 if slopes is None else len(slopes)
            stages.append(
                _C.GraphStage(
                    (h, w, c),
                    first,
                    len(links) - first,
                    address(slopes),
                    sides,
                    address(intercepts),
                    False,
                    entry,
                    *map(address, kept),
                )
            )
        ends = [*map(address, self.box if box else (None, None)), *map(address, x)]
        self.lanes = [link.lanes for link in links]
        self.kinds = [link.kind for link in links]
        return _C.Graph(
            stages, links, entries, self.batch, self.count, self.sides, *ends, **({"dual": dual} if dual else {})
        )


def conv_link(
    stage: int,
    source: int,
    images: list[Any],
    g: tuple[int, ...],
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Any:
    """From a convolution's result (source) to its input (stage)."""
    groups = g[0]
    w = torch.randn(images[source][0], images[stage][0] // groups, *kernel) * 0.3
    return (stage, source, "conv", w, (stride, padding, dilation, groups))


def net_of(g: dict[str, Any], pool: bool, both: bool, sides: int, two: int, matrices: int) -> Net:
    """rows -> [pick ->] activation -> convolution (and a skip where shapes allow) -> activation -> 3 x 3 -> input."""
    w, conv, before, behind = layer_of(g)
    top = (behind[0], max(1, behind[1] // 2), max(1, behind[2] // 2))
    source = (2, before[1] + 1, before[2])
    images = [top, behind, before, source] if pool else [behind, before, source]
    at = 1 if pool else 0
    links: list[tuple[Any, ...]] = []
    batch = max(1, g["batch"])
    if pool:
        links.append(
            (1, 0, "pick", None, torch.randint(0, math.prod(behind), (batch, math.prod(top)), dtype=torch.int32))
        )
        links[-1][4][:, : math.prod(top) // 2] = 0  # several of one
    links.append((at + 1, at, "conv", w, conv))
    if both and before == behind:
        links.append((at + 1, at, "identity", None, -1.0))
    links.append(conv_link(at + 2, at + 1, images, (1,), (2, 3), (1, 1), (0, 1), (1, 1)))
    if both:
        links.append(conv_link(at + 2, at + 1, images, (1,), (4, 1), (1, 1), (1, 0), (1, 2)))
    entries = {0: matrices, **({at + 1: 1} if both else {})}
    return Net(images, [two, 1, two][: len(images) - 1], links, batch, 5, sides, entries)


@settings(deadline=None)
@given(
    geometries,
    st.booleans(),
    st.booleans(),
    st.sampled_from([(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 1, 2), (2, 2, 2), (1, 2, 1)]),
)
def test_rows_down_and_up(g: dict[str, Any], pool: bool, both: bool, form: tuple[int, int, int]) -> None:
    torch.manual_seed(2)
    net = net_of(g, pool, both, *form)
    graph, out = net.graph(), torch.empty_like(net.b)
    _C.bounds_stage_rows(graph, net.example.data_ptr(), net.b.data_ptr(), out.data_ptr())
    wide = [t.double().requires_grad_(True) for t in net.tensors()]
    A, b = net.definition(wide, net.b.double())
    want = reference.concretize_rows(A, b, net.example, (wide[0], wide[1]), None, 1.0)
    near(out, want.detach(), 3e-5)
    from_ = torch.randn(out.shape)
    for own, v in zip(up(net, graph, from_), torch.autograd.grad((want * from_.double()).sum(), wide), strict=True):
        near(own, v, 3e-5)


def up(net: Net, graph: Any, from_: Tensor, **more: Any) -> list[Tensor]:
    """The gradients, as ``Net.tensors``."""
    starts = torch.arange(0, net.count + 1, net.rows)
    lines = [(torch.empty_like(s), torch.empty_like(i)) for s, i in net.lines]
    entries = {i: torch.empty(net.kept[i][0], *t.shape[1:]) for i, t in net.entries.items()}
    to_stages = [
        (*map(address, lines[i] if i < len(lines) else (None, None)), address(entries.get(i)))
        for i in range(len(net.images))
    ]
    taps = [
        torch.empty(len(link[3]), n) if link[2] == "conv" else None
        for link, n in zip(net.links, net.lanes, strict=True)
    ]
    box = [torch.empty_like(t) for t in net.box]
    _C.bounds_stage_grad(
        graph,
        net.example.data_ptr(),
        starts.data_ptr(),
        from_.data_ptr(),
        to_stages,
        list(map(address, taps)),
        *map(address, box),
        **more,
    )
    weights = []
    for t, link in zip(taps, net.links, strict=True):
        if t is not None:
            o, c, kh, kw = link[3].shape
            weights.append(t[:, : c * kh * kw].view(o, kh, kw, c).permute(0, 3, 1, 2))
    starting = [t if len(t) == len(net.entries[i]) else t.sum(0, keepdim=True) for i, t in entries.items()]
    return [*box, *(t for pair in lines for t in pair), *starting, *weights]


@pytest.mark.parametrize("q,dual", [(1.0, 1), (2.0, 2), (math.inf, 3)])
@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("form", [(1, 1, 1), (2, 2, 1), (2, 1, 2)])
def test_balls_and_what_is_kept_at_the_input(q: float, dual: int, box: bool, form: tuple[int, int, int]) -> None:
    """Bounds over a ball; A and b there; the gradients of both, and through them those of any end."""
    torch.manual_seed(4)
    g = {
        "groups": (2, 3, 5),
        "kernel": (3, 2),
        "stride": (2, 1),
        "dilation": (1, 2),
        "padding": (1, 1),
        "image": (7, 6),
        "batch": 3,
    }
    net = net_of(g, True, True, *form)
    ball = torch.randn(net.box[0].shape), torch.rand(net.box[0].shape)
    graph = net.graph(ball, dual, box)
    out, offset = torch.empty_like(net.b), torch.empty_like(net.b)
    _C.bounds_stage_rows(graph, net.example.data_ptr(), net.b.data_ptr(), out.data_ptr(), offset=offset.data_ptr())
    wide = [t.double().requires_grad_(True) for t in net.tensors()]
    A, b = net.definition(wide, net.b.double())
    near(net.kept[-1][1][0], A.detach())
    near(offset, b.detach())
    end = (wide[0], wide[1]) if box else None
    want = reference.concretize_rows(A, b, net.example, end, (ball[0].double(), ball[1].double()), q)
    near(out, want.detach(), 3e-5)
    alone = torch.empty_like(net.b)
    plain = net.graph(box=False)  # no input set: only what is kept
    _C.bounds_stage_rows(plain, net.example.data_ptr(), net.b.data_ptr(), 0, offset=alone.data_ptr())
    assert torch.equal(alone, offset)
    from_map, from_ = torch.randn(A.shape), torch.randn(b.shape)
    total = (A * from_map.double()).sum() + (b * from_.double()).sum()
    wanted = torch.autograd.grad(total, wide[2:], retain_graph=True)
    got = up(net, plain, from_, from_map=from_map.data_ptr())
    for own, v in zip(got[2:], wanted, strict=True):
        near(own, v, 3e-5)
    both = net.graph()  # and those of the bounds over a box
    _C.bounds_stage_rows(both, net.example.data_ptr(), net.b.data_ptr(), out.data_ptr())
    low = reference.concretize_rows(A, b, net.example, (wide[0], wide[1]), None, 1.0)
    wanted = torch.autograd.grad((low * from_.double()).sum() + (A * from_map.double()).sum(), wide)
    for own, v in zip(up(net, both, from_, from_map=from_map.data_ptr()), wanted, strict=True):
        near(own, v, 3e-5)


def test_what_is_refused() -> None:
    torch.manual_seed(0)
    g = {
        "groups": (2, 3, 5),
        "kernel": (3, 2),
        "stride": (1, 1),
        "dilation": (1, 1),
        "padding": (1, 1),
        "image": (5, 6),
        "batch": 1,
    }
    net = net_of(g, False, False, 1, 1, 1)
    ball = torch.randn(net.box[0].shape), torch.rand(net.box[0].shape)
    with pytest.raises(ValueError, match="dual: got a ball, expected a box"):
        up(net, net.graph(ball, 2), torch.ones(net.b.shape))
    with pytest.raises(ValueError, match="out: got none"):
        _C.bounds_stage_rows(net.graph(), net.example.data_ptr(), net.b.data_ptr(), 0)
    for change, name in (({"groups": 4}, "groups"), ({"dilation": (0, 1)}, "dilation")):
        how = {"weight": net.weights[0].data_ptr(), "kernel": (3, 2), "lanes": 16, **change}
        link = _C.GraphLink(0, _C.LinkKind.conv, **how)
        stages = [
            _C.GraphStage((4, 4, 10), 0, 0, *[net.b.data_ptr(), 1, net.b.data_ptr()], entry=0),
            _C.GraphStage((5, 6, 6), 0, 1),
        ]
        with pytest.raises(ValueError, match=name):
            _C.Graph(stages, [link], [_C.GraphEntry(net.b.data_ptr())], 1, 1, 1)


_SCRIPT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import torch
import fastrobust as fr
from fastrobust import _C
from fastrobust.ops import bounds as ops
from tests.bounds.test_stage_rows import GROUPS, layer_of, net_of, up
for i, groups in enumerate(GROUPS):
    torch.manual_seed(i)
    g = dict(groups=groups, kernel=(3, 2 + i % 3), stride=(1 + i % 2, 2), dilation=(1 + i % 3, 2 - i % 2), padding=(2, 1), image=(9, 8), batch=3)
    net = net_of(g, i % 2 == 0, i % 3 > 0, 2, 1 + i % 2, 1)
    graph, out = net.graph(), torch.empty_like(net.b)
    _C.bounds_stage_rows(graph, net.example.data_ptr(), net.b.data_ptr(), out.data_ptr())
    found = [out, *up(net, graph, torch.randn(out.shape))]
    w, conv, before, _ = layer_of(g)
    c = torch.randn(3, *before, requires_grad=True)
    ends = ops.center_conv2d(c, c.detach().abs(), w.requires_grad_(), None, *conv, ops.ENDS)
    found += [*ends, *torch.autograd.grad(ends[0].square().sum(), [c, w])]
    for v in found:
        print(float(v.detach().double().sum()), float(v.detach().double().abs().sum()))
"""


def test_every_variant_gives_the_same() -> None:
    script = _SCRIPT.format(root=str(Path(__file__).parents[2]))
    first, *others = (list(map(float, words)) for words in outputs_by_variant(script).values())
    assert others
    for other in others:
        assert all(abs(a - b) <= 1e-3 * max(1.0, abs(a)) for a, b in zip(first, other, strict=True))
