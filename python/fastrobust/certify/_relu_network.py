"""A traced network of affine nodes and ReLUs with its parameters read once, bounds of its neurons, and what rounding
can add."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust._input_sets import dual_exponent
from fastrobust.bounds import graph as G
from fastrobust.bounds import outward as O
from fastrobust.bounds.slope_search import forward_of
from fastrobust.bounds.trace import trace
from fastrobust.ops.bounds._pool import _positions

_LAYERS = (G.Dense, G.Conv, G.ConvTranspose)
_AFFINE = (*_LAYERS, G.Scale, G.Sum, G.Concat, G.Reshape, G.Monotone)
_UNIT = 2.0**-53
_SAFETY = 4.0  # on the first-order count of roundings: slopes, intercepts and higher orders


class Unsupported(ValueError):
    """Why branch and bound does not apply to a model."""


class Relu(NamedTuple):
    """A (leaky) ReLU node: where its neurons stand among all neurons of the network."""

    node: int
    before: int
    part: slice
    shape: G.Shape


class Sets(NamedTuple):
    """Input sets, one an example: a box (N, *shape), and for norm < inf also the ball (center, eps (N, 1)) of that
    norm."""

    low: Tensor
    up: Tensor
    center: Tensor
    eps: Tensor
    norm: float

    def rows(self, index: Any) -> Sets:
        return Sets(self.low[index], self.up[index], self.center[index], self.eps[index], self.norm)

    def to(self, dtype: torch.dtype) -> Sets:
        return Sets(self.low.to(dtype), self.up.to(dtype), self.center.to(dtype), self.eps.to(dtype), self.norm)

    def least(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """(N, P) lower bounds of a x over the sets for a (N, P, D), and points of box or ball that attain them. Of box
        and ball the one that gives more is taken, which is a lower bound over what they share."""
        low, up = self.low.flatten(1).unsqueeze(1), self.up.flatten(1).unsqueeze(1)
        point = torch.where(a > 0, low, up)
        value = (a * point).sum(2)
        if self.norm == math.inf:
            return value, point
        center, q, tiny = self.center.flatten(1).unsqueeze(1), dual_exponent(self.norm), torch.finfo(a.dtype).tiny
        if q == math.inf:
            step = F.one_hot(a.abs().argmax(2), a.shape[2]).to(a)
        else:
            u = (a.abs() / a.abs().amax(2, keepdim=True).clamp(min=tiny)) ** (q - 1)
            step = u / u.norm(self.norm, 2, keepdim=True).clamp(min=tiny)
        other = center - a.sign() * self.eps.unsqueeze(2) * step
        size = (a * center).sum(2) - self.eps * a.norm(q, 2)
        ball = size > value
        return torch.where(ball, size, value), torch.where(ball.unsqueeze(2), other, point)


class Root(NamedTuple):
    """Bounds of all neurons (N, M), and what rounding can add to the outputs (N, K) and neurons, in float64."""

    low: Tensor
    up: Tensor
    neuron_error: Tensor  # of the value of a neuron
    output_error: Tensor  # of bounds in float64
    float32_error: Tensor  # of outputs that the model computes in float32

    def rows(self, index: Any) -> Root:
        return Root(*(t[index] for t in self))


class Network:
    """The network in float64 and float32; ``relus`` with M neurons in all."""

    def __init__(self, model: Any, x: Tensor):
        graph = trace(model, x[:1], exact=True).graph
        if graph.entry is not None or len(graph.result) != 1:
            raise Unsupported(f"the output is of shape {graph.result} an example")
        graph = _in_relus(graph)
        self.graph = {d: _constants(graph, d) for d in (torch.float64, torch.float32)}
        self.nodes: dict[torch.dtype, list[Any]] = {d: g.nodes for d, g in self.graph.items()}
        self.output, self.classes = graph.output, graph.nodes[graph.output].size
        self.wanted = sorted(graph.ancestors[graph.output])
        self.relus: list[Relu] = []
        self.size, slopes = 0, []
        roundings = 0
        for i in self.wanted:
            node: Any = graph.nodes[i]
            if isinstance(node, G.Activation):
                if node.activation not in ("relu", "leaky_relu"):
                    raise Unsupported(f"it splits piecewise linear functions, and '{node.where}' is {node.activation}")
                slope = 0.0 if node.activation == "relu" else float(node.params[0])
                if not 0 <= slope <= 1:
                    raise Unsupported(f"'{node.where}' is a leaky ReLU of slope {slope}, expected one of [0, 1]")
                part = slice(self.size, self.size + node.size)
                self.relus.append(Relu(i, node.inputs[0], part, node.shape))
                slopes.append(torch.full((node.size,), slope, dtype=torch.float64, device=x.device))
                self.size = part.stop
                roundings += 16
            elif isinstance(node, _AFFINE):
                roundings += 16 + _terms(node)
            elif not isinstance(node, G.Input):
                raise Unsupported(f"'{node.where}' is a {type(node).__name__}, which it has no rule for")
        self.at = {r.node: r for r in self.relus}
        self.least = torch.cat(slopes) if slopes else torch.zeros(0, dtype=torch.float64, device=x.device)
        inputs = math.prod(graph.nodes[0].shape)
        self.gamma = _SAFETY * (roundings + inputs + self.size) * _UNIT

    # -- forward -------------------------------------------------------------------------------------------------------
    def __call__(self, x: Tensor) -> Tensor:
        """Outputs (N, K) in x's dtype."""
        values: dict[int, Tensor] = {0: x}
        for i in self.wanted[1:]:
            node = self.nodes[x.dtype][i]
            if i in self.at:
                z = values[node.inputs[0]]
                k = self.least[self.at[i].part][0].to(z) if self.at[i].part.stop > self.at[i].part.start else 0.0
                values[i] = torch.where(z > 0, z, k * z)
            else:
                values[i] = forward_of(node, [values[j] for j in node.inputs])
        return values[self.output].flatten(1)

    # -- rounding ------------------------------------------------------------------------------------------------------
    def root(self, sets: Sets, bound: Any) -> Root:
        """``bound(graph)``: sound up to rounding (low, up) by node index of what ReLUs read."""
        found = bound(self.graph[torch.float64])
        n = len(sets.low)
        empty = sets.low.new_zeros(n, 0)
        size, given, single = self._magnitudes(sets)
        cat = lambda ts: torch.cat([t.flatten(1).expand(n, -1) for t in ts], 1) if ts else empty  # noqa: E731
        low, up = (cat([found[r.before][k] for r in self.relus]) for k in (0, 1))
        error = cat([self.gamma * size[r.before] + given[r.before] for r in self.relus])
        out = self.gamma * size[self.output] + given[self.output]
        return Root(low - error, up + error, error, out.flatten(1), single[self.output].flatten(1))

    def _magnitudes(self, sets: Sets) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[int, Tensor]]:
        """For every node what its absolute terms sum to at most, the error of parameters that were themselves computed
        in float32, and of a float32 evaluation."""
        biggest = torch.maximum(sets.low.abs(), sets.up.abs())
        if sets.norm != math.inf:
            biggest = torch.maximum(biggest, sets.center.abs() + sets.eps.view(-1, *[1] * (sets.center.dim() - 1)))
        nodes = self.nodes[torch.float64]
        zero = torch.zeros_like(biggest)
        size, given, single = {0: biggest}, {0: zero}, {0: zero}
        for i in self.wanted[1:]:
            node = nodes[i]
            before = [size[j] for j in node.inputs]
            if i in self.at:
                size[i], given[i] = 2 * before[0], given[node.inputs[0]]
                single[i] = single[node.inputs[0]]
                if node.activation != "relu":
                    single[i] = single[i] + 8 * 2.0**-24 * before[0]
                continue
            size[i] = _absolute(node, before, True)
            given[i] = _absolute(node, [given[j] for j in node.inputs], False)
            single[i] = _absolute(node, [single[j] for j in node.inputs], False)
            slack = None if isinstance(node, _Shift) else O.slack(node, before)
            if slack is not None:
                single[i] = single[i] + slack
                if isinstance(node, G.Scale):
                    given[i] = given[i] + slack
        return size, given, single

    # -- backward ------------------------------------------------------------------------------------------------------
    def composed(self, rows: Tensor, start: int, active: Tensor, open_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows (N, *shape) of node ``start`` as functions of the input and of the ReLUs that are ``open_`` (M,):
        coefficients of the input (N, D) and of max(z, 0) of every neuron (N, M), zero where it is not open, and
        constants (N,). The others are
        linear: the identity where ``active``."""
        nodes = self.nodes[rows.dtype]
        left = {start: rows}
        const = rows.new_zeros(len(rows))
        seen = rows.new_zeros(len(rows), self.size)
        straight = torch.where(active, 1.0, self.least)
        for i in range(start, 0, -1):
            a = left.pop(i, None)
            if a is None:
                continue
            node = nodes[i]
            if i in self.at:
                part = self.at[i].part
                a = a.flatten(1)
                here = open_[part]
                seen[:, part] = torch.where(here, (1 - self.least[part]) * a, 0.0)
                below = a * torch.where(here, self.least[part], straight[part])
                pieces = [below.view(-1, *node.shape)]
            else:
                bias = node.bias()
                if bias is not None:
                    const = const + (a * bias).flatten(1).sum(1)
                if isinstance(node, G.Dense):
                    pieces = [a @ node.get_weight()]
                else:
                    pieces = node.transpose(a, [nodes[j].shape for j in node.inputs])
            for j, t in zip(node.inputs, pieces, strict=True):
                left[j] = left[j] + t if j in left else t
        a = left.get(0)
        flat = rows.new_zeros(len(rows), math.prod(nodes[0].shape)) if a is None else a.flatten(1)
        return flat, seen, const


def _terms(node: Any) -> int:
    if isinstance(node, G.Dense):
        return int(sum(node.get_weight().shape))
    if isinstance(node, _LAYERS):
        w = node.get_weight()
        return int(w.numel() // w.shape[0] + w.numel() // w.shape[1]) + node.size // node.shape[0]
    return len(node.inputs) + (int(node.taps) if isinstance(node, G.Monotone) else 0)


def _absolute(node: Any, inputs: list[Tensor], shift: bool) -> Tensor:
    """|L| x (+ |bias| with ``shift``) for x >= 0."""
    if isinstance(node, _LAYERS) and not isinstance(node, G.AveragePool):
        b = node.get_bias()
        weight, bias = node.get_weight().abs(), None if b is None or not shift else b.abs()
        return forward_of(dataclasses.replace(_bare(node), get_weight=lambda: weight, get_bias=lambda: bias), inputs)
    if isinstance(node, G.Scale):
        f, s = node.get_factor(), node.shift_size()
        z = inputs[0] if f is None else inputs[0] * f.to(inputs[0]).abs()
        return z if s is None or not shift else z + s.to(z)
    if isinstance(node, G.Sum):
        return torch.stack(inputs).sum(0)
    return forward_of(node, inputs)


def _bare(node: Any) -> Any:
    """A copy that ``dataclasses.replace`` takes."""
    return copy.copy(node)


def _constants(graph: G.Graph, dtype: torch.dtype) -> G.Graph:
    """The same graph with its parameters read once, in ``dtype``."""
    fixed = copy.copy(graph)
    fixed.nodes = []
    for old in graph.nodes:
        node = copy.copy(old)
        for name in ("get_weight", "get_bias", "get_factor", "get_shift", "get_shift_size"):
            get = getattr(node, name, None)
            if get is not None:
                t = get()
                setattr(node, name, _always(None if t is None else t.detach().to(dtype)))
        fixed.nodes.append(node)
    return fixed


def _always(t: Tensor | None) -> G.Getter:
    return lambda: t


# -- other piecewise linear functions ----------------------------------------------------------------------------------
class _Shift(G.Scale):
    """Part of a function that float32 computes without rounding: x + shift or shift - x."""


def _in_relus(graph: G.Graph) -> G.Graph:
    """Max pooling and clipping in ReLUs, so that their choices can be split."""
    if not any(isinstance(n, G.MaxPool) or _clips(n) for n in graph.nodes):
        return graph
    nodes: list[Any] = []
    moved: list[int] = []

    def add(node: Any) -> int:
        nodes.append(node)
        return len(nodes) - 1

    for old in graph.nodes:
        node: Any = copy.copy(old)
        node.inputs, node.consumers = tuple(moved[j] for j in old.inputs), []
        if isinstance(node, G.MaxPool):
            moved.append(_tournament(node, nodes[node.inputs[0]].shape, add))
        else:
            moved.append(_clipped(node, add) if _clips(node) else add(node))
    return G.Graph(nodes, moved[graph.output], graph.result, [])


def _clips(node: Any) -> bool:
    return isinstance(node, G.Activation) and node.activation in ("hardtanh", "relu6")


def _clipped(node: Any, add: Callable[[Any], int]) -> int:
    """min(max(x, low), high) = high - relu((high - low) - relu(x - low))."""
    low, high = node.params if node.activation == "hardtanh" else (0.0, 6.0)

    def shifted(i: int, by: float, sign: float) -> int:
        # the model compares with the float32 nearest to a bound
        shift, factor = (torch.full(node.shape, t, dtype=torch.float64) for t in (by, sign))
        return add(_Shift((i,), node.shape, node.where, get_factor=lambda: factor, get_shift=lambda: shift))

    def relu(i: int) -> int:
        return add(G.Activation((i,), node.shape, node.where))

    low, high = (float(torch.tensor(t)) for t in (low, high))
    i = node.inputs[0]
    if low == -math.inf:
        return i if high == math.inf else shifted(relu(shifted(i, high, -1.0)), high, -1.0)
    above = relu(shifted(i, -low, 1.0))
    if high == math.inf:
        return shifted(above, low, 1.0)
    return shifted(relu(shifted(above, high - low, -1.0)), high, -1.0)


def _tournament(node: Any, shape: G.Shape, add: Callable[[Any], int]) -> int:
    """Max pooling as rounds of max(a, b) = a + relu(b - a)."""
    places, lost = _positions(shape[1], shape[2], node.window, torch.device("cpu"))
    inside = places.masked_fill(lost, -1).amax(1, keepdim=True)  # a tap outside repeats one inside
    places = torch.where(lost, inside, places)
    channels = torch.arange(shape[0]).view(-1, 1) * (shape[1] * shape[2])
    taps: list[tuple[Tensor, int]] = []
    for k in range(places.shape[1]):
        at = (channels + places[:, k]).flatten()
        if not any(torch.equal(at, known) for known, _ in taps):
            taps.append((at, add(_gather(node, at, shape))))
    entrants = [i for _, i in taps]
    while len(entrants) > 1:
        winners = []
        for a, b in zip(entrants[::2], entrants[1::2], strict=False):
            more = add(G.Sum((b, a), node.shape, node.where, signs=(1, -1)))
            gain = add(G.Activation((more,), node.shape, node.where))
            winners.append(add(G.Sum((a, gain), node.shape, node.where, signs=(1, 1))))
        entrants = winners + entrants[len(entrants) // 2 * 2 :]
    return entrants[0]


def _gather(pool: Any, at: Tensor, inner: G.Shape) -> G.Monotone:
    shape = pool.shape

    def take(t: Tensor) -> Tensor:
        return t.flatten(1).index_select(1, at.to(t.device)).reshape(len(t), *shape)

    def give(a: Tensor, like: Tensor) -> Tensor:
        out = a.new_zeros(len(a), math.prod(inner))
        return out.index_add_(1, at.to(a.device), a.flatten(1)).reshape(len(a), *inner)

    return G.Monotone(pool.inputs, shape, pool.where, function=take, adjoint=give, places=at)
