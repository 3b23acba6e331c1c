"""fr.bounds.explain: which way the bounds of a model take, node by node, and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.api import compute_bounds
from fastrobust.bounds.decisions import WAYS, Decision, recorded
from fastrobust.bounds.trace import trace


@dataclass(frozen=True)
class Step:
    """A node of the graph that bounds are computed of. rows: the ways that rows of its own bounds took, in order;
    without (a stage of an op, intervals) empty."""

    number: int
    kind: str
    where: str
    shape: tuple[int, ...]
    inputs: tuple[int, ...]
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Explanation:
    """way: what gave the bounds, of ``fr.bounds.WAYS``. declined: (way, reason) of those that were asked before it, and
    of those that rows declined. ``str()`` gives a table."""

    method: str
    way: str
    declined: tuple[tuple[str, str], ...]
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.way} ({WAYS[self.way]})"]
        lines += [f"  not {way}: {why}" for way, why in self.declined]
        by_node = self.way == "walk"
        header = ["node", "kind", "shape", "reads", "where", *(["its rows"] if by_node else [])]
        cells = []
        for step in self.steps:
            reads = ", ".join(map(str, step.inputs))
            line = [str(step.number), step.kind, "x".join(map(str, step.shape)), reads, step.where]
            cells.append([*line, *(["; ".join(step.rows) or "interval"] if by_node else [])])
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        for line in [header, *cells]:
            lines.append("  " + "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
        return "\n".join(lines)


def explain(model: Any, x: Tensor, eps: Any = 0.01, *, method: str = "crown-ibp", **options: Any) -> Explanation:
    """Which way ``compute_bounds(model, x, eps, method=method, **options)`` takes here, and what ended each faster one.

    The bounds are computed once, with every decision written down where it is made: ways depend on shapes, device,
    dtype, what is recorded for gradients, and, where living neurons count, on the values of x and eps. Options and
    errors are those of :func:`fastrobust.bounds.compute_bounds`. To forbid a way, see :func:`fastrobust.bounds.ways`.
    """
    with recorded() as log:
        compute_bounds(model, x, eps, method=method, **options)
    with torch.no_grad():
        graph = trace(model, x, options.get("rounding") == "outward").graph
    return Explanation(method.lower(), _way(log), _declined(log), _steps(graph, log))


def _way(log: list[Decision]) -> str:
    """The last way that was taken for the whole call."""
    return [d.way for d in log if d.taken and d.node is None][-1]


def _declined(log: list[Decision]) -> tuple[tuple[str, str], ...]:
    """Each reason once, in order."""
    taken = {d.way for d in log if d.taken and d.node is None}
    found = {(d.way, d.why): None for d in log if not d.taken and not (d.node is None and d.way in taken)}
    return tuple(found)


def _steps(graph: G.Graph, log: list[Decision]) -> tuple[Step, ...]:
    ways: dict[int, dict[str, None]] = {}
    start: int | None = None
    for decision in log:
        if decision.way == "rows":
            start = decision.node
        elif decision.taken and decision.node is not None and start is not None:
            name = decision.way if decision.node == start else f"{decision.way} from {decision.node}"
            ways.setdefault(start, {})[name] = None
    found = []
    for node in graph.nodes:
        kind = node.activation if isinstance(node, G.Activation) else type(node).__name__.lower()
        rows = tuple(ways.get(node.index, ()))
        found.append(Step(node.index, kind, node.where, tuple(node.shape), tuple(node.inputs), rows))
    return tuple(found)
