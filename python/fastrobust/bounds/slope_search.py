"""The best slopes: lines chosen for each row of linear bounds by projected gradient ascent (alpha-CROWN, Xu et al.
2021).

Each row has lines of its own at every nonlinear node above the input (``slopes``). Every slope gives a sound bound,
so the search may stop anywhere. The bounds of hidden neurons are rows, too: layer by layer from the input they get
the best slopes for their own sake. (auto_LiRPA moves all slopes at once by the gradient of the outputs; a hidden
interval that is as tight as it can be serves every output.)

The gradient needs no recording. A row's bound is min over x of A x + b; with x the point that attains it, the row's
coefficients A_i and the value z_i of node i where the lines are followed forward from x, the derivative by the
slope of a line with the support point t is A_i (z_i - t) where the row takes that line. So an iteration is one pass
backward and one forward.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds import outward as O
from fastrobust.bounds.backward import Backward, Chunk, Lines, Rows
from fastrobust.bounds.decisions import took
from fastrobust.bounds.region import Box, Region
from fastrobust.bounds.slopes import Slopes, SlopeSearch
from fastrobust.ops import bounds as ops
from fastrobust.reference.bounds import room_of, split_support

_PER_NUMBER = 24  # numbers kept for each neuron of a row


class _Walk(Backward):
    """Rows with lines of their own, node by node; remembers the coefficients at the nonlinear nodes."""

    def run(self, start: int, rows: Rows, chunk: Chunk) -> tuple[Tensor, Any]:
        self.seen: dict[int, Tensor] = {}
        return super().run(start, rows, chunk)

    def _live(self, node: G.Node, r: Rows) -> list[Any]:
        return []

    def _convolutions(self, node: G.Node, r: Rows) -> list[Any]:
        return []

    def _graph(self, node: G.Node, rows: dict[int, Rows]) -> Any:
        return None

    def _step(self, node: Any, r: Rows) -> list[Rows]:
        if not isinstance(node, G.LinearNode):
            a = self._dense(node, r)
            self.seen[node.index] = a[0]
            r = Rows(a)
        return super()._step(node, r)


class _Problem:
    """R rows to be bounded from below, each with its own input set and lines."""

    def __init__(
        self,
        engine: Any,
        graph: G.Graph,
        start: int,
        example: Tensor,
        rows: Rows,
        cone: Cone | None = None,
        remembers: bool = True,
    ):
        self.graph, self.start, self.rows, self.count = graph, start, rows, len(example)
        self.max_memory = engine.max_memory
        self.layouts: dict[int, Tensor] = {}
        self.slopes: dict[int, Slopes] = {}
        if cone is None:
            self.region: Region = engine.region.rows(example)
            for i in lines_before(engine, start):
                self.slopes[i] = Slopes(
                    graph.nodes[i], engine.boxes[graph.nodes[i].inputs[0]].ends, example, None, remembers
                )
            return
        own = torch.arange(len(example), device=example.device)
        whole = engine.graph.nodes[start].shape
        place = rows.plus % (whole[1] * whole[2])
        where = place // whole[2], place % whole[2]
        self.rows = Rows(None, plus=rows.plus // (whole[1] * whole[2]), negative=rows.negative)
        self.graph, self.start = cone.graph, len(cone.graph.nodes) - 1
        seen = engine.region.x
        self.region = engine.region.mapped(lambda t: cone.patch(0, t.expand_as(seen), example, where)[0])
        for i, node in enumerate(cone.graph.nodes):
            if isinstance(node, G.Activation):
                ends = engine.boxes[engine.graph.nodes[cone.numbers[i]].inputs[0]].ends
                (low, inside), (up, _) = (cone.patch(i, t, example, where) for t in ends)
                self.slopes[i] = Slopes(node, (low, up), own, inside, remembers)

    def bound(
        self, lines: dict[int, Lines], graph: G.Graph | None = None, slack: Any = None
    ) -> tuple[Tensor, Any, Any]:
        """(R,) bounds, the linear map at the input, and the walk."""
        count, x = self.count, self.region.x
        own = torch.arange(count, device=x.device)
        chunk = Chunk(own, torch.zeros(1, count, dtype=x.dtype, device=x.device))
        walk = _Walk(graph or self.graph, self.region, lines, [], slack or {}, self.layouts, self.max_memory, True)
        out, kept = walk.run(self.start, self.rows, chunk)
        return out[0], kept, walk

    def keep(self, rows: Tensor) -> None:
        self.count, self.region = len(rows), self.region.rows(rows)
        for s in self.slopes.values():
            s.keep(rows)
        r = self.rows
        if r.A is not None:
            self.rows = Rows(r.A[:, rows])
        else:
            minus = None if r.minus is None else r.minus[rows]
            self.rows = Rows(None, plus=r.plus[rows], minus=minus, negative=r.negative)


class Cone:
    """What one neuron of an image sees of a chain of convolutions and activations: the chain on windows, without
    padding."""

    def __init__(self, graph: G.Graph, chain: list[int]):
        """chain: from the input to the convolution whose neurons are rows."""
        self.numbers = chain
        size, step, origin = (1, 1), (1, 1), (0, 0)
        self.windows: list[tuple[tuple[int, int], ...]] = []
        nodes: list[Any] = []
        for i in reversed(chain):
            node: Any = copy.copy(graph.nodes[i])
            self.windows.append((size, step, origin))
            node.shape, node.inputs, node.consumers = (node.shape[0], *size), (len(chain) - len(nodes) - 2,), []
            if isinstance(node, G.Conv):
                (kh, kw), (sy, sx), (py, px), (dy, dx) = (
                    node.get_weight().shape[2:],
                    node.stride,
                    node.padding,
                    node.dilation,
                )
                size = (size[0] - 1) * sy + (kh - 1) * dy + 1, (size[1] - 1) * sx + (kw - 1) * dx + 1
                origin = origin[0] * sy + py, origin[1] * sx + px
                step = step[0] * sy, step[1] * sx
                node.padding = (0, 0)
            nodes.append(node)
        nodes[-1].inputs = ()
        self.windows.reverse()
        self.graph = G.Graph(nodes[::-1], len(nodes) - 1, nodes[0].shape, [])

    def patch(self, i: int, t: Tensor, example: Tensor, where: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Windows (R, C, h, w) of maps t (B, C, H, W) at node i, zero outside, and where they are inside."""
        size, step, origin = self.windows[i]
        places, inside = [], []
        for axis in (0, 1):
            at = (where[axis] * step[axis] - origin[axis])[:, None] + torch.arange(size[axis], device=t.device)
            inside.append((at >= 0) & (at < t.shape[2 + axis]))
            places.append(at.clamp(0, t.shape[2 + axis] - 1))
        found = t.movedim(1, -1)[example[:, None, None], places[0][:, :, None], places[1][:, None, :]].movedim(-1, 1)
        mask = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(t.dtype)
        return (found * mask).contiguous(), mask


def _cone(graph: G.Graph, start: int) -> Cone | None:
    """Where the rows of node ``start`` see a part of the input alone, through convolutions and activations."""
    chain, node = [start], graph.nodes[start]
    if not isinstance(node, G.Conv):
        return None
    while node.inputs:
        if type(node) is not G.Conv and not isinstance(node, G.Activation):
            return None
        chain.append(node.inputs[0])
        node = graph.nodes[node.inputs[0]]
    if len(node.shape) != 3:
        return None
    cone = Cone(graph, chain[::-1])
    parts = sum(n.size for n in cone.graph.nodes) / sum(graph.nodes[i].size for i in chain)
    return cone if parts < 0.5 else None


@torch.no_grad()
def _search(problem: _Problem, options: SlopeSearch, start: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
    """The best bounds (R,) and slopes of every row."""
    best = start.clone()
    slopes = problem.slopes
    found = {i: s.best.clone() for i, s in slopes.items() if s.sides and s.best is not None}
    alive = torch.arange(len(start), device=start.device)
    for count in range(1, options.iterations + 1):
        if options.stop is not None:
            open_rows = (best[alive] <= options.stop).nonzero().flatten()
            if len(open_rows) < 0.75 * len(alive) or not len(open_rows):
                _give(found, slopes, alive)
                alive = alive[open_rows]
                problem.keep(open_rows)
            if not len(alive):
                break
        lines = {i: s.lines() for i, s in slopes.items()}
        value, kept, walk = problem.bound(lines)
        better = value > best[alive]
        best[alive] = torch.where(better, value, best[alive])
        for s in slopes.values():
            if s.sides:
                s.remember(better)
        if count == options.iterations:
            break
        length = options.length(count)
        values = _followed(problem, _lowest(kept[0][0], problem.region), lines, walk.seen)
        for i, s in slopes.items():
            if s.sides and i in walk.seen:
                s.move(s.gradient(walk.seen[i], values[problem.graph.nodes[i].inputs[0]]), length, count)
    _give(found, slopes, alive)
    return best, found


def _give(found: dict[int, Tensor], slopes: dict[int, Slopes], alive: Tensor) -> None:
    for i, best in found.items():
        best[:, alive] = slopes[i].best


def _lowest(A: Tensor, region: Region) -> Tensor:
    """The point of each row's input set at which A x is least: (R, *shape)."""
    if region.box is not None and region.ball is None:
        center, radius = region.box
        return center - A.sign() * radius
    assert region.ball is not None
    x, eps = (t.flatten(1) for t in region.ball)
    a = A.flatten(1)
    weight = (a * eps).abs()
    if region.box is not None:
        center, radius = (t.flatten(1) for t in region.box)
        step = split_support(weight, room_of(a, 0, center, radius, x, eps), region.q)[1]
    elif region.q == math.inf:
        step = F.one_hot(weight.argmax(1), weight.shape[1]).to(weight)
    else:
        top = weight.amax(1, keepdim=True)
        u = (weight / torch.where(top > 0, top, 1.0)) ** (region.q - 1)
        p = region.q / (region.q - 1)
        size = u.norm(p, 1, keepdim=True)
        step = u / torch.where(size > 0, size, 1.0)
    return (x - a.sign() * eps * step).view(A.shape)


def _followed(problem: _Problem, x: Tensor, lines: dict[int, Lines], seen: dict[int, Tensor]) -> dict[int, Tensor]:
    """Values of all nodes (R, *shape) from points x where each row follows the line that it takes at each nonlinear
    node."""
    values: dict[int, Tensor] = {}
    graph = problem.graph
    last = max(seen, default=0)
    wanted = graph.ancestors[last].union(*(graph.ancestors[i] for i in seen))
    for i, node in enumerate(graph.nodes[: last + 1]):
        if i not in wanted:
            continue
        if isinstance(node, G.Input):
            values[i] = x
        elif isinstance(node, G.LinearNode):
            values[i] = forward_of(node, [values[j] for j in node.inputs])
        elif i in seen:
            values[i] = problem.slopes[i].follow(lines[i], seen[i], values[node.inputs[0]])
    return values


def forward_of(node: Any, inputs: list[Tensor]) -> Tensor:
    z = inputs[0]
    if isinstance(node, G.AveragePool):
        return node.function(z)
    if isinstance(node, G.Dense):
        return F.linear(z, node.get_weight(), node.get_bias())
    if isinstance(node, G.Conv):
        how = (node.stride, node.padding, node.dilation, node.groups)
        weight = node.get_weight().contiguous(memory_format=torch.channels_last)  # and so is what comes out
        return F.conv2d(z, weight, node.get_bias(), *how)
    if isinstance(node, G.ConvTranspose):
        return node._apply(z, node.get_weight(), node.get_bias())
    if isinstance(node, G.Sum):
        return torch.stack([t if s > 0 else -t for s, t in zip(node.signs, inputs, strict=True)]).sum(0)
    if isinstance(node, G.Concat):
        return torch.cat(inputs, node.dim + 1)
    if isinstance(node, G.Reshape):
        return z.reshape(len(z), *node.shape)
    if isinstance(node, G.Scale):
        f, shift = node.get_factor(), node.get_shift()
        z = z if f is None else z * f.to(z)
        return z if shift is None else z + shift.to(z)
    assert isinstance(node, G.Monotone)
    return node.function(z)


def _constant(t: Tensor | None) -> G.Getter:
    value = None if t is None else t.detach()
    return lambda: value


def _fixed(graph: G.Graph) -> G.Graph:
    """The same graph with its parameters read once, and not recorded."""
    fixed = copy.copy(graph)
    fixed.nodes = []
    for node in graph.nodes:
        node = copy.copy(node)
        for name in ("get_weight", "get_bias", "get_factor", "get_shift"):
            if hasattr(node, name):
                setattr(node, name, _constant(getattr(node, name)()))
        fixed.nodes.append(node)
    return fixed


def lines_before(engine: Any, start: int) -> list[int]:
    """The nonlinear nodes that rows of node ``start`` pass."""
    return [i for i in engine.lines if i in engine.graph.ancestors[start]]


class Wanted(NamedTuple):
    """Rows of a node: outputs ``plus`` (less ``minus``) of the examples, or rows of a matrix; ``negative``: minus
    them."""

    start: int
    example: Tensor
    plus: Any
    minus: Any = None
    matrix: Any = None
    negative: bool = False

    def piece(self, part: slice, turned: bool, shape: G.Shape) -> Rows:
        turned = turned != self.negative
        if self.matrix is not None:
            A = self.matrix[None, part].unflatten(2, shape)
            return Rows(-A if turned else A)
        if self.minus is None:
            return Rows(None, plus=self.plus[part], negative=turned)
        first, second = (self.minus, self.plus) if turned else (self.plus, self.minus)
        return Rows(None, plus=first[part], minus=second[part])


def best_rows(
    engine: Any, wanted: Wanted, options: SlopeSearch, begin: Tensor, keep: bool = False
) -> tuple[Tensor, Any]:
    """Bounds (sides, R) with the best slopes, and with ``keep`` the linear map at the input, given the bounds ``begin``
    with CROWN's slopes: nowhere looser than those."""
    took("slope search", None if wanted.start == engine.graph.output else wanted.start)
    graph = _fixed(engine.graph)
    nodes = engine.graph.nodes
    passed = lines_before(engine, wanted.start)
    cone = None
    if wanted.matrix is None and wanted.minus is None and not (keep or engine.outward or begin.requires_grad):
        cone = _cone(graph, wanted.start)
    if cone is None:
        numbers = sum(nodes[i].size for i in passed) + nodes[0].size + nodes[wanted.start].size
    else:
        numbers = sum(n.size for n in cone.graph.nodes)
    step = max(1, engine.max_memory // (_PER_NUMBER * numbers * begin.element_size()))
    bounds, maps, offsets = [], [], []
    count = len(wanted.example)
    for side, first in enumerate(begin):
        sign = -1.0 if side else 1.0
        for at in range(0, count, step):
            part = slice(at, min(count, at + step))
            rows = wanted.piece(part, side == 1, nodes[wanted.start].shape)
            example = wanted.example[part]
            here = sign * first[part]
            if cone is not None:
                value, kept = (
                    _search(_Problem(engine, graph, wanted.start, example, rows, cone, False), options, here)[0],
                    None,
                )
            else:
                of = None if wanted.matrix is None else wanted.matrix[part]
                behind = engine.error_behind(example, of) if wanted.start == engine.graph.output else None
                value, kept = _best(engine, graph, wanted.start, example, rows, options, here, keep, behind)
            bounds.append(sign * value)
            if keep:
                assert kept is not None
                maps.append(sign * kept[0])
                offsets.append(sign * kept[1])
    out = torch.cat(bounds).view(begin.shape)
    if not keep:
        return out, None
    A = torch.cat(maps, 1)
    return out, (A.view(len(begin), count, *A.shape[2:]), torch.cat(offsets, 1).view(begin.shape))


def _best(
    engine: Any,
    graph: G.Graph,
    start: int,
    example: Tensor,
    rows: Rows,
    options: SlopeSearch,
    begin: Tensor,
    keep: bool,
    behind: Tensor | None = None,
) -> tuple[Tensor, Any]:
    fixed = Rows(None if rows.A is None else rows.A.detach(), plus=rows.plus, minus=rows.minus, negative=rows.negative)
    remembers = keep or engine.outward or begin.requires_grad
    with torch.no_grad():
        best, slopes = _search(_Problem(engine, graph, start, example, fixed, None, remembers), options, begin.detach())
    if not remembers:
        return best, None
    problem = _Problem(engine, engine.graph, start, example, rows)
    lines = {i: _recorded(engine, s, example, slopes.get(i)) for i, s in problem.slopes.items()}
    slack = {i: t[example] for i, t in engine.slack.items()}
    value, kept, _ = problem.bound(lines, slack=slack)
    if behind is not None:
        value, kept = value - behind, (kept[0], kept[1] - behind)
    return torch.maximum(value, begin), kept


def _recorded(engine: Any, chosen: Slopes, example: Tensor, at: Tensor | None) -> Lines:
    """The lines of the chosen slopes with the intervals as autograd records them, moved outwards where that is asked
    for."""
    node = chosen.node
    low, up = engine.boxes[node.inputs[0]].ends
    l, u = low[example], up[example]
    box = Box((l, u))
    if isinstance(node, G.MaxPool):
        base = engine.lines[node.index]
        return Lines(base.slopes[:, example], base.intercepts[:, example], source=base.source[example])
    base = ops.relax(l, u, node.activation, "crown", node.params)
    slopes, intercepts = list(base.slopes.expand(2, *base.slopes.shape[1:])), list(base.intercepts)
    for k, side in enumerate(chosen.sides):
        assert at is not None
        slope = torch.where(chosen.free, chosen.least + at[k] * chosen.span, slopes[side])
        if chosen.curved:
            value, _ = ops.support(slope, l, u, node.activation, node.params, side == 1)
            intercepts[side] = torch.where(chosen.free, value, intercepts[side])
        slopes[side] = slope
    both, ends = torch.stack(slopes), torch.stack(intercepts)
    if engine.outward:
        reach = O.magnitude(Box(ops.interval_activation(l, u, node.activation, node.params)))
        ends = O.pad_lines(both, ends, box, O.activation_error(node, box, reach))
    return Lines(both, ends)
