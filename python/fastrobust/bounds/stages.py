"""Graphs of activations, poolings and convolutions that one kernel takes rows of linear bounds through, down to the
input.

A stage is an activation or a max pooling with its lines, or a linear node that more than one node reads, that a pooling
reads, or whose bias no activation took over: it has lines, too, of slope 1. Between stages there are convolutions and
sums; a pooling hands its coefficients to the neurons that it follows.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.decisions import allowed, declined
from fastrobust.bounds.region import Region
from fastrobust.ops import bounds as ops

Image = tuple[int, int, int]
Link = tuple[int, Any, int]  # the node that is read, the convolution or pooling between or None, the sign
Entry = tuple[Tensor, Tensor | None, Tensor | None]  # rows that start at a stage, ``pick`` and ``minus``
Linear = tuple[Tensor, Tensor]  # A (1 or 2, R, *shape) and b (sides, R) at the input
Shares = list[tuple[int, int, Any]]  # (node, sign, bias) of the linear nodes on the way


_MAP_BYTES = 32 << 20  # of linear maps at the input that are held at once


class _Other(Exception):
    """Something else is on the way."""


class Plan:
    """The stages below ``tops`` in the order in which rows reach them."""

    def __init__(self, graph: G.Graph, lines: dict[int, Any], tops: list[int], start: int | None):
        self.graph, self.lines, self.start = graph, lines, start
        self.shares: Shares = []  # biases between the start and the first stages
        self.links: dict[int, list[Link]] = {}  # by stage
        self.virtual: dict[
            int, tuple[Any, Any, Shares]
        ] = {}  # factor, shift and biases of the linear nodes that are stages
        left = list(tops)
        self.first: list[Link] = []
        if start is not None:
            node = graph.nodes[start]
            if isinstance(node, (G.Conv, G.Sum)):
                self.first = self._expand(start, 1, self.shares, True)
            else:
                self.first = [(start, None, 1)]
            left += [i for i, _, _ in self.first]
        while left:
            i = left.pop()
            if i in self.links:
                continue
            self.links[i] = self._read(i)
            left += [j for j, _, _ in self.links[i]]
        if 0 not in self.links:
            raise _Other
        self.order = sorted(self.links, reverse=True)

    def _read(self, i: int) -> list[Link]:
        """What the stage ``i`` reads."""
        node = self.graph.nodes[i]
        shares: Shares = []
        if len(node.shape) != 3:
            raise _Other
        if isinstance(node, G.Input):
            return []
        if isinstance(node, G.MaxPool):
            if i not in self.lines or self.lines[i].source is None:
                raise _Other
            return [(node.inputs[0], node, 1)]
        if isinstance(node, G.Activation):
            line = self.lines.get(i)
            if line is None:
                raise _Other
            found = self._expand(node.inputs[0], 1, shares, False)
            if set(line.folded) == {j for j, _, b in shares if b is not None}:
                return found
            if line.folded:
                raise _Other
            return [(node.inputs[0], None, 1)]
        if isinstance(node, G.Scale):
            found = self._expand(node.inputs[0], 1, shares, False)
            self.virtual[i] = (node.get_factor(), node.get_shift(), shares)
        else:
            found = self._expand(i, 1, shares, True)
            self.virtual[i] = (None, None, shares)
        return found

    def _expand(self, i: int, sign: int, shares: Shares, top: bool) -> list[Link]:
        """The value of a node as a sum over stages."""
        node = self.graph.nodes[i]
        if isinstance(node, (G.Activation, G.MaxPool, G.Input, G.Scale)) or (not top and len(node.consumers) > 1):
            return [(i, None, sign)]
        if isinstance(node, G.Conv):
            shares.append((i, sign, node.bias()))
            return [(node.inputs[0], node, sign)]
        if isinstance(node, G.Sum):
            found: list[Link] = []
            for j, s in zip(node.inputs, node.signs, strict=True):
                found += self._expand(j, sign * s, shares, False)
            return found
        raise _Other

    def neurons(self) -> int:
        return sum(self.graph.nodes[i].size for i in self.order)

    def stages(self, rows: dict[int, Any]) -> list[ops.GraphStage]:
        at = {i: k for k, i in enumerate(self.order)}
        links: list[list[ops.GraphLink]] = [[] for _ in self.order]

        def connect(source: int, found: list[Link]) -> None:
            for j, node, sign in found:
                link = ops.GraphLink(source, None, sign=sign)
                if isinstance(node, G.MaxPool):
                    follows = self.lines[node.index].followed()
                    link = ops.GraphLink(
                        source, None, node.stride, node.padding, 1, node.dilation, follows=follows, kernel=node.kernel
                    )
                elif node is not None:
                    conv = (node.get_weight(), node.stride, node.padding, sign, node.dilation, node.groups)
                    link = ops.GraphLink(source, *conv)
                links[at[j]].append(link)

        connect(-1, self.first)
        for i in self.order:
            connect(at[i], self.links[i])
        out = []
        for k, i in enumerate(self.order):
            links[k].sort(
                key=lambda link: link.weight is None or link.source < 0
            )  # the first convolution sets what others add to
            shape, lines = cast(Image, self.graph.nodes[i].shape), self._lines(i)
            out.append(ops.GraphStage(shape, links[k], *lines, rows.get(i)))
        return out

    def _lines(self, i: int) -> tuple[Tensor | None, Tensor | None]:
        if i == 0:
            return None, None
        if i not in self.virtual:
            return cast(tuple[Tensor, Tensor], self.lines[i].flattened(True))
        factor, shift, shares = self.virtual[i]
        shape = self.graph.nodes[i].shape

        def spread(t: Any) -> Tensor:
            out: Tensor = t.float().expand(1, *shape).movedim(1, -1).reshape(1, 1, -1)
            return out

        slopes = spread(torch.ones((), device="cpu")) if factor is None else spread(factor)
        offset = torch.zeros_like(slopes)
        for _, sign, bias in shares:
            if bias is not None:
                offset = offset + sign * spread(bias)
        offset = slopes * offset if factor is not None else offset
        if shift is not None:
            offset = offset + spread(shift)
        return slopes, offset.expand(2, 1, -1).contiguous()


def _plan(graph: G.Graph, lines: dict[int, Any], tops: list[int], start: int | None) -> Plan | None:
    way, at = ("image kernel", tops[0]) if start is None else ("neuron kernel", start)
    if not allowed(way):
        return None
    try:
        return Plan(graph, lines, tops, start)
    except _Other as other:
        return declined(way, str(other) or "a node on the way is no stage or link of the kernel", at)


def _runs(region: Region, stages: list[ops.GraphStage], *tensors: Tensor) -> bool:
    ends = [t for p in region.flattened(True) if p is not None for t in p]
    used = [t for s in stages for t in (s.slopes, s.intercepts, *(k.weight for k in s.links))]
    return ops.direct(*tensors, *ends, *used)


def concretize_units(
    graph: G.Graph,
    region: Region,
    lines: dict[int, Any],
    start: int,
    example: Tensor,
    neuron: Tensor,
    sides: int,
    max_memory: int,
    keep: bool = False,
) -> tuple[Tensor, Linear | None] | None:
    """Bounds (sides, R) of neurons of the image ``start``, and with ``keep`` their linear map at the input; None where
    this is not the way."""
    x, node = region.x, graph.nodes[start]
    if not x.is_cpu or x.dtype != torch.float32 or len(node.shape) != 3 or not len(example):
        return None
    plan = _plan(graph, lines, [], start)
    if plan is None or not _fits(plan, max_memory):
        return None
    stages = plan.stages({})
    if not _runs(region, stages):
        return None
    b = torch.zeros(sides, len(example), dtype=x.dtype, device=x.device)
    for _, sign, bias in plan.shares:
        if bias is not None:
            b = b + sign * bias.expand(node.shape).reshape(-1)[neuron]
    return _ends(region, stages, b, example, (neuron, node.shape), max_memory, keep)


def _fits(plan: Plan, max_memory: int) -> bool:
    """Whether the kernel's workspace of each thread does."""
    return torch.get_num_threads() * 4 * (ops.MOST_ROWS + 12) * plan.neurons() <= max_memory


def takes_images(graph: G.Graph, lines: dict[int, Any], top: int, max_memory: int) -> bool:
    """Whether ``concretize_images`` is the way for rows at ``top``, where nothing is recorded."""
    plan = _plan(graph, lines, [top], None)
    return plan is not None and _fits(plan, max_memory)


def concretize_images(
    graph: G.Graph,
    region: Region,
    lines: dict[int, Any],
    rows: dict[int, Entry],
    b: Tensor,
    example: Tensor,
    max_memory: int,
    keep: bool = False,
) -> tuple[Tensor, Linear | None] | None:
    """Bounds of rows (A (k, ., map) in channels-last order, pick, minus) of whole images at nodes, and with ``keep``
    their linear map at the input; None where this is not the way."""
    if not b.is_cpu or b.dtype != torch.float32 or not len(example):
        return None
    plan = _plan(graph, lines, list(rows), None)
    if plan is None or not _fits(plan, max_memory):
        return None
    stages = plan.stages(rows)
    if not _runs(region, stages, b, *(r[0] for r in rows.values())):
        return None
    return _ends(region, stages, b, example, None, max_memory, keep)


def _ends(
    region: Region,
    stages: list[ops.GraphStage],
    b: Tensor,
    example: Tensor,
    unit: ops.Unit | None,
    max_memory: int,
    keep: bool,
) -> tuple[Tensor, Linear | None]:
    """The extremes, and with ``keep`` the linear map at the input."""
    box, ball = region.flattened(True)
    count, shape = len(region.x), stages[-1].shape
    if not keep and region.has_kernel and (box is None or ball is None):
        return ops.concretize_graph(b, example, count, stages, box, ball, region.q, unit), None
    bounds, maps, offsets = [], [], []
    first, numbers = 0, math.prod(shape)
    while first < len(example):
        step = max(1, min(max_memory // 2, _MAP_BYTES) // (4 * len(b) * numbers))
        at = slice(first, min(len(example), first + step))
        some, who = [s._replace(rows=_some(s.rows, at)) for s in stages], example[at]
        own = None if unit is None else (unit[0][at], unit[1])
        A, offset, corner, window = ops.graph_maps(b[:, at], who, count, some, own, not keep and unit is not None)
        bounds.append(ops.concretize_rows(A, offset, who, box, ball, region.q, None, corner, window))
        first, numbers = at.stop, A.shape[2]  # of a window less than of the image
        if keep:
            maps.append(A.unflatten(2, (*shape[1:], shape[0])).movedim(-1, 2))
            offsets.append(offset)
    return torch.cat(bounds, 1), (torch.cat(maps, 1), torch.cat(offsets, 1)) if keep else None


def _some(rows: Entry | None, at: slice) -> Entry | None:
    if rows is None:
        return None
    A, pick, minus = rows
    return (A[:, at], None, None) if pick is None else (A, pick[at], None if minus is None else minus[at])
