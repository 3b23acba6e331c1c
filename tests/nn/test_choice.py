"""The paths of the nodes of a region are the cheapest ones together, and its groups are the batch in order."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from fastrobust.nn._choice import Chooser, Part
from fastrobust.nn._nodes import Node, Size
from fastrobust.ops.binary import _conv_cost as cost


@dataclasses.dataclass(eq=False)
class Priced(Node):
    """A node of given prices that reads `values`."""

    values: tuple[int, ...] = ()
    sparse: float = 0.0
    dense: float = 0.0

    @property
    def reads(self) -> tuple[int, ...]:
        return self.values

    def cost(self, count: int, sizes: dict[int, Size], out: Size, lanes: int) -> cost.Choice:
        return cost.Choice("sparse", lanes, count * self.sparse, count * self.dense)


def graph(seed: int, count: int) -> tuple[list[Priced], int, list[int], dict[int, Size]]:
    """Nodes, inputs, outputs and sizes by lot; prices of copies and of nodes are of one size."""
    draw = random.Random(seed)
    inputs = draw.randint(1, 2)
    nodes = []
    for i in range(count):
        values = tuple(draw.randint(-inputs, i - 1) for _ in range(draw.choice((1, 1, 2, 3))))
        sparse = math.inf if draw.random() < 0.15 else draw.uniform(0, 8)
        nodes.append(Priced(f"node {i}", values[0], values, sparse, draw.uniform(0, 8)))
    outputs = sorted({count - 1, *(i for i in range(count) if draw.random() < 0.15)})
    sizes = {v: (draw.randint(1, 4), draw.randint(1, 40), draw.randint(1, 40)) for v in range(-inputs, count)}
    return nodes, inputs, outputs, sizes


def price(
    nodes: list[Priced], outputs: list[int], sizes: dict[int, Size], part: Part, dense: tuple[bool, ...]
) -> float:
    """By the words of the documentation: nodes, and a copy there and one back (of the gradient) of every value that is
    read in the other form than it was made in. Inputs and outputs are plain."""
    total = sum(part.count * (n.dense if d else n.sparse) for n, d in zip(nodes, dense, strict=True))
    for v, size in sizes.items():
        made = v < 0 or dense[v]
        read = {dense[i] for i, n in enumerate(nodes) if v in n.reads} | ({True} if v in outputs else set())
        if read - {made}:
            total += 2 * cost.copy(part.count * math.prod(size))
    return total


@pytest.mark.parametrize("seed", range(60))
def test_the_cut_is_the_cheapest_of_all_choices(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTROBUST_BINARY", raising=False)
    nodes, inputs, outputs, sizes = graph(seed, 2 + seed % 7)
    chooser = Chooser(nodes, inputs, outputs, sizes)
    for count, lanes in ((1, 1), (3, 4), (16, 16)):
        part = chooser._cut(count, lanes)
        dense = tuple(c.path == "dense" for c in part.choices)
        best = min(price(nodes, outputs, sizes, part, d) for d in itertools.product((False, True), repeat=len(nodes)))
        assert price(nodes, outputs, sizes, part, dense) == pytest.approx(best)
        assert part.time == pytest.approx(best + cost.GROUP)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("forced", [None, "dense", "sparse"])
def test_groups_are_the_batch(seed: int, forced: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", forced or "auto")
    nodes, inputs, outputs, sizes = graph(seed, 5)
    large = {v: (c, 8 * h, 8 * w) for v, (c, h, w) in sizes.items()} if seed % 2 else sizes
    chooser = Chooser(nodes, inputs, outputs, large)
    for batch in (1, 2, 3, 7, 8, 16, 17, 33, 100, 1000):
        parts = chooser.parts(batch)
        assert sum(p.count for p in parts) == batch and all(p.count > 0 for p in parts)
        assert all(len(p.choices) == len(nodes) for p in parts)
        for part in parts:
            for node, choice in zip(nodes, part.choices, strict=True):
                assert choice.path == "dense" or not math.isinf(node.sparse)
                if forced is not None:
                    assert choice.path == ("dense" if math.isinf(node.sparse) else forced)
        # Nothing in one group by torch alone is estimated to be faster.
        torchs = sum(batch * n.dense for n in nodes)
        assert sum(p.time for p in parts) <= torchs + 1e-6 * torchs or forced == "sparse"
