"""Straight-line programs over buffers: gathers and copies that run in one call, with torch calls between them.

A schedule is written once for a batch size, then compiled: buffers are given places in one zeroed arena, small enough
to stay in cache because what is dead makes room. The zero borders of the fast layout are written only where a buffer of
another layout lay before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.binary import _feature_maps as fm
from ..ops.binary._activation import NONE, RELU, Act
from ..ops.binary._feature_maps import Maps

ARENA = 0


def plain(shape: tuple[int, ...], base: int = ARENA) -> Buffer:
    """An ordinary tensor (N, C, H, W), channels last: the format in which torch's convolutions are mostly faster."""
    _, c, h, w = shape
    return Buffer(base, shape=shape, strides=(c * h * w, 1, w * c, c))


def sides(maps: Maps) -> Buffer:
    """Room for one bit per value: which side of an activation it fell on."""
    rows = maps.blocks * maps.channels * math.prod(maps.phases)
    return Buffer(ARENA, shape=(-(-rows * maps.plane // 32),), strides=(1,))


@dataclasses.dataclass(eq=False)
class Buffer:
    """Feature maps in the fast layout (`maps`), or a plain tensor of `shape` and `strides`.

    base: whose memory it lies in: the arena, a tensor given to the run, or the result of a torch call; `offset` in
    floats.
    """

    base: int
    maps: Maps | None = None
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    offset: int = 0
    borders: bool = False  # have to be written: something else lay here

    @property
    def form(self) -> Any:
        """What has to be equal for two buffers to be of one layout."""
        return self.maps or (self.shape, self.strides)

    @property
    def layout(self) -> tuple[int, ...]:
        if self.maps is not None:
            return self.maps.layout
        n, c, h, w = self.strides
        return (1, n, c, h, w, 0, 1, 1, 0)

    @property
    def floats(self) -> int:
        if self.maps is not None:
            return self.maps.blocks * self.maps.block + fm.SLACK
        size = 1
        for extent in self.shape:
            size *= extent
        return size

    @property
    def address(self) -> int:
        return (self.base + 1) << 56 | 4 * self.offset

    def view(self, tensors: Sequence[Tensor | None]) -> Tensor:
        owner = tensors[self.base]
        assert owner is not None
        if self.maps is not None:
            return owner[self.offset : self.offset + self.maps.blocks * self.maps.block]
        if not self.shape or owner.shape == self.shape:
            return owner
        return owner.as_strided(self.shape, self.strides, owner.storage_offset() + self.offset)


def pooling_sizes(given: Maps, result: Maps) -> tuple[Any, ...]:
    """What a pool's kernels ask about the layouts of its input and output."""
    if given.size[:2] != result.size[:2]:
        raise ValueError(f"max_pool: got maps of {given.size} and {result.size}, expected the same images and channels")
    sizes = (given.height, given.width, result.height, result.width)
    return given.layout, result.layout, given.batch, given.channels, sizes


@dataclasses.dataclass
class _Step:
    emit: Callable[[Any], None] | None  # adds itself to a program
    call: Callable[..., Any] | None  # torch's part
    reads: list[Buffer]
    write: list[Buffer]
    over: Buffer | None = None  # what the first of `write` may overwrite in place


class _Room:
    """Free stretches of an arena that grows as needed."""

    def __init__(self) -> None:
        self.size = 0
        self.free: list[tuple[int, int]] = []  # begin and end, ascending, apart
        self.forms: dict[int, Any] = {}  # what was given back last, by where it began

    def take(self, floats: int, form: Any) -> int:
        need = -(-floats // fm.VECTOR) * fm.VECTOR
        fits = [(begin, end) for begin, end in self.free if end - begin >= need]
        alike = [
            (begin, end)
            for begin, end in self.free
            for at, was in self.forms.items()
            if was == form and begin <= at and at + need <= end
        ]
        if alike:
            begin, end = alike[-1]
            start = max(at for at, was in self.forms.items() if was == form and begin <= at and at + need <= end)
        elif fits:
            begin, end = min(fits, key=lambda stretch: stretch[1] - stretch[0])
            start = begin
        else:
            # The last stretch, if it reaches the end, is made longer.
            begin, end = self.free[-1] if self.free and self.free[-1][1] == self.size else (self.size, self.size)
            start = begin
            self.size = begin + need
            self.free = [f for f in self.free if f[0] != begin]
            return self._taken(start, need)
        self.free.remove((begin, end))
        self.free += [f for f in ((begin, start), (start + need, end)) if f[0] < f[1]]
        self.free.sort()
        return self._taken(start, need)

    def _taken(self, start: int, need: int) -> int:
        self.forms = {at: form for at, form in self.forms.items() if at + 1 <= start or at >= start + need}
        return start

    def give(self, offset: int, floats: int, form: Any) -> None:
        need = -(-floats // fm.VECTOR) * fm.VECTOR
        self.forms[offset] = form
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self.free, (offset, offset + need)]):
            if merged and merged[-1][1] == begin:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((begin, end))
        self.free = merged


class Schedule:
    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.bases = 1
        self.given_count = 0

    # ---- buffers ----

    def given(self, like: Buffer | None = None, **layout: Any) -> Buffer:
        """A tensor that every run is given; all of them are named before the first torch call."""
        assert self.bases == 1 + self.given_count
        base = self._base()
        self.given_count += 1
        return dataclasses.replace(like, base=base) if like is not None else Buffer(base, **layout)

    def _base(self) -> int:
        self.bases += 1
        return self.bases - 1

    # ---- steps ----

    def gather(
        self, x: Buffer, target: Maps, lists: fm.Plan, *, residual: Buffer | None = None, gate: Buffer | None = None,
        gate_act: Act = RELU, pre: bool = False, scale: Tensor | None = None, shift: Tensor | None = None,
        post: Tensor | None = None, act: Act = NONE, slopes: bool = False, passed: Buffer | None = None,
    ) -> tuple[Buffer, Buffer | None, Buffer | None]:  # fmt: skip
        """`feature_maps.gather`; returns the result and, where asked for, `pre` and `slopes`.

        passed: written with the sides of a sided `act`, one bit each. gate: such bits of `gate_act`, or values.
        """
        assert x.maps is not None
        source = x.maps
        out, before, steep = Buffer(ARENA, target), *(Buffer(ARENA, target) if b else None for b in (pre, slopes))
        values, bits = (gate, None) if gate is None or gate.maps is not None else (None, gate)
        written = [b for b in (out, before, steep, passed) if b is not None]

        def emit(program: Any) -> None:
            program.gather(
                x.address, out.address, lists.bind(source, target), fm.address(scale), fm.address(shift),
                fm.address(post),
                *(0 if b is None else b.address for b in (residual, values, before, passed, bits, steep)),
                target.channels, act.code, gate_act.code, any(b.borders for b in written if b is not passed),
            )  # fmt: skip

        # Constants must live as long as the program that has their addresses.
        emit.constants = (lists, scale, shift, post)  # type: ignore[attr-defined]
        reads = [b for b in (x, residual, gate) if b is not None]
        # Every value of the residual is read where the result is written.
        over = residual if residual not in (x, gate) else None
        self.steps.append(_Step(emit, None, reads, written, over))
        return out, before, steep

    def copy(self, source: Buffer, target: Buffer) -> Buffer:
        """The pixels of one buffer into another of any layout."""
        if source.maps is None and target.maps is None:
            return self.call_into(lambda x, out: out.copy_(x), [source], target)
        maps = source.maps or target.maps
        size = (maps.batch, maps.channels, maps.height, maps.width) if maps is not None else source.shape

        def emit(program: Any) -> None:
            plane = target.maps.plane if target.maps is not None and target.borders else 0
            program.relayout(source.address, target.address, source.layout, target.layout, *size, plane)

        self.steps.append(_Step(emit, None, [source], [target]))
        return target

    def concat(self, sources: list[Buffer], target: Maps) -> Buffer:
        """The channels of maps one after the other."""
        out = Buffer(ARENA, target)

        def emit(program: Any) -> None:
            at, plane = out.address, target.plane if out.borders else 0
            for source in sources:
                assert source.maps is not None
                program.relayout(source.address, at, source.layout, out.layout, *source.maps.size, plane)
                at += 4 * source.maps.channels * target.plane

        self.steps.append(_Step(emit, None, list(sources), [out]))
        return out

    def part(self, source: Buffer, channel: int, target: Maps) -> Buffer:
        """The channels of maps from `channel` on, as many as `target` has."""
        out = Buffer(ARENA, target)
        assert source.maps is not None
        skipped = 4 * channel * source.maps.plane

        def emit(program: Any) -> None:
            plane = target.plane if out.borders else 0
            program.relayout(source.address + skipped, out.address, source.layout, out.layout, *target.size, plane)

        self.steps.append(_Step(emit, None, [source], [out]))
        return out

    def flatten(self, source: Buffer, target: Maps) -> Buffer:
        """Maps (C, H, W) as maps (C H W, 1, 1)."""
        out = Buffer(ARENA, target)
        assert source.maps is not None
        maps = source.maps
        emit = lambda program: program.relayout(
            source.address, out.address, source.layout, _unfolded(target, maps), *maps.size, 0
        )
        self.steps.append(_Step(emit, None, [source], [out]))
        return out

    def unflatten(self, source: Buffer, target: Maps) -> Buffer:
        """Maps (C H W, 1, 1) as maps (C, H, W)."""
        out = Buffer(ARENA, target)
        assert source.maps is not None
        layout = _unfolded(source.maps, target)

        def emit(program: Any) -> None:
            plane = target.plane if out.borders else 0
            program.relayout(source.address, out.address, layout, out.layout, *target.size, plane)

        self.steps.append(_Step(emit, None, [source], [out]))
        return out

    def spread(self, source: Buffer, target: Maps) -> Buffer:
        """Maps of one pixel as maps that are the same everywhere."""
        out = Buffer(ARENA, target)
        lanes, block, channel, _, _, phase, *rest = source.layout

        def emit(program: Any) -> None:
            plane = target.plane if out.borders else 0
            layout = (lanes, block, channel, 0, 0, phase, *rest)
            program.relayout(source.address, out.address, layout, out.layout, *target.size, plane)

        self.steps.append(_Step(emit, None, [source], [out]))
        return out

    def max_pool(self, x: Buffer, target: Maps, window: tuple[int, ...], keep: bool) -> tuple[Buffer, Buffer | None]:
        """The largest pixel of each window, and, with `keep`, which one it was, a byte each: what the gradient needs.

        window: kernel, stride, padding, dilation, each by dimension; of at most 255 pixels with `keep`. Both maps are
        of the same lanes, without phases. NaN wins.
        """
        assert x.maps is not None
        source, out = x.maps, Buffer(ARENA, target)
        where = Buffer(ARENA, shape=(-(-target.blocks * target.block // 4),), strides=(1,)) if keep else None

        def emit(program: Any) -> None:
            program.max_pool(
                x.address, out.address, 0 if where is None else where.address, *pooling_sizes(source, target), window,
                target.plane if out.borders else 0,
            )  # fmt: skip

        self.steps.append(_Step(emit, None, [x], [b for b in (out, where) if b is not None]))
        return out, where

    def max_pool_grad(self, grad: Buffer, where: Buffer, target: Maps, window: tuple[int, ...]) -> Buffer:
        """The gradient of the input of `max_pool`, laid out as `target`: to each pixel that of the windows it won."""
        assert grad.maps is not None
        source, out = grad.maps, Buffer(ARENA, target)

        def emit(program: Any) -> None:
            program.max_pool_grad(
                grad.address, where.address, out.address, *pooling_sizes(target, source), window,
                target.plane if out.borders else 0,
            )  # fmt: skip

        self.steps.append(_Step(emit, None, [grad, where], [out]))
        return out

    def call(self, f: Callable[..., Tensor], reads: list[Buffer], shape: tuple[int, ...]) -> Buffer:
        """Torch's part: f(views of `reads`) returns a new tensor of `shape`."""
        return self.calls(lambda *xs: (f(*xs),), reads, [shape])[0]

    def calls(
        self, f: Callable[..., Sequence[Tensor]], reads: list[Buffer], shapes: Sequence[tuple[int, ...] | None]
    ) -> list[Buffer]:
        """Torch's part with several results; one without a shape may be anything, and is given to other calls as it
        is."""
        results = [Buffer(self._base()) if shape is None else plain(shape, self._base()) for shape in shapes]
        self.steps.append(_Step(None, f, reads, results))
        return results

    def call_into(self, f: Callable[..., Any], reads: list[Buffer], target: Buffer) -> Buffer:
        """Torch's part: f(views of `reads`, view of `target`) fills the latter."""
        self.steps.append(_Step(None, f, reads, [target]))
        return target

    # ---- compiling ----

    def compile(self, keep: Iterable[Buffer] = ()) -> Compiled:
        """Places buffers and strings the steps together. keep: those whose contents are wanted after the run."""
        last: dict[Buffer, int] = {}
        for i, step in enumerate(self.steps):
            for buffer in (*step.reads, *step.write):
                last[buffer] = i
        last.update(dict.fromkeys(keep, len(self.steps)))
        room = _Room()
        placed: list[Buffer] = []
        for i, step in enumerate(self.steps):
            freed = [b for b in dict.fromkeys((*step.reads, *step.write)) if b.base == ARENA and last[b] == i]
            for buffer in step.write:
                if buffer.base != ARENA or buffer in placed:
                    continue
                over = step.over
                if over is not None and over in freed and over.form == buffer.form:
                    buffer.offset = over.offset
                    freed.remove(over)
                else:
                    buffer.offset = room.take(buffer.floats, buffer.form)
                placed.append(buffer)
            for buffer in freed:
                room.give(buffer.offset, buffer.floats, buffer.form)
        # An arena is used again by the next run: what lies there at the end of one is there at the start of the other.
        there: list[Buffer] = []
        for buffer in (*placed, *placed):
            same = [b for b in there if b.offset == buffer.offset and b.form == buffer.form]
            buffer.borders = not same
            end = buffer.offset + buffer.floats
            there = [b for b in there if b.offset + b.floats <= buffer.offset or b.offset >= end]
            there.append(buffer)
        return Compiled(self, room.size, last)


def _unfolded(rows: Maps, maps: Maps) -> tuple[int, ...]:
    """The layout of maps of which every pixel is a map of `rows`, channel by channel and line by line."""
    line = maps.width * rows.plane
    return (rows.lanes, rows.block, maps.height * line, line, rows.plane, 0, 1, 1, rows.origin)


class Compiled:
    """A schedule ready to run, and the arenas that runs have given back."""

    def __init__(self, schedule: Schedule, size: int, last: dict[Buffer, int]) -> None:
        self.size, self.bases, self.given_count = size, schedule.bases, schedule.given_count
        self.arenas: list[Tensor] = []
        self.constants: list[Any] = []
        self.parts: list[
            tuple[Any, _Step | None, list[int]]
        ] = []  # a program, or a torch step and what it is the last to read
        program = None
        for i, step in enumerate(schedule.steps):
            if step.emit is not None:
                if program is None:
                    program = fm.new_program()
                    self.parts.append((program, None, []))
                step.emit(program)
                self.constants.append(getattr(step.emit, "constants", None))
                continue
            program = None
            made = [b.base for b in step.reads if b.base > self.given_count and last[b] == i]
            self.parts.append((None, step, made))

    def run(self, given: Sequence[Tensor]) -> State:
        state = State(self, given[0])
        tensors = state.tensors
        tensors[1 : 1 + len(given)] = given
        addresses = [t.data_ptr() if isinstance(t, Tensor) else 0 for t in tensors]
        where = fm.device_of(given[0])
        for program, step, done in self.parts:
            if step is None:
                program.run(*where, addresses)
                continue
            assert step.call is not None
            views = [b.view(tensors) for b in step.reads]
            if step.write[0].base > self.given_count:
                for out, result in zip(step.write, step.call(*views), strict=True):
                    if not out.shape:
                        tensors[out.base] = result
                        continue
                    result = result.contiguous(memory_format=torch.channels_last)
                    if result.dtype != torch.float32 or tuple(result.shape) != out.shape:
                        # Programs read it by its address.
                        raise RuntimeError(
                            f"a step gave {tuple(result.shape)} {result.dtype}, expected {out.shape} float32"
                        )
                    tensors[out.base], addresses[out.base] = result, result.data_ptr()
            else:
                step.call(*views, step.write[0].view(tensors))
            for base in done:
                tensors[base] = None
        # What was given may hold on to the graph that will hold on to this state.
        tensors[1 : 1 + len(given)] = [None] * len(given)
        return state


class State:
    """The memory of one run; the arena returns to its schedule when nobody refers to it any more."""

    def __init__(self, owner: Compiled, like: Tensor) -> None:
        self.owner = owner
        self.tensors: list[Tensor | None] = [None] * owner.bases
        if owner.arenas:
            self.tensors[ARENA] = owner.arenas.pop()
        else:
            with torch.inference_mode(False):
                self.tensors[ARENA] = fm.roomy(owner.size, like.device).zero_()

    def __del__(self) -> None:
        arena = self.tensors[ARENA]
        if arena is not None:
            self.owner.arenas.append(arena)
