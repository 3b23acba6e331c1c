"""Programs of frozen models: the steps of a record, masked layers and what lies between them in regions, all else as it
ran.

Steps are aten operations on values that nobody writes into (see ``_record``). What steps become nodes of a region is in
``_units``; neighbouring nodes make a region where one of them is masked. Regions are shared between the programs of
different shapes.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .._places import Constant, Place, Read, Value, inside, replaced
from .._record import Step
from ..ops._library import nothing_intercepts
from ..ops.binary._dense_conv import memory_format
from ._functional import functional
from ._layers import Cut as Cut
from ._layers import Layer as Layer
from ._layers import Norm as Norm
from ._layers import Pool as Pool
from ._layers import affine as affine
from ._layers import as_maps, is_flat, map_size, reshaped
from ._nodes import Flatten, Node, Spread
from ._region import Region
from ._units import CopySpec, Spec, UnitSpec, spec_of
from ._views import looking, overlaying

Values = list[Any]
Run = Callable[[Values], None]
Shapes = list[tuple[int, ...] | None]


class _RunRegion(torch.autograd.Function):
    """A region of inputs, some of them seen in another shape, and outputs, some as rows: views by torch would be
    recorded, which takes longer than small layers."""

    @staticmethod
    def forward(ctx: Any, region: Region, shapes: Shapes, rows: list[bool], *inputs: Tensor) -> tuple[Tensor, ...]:
        keep = any(ctx.needs_input_grad[3:])
        xs = _shaped(inputs, shapes)
        outs, saved = region.forward(xs, keep)
        ctx.region, ctx.saved, ctx.rows = region, saved, rows
        ctx.sizes, ctx.formats, ctx.given = (
            [x.shape for x in xs],
            [memory_format(x) for x in xs],
            [x.shape for x in inputs],
        )
        ctx.set_materialize_grads(False)
        # No views: whoever is given them may write into them.
        return tuple(out.flatten(1).data if flat else out for out, flat in zip(outs, rows, strict=True))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads):
            return None, None, None, *([None] * len(ctx.sizes))
        given = [
            None if g is None else g[:, :, None, None] if flat else g.contiguous(memory_format=memory_format(g))
            for g, flat in zip(grads, ctx.rows, strict=True)
        ]
        found = ctx.region.backward(given, ctx.saved, ctx.sizes, ctx.formats)
        return None, None, None, *(g.reshape(size) for g, size in zip(found, ctx.given, strict=True))


def _shaped(inputs: Sequence[Tensor], shapes: Shapes) -> list[Tensor]:
    """The inputs as a region reads them."""
    return [(x if shape is None else x.reshape(shape)).resolve_neg() for x, shape in zip(inputs, shapes, strict=True)]


def is_whole(read: Any) -> bool:
    return isinstance(read, Read) and not isinstance(read, Cut) and read.place == read.value.place


@dataclasses.dataclass(eq=False)
class Steps:
    """What a program is made of: steps in order, values of the inputs, reads and constants in the output's leaves."""

    steps: Sequence[Step]
    inputs: list[Value]
    output: list[Any]
    spec: Any  # how the leaves of the output are put together
    count: int  # of values


class Readers:
    """Who reads the values of a record. `dead`: steps whose results nobody reads, such as the copies that torch makes
    of what an activation changes in place, for a gradient."""

    def __init__(self, work: Steps) -> None:
        self.uses = collections.Counter[int](read.value.index for read in _reads(work.output))
        given = set(self.uses)
        self.last: dict[int, int] = {}
        self.dead: set[int] = set()
        for i, step in reversed(list(enumerate(work.steps))):
            made = [v.index for v in step.results if v is not None]
            if made and not any(self.uses[v] for v in made):
                self.dead.add(i)
                continue
            for read in _reads((step.args, step.kwargs)):
                self.uses[read.value.index] += 1
                if read.value.index not in given:
                    self.last.setdefault(read.value.index, i)

    def only(self, value: Value) -> int | None:
        """The step that alone reads a value, once."""
        return self.last.get(value.index) if self.uses[value.index] == 1 else None


class Program:
    """Runs the steps on other tensors of the same shapes; ``outputs(tensors)``: the leaves of the model's output."""

    def __init__(self, work: Steps, pool: Pool) -> None:
        self.pool, self.work = pool, work
        self.regions: list[Region] = []
        self.ends: list[str] = []  # of each region: what came after it
        self.proven = self.differentiated = False
        self.readers = Readers(work)
        self.uses = self.readers.uses
        self.inputs = [v.index for v in work.inputs]
        self.runs: list[Run] = []
        self._schedule()
        self.output = [self._leaf(v) for v in work.output]

    def outputs(self, tensors: Sequence[Tensor]) -> list[Any]:
        values: Values = [None] * self.work.count
        for i, t in zip(self.inputs, tensors, strict=True):
            values[i] = t
        for run in self.runs:
            run(values)
        return [leaf(values) for leaf in self.output]

    def _leaf(self, v: Any) -> Callable[[Values], Any]:
        if isinstance(v, Read):
            i, look, form = v.value.index, _look(v), _format(v.value.place)
            if form is None:
                return (lambda values: values[i]) if look is None else (lambda values: look(values[i]))
            # In memory as the model would leave it: views that work of its output are to work of this one.
            first = self.work.inputs[0]
            x, same = first.index, _format(first.place) == form

            def run(values: Values) -> Any:
                out = values[i].contiguous(memory_format=memory_format(values[x]) if same else form)
                return out if look is None else look(out)

            return run
        if isinstance(v, Constant):
            v = self.pool.constant(v)
        return lambda values: v

    # ---- regions ----

    def _specs(self) -> dict[int, Spec]:
        """Nodes by the number of their first step."""
        found: dict[int, Spec] = {}
        taken: set[int] = set()
        for i, step in enumerate(self.work.steps):
            if i in taken or i in self.readers.dead:
                continue
            layer = self.pool.layer(step.func) if step.name == "leaf" else None
            spec = spec_of(i, step, layer, self.uses)
            if spec is None:
                continue
            while (j := self.readers.only(spec.out)) is not None and j not in taken:
                if not spec.extend(self.work.steps[j], self.uses):
                    break
                spec.steps.append(j)
            taken.update(spec.steps)
            found[i] = spec
        return found

    def _schedule(self) -> None:
        specs = self._specs()
        last = {spec.steps[-1]: spec for spec in specs.values()}
        inner = {i for spec in specs.values() for i in spec.steps}
        group: list[Spec] = []

        def close(why: str) -> None:
            if any(spec.masked for spec in group):
                self._region(group)
                self.ends.append(why)
            else:
                self.runs += [self._plain(self.work.steps[i]) for i in sorted(i for spec in group for i in spec.steps)]
            group.clear()

        for i, step in enumerate(self.work.steps):
            if i in self.readers.dead:
                continue
            made = {spec.out.index for spec in group}
            spec = last.get(i)
            if spec is not None and isinstance(spec, CopySpec) and spec.reads[0].value.index not in made:
                spec = None
            elif spec is None and i in inner:
                continue
            reads = list(_reads((step.args, step.kwargs))) if spec is None else spec.reads
            if spec is None:
                if any(r.value.index in made for r in reads):
                    close(f"{step.name} is done by torch")
                self.runs.append(self._plain(step))
                continue
            if any(r.value.index in made and not (as_maps(r) or is_flat(r)) for r in reads):
                close(f"{self._named(spec)} reads a part or another view of it")
            elif group and group[0].out.place.size[0] != spec.out.place.size[0]:
                close(f"{self._named(spec)} has another batch size")
            group.append(spec)
        close("the end of the model")

    def _named(self, spec: Spec) -> str:
        step = self.work.steps[spec.steps[0]]
        return self.pool.layer(step.func).name if spec.masked else step.name

    def _region(self, group: list[Spec]) -> None:
        nodes = _Nodes(self.pool, {spec.out.index for spec in group})
        for spec in group:
            nodes.add_spec(spec)
        outside = [spec.out for spec in group if self.uses[spec.out.index] > nodes.own[spec.out.index]]
        outputs = sorted({nodes.made[v.index] for v in outside})
        region = self.pool.region(tuple(nodes.keys), nodes.all, len(nodes.inputs), outputs)
        self.regions.append(region)
        looks, shapes = nodes.looks, nodes.shapes
        # Handed out as rows, where nobody reads them as maps of one pixel.
        rows = [all(len(v.place.size) == 2 for v in outside if nodes.made[v.index] == at) for at in outputs]
        slots, given = [], set()
        for v in outside:
            at = outputs.index(nodes.made[v.index])
            # A copy of a value is the value itself only as long as nobody can write into one of them.
            slots.append((v.index, at, len(v.place.size) == 2 and not rows[at], at in given))
            given.add(at)

        def run(values: Values) -> None:
            xs = [values[i] if look is None else look(values[i]) for i, look in looks]
            if nothing_intercepts() and not (torch.is_grad_enabled() and any(x.requires_grad for x in xs)):
                outs, _ = region.forward(_shaped(xs, shapes), False)
                outs = [out.flatten(1) if flat else out for out, flat in zip(outs, rows, strict=True)]
            else:
                outs = _RunRegion.apply(region, shapes, rows, *xs)
            for slot, i, flat, copied in slots:
                out = outs[i].clone() if copied else outs[i]
                values[slot] = out.flatten(1) if flat else out

        if slots:
            self.runs.append(run)

    # ---- everything else ----

    def _plain(self, step: Step) -> Run:
        if step.name == "overlay":
            old, new, known = step.args
            put, out = overlaying(known, new.place), step.results[0]
            assert out is not None
            return _single(put, (old if isinstance(old, Read) else self.pool.constant(old), new), out.index)
        args = replaced(step.args, lambda v: self.pool.constant(v) if isinstance(v, Constant) else v)
        kwargs = replaced(step.kwargs, lambda v: self.pool.constant(v) if isinstance(v, Constant) else v)
        function = self.pool.layer(step.func) if step.name == "leaf" else functional(step)
        if len(step.results) == 1 and step.results[0] is not None and not any(_reads(kwargs)):
            return _single(function, args, step.results[0].index, kwargs)
        slots = [None if v is None else v.index for v in step.results]

        def run(values: Values) -> None:
            out = function(*_filled(args, values), **_filled(kwargs, values))
            for slot, t in zip(slots, inside(out), strict=True):
                if slot is not None:
                    values[slot] = t

        return run


class _Nodes:
    """Numbers the values of a region, and its nodes."""

    def __init__(self, pool: Pool, inside: set[int]) -> None:
        self.pool, self.inside = pool, inside
        self.made: dict[int, int] = {}  # values of the record
        self.keys: list[Any] = []
        self.makes: list[Callable[[], Node]] = []
        self.inputs: dict[Any, int] = {}
        self.looks: list[tuple[int, Callable[[Tensor], Tensor] | None]] = []
        self.shapes: Shapes = []  # in which the inputs are read, where that is another than what `looks` shows
        self.own = collections.Counter[int]()  # reads inside
        self.more: dict[Any, int] = {}  # values as rows, and those of one pixel as whole maps

    def all(self) -> list[Node]:
        return [make() for make in self.makes]

    def add_spec(self, spec: Spec) -> None:
        first, *others = spec.reads
        numbers = [self._number(first)]
        if isinstance(spec, CopySpec):
            self.made[spec.out.index] = numbers[0]
            return
        size = map_size(spec.out.place)
        assert size is not None
        for read in others:
            at = self._number(read)
            if isinstance(spec, UnitSpec) and map_size(read.place) != size:  # one pixel, to be added to all
                make = functools.partial(Spread, "spread", at, size[1:], self.pool.device)
                at = self._once(("spread", at, size), make)
            numbers.append(at)
        key = (*spec.key(self.pool), tuple(numbers))
        self.made[spec.out.index] = self._add(key, lambda: spec.node(self.pool, numbers))

    def _add(self, key: Any, make: Callable[[], Node]) -> int:
        self.keys.append(key)
        self.makes.append(make)
        return len(self.makes) - 1

    def _once(self, key: Any, make: Callable[[], Node]) -> int:
        if key not in self.more:
            self.more[key] = self._add(key, make)
        return self.more[key]

    def _number(self, read: Read) -> int:
        """The value that a node reads."""
        if read.value.index in self.inside:
            self.own[read.value.index] += 1
            at = self.made[read.value.index]
            return at if as_maps(read) else self._once(("flatten", at), lambda: Flatten("flatten", at))
        key = (type(read), read.value.index, read.place)
        if key not in self.inputs:
            self.inputs[key] = -1 - len(self.inputs)
            shape = (*read.shape, 1, 1)[:4]
            self.looks.append((read.value.index, None if reshaped(read) else _look(read)))
            self.shapes.append(shape if reshaped(read) or len(read.shape) == 2 else None)
        return self.inputs[key]


def _reads(v: Any) -> Iterator[Read]:
    return (r for r in inside(v) if isinstance(r, Read))


def _format(place: Place) -> torch.memory_format | None:
    """That of maps, None where they are of neither format or of both."""
    if len(place.size) != 4 or not place.dense():
        return None
    order = place.order()
    rows, last = order == sorted(order), order == [d for d in (0, 2, 3, 1) if d in order]
    return None if rows == last else torch.contiguous_format if rows else torch.channels_last


def _look(read: Read) -> Callable[[Tensor], Tensor] | None:
    look = looking(read.value.place, read.place)
    if not isinstance(read, Cut):
        return look
    return torch.Tensor.detach if look is None else (lambda t: look(t).detach())


def _filled(v: Any, values: Values) -> Any:
    def fill(r: Any) -> Any:
        if not isinstance(r, Read):
            return r
        look = _look(r)
        return values[r.value.index] if look is None else look(values[r.value.index])

    return replaced(v, fill)


def _single(function: Callable[..., Any], args: Sequence[Any], slot: int, kwargs: dict[str, Any] | None = None) -> Run:
    """function(*args) into a slot; what does not change from call to call is done here."""
    given = kwargs or {}
    template = list(args)
    reads = [(i, a.value.index, _look(a)) for i, a in enumerate(template) if isinstance(a, Read)]
    deep = [i for i, a in enumerate(template) if not isinstance(a, Read) and any(_reads(a))]

    def run(values: Values) -> None:
        filled = template.copy()
        for i, v, look in reads:
            filled[i] = values[v] if look is None else look(values[v])
        for i in deep:
            filled[i] = _filled(template[i], values)
        values[slot] = function(*filled, **given)

    return run
