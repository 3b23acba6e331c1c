"""Linear bounds, propagated from the output of a node back to the input (thesis, equation 3.7; CROWN).

Rows of coefficients are kept as (k, R, *shape): R rows of all examples, k = 1 where one matrix serves both sides. Rows
that start at a convolution stay windows (k, R, C, ph, pw) around their neuron until the window fills the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.chains import conv_chain, live_steps
from fastrobust.bounds.decisions import allowed, declined, took
from fastrobust.bounds.joint import Joint, offset
from fastrobust.bounds.outward import RELATIVE
from fastrobust.bounds.region import Region, flat
from fastrobust.bounds.stages import concretize_images
from fastrobust.ops import bounds as ops
from fastrobust.reference.bounds import row_maps


@dataclass
class Window:
    """A window per row: its upper left corner is the row's location * step - origin, in the coordinates of the node."""

    step: tuple[int, int] = (1, 1)
    origin: tuple[int, int] = (0, 0)

    def corner(self, where: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return where[0] * self.step[0] - self.origin[0], where[1] * self.step[1] - self.origin[1]


@dataclass
class Rows:
    """Coefficients at a node: A itself, rows of a matrix (``pick``), or unit vectors e_plus - e_minus (A is None), all
    of them -e_plus where ``negative``."""

    A: Any
    window: Any = None
    pick: Tensor | None = None
    plus: Any = None
    minus: Tensor | None = None  # with ``pick``: rows that are subtracted
    clean: bool = False  # windows: already zero outside the image
    negative: bool = False  # of unit vectors, without minus

    def solid(self) -> Tensor:
        if self.pick is None:
            return self.A
        return self.A[:, self.pick] if self.minus is None else self.A[:, self.pick] - self.A[:, self.minus]


@dataclass
class Chunk:
    """R rows that are propagated together."""

    example: Tensor  # (R,)
    b: Tensor  # (m, R)
    where: Any = None  # location of each row's neuron, for windows


@dataclass
class Lines:
    """The relaxation of one nonlinear node."""

    slopes: Tensor  # (1 or 2, B, *shape)
    intercepts: Tensor  # (2, B, *shape), of the node before without its bias where ``folded``
    folded: tuple[int, ...] = ()  # the nodes whose biases are in the intercepts
    source: Any = None  # max pooling: (B, C, L) flat index of the input that each output follows
    flat: dict[bool, tuple[Tensor, Tensor]] = field(default_factory=dict)
    numbers: Tensor | None = None  # ``followed``

    def flattened(self, image: bool) -> tuple[Tensor, Tensor]:
        """Slopes and intercepts as (., B, n), in channels-last order for images."""
        if image not in self.flat:
            self.flat[image] = (
                _flatten(self.slopes, image).contiguous(),
                _flatten(self.intercepts, image).contiguous(),
            )
        return self.flat[image]

    def followed(self) -> Tensor:
        """Of max pooling, (B, map) int32: the channels-last number of the input that each output follows."""
        if self.numbers is None:
            channels = self.source.shape[1]
            numbers = self.source.movedim(1, 2) * channels + torch.arange(channels, device=self.source.device)
            self.numbers = numbers.flatten(1).int()
        return self.numbers


def _flatten(t: Tensor, image: bool) -> Tensor:
    """(k, R, *shape) as (k, R, n), channels last for images."""
    return (t.movedim(2, -1) if image else t).flatten(2)


def _unflatten(t: Tensor, shape: tuple[int, ...], image: bool) -> Tensor:
    if not image:
        return t.unflatten(2, shape)
    return t.unflatten(2, (*shape[1:], shape[0])).movedim(-1, 2)


def _join(f: Callable[..., Tensor], a: Tensor, *args: Any) -> Tensor:
    """Applies f to (k * R, ...) and splits again."""
    return f(a.flatten(0, 1), *args).unflatten(0, a.shape[:2])


class Backward:
    """One backward pass for the rows of a chunk."""

    def __init__(
        self,
        graph: G.Graph,
        region: Region,
        lines: dict[int, Lines],
        boxes: list[Any],
        slack: dict[int, Tensor],
        layouts: dict[int, Tensor],
        max_memory: int,
        keep_input: bool = False,
    ):
        self.graph, self.region, self.lines, self.boxes, self.keep_input = graph, region, lines, boxes, keep_input
        self.layouts, self.max_memory = layouts, max_memory
        self.folded = {j: i for i, line in lines.items() for j in line.folded}
        self.slack = slack  # outward rounding: what float32 evaluation of a node can add, (B, *shape)

    def run(self, start: int, rows: Rows, chunk: Chunk) -> tuple[Tensor, Any]:
        """Bounds (m, R), and with ``keep_input`` the linear map at the input: (A (k, R, *shape), b (m, R))."""
        self.chunk = chunk
        self.at_input: Tensor | None = None
        self.tail: list[tuple[Tensor, Tensor]] = []
        pending: dict[int, Rows] = {start: rows}
        self.start = start
        total = None
        took("rows", start)
        for i in range(start, -1, -1):
            r = pending.pop(i, None)
            if r is None:
                continue
            node = self.graph.nodes[i]
            if isinstance(node, G.Input):
                A = self._dense(node, r) if self.keep_input or r.window is None else None
                if self.keep_input:
                    self.at_input = A
                total = self._concretize_input(node, r, A)
                took("walk", start)
                continue
            if not isinstance(node, G.LinearNode) and i not in self.lines:
                self._concretize_node(node, r)
                continue
            if not pending and not self.keep_input and (live := self._live(node, r)):
                total = self._through_live(r, live)
                break
            if not pending and not self.keep_input and (steps := self._convolutions(node, r)):
                total = self._through(r, steps)
                break
            if (found := self._graph(node, {**pending, i: r})) is not None:
                total, kept = found
                if kept is not None:
                    self.at_input, chunk.b = kept
                took("image kernel", i)
                break
            for j, new in zip(node.inputs, self._step(node, r), strict=False):
                pending[j] = new if j not in pending else self._merge(self.graph.nodes[j], pending[j], new)
        out = chunk.b if total is None else total
        if not self.keep_input:
            return out, None
        return out, (self.at_input, chunk.b)

    # -- forms of rows -------------------------------------------------------------------------------------------------
    def _dense(self, node: G.Node, r: Rows) -> Tensor:
        """(k, R, *shape)."""
        if r.A is None:
            count, like = len(self.chunk.example), self.chunk.b
            a = torch.zeros(1, count, node.size, dtype=like.dtype, device=like.device)
            a[0, torch.arange(count, device=like.device), r.plus] = -1.0 if r.negative else 1.0
            if r.minus is not None:
                a[0, torch.arange(count, device=like.device), r.minus] -= 1.0
            return a.unflatten(2, node.shape)
        a = r.solid()
        if r.window is None:
            return a
        c, h, w = node.shape
        k, n, _, ph, pw = a.shape
        y, x = r.window.corner(self.chunk.where)
        # of windows around any neuron: a look at these would make the host wait for a CUDA device
        (sy, sx), (oy, ox), (_, rows, columns) = r.window.step, r.window.origin, self.graph.nodes[self.start].shape
        top, left = max(0, oy), max(0, ox)
        hh, ww = top + max(h, (rows - 1) * sy - oy + ph), left + max(w, (columns - 1) * sx - ox + pw)
        yy = y[:, None] + top + torch.arange(ph, device=a.device)
        xx = x[:, None] + left + torch.arange(pw, device=a.device)
        index = (yy[:, :, None] * ww + xx[:, None, :]).view(1, n, ph * pw, 1).expand(k, n, ph * pw, c)
        canvas = torch.zeros(k, n, hh * ww, c, dtype=a.dtype, device=a.device)
        canvas = canvas.scatter(2, index, a.movedim(2, -1).reshape(k, n, ph * pw, c))
        return canvas.view(k, n, hh, ww, c)[:, :, top : top + h, left : left + w].movedim(-1, 2)

    def _merge(self, node: G.Node, a: Rows, b: Rows) -> Rows:
        if a.A is None or b.A is None or a.window is None or b.window is None or a.window.step != b.window.step:
            x, y = self._dense(node, a), self._dense(node, b)
            return Rows(x + y)  # k = 1 broadcasts against k = 2
        x, y = a.solid(), b.solid()
        (ay, ax), (by, bx) = a.window.origin, b.window.origin
        oy, ox = max(ay, by), max(ax, bx)
        h = max(x.shape[3] + oy - ay, y.shape[3] + oy - by)
        w = max(x.shape[4] + ox - ax, y.shape[4] + ox - bx)

        def grow(t: Tensor, py: int, px: int) -> Tensor:
            return F.pad(t, (ox - px, w - t.shape[4] - ox + px, oy - py, h - t.shape[3] - oy + py))

        return Rows(grow(x, ay, ax) + grow(y, by, bx), Window(a.window.step, (oy, ox)))

    def _masked(self, node: G.Node, r: Rows) -> Tensor:
        """Window rows with zeros outside the image, where padding put coefficients."""
        a = r.solid()
        c, h, w = node.shape
        ones = torch.ones(1, 1, h * w, dtype=a.dtype, device=a.device)
        corner, shape = r.window.corner(self.chunk.where), (*a.shape[3:], 1, h, w)
        inside = row_maps(ones, torch.zeros_like(self.chunk.example), corner, shape)
        return a * inside.view(1, -1, 1, *a.shape[3:])

    # -- one node ------------------------------------------------------------------------------------------------------
    def _step(self, node: Any, r: Rows) -> list[Rows]:
        if isinstance(node, G.LinearNode):
            return self._linear(node, r)
        if isinstance(node, G.MaxPool):
            return [self._max_pool(node, r)]
        if isinstance(node, Joint):
            A, line, example = self._dense(node, r), self.lines[node.index], self.chunk.example
            self._add(offset(A, line.intercepts, example, len(self.chunk.b)))
            return [Rows(a) for a in node.back(line.slopes, A, example, len(self.chunk.b))]
        return [self._activation(node, r)]

    def _add(self, offset: Tensor) -> None:
        self.chunk.b = self.chunk.b + offset

    def _add_bias(self, node: G.LinearNode, r: Rows) -> None:
        if node.index in self.slack:
            self._add_slack(node, r, self.slack[node.index])
        if self.start >= self.folded.get(node.index, math.inf):
            return  # the rows came through the activation that has it
        bias = node.bias()
        if bias is None:
            return
        bias = bias.to(self.chunk.b)
        if r.A is None:
            full = bias.expand(node.shape).reshape(-1)
            own = -full[r.plus] if r.negative else full[r.plus]
            self._add(own if r.minus is None else own - full[r.minus])
            return
        a = r.solid()
        if bias.numel() == 1:
            sums = a.flatten(2).sum(2) * bias.reshape(())
        elif bias.numel() == node.shape[0] and bias.dim() >= 3 and bias.shape[-3] == bias.numel() and a.dim() == 5:
            sums = a.sum((3, 4)) @ bias.reshape(-1)
        elif a.dim() == 3 and bias.dim() == 1:
            sums = a @ bias
        else:
            sums = (a * bias.expand(node.shape)).flatten(2).sum(2)
        self._add(sums)

    def _add_slack(self, node: G.LinearNode, r: Rows, slack: Tensor) -> None:
        chunk = self.chunk
        if r.A is None:
            full = slack.flatten(1)
            out = full[chunk.example, r.plus]
            out = out if r.minus is None else out + full[chunk.example, r.minus]
            chunk.b = chunk.b + torch.stack([-out, out])[: len(chunk.b)]
            return
        image = len(node.shape) == 3
        reach = flat(slack, image)
        a, box = _flatten(r.A, image), (torch.zeros_like(reach), reach)
        corner, window = (None, None) if r.window is None else self._placement(node, r)
        chunk.b = ops.concretize_rows(a, chunk.b, chunk.example, box, None, 1.0, r.pick, corner, window, r.minus)

    def _linear(self, node: Any, r: Rows) -> list[Rows]:
        shapes = self.graph.input_shapes(node)
        if r.A is None:
            self._add_bias(node, r)
            if isinstance(node, G.Dense) and len(node.shape) == 1:
                shape, w = self._image_before(node), node.get_weight()
                A = w[None] if shape is None else _unflatten(self._by_image(node, shape)[None], shape, True)
                return [Rows(-A if r.negative else A, pick=r.plus, minus=r.minus)]
            if isinstance(node, G.Conv) and r.minus is None and self.chunk.where is not None and not r.negative:
                channel = r.plus // (node.shape[1] * node.shape[2])
                span = [d * (s - 1) + 1 for d, s in zip(node.dilation, node.get_weight().shape[2:], strict=False)]
                if node.dilation == (1, 1) and span[0] * span[1] < shapes[0][1] * shapes[0][2]:
                    return [Rows(node.dense_kernel()[None], Window(node.stride, node.padding), channel)]
            elif isinstance(node, G.Reshape):
                return [Rows(None, plus=r.plus, minus=r.minus, negative=r.negative)]
            elif isinstance(node, G.Sum) and min(node.signs) > 0:
                return [Rows(None, plus=r.plus, minus=r.minus, negative=r.negative) for _ in node.inputs]
            return self._transpose(node, self._dense(node, r), shapes)
        if r.window is not None:
            if isinstance(node, G.Sum):
                self._add_bias(node, r)
                return [Rows(t, r.window) for t in node.transpose(r.solid(), shapes)]
            channelwise = isinstance(node, G.Scale) and all(
                t is None or t.numel() == 1 or (t.dim() >= 3 and t.shape[-3] == t.numel())
                for t in (node.get_factor(), node.get_shift())
            )
            if isinstance(node, G.Conv) or channelwise:
                bias, factor = node.bias(), node.get_factor() if channelwise else None
                a = r.solid()
                if bias is not None or isinstance(node, G.Conv) or node.index in self.slack:
                    a = a if r.clean else self._masked(node, r)
                    r = Rows(a, r.window)
                    self._add_bias(node, r)
                if channelwise:
                    return [Rows(a if factor is None else a * factor.to(a).reshape(-1, 1, 1), r.window)]
                low = [
                    (n - 1) * s + (k - 1) * d + 1
                    for n, s, k, d in zip(
                        a.shape[3:], node.stride, node.get_weight().shape[2:], node.dilation, strict=False
                    )
                ]
                if low[0] * low[1] < shapes[0][1] * shapes[0][2]:
                    (sy, sx), (oy, ox) = r.window.step, r.window.origin
                    (ty, tx), (py, px) = node.stride, node.padding
                    return [
                        Rows(_join(node.transpose_window, a), Window((sy * ty, sx * tx), (oy * ty + py, ox * tx + px)))
                    ]
            r = Rows(self._dense(node, r))
            if isinstance(node, G.Conv):
                return [Rows(t.unflatten(0, r.A.shape[:2])) for t in node.transpose(r.A.flatten(0, 1), shapes)]
            self._add_bias(node, r)
            return self._transpose(node, r.solid(), shapes)
        self._add_bias(node, r)
        if isinstance(node, G.Reshape) and r.pick is not None and r.A.shape[2:] == shapes[0]:
            return [r]
        return self._transpose(node, r.solid(), shapes)

    def _image_before(self, node: G.Dense) -> G.Shape | None:
        """The shape of the image that is flattened into this layer and nothing else. Its rows then come in the image's
        shape, channels last, which saves a transposition of every row."""
        before = self.graph.nodes[node.inputs[0]]
        if not isinstance(before, G.Reshape) or len(before.consumers) != 1 or len(node.shape) != 1:
            return None
        shape = self.graph.nodes[before.inputs[0]].shape
        return shape if len(shape) == 3 else None

    def _by_image(self, node: G.Dense, shape: G.Shape) -> Tensor:
        """The weight (m, n) with its columns in channels-last order."""
        if node.index not in self.layouts:
            w = node.get_weight()
            self.layouts[node.index] = w.unflatten(1, shape).movedim(1, -1).reshape(w.shape)
        return self.layouts[node.index]

    def _transpose(self, node: G.LinearNode, a: Tensor, shapes: list[G.Shape]) -> list[Rows]:
        lead = a.shape[:2]
        flat = a.flatten(0, 1)
        if isinstance(node, G.Dense) and (shape := self._image_before(node)) is not None:
            if (
                node.index not in self.layouts and len(flat) < node.size
            ):  # moving the rows is less than moving the weight
                rows = ops.product(flat, node.get_weight()).unflatten(1, shape).movedim(1, -1)
                return [Rows(_unflatten(rows.flatten(1).unflatten(0, lead), shape, True))]
            return [Rows(_unflatten(ops.product(flat, self._by_image(node, shape)).unflatten(0, lead), shape, True))]
        if flat.dim() == 4 and isinstance(node, G.Conv):
            flat = flat.contiguous(memory_format=torch.channels_last)
        return [Rows(t.unflatten(0, lead)) for t in node.transpose(flat, shapes)]

    def _activation(self, node: G.Activation, r: Rows) -> Rows:
        line, chunk = self.lines[node.index], self.chunk
        if r.A is None:
            r = Rows(self._dense(node, r))
        image = len(node.shape) == 3
        s, i = line.flattened(image)
        if r.window is not None:
            corner, window = self._placement(node, r)
            a, chunk.b = ops.linear_back_step(
                _flatten(r.A, True), chunk.b, s, i, chunk.example, r.pick, corner, window, r.minus
            )
            return Rows(_unflatten(a, r.A.shape[2:], True), r.window, clean=True)
        a, chunk.b = ops.linear_back_step(_flatten(r.A, image), chunk.b, s, i, chunk.example, r.pick, minus=r.minus)
        return Rows(_unflatten(a, node.shape, image))

    def _placement(self, node: G.Node, r: Rows) -> tuple[Any, Any]:
        """(corner, window) of the ops for window rows at an image."""
        c, h, w = node.shape
        return r.window.corner(self.chunk.where), (*r.A.shape[3:], c, h, w)

    def _max_pool(self, node: G.MaxPool, r: Rows) -> Rows:
        line, chunk = self.lines[node.index], self.chunk
        s, i = line.flattened(False)
        c, h, w = self.graph.nodes[node.inputs[0]].shape
        a = _flatten(self._dense(node, r), False)
        a, chunk.b = ops.linear_back_step(a, chunk.b, s, i, chunk.example)
        a = a.unflatten(2, (c, -1))
        index = line.source[chunk.example].expand(a.shape)
        out = torch.zeros(*a.shape[:3], h * w, dtype=a.dtype, device=a.device).scatter_add(3, index, a)
        return Rows(out.unflatten(3, (h, w)))

    # -- layers at once ------------------------------------------------------------------------------------------------
    def _live(self, node: G.Node, r: Rows) -> list[ops.LiveStep]:
        """The activations and layers from ``node`` down to the input, where leaving out neurons without lines pays."""
        box, ball = self.region.flattened(True)
        if r.A is None or r.window is not None or self.slack or not self.region.has_kernel or (box and ball):
            return []
        maps = (*(box or ()), *(ball or ()))
        if not r.A.is_cpu or r.A.dtype != torch.float32 or not ops.direct(r.A, self.chunk.b, *maps):
            return []
        steps = live_steps(self.graph, node.index, self.lines)
        apart = len(self.chunk.b) == 2 and (len(r.A) == 2 or any(len(s.slopes) == 2 for s in steps))
        rows = self.chunk.b.shape[1] * (2 if apart else 1) / max(1, len(self.region.x))
        if not steps or not allowed("living layers"):
            return []
        if not ops.leaving_out_pays(steps, rows):
            declined("living layers", "few neurons are without lines: leaving them out would not pay", node.index)
            return []
        took("living layers", node.index)
        return steps

    def _through_live(self, r: Rows, steps: list[ops.LiveStep]) -> Tensor:
        box, ball = self.region.flattened(True)
        A, chunk = _flatten(r.A, r.A.dim() == 5), self.chunk
        return ops.concretize_live(A, chunk.b, chunk.example, steps, box, ball, self.region.q, r.pick, r.minus)

    def _convolutions(self, node: G.Node, r: Rows) -> list[ops.ConvStep]:
        """The activations and convolutions from ``node`` down to the input, where a kernel with gradients takes all of
        them, over a box; else nothing. What is not recorded takes the image kernel."""
        if r.A is None or r.A.dim() != 5 or r.window is not None or self.slack or not ops.direct():
            return []
        box, ball = self.region.flattened(True)
        if box is None or ball is not None or not r.A.is_cpu or not len(self.chunk.example):
            return []
        recorded = not ops.direct(r.A, self.chunk.b, *box)
        steps = []
        for act, conv in conv_chain(self.graph, node.index):
            line = self.lines.get(act.index)
            if line is None or line.source is not None or (conv.bias() is not None and conv.index not in line.folded):
                return []
            slopes, intercepts = line.flattened(True)
            w, shape_in = conv.get_weight(), self.graph.input_shapes(conv)[0]
            how = (conv.stride, conv.padding, shape_in, conv.dilation, conv.groups)
            steps.append(ops.ConvStep(slopes, intercepts, act.shape, w, *how))
            if not steps[-1].fits:
                return []
            recorded = recorded or not ops.direct(w, slopes, intercepts)
        if not steps or not recorded or not allowed("convolution kernel"):
            return []
        if not ops.recordable(steps):
            declined("convolution kernel", "a layer has groups or dilation, or there are too many", node.index)
            return []
        took("convolution kernel", node.index)
        return steps

    def _graph(self, node: G.Node, rows: dict[int, Rows]) -> Any:
        """The bounds (and what is kept of the linear map at the input), where one kernel takes images of coefficients
        at ``node`` and others through all that is left."""
        if self.slack or not isinstance(node, (G.Activation, G.MaxPool)):
            return None
        if any(r.A is None or r.window is not None or r.A.dim() != 5 for r in rows.values()):
            return None
        flat = {i: (_flatten(r.A, True), r.pick, r.minus) for i, r in rows.items()}
        chunk = self.chunk
        return concretize_images(
            self.graph, self.region, self.lines, flat, chunk.b, chunk.example, self.max_memory, self.keep_input
        )

    def _through(self, r: Rows, steps: list[ops.ConvStep]) -> Tensor:
        box, _ = self.region.flattened(True)
        assert box is not None
        chunk = self.chunk
        return ops.concretize_through(_flatten(r.A, True), chunk.b, chunk.example, steps, box, r.pick, r.minus)

    # -- the ends ------------------------------------------------------------------------------------------------------
    def _concretize_node(self, node: G.Node, r: Rows) -> None:
        image = len(node.shape) == 3
        picked = r.window is None and r.A is not None
        a = _flatten(r.A if picked else self._dense(node, r), image)
        middle, reach = self.boxes[node.index].middle
        if self.slack:
            reach = reach + RELATIVE * (middle.abs() + reach)
        box, chunk = (flat(middle, image), flat(reach, image)), self.chunk
        rows = (r.pick, r.minus) if picked else (None, None)
        chunk.b = ops.concretize_rows(a, chunk.b, chunk.example, box, None, 1.0, rows[0], minus=rows[1])

    def _concretize_input(self, node: G.Node, r: Rows, dense: Tensor | None) -> Tensor:
        placed: Any
        chunk, image = self.chunk, len(node.shape) == 3
        box, ball = self.region.flattened(image)
        if dense is not None:
            a, placed = _flatten(dense, image), (None, None, None)
        else:
            a, placed = _flatten(r.A, True), (r.pick, *self._placement(node, r))
        out = ops.concretize_rows(a, chunk.b, chunk.example, box, ball, self.region.q, *placed)
        if self.slack and ball is not None:  # the rounding errors of A x and of the norm
            reach = RELATIVE * (ball[0].abs() + ball[1])
            out = ops.concretize_rows(a, out, chunk.example, (torch.zeros_like(reach), reach), None, 1.0, *placed)
        return out
