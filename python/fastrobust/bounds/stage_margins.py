"""Margins of networks that are any acyclic graph, over boxes: one op in place of the engine's walk."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.decisions import allowed, declined, took
from fastrobust.bounds.region import Region
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds._stage import Heads, Image, Link, Parameters, Rows, Stage, channels_first
from fastrobust.ops.bounds.stage_op import stage_margins

_KINDS = {"crown-ibp": "crown", "ibp-linear": "parallel", "ibp": None}


class _Other(Exception):
    """Something else is on the way."""


class Plan:
    """The stages of a graph, the nodes whose parameters they take, and the linear nodes above them, which rows pass
    first."""

    def __init__(self, graph: G.Graph, ball: bool = False):
        """ball: intervals of products of the input come from a ball, and such products are stages of their own."""
        self.graph, self.ball = graph, ball
        output = graph.nodes[graph.output]
        if len(output.shape) != 1 or not graph.nodes[0].size:
            raise _Other(f"the output's shape {output.shape} is no vector, or the input is empty")
        self.top, below = _above(graph)
        if not self.top:
            raise _Other("the output is no linear layer")
        self.weights: list[Any] = []
        self.biases: list[Any] = []
        self.scales: list[tuple[Any, str]] = []
        self.balls: list[tuple[Any, Any, int | None]] = []  # products of the input, numbers of weight and bias
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
            raise _Other("the network is linear")
        self.numbers = sum(s.size for s in self.stages)

    def _stage(self, i: int) -> tuple[Stage, list[tuple[int, Link]]]:
        """The stage at node ``i``, with the nodes that it reads."""
        node = self.graph.nodes[i]
        shape, read = _image(node.shape), cast("list[tuple[int, Link]]", [])
        biases: list[tuple[int, int]] = []
        factor = shift = None
        params: tuple[float, ...] = ()
        if isinstance(node, G.MaxPool):
            window = ops.PoolWindow(node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode)
            j = self._through(node.inputs[0])
            return Stage(shape, "max"), [(j, Link(0, window=window))]
        if isinstance(node, G.Activation):
            kind, params = node.activation, node.params
            self._expand(node.inputs[0], 1, False, read, biases)
        elif isinstance(node, G.Scale):
            kind = "scale"
            if self.ball and isinstance(self.graph.nodes[self._through(node.inputs[0])], G.Input):
                raise _Other  # a ball stays one through a scaling, which a box does not tell
            self._expand(node.inputs[0], 1, False, read, biases)
            factor, shift = self._scale(node, "factor"), self._scale(node, "shift")
        elif isinstance(node, (G.Conv, G.Dense, G.Sum)):
            kind = "linear"
            self._expand(i, 1, True, read, biases)
        else:
            raise _Other(f"{type(node).__name__} at {node.where or 'the input'!r} is no stage")
        read.sort(key=lambda r: r[1].at is None)  # products make what others add to
        box = None
        if self.ball and self._at_input(node):
            box = len(self.balls)
            self.balls.append((node, read[0][1].at, biases[0][0] if biases else None))
        return Stage(shape, kind, (), tuple(biases), factor, shift, params, box), read

    def _through(self, i: int) -> int:
        """The node whose numbers node i has in the same order, channels innermost."""
        node = self.graph.nodes[i]
        while isinstance(node, G.Reshape) and _image(node.shape) == _image(self.graph.nodes[node.inputs[0]].shape):
            node = self.graph.nodes[node.inputs[0]]
        return node.index

    def _at_input(self, node: G.Node) -> bool:
        """Whether this is a product of the input."""
        if not isinstance(node, (G.Dense, G.Conv)):
            return False
        before = self.graph.nodes[node.inputs[0]]
        while isinstance(before, G.Reshape):
            before = self.graph.nodes[before.inputs[0]]
        return isinstance(before, G.Input)

    def _expand(
        self, i: int, sign: int, own: bool, read: list[tuple[int, Link]], biases: list[tuple[int, int]]
    ) -> None:
        """The value of a node as a sum over stages. own: the node is the stage itself."""
        node = self.graph.nodes[self._through(i)]
        i = node.index
        shared = not own and (len(node.consumers) > 1 or (self.ball and self._at_input(node)))
        if shared or isinstance(node, (G.Activation, G.Input, G.Scale, G.MaxPool)):
            read.append((i, Link(i, sign=sign)))
        elif isinstance(node, G.Sum):
            for j, s in zip(node.inputs, node.signs, strict=True):
                self._expand(j, sign * s, False, read, biases)
        elif isinstance(node, G.Conv):
            if not ops.spread_lanes(node.get_weight(), node.shape[2]):
                raise _Other(f"the kernel is not made for the convolution at {node.where!r}")
            link = Link(0, len(self.weights), False, node.stride, node.padding, sign, node.dilation, node.groups)
            self._product(node, sign, biases)
            read.append((self._through(node.inputs[0]), link))
        elif isinstance(node, G.Dense) and len(node.shape) == 1:
            before = self.graph.nodes[self._through(node.inputs[0])]
            if isinstance(before, G.Reshape):
                before = self.graph.nodes[self._through(before.inputs[0])]
            link = Link(0, len(self.weights), True, sign=sign)
            _image(before.shape)
            self._product(node, sign, biases)
            read.append((before.index, link))
        else:
            raise _Other(f"{type(node).__name__} at {node.where!r} with shape {node.shape} is no link")

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
        dims = len(node.shape)
        if t.numel() != 1 and not (t.dim() >= dims and t.shape[-dims] == t.numel()):
            raise _Other
        self.scales.append((get, which))
        return len(self.scales) - 1

    def parameters(self) -> Parameters | None:
        """What the stages take, as it is now; None where the kernels do not serve it."""
        weights = [node.get_weight() for node in self.weights]
        biases = [node.get_bias() for node in self.biases]
        scales = [get().reshape(-1).to(weights[0] if weights else torch.float32) for get, _ in self.scales]
        served = all(t is not None and ops.native(t) for t in (*weights, *biases, *scales))
        return Parameters(weights, biases, scales, []) if served else None

    def boxes(self, given: Parameters, region: Region) -> list[Tensor]:
        """Centre and radius of the products of the input over a ball, the tighter of it and of the box with
        ``clip``."""
        found: list[Tensor] = []
        for node, at, b in self.balls:
            w, bias = given.weights[at], None if b is None else given.biases[b]
            x, image = region.x, self.stages[0].shape
            if isinstance(node, G.Conv):
                x = x.reshape(-1, *image)
                conv = (node.stride, node.padding, node.dilation, node.groups)
                ends = ops.interval_ball_conv2d(x, region.eps_for(x), region.norm, region.clip_for(x), w, bias, *conv)
            else:
                ends = ops.interval_ball_linear(x, region.eps, region.norm, region.clip, w, bias)
            found += ops.to_center(*(flat(t, _image(node.shape)) for t in ends))
        return found

    def matrices(self, device: torch.device) -> Heads:
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
                A = torch.eye(output.size, dtype=torch.float32, device=device) if A is None else A
                terms = None if bias is None else (A * bias.to(A).expand(node.shape)).flatten(1).sum(1)
                new = node.transpose(A.unflatten(1, node.shape) if A.dim() == 2 else A, graph.input_shapes(node))
            if terms is not None:
                offset = terms if offset is None else offset + terms
            for j, t in zip(node.inputs, new, strict=True):
                pending[j] = pending[j] + t if j in pending else t
        found = []
        for i, _ in self.heads:
            t = pending[i]
            found.append((t.movedim(1, -1) if t.dim() > 2 else t).reshape(output.size, -1))
        offset = found[0].new_zeros(output.size) if offset is None else offset
        return Heads([k for _, k in self.heads], found, offset)


def _image(shape: tuple[int, ...]) -> Image:
    """Channels, height and width; of one dimension behind the channels the width."""
    if len(shape) not in (1, 2, 3):
        raise _Other
    return shape[0], shape[1] if len(shape) == 3 else 1, shape[-1] if len(shape) > 1 else 1


def flat(t: Tensor, image: Image) -> Tensor:
    """(B, *shape) as (B, n), channels innermost."""
    if image[0] > 1 and image[1] * image[2] > 1:
        t = t.reshape(-1, *image).movedim(1, -1)
    return t.reshape(len(t), -1).contiguous()


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


def plan_of(graph: G.Graph, ball: bool) -> Plan | None:
    found: dict[bool, Plan | str] = graph.staged or {}
    if ball not in found:
        try:
            found[ball] = Plan(graph, ball)
        except _Other as other:
            found[ball] = str(other) or "a shape or a factor that stages do not have"
        graph.staged = found
    plan = found[ball]
    return cast("Plan | None", declined("graph op", plan) if isinstance(plan, str) else plan)


class Asked(NamedTuple):
    """The rows to bound: outputs ``plus`` (less ``minus``), or rows of ``matrix`` (R, K); ``negated``: of minus the
    outputs. keep: with the linear bounds that they come from."""

    rows: Rows
    matrix: Tensor | None = None
    negated: bool = False
    keep: bool = False

    def heads(self, heads: Heads) -> Heads:
        tensors = [heads.offset, *heads.matrices]
        if self.matrix is not None:
            tensors = [self.matrix @ t for t in tensors]
        if self.negated:
            tensors = [-t for t in tensors]
        return Heads(heads.stages, tensors[1:], tensors[0])


Linear = tuple[Tensor, Tensor]  # coefficients (1 or 2, R, *shape) and offsets (sides, R)


def margins_of_stages(
    graph: G.Graph, x: Tensor, eps: Any, norm: float, clip: ops.Clip, method: str, asked: Asked, max_memory: int
) -> tuple[Tensor, Linear | None] | None:  # fmt: skip
    """Bounds (sides, R) over a ball (and ``clip``); None where this is not the way. x (B, *shape)."""
    way = "graph op"
    if not allowed(way):
        return None
    if method not in _KINDS or not ops.native(x) or not x.shape[0] or not ops.direct():
        return declined(way, f"it takes {', '.join(_KINDS)} in float32")
    ball = norm != math.inf
    plan = plan_of(graph, ball)
    if plan is None:
        return None
    kind, rows = _KINDS[method], asked.rows
    if ball and kind is None and plan.heads[0][0] == 0:
        return declined(way, "interval rows that end at the input itself meet the ball")
    numbers = len(rows.example) * rows.sides if kind is not None else 0
    if 4 * 4 * plan.numbers * (numbers + 8 * len(x)) > max_memory:
        return declined(way, "the rows of all stages exceed max_memory")
    given = plan.parameters()
    if given is None:
        return declined(way, "parameters are not float32")
    took(way)
    shape = plan.stages[0].shape
    eps = eps.to(x.dtype) if isinstance(eps, Tensor) else eps
    shared = clip is None and not ball and not isinstance(eps, Tensor) and not ops.needs_grad(x)
    region = Region(x, eps, norm, clip) if ball else None
    if region is not None:
        c, r = (flat(t, shape) for t in region.cut.middle)
        given = given._replace(boxes=plan.boxes(given, region))
    elif shared:
        c = flat(x, shape)
        r = c.new_full(c.shape if kind else (1, c.shape[1]), eps).expand_as(c)  # intervals take one for all
    else:
        c, r = (flat(t, shape) for t in ops.box_center(x, eps, clip))
    heads = asked.heads(plan.matrices(x.device))
    keep = kind is not None and (asked.keep or ball)
    found = stage_margins(plan.stages, given, heads, c, r, shared, rows, kind, keep)
    if not keep:
        return found[0], None
    A, b = found
    box: Any = (c, r)
    around: Any = None
    if region is not None:
        box, around = (None if t is None else (flat(t[0], shape), flat(t[1], shape)) for t in (region.box, region.ball))
    bounds = ops.concretize_rows(A, b, rows.example, box, around, 1.0 if region is None else region.q)
    A = channels_first(A.flatten(0, 1), shape).view(len(A), len(rows.example), *x.shape[1:])
    return bounds, (A, b) if asked.keep else None
