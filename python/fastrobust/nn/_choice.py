"""Which nodes of a region run in the fast layout and which by torch, and in what groups of images.

A value is copied once where it is read in the other form than it was made in, so the cheapest choice for all nodes
together is a minimum cut. Groups are found by trying the lanes that serve a number of images, the rest after them
alike.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from ..ops.binary import _conv_cost as cost
from ._nodes import Node, Size

# Floats of the largest feature map of a group of images.
GROUP_FLOATS = 5 << 18


@dataclasses.dataclass(frozen=True)
class Part:
    """A group of images: how many, the lanes that they are laid out in, and the path of every node."""

    count: int
    lanes: int
    choices: tuple[cost.Choice, ...]
    time: float


class Chooser:
    """Choices for one region on one size of input."""

    def __init__(self, nodes: Sequence[Node], inputs: int, outputs: Sequence[int], sizes: dict[int, Size]) -> None:
        self.nodes, self.inputs, self.outputs, self.sizes = nodes, inputs, outputs, sizes
        self.largest = max(math.prod(s) for s in sizes.values())
        self.found: dict[tuple[int, int], Part] = {}
        self.plans: dict[int, tuple[float, tuple[Part, ...]]] = {0: (0.0, ())}

    def parts(self, batch: int) -> tuple[Part, ...]:
        """Groups for a batch, in order."""
        forced, whole = cost.forced_path(), self._torch(batch)
        if forced == "dense":
            return (whole,)
        time, plan = self._plan(batch)
        torch_alone = all(c.path == "dense" for p in plan for c in p.choices)
        return (whole,) if torch_alone or (forced is None and whole.time <= time) else plan

    def _plan(self, n: int) -> tuple[float, tuple[Part, ...]]:
        """Groups for n images in lanes, and their estimate."""
        if n in self.plans:
            return self.plans[n]
        best: tuple[float, tuple[Part, ...]] = (math.inf, ())
        for lanes in cost.LANES:
            if lanes > 1 and lanes * self.largest > 4 * GROUP_FLOATS:
                continue
            step = max(1, GROUP_FLOATS // (self.largest * lanes)) * lanes
            # All in one group with empty lanes at its end, or full lanes and the rest by itself.
            counts = {step} if n > step else {n, n - n % lanes} if lanes > 1 else {n}
            for count in counts:
                if count == 0 or 2 * count < lanes:
                    continue
                part, times = self._part(count, lanes), n // count
                time, rest = self._plan(n - times * count)
                time += times * part.time
                if time < best[0]:
                    best = time, (part,) * times + rest
        self.plans[n] = best
        return best

    def _part(self, count: int, lanes: int) -> Part:
        key = count, lanes
        if key not in self.found:
            self.found[key] = self._cut(count, lanes)
        return self.found[key]

    def _torch(self, batch: int) -> Part:
        """All by torch, in one group."""
        estimates = [self._estimate(node, i, batch, 1) for i, node in enumerate(self.nodes)]
        time = sum(e.dense for e in estimates)
        return Part(batch, 1, tuple(dataclasses.replace(e, path="dense") for e in estimates), time)

    def _estimate(self, node: Node, i: int, count: int, lanes: int) -> cost.Choice:
        return node.cost(count, self.sizes, self.sizes[i], lanes)

    def _cut(self, count: int, lanes: int) -> Part:
        estimates = [self._estimate(node, i, count, lanes) for i, node in enumerate(self.nodes)]
        forced = cost.forced_path()
        if forced is not None:  # one of the sparse ones
            paths = ["dense" if math.isinf(e.sparse) else "sparse" for e in estimates]
            time = sum(e.dense if p == "dense" else e.sparse for e, p in zip(estimates, paths, strict=True))
        else:
            paths, time = self._cheapest(estimates, count)
        chosen = tuple(dataclasses.replace(e, path=p) for e, p in zip(estimates, paths, strict=True))
        return Part(count, lanes, chosen, time + cost.GROUP)

    def _cheapest(self, estimates: list[cost.Choice], count: int) -> tuple[list[str], float]:
        import networkx as nx  # a fifth of a second, for those who freeze models alone

        graph = nx.DiGraph()
        fast, plain = "fast", "plain"
        join: Callable[[object, object, float], None] = lambda a, b, c: _joined(graph, a, b, c)
        for i, e in enumerate(estimates):
            join(fast, i, e.dense)  # cut when i is by torch
            join(i, plain, e.sparse)
        readers: dict[int, list[object]] = {}
        for i, node in enumerate(self.nodes):
            for v in node.reads:
                readers.setdefault(v, []).append(i)
        for v in self.outputs:
            readers.setdefault(v, []).append(plain)
        for v, by in readers.items():
            maker: object = plain if v < 0 else v
            price = 2 * cost.copy(count * math.prod(self.sizes[v]))
            # One copy however many read it: a point that is on the readers' side as soon as one of them is.
            join(maker, ("out", v), price)
            join(("in", v), maker, price)
            for reader in by:
                join(("out", v), reader, math.inf)
                join(reader, ("in", v), math.inf)
        time, (side, _) = nx.minimum_cut(graph, fast, plain)
        return ["sparse" if i in side else "dense" for i in range(len(estimates))], float(time)


def _joined(graph: Any, a: object, b: object, capacity: float) -> None:
    if a == b or a == "plain" or b == "fast":
        return
    if math.isinf(capacity):
        graph.add_edge(a, b)  # without a bound
    elif graph.has_edge(a, b):
        if "capacity" in graph[a][b]:
            graph[a][b]["capacity"] += capacity
    else:
        graph.add_edge(a, b, capacity=capacity)
