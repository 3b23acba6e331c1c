"""A chain or graph of masked convolutions that stays in the fast layout, forward and input gradient.

A unit is one convolution with what follows it in one write: scale and shift (eval-mode batch
normalisation, magnitude, bias), residual, ReLU. Batches are done in groups of images small enough
for the caches; each group runs through all units before the next.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from ..ops import _conv_cost as cost
from ..ops import _feature_maps as fm
from ..ops import binary as ops
from ..ops._feature_maps import ConvGeometry, Maps
from ..reference.binary import PackedWeight, epilogue

# Floats of the largest feature map of a group of images.
GROUP_FLOATS = 5 << 18


@dataclasses.dataclass(eq=False)
class Unit:
    """One convolution. Values are numbered; -1 - i is the i-th input of the region."""

    name: str
    source: int
    packed: PackedWeight
    geometry: ConvGeometry
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: int | None = None
    relu: bool = False

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return fm.conv_shape(self.packed.shape)


class Pool:
    """Buffers by size. Fresh pages are slow; what a forward keeps for its backward comes back here."""

    def __init__(self) -> None:
        self.free: dict[tuple[int, int], list[Tensor]] = {}

    def take(self, maps: Maps, like: Tensor) -> Buffer:
        size = maps.blocks * maps.block + fm.SLACK
        stack = self.free.setdefault((size, like.get_device()), [])
        return Buffer(stack.pop() if stack else torch.empty(size, device=like.device), stack)


class Buffer:
    """A tensor that returns to its pool when nobody refers to it any more."""

    __slots__ = ("data", "home")

    def __init__(self, data: Tensor, home: list[Tensor]) -> None:
        self.data, self.home = data, home

    def __del__(self) -> None:
        self.home.append(self.data)


@dataclasses.dataclass
class Read:
    """How a unit runs on one map size: the layouts of what it reads and writes, and its lists."""

    read: Maps
    write: Maps
    choice: cost.Choice
    forward: fm.Plan | None
    backward: fm.Plan | None = None


@dataclasses.dataclass
class Resolved:
    """Everything about one batch size and map size."""

    lanes: int
    step: int  # images per group
    sizes: list[tuple[int, int]]  # of the units' outputs
    borders: tuple[int, int]
    groups: dict[int, tuple[list[Read], dict[int, Maps]]]  # by the images of a group


class Region:
    """Units in execution order; `outputs` are the values handed out."""

    def __init__(self, units: list[Unit], inputs: int, outputs: list[int]) -> None:
        self.units, self.inputs, self.outputs = units, inputs, outputs
        self.pool = Pool()
        self.resolved: dict[Any, Resolved] = {}
        self.latest: tuple[list[Read], dict[int, Maps]] | None = None
        last_use: dict[int, int] = {}
        for i, unit in enumerate(units):
            last_use[unit.source] = i
            if unit.residual is not None:
                last_use[unit.residual] = i
        # Values that nobody reads after unit i.
        self.done: list[list[int]] = [[] for _ in units]
        for v, i in last_use.items():
            if v not in outputs:
                self.done[i].append(v)

    def set_units(self, units: list[Unit]) -> None:
        """Other weights and constants for the same graph."""
        self.units = units
        self.resolved.clear()

    # ---- layouts ----

    def resolve(self, batch: int, inputs: list[tuple[int, ...]]) -> Resolved:
        """Groups of images, and the borders that serve every unit, for inputs (C, H, W)."""
        key = (batch, tuple(inputs), cost.forced_path())
        if key in self.resolved:
            return self.resolved[key]
        known: dict[int, tuple[int, int]] = {-1 - i: (s[1], s[2]) for i, s in enumerate(inputs)}
        largest = max(math.prod(s) for s in inputs)
        halo = lead = 0
        for i, unit in enumerate(self.units):
            size, shape, g = known[unit.source], unit.shape, unit.geometry
            known[i] = g.out_size(shape, *size)
            if min(known[i]) < 1:
                raise ValueError(f"x: too small for {unit.name}, which would see a map of {size[0]} x {size[1]}")
            largest = max(largest, shape[0] * math.prod(known[i]))
            read = fm.input_maps(1, shape[1] * g.groups, *size, shape, g, 1)
            grad = fm.grad_maps(1, *size, shape, g, 1)[0]
            halo, lead = max(halo, read.halo, grad.halo), max(lead, read.lead, grad.lead)
        # As many images side by side as fill vectors without waste, fewer where the maps are large.
        wanted = next((n for n in cost.LANES if n >= min(batch, 12)), cost.LANES[-1])
        lanes = max((n for n in cost.LANES if n <= wanted and n * largest <= 4 * GROUP_FLOATS), default=1)
        step = max(1, GROUP_FLOATS // (largest * lanes)) * lanes
        found = Resolved(lanes, step, [known[i] for i in range(len(self.units))], (halo, lead), {})
        self.resolved[key] = found
        return found

    def group(self, how: Resolved, count: int, inputs: list[tuple[int, ...]]) -> tuple[list[Read], dict[int, Maps]]:
        """Layouts of all values and the way every unit runs, for a group of `count` images."""
        if count in how.groups:
            return how.groups[count]
        # A last group of few images is not padded to the lanes of the others.
        lanes, (halo, lead) = min(how.lanes, next(n for n in cost.LANES if n >= min(count, 12))), how.borders
        native = {-1 - i: Maps(count, c, h, w, lanes, w + lead, halo, lead) for i, (c, h, w) in enumerate(inputs)}
        reads = []
        for i, unit in enumerate(self.units):
            given, g, shape, out = native[unit.source], unit.geometry, unit.shape, how.sizes[i]
            choice = cost.choose(
                count, given.height, given.width, shape, g, unit.packed.kept, cost.forced_path(), False
            )
            need = fm.input_maps(count, given.channels, given.height, given.width, shape, g, lanes)
            pitch = max(need.phase_size[1], out[1]) + lead
            read = given
            if need.phases != given.phases or given.pitch < pitch:
                read = Maps(count, given.channels, given.height, given.width, lanes, pitch, halo, lead, need.phases)
            native[i] = Maps(count, shape[0], *out, lanes, read.pitch, halo, lead)
            if unit.residual is not None:
                added, size = native[unit.residual], (shape[0], *out)
                if (added.channels, added.height, added.width) != size:
                    got = (added.channels, added.height, added.width)
                    raise ValueError(f"model: expected what is added after {unit.name} to be of size {size}, got {got}")
            forward = None if choice.path == "dense" else fm.plan(unit.packed, g, read, False)
            reads.append(Read(read, native[i], choice, forward))
        how.groups[count] = (reads, native)
        return how.groups[count]

    def backward_plan(self, i: int, how: Read) -> fm.Plan:
        if how.backward is None:
            how.backward = fm.plan(self.units[i].packed, self.units[i].geometry, how.write, True)
        return how.backward

    # ---- forward ----

    def forward(self, inputs: list[Tensor], keep: bool) -> tuple[list[Tensor], list[Any]]:
        """Outputs, and per group of images what the backward needs (nothing unless `keep`)."""
        batch = inputs[0].shape[0]
        sizes = [tuple(x.shape[1:]) for x in inputs]
        if any(x.shape[0] != batch for x in inputs):
            raise ValueError(f"x: expected equal batch sizes inside the model, got {[x.shape[0] for x in inputs]}")
        how = self.resolve(batch, sizes)
        outs = [inputs[0].new_empty((batch, self.units[v].shape[0], *how.sizes[v])) for v in self.outputs]
        saved = []
        for begin in range(0, batch, how.step):
            parts = [x[begin : begin + how.step] for x in inputs]
            reads, native = self.latest = self.group(how, parts[0].shape[0], sizes)
            values, copies = self._run(parts, reads, native, keep)
            for v, out in zip(self.outputs, outs, strict=True):
                fm.from_maps(values[v].data, native[v], out[begin : begin + how.step])
            if keep:
                saved.append((begin, parts[0].shape[0], values, copies, reads, native))
        return outs, saved

    def _run(
        self, parts: list[Tensor], reads: list[Read], native: dict[int, Maps], keep: bool
    ) -> tuple[dict[int, Buffer], dict[tuple[int, Maps], Buffer]]:
        values: dict[int, Buffer] = {}
        copies: dict[tuple[int, Maps], Buffer] = {}
        for i, x in enumerate(parts):
            values[-1 - i] = self.pool.take(native[-1 - i], x)
            fm.to_maps(x, native[-1 - i], values[-1 - i].data)
        for i, (unit, how) in enumerate(zip(self.units, reads, strict=True)):
            source = values[unit.source]
            if how.read is not native[unit.source]:
                key = (unit.source, how.read)
                if key not in copies:
                    copies[key] = self.pool.take(how.read, source.data)
                    fm.convert_maps(source.data, native[unit.source], how.read, copies[key].data)
                source = copies[key]
            residual = (
                None if unit.residual is None else self._as(values[unit.residual], native[unit.residual], how.write)
            )
            values[i] = self.pool.take(how.write, source.data)
            if how.forward is None:
                self._dense(unit, how, source, residual, values[i])
            else:
                fm.gather(
                    source.data, how.read, how.write, how.forward, scale=unit.scale, shift=unit.shift,
                    residual=None if residual is None else residual.data, relu=unit.relu, out=values[i].data,
                )  # fmt: skip
            if not keep:
                for v in self.done[i]:
                    del values[v]
                    for key in [k for k in copies if k[0] == v]:
                        del copies[key]
        return values, copies

    def _as(self, value: Buffer, have: Maps, want: Maps) -> Buffer:
        if have == want:
            return value
        out = self.pool.take(want, value.data)
        fm.convert_maps(value.data, have, want, out.data)
        return out

    def _plain(self, value: Buffer, maps: Maps) -> Tensor:
        shape = (maps.batch, maps.channels, maps.height, maps.width)
        return fm.from_maps(value.data, maps, torch.empty(shape, device=value.data.device))

    def _dense(self, unit: Unit, how: Read, source: Buffer, residual: Buffer | None, out: Buffer) -> None:
        g = unit.geometry
        x = self._plain(source, how.read)
        y = F.conv2d(x, ops.dense_weight(unit.packed, x), None, g.stride, g.padding, g.dilation, g.groups)
        added = None if residual is None else self._plain(residual, how.write)
        fm.to_maps(epilogue(y, None, unit.scale, unit.shift, added, unit.relu), how.write, out.data)

    # ---- input gradient ----

    def backward(self, grads: list[Tensor | None], saved: list[Any], sizes: list[torch.Size]) -> list[Tensor]:
        out = [torch.empty(size, device=next(g for g in grads if g is not None).device) for size in sizes]
        for begin, count, values, copies, reads, native in saved:
            parts = [None if g is None else g[begin : begin + count] for g in grads]
            inputs = self._run_back(parts, values, copies, reads, native)
            for i, x in enumerate(out):
                v = -1 - i
                if v in inputs:
                    fm.from_maps(inputs[v].data, native[v], x[begin : begin + count])
                else:
                    x[begin : begin + count].zero_()
        return out

    def _run_back(
        self, parts: list[Tensor | None], values: dict[int, Buffer], copies: dict[tuple[int, Maps], Buffer],
        reads: list[Read], native: dict[int, Maps],
    ) -> dict[int, Buffer]:  # fmt: skip
        """Gradients of the region's inputs, in their native layouts."""
        # What has come together for each value: gradients in its native layout or in one it was read in.
        sums: dict[int, dict[Maps, Buffer]] = {}
        waiting: dict[int, int] = {}
        for unit in self.units:
            for v in (unit.source, unit.residual):
                if v is not None:
                    waiting[v] = waiting.get(v, 0) + 1
        for v, grad in zip(self.outputs, parts, strict=True):
            if grad is not None:
                sums[v] = {native[v]: self.pool.take(native[v], grad)}
                fm.to_maps(grad, native[v], sums[v][native[v]].data)
        ready: dict[int, tuple[Buffer, Buffer]] = {}  # gradient after the ReLU's gate; the same times the scale
        for i in range(len(self.units) - 1, -1, -1):
            unit, how = self.units[i], reads[i]
            if i not in ready:
                if i not in sums:
                    for v in (unit.source, unit.residual):
                        if v is not None:
                            waiting[v] -= 1
                    continue
                ready[i] = self._finish(i, sums.pop(i), values, native)
            pre, scaled = ready.pop(i)
            if unit.residual is not None:
                waiting[unit.residual] -= 1
                self._add(sums, unit.residual, self._as(pre, native[i], native[unit.residual]), native[unit.residual])
            v = unit.source
            waiting[v] -= 1
            self._input_grad(i, how, scaled, sums, waiting[v] == 0, values, copies, native, ready)
        return {v: self._collect(v, s, native) for v, s in sums.items() if v < 0}

    def _input_grad(
        self, i: int, how: Read, grad: Buffer, sums: dict[int, dict[Maps, Buffer]], last: bool,
        values: dict[int, Buffer], copies: dict[tuple[int, Maps], Buffer], native: dict[int, Maps],
        ready: dict[int, tuple[Buffer, Buffer]],
    ) -> None:  # fmt: skip
        unit, v = self.units[i], self.units[i].source
        have = sums.setdefault(v, {})
        target = how.read
        if how.forward is None:
            g = unit.geometry
            plain = self._plain(grad, how.write)
            size = (target.batch, target.channels, target.height, target.width)
            weight = ops.dense_weight(unit.packed, plain)
            dx = conv2d_input(size, weight, plain, g.stride, g.padding, g.dilation, g.groups)
            buffer = self.pool.take(native[v], dx)
            fm.to_maps(dx, native[v], buffer.data)
            self._add(sums, v, buffer, native[v])
            return
        residual = have.pop(target, None)
        out = self.pool.take(target, grad.data)
        lists = self.backward_plan(i, how)
        added = None if residual is None else residual.data
        if not (last and v >= 0 and not have):
            fm.gather(grad.data, how.write, target, lists, residual=added, out=out.data)
            have[target] = out
            return
        # The last gradient to come: gate and scale of the unit that made this value, in the same write.
        maker = self.units[v]
        gate = None
        if maker.relu:
            gate = (values[v] if target is native[v] else copies[v, target]).data
        need_pre = maker.residual is not None and maker.scale is not None
        pre = self.pool.take(target, grad.data) if need_pre else out
        fm.gather(
            grad.data, how.write, target, lists, residual=added, gate=gate, pre=pre.data if need_pre else None,
            post=maker.scale, out=out.data,
        )  # fmt: skip
        scaled = self._as(out, target, native[v])
        ready[v] = (self._as(pre, target, native[v]) if need_pre else scaled, scaled)
        del sums[v]

    def _add(self, sums: dict[int, dict[Maps, Buffer]], v: int, grad: Buffer, maps: Maps) -> None:
        have = sums.setdefault(v, {})
        if maps in have:
            total = self.pool.take(maps, grad.data)
            torch.add(have[maps].data, grad.data, out=total.data)
            have[maps] = total
        else:
            have[maps] = grad

    def _collect(self, v: int, parts: dict[Maps, Buffer], native: dict[int, Maps]) -> Buffer:
        total: Buffer | None = None
        for maps, buffer in parts.items():
            part = self._as(buffer, maps, native[v])
            if total is None:
                total = part
            else:
                both = self.pool.take(native[v], part.data)
                torch.add(total.data, part.data, out=both.data)
                total = both
        assert total is not None
        return total

    def _finish(
        self, v: int, parts: dict[Maps, Buffer], values: dict[int, Buffer], native: dict[int, Maps]
    ) -> tuple[Buffer, Buffer]:
        """Gate and scale of unit v when its last gradient did not come from a convolution of the same layout."""
        unit = self.units[v]
        total = self._collect(v, parts, native)
        if unit.relu:
            gated = self.pool.take(native[v], total.data)
            torch.where(values[v].data > 0, total.data, total.data.new_zeros(()), out=gated.data)
            total = gated
        if unit.scale is None:
            return total, total
        maps = native[v]
        scaled = self.pool.take(maps, total.data)
        planes = (maps.blocks, maps.channels, maps.plane)
        size = maps.blocks * maps.block
        torch.mul(
            total.data[:size].view(planes), unit.scale.view(1, -1, 1), out=scaled.data[:size].view(planes)
        )  # fmt: skip
        return total, scaled
