"""Rows through a graph of activations and convolutions in one kernel, against the propagation layer by layer in
float64."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrobust.bounds import compute_bounds, stages
from fastrobust.bounds import graph as G
from fastrobust.bounds.backward import Backward, Chunk, Lines, Rows
from fastrobust.bounds.engine import Engine
from fastrobust.bounds.region import Region
from fastrobust.bounds.stages import concretize_units
from fastrobust.bounds.trace import trace
from fastrobust.ops import bounds as ops
from variant_runs import outputs_by_variant

from .nets import random_statistics

IMAGE = (3, 7, 6)


class Block(nn.Module):
    """A residual block: the activation after the sum, or (``before``) normalisation and activation before each
    convolution."""

    def __init__(self, i: int, o: int, stride: int, before: bool, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.before, self.act = before, act()
        self.one, self.two = nn.Conv2d(i, o, 3, stride, 1), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.norm, self.short = nn.BatchNorm2d(i), nn.Conv2d(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            return self.two(self.act(self.one(self.act(self.norm(x))))) + self.short(x)
        return self.act(self.short(x) + self.two(self.act(self.one(x))))


class Forks(nn.Module):
    """Two convolutions and a scaled copy of the input, a difference, an activation that two layers read, a value used
    twice."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(3, width, (4, 2), 2, (2, 0), bias=False)
        self.c, self.d, self.out = nn.Conv2d(width, width, 2, 1, 1), nn.Conv2d(width, 5, 5, 3, 2), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = (x - 0.4) / 0.3
        h = torch.relu(self.a(x) - self.b(x))
        k = torch.relu(self.c(h))
        s = self.c(torch.relu(k)) * 0.5 + 0.1
        return self.out(torch.relu(self.d(torch.relu(s + s))).sum((2, 3)))


class PooledBlock(nn.Module):
    """A pooling of a sum that another layer reads, too, and whose result is subtracted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3, 1, 1), nn.Conv2d(6, 6, 3, 1, 1), nn.Conv2d(6, 4, 3, 2, 1, groups=2)
        self.pool, self.out = nn.MaxPool2d(3, 1, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        s = h + self.b(h)
        return self.out(torch.relu(self.c(s - self.pool(s))).sum((2, 3)))


def plain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))


def residual(before: bool, width: int = 6, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1), nn.Identity() if before else act(), Block(width, width, 1, before, act),
        Block(width, 2 * width, 2, before, act), act(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip


NETS: dict[str, Any] = {
    "after": lambda: residual(False),
    "before": lambda: residual(True),
    "wide": lambda: residual(False, 19),
    "tanh": lambda: residual(False, 4, nn.Tanh),
    "hardtanh": lambda: residual(True, 4, nn.Hardtanh),
    "forks": lambda: Forks(4),
    "pooled": lambda: nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.ReLU(),
        nn.Conv2d(5, 18, 3, 2, 1),
        nn.ReLU(),
        nn.AvgPool2d(2, 1),
        nn.Conv2d(18, 4, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(3),
    ),
    "image": lambda: nn.Sequential(nn.Conv2d(3, 20, 3, 1, 1), nn.ReLU(), nn.Conv2d(20, 2, 3, 3, 1)),
    "kernels": lambda: nn.Sequential(
        nn.Conv2d(3, 4, (1, 5), (1, 2), (0, 3)),
        nn.ReLU(),
        nn.Conv2d(4, 17, (3, 1), (3, 1), (1, 0)),
        nn.ReLU(),
        nn.Conv2d(17, 3, 2, 2),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.LazyLinear(3),
    ),
    "depthwise": lambda: plain(
        nn.Conv2d(3, 9, 3, 1, 1, groups=3),
        nn.ReLU(),
        nn.Conv2d(9, 9, 3, 2, 1, groups=9),
        nn.ReLU(),
        nn.Conv2d(9, 20, 1),
        nn.ReLU(),
        nn.Conv2d(20, 20, 2, 2, groups=20, bias=False),
        nn.Conv2d(20, 8, 2, 1, 1, groups=4),
    ),
    "dilated": lambda: plain(
        nn.Conv2d(3, 5, 3, 1, 2, 2),
        nn.ReLU(),
        nn.Conv2d(5, 18, (2, 3), 2, (1, 3), (1, 3)),
        nn.ReLU(),
        nn.Conv2d(18, 6, 2, 3, 4, (3, 2), groups=2),
    ),
    "grouped image": lambda: nn.Sequential(nn.Conv2d(3, 6, 3, 1, 1), nn.ReLU(), nn.Conv2d(6, 40, 3, 2, 2, 2, groups=2)),
    "pool": lambda: plain(
        nn.Conv2d(3, 5, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 17, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2, 1)
    ),
    "overlap": lambda: plain(
        nn.Conv2d(3, 6, 3, 1, 1),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(6, 8, 3, 1, 1),
        nn.MaxPool2d((2, 3), 1, (1, 1), 2),
    ),
    "ceil": lambda: plain(
        nn.Conv2d(3, 6, 2),
        nn.Tanh(),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.Conv2d(6, 6, 2, 1, 1, groups=3),
        nn.MaxPool2d(2, 2, ceil_mode=True),
    ),
    "pool first": lambda: plain(nn.MaxPool2d(2, 2, 1), nn.Conv2d(3, 6, 2), nn.ReLU(), nn.Conv2d(6, 20, 2)),
    "pool last": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 20, 2), nn.MaxPool2d(2, 1)),
    "pooled sum": PooledBlock,
}


def make(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = NETS[name]().eval()
    net(torch.zeros(1, *IMAGE))
    random_statistics(net)
    for m in net.modules():
        if isinstance(m, nn.Conv2d) and m.bias is not None:
            m.bias.data.normal_(0, 0.7)  # dead and stable neurons
    return net


class Counted:
    """How often the kernel ran, for units and for whole images."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.units = self.images = 0
        kernel = ops.concretize_graph

        def run(*args: Any) -> Tensor:
            if args[7] is not None:
                self.units += 1
            else:
                self.images += 1
            return kernel(*args)

        monkeypatch.setattr(stages.ops, "concretize_graph", run)


def compare(net: nn.Module, x: Tensor, p: float, eps: Any, clip: Any, method: str, sides: str) -> None:
    wide = eps.double() if isinstance(eps, Tensor) else eps
    with torch.no_grad():
        got = compute_bounds(net.float(), x, eps, norm=p, clip=clip, method=method, sides=sides)
        want = compute_bounds(net.double(), x.double(), wide, norm=p, clip=clip, method=method, sides=sides)
    for a, b in ((got.lower, want.lower), (got.upper, want.upper)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.shape == b.shape
            assert len(x) == 0 or (a - b).abs().max() <= 5e-5 * (1 + b.abs().max()), (p, method, sides)


# beside these, which input of a dead channel a pooling follows hangs on roundings
STEADY = [n for n in NETS if n not in ("pool last", "overlap", "ceil", "pooled sum")]


@pytest.mark.parametrize("name", STEADY)
def test_equals_the_propagation_layer_by_layer_in_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    net, x = make(name, 5), torch.rand(3, *IMAGE)
    for method, sides in (("crown", "both"), ("fast-lin", "both"), ("crown", "upper"), ("crown-ibp", "lower")):
        compare(net, x, math.inf, 0.03, (0, 1), method, sides)
    compare(net, x, 2.0, 0.2, None, "crown", "both")
    compare(net, x, 1.0, 0.3, None, "fast-lin", "both")
    compare(net, x, math.inf, torch.rand(3, *IMAGE) * 0.05, None, "crown", "lower")
    assert counted.units > 0
    chains = ("image", "kernels", "pooled", "grouped image", "depthwise", "dilated")
    assert counted.images > 0 or name in chains  # have kernels of their own, or start in an image


def in_float64(engine: Engine, net: nn.Module, start: int, example: Tensor, neuron: Tensor, sides: int) -> Any:
    """``bound_rows`` and the linear map at the input layer by layer, with the very same lines: which input a pooling
    follows where they tie is not the matter."""
    lines = {i: Lines(t.slopes.double(), t.intercepts.double(), t.folded, t.source) for i, t in engine.lines.items()}
    r, shape = engine.region, engine.graph.nodes[start].shape
    try:
        net.double()
        region = Region(r.x.double(), r.eps, r.norm, r.clip)
        back = Backward(engine.graph, region, lines, engine.boxes, {}, {}, 1 << 30, True)
        inner = neuron % math.prod(shape[1:])
        where = (inner // shape[2], inner % shape[2]) if len(shape) == 3 else None
        chunk = Chunk(example, torch.zeros(sides, len(example), dtype=torch.float64), where)
        return back.run(start, Rows(None, plus=neuron), chunk)
    finally:
        net.float()


def close(got: Tensor, want: Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() <= 3e-5 * (1 + want.abs().max()))


def lined(net: nn.Module, x: Tensor, p: float, eps: Any, clip: Any, method: str) -> Engine:
    graph = trace(net, x).graph
    engine = Engine(graph, Region(x, eps, p, clip), method, 1 << 30, False, False, False, False, "unstable")
    engine.forward(graph.output)
    return engine


@pytest.mark.parametrize("name", list(NETS))
def test_unit_vectors_of_every_image_with_the_same_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_MAP_BYTES", 1 << 15)  # several pieces
    net = make(name, 2)
    for p, eps, clip, batch, method in (
        (math.inf, 0.05, None, 3, "crown"),
        (2.0, 0.3, None, 1, "fast-lin"),
        (2.0, 0.4, (0, 1), 2, "crown"),
        (1.0, 0.5, None, 7, "crown"),
    ):
        x = torch.rand(batch, *IMAGE)
        with torch.no_grad():
            engine = lined(net, x, p, eps, clip, method)
            nodes = engine.graph.nodes
            for node in nodes[1:]:
                if len(node.shape) != 3:
                    continue
                key = torch.randperm(batch * node.size)[:90].sort()[0]
                example, neuron = key // node.size, key % node.size
                for sides in (1, 2):
                    where = (engine.graph, engine.region, engine.lines, node.index, example, neuron, sides)
                    got = concretize_units(*where, 1 << 30)
                    want, (A, b) = in_float64(engine, net, node.index, example, neuron, sides)
                    if any(
                        isinstance(n, G.Monotone) for n in nodes[: node.index + 1]
                    ):  # averages that are no convolution
                        assert got is None
                        continue
                    assert clip is not None if got is None else close(got[0], want), (node, p, sides)
                    out, kept = concretize_units(*where, 1 << 30, True) or (want, None)
                    assert kept is not None and close(out, want) and close(kept[1], b), (node, p, sides)
                    assert close(kept[0].expand(len(A), -1, -1, -1, -1), A), (node, p, sides)


@pytest.mark.parametrize("name", ["after", "tanh", "pool", "image"])
@pytest.mark.parametrize("sides", ["both", "lower", "upper"])
def test_linear_maps_at_the_input_come_from_the_kernel(name: str, sides: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, kernel = [], ops.graph_maps

    def run(*args: Any) -> Any:
        calls.append(args)
        return kernel(*args)

    monkeypatch.setattr(stages.ops, "graph_maps", run)
    net, x = make(name, 7), torch.rand(3, *IMAGE)
    given: dict[str, Any] = {"method": "crown", "sides": sides, "return_linear": True}
    if name != "image":
        given["labels"] = torch.tensor([2, 0, 1])
    for p, eps, clip in ((math.inf, 0.04, None), (2.0, 0.3, (0, 1)), (3.0, 0.2, None)):
        with torch.no_grad():
            got = compute_bounds(net, x, eps, norm=p, clip=clip, **given)
            want = compute_bounds(net.double(), x.double(), eps, norm=p, clip=clip, **given)
            net.float()
        assert got.linear is not None and want.linear is not None
        for key in ("lower_A", "lower_b", "upper_A", "upper_b"):
            a, b = getattr(got.linear, key), getattr(want.linear, key)
            assert (a is None) == (b is None) and (a is None or close(a, b)), (key, p)
        for a, b in ((got.lower, want.lower), (got.upper, want.upper)):
            assert a is None or close(a, b), p
    assert calls


@pytest.mark.parametrize("name", ["after", "before"])
@pytest.mark.parametrize("batch", [0, 1, 7, 16])
def test_any_batch(name: str, batch: int) -> None:
    net, x = make(name, batch), torch.rand(batch, *IMAGE)
    for p, eps, method in ((math.inf, 0.03, "crown"), (2.0, 0.2, "fast-lin"), (1.0, 0.3, "crown")):
        compare(net, x, p, eps, None, method, "both")


@settings(max_examples=15)
@given(
    st.sampled_from(STEADY), st.sampled_from(["crown", "fast-lin"]), st.sampled_from([math.inf, 2.0]),
    st.sampled_from([0.0, 0.01, 0.1, 1.0]), st.sampled_from(["unstable", "all"]), st.integers(0, 999),
)  # fmt: skip
def test_any_seed_and_radius(name: str, method: str, p: float, eps: float, refine: str, seed: int) -> None:
    net, x = make(name, seed), torch.rand(2, *IMAGE)
    with torch.no_grad():
        got = compute_bounds(net, x, eps, norm=p, method=method, refine=refine)
        want = compute_bounds(net.double(), x.double(), eps, norm=p, method=method, refine=refine)
    assert got.upper is not None and want.upper is not None
    for a, b in ((got.lower, want.lower), (got.upper, want.upper)):
        assert (a - b).abs().max() <= 1e-4 * (1 + b.abs().max())


def test_any_order_of_unit_vectors_and_one_side() -> None:
    """Channels of one position that are not ascending, examples that are not, rows that come twice over both sides."""
    torch.manual_seed(0)
    w, v = torch.randn(21, 4, 3, 3), torch.randn(4, 2, 2, 2)
    image, middle, first = (21, 3, 3), (4, 5, 5), (2, 6, 6)
    lines = (torch.rand(2, 3, 100) * (torch.rand(2, 3, 100) > 0.5), torch.randn(2, 3, 100))
    link = ops.GraphLink
    plan = [
        ops.GraphStage(middle, [link(-1, w, (2, 2), (1, 1))], lines[0], lines[1]),
        ops.GraphStage(first, [link(0, v)]),
    ]
    box = (torch.randn(3, 72), torch.rand(3, 72))
    count = 150
    example, neuron = torch.randint(3, (3 * 189,)), torch.arange(189).repeat(3)
    keep = torch.randperm(3 * 189)[:count]
    key = torch.unique(example[keep] * 189 + neuron[keep])
    key = key[torch.randperm(len(key))]
    example, neuron = key // 189, key % 189
    for sides in (1, 2):
        b = torch.randn(sides, len(key))
        got = ops.concretize_graph(b, example, 3, plan, box, None, 1.0, (neuron, image))
        one = torch.zeros(len(key), 189).scatter_(1, neuron[:, None], 1.0).view(-1, *image).double()
        a = nn.functional.conv_transpose2d(one, w.double(), None, 2, 1)
        a = a.movedim(1, -1).reshape(1, len(key), -1)
        from fastrobust.reference import bounds as reference

        A, c = reference.linear_back_step(a, b.double(), lines[0].double(), lines[1].double(), example)
        A = nn.functional.conv_transpose2d(A.reshape(-1, 5, 5, 4).movedim(-1, 1), v.double())
        A = A.movedim(1, -1).reshape(sides, len(key), -1)
        want = reference.concretize_rows(A, c, example, (box[0].double(), box[1].double()), None, 1.0)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_a_small_cap_on_memory_takes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    net, x = make("after", 0), torch.rand(2, *IMAGE)
    with torch.no_grad():
        small = compute_bounds(net, x, 0.03, method="crown", max_memory=1 << 16)
        assert counted.units == counted.images == 0
        whole = compute_bounds(net, x, 0.03, method="crown")
    assert counted.units > 0
    torch.testing.assert_close(small.lower, whole.lower, rtol=1e-4, atol=1e-5)


def test_weights_that_are_no_numbers_are_refused() -> None:
    net, x = make("after", 0), torch.rand(1, *IMAGE)
    net[2].two.weight.data[0, 0, 1, 1] = math.nan  # type: ignore[index,union-attr]
    with torch.no_grad(), pytest.raises(ValueError, match="two.weight"):
        compute_bounds(net, x, 0.03, method="crown")


def test_neither_threads_nor_the_rest_of_the_batch_change_a_bit() -> None:
    net, x = make("after", 3), torch.rand(5, *IMAGE)
    threads = torch.get_num_threads()
    try:
        with torch.no_grad():
            torch.set_num_threads(2)
            whole = compute_bounds(net, x, 0.05, method="crown")
            torch.set_num_threads(1)
            alone = compute_bounds(net, x, 0.05, method="crown")
    finally:
        torch.set_num_threads(threads)
    assert whole.upper is not None and alone.upper is not None
    assert torch.equal(whole.lower, alone.lower) and torch.equal(whole.upper, alone.upper)


SCRIPT = """
import torch
import fastrobust as fr
from bounds.test_live_graph import IMAGE, make
from fastrobust.bounds import compute_bounds
for name in ("after", "before", "forks", "wide", "depthwise", "dilated", "pool"):
    net, x = make(name, 1), torch.rand(3, *IMAGE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for method in ("crown", "fast-lin"):
            got = compute_bounds(net.float(), x, 0.03, method=method)
            want = compute_bounds(net.double(), x.double(), 0.03, method=method)
            print(float((got.lower - want.lower).abs().max() / want.lower.abs().max()))
            print(float((got.upper - want.upper).abs().max() / want.upper.abs().max()))
"""


def test_every_cpu_variant() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    found = outputs_by_variant(SCRIPT, PYTHONPATH=path)
    for variant, words in found.items():
        assert len(words) == 28 and max(map(float, words)) <= 5e-5, variant
