"""The propagation itself: intervals forward, lines at nonlinear nodes, rows of linear bounds backward."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust._heap import return_pages
from fastrobust._input_sets import dual_norm, eps_like
from fastrobust.bounds import graph as G
from fastrobust.bounds import outward as O
from fastrobust.bounds.backward import Backward, Chunk, Lines, Rows
from fastrobust.bounds.builder import unsupported
from fastrobust.bounds.decisions import declined, took
from fastrobust.bounds.joint import Differences, Joint, tighten_inputs
from fastrobust.bounds.needed import needed
from fastrobust.bounds.region import Box, Region
from fastrobust.bounds.slope_search import Wanted, best_rows, lines_before
from fastrobust.bounds.slopes import SlopeSearch
from fastrobust.bounds.stages import concretize_units, takes_images
from fastrobust.ops import bounds as ops

# method: (intermediate bounds by linear propagation, kind of lines); None: intervals only
METHODS: dict[str, tuple[bool, str | None]] = {
    "ibp": (False, None),
    "ibp-linear": (False, "parallel"),
    "crown-ibp": (False, "crown"),
    "fast-lin": (True, "parallel"),
    "crown": (True, "crown"),
    "alpha-crown": (True, "crown"),  # the rows of the output with the best slopes
}
_HEAP_BYTES = 64 << 20  # of the heap that may be free between pieces
_CACHE_BYTES = 4 << 20  # rows of a chunk that fit a core's cache, where no graph is recorded


def sizes_must_be_known(device: torch.device) -> bool:
    """Whether all neurons of a layer are bounded, and not those that a look at their intervals picks: that look would
    make the host wait for the device, and no graph could be captured."""
    return device.type == "cuda"


class Engine:
    """Boxes of every node by intervals, lines of the nonlinear ones, and rows taken back through both."""

    def __init__(
        self,
        graph: G.Graph,
        region: Region,
        method: str,
        max_memory: int,
        intersect: bool,
        keep: bool,
        outward: bool,
        exact_input: bool,
        refine: str,
        search: SlopeSearch | None = None,
    ):
        self.graph, self.region, self.intersect, self.max_memory = graph, region, intersect, max_memory
        self.refine_all = refine == "all"
        self.sharpen = exact_input and region.box is not None and region.ball is not None
        self.outward = outward
        joint = next((n for n in graph.nodes if isinstance(n, Joint)), None)
        if outward and joint is not None:
            why = " with rounding='outward': how float32 rounds it is not accounted for"
            raise unsupported(type(joint).__name__.lower(), joint.where, why)
        self.known_sizes = sizes_must_be_known(region.x.device)
        self.slack: dict[int, Tensor] = {}  # float32 errors of the linear nodes
        self.keep = keep  # intermediate bounds are asked for
        self.shown: dict[int, Box] = {}  # tighter than their boxes, where no line needs that
        self.done: set[int] = set()  # ReLUs that joined the layer before
        self.tighten = METHODS[method][0]
        self.kind: Any = METHODS[method][1]
        self.boxes: list[Any] = [None] * len(graph.nodes)
        self.lines: dict[int, Lines] = {}
        self.exact: list[bool] = [False] * len(graph.nodes)
        self.diagonal: list[bool] = [False] * len(graph.nodes)
        self.search = search if method == "alpha-crown" else None
        if joint is not None and self.search is not None:
            why = f"{type(joint).__name__.lower()} at {joint.where!r} has no free slopes: CROWN's lines are kept"
            self.search = declined("slope search", why)
        self.layouts: dict[int, Tensor] = {}  # weights with their columns in channels-last order

    # -- intervals -----------------------------------------------------------------------------------------------------
    def forward(self, last: int) -> None:
        """Intervals of every node up to ``last``, and lines of the nonlinear ones."""
        wanted = self.graph.ancestors[self.graph.output]
        for i, node in enumerate(self.graph.nodes[: last + 1]):
            if i not in wanted:
                continue
            if isinstance(node, (G.Activation, G.MaxPool)) and self.kind is not None:
                j = node.inputs[0]
                # the interval after an activation is the range over its input's, which linear bounds cannot beat
                loose = not self.exact[j] or self.sharpen
                if self.tighten and loose and isinstance(self.graph.nodes[j], G.LinearNode):
                    self.tighten_node(j)
                self.lines[i] = self._relax(node)
            if isinstance(node, Joint) and self.kind is not None:
                if self.tighten:
                    tighten_inputs(self, node)
                self.lines[i] = Lines(*node.relax([self.boxes[j].ends for j in node.inputs], self.kind))
            self.boxes[i] = self._interval(i, node)
            if self.outward:
                self.boxes[i] = self._widened(i, node)

    def _widened(self, i: int, node: Any) -> Box:
        """The interval with what float32 evaluation of the node can add; remembers it for the linear bounds."""
        box: Box = self.boxes[i]
        if isinstance(node, G.LinearNode):
            slack = O.slack(node, [O.magnitude(self.boxes[j]) for j in node.inputs])
            if slack is None:
                return box
            self.slack[i] = slack
            return O.widen(box, slack)
        if isinstance(node, G.Activation):
            return O.widen(box, O.activation_error(node, self.boxes[node.inputs[0]], O.magnitude(box)))
        return box

    def _at_input(self, i: int) -> bool:
        while isinstance(self.graph.nodes[i], G.Reshape):
            i = self.graph.nodes[i].inputs[0]
        return i == 0

    def _interval(self, i: int, node: Any) -> Box:
        region = self.region
        if isinstance(node, G.Input):
            self.diagonal[i] = True
            return region.cut
        first = node.inputs[0]
        before = self.boxes[first]
        if isinstance(node, (G.Dense, G.Conv)):
            at_input = self._at_input(first) and (isinstance(node, G.Conv) or len(node.shape) == 1)
            self.exact[i] = at_input or self.diagonal[first]
            w, b = node.get_weight(), node.get_bias()
            conv = (node.stride, node.padding, node.dilation, node.groups) if isinstance(node, G.Conv) else ()
            if self.exact[i] and not at_input and region.norm != math.inf:
                return self._ball_interval(first, w, b, conv)
            if at_input and region.norm != math.inf:
                if not conv:
                    return Box(ops.interval_ball_linear(region.x, region.eps, region.norm, region.clip, w, b))
                x = region.x.reshape(-1, *self.graph.nodes[first].shape)
                return Box(ops.interval_ball_conv2d(x, region.eps_for(x), region.norm, region.clip_for(x), w, b, *conv))
            if isinstance(node, G.AveragePool) and not at_input:
                low, up = before.ends
                return Box((node.function(low), node.function(up)))
            c, r = before.middle
            if at_input and region.clip is None and not isinstance(region.eps, Tensor):
                r = r[:1]  # the same for every example
            finish = ops.ENDS
            if self._feeds_relu(node):
                self.done.add(node.consumers[0])
                finish = ops.RELU
            if conv:
                pair = ops.center_conv2d(c, r, w, b, *conv, finish)
            else:
                if len(node.shape) > 1:
                    c, r = c.flatten(0, -2), r.flatten(0, -2)
                pair = ops.center_linear(c, r, w, b, finish)
            box = Box(pair) if finish == ops.ENDS else Box(middle=pair)
            return box if conv or len(node.shape) == 1 else box.reshape(*node.shape)
        if isinstance(node, G.Activation):
            if i in self.done:
                return before
            if node.activation == "relu":
                return before.relu()
            l, u = before.ends
            return Box(ops.interval_activation(l, u, node.activation, node.params))
        self.diagonal[i] = isinstance(node, (G.Reshape, G.Scale)) and self.diagonal[first]
        self.exact[i] = self.diagonal[i] or (isinstance(node, (G.Reshape, G.Scale)) and self.exact[first])
        if isinstance(node, G.Reshape):
            return before.reshape(*node.shape)
        return Box(node.interval([self.boxes[j].ends for j in node.inputs]))

    def _ball_at(self, i: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """The ball at a node that only scales, shifts and reshapes the input: centre, radius per element (batch 1 where
        it is the same for all), and what float32 evaluation can have added on the way."""
        node, region = self.graph.nodes[i], self.region
        if isinstance(node, G.Input):
            e = eps_like(region.eps, region.x)
            return region.x, e if e.dim() else e.expand(1, *region.x.shape[1:]), None
        x, e, extra = self._ball_at(node.inputs[0])
        if isinstance(node, G.Reshape):
            shape = node.shape
            moved = None if extra is None else extra.reshape(-1, *shape)
            return x.reshape(-1, *shape), e.expand(len(e), *x.shape[1:]).reshape(-1, *shape), moved
        assert isinstance(node, G.Scale)
        f, shift, slack = node.get_factor(), node.get_shift(), self.slack.get(i)
        if f is not None:
            f = f.to(x)
            x, e, extra = x * f, e * f.abs(), None if extra is None else extra * f.abs()
        if shift is not None:
            x = x + shift.to(x)
        return x, e, slack if extra is None else extra + (0.0 if slack is None else slack)

    def _ball_interval(self, first: int, w: Tensor, b: Tensor | None, conv: Any) -> Box:
        """A layer behind a scaled input and a ball: its dual norm is that of the scaled weights. With ``clip`` the
        tighter of that and of the box."""
        x, e, extra = self._ball_at(first)
        apply: Any = (lambda t, v, c=None: F.conv2d(t, v, c, *conv)) if conv else F.linear
        mid, reach = apply(x, w, b), dual_norm(e.expand(len(e), *x.shape[1:]), w, self.region.q, apply, conv)
        if extra is not None:
            reach = reach + apply(extra, w.abs())
        low, up = mid - reach, mid + reach
        if self.region.clip is not None:
            c, r = self.boxes[first].middle
            c, r = apply(c, w, b), apply(r, w.abs())
            low, up = torch.maximum(low, c - r), torch.minimum(up, c + r)
        return Box((low, up))

    def _feeds_relu(self, node: G.Node) -> bool:
        """Whether only a ReLU reads this node and its own bounds are not asked for, so that the ReLU joins the
        product."""
        if self.kind is not None or self.keep or self.outward or len(node.consumers) != 1:
            return False
        after = self.graph.nodes[node.consumers[0]]
        return isinstance(after, G.Activation) and after.activation == "relu"

    # -- relaxations ---------------------------------------------------------------------------------------------------
    def _relax(self, node: Any) -> Lines:
        l, u = self.boxes[node.inputs[0]].ends
        if isinstance(node, G.MaxPool):
            slopes, intercepts, source = ops.relax_max_pool(l, u, node.window, self.kind)
            lines = Lines(slopes, intercepts, source=source)
            if self.outward:
                top = O.magnitude(Box((node.pool(l), node.pool(u))))
                pad = O.RELATIVE * (top + lines.intercepts.abs().amax(0))
                lines.intercepts = torch.stack([lines.intercepts[0] - pad, lines.intercepts[1] + pad])
            return lines
        before = self.graph.nodes[node.inputs[0]]
        if self.outward:
            slopes, intercepts = ops.relax(l, u, node.activation, self.kind, node.params)
            box = self.boxes[node.inputs[0]]
            value = O.magnitude(Box(ops.interval_activation(l, u, node.activation, node.params)))
            error = O.activation_error(node, box, value)
            return Lines(slopes, O.pad_lines(slopes, intercepts, box, error))
        found = self._biases(before, node.index)
        if found:  # the biases of the layers before join the intercepts: one pass over A less
            bias = found[0][1] if len(found) == 1 else torch.stack([b for _, b in found]).sum(0)
            folded = tuple(i for i, _ in found)
            return Lines(*ops.relax_behind(l, u, node.activation, self.kind, node.params, bias), folded)
        return Lines(*ops.relax(l, u, node.activation, self.kind, node.params))

    def _biases(self, node: Any, reader: int, sign: int = 1) -> list[tuple[int, Tensor]]:
        """(layer, its bias) of the layers that ``reader`` alone reads, straight or in a sum; all biases have one
        shape."""
        if node.consumers != [reader]:
            return []
        if isinstance(node, (G.Dense, G.Conv, G.ConvTranspose)):
            bias = node.bias()
            return [] if bias is None else [(node.index, bias if sign > 0 else -bias)]
        if not isinstance(node, G.Sum):
            return []
        found: list[tuple[int, Tensor]] = []
        for j, s in zip(node.inputs, node.signs, strict=True):
            found += self._biases(self.graph.nodes[j], node.index, sign * s)
        return found if len({b.shape for _, b in found}) <= 1 else []

    def tighten_node(self, j: int) -> None:
        """Replaces the interval of node j by linear bounds wherever lines are made from it."""
        l, u = self.boxes[j].ends
        node = self.graph.nodes[j]
        self.exact[j] = True
        wanted = torch.ones_like(l, dtype=torch.bool) if self.refine_all else needed(self.graph, j, l, u)
        shown = wanted | (l < u) if self.keep else wanted
        example, neuron = self._all(l) if self.known_sizes else self._picked(shown)
        if len(example) == 0:
            return
        out = self.bound_rows(j, example, neuron, None)
        if self.search is not None and self.search.hidden != 0 and lines_before(self, j):
            out, _ = best_rows(self, Wanted(j, example, neuron), self._hidden_search(j), out)
        low, up = (t.flatten(1).index_put((example, neuron), v).view(t.shape) for t, v in zip((l, u), out, strict=True))
        if self.intersect or any(isinstance(self.graph.nodes[c], (Joint, Differences)) for c in node.consumers):
            low, up = torch.maximum(low, l), torch.minimum(up, u)
        elif not self.refine_all:  # what was linear stays so, also where only the float32 error moved it past a kink
            by = self.slack.get(j, 0.0)
            loose = self._unstable(j, l + by, u - by)
            low, up = torch.where(loose, low, torch.maximum(low, l)), torch.where(loose, up, torch.minimum(up, u))
        if self.keep:
            self.shown[j] = Box((low, up))
        if self.keep or self.known_sizes:
            low, up = torch.where(wanted, low, l), torch.where(wanted, up, u)
        self.boxes[j] = Box((low, up))

    def _hidden_search(self, j: int) -> SlopeSearch:
        """Of the bounds of node ``j``: once a ReLU is known to be linear there is no more to gain."""
        assert self.search is not None
        readers = [self.graph.nodes[c] for c in self.graph.nodes[j].consumers]
        at_zero = all(isinstance(n, G.Activation) and n.activation in ("relu", "leaky_relu") for n in readers)
        iterations = (self.search.iterations + 1) // 2 if self.search.hidden is None else self.search.hidden
        stop = 0.0 if at_zero and not self.keep else None
        return dataclasses.replace(self.search, iterations=iterations, stop=stop)

    def _unstable(self, j: int, l: Tensor, u: Tensor) -> Tensor:
        """Where an activation that reads node j is not linear on [l, u]."""
        mask = torch.zeros_like(l, dtype=torch.bool)
        for node in (self.graph.nodes[c] for c in self.graph.nodes[j].consumers):
            if isinstance(node, G.Activation):
                mask |= node.unstable(l, u)
        return mask

    @staticmethod
    def _picked(mask: Tensor) -> tuple[Tensor, Tensor]:
        """(example, neuron) where ``mask`` (B, *shape) is set; of images position by position."""
        if mask.dim() != 4:
            example, neuron = mask.flatten(1).nonzero().unbind(1)
            return example, neuron
        example, place, channel = mask.flatten(2).movedim(1, -1).nonzero().unbind(1)
        return example, channel * (mask.shape[2] * mask.shape[3]) + place

    @staticmethod
    def _all(box: Tensor) -> tuple[Tensor, Tensor]:
        """``_picked`` of all neurons."""
        batch, size = len(box), box[0].numel() if len(box) else 0
        neuron = torch.arange(size, device=box.device)
        if box.dim() == 4 and size:
            neuron = neuron.view(box.shape[1], -1).t().reshape(-1)
        example = torch.arange(batch, device=box.device)
        return example.repeat_interleave(size), neuron.repeat(batch)

    # -- rows ----------------------------------------------------------------------------------------------------------
    def bound_rows(self, start: int, example: Tensor, plus: Tensor, minus: Tensor | None, sides: int = 2) -> Tensor:
        """Bounds (sides, R) of single neurons, or of differences of two, of node ``start``."""
        node = self.graph.nodes[start]
        if minus is None and (found := self._units(start, example, plus, sides)) is not None:
            return found[0]
        results = []
        for piece in self._pieces(start, len(example), sides):
            p = plus[piece]
            where = None
            if len(node.shape) == 3:
                inner = p % (node.shape[1] * node.shape[2])
                where = (inner // node.shape[2], inner % node.shape[2])
            b = torch.zeros(sides, len(p), dtype=self.region.x.dtype, device=self.region.x.device)
            rows = Rows(None, plus=p, minus=None if minus is None else minus[piece])
            back = Backward(self.graph, self.region, self.lines, self.boxes, self.slack, self.layouts, self.max_memory)
            results.append(back.run(start, rows, Chunk(example[piece], b, where))[0])
            if piece.stop < len(example) and self.region.x.is_cpu:
                return_pages(min(self.max_memory, _HEAP_BYTES))
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def _units(self, start: int, example: Tensor, neuron: Tensor, sides: int, keep: bool = False) -> Any:
        """``bound_rows`` of single neurons of an image in one kernel, and with ``keep`` the linear map at the input,
        where that is the way."""
        if self.slack or self.kind is None:
            return None
        found = concretize_units(
            self.graph, self.region, self.lines, start, example, neuron, sides, self.max_memory, keep
        )
        if found is not None:
            took("rows", start)
            took("neuron kernel", start)
        return found

    def _pieces(self, start: int, rows: int, sides: int) -> list[slice]:
        x = self.region.x
        size, budget = self.graph.row_size(start), self.max_memory
        if x.device.type == "cpu" and not torch.is_grad_enabled() and ops.direct(x):
            taken = x.dtype == torch.float32 and not self.slack and self.region.has_kernel
            fused = _numbers_before_kernel(self.graph, self.lines, start, self.max_memory) if taken else None
            # rows that a kernel takes all the way need no memory; others stay in the cache
            size = size if fused is None else max(fused, 16)
            budget = min(budget, (4 if fused is None else 16) * _CACHE_BYTES)
        per_row = 4 * size * x.element_size() * (sides if self.kind == "crown" else 1)
        step = max(1, budget // per_row)
        return [slice(i, min(rows, i + step)) for i in range(0, rows, step)] or [slice(0, 0)]

    def final(
        self,
        example: Tensor,
        plus: Any,
        minus: Tensor | None,
        matrix: Tensor | None,
        sides: int,
        keep: bool,
        negative: bool = False,
    ) -> tuple[Tensor, Any]:
        """Bounds of the output rows, or of their negatives, with the linear map at the input when ``keep``."""
        if negative and minus is not None:
            plus, minus, negative = minus, plus, False
        start = self.graph.output
        x = self.region.x
        if matrix is None and minus is None and not (keep and negative):
            found = self._units(start, example, plus, 2 if negative else sides, keep)
            if found is not None:
                return (-found[0][1:] if negative else found[0]), found[1]
        bounds, maps, offsets = [], [], []
        count = len(example)
        for piece in self._pieces(start, count, sides):
            ex = example[piece]
            b = torch.zeros(sides, len(ex), dtype=x.dtype, device=x.device)
            if matrix is not None:
                A = matrix[None, piece].unflatten(2, self.graph.nodes[start].shape)
                rows = Rows(-A if negative else A)
            else:
                rows = Rows(None, plus=plus[piece], minus=None if minus is None else minus[piece], negative=negative)
            back = Backward(
                self.graph, self.region, self.lines, self.boxes, self.slack, self.layouts, self.max_memory, keep
            )
            out, kept = back.run(start, rows, Chunk(ex, b))
            bounds.append(out)
            if piece.stop < count and x.is_cpu:
                return_pages(min(self.max_memory, _HEAP_BYTES))
            if kept is not None:
                maps.append(kept[0])
                offsets.append(kept[1])
        joined = torch.cat(bounds, 1)
        offset = torch.cat(offsets, 1) if keep else None
        if (by := self.error_behind(example, matrix)) is not None:
            extra = torch.stack([-by, by])[:sides]
            joined, offset = joined + extra, None if offset is None else offset + extra
        return joined, ((torch.cat(maps, 1), offset) if keep else None)

    def error_behind(self, example: Tensor, matrix: Tensor | None) -> Tensor | None:
        """Rounding outward, float32 errors (R,) of what follows the output node: the log-softmax, and the product with
        the rows, which is one layer more."""
        if not self.outward or (matrix is None and not self.graph.log_softmax):
            return None
        box = self.boxes[self.graph.output]
        reach = O.magnitude(box).flatten(1)[example]
        own = torch.zeros_like(reach[:, 0])
        if self.graph.log_softmax:
            size, error = (t[example] for t in O.log_softmax_error(box))
            reach = torch.maximum(reach, size[:, None])
            own = error * (2.0 if matrix is None else matrix.abs().sum(1))
        return own if matrix is None else own + O.rows_error(matrix, reach)

    def intersected(
        self, out: Tensor, example: Tensor, plus: Any, minus: Any, matrix: Any, count: int, negative: bool
    ) -> Tensor:
        """``out``, or the interval bounds of the same rows where they are tighter."""
        lines, kind = self.lines, self.kind
        self.lines, self.kind = {}, None
        try:
            other, _ = self.final(example, plus, minus, matrix, count, False, negative)
        finally:
            self.lines, self.kind = lines, kind
        sides = [torch.maximum(out[0], other[0])] + ([torch.minimum(out[1], other[1])] if count == 2 else [])
        return torch.stack(sides)

    def intermediate(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Bounds of the inputs of the nonlinear layers, by the module path of the layer that produces them."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, shape, value in self.graph.reads or ():
            box = self._ends_of(value, shape)
            if box is None:
                continue
            key, n = name, 2
            while key in found:
                key, n = f"{name}#{n}", n + 1
            low, up = box
            found[key] = (O.round_down(low), O.round_up(up)) if self.outward else (low, up)
        return found

    def _shown_at(self, i: int) -> Box:
        """The tightest interval of a node: of what a nonlinear node gives, over the tightest of what it reads."""
        node: Any = self.graph.nodes[i]
        if i in self.shown or self.outward or not isinstance(node, (G.Activation, G.MaxPool)) or not self.shown:
            return self.shown.get(i, self.boxes[i])
        low, up = self._shown_at(node.inputs[0]).ends
        if isinstance(node, G.MaxPool):
            return Box(node.interval([(low, up)]))
        return Box(ops.interval_activation(low, up, node.activation, node.params))

    def _ends_of(self, value: G.Pieces, shape: G.Shape) -> tuple[Tensor, Tensor] | None:
        """The interval of a value of the model that may lie in pieces here."""
        if isinstance(value, int):
            if self.boxes[value] is None:
                return None
            low, up = self._shown_at(value).ends
            return low.reshape(len(low), *shape), up.reshape(len(up), *shape)
        dim, pieces = value
        ends = [self._ends_of(piece, own) for own, piece in pieces]
        if not ends or any(e is None for e in ends):
            return None
        if isinstance(dim, Tensor):  # another order of the one value
            dim = dim.to(self.region.x.device)
            low, up = (t.flatten(1).index_select(1, dim) for t in ends[0] or ())
            return low.reshape(len(low), *shape), up.reshape(len(up), *shape)
        low, up = (torch.cat([e[k] for e in ends if e is not None], dim + 1) for k in (0, 1))
        return low.reshape(len(low), *shape), up.reshape(len(up), *shape)


def _numbers_before_kernel(graph: G.Graph, lines: dict[int, Lines], start: int, max_memory: int) -> int | None:
    """The largest row on the way from ``start`` to images that one kernel takes to the input; None without such."""
    node, size, given = graph.nodes[start], 0, True  # the rows of a layer at the start are those of its weight
    while len(node.inputs) == 1:
        if len(node.shape) == 3 and isinstance(node, (G.Activation, G.MaxPool)):
            taken = takes_images(graph, lines, node.index, max_memory)
            return size if taken else None
        before = graph.nodes[node.inputs[0]]
        weights = isinstance(node, G.Dense) or (isinstance(node, G.Conv) and node.dilation == (1, 1))
        given = given and (isinstance(node, G.Reshape) or (node.index == start and weights))
        size = size if given else max(size, before.size)
        node = before
    return None
