"""Margins of ReLU networks that are any acyclic graph, over boxes: one op in place of the engine's walk."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.margins import flat
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds.margins import Image, Rows
from fastrobust.ops.bounds.stages import Heads, Link, Parameters, Stage, stage_margins

_KINDS = {"crown-ibp": "crown", "ibp-linear": "parallel", "ibp": None}


class _Other(Exception):
    """Something else is on the way."""


class Plan:
    """The stages of a graph, the nodes whose parameters they take, and the linear nodes above them, which rows pass first."""

    def __init__(self, graph: G.Graph):
        self.graph = graph
        output = graph.nodes[graph.output]
        if len(output.shape) != 1 or not graph.nodes[0].size:
            raise _Other
        self.top, below = _above(graph)
        if not self.top:
            raise _Other
        self.weights: list[Any] = []
        self.biases: list[Any] = []
        self.scales: list[tuple[Any, str]] = []
        wanted = list(below)
        found: dict[int, tuple[Stage, list[tuple[int, Link]]]] = {0: (Stage(_image(graph.nodes[0].shape), "input"), [])}
        while wanted:
            i = wanted.pop()
            if i in found:
                continue
            stage, read = self._stage(i)
            found[i] = stage, read
            wanted += [j for j, _ in read]
        order = sorted(found)
        number = {i: k for k, i in enumerate(order)}
        self.stages = [
            found[i][0]._replace(links=tuple(link._replace(source=number[j]) for j, link in found[i][1])) for i in order
        ]
        self.heads = [(i, number[i]) for i in sorted(below)]
        if len(self.stages) == 1:
            raise _Other
        self.numbers = sum(s.size for s in self.stages)

    def _stage(self, i: int) -> tuple[Stage, list[tuple[int, Link]]]:
        """The stage at node ``i``, with the nodes that it reads."""
        node = self.graph.nodes[i]
        shape, read = _image(node.shape), cast("list[tuple[int, Link]]", [])
        biases: list[tuple[int, int]] = []
        factor = shift = None
        if isinstance(node, G.Activation) and node.activation == "relu":
            kind = "relu"
            self._expand(node.inputs[0], 1, False, read, biases)
        elif isinstance(node, G.Scale):
            kind = "scale"
            self._expand(node.inputs[0], 1, False, read, biases)
            factor, shift = self._scale(node, "factor"), self._scale(node, "shift")
        elif isinstance(node, (G.Conv, G.Dense, G.Sum)):
            kind = "linear"
            self._expand(i, 1, True, read, biases)
        else:
            raise _Other
        read.sort(key=lambda r: r[1].at is None)  # products make what others add to
        return Stage(shape, kind, (), tuple(biases), factor, shift), read

    def _expand(
        self, i: int, sign: int, own: bool, read: list[tuple[int, Link]], biases: list[tuple[int, int]]
    ) -> None:
        """The value of a node as a sum over stages. own: the node is the stage itself."""
        node = self.graph.nodes[i]
        shared = len(node.consumers) > 1 and not own
        if shared or isinstance(node, (G.Activation, G.Input, G.Scale)):
            read.append((i, Link(i, sign=sign)))
        elif isinstance(node, G.Sum):
            for j, s in zip(node.inputs, node.signs, strict=True):
                self._expand(j, sign * s, False, read, biases)
        elif isinstance(node, G.Conv) and node.groups == 1 and node.dilation == (1, 1):
            if not ops.spread_lanes(node.get_weight(), node.shape[2]):
                raise _Other
            link = Link(0, len(self.weights), False, node.stride, node.padding, sign)
            self._product(node, sign, biases)
            read.append((node.inputs[0], link))
        elif isinstance(node, G.Dense) and len(node.shape) == 1:
            before = self.graph.nodes[node.inputs[0]]
            if isinstance(before, G.Reshape):
                before = self.graph.nodes[before.inputs[0]]
            link = Link(0, len(self.weights), True, sign=sign)
            _image(before.shape)
            self._product(node, sign, biases)
            read.append((before.index, link))
        else:
            raise _Other

    def _product(self, node: Any, sign: int, biases: list[tuple[int, int]]) -> None:
        self.weights.append(node)
        if node.get_bias() is not None:
            biases.append((len(self.biases), sign))
            self.biases.append(node)

    def _scale(self, node: G.Scale, which: str) -> int | None:
        get = node.get_factor if which == "factor" else node.get_shift
        t = get()
        if t is None:
            return None
        channels = len(node.shape) == 3 and t.dim() >= 3 and t.shape[-3] == t.numel()
        if t.numel() != 1 and not channels and not (len(node.shape) == 1 and t.shape[-1] == t.numel()):
            raise _Other
        self.scales.append((get, which))
        return len(self.scales) - 1

    def parameters(self) -> Parameters | None:
        """What the stages take, as it is now; None where the kernels do not serve it."""
        weights = [node.get_weight() for node in self.weights]
        biases = [node.get_bias() for node in self.biases]
        scales = [get().reshape(-1).to(weights[0] if weights else torch.float32) for get, _ in self.scales]
        served = all(t is not None and t.is_cpu and ops.native(t) for t in (*weights, *biases, *scales))
        return Parameters(weights, biases, scales) if served else None

    def matrices(self) -> Heads:
        """The outputs as linear functions of the stages below them, through torch."""
        graph = self.graph
        output = graph.nodes[graph.output]
        pending: dict[int, Any] = {graph.output: None}
        offset: Any = None
        for i in self.top:
            node, A = cast(G.LinearNode, graph.nodes[i]), pending.pop(i)
            bias = node.bias()
            if isinstance(node, G.Dense) and A is None:
                terms, new = bias, [node.get_weight()]
            else:
                like = next(t for t in (bias, A, torch.empty(0)) if t is not None)
                A = torch.eye(output.size, dtype=torch.float32, device=like.device) if A is None else A
                terms = None if bias is None else (A * bias.to(A).expand(node.shape)).flatten(1).sum(1)
                new = node.transpose(A.unflatten(1, node.shape) if A.dim() == 2 else A, graph.input_shapes(node))
            if terms is not None:
                offset = terms if offset is None else offset + terms
            for j, t in zip(node.inputs, new, strict=True):
                pending[j] = pending[j] + t if j in pending else t
        found = []
        for i, _ in self.heads:
            t = pending[i]
            found.append((t.movedim(1, -1) if t.dim() == 4 else t).reshape(output.size, -1))
        offset = found[0].new_zeros(output.size) if offset is None else offset
        return Heads([k for _, k in self.heads], found, offset)


def _image(shape: tuple[int, ...]) -> Image:
    if len(shape) not in (1, 3):
        raise _Other
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)


def _above(graph: G.Graph) -> tuple[list[int], set[int]]:
    """The linear nodes that the output is made of, from the last on, and the nodes below them."""
    top, below, left = set(), set(), [graph.output]
    while left:
        i = left.pop()
        if not isinstance(graph.nodes[i], G.LinearNode):
            below.add(i)
        elif i not in top:
            top.add(i)
            left += graph.nodes[i].inputs
    return sorted(top, reverse=True), below


def plan_of(graph: G.Graph) -> Plan | None:
    if graph.staged is False:
        try:
            graph.staged = Plan(graph)
        except _Other:
            graph.staged = None
    return cast("Plan | None", graph.staged)


def margins_of_stages(
    graph: G.Graph, x: Tensor, eps: Any, clip: ops.Clip, method: str, rows: Rows, max_memory: int
) -> Tensor | None:  # fmt: skip
    """Bounds (sides, R) over an l-infinity ball (and ``clip``); None where this is not the way. x (B, *shape)."""
    if method not in _KINDS or not x.is_cpu or not ops.native(x) or not x.shape[0] or not ops.direct():
        return None
    plan = plan_of(graph)
    if plan is None:
        return None
    kind = _KINDS[method]
    numbers = len(rows.plus) * rows.sides if kind is not None else 0
    if 4 * 4 * plan.numbers * (numbers + 8 * len(x)) > max_memory:
        return None
    given = plan.parameters()
    if given is None:
        return None
    shape = plan.stages[0].shape
    shared = clip is None and not isinstance(eps, Tensor) and not ops.needs_grad(x)
    if shared:
        c = flat(x, shape)
        r = c.new_full(c.shape, eps)
    else:
        c, r = (flat(t, shape) for t in ops.box_center(x, eps.to(x.dtype) if isinstance(eps, Tensor) else eps, clip))
    return stage_margins(plan.stages, given, plan.matrices(), c, r, shared, rows, kind)
