"""compute_bounds: sound bounds of a network's outputs over a set of inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.bounds import graph as G
from fastrobust.bounds import outward as O
from fastrobust.bounds.backward import Backward, Chunk, Lines, Rows, conv_chain
from fastrobust.bounds.checks import check_inputs, check_spec, explain_not_finite
from fastrobust.bounds.intervals import margins_of_chain, small_margins
from fastrobust.bounds.region import Box, Region
from fastrobust.bounds.trace import first_parameter, trace
from fastrobust.ops import bounds as ops
from fastrobust.reference.bounds import dual_norm, eps_like

# method: (intermediate bounds by linear propagation, kind of lines); None: intervals only
METHODS: dict[str, tuple[bool, str | None]] = {
    "ibp": (False, None),
    "ibp-linear": (False, "parallel"),
    "crown-ibp": (False, "crown"),
    "fast-lin": (True, "parallel"),
    "crown": (True, "crown"),
}
_CACHE_BYTES = 4 << 20  # rows of a chunk that fit a core's cache, where no graph is recorded


@dataclass
class LinearBounds:
    """lower_A x' + lower_b <= margin(x') <= upper_A x' + upper_b for every x' of the input set.

    A: (B, S, *x.shape[1:]), b: (B, S). With same-slope methods upper_A is lower_A. ``input_lower`` and ``input_upper``, of x's
    shape, are the box around the input set.
    """

    lower_A: Tensor
    lower_b: Tensor
    upper_A: Tensor | None
    upper_b: Tensor | None
    input_lower: Tensor
    input_upper: Tensor

    def lower_at(self, x: Tensor) -> Tensor:
        """The lower linear function at x (B, *shape): (B, S)."""
        return torch.einsum("bsn,bn->bs", self.lower_A.flatten(2), x.flatten(1)) + self.lower_b

    def upper_at(self, x: Tensor) -> Tensor:
        if self.upper_A is None:
            raise ValueError("upper_at: these bounds were computed with sides='lower'")
        value = torch.einsum("bsn,bn->bs", self.upper_A.flatten(2), x.flatten(1))
        return value if self.upper_b is None else value + self.upper_b


@dataclass
class Bounds:
    """lower <= f(x') <= upper for every x' of the input set; (B, S), or (B, *output shape) without labels and spec."""

    lower: Tensor
    upper: Tensor | None
    linear: LinearBounds | None = None
    intermediate: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


class _Engine:
    def __init__(
        self, graph: G.Graph, region: Region, method: str, max_memory: int, intersect: bool, keep: bool, outward: bool, exact_input: bool, refine: str
    ):  # fmt: skip
        self.graph, self.region, self.intersect, self.max_memory = graph, region, intersect, max_memory
        self.refine_all = refine == "all"
        self.sharpen = exact_input and region.box is not None and region.ball is not None
        self.outward = outward
        self.slack: dict[int, Tensor] = {}  # float32 errors of the linear nodes
        self.keep = keep  # intermediate bounds are asked for
        self.done: set[int] = set()  # ReLUs that joined the layer before
        self.tighten = METHODS[method][0]
        self.kind: Any = METHODS[method][1]
        self.boxes: list[Any] = [None] * len(graph.nodes)
        self.lines: dict[int, Lines] = {}
        self.exact: list[bool] = [False] * len(graph.nodes)
        self.diagonal: list[bool] = [False] * len(graph.nodes)
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
                    self._tighten(j, node)
                self.lines[i] = self._relax(node)
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
            whole = isinstance(node, G.Conv) or len(node.shape) == 1
            self.exact[i] = at_input or (self.diagonal[first] and (whole or region.norm == math.inf))
            w, b = node.get_weight(), node.get_bias()
            conv = (node.stride, node.padding, node.dilation, node.groups) if isinstance(node, G.Conv) else ()
            if self.exact[i] and not at_input and region.norm != math.inf:
                return self._ball_interval(first, w, b, conv)
            if at_input and region.norm != math.inf:
                if not conv:
                    return Box(ops.interval_ball_linear(region.x, region.eps, region.norm, region.clip, w, b))
                x = region.x.reshape(-1, *self.graph.nodes[first].shape)
                return Box(ops.interval_ball_conv2d(x, region.eps_for(x), region.norm, region.clip, w, b, *conv))
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
        """The ball at a node that only scales, shifts and reshapes the input: centre, radius per element (batch 1 where it is the
        same for all), and what float32 evaluation can have added on the way."""
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
        """A layer behind a scaled input and a ball: its dual norm is that of the scaled weights. With ``clip`` the tighter of
        that and of the box."""
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
        """Whether only a ReLU reads this node and its own bounds are not asked for, so that the ReLU joins the product."""
        if self.kind is not None or self.keep or self.outward or len(node.consumers) != 1:
            return False
        after = self.graph.nodes[node.consumers[0]]
        return isinstance(after, G.Activation) and after.activation == "relu"

    # -- relaxations ---------------------------------------------------------------------------------------------------
    def _relax(self, node: Any) -> Lines:
        l, u = self.boxes[node.inputs[0]].ends
        if isinstance(node, G.MaxPool):
            lines = _relax_max_pool(node, l, u, self.kind)
            if self.outward:
                top = O.magnitude(Box((node.pool(l), node.pool(u))))
                pad = O.RELATIVE * (top + lines.intercepts.abs().amax(0))
                lines.intercepts = torch.stack([lines.intercepts[0] - pad, lines.intercepts[1] + pad])
            return lines
        slopes, intercepts = ops.relax(l, u, node.activation, self.kind, node.params)
        before = self.graph.nodes[node.inputs[0]]
        if self.outward:
            box = self.boxes[node.inputs[0]]
            value = O.magnitude(Box(ops.interval_activation(l, u, node.activation, node.params)))
            error = O.activation_error(node, box, value)
            return Lines(slopes, O.pad_lines(slopes, intercepts, box, error))
        if isinstance(before, (G.Dense, G.Conv, G.ConvTranspose)) and before.consumers == [node.index]:
            bias = before.bias()
            if bias is not None:  # the bias of the layer before joins the intercepts: one pass over A less
                return Lines(slopes, intercepts + slopes * bias, before.index)
        return Lines(slopes, intercepts)

    def _tighten(self, j: int, node: G.Node) -> None:
        """Replaces the interval of node j by linear bounds wherever ``node`` is not linear on it."""
        l, u = self.boxes[j].ends
        mask = node.unstable(l, u) if isinstance(node, G.Activation) else u > l
        if self.refine_all:
            mask = torch.ones_like(mask)
        self.exact[j] = True
        picked = mask.detach().flatten(1).nonzero()
        if len(picked) == 0:
            return
        example, neuron = picked.unbind(1)
        out = self.bound_rows(j, example, neuron, None)
        low, up = out[0], out[1]
        if self.intersect:
            low = torch.maximum(low, l.flatten(1)[example, neuron])
            up = torch.minimum(up, u.flatten(1)[example, neuron])
        at = (example, neuron)
        self.boxes[j] = Box(
            (l.flatten(1).index_put(at, low).view(l.shape), u.flatten(1).index_put(at, up).view(u.shape))
        )

    # -- rows ----------------------------------------------------------------------------------------------------------
    def bound_rows(self, start: int, example: Tensor, plus: Tensor, minus: Tensor | None, sides: int = 2) -> Tensor:
        """Bounds (sides, R) of single neurons, or of differences of two, of node ``start``."""
        node = self.graph.nodes[start]
        results = []
        for piece in self._pieces(start, len(example), sides):
            p = plus[piece]
            where = None
            if len(node.shape) == 3:
                inner = p % (node.shape[1] * node.shape[2])
                where = (inner // node.shape[2], inner % node.shape[2])
            b = torch.zeros(sides, len(p), dtype=self.region.x.dtype, device=self.region.x.device)
            rows = Rows(None, plus=p, minus=None if minus is None else minus[piece])
            back = Backward(self.graph, self.region, self.lines, self.boxes, self.slack, self.layouts)
            results.append(back.run(start, rows, Chunk(example[piece], b, where))[0])
        return results[0] if len(results) == 1 else torch.cat(results, 1)

    def _pieces(self, start: int, rows: int, sides: int) -> list[slice]:
        x = self.region.x
        size, budget = self.graph.row_size(start), self.max_memory
        if x.device.type == "cpu" and not torch.is_grad_enabled() and ops.direct(x):
            taken = x.dtype == torch.float32 and not self.slack and self.region.has_kernel
            fused = _numbers_before_chain(self.graph, start) if taken else None
            # rows that a kernel takes all the way need no memory; others stay in the cache
            size, budget = (size, min(budget, 4 * _CACHE_BYTES)) if fused is None else (max(fused, 16), budget)
        per_row = 4 * size * x.element_size() * (sides if self.kind == "crown" else 1)
        step = max(1, budget // per_row)
        return [slice(i, min(rows, i + step)) for i in range(0, rows, step)] or [slice(0, 0)]

    def final(
        self, example: Tensor, plus: Any, minus: Tensor | None, matrix: Tensor | None, sides: int, keep: bool
    ) -> tuple[Tensor, Any]:
        """Bounds of the output rows, with the linear map at the input when ``keep``."""
        start = self.graph.output
        x = self.region.x
        bounds, maps, offsets = [], [], []
        count = len(example)
        for piece in self._pieces(start, count, sides):
            ex = example[piece]
            b = torch.zeros(sides, len(ex), dtype=x.dtype, device=x.device)
            if matrix is not None:
                rows = Rows(matrix[None, piece].unflatten(2, self.graph.nodes[start].shape))
            else:
                rows = Rows(None, plus=plus[piece], minus=None if minus is None else minus[piece])
            back = Backward(self.graph, self.region, self.lines, self.boxes, self.slack, self.layouts, keep)
            out, kept = back.run(start, rows, Chunk(ex, b))
            bounds.append(out)
            if kept is not None:
                maps.append(kept[0])
                offsets.append(kept[1])
        joined = torch.cat(bounds, 1)
        return joined, ((torch.cat(maps, 1), torch.cat(offsets, 1)) if keep else None)


def _relax_max_pool(node: G.MaxPool, l: Tensor, u: Tensor, kind: str) -> Lines:
    """max over a window lies above the input with the largest lower bound, j, and below x_j + max(0, max over others of u - l_j)
    (parallel), or below max u where another input can win (crown)."""
    c, h, w = l.shape[1:]
    out = node.shape
    with torch.no_grad():
        _, source = torch.nn.functional.max_pool2d(
            l, node.kernel, node.stride, node.padding, node.dilation, node.ceil_mode, True
        )
        source = source.flatten(2)
        numbers = torch.arange(h * w, device=l.device, dtype=l.dtype).view(1, 1, h, w)
        # windows of flat positions, -1 where the window leaves the image
        need = [
            (o - 1) * s + d * (k - 1) + 1
            for o, s, d, k in zip(out[1:], node.stride, node.dilation, node.kernel, strict=False)
        ]
        pads = (
            node.padding[1],
            max(0, need[1] - w - node.padding[1]),
            node.padding[0],
            max(0, need[0] - h - node.padding[0]),
        )
        if h * w > 1 << 24:
            raise ValueError(f"model: MaxPool2d at '{node.where}' has more than 2^24 positions")
        grid = torch.nn.functional.pad(numbers, pads, value=-1.0)[..., : need[0], : need[1]]
        index = torch.nn.functional.unfold(grid.float(), node.kernel, node.dilation, 0, node.stride).long()[
            0
        ]  # (kk, L)
    flat = u.flatten(2)
    values = flat[:, :, index.clamp(min=0)]  # (B, C, kk, L)
    hidden = (index < 0) | (index == source.unsqueeze(2))
    others = torch.where(hidden, torch.full_like(values, -math.inf), values).amax(2)
    best = l.flatten(2).gather(2, source)
    gap = (others - best).clamp(min=0)
    shape = (l.shape[0], *out)
    one, zero = torch.ones_like(gap), torch.zeros_like(gap)
    if kind == "parallel":
        return Lines(one.view(1, *shape), torch.stack([zero, gap]).view(2, *shape), source=source)
    contested = gap > 0
    top = torch.maximum(others, flat.gather(2, source))
    slopes = torch.stack([one, torch.where(contested, zero, one)])
    intercepts = torch.stack([zero, torch.where(contested, top, zero)])
    return Lines(slopes.view(2, *shape), intercepts.view(2, *shape), source=source)


def compute_bounds(
    model: nn.Module,
    x: Tensor,
    eps: float | Tensor,
    *,
    norm: float | str = math.inf,
    clip: tuple[float, float] | None = None,
    method: str = "crown-ibp",
    labels: Tensor | None = None,
    spec: Tensor | None = None,
    rounding: str = "nearest",
    return_linear: bool = False,
    return_intermediate: bool = False,
    sides: str = "both",
    intersect: bool = False,
    exact_input: bool = False,
    refine: str = "unstable",
    max_memory: int = 1 << 30,
) -> Bounds:
    """Bounds of model(x + d) over ||d||_p <= eps (and x + d in ``clip``).

    x: (B, *shape) float32 or float64. eps: a float, (B,), or x's shape (then the set is {x + eps * v : ||v||_p <= 1}).
    norm: 1, 2, inf or any p >= 1. method: "ibp" (Algorithm 3.2), "ibp-linear" (IBP-inspired linear bounds, section 3.3.1),
    "crown-ibp", "fast-lin" (same-slope lines, Algorithm 3.1), "crown" (adaptive lines); thesis chapter 3, CROWN (Zhang et al. 2018).
    labels: (B,) int64: bounds of the margins z_y - z_j, (B, K - 1), j ascending without y, with the last layer elided.
    spec: (S, K) or (B, S, K): bounds of spec @ z. Neither: bounds of the outputs.
    sides="lower" skips the upper bounds. intersect=True also takes the interval bounds wherever they are tighter.
    Over a ball cut by ``clip`` (p < inf) linear bounds take the exact extreme; the first layer's intervals take the tighter of ball
    and box, as the thesis' tables do, and with exact_input=True "fast-lin" and "crown" bound its unstable neurons exactly too.
    refine: which hidden neurons "fast-lin" and "crown" bound linearly: "unstable" (the rest keep their intervals, which is faster and
    can be tighter) or "all" (Algorithm 3.1 as it is written, and the figures of the thesis).
    max_memory: bytes that the coefficients of one chunk of rows may use. Differentiable in x, eps and the parameters.

    Raises ValueError or TypeError, naming the argument, for inputs that are not finite, shapes that do not fit, layers that are
    not supported (UnsupportedLayerError) and parameters or bounds that are not finite.
    """
    usual = spec is None and rounding == "nearest" and norm == math.inf and not (return_linear or return_intermediate)
    if method == "ibp" and labels is not None and usual and sides in ("both", "lower"):
        quick = small_margins(model, x, eps, clip, labels, 1 if sides == "lower" else 2)
        if quick is not None:
            return Bounds(quick[0], quick[1] if sides == "both" else None)
    x, eps, p, clip = check_inputs(x, eps, norm, clip)
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if sides not in ("both", "lower"):
        raise ValueError(f"sides: got {sides!r}, expected 'both' or 'lower'")
    if rounding not in ("nearest", "outward"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'nearest' or 'outward'")
    if refine not in ("unstable", "all"):
        raise ValueError(f"refine: got {refine!r}, expected 'unstable' or 'all'")
    outward = rounding == "outward"
    if outward and x.dtype != torch.float32:
        raise TypeError(f"x: got {x.dtype}, expected float32 with rounding='outward'")
    if return_linear and METHODS[method][1] is None:
        raise ValueError("return_linear: method 'ibp' has no linear bounds; use 'ibp-linear'")
    graph = trace(model, tuple(x.shape[1:]), outward)
    parameter = first_parameter(model)
    if parameter is not None and (parameter.dtype, parameter.device) != (x.dtype, x.device):
        raise ValueError(
            f"x: is {x.dtype} on {x.device}, the model's parameters are {parameter.dtype} on {parameter.device}"
        )
    example, plus, minus, matrix = check_spec(labels, spec, x, graph.nodes[graph.output].shape)
    output = graph.nodes[graph.output]
    count = 1 if sides == "lower" else 2
    if method == "ibp" and usual and plus is not None and minus is not None:
        quick = margins_of_chain(graph, x, eps, clip, plus, minus, example, count)
        if quick is not None:
            low = quick[0].view(x.shape[0], -1)
            up = quick[1].view(x.shape[0], -1) if count == 2 else None
            if not _is_finite(low, up):
                explain_not_finite(model, low, up)
            return Bounds(low, up)
    if outward:
        region = Region(x.double(), eps.double() if isinstance(eps, Tensor) else eps, p, clip, O.RELATIVE)
        matrix = None if matrix is None else matrix.double()
    else:
        region = Region(x, eps.to(x.dtype) if isinstance(eps, Tensor) else eps, p, clip)
    engine = _Engine(graph, region, method, max_memory, intersect, return_intermediate, outward, exact_input, refine)
    kept = None
    with _full_precision(x):
        plain = labels is None and spec is None
        direct = plain and engine.kind is None
        engine.forward(graph.output if direct or intersect else _frontier(graph))
        if direct:
            low, up = engine.boxes[graph.output].ends
        else:
            out, kept = engine.final(example, plus, minus, matrix, count, return_linear)
            if intersect and engine.kind is not None:
                out = _intersect(engine, out, example, plus, minus, matrix, count)
            shape = (x.shape[0], *output.shape) if plain else (x.shape[0], -1 if x.shape[0] else 0)
            if x.shape[0] == 0 and not plain:
                shape = (0, output.size - 1 if labels is not None else _rows_of_spec(spec))
            low, up = out[0].view(shape), (out[1].view(shape) if count == 2 else None)
    if outward:
        low, up = O.round_down(low), None if up is None else O.round_up(up)
    if not _is_finite(low, up):
        explain_not_finite(model, low, up)
    linear = None
    if kept is not None:
        A, b = kept
        lead = (x.shape[0], low.flatten(1).shape[1])
        A, b = A.view(A.shape[0], *lead, *x.shape[1:]), b.view(b.shape[0], *lead)
        linear = _linear_bounds(A, b, region, outward, count)
    return Bounds(low, up if count == 2 else None, linear, _intermediate(engine) if return_intermediate else {})


def _is_finite(low: Tensor, up: Tensor | None) -> bool:
    return math.isfinite(low.detach().sum().item()) and (up is None or math.isfinite(up.detach().sum().item()))


def _linear_bounds(A: Tensor, b: Tensor, region: Region, outward: bool, count: int) -> LinearBounds:
    low, up = region.ends
    if outward:
        near = A.float()
        moved = ((A - near.double()).abs() * torch.maximum(low.abs(), up.abs()).unsqueeze(1)).flatten(3).sum(3) * (
            1 + O.RELATIVE
        )
        ends = [O.round_down(b[0] - moved[0] - O.RELATIVE * b[0].abs())]
        if count == 2:
            ends.append(O.round_up(b[1] + moved[-1] + O.RELATIVE * b[1].abs()))
        A, b, low, up = near, torch.stack(ends), O.round_down(low), O.round_up(up)
    return LinearBounds(A[0], b[0], A[-1] if count == 2 else None, b[1] if count == 2 else None, low, up)


def _numbers_before_chain(graph: G.Graph, start: int) -> int | None:
    """The largest row on the way from ``start`` to convolutions that one kernel takes to the input; None without such."""
    node, size = graph.nodes[start], 0
    while len(node.inputs) == 1:
        if len(node.shape) == 3 and isinstance(node, G.Activation):
            return size if conv_chain(graph, node.index) else None
        before = graph.nodes[node.inputs[0]]
        if not isinstance(node, (G.Conv, G.Reshape)) and node.index != start:
            size = max(size, before.size)
        node = before
    return None


def _rows_of_spec(spec: Tensor | None) -> int:
    return 0 if spec is None else spec.shape[-2]


def _frontier(graph: G.Graph) -> int:
    """The last nonlinear node before the output (the linear rest is merged with the rows), or the input."""
    wanted = graph.ancestors[graph.output]
    return max((i for i in wanted if not isinstance(graph.nodes[i], G.LinearNode)), default=0)


def _intersect(engine: _Engine, out: Tensor, example: Tensor, plus: Any, minus: Any, matrix: Any, count: int) -> Tensor:
    lines, kind = engine.lines, engine.kind
    engine.lines, engine.kind = {}, None
    try:
        other, _ = engine.final(example, plus, minus, matrix, count, False)
    finally:
        engine.lines, engine.kind = lines, kind
    sides = [torch.maximum(out[0], other[0])] + ([torch.minimum(out[1], other[1])] if count == 2 else [])
    return torch.stack(sides)


def _intermediate(engine: _Engine) -> dict[str, tuple[Tensor, Tensor]]:
    """Bounds of the inputs of the nonlinear layers, by the module path of the layer that produces them."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for node in engine.graph.nodes:
        if isinstance(node, (G.Activation, G.MaxPool)) and engine.boxes[node.inputs[0]] is not None:
            name = engine.graph.nodes[node.inputs[0]].where
            key, n = name, 2
            while key in found:
                key, n = f"{name}#{n}", n + 1
            low, up = engine.boxes[node.inputs[0]].ends
            found[key] = (O.round_down(low), O.round_up(up)) if engine.outward else (low, up)
    return found


class _full_precision:
    """No TF32 inside: a bound in TF32 is no bound."""

    def __init__(self, x: Tensor):
        self.cuda = x.device.type == "cuda"

    def __enter__(self) -> None:
        if self.cuda:
            self.saved = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self.saved
