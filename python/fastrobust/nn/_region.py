"""A chain or graph of masked convolutions that stays in the fast layout, forward and input gradient.

A unit is one convolution with what follows it in one write: scale and shift (eval-mode batch
normalisation, magnitude, bias), residual, ReLU. Batches are done in groups of images small enough
for the caches; each group runs through all units before the next. Units for which torch's dense
convolution is faster run as such, on plain tensors; a value is copied between the two forms only
where units of both kinds read it.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import _conv_cost as cost
from ..ops import _feature_maps as fm
from ..ops._dense_conv import dense_weight, in_full_precision, input_grad
from ..ops._feature_maps import ConvGeometry, Maps
from ..reference.binary import PackedWeight
from ._schedule import ARENA, Buffer, Compiled, Schedule, State, plain, sides

# Floats of the largest feature map of a group of images.
GROUP_FLOATS = 5 << 18
# Batch and map sizes whose programs and memory are kept.
REMEMBERED = 8


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

    def __post_init__(self) -> None:
        # Programs hold their addresses and nothing else.
        for what, t in (("scale", self.scale), ("shift", self.shift)):
            if t is not None and (t.dtype != torch.float32 or t.device != self.packed.index.device):
                raise TypeError(
                    f"model: the {what} of {self.name} is {t.dtype} on {t.device}, expected float32 on "
                    f"{self.packed.index.device}, as its masked weight"
                )
        self.scale, self.shift = (None if t is None else t.contiguous() for t in (self.scale, self.shift))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return fm.conv_shape(self.packed.shape)

    def dense_weight(self) -> Tensor:
        """The weight as torch's convolution takes it, the scale multiplied in."""
        weight = dense_weight(self.packed, torch.float32, torch.channels_last)
        return weight if self.scale is None else weight * self.scale.view(-1, 1, 1, 1)


@dataclasses.dataclass
class Read:
    """How a unit runs on one map size: the layouts of what it reads and writes, and why."""

    read: Maps
    write: Maps
    choice: cost.Choice

    @property
    def dense(self) -> bool:
        return self.choice.path == "dense"


@dataclasses.dataclass
class Resolved:
    """Everything about one batch size and map size."""

    lanes: int
    step: int  # images per group
    sizes: list[tuple[int, int]]  # of the units' outputs
    borders: tuple[int, int]
    choices: list[cost.Choice]
    groups: dict[int, Group]  # by the images of a group


# For each value behind a ReLU, what tells which side it fell on, by the layout it was read in: the values or their bits.
Gates = dict[int, dict[Any, Buffer]]


class Group:
    """Programs for a group of `count` images: forward, forward that keeps what the gradient needs, input gradient."""

    def __init__(self, reads: list[Read], native: dict[int, Maps]) -> None:
        self.reads, self.native = reads, native
        self.forward, self.backward = fm.Recent(), fm.Recent()  # by strides


class Region:
    """Units in execution order; `outputs` are the values handed out."""

    def __init__(self, units: list[Unit], inputs: int, outputs: list[int]) -> None:
        self.units, self.inputs, self.outputs = units, inputs, outputs
        self.resolved: collections.OrderedDict[Any, Resolved] = collections.OrderedDict()
        self.latest: Group | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Programs and memory belong to this process; copies and pickles make their own.
        return {**self.__dict__, "resolved": collections.OrderedDict(), "latest": None}

    # ---- layouts ----

    def resolve(self, batch: int, inputs: list[tuple[int, ...]], device: tuple[int, int]) -> Resolved:
        """Groups of images, the borders that serve every unit, and the path of each, for inputs (C, H, W)."""
        key = (batch, tuple(inputs), device[0], cost.forced_path())
        if key in self.resolved:
            self.resolved.move_to_end(key)
            return self.resolved[key]
        known: dict[int, tuple[int, int]] = {-1 - i: (s[1], s[2]) for i, s in enumerate(inputs)}
        largest = max(math.prod(s) for s in inputs)
        halo = lead = 0
        for i, unit in enumerate(self.units):
            size, shape, g = known[unit.source], unit.shape, unit.geometry
            known[i] = g.out_size(shape, *size)
            if min(known[i]) < 1:
                raise ValueError(f"x: too small for {unit.name}, which would see a map of {size[0]} x {size[1]}")
            if unit.residual is not None:
                channels = inputs[-1 - unit.residual][0] if unit.residual < 0 else self.units[unit.residual].shape[0]
                got, want = (channels, *known[unit.residual]), (shape[0], *known[i])
                if got != want:
                    raise ValueError(f"model: expected what is added after {unit.name} to be of size {want}, got {got}")
            largest = max(largest, shape[0] * math.prod(known[i]))
            read = fm.input_maps(1, shape[1] * g.groups, *size, shape, g, 1)
            grad = fm.grad_maps(1, *size, shape, g, 1)[0]
            halo, lead = max(halo, read.halo, grad.halo), max(lead, read.lead, grad.lead)
        # As many images side by side as fill vectors without waste, fewer where the maps are large.
        wanted = next((n for n in cost.LANES if n >= min(batch, 12)), cost.LANES[-1])
        lanes = max((n for n in cost.LANES if n <= wanted and n * largest <= 4 * GROUP_FLOATS), default=1)
        step = max(1, GROUP_FLOATS // (largest * lanes)) * lanes
        choices = self._choose(min(batch, step), known, lanes)
        found = Resolved(lanes, step, [known[i] for i in range(len(self.units))], (halo, lead), choices, {})
        self.resolved[key] = found
        while len(self.resolved) > REMEMBERED:
            self.resolved.popitem(last=False)
        return found

    def _choose(self, count: int, sizes: dict[int, tuple[int, int]], lanes: int) -> list[cost.Choice]:
        """Sparse or dense for each unit, so that the sum of the estimates of forward and input gradient is least, copies
        between the forms included."""
        estimates = [
            cost.estimate(count, *sizes[u.source], u.shape, u.geometry, u.packed.kept, lanes) for u in self.units
        ]
        floats = {i: count * u.shape[0] * math.prod(sizes[i]) for i, u in enumerate(self.units)}
        # Of the region's inputs: a residual is of the size of the unit's output.
        floats |= {u.residual: floats[i] for i, u in enumerate(self.units) if u.residual is not None}
        floats |= {u.source: count * u.shape[1] * u.geometry.groups * math.prod(sizes[u.source]) for u in self.units}

        def total(dense: list[bool]) -> float:
            made = {-1 - i: True for i in range(self.inputs)} | dict(enumerate(dense))
            copied = {(v, True) for v in self.outputs if not made[v]}
            time = 0.0
            for i, unit in enumerate(self.units):
                time += estimates[i].dense if dense[i] else estimates[i].sparse
                time += 2 * cost.dense_epilogue(floats[i], unit.residual is not None, unit.relu) if dense[i] else 0.0
                copied |= {(v, dense[i]) for v in (unit.source, unit.residual) if v is not None and made[v] != dense[i]}
            return time + 2 * sum(cost.copy(floats[v]) for v, _ in copied)

        forced = cost.forced_path()
        if forced is not None:
            best = [forced == "dense"] * len(self.units)
        else:
            starts = [[e.dense < e.sparse for e in estimates], *([d] * len(self.units) for d in (False, True))]
            best = min(starts, key=total)
            improved = True
            while improved:
                improved = False
                for i in range(len(best)):
                    other = [d != (j == i) for j, d in enumerate(best)]
                    if total(other) < total(best):
                        best, improved = other, True
        return [
            dataclasses.replace(e, path="dense" if dense else "sparse")
            for e, dense in zip(estimates, best, strict=True)
        ]

    def group(self, how: Resolved, count: int, inputs: list[tuple[int, ...]]) -> Group:
        """Layouts of all values and the way every unit runs, for a group of `count` images."""
        if count in how.groups:
            return how.groups[count]
        # A last group of few images is not padded to the lanes of the others.
        lanes, (halo, lead) = min(how.lanes, next(n for n in cost.LANES if n >= min(count, 12))), how.borders
        native = {-1 - i: Maps(count, c, h, w, lanes, w + lead, halo, lead) for i, (c, h, w) in enumerate(inputs)}
        reads = []
        for i, unit in enumerate(self.units):
            given, g, shape, out = native[unit.source], unit.geometry, unit.shape, how.sizes[i]
            need = fm.input_maps(count, given.channels, given.height, given.width, shape, g, lanes)
            pitch = max(need.phase_size[1], out[1]) + lead
            read = given
            if need.phases != given.phases or given.pitch < pitch:
                read = Maps(count, given.channels, given.height, given.width, lanes, pitch, halo, lead, need.phases)
            native[i] = Maps(count, shape[0], *out, lanes, read.pitch, halo, lead)
            reads.append(Read(read, native[i], how.choices[i]))
        how.groups[count] = Group(reads, native)
        return how.groups[count]

    # ---- forward ----

    def forward(self, inputs: list[Tensor], keep: bool) -> tuple[list[Tensor], list[Any]]:
        """Outputs, and per group of images what the backward needs (nothing unless `keep`)."""
        for x in inputs:
            if x.dtype != torch.float32 or x.device != self.units[0].packed.index.device:
                raise TypeError(
                    f"x: expected float32 on {self.units[0].packed.index.device}, got {x.dtype} on {x.device}"
                )
        batch = inputs[0].shape[0]
        sizes = [tuple(x.shape[1:]) for x in inputs]
        if any(x.shape[0] != batch for x in inputs):
            raise ValueError(f"x: expected equal batch sizes inside the model, got {[x.shape[0] for x in inputs]}")
        how = self.resolve(batch, sizes, fm.device_of(inputs[0]))
        outs = [inputs[0].new_empty((batch, self.units[v].shape[0], *how.sizes[v])) for v in self.outputs]
        saved = []
        for begin in range(0, batch, how.step):
            parts = [x[begin : begin + how.step] for x in (*inputs, *outs)]
            group = self.latest = self.group(how, parts[0].shape[0], sizes)
            strides = tuple(x.stride() for x in parts)
            found: tuple[Compiled, Gates] | None = group.forward.get((keep, strides))
            if found is None:
                found = group.forward[keep, strides] = self._forward(group, parts, keep)
            program, gates = found
            with in_full_precision(parts[0]):
                state = program.run(parts)
            if keep:
                saved.append((begin, group, strides, gates, state))
        return outs, saved

    def _forward(self, group: Group, parts: list[Tensor], keep: bool) -> tuple[Compiled, Gates]:
        s = Schedule()
        # What passed the ReLUs: bits on the CPU, which spares the gradient to read and the forward to keep all values.
        bits: dict[int, Buffer] = {}
        given = [s.given(shape=tuple(x.shape), strides=x.stride()) for x in parts]
        forms: dict[int, dict[Any, Buffer]] = {-1 - i: {given[i].form: given[i]} for i in range(self.inputs)}
        for i, (unit, how) in enumerate(zip(self.units, group.reads, strict=True)):
            read, write = (None, None) if how.dense else (how.read, how.write)
            lists = None
            if read is not None:
                if not keep and fm.device_of(parts[0])[0] < 0:
                    native = group.native[unit.source]
                    lists = fm.strided_plan(unit.packed, unit.geometry, native, (how.write.height, how.write.width))
                if lists is None:
                    lists = fm.plan(unit.packed, unit.geometry, how.read, False)
                else:
                    read = native
            x = self._form(s, forms[unit.source], read)
            residual = None if unit.residual is None else self._form(s, forms[unit.residual], write)
            if lists is None:
                out = self._dense(s, unit, how, x, residual)
            else:
                if keep and unit.relu and fm.device_of(parts[0])[0] < 0:
                    bits[i] = sides(how.write)
                out, _ = s.gather(
                    x, how.write, lists, residual=residual, scale=unit.scale, shift=unit.shift, relu=unit.relu,
                    passed=bits.get(i),
                )  # fmt: skip
            forms[i] = {out.form: out}
        for v, target in zip(self.outputs, given[self.inputs :], strict=True):
            s.copy(next(iter(forms[v].values())), target)
        # The gradient needs to know what passed the ReLUs, in every form that was read.
        gates = {
            i: {form: b for form, b in forms[i].items() if isinstance(form, Maps) != how.dense}
            for i, (unit, how) in enumerate(zip(self.units, group.reads, strict=True))
            if keep and unit.relu
        }
        for i, buffer in bits.items():
            gates[i][group.native[i]] = buffer
        return s.compile([b for by_form in gates.values() for b in by_form.values()]), gates

    @staticmethod
    def _form(s: Schedule, forms: dict[Any, Buffer], maps: Maps | None) -> Buffer:
        """A value as `maps`, or as a plain tensor for None; copied at the first request."""
        source = next(iter(forms.values()))
        target = Buffer(ARENA, maps) if maps is not None else _plain(source)
        if target.form in forms:
            return forms[target.form]
        made = s.copy(source, target)
        forms[made.form] = made
        return made

    @staticmethod
    def _dense(s: Schedule, unit: Unit, how: Read, x: Buffer, residual: Buffer | None) -> Buffer:
        g, weight, shift, relu = unit.geometry, unit.dense_weight(), unit.shift, unit.relu

        def run(x: Tensor, added: Tensor | None = None) -> Tensor:
            y = F.conv2d(x, weight, shift, g.stride, g.padding, g.dilation, g.groups)
            y = y if added is None else y.add_(added)
            return y.relu_() if relu else y

        shape = (how.write.batch, how.write.channels, how.write.height, how.write.width)
        return s.call(run, [x] if residual is None else [x, residual], shape)

    # ---- input gradient ----

    def backward(self, grads: list[Tensor | None], saved: list[Any], sizes: list[torch.Size]) -> list[Tensor]:
        device = next(g for g in grads if g is not None).device
        outs = [torch.empty(size, dtype=torch.float32, device=device) for size in sizes]
        wanted = tuple(g is not None for g in grads)
        for begin, group, strides, gates, state in saved:
            parts = [g[begin : begin + group.native[-1].batch] for g in (*grads, *outs) if g is not None]
            key = (wanted, strides, tuple(x.stride() for x in parts))
            found: tuple[Compiled, list[int]] | None = group.backward.get(key)
            if found is None:
                found = group.backward[key] = _Backward(self, group, gates, state, parts, wanted).compile()
            program, results = found
            with in_full_precision(outs[0]):
                program.run([state.tensors[ARENA], *parts, *[state.tensors[base] for base in results]])
        return outs


def _plain(like: Buffer) -> Buffer:
    """Room for the same maps as an ordinary tensor."""
    maps = like.maps
    return plain(like.shape if maps is None else (maps.batch, maps.channels, maps.height, maps.width))


class _Backward:
    """Writes the program of the input gradient of one group."""

    def __init__(
        self, region: Region, group: Group, gates: Gates, state: State, parts: list[Tensor], wanted: tuple[bool, ...],
    ) -> None:  # fmt: skip
        self.region, self.group, self.s = region, group, Schedule()
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
        units, waiting = self.region.units, collections.Counter[int]()
        for unit in units:
            waiting.update(v for v in (unit.source, unit.residual) if v is not None)
        ready: dict[int, tuple[Buffer, Buffer]] = {}  # gradient after the ReLU's gate; the same times the scale
        for i in range(len(units) - 1, -1, -1):
            unit = units[i]
            waiting.subtract(v for v in (unit.source, unit.residual) if v is not None)
            if i not in ready:
                if i not in self.sums:
                    continue
                ready[i] = self._finish(i)
            before, scaled = ready.pop(i)
            if unit.residual is not None:
                self._add(unit.residual, before)
            if self.group.reads[i].dense:
                self._dense(i, scaled)
                continue
            # The last gradient to come: gate and scale of the unit that made the value, in the same write.
            source = unit.source
            last = waiting[source] == 0 and source >= 0 and not self.group.reads[source].dense
            both = self._gather(i, scaled, last)
            if both is not None:
                ready[source] = both
        for i, target in enumerate(self.targets):
            parts = self.sums.get(-1 - i, {})
            if len(parts) == 1:
                self.s.copy(next(iter(parts.values())), target)
            elif parts:
                self.s.copy(self._collect(list(parts.values()), None), target)
            else:
                self.s.call_into(lambda out: out.zero_(), [], target)
        return self.s.compile(), self.results

    def _gather(self, i: int, grad: Buffer, last: bool) -> tuple[Buffer, Buffer] | None:
        """Adds the gradient of a sparse unit's source; when it was the last to come, returns what `ready` holds."""
        unit, how = self.region.units[i], self.group.reads[i]
        target, have = how.read, self.sums.setdefault(unit.source, {})
        lists = fm.plan(unit.packed, unit.geometry, how.write, True)
        residual = have.pop(target, None)
        x = self._as(grad, how.write)
        if not last or have:
            out, _ = self.s.gather(x, target, lists, residual=residual)
            have[target] = out
            return None
        del self.sums[unit.source]
        return self._close(unit.source, x, target, lists, residual)

    def _close(self, v: int, x: Buffer, target: Maps, lists: fm.Plan, residual: Buffer | None) -> tuple[Buffer, Buffer]:
        """One write of sum, gate and scale of the sparse unit v, in its own layout at the end."""
        maker, native = self.region.units[v], self.group.native[v]
        gate = self.gates[v][target] if maker.relu else None
        need = maker.residual is not None and maker.scale is not None
        out, before = self.s.gather(x, target, lists, residual=residual, gate=gate, pre=need, post=maker.scale)
        scaled = self._as(out, native)
        return (scaled if before is None else self._as(before, native)), scaled

    def _finish(self, v: int) -> tuple[Buffer, Buffer]:
        """Gate and scale of unit v when its last gradient did not come from a sparse convolution."""
        unit, parts = self.region.units[v], list(self.sums.pop(v).values())
        if self.group.reads[v].dense:
            total = self._collect(parts, None)
            if unit.relu:
                (gate,) = [b for form, b in self.gates[v].items() if not isinstance(form, Maps)]
                total = self.s.call(lambda g, y: torch.ops.aten.threshold_backward(g, y, 0), [total, gate], gate.shape)
            return total, total
        native = self.group.native[v]
        total = self._collect(parts, native)
        if not unit.relu and unit.scale is None:
            return total, total
        # Lists without entries: nothing but the epilogue.
        ptr = torch.zeros(2 * native.channels + 1, dtype=torch.int32, device=unit.packed.ptr.device)
        return self._close(v, total, native, fm.Plan(ptr, ptr[:0], native.channels), total)

    def _dense(self, i: int, grad: Buffer) -> None:
        unit, maps = self.region.units[i], self.group.native[self.region.units[i].source]
        g, weight = unit.geometry, unit.dense_weight()
        size = (maps.batch, maps.channels, maps.height, maps.width)
        x = self.s.call(
            lambda grad: input_grad(grad, weight, size, g),
            [self._as(grad, None)],
            size,
        )
        self._add(unit.source, x)

    def _as(self, buffer: Buffer, maps: Maps | None) -> Buffer:
        if buffer.maps == maps:
            return buffer
        return self.s.copy(buffer, _plain(buffer) if maps is None else Buffer(ARENA, maps))

    def _add(self, v: int, grad: Buffer) -> None:
        have = self.sums.setdefault(v, {})
        other = have.pop(grad.form, None)
        total = grad if other is None else self._sum(other, grad)
        have[total.form] = total

    def _sum(self, a: Buffer, b: Buffer) -> Buffer:
        target = _plain(a) if a.maps is None else Buffer(ARENA, a.maps)
        return self.s.call_into(lambda a, b, out: torch.add(a, b, out=out), [a, b], target)

    def _collect(self, parts: list[Buffer], maps: Maps | None) -> Buffer:
        total = self._as(parts[0], maps)
        for part in parts[1:]:
            total = self._sum(total, self._as(part, maps))
        return total
