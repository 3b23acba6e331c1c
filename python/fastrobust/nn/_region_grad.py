"""The program of a region's input gradient."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..ops.binary import _feature_maps as fm
from ..ops.binary._dense_conv import input_grad
from ..ops.binary._feature_maps import Maps
from ._group import Gates, Graph, Group, act_code, as_plain, fresh, mean_scale, mean_weight
from ._nodes import Concat, Flatten, MaxPool, Mean, Node, Spread, Torch, Unit
from ._schedule import ARENA, Buffer, Compiled, Schedule, State


class Backward:
    """Writes the program of the input gradient of one group."""

    def __init__(
        self, region: Graph, group: Group, gates: Gates, state: State, parts: list[Tensor], wanted: tuple[bool, ...],
    ) -> None:  # fmt: skip
        self.region, self.group, self.s = region, group, Schedule()
        self.cpu = fm.device_of(parts[0])[0] < 0
        arena = self.s.given()
        given = [self.s.given(shape=tuple(x.shape), strides=x.stride()) for x in parts]
        count = len(given) - region.inputs
        self.targets = given[count:]
        # Gradients that have come together for each value, by layout.
        self.sums: dict[int, dict[Any, Buffer]] = {}
        outputs = [v for v, w in zip(region.outputs, wanted, strict=True) if w]
        for v, buffer in zip(outputs, given[:count], strict=True):
            self.sums[v] = {buffer.form: buffer}
        # What the forward run left, as this program sees it.
        self.results: list[int] = []
        self.gates: Gates = {}
        for i, by_form in gates.items():
            for form, buffer in by_form.items():
                if buffer.base == ARENA:
                    seen = dataclasses.replace(buffer, base=arena.base)
                else:
                    seen = self.s.given(buffer)
                    self.results.append(buffer.base)
                self.gates.setdefault(i, {})[form] = seen

    def compile(self) -> tuple[Compiled, list[int]]:
        nodes, waiting = self.region.nodes, collections.Counter[int]()
        for node in nodes:
            waiting.update(node.reads)
        ready: dict[int, tuple[Buffer, Buffer]] = {}  # gradient after the activation's gate; the same times the scale
        for i in range(len(nodes) - 1, -1, -1):
            node = nodes[i]
            waiting.subtract(node.reads)
            if i not in ready and i not in self.sums:
                continue
            if not isinstance(node, Unit):
                self._node(i, node)
                continue
            before, scaled = ready.pop(i) if i in ready else self._finish(i, node)
            if node.residual is not None:
                self._add(node.residual, before)
            if self.group.reads[i].dense:
                self._dense(i, node, before)
                continue
            both = self._gather(i, node, scaled, waiting[node.source] == 0)
            if both is not None:
                ready[node.source] = both
        for i, target in enumerate(self.targets):
            parts = list(self.sums.get(-1 - i, {}).values())
            if len(parts) > 1:
                parts = [self._collect(parts, None)]
            if parts:
                self.s.copy(parts[0], target)
            else:
                self.s.call_into(lambda out: out.zero_(), [], target)
        return self.s.compile(), self.results

    # ---- convolutions ----

    def _gather(self, i: int, unit: Unit, grad: Buffer, last: bool) -> tuple[Buffer, Buffer] | None:
        """Adds the gradient of a sparse unit's source; when it was the last to come, and gate and scale of what
        made the source fit into the same write, returns what `ready` holds."""
        how, source = self.group.reads[i], unit.source
        target, have = how.read, self.sums.setdefault(source, {})
        assert unit.packed is not None
        lists = fm.plan(unit.packed, unit.geometry, how.write, True, self.cpu)
        residual = have.pop(target, None)
        x = self._as(grad, how.write)
        maker = self.region.nodes[source] if source >= 0 else None
        fits = isinstance(maker, Unit) and not self.group.reads[source].dense
        if isinstance(maker, Unit) and fits and act_code(maker):
            fits = self._gate(source, target) is not None
        if not (last and fits) or have:
            out, _, _ = self.s.gather(x, target, lists, residual=residual)
            have[target] = out
            return None
        del self.sums[source]
        assert isinstance(maker, Unit)
        return self._close(source, maker, x, target, lists, residual)

    def _gate(self, v: int, form: Maps) -> Buffer | None:
        return self.gates.get(v, {}).get(form)

    def _close(
        self, v: int, unit: Unit, x: Buffer, target: Maps, lists: fm.Plan, residual: Buffer | None
    ) -> tuple[Buffer, Buffer]:
        """One write of sum, gate and scale of the sparse unit v, in its own layout at the end."""
        native = self.group.native[v]
        gate = self._gate(v, target) if act_code(unit) else None
        need = unit.residual is not None and unit.scale is not None
        out, before, _ = self.s.gather(
            x, target, lists, residual=residual, gate=gate, gate_act=unit.act, pre=need, post=unit.scale
        )
        scaled = self._as(out, native)
        return (scaled if before is None else self._as(before, native)), scaled

    def _finish(self, v: int, unit: Unit) -> tuple[Buffer, Buffer]:
        """Gate and scale of unit v when its last gradient did not come from a sparse convolution."""
        parts = list(self.sums.pop(v).values())
        if self.group.reads[v].dense:
            total = self._collect(parts, None)
            if act_code(unit):
                (gate,) = [b for form, b in self.gates[v].items() if not isinstance(form, Maps)]
                total = self.s.call(unit.act.gradient, [total, gate], gate.shape)
            return total, total
        native = self.group.native[v]
        total = self._collect(parts, native)
        if not act_code(unit) and unit.scale is None:
            return total, total
        return self._close(v, unit, total, native, self._nothing(native), total)

    def _nothing(self, maps: Maps) -> fm.Plan:
        """Lists without entries: nothing but the epilogue."""
        ptr = torch.zeros(2 * maps.channels + 1, dtype=torch.int32, device=self.region.device)
        return fm.Plan(ptr, ptr[:0], maps.channels)

    def _dense(self, i: int, unit: Unit, grad: Buffer) -> None:
        size = self.group.native[unit.source].size
        if unit.kind == "affine" and unit.scale is None:
            self._add(unit.source, grad)
            return
        x = self.s.call(lambda g: unit.linear_grad(g, size, input_grad), [self._as(grad, None)], size)
        self._add(unit.source, x)

    # ---- everything else ----

    def _node(self, i: int, node: Node) -> None:
        parts, native = list(self.sums.pop(i).values()), self.group.native
        if self.group.reads[i].dense or isinstance(node, Torch):
            self._by_torch(i, node, self._collect(parts, None))
            return
        grad, source = self._collect(parts, native[i]), native[node.source]
        if isinstance(node, Concat):
            begin = 0
            for v in node.parts:
                self._add(v, self.s.part(grad, begin, native[v]))
                begin += native[v].channels
        elif isinstance(node, MaxPool):
            self._add(node.source, self.s.max_pool_grad(grad, self.gates[i][native[i]], source, node.window))
        elif isinstance(node, Flatten):
            self._add(node.source, self.s.unflatten(grad, source))
        elif isinstance(node, Mean):
            post = mean_scale(node, source)
            each, _, _ = self.s.gather(grad, native[i], self._nothing(native[i]), residual=grad, post=post)
            self._add(node.source, self.s.spread(each, source))
        else:
            assert isinstance(node, Spread)
            lists = fm.plan(*mean_weight(node, native[i]), native[i], False)
            total, _, _ = self.s.gather(grad, source, lists)
            self._add(node.source, total)

    def _by_torch(self, i: int, node: Node, grad: Buffer) -> None:
        native = self.group.native
        sizes = [native[v].size for v in node.reads]
        if isinstance(node, Torch):
            reads = [grad, self.gates[i]["graph"]]
            for v, x in zip(node.reads, self.s.calls(node.gradients, reads, sizes), strict=True):
                self._add(v, x)
            return
        if isinstance(node, Concat):
            begin = 0
            for v, size in zip(node.parts, sizes, strict=True):
                end = begin + size[1]
                self._add(v, self.s.call(lambda g, a=begin, b=end: fresh(g[:, a:b]), [grad], size))
                begin = end
            return
        (size,) = sizes
        if isinstance(node, MaxPool):
            like = torch.empty(size, dtype=torch.float32, device=self.region.device, memory_format=torch.channels_last)
            back = torch.ops.aten.max_pool2d_with_indices_backward
            x = self.s.call(
                lambda g, where: back(g, like, *node.arguments, where), [grad, self.gates[i]["where"]], size
            )
        elif isinstance(node, Flatten):
            x = self.s.call(lambda g: fresh(g.reshape(size)), [grad], size)
        elif isinstance(node, Mean):
            x = self.s.call(lambda g: fresh((g / (size[2] * size[3])).expand(size)), [grad], size)
        else:
            x = self.s.call(lambda g: g.sum((2, 3), keepdim=True), [grad], size)
        self._add(node.source, x)

    # ---- sums ----

    def _as(self, buffer: Buffer, maps: Maps | None) -> Buffer:
        if buffer.maps == maps:
            return buffer
        return self.s.copy(buffer, as_plain(buffer) if maps is None else Buffer(ARENA, maps))

    def _add(self, v: int, grad: Buffer) -> None:
        have = self.sums.setdefault(v, {})
        while (other := have.pop(grad.form, None)) is not None:
            grad = self._sum(other, grad)  # in a layout of its own choice, which may be there, too
        have[grad.form] = grad

    def _sum(self, a: Buffer, b: Buffer) -> Buffer:
        target = as_plain(a) if a.maps is None else Buffer(ARENA, a.maps)
        return self.s.call_into(lambda a, b, out: torch.add(a, b, out=out), [a, b], target)

    def _collect(self, parts: list[Buffer], maps: Maps | None) -> Buffer:
        total = self._as(parts[0], maps)
        for part in parts[1:]:
            total = self._sum(total, self._as(part, maps))
        return total
