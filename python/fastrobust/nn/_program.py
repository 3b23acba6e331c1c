"""Programs of frozen models: the steps of a record, masked convolutions in regions, everything else as it ran.

Steps are aten operations on values that nobody writes into (see ``_record``). A masked convolution with the batch
normalisation, the addition and the ReLU that follow it, each the only reader of what comes before, is a unit; neighbouring
units make a region. Units, regions and linear layers are shared between the programs of different shapes.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._places import Constant, Place, Read, Value, inside, replaced
from .._record import Step, UnreadableModelError
from ..ops import binary as ops
from ..ops._dense_conv import dense_weight
from ..ops._library import nothing_intercepts
from ..reference.binary import PackedWeight
from ._region import Region, Unit
from ._views import looking, overlaying
from .masked import BinaryMaskedConv2d, BinaryMaskedLinear, MaskedLayer

Values = list[Any]
Run = Callable[[Values], None]
# Where an operation has its flag for batch statistics; None where it has none and uses running ones.
_NORMS = {
    "native_batch_norm": 5, "cudnn_batch_norm": 5, "miopen_batch_norm": 5,
    "_native_batch_norm_legit_no_training": None, "_batch_norm_no_update": None,
}  # fmt: skip


class Cut(Read):
    """A read through which no gradient passes: of a detached tensor, or under no_grad."""

    __slots__ = ()


@dataclasses.dataclass(eq=False)
class Layer:
    """A masked layer as it was at the last update."""

    name: str
    packed: PackedWeight
    geometry: Any
    scale: Tensor | None
    shift: Tensor | None

    @staticmethod
    def of(name: str, layer: MaskedLayer) -> Layer:
        shift = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)
        return Layer(name, layer.packed(), layer.geometry(), layer.channel_scale(), shift)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer on maps x (N, C, H, W), for whoever may look on or differentiate in any way."""
        g = self.geometry
        scale, shift = (None if t is None else t.to(x.dtype) for t in (self.scale, self.shift))
        if len(self.packed.shape) == 2:
            return ops.masked_linear(x.flatten(1), self.packed, None, scale=scale, shift=shift)[:, :, None, None]
        return ops.masked_conv2d(
            x, self.packed, None, g.stride, g.padding, g.dilation, g.groups, scale=scale, shift=shift
        )


@dataclasses.dataclass(eq=False)
class Norm:
    """Batch normalisation with fixed statistics, x alpha + beta per channel."""

    source: Any
    tensors: tuple[Any, ...]  # weight, bias, mean, variance as recorded
    eps: float

    @staticmethod
    def of(step: Step, uses: collections.Counter[int]) -> Norm | None:
        if step.name not in _NORMS or step.kwargs or any(v is not None and uses[v.index] for v in step.results[1:]):
            return None
        flag, (source, *tensors) = _NORMS[step.name], step.args[:5]
        if flag is not None and step.args[flag]:
            return None
        fixed = all(t is None or isinstance(t, Constant) for t in tensors) and None not in tensors[2:]
        return Norm(source, tuple(tensors), float(step.args[-1])) if fixed else None

    def affine(self, pool: Pool) -> tuple[Tensor, Tensor]:
        weight, bias, mean, var = (None if t is None else pool.constant(t) for t in self.tensors)
        assert mean is not None and var is not None
        return affine(weight, bias, mean, var, self.eps)

    def key(self, pool: Pool) -> tuple[Any, ...]:
        return (*(None if t is None else id(pool.constant(t)) for t in self.tensors), self.eps)


def affine(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Batch normalisation with these statistics as x alpha + beta."""
    alpha = torch.rsqrt(var + eps)
    if weight is not None:
        alpha = alpha * weight
    beta = -mean * alpha
    if bias is not None:
        beta = beta + bias
    return alpha.detach(), beta.detach()


class Pool:
    """What the programs of one state of a model share: its layers and constants, regions and dense weights."""

    def __init__(self, layers: dict[int, Layer], owned: set[int]) -> None:
        self.layers = layers  # by the id of the module
        self.kept: list[MaskedLayer] = []  # whose ids must not be another's
        self.owned = owned  # storages that nobody but the programs knows
        self.constants: dict[Any, Tensor] = {}
        self.regions: dict[Any, Region] = {}
        self.linears: dict[Any, FrozenLinear] = {}

    def layer(self, module: MaskedLayer) -> Layer:
        """The layer of a module; one that is none of the model's own, as inside another frozen model, as it is now."""
        if id(module) not in self.layers:
            self.layers[id(module)] = Layer.of(f"masked layer {len(self.layers)}", module)
            self.kept.append(module)
        return self.layers[id(module)]

    def constant(self, c: Constant) -> Tensor:
        """The tensor, such that nobody else can write into it, and the same one at every request."""
        t = c.tensor
        if c.base is None:
            return t.detach() if t.requires_grad else t
        key = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())
        if key not in self.constants:
            own = t.detach() if key[0] in self.owned else t.detach().clone(memory_format=torch.preserve_format)
            own.frozen_from = t  # type: ignore[attr-defined]  # its storage must not be given to another
            self.constants[key] = own
        return self.constants[key]

    def region(self, units: list[tuple[_UnitSteps, int, int | None]], inputs: int, outputs: list[int]) -> Region:
        key = (tuple((*u.key(self), at, res) for u, at, res in units), inputs, tuple(outputs))
        if key not in self.regions:
            made = [u.unit(self, at, res) for u, at, res in units]
            self.regions[key] = Region(made, inputs, outputs)
        return self.regions[key]

    def linear(self, layer: Layer, norm: Norm | None) -> FrozenLinear:
        key = (layer.name, None if norm is None else norm.key(self))
        if key not in self.linears:
            self.linears[key] = FrozenLinear(layer, None if norm is None else norm.affine(self))
        return self.linears[key]


class FrozenLinear:
    """A masked linear layer with the batch normalisation that follows it, if any."""

    def __init__(self, layer: Layer, norm: tuple[Tensor, Tensor] | None) -> None:
        self.layer, self.packed, self.geometry = layer, layer.packed, layer.geometry
        self.scale, self.shift, self.folded = layer.scale, layer.shift, norm is not None
        if norm is not None:
            self.scale = norm[0] if self.scale is None else self.scale * norm[0]
            self.shift = norm[1] if self.shift is None else self.shift * norm[0] + norm[1]
        weight = dense_weight(self.packed, torch.float32, torch.contiguous_format).flatten(1)
        self.weight = weight if self.scale is None else weight * self.scale[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        if ops.path_of(self.packed, x.shape[0], 1, 1, self.geometry).path == "dense":
            return F.linear(x, self.weight, self.shift)
        return ops.masked_linear(x, self.packed, None, scale=self.scale, shift=self.shift)


class _RunRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: Region, *inputs: Tensor) -> tuple[Tensor, ...]:
        keep = any(ctx.needs_input_grad[1:])
        outs, saved = region.forward([x.resolve_neg() for x in inputs], keep)
        ctx.region, ctx.saved, ctx.sizes = region, saved, [x.shape for x in inputs]
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads):
            return None, *([None] * len(ctx.sizes))
        given = [None if g is None else g.contiguous() for g in grads]
        with torch.autocast(next(g for g in given if g is not None).device.type, enabled=False):
            return None, *ctx.region.backward(given, ctx.saved, ctx.sizes)


def _flat(read: Read) -> Read:
    """Of rows seen as maps (N, C, 1, 1), the rows (N, C)."""
    place = read.place
    return type(read)(read.value, Place(place.size[:2], place.stride[:2], place.offset))


def _whole_rows(read: Any) -> bool:
    """All of the maps (N, C, 1, 1) as rows (N, C)."""
    whole = isinstance(read, Read) and not isinstance(read, Cut)
    return whole and len(read.shape) == 2 and read.place == _flat(Read(read.value, read.value.place)).place


def is_whole(read: Any) -> bool:
    return isinstance(read, Read) and not isinstance(read, Cut) and read.place == read.value.place


class _UnitSteps:
    """The steps that one unit stands for."""

    def __init__(self, layer: Layer, at: int, step: Step) -> None:
        out = step.results[0]
        assert out is not None
        self.layer, self.last, self.out = layer, at, out
        self.source: Read = step.args[0]
        self.norm: Norm | None = None
        self.residual: Read | None = None
        self.relu = False

    def extend(self, step: Step, uses: collections.Counter[int]) -> bool:
        """Whether the step, the only reader of the unit's value, is part of the unit from now on."""
        if self.relu or len(step.results) < 1 or step.results[0] is None:
            return False
        norm = Norm.of(step, uses)
        if norm is not None:
            if self.norm is not None or self.residual is not None or not is_whole(norm.source):
                return False
            self.norm = norm
        elif step.name == "add" and len(step.args) == 2 and step.kwargs.get("alpha", 1) == 1:
            own = [is_whole(a) and a.value is self.out for a in step.args]
            other = step.args[1] if own[0] else step.args[0]
            if self.residual is not None or not any(own) or not isinstance(other, Read):
                return False
            if other.shape != self.out.place.size or other.value.dtype != torch.float32:
                return False
            self.residual = other
        elif step.name == "relu" and is_whole(step.args[0]):
            self.relu = True
        else:
            return False
        self.out = step.results[0]
        return True

    def key(self, pool: Pool) -> tuple[Any, ...]:
        return (self.layer.name, None if self.norm is None else self.norm.key(pool), self.relu)

    def unit(self, pool: Pool, source: int, residual: int | None) -> Unit:
        scale, shift = self.layer.scale, self.layer.shift
        if self.norm is not None:
            alpha, beta = self.norm.affine(pool)
            shift = beta if shift is None else shift * alpha + beta
            scale = alpha if scale is None else scale * alpha
        return Unit(self.layer.name, source, self.layer.packed, self.layer.geometry, scale, shift, residual, self.relu)


@dataclasses.dataclass(eq=False)
class Steps:
    """What a program is made of: steps in order, values of the inputs, reads and constants in the leaves of the output."""

    steps: Sequence[Step]
    inputs: list[Value]
    output: list[Any]
    spec: Any  # how the leaves of the output are put together
    count: int  # of values


class Readers:
    """Who reads the values of a record."""

    def __init__(self, work: Steps) -> None:
        self.uses = collections.Counter[int]()
        self.last: dict[int, int] = {}
        for i, step in enumerate(work.steps):
            for read in _reads((step.args, step.kwargs)):
                self.uses[read.value.index] += 1
                self.last[read.value.index] = i
        for read in _reads(work.output):
            self.uses[read.value.index] += 1
            self.last.pop(read.value.index, None)

    def only(self, value: Value) -> int | None:
        """The step that alone reads a value, once."""
        return self.last.get(value.index) if self.uses[value.index] == 1 else None


class Program:
    """Runs the steps on other tensors of the same shapes. ``outputs(tensors)`` returns the leaves of the model's output."""

    def __init__(self, work: Steps, pool: Pool) -> None:
        self.pool, self.work = pool, work
        self.regions: list[Region] = []
        self.linears: list[FrozenLinear] = []
        self.proven = self.differentiated = False
        self.readers = Readers(work)
        self.uses = self.readers.uses
        self.inputs = [v.index for v in work.inputs]
        self.runs: list[Run] = []
        self._schedule(*self._units())
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
            i, look = v.value.index, _look(v)
            return (lambda values: values[i]) if look is None else (lambda values: look(values[i]))
        if isinstance(v, Constant):
            v = self.pool.constant(v)
        return lambda values: v

    # ---- units and regions ----

    def _units(self) -> tuple[dict[int, _UnitSteps], dict[int, tuple[Layer, Norm | None, Value]], set[int]]:
        """Units and linear layers by the number of their last step, and the steps inside of them."""
        units: dict[int, _UnitSteps] = {}
        linears: dict[int, tuple[Layer, Norm | None, Value]] = {}
        taken: set[int] = set()
        for i, step in enumerate(self.work.steps):
            if step.name != "leaf":
                continue
            layer, out = self.pool.layer(step.func), step.results[0]
            assert out is not None
            if isinstance(step.func, BinaryMaskedConv2d) and out.dtype == torch.float32:
                unit = _UnitSteps(layer, i, step)
                taken.add(i)
                while (j := self.readers.only(unit.out)) is not None and j not in taken:
                    if not unit.extend(self.work.steps[j], self.uses):
                        break
                    unit.last = j
                    taken.add(j)
                units[unit.last] = unit
            elif isinstance(step.func, BinaryMaskedLinear) and out.dtype == torch.float32:
                j = self.readers.only(out)
                norm = None if j is None else Norm.of(self.work.steps[j], self.uses)
                if norm is None or not _whole_rows(norm.source):
                    linears[i] = layer, None, out
                    continue
                assert j is not None
                taken |= {i, j}
                out = self.work.steps[j].results[0]
                assert out is not None
                linears[i] = layer, norm, out
        return units, linears, taken - units.keys()

    def _schedule(
        self, units: dict[int, _UnitSteps], linears: dict[int, tuple[Layer, Norm | None, Value]], inner: set[int]
    ) -> None:
        group: list[_UnitSteps] = []

        def close() -> None:
            if group:
                self._region(list(group))
                group.clear()

        for i, step in enumerate(self.work.steps):
            made = {u.out.index for u in group}
            if i in units:
                unit = units[i]
                read = [r for r in (unit.source, unit.residual) if r is not None]
                apart = any(r.value.index in made and not is_whole(r) for r in read)
                if apart or (group and group[0].out.place.size[0] != unit.out.place.size[0]):
                    close()
                group.append(unit)
            elif i in linears or i not in inner:
                if any(r.value.index in made for r in _reads((step.args, step.kwargs))):
                    close()
                if i in linears:
                    layer, norm, out = linears[i]
                    self.linears.append(self.pool.linear(layer, norm))
                    self.runs.append(self._linear(self.linears[-1], step.args[0], out))
                else:
                    self.runs.append(self._plain(step))
        close()

    def _region(self, group: list[_UnitSteps]) -> None:
        made = {u.out.index: i for i, u in enumerate(group)}
        inputs: dict[Any, int] = {}
        looks: list[tuple[int, Callable[[Tensor], Tensor] | None]] = []
        own = collections.Counter[int]()

        def number(read: Read | None) -> int | None:
            if read is None:
                return None
            if read.value.index in made:
                own[read.value.index] += 1
                return made[read.value.index]
            key = (type(read), read.value.index, read.place)
            if key not in inputs:
                inputs[key] = -1 - len(inputs)
                looks.append((read.value.index, _look(read)))
            return inputs[key]

        units: list[tuple[_UnitSteps, int, int | None]] = []
        for u in group:
            source = number(u.source)
            assert source is not None
            units.append((u, source, number(u.residual)))
        outputs = [i for i, u in enumerate(group) if self.uses[u.out.index] > own[u.out.index]]
        region = self.pool.region(units, len(inputs), outputs)
        slots = [group[i].out.index for i in outputs]
        self.regions.append(region)

        def run(values: Values) -> None:
            xs = [values[i] if look is None else look(values[i]) for i, look in looks]
            if nothing_intercepts() and not (torch.is_grad_enabled() and any(x.requires_grad for x in xs)):
                outs, _ = region.forward([x.resolve_neg() for x in xs], False)
            else:
                outs = _RunRegion.apply(region, *xs)
            for slot, out in zip(slots, outs, strict=True):
                values[slot] = out

        if slots:
            self.runs.append(run)

    # ---- everything else ----

    @staticmethod
    def _linear(linear: FrozenLinear, read: Read, out: Value) -> Run:
        source, look, slot, size = read.value.index, _look(_flat(read)), out.index, out.place.size

        def run(values: Values) -> None:
            x = values[source] if look is None else look(values[source])
            y = linear(x)
            values[slot] = y if len(size) == 2 else y[:, :, None, None]

        return run

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


def _reads(v: Any) -> Iterator[Read]:
    return (r for r in inside(v) if isinstance(r, Read))


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


# In-place operations whose functional forms torch does not differentiate: what they leave depends on the last argument.
_FILLS: dict[str, Callable[..., Tensor]] = {
    "copy": lambda target, source, *_: source.to(target.device),
    "fill": lambda target, value: value if isinstance(value, Tensor) else torch.full_like(target, value),
    "zero": torch.zeros_like,
}


def functional(step: Step) -> Callable[..., Any]:
    """The operation of a step, writing into nothing."""
    func, schema, value = step.func, step.func._schema, step.results[0]
    if not schema.is_mutable:
        return func
    assert value is not None
    space, _, name = schema.name.partition("::")
    packet = getattr(getattr(torch.ops, space), name.removesuffix("_"), None)
    names = [a.name for a in schema.arguments if not a.kwarg_only or a.alias_info is None]
    dtype, size = value.dtype, value.place.size

    def cast(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            out = f(*args, **kwargs)
            return (out if out.dtype == dtype else out.to(dtype)).expand(size)

        return run

    if step.name in _FILLS and space == "aten":
        return cast(_FILLS[step.name])
    for overload in packet.overloads() if packet is not None else ():
        other = getattr(packet, overload)
        same = [a.name for a in other._schema.arguments] == names
        types = [str(a.type) for a in other._schema.arguments] == [str(a.type) for a in schema.arguments[: len(names)]]
        if not other._schema.is_mutable and same and types:
            return cast(other)
    if name.endswith("_") and schema.arguments[0].alias_info is not None:
        return lambda target, *args, **kwargs: func(target.clone(), *args, **kwargs)
    raise UnreadableModelError(f"model: {name}.{func._overloadname} cannot be frozen; write it without out=")
