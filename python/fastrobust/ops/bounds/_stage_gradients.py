"""Gradients of :mod:`fastrobust.ops.stage_margins`, by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _C
from . import _autograd as gradients
from . import _conv as conv
from ._product import matrix_product
from ._rows import address, dense, lanes_of, taps_of
from .margins import Rows
from .stages import (
    Heads,
    Held,
    Link,
    Parameters,
    Stage,
    Told,
    by_channel,
    channels_first,
    channels_last,
    flat_of,
    forward,
    graph_of,
    image_of,
    signed,
    spread,
)

Pair = tuple[Any, Any]


class Margins(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stages: list[Stage], at: list[int], shared: bool, rows: Rows, kind: str | None, counts: list[int], *tensors: Tensor) -> Tensor:  # fmt: skip
        ctx.kept = {}
        ctx.told = stages, at, shared, rows, kind, counts
        ctx.save_for_backward(*tensors)
        heads, given = _parts(at, counts, tensors)
        return forward(stages, given, heads, tensors[0], tensors[1], shared, rows, kind, ctx.kept)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        stages, at, shared, rows, kind, counts = ctx.told
        need = ctx.needs_input_grad[6:]
        heads, given = _parts(at, counts, ctx.saved_tensors)
        work = _Backward(stages, heads, given, shared, rows, kind, ctx.kept, dense(g), need[0] or need[1])
        return (*[None] * 6, *(t if n else None for t, n in zip(work.run(), need, strict=True)))


def _parts(at: list[int], counts: list[int], tensors: Any) -> tuple[Heads, Parameters]:
    rest = list(tensors[2:])
    heads = Heads(at, rest[1 : 1 + len(at)], rest[0])
    rest = rest[1 + len(at) :]
    first, second = counts[0], counts[0] + counts[1]
    return heads, Parameters(rest[:first], rest[first:second], rest[second:])


class _Backward:
    def __init__(self, stages: list[Stage], heads: Heads, given: Parameters, shared: bool, rows: Rows, kind: str | None, kept: dict[str, Any], g: Tensor, input_too: bool):  # fmt: skip
        self.stages, self.heads, self.given, self.shared, self.rows, self.kind = (
            stages,
            heads,
            given,
            shared,
            rows,
            kind,
        )
        self.held: list[Held] = kept["held"]
        self.kept: dict[Any, Any] = kept.get("rows", {})
        self.g, self.input_too = g, input_too
        self.to_weights: list[Any] = [None] * len(given.weights)
        self.to_biases: list[Any] = [None] * len(given.biases)
        self.to_scales: list[Any] = [None] * len(given.scales)
        self.to_matrices: list[Any] = [None] * len(heads.stages)
        self.to_lines: dict[int, Any] = {}
        self.to_boxes: dict[int, Pair] = {}  # of centre and radius behind a stage
        batch = len(self.held[0].center)
        per = len(rows.plus) // max(1, batch)
        self.groups = torch.arange(0, len(rows.plus) + 1, max(1, per)), None

    def run(self) -> list[Any]:
        if self.kind is None:
            self._from_heads()
        else:
            self._rows_up()
        for i in range(len(self.stages) - 1, 0, -1):
            self._box(i)
        count = len(self.heads.offset)
        whole = self.g if self.g.shape[0] == 1 else self.g.sum(0, keepdim=True)
        offset = gradients.pick_gradient(whole.view(-1, 1), self.rows.plus, self.rows.minus, count).view(-1)
        to_input = self.to_boxes.get(0, (None, None))
        found = [*to_input, offset, *self.to_matrices, *self.to_weights, *self.to_biases, *self.to_scales]
        tensors = [
            *self.held[0][:2],
            self.heads.offset,
            *self.heads.matrices,
            *self.given.weights,
            *self.given.biases,
            *self.given.scales,
        ]
        return [torch.zeros_like(p) if t is None else t for t, p in zip(found, tensors, strict=True)]

    # -- rows ----------------------------------------------------------------------------------------------------------
    def _from_heads(self) -> None:
        rows = self.rows
        for k, (i, A) in enumerate(zip(self.heads.stages, self.heads.matrices, strict=True)):
            wanted = i > 0 or self.input_too
            c, r = self.held[i].after
            args: list[Any] = [
                A[None],
                self.g,
                rows.example,
                rows.plus,
                rows.minus,
                c,
                r.expand_as(c),
                None,
                None,
                1.0,
                None,
                None,
                [],
            ]
            to_a, to_c, to_r = gradients.concretize_rows_kernel(args, [False] * 5 + [wanted] * 2, self.g, self.groups)
            self.to_matrices[k] = self._picked(to_a, A.shape[0])
            if wanted:
                self._add_box(i, to_c, to_r)

    def _picked(self, to_a: Tensor, count: int) -> Tensor:
        a = to_a[0] if to_a.shape[0] == 1 else to_a.sum(0)
        return gradients.pick_gradient(dense(a), self.rows.plus, self.rows.minus, count)

    def _rows_up(self) -> None:
        to_reached: dict[int, Tensor] = {}  # gradients of the rows at each stage
        entry = {i: k for k, i in enumerate(self.heads.stages)}
        g, example, groups = self.g, self.rows.example, self.groups
        if 0 in self.kept:
            A, pick, _ = self.kept[0]
            args: list[Any] = [A, g, example, *pick, *self.held[0][:2], None, None, 1.0, None, None, []]
            to_a, to_c, to_r = gradients.concretize_rows_kernel(args, [False] * 5 + [self.input_too] * 2, g, groups)
            self._arrived(0, to_a, to_reached, entry)
            if self.input_too:
                self._add_box(0, to_c, to_r)
        else:
            self._from_kernel(self.kept["kernel"], to_reached, entry)
        for i in range(1, len(self.stages)):
            if i in self.kept:
                self._arrived(i, self._up(i, to_reached), to_reached, entry)

    def _from_kernel(self, told: Told, to_reached: dict[int, Tensor], entry: dict[int, int]) -> None:
        """The stages that one kernel took the rows through."""
        g, count = self.g, self.g.shape[1]
        to_stages, to_weights, taps, starting = [], [], [], []
        for i, stage, k in zip(told.order, told.stages, told.matrices, strict=True):
            size, batch = self.stages[i].size, 1 if stage.shared else self.held[0].center.shape[0]
            lines = (g.new_empty(stage.slope_sides, batch, size), g.new_empty(2, batch, size)) if i else (None, None)
            start = g.new_empty(k, count, size) if stage.entry >= 0 else None
            to_stages.append(tuple(map(address, (*lines, start))))
            starting.append((i, lines, start))
        for link, (j, _) in zip(told.links, told.link_of, strict=True):
            taps.append(None if link.kind == _C.LinkKind.identity else g.new_empty(self.stages[j].shape[0], link.lanes))
            to_weights.append(address(taps[-1]))
        to_c, to_r = (torch.empty_like(t) if self.input_too else None for t in self.held[0][:2])
        graph = graph_of(told, self.held, g)
        args = map(address, (self.rows.example, self.groups[0], g))
        _C.bounds_stage_grad(graph, *args, to_stages, to_weights, address(to_c), address(to_r))
        if self.input_too:
            self._add_box(0, to_c, to_r)
        for i, lines, start in starting:
            if start is not None:
                self._arrived(i, start, to_reached, entry)
            if lines[0] is None or lines[1] is None:
                continue
            if self.stages[i].kind == "relu":
                self.to_lines[i] = lines
            else:
                self._shared_lines(
                    self.stages[i],
                    i,
                    by_channel(lines[0], self.stages[i].shape).sum((0, 1, 2)),
                    by_channel(lines[1], self.stages[i].shape).sum((0, 1, 2)),
                )
        for (_, link), t in zip(told.link_of, taps, strict=True):
            if t is None or link.at is None:
                continue
            o, c, kh, kw = self.given.weights[link.at].shape
            self._add_weight(link, t[:, : kh * kw * c].view(o, kh, kw, c).permute(0, 3, 1, 2))

    def _shared_lines(self, stage: Stage, i: int, to_slope: Tensor, to_offset: Tensor) -> None:
        """slope = factor, offset = factor * bias + shift, by channels."""
        bias, given = self.held[i].bias, self.given
        if stage.shift is not None:
            self._add_scale(stage.shift, to_offset)
        if bias is not None:
            own = to_offset if stage.factor is None else to_offset * given.scales[stage.factor]
            self._add_bias(stage, own)
            to_slope = to_slope + to_offset * bias
        if stage.factor is not None:
            self._add_scale(stage.factor, to_slope)

    def _arrived(self, i: int, to_a: Tensor, to_reached: dict[int, Tensor], entry: dict[int, int]) -> None:
        to_reached[i] = to_a
        if i in entry:
            self.to_matrices[entry[i]] = self._picked(to_a, len(self.heads.matrices[entry[i]]))

    def _up(self, i: int, to_reached: dict[int, Tensor]) -> Tensor:
        """The gradient of the rows at stage i from those of the rows that it brings to others."""
        stage, (A, pick, scaled) = self.stages[i], self.kept[i]
        to_scaled: Any = None
        for link in stage.links:
            found = self._link_up(link, stage, scaled, to_reached[link.source])
            to_scaled = found if to_scaled is None else to_scaled + found
        if stage.kind != "relu":
            return self._linear_up(stage, i, A, to_scaled)
        at = self.held[i]
        args: list[Any] = [A, self.g, at.slopes, at.intercepts, self.rows.example, *pick, None, None, []]
        to_a, *self.to_lines[i] = gradients.back_rows_kernel(args, to_scaled, self.g, self.groups)
        return to_a

    def _linear_up(self, stage: Stage, i: int, A: Tensor, to_scaled: Tensor) -> Tensor:
        g, given = self.g[: A.shape[0]] if A.shape[0] == self.g.shape[0] else self.g.sum(0, keepdim=True), self.given
        bias = self.held[i].bias
        sums = by_channel(A, stage.shape).sum(2)
        to_a, to_sums = to_scaled, torch.zeros_like(sums)
        if stage.factor is not None:
            f = given.scales[stage.factor]
            to_f = (by_channel(A, stage.shape) * by_channel(to_scaled, stage.shape)).sum((0, 1, 2))
            to_a = (by_channel(to_scaled, stage.shape) * f).flatten(2)
            if bias is not None:
                to_f = to_f + (g[..., None] * sums * bias).sum((0, 1))
            self._add_scale(stage.factor, to_f)
        if bias is not None:
            f = given.scales[stage.factor] if stage.factor is not None else torch.ones_like(bias)
            self._add_bias(stage, (g[..., None] * sums * f).sum((0, 1)))
            to_sums = to_sums + g[..., None] * (bias * f)
        if stage.shift is not None:
            self._add_scale(stage.shift, (g[..., None] * sums).sum((0, 1)))
            to_sums = to_sums + g[..., None] * given.scales[stage.shift]
        return (by_channel(to_a, stage.shape) + to_sums.unsqueeze(2)).flatten(2)

    def _link_up(self, link: Link, stage: Stage, scaled: Tensor, to_down: Tensor) -> Tensor:
        if to_down.shape[0] != scaled.shape[0]:  # others brought two sides to the source
            to_down = to_down.sum(0, keepdim=True)
        if link.at is None:
            return signed(to_down, link.sign)
        w, flat, rows = (
            signed(self.given.weights[link.at], link.sign),
            dense(to_down).flatten(0, 1),
            scaled.flatten(0, 1),
        )
        if link.dense:
            flat = channels_first(flat, self.stages[link.source].shape)
            self._add_weight(link, matrix_product(rows.t(), flat))
            return matrix_product(flat, w.t()).unflatten(0, scaled.shape[:2])
        source = self.stages[link.source].shape
        args = [image_of(rows, stage.shape), w, link.stride, link.padding, source[1:]]
        to_rows, to_w, *_ = gradients.spread(args, (True, True), image_of(flat, source))
        assert to_rows is not None
        self._add_weight(link, to_w)
        return flat_of(to_rows).unflatten(0, scaled.shape[:2])

    # -- intervals -----------------------------------------------------------------------------------------------------
    def _box(self, i: int) -> None:
        stage, at = self.stages[i], self.held[i]
        lines, after = self.to_lines.get(i), self.to_boxes.pop(i, (None, None))
        if lines is None and after[0] is None:
            return
        batch, n = at.center.shape
        one = at.radius.stride(0) == 0 or at.radius.shape[0] != batch
        if stage.kind == "relu":
            g_c, g_r = torch.empty_like(at.center), at.center.new_empty(1 if one else batch, n)
            to_bias = g_c.new_empty(stage.shape[0])
            kept = [None if t is None else dense(t) for t in (*(lines or (None, None)), *after)]
            _C.bounds_relu_box_grad(
                at.center.data_ptr(), at.radius.data_ptr(), one, address(at.bias), stage.shape[0], batch, n, self.kind == "crown",
                list(map(address, kept)), g_c.data_ptr(), g_r.data_ptr(), to_bias.data_ptr(),
            )  # fmt: skip
        else:
            g_c, g_r = self._scale_up(stage, at, *after)
            to_bias = by_channel(g_c, stage.shape).sum((0, 1))
        self._add_bias(stage, to_bias)
        for link in stage.links:
            self._link_box(link, stage, g_c, g_r)

    def _scale_up(self, stage: Stage, at: Held, g_c: Tensor, g_r: Tensor) -> Pair:
        if stage.shift is not None:
            self._add_scale(stage.shift, by_channel(g_c, stage.shape).sum((0, 1)))
        if stage.factor is None:
            return g_c, g_r
        f = self.given.scales[stage.factor]
        c, r, to_c, to_r = (by_channel(t, stage.shape) for t in (at.center, at.radius, g_c, g_r))
        self._add_scale(stage.factor, (to_c * c).sum((0, 1)) + f.sign() * (to_r * r).sum((0, 1)))
        return (to_c * f).flatten(1), (to_r * f.abs()).flatten(1)

    def _link_box(self, link: Link, stage: Stage, g_c: Tensor, g_r: Tensor) -> None:
        c, r = self.held[link.source].after
        wanted = link.source > 0 or self.input_too
        if link.at is None:
            if wanted:
                self._add_box(link.source, signed(g_c, link.sign), g_r)
            return
        w = signed(self.given.weights[link.at], link.sign)
        if r.shape[0] != c.shape[0] and g_r.shape[0] == c.shape[0]:  # a radius for all, and a gradient for each
            g_r = g_r.sum(0, keepdim=True)
        elif r.shape[0] == c.shape[0] and g_r.shape[0] != c.shape[0]:
            r = r[:1]
        before = self.stages[link.source].shape
        if link.dense:
            c, r = channels_first(c, before), channels_first(r, before)
            c, r, w, g_c, g_r = tensors = [dense(t) for t in (c, r, w, g_c, g_r)]
            to_c, to_r = ((torch.empty_like(t) if wanted else None) for t in (c, r))
            to_w = torch.zeros_like(w)
            _C.bounds_interval_grad(
                *(t.data_ptr() for t in tensors), to_w.data_ptr(), address(to_c), address(to_r), c.shape[0], r.shape[0], c.shape[1], stage.size
            )  # fmt: skip
            self._add_weight(link, to_w)
            if to_c is not None and to_r is not None:
                to_c, to_r = channels_last(to_c, before), channels_last(to_r, before)
        else:
            g_c, g_r, c, r, w = (dense(t) for t in (g_c, g_r, c, r, w))
            grads = image_of(g_c, stage.shape), image_of(g_r, stage.shape)
            maps = image_of(c, before), image_of(r, before)
            self._add_weight(link, conv.interval_weight_gradient(*maps, w, *grads, link.stride, link.padding))
            if wanted:
                taps = taps_of(w, lanes_of(w))
                to_c, to_r = (
                    spread(t, v, stage.shape, before, w.shape[2:], link) for t, v in ((g_c, taps), (g_r, taps.abs()))
                )
        if wanted:
            self._add_box(link.source, to_c, to_r)

    # -- sums ----------------------------------------------------------------------------------------------------------
    def _add_box(self, i: int, to_c: Any, to_r: Any) -> None:
        own = self.to_boxes.get(i)
        self.to_boxes[i] = (to_c, to_r) if own is None else (own[0] + to_c, own[1] + to_r)

    def _add_weight(self, link: Link, to_w: Any) -> None:
        assert link.at is not None
        to_w, own = signed(to_w, link.sign), self.to_weights[link.at]
        self.to_weights[link.at] = to_w if own is None else own + to_w

    def _add_bias(self, stage: Stage, to_bias: Tensor) -> None:
        for at, sign in stage.biases:
            own = self.to_biases[at]
            self.to_biases[at] = signed(to_bias, sign) if own is None else own + signed(to_bias, sign)

    def _add_scale(self, at: int, to: Tensor) -> None:
        to = to.sum(0, keepdim=True) if len(self.given.scales[at]) == 1 else to
        own = self.to_scales[at]
        self.to_scales[at] = to if own is None else own + to
