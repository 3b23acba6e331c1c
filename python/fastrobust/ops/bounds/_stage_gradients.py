"""Gradients of :mod:`fastrobust.ops.bounds.stages`, by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...reference.relaxations import interval_activation
from .._library import on_cpu
from . import _autograd as gradients
from . import _chain as chain
from . import _conv as conv
from . import _lines, linear
from ._live import live_gradient
from ._pool import relax_max_pool
from ._product import matrix_product
from ._relu_box import is_shared, relu_box_gradient
from ._rows import address, dense, lanes_of, taps_of
from ._stage import (
    Heads,
    Held,
    Link,
    Parameters,
    Rows,
    Stage,
    by_channel,
    channels_first,
    channels_last,
    flat_of,
    image_of,
    signed,
)
from ._stage_boxes import max_pool
from ._stage_live import Chain, conv_steps, from_signs, groups_of, only_link, signs_pay
from .intervals import CENTER
from .stages import Told, forward, graph_of, spread

Pair = tuple[Any, Any]


class Margins(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        stages: list[Stage],
        at: list[int],
        shared: bool,
        rows: Rows,
        kind: str | None,
        keep: bool,
        counts: list[int],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.kept = {}
        ctx.told = stages, at, shared, rows, kind, counts
        heads, given = _parts(at, counts, tensors)
        found = forward(stages, given, heads, tensors[0], tensors[1], shared, rows, kind, keep, ctx.kept)
        found = tuple(t.detach() for t in found)  # what is kept must not hold what is returned
        ctx.save_for_backward(*tensors, *found[: len(found) - 1])
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        stages, at, shared, rows, kind, counts = ctx.told
        need = ctx.needs_input_grad[7:]
        heads, given = _parts(at, counts, ctx.saved_tensors[: len(need)])
        work = _Backward(stages, heads, given, shared, rows, kind, ctx.kept, grads, need[0] or need[1])
        return (*[None] * 7, *(t if n else None for t, n in zip(work.run(), need, strict=True)))


def _parts(at: list[int], counts: list[int], tensors: Any) -> tuple[Heads, Parameters]:
    rest = list(tensors[2:])
    heads = Heads(at, rest[1 : 1 + len(at)], rest[0])
    parts, start = [], 1 + len(at)
    for count in counts:
        parts.append(rest[start : start + count])
        start += count
    return heads, Parameters(*parts)


class _Backward:
    def __init__(
        self,
        stages: list[Stage],
        heads: Heads,
        given: Parameters,
        shared: bool,
        rows: Rows,
        kind: str | None,
        kept: dict[str, Any],
        grads: tuple[Tensor, ...],
        input_too: bool,
    ):
        self.stages, self.heads, self.given, self.shared, self.rows, self.kind = (
            stages,
            heads,
            given,
            shared,
            rows,
            kind,
        )
        self.held: list[Held] = kept["held"]
        self.kept: dict[Any, Any] = dict(kept.get("rows", {}))
        # of the bounds, or of the rows at the input and of their offsets
        self.g, self.of_map = dense(grads[-1]), dense(grads[0]) if len(grads) > 1 else None
        self.input_too = input_too
        self.to_weights: list[Any] = [None] * len(given.weights)
        self.to_biases: list[Any] = [None] * len(given.biases)
        self.to_scales: list[Any] = [None] * len(given.scales)
        self.to_given: list[Any] = [None] * len(given.boxes)
        self.to_matrices: list[Any] = [None] * len(heads.stages)
        self.to_lines: dict[int, Any] = {}
        self.to_boxes: dict[int, Pair] = {}  # of centre and radius behind a stage
        self.through: dict[int, Tensor] = {}  # of W c, where the rows tell it
        self.groups = groups_of(rows, len(self.held[0].center), self.g.device)

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
        found = [
            *to_input,
            offset,
            *self.to_matrices,
            *self.to_weights,
            *self.to_biases,
            *self.to_scales,
            *self.to_given,
        ]
        tensors = [
            *self.held[0][:2],
            self.heads.offset,
            *self.heads.matrices,
            *(t for part in self.given for t in part),
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
        if "chain" in self.kept:
            self._from_chain(self.kept["chain"], to_reached, entry)
        elif (i := self._first(entry)) and self._from_first(i, to_reached, entry):
            self.kept.pop(i, None)
        elif 0 in self.kept:
            A, pick, _ = self.kept[0]
            self._arrived(0, self._ended(A, pick), to_reached, entry)
        else:
            self._from_kernel(self.kept["kernel"], to_reached, entry)
        for i in range(1, len(self.stages)):
            if i in self.kept:
                self._arrived(i, self._up(i, to_reached), to_reached, entry)

    def _from_chain(self, below: Chain, to_reached: dict[int, Tensor], entry: dict[int, int]) -> None:
        """ReLUs and convolutions in one kernel, down to the input."""
        wanted, box, steps = self.input_too, self.held[0][:2], conv_steps(below.steps)
        need = (wanted, wanted, [True] * len(steps))
        to_a, to_c, to_r, of_steps = chain.chain_gradient(
            below.A, self.rows.example, *below.pick, *box, steps, self.g, need, below.between, self.groups, True
        )
        if wanted:
            self._add_box(0, to_c, to_r)
        for i, (slopes, intercepts, to_w) in zip(below.order, of_steps, strict=True):
            self.to_lines[i] = slopes, intercepts
            self._add_weight(self.stages[i].links[0], to_w)
        self._arrived(below.order[0], to_a, to_reached, entry)

    def _first(self, entry: dict[int, int]) -> int:
        """The stage of a first dense layer through which alone rows reach the input; 0 where there is none."""
        if "living" in self.kept:
            return int(self.kept["living"].order[0])
        if self.of_map is not None or 0 not in self.kept or 0 in entry or not on_cpu(self.g):
            return 0
        read = [i for i, s in enumerate(self.stages) if any(link.source == 0 for link in s.links)]
        link = only_link(self.stages[read[0]]) if len(read) == 1 else None
        return read[0] if link is not None and link.dense else 0

    def _from_first(self, i: int, to_reached: dict[int, Tensor], entry: dict[int, int]) -> bool:
        """From the input up through the first layer; False where the usual way is the better one."""
        stage, at, rows = self.stages[i], self.held[i], self.rows
        link, before, live = stage.links[0], self.stages[0].shape, self.kept.get("living")
        assert link.at is not None
        w, lines = self.given.weights[link.at], (at.slopes, at.intercepts)
        A, pick, scaled = self.kept[i] if live is None else (live.A, live.pick, None)
        below = self.kept[0].A if live is None else live.between[0]
        found = None
        if signs_pay(self.shared, at.living):
            if scaled is None:
                args: list[Any] = [A, torch.zeros_like(self.g), *lines, rows.example, *pick, None, None, []]
                scaled = linear._back_kernel(*args)[0]
            flat = channels_first(below.flatten(0, 1), before).view(below.shape)
            given = (flat, scaled, dense(w), at.bias, at.center)
            found = from_signs(*given, self.held[0].radius[0], self.g, rows.example)
        if found is not None:
            to_scaled, to_w, self.through[i] = found
            args = [A, self.g, *lines, rows.example, *pick, None, None, []]
            to_a, *self.to_lines[i] = gradients.back_rows_kernel(args, to_scaled, self.g, self.groups)
            self._add_weight(link, to_w)
        elif live is not None:
            to_below = self._ended(below, (None, None))
            to_a, self.to_lines[i], to_w = live_gradient(
                A, pick[0], pick[1], rows.example, live.steps[0], to_below, self.g, self.groups
            )
            self._add_weight(link, channels_first(to_w, before))
            if pick[0] is not None:  # of the whole matrix
                self.to_matrices[entry[i]] = to_a
                return True
        else:
            return False
        self._arrived(i, to_a, to_reached, entry)
        return True

    def _ended(self, A: Tensor, pick: Pair) -> Tensor:
        """The gradient of the rows at the input."""
        if self.of_map is not None:
            return self.of_map
        need = [False] * 5 + [self.input_too] * 2
        args: list[Any] = [A, self.g, self.rows.example, *pick, *self.held[0][:2], None, None, 1.0, None, None, []]
        to_a, to_c, to_r = gradients.concretize_rows_kernel(args, need, self.g, self.groups)
        if self.input_too:
            self._add_box(0, to_c, to_r)
        return to_a

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
            taps.append(None if link.kind != _C.LinkKind.conv else g.new_empty(self.stages[j].shape[0], link.lanes))
            to_weights.append(address(taps[-1]))
        args = self.rows.example.data_ptr(), self.groups[0].data_ptr(), g.data_ptr()
        box = self.held[0].center, self.held[0].radius
        if self.of_map is None:
            to_c, to_r = (torch.empty_like(t) if self.input_too else None for t in box)
            graph = graph_of(told, box, g)
            _C.bounds_stage_grad(graph, *args, to_stages, to_weights, address(to_c), address(to_r))
            if self.input_too:
                self._add_box(0, to_c, to_r)
        else:
            graph = graph_of(told, None, g)
            _C.bounds_stage_grad(graph, *args, to_stages, to_weights, 0, 0, from_map=self.of_map.data_ptr())
        for i, lines, start in starting:
            if start is not None:
                self._arrived(i, start, to_reached, entry)
            if lines[0] is None or lines[1] is None:
                continue
            if self.stages[i].relaxed:
                self.to_lines[i] = lines
            else:
                self._shared_lines(
                    self.stages[i],
                    i,
                    by_channel(lines[0], self.stages[i].shape).sum((0, 1, 2)),
                    by_channel(lines[1], self.stages[i].shape).sum((0, 1, 2)),
                )
        for (_, own), t in zip(told.link_of, taps, strict=True):
            if t is None or own.at is None:
                continue
            o, c, kh, kw = self.given.weights[own.at].shape
            self._add_weight(own, t[:, : kh * kw * c].view(o, kh, kw, c).permute(0, 3, 1, 2))

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
            found = self._link_up(link, stage, scaled, to_reached[link.source], self.held[i].index)
            to_scaled = found if to_scaled is None else to_scaled + found
        if not stage.relaxed:
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

    def _link_up(self, link: Link, stage: Stage, scaled: Tensor, to_down: Tensor, index: Tensor | None) -> Tensor:
        if to_down.shape[0] != scaled.shape[0]:  # others brought two sides to the source
            to_down = to_down.sum(0, keepdim=True)
        if index is not None:
            return to_down.gather(2, index.long()[self.rows.example].expand_as(scaled))
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
        args = [image_of(rows, stage.shape), w, link.stride, link.padding, source[1:], link.dilation, link.groups]
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
        if stage.box is not None:
            self.to_given[2 * stage.box : 2 * stage.box + 2] = after
            return
        if stage.kind == "max":
            self._max_up(stage, at, lines, after)
            return
        if stage.kind == "relu":
            shared = is_shared(at.center, at.radius)
            told = shared, at.bias, stage.shape[0], self.kind == "crown"
            g_c, g_r, to_bias = relu_box_gradient(at.center, at.radius, *told, lines, after)
            if i in self.through:
                g_c += self.through[i]
        elif stage.relaxed:
            g_c, g_r, to_bias = self._activation_up(stage, at, lines, after)
        else:
            g_c, g_r = self._scale_up(stage, at, *after)
            to_bias = by_channel(g_c, stage.shape).sum((0, 1))
        self._add_bias(stage, to_bias)
        for link in stage.links:
            self._link_box(link, stage, g_c, g_r)

    def _activation_up(self, stage: Stage, at: Held, lines: Any, after: Pair) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of centre, radius and bias: the intercepts hold slope * bias."""
        low, up = at.center - at.radius, at.center + at.radius
        to_low: Any = None
        to_up: Any = None
        through = at.center.new_zeros(())
        if lines is not None:
            to_slopes, to_intercepts = lines
            if at.bias is not None:
                slopes, behind = by_channel(at.slopes, stage.shape), by_channel(to_intercepts, stage.shape)
                through = (slopes * behind).sum((0, 1, 2))
                shifted = (behind * at.bias).flatten(2)
                to_slopes = to_slopes + (shifted if len(slopes) == 2 else shifted.sum(0, keepdim=True))
            told = _lines.told(stage.kind, stage.params)
            to_low, to_up = _lines._grad_kernel(low, up, to_slopes, to_intercepts, *told, self.kind == "crown")
        if after[0] is not None:  # centre and radius of the range
            ends = 0.5 * (after[0] - after[1]), 0.5 * (after[0] + after[1])
            with torch.enable_grad():
                found = low.requires_grad_(), up.requires_grad_()
                own = torch.autograd.grad(interval_activation(*found, stage.kind, stage.params), found, ends)
            to_low, to_up = own if to_low is None else (to_low + own[0], to_up + own[1])
        g_c, g_r = to_low + to_up, to_up - to_low
        to_bias = by_channel(g_c, stage.shape).sum((0, 1)) + through
        return g_c, g_r if at.radius.shape[0] == len(g_r) else g_r.sum(0, keepdim=True), to_bias

    def _max_up(self, stage: Stage, at: Held, lines: Any, after: Pair) -> None:
        link = stage.links[0]
        assert link.window is not None
        shape = self.stages[link.source].shape
        with torch.enable_grad():
            ends = [t.requires_grad_() for t in (at.center - at.radius, at.center + at.radius)]
            images = [image_of(t, shape) for t in ends]
            made: list[Tensor] = []
            given: list[Tensor] = []
            if lines is not None:
                assert self.kind is not None
                made += relax_max_pool(images[0], images[1], link.window, self.kind)[:2]
                given += [image_of(t, stage.shape).unflatten(0, t.shape[:2]) for t in lines]
            if after[0] is not None:
                made += [max_pool(t, link.window) for t in images]
                given += [image_of(0.5 * t, stage.shape) for t in (after[0] - after[1], after[0] + after[1])]
            pairs = [(m, t) for m, t in zip(made, given, strict=True) if m.requires_grad]  # a single slope is 1
            to_low, to_up = torch.autograd.grad([m for m, _ in pairs], ends, [t for _, t in pairs])
        self._add_box(link.source, to_low + to_up, to_up - to_low)

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
        to_c: Any = None
        to_r: Any = None
        to_w: Any = None
        if link.dense:
            c, r = channels_first(c, before), channels_first(r, before)
            c, r, w, g_c, g_r = [dense(t) for t in (c, r, w, g_c, g_r)]
            if on_cpu(w):
                to_c, to_r = ((torch.empty_like(t) if wanted else None) for t in (c, r))
                # the kernel adds to what is there
                own = self.to_weights[link.at] if link.sign > 0 else None
                to_w = torch.zeros_like(w) if own is None else dense(own)
                if own is not None:
                    self.to_weights[link.at] = None
                sizes = c.shape[0], r.shape[0], c.shape[1], stage.size
                _C.bounds_interval_grad(
                    c.data_ptr(), r.data_ptr(), w.data_ptr(), g_c.data_ptr(), g_r.data_ptr(), to_w.data_ptr(),
                    address(to_c), address(to_r), *sizes,
                )  # fmt: skip
            else:
                need = (wanted, wanted, True)
                to_c, to_r, to_w, *_ = gradients.interval([c, r, w, None, CENTER], need, g_c, g_r)
            self._add_weight(link, to_w)
            if to_c is not None and to_r is not None:
                to_c, to_r = channels_last(to_c, before), channels_last(to_r, before)
        else:
            g_c, g_r, c, r, w = (dense(t) for t in (g_c, g_r, c, r, w))
            grads = image_of(g_c, stage.shape), image_of(g_r, stage.shape)
            maps = image_of(c, before), image_of(r, before)
            apart = link.dilation, link.groups
            if not on_cpu(w):
                args = [*maps, w, None, link.stride, link.padding, CENTER, *apart]
                to_c, to_r, to_w, *_ = gradients.interval_conv(args, (wanted, wanted, True), *grads)
                to_c, to_r = (None if t is None else flat_of(t) for t in (to_c, to_r))
            else:
                to_w = conv.interval_weight_gradient(*maps, w, *grads, link.stride, link.padding, *apart)
            self._add_weight(link, to_w)
            if wanted and on_cpu(w):
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
