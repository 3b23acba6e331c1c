"""The program of a region's outputs."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..ops.binary import _feature_maps as fm
from ..ops.binary._feature_maps import Maps
from ._group import Gates, Graph, Group, Read, act_code, as_plain, fresh, mean_plan, mean_scale, rows_of
from ._nodes import Concat, Flatten, MaxPool, Mean, Node, Spread, Torch, Unit
from ._schedule import ARENA, Buffer, Compiled, Schedule, sides


class Forward:
    """Writes the program of the outputs of one group."""

    def __init__(self, region: Graph, group: Group, parts: list[Tensor], keep: bool, copied: list[bool]) -> None:
        self.region, self.group, self.keep, self.s = region, group, keep, Schedule()
        self.cpu = fm.device_of(parts[0])[0] < 0
        given = [self.s.given(shape=tuple(x.shape), strides=x.stride()) for x in parts]
        self.forms: dict[int, dict[Any, Buffer]] = {-1 - i: {given[i].form: given[i]} for i in range(region.inputs)}
        self.gates: Gates = {}
        self.extra: list[Buffer] = []
        for i, (node, how) in enumerate(zip(region.nodes, group.reads, strict=True)):
            if isinstance(node, Unit):
                out = self._dense_unit(i, node) if how.dense else self._sparse_unit(i, node, how)
            elif how.dense or isinstance(node, Torch):
                out = self._dense(i, node)
            else:
                out = self._sparse(i, node, how)
            self.forms[i] = {out.form: out, **self.forms.get(i, {})}
        targets = iter(given[region.inputs :])
        self.made: list[tuple[int, Buffer]] = []
        for k, v in enumerate(region.outputs):
            source = next(iter(self.forms[v].values()))
            if copied[k]:
                self.s.copy(source, next(targets))
            elif any(source is b for by in self.gates.values() for b in by.values()) or (
                keep and isinstance(region.nodes[v], Torch)
            ):
                # The gradient reads it, or torch may have saved it, and whoever is given it may write into it.
                self.made.append((k, self.s.call(torch.clone, [source], source.shape)))
            else:
                self.made.append((k, source))

    def compile(self) -> tuple[Compiled, Gates, list[tuple[int, int]]]:
        for i, (node, how) in enumerate(zip(self.region.nodes, self.group.reads, strict=True)):
            if self.keep and isinstance(node, Unit) and node.act.by_value:
                # Other forms of the result tell as much.
                more = {f: b for f, b in self.forms[i].items() if isinstance(f, Maps) != how.dense}
                self.gates[i] = {**more, **self.gates.get(i, {})}
        keep = [b for by_form in self.gates.values() for b in by_form.values()]
        program = self.s.compile([*keep, *(b for _, b in self.made)])
        return program, self.gates, [(k, b.base) for k, b in self.made]

    def _form(self, v: int, maps: Maps | None) -> Buffer:
        """A value as `maps`, or as a plain tensor for None; copied at the first request."""
        forms = self.forms[v]
        source = next(iter(forms.values()))
        target = Buffer(ARENA, maps) if maps is not None else as_plain(source)
        if target.form not in forms:
            made = self.s.copy(source, target)
            forms[made.form] = made
        return forms[target.form]

    def _shape(self, i: int) -> tuple[int, ...]:
        return self.group.native[i].size

    # ---- in the fast layout ----

    def _sparse_unit(self, i: int, unit: Unit, how: Read) -> Buffer:
        assert unit.packed is not None
        read, lists = how.read, None
        if not self.keep and self.cpu:
            native = self.group.native[unit.source]
            lists = fm.strided_plan(unit.packed, unit.geometry, native, (how.write.height, how.write.width))
            read = how.read if lists is None else native
        if lists is None:
            lists = fm.plan(unit.packed, unit.geometry, how.read, False, self.cpu)
        x = self._form(unit.source, read)
        residual = None if unit.residual is None else self._form(unit.residual, how.write)
        kept, act = self.keep and bool(act_code(unit)), unit.act
        # Bits spare the gradient to read and the forward to keep all values; on CUDA the result itself tells.
        bits = sides(how.write) if kept and act.sided and self.cpu else None
        out, _, slopes = self.s.gather(
            x, how.write, lists, residual=residual, scale=unit.scale, shift=unit.shift, act=act,
            slopes=kept and bits is None and not act.by_value, passed=bits,
        )  # fmt: skip
        gate = bits or slopes
        if gate is not None:
            self.gates[i] = {how.write: gate}
        return out

    def _sparse(self, i: int, node: Node, how: Read) -> Buffer:
        target = how.write
        if isinstance(node, Concat):
            return self.s.concat([self._form(v, self._own(v)) for v in node.parts], target)
        x = self._form(node.source, self._own(node.source))
        if isinstance(node, MaxPool):
            out, where = self.s.max_pool(x, target, node.window, self.keep)
            if where is not None:
                self.gates[i] = {target: where}
            return out
        if isinstance(node, Flatten):
            return self.s.flatten(x, target)
        if isinstance(node, Spread):
            return self.s.spread(x, target)
        assert isinstance(node, Mean) and x.maps is not None
        out, _, _ = self.s.gather(x, target, mean_plan(node, x.maps), scale=mean_scale(node, x.maps))
        return out

    def _own(self, v: int) -> Maps:
        return self.group.native[v]

    # ---- by torch ----

    def _dense_unit(self, i: int, unit: Unit) -> Buffer:
        x = self._form(unit.source, None)
        added = [] if unit.residual is None else [self._form(unit.residual, None)]
        act = unit.act
        apart = self.keep and bool(act_code(unit)) and not act.by_value

        def linear(x: Tensor, *added: Tensor) -> Tensor:
            y = unit.linear(x)
            for t in added:
                y.add_(t)
            return y if apart else act.inplace(y)

        out = self.s.call(linear, [x, *added], self._shape(i))
        if self.keep and act_code(unit):
            self.gates[i] = {out.form: out}
        return self.s.call(act, [out], self._shape(i)) if apart else out

    def _dense(self, i: int, node: Node) -> Buffer:
        shape = self._shape(i)
        xs = [self._form(v, None) for v in node.reads]
        if isinstance(node, MaxPool):
            arguments = node.arguments
            if self.keep:
                find = torch.ops.aten.max_pool2d_with_indices
                out, where = self.s.calls(lambda x: find(x, *arguments), xs, [shape, None])
                self.gates[i] = {"where": where}
                return out
            return self.s.call(lambda x: torch.max_pool2d(x, *arguments), xs, shape)
        if isinstance(node, Torch):
            if not self.keep:
                return self.s.call(node.run, xs, shape)
            owned = [x.base == ARENA or x.base > self.s.given_count for x in xs]
            out, graph = self.s.calls(functools.partial(node.recorded, owned), xs, [shape, None])
            # What torch has saved of its arguments must stay as it is.
            self.gates[i] = {"graph": graph, **{("kept", j): x for j, x in enumerate(xs)}}
            return out
        runs: dict[type, Any] = {
            Concat: lambda *xs: torch.cat(xs, 1),
            Flatten: rows_of,
            Mean: lambda x: x.mean((2, 3), keepdim=True),
            Spread: lambda x: fresh(x.expand(shape)),
        }
        return self.s.call(runs[type(node)], xs, shape)
