"""From a Recording to a Graph: what each operation of torch becomes. Handlers get the operation's arguments by the
names of its schema, inputs that depend on x as ``Tracked`` and the others as ``Constant``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrobust._places import Constant, Place, Read, Value, inside, place_of, replaced
from fastrobust._record import Recording, Step
from fastrobust.bounds import graph as G
from fastrobust.bounds.builder import Builder, Ref, Tracked, per_example


class _Patchwork(NamedTuple):
    """A value written in parts: of each element the place among the flat sources, one behind the other, or -1: in
    rest."""

    sources: list[Ref]
    places: Tensor
    rest: Tensor | None


class Lowering(Builder):
    """``baked``: the graph holds values that this call computed, so that the next call needs a graph of its own."""

    def __init__(self, recording: Recording, shape: tuple[int, ...], handlers: Mapping[str, Any]):
        super().__init__(shape)
        self.recording, self.handlers, self.baked = recording, handlers, False
        self.refs: dict[Value, Ref] = {recording.input: Ref(0)}
        self.patches: dict[Value, _Patchwork] = {}
        self.views: dict[tuple[Value, Place], Ref] = {}

    def build(self) -> G.Graph:
        out = self.recording.output
        if not isinstance(out, Read):
            kind = (
                "a tensor that does not depend on the input"
                if isinstance(out, Constant)
                else type(self.recording.result).__name__
            )
            raise ValueError(f"model: forward returns {kind}, expected one tensor that depends on the input")
        out, ends = self._before_log_softmax(out)
        wanted = {out.value}
        needed: list[Step] = []
        for step in reversed(self.recording.steps):
            if any(v in wanted for v in step.results if v is not None):
                needed.append(step)
                wanted |= {r.value for r in inside((_read(step), step.kwargs)) if isinstance(r, Read)}
        for step in reversed(needed):
            self.where, self.line = step.where, step.line
            self._lower(step)
        self.where = "output"
        size = out.place.size
        result = tuple(size[1:]) if size and size[0] == 1 else tuple(size)
        return G.Graph(self.nodes, self.read(out).ref.index, result, log_softmax=ends)

    def _before_log_softmax(self, out: Read) -> tuple[Read, bool]:
        """The logits of a model that ends in their log-softmax, which takes the same number from all of an example."""
        for step in self.recording.steps:
            if step.name in ("_log_softmax", "log_softmax") and step.results[0] == out.value:
                logits, dim = _read(step)[:2]
                size = out.place.size
                if isinstance(logits, Read) and out.place == out.value.place and len(size) == 2 and dim in (1, -1):
                    return logits, True
        return out, False

    def _lower(self, step: Step) -> None:
        if step.name == "overlay":
            result = step.results[0]
            assert result is not None
            self.patches[result] = self._overlay(*step.args)
            return
        if step.name == "leaf":
            raise self.fail(type(step.func).__name__)
        handler = self.handlers.get(step.name)
        if handler is None:
            own = step.module is not None and type(step.module).__module__.startswith("torch.nn.")
            raise self.fail(type(step.module).__name__ if own else f"operation {step.name}")
        names = [a.name for a in step.func._schema.arguments]
        given = {a.name: a.default_value for a in step.func._schema.arguments}
        given.update(zip(names, _read(step), strict=False))
        given.update(step.kwargs)
        args = {k: replaced(v, lambda t: self.read(t) if isinstance(t, Read) else t) for k, v in given.items()}
        args["step"] = step
        first = step.results[0]
        assert first is not None
        self.size = first.place.size
        out = handler(self, args)
        if self.shape(out) != per_example(self.size):
            raise self.fail(f"operation {step.name}", f" from shape to shape {self.size}")
        self.refs[first] = out

    # -- where tensors lie ---------------------------------------------------------------------------------------------
    def read(self, r: Read) -> Tracked:
        v, place = r
        if v not in self.refs and v not in self.patches:
            raise self.fail("a second result of an operation (the places of a maximum, saved statistics)")
        if place == v.place and v in self.refs:
            return Tracked(self.refs[v], place.size)
        if r not in self.views:
            span = max(1, int(v.place.positions().max()) + 1 if v.place.numel else 1)
            logical = torch.full((span,), -1)
            logical[v.place.positions().flatten()] = torch.arange(v.place.numel)
            wanted = place.positions().flatten()
            if place.numel and (wanted.max() >= span or wanted.min() < 0 or (logical[wanted] < 0).any()):
                raise self.fail("a view that reaches beyond what an operation wrote")
            at, shape = logical[wanted], per_example(place.size)
            if v in self.refs:
                self.views[r] = self.pick(self.refs[v], at, shape, _permutation(v.place, place))
            else:
                self.views[r] = self._gathered(self.patches[v], at, shape)
        return Tracked(self.views[r], place.size)

    def _gathered(self, patchwork: _Patchwork, at: Tensor, shape: tuple[int, ...]) -> Ref:
        """The elements ``at`` of a value written in parts."""
        sources, places, rest = patchwork
        places = places[at]
        total = sum(self.nodes[r.index].size for r in sources)
        parts = tuple(r.index for r in sources)
        both = sources[0] if len(sources) == 1 else self.add(G.Concat(parts, (total,), self.where))
        out = self.pick(both, places, shape)
        still = places < 0
        if rest is not None and bool(still.any()):
            kept = rest[at.to(rest.device)]
            shift = torch.where(still.to(rest.device), kept, torch.zeros_like(kept)).view(shape)
            out = self.affine(out, None, self.constant(Constant(shift, None)))
        return out

    def _overlay(self, old: Read | Constant, new: Read, known: Place) -> _Patchwork:
        span = int(known.positions().max()) + 1
        at = torch.full((span,), -1)
        at[known.positions().flatten()] = torch.arange(known.numel)
        where = at[new.place.positions().flatten()]
        sources: list[Ref] = []
        rest: Tensor | None = None
        if isinstance(old, Constant):
            places, rest = torch.full((known.numel,), -1), old.tensor
        elif old.value in self.patches:
            before = self.patches[old.value]
            sources, places, rest = list(before.sources), before.places.clone(), before.rest
        else:
            sources, places = [self.flat(self.refs[old.value])], torch.arange(known.numel)
        first = sum(self.nodes[r.index].size for r in sources)
        places[where] = first + torch.arange(len(where))
        sources.append(self.flat(self.read(Read(new.value, new.value.place)).ref))
        return _Patchwork(sources, places, rest)

    def flat(self, x: Ref) -> Ref:
        return self.to_shape(x, (self.nodes[x.index].size,))

    def moved(self, x: Tracked, f: Callable[[Tensor], Tensor]) -> Tracked:
        """What f, which only moves numbers and fills in zeros, makes of x; f takes tensors of x's size."""
        n = math.prod(x.size)
        out = f(torch.arange(1, n + 1, dtype=torch.float64).view(x.size))
        return Tracked(self.pick(x.ref, out.flatten().long() - 1, per_example(tuple(out.shape))), tuple(out.shape))

    def expanded(self, x: Tracked, size: tuple[int, ...]) -> Ref:
        return (
            x.ref
            if x.size == size
            else self.moved(x, lambda t: t.expand(size)).ref
            if math.prod(x.size) != math.prod(size)
            else self.to_shape(x.ref, per_example(size))
        )

    # -- constants -----------------------------------------------------------------------------------------------------
    def constant(self, c: Any) -> Any:
        """A getter of the tensor, read anew from the module at every call; a number stays one."""
        if not isinstance(c, Constant):
            return c
        t, base = c
        if base is None:
            self.baked = True
            return lambda: t
        if base is t or tuple(base.shape) == tuple(t.shape) and place_of(base) == place_of(t):
            return lambda: base
        size = tuple(t.shape)
        if base.dim() == 2 and place_of(base.t()) == place_of(t):
            return lambda: base.t()
        if t.is_contiguous() and base.is_contiguous() and t.numel() == base.numel():
            return lambda: base.reshape(size)
        self.baked = True
        return lambda: t

    def matrix(self, c: Constant, transposed: bool) -> G.Getter:
        """A (K, M) matrix, or its transpose; the parameter itself where it is that."""
        get = self.constant(c)
        if not transposed:
            return get
        base = c.base
        if base is not None and base.dim() == 2 and place_of(base.t()) == place_of(c.tensor):
            return lambda: base
        return lambda: get().t()

    def per_example_constant(self, c: Any, size: tuple[int, ...]) -> Any:
        """A constant that meets a tensor of ``size``, broadcastable to one example of it."""
        if not isinstance(c, Constant):
            return c
        if c.tensor.is_complex():
            raise self.fail("a complex constant")
        get = self.constant(c)
        t = c.tensor
        if size and size[0] == 1 and t.dim() == len(size) and t.dim() > 0:
            return lambda: get().squeeze(0)
        return get


def _read(step: Step) -> tuple[Any, ...]:
    """The arguments whose values matter: what is written over does not."""
    return (None, *step.args[1:]) if step.name in ("copy", "fill", "zero") else step.args


def _permutation(a: Place, b: Place) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(sizes, dims): b is a's elements, viewed as sizes and permuted; None where it is not that."""
    if a.offset != b.offset or a.numel != b.numel or not (a.dense() and b.dense()):
        return None
    if a.order() != sorted(a.order()):  # a itself lies in another order: only its own dimensions moved
        if sorted(zip(a.stride, a.size, strict=True)) != sorted(zip(b.stride, b.size, strict=True)):
            return None
        own = [d for d in range(len(a.size)) if a.size[d] > 1]
        strides = {a.stride[d]: i for i, d in enumerate(own)}
        return tuple(a.size[d] for d in own), tuple(strides[s] for s, n in zip(b.stride, b.size, strict=True) if n > 1)
    order = b.order()
    place = {d: i for i, d in enumerate(order)}
    return tuple(b.size[d] for d in order), tuple(place[d] for d in range(len(b.size)) if b.size[d] > 1)
