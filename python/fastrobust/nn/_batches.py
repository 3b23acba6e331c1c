"""Records that serve every batch size: three of small batches whose numbers lie on lines.

A record holds for one shape. Where the steps of three batch sizes are the same but for numbers that grow by as much per
example, those of any other batch size follow. What forward asks about the batch size on the way (``x.shape[0] > 64``)
is noted, and has to be answered alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._places import Constant, Place, Read, Value
from .._record import Step, current
from ._observe import Call, Steps, observe

SIZES = (5, 9, 11)


class NotGeneralError(Exception):
    """The steps of one batch size do not tell those of another."""


@dataclass(frozen=True)
class Line:
    """slope n + start for a batch of n."""

    slope: int
    start: int

    def at(self, n: int) -> int:
        return self.slope * n + self.start


@dataclass(frozen=True)
class Question:
    """What forward asked about the batch size: how two lines compare."""

    ask: Callable[[int, int], bool]
    left: Line
    right: Line
    answer: bool

    def holds(self, n: int) -> bool:
        return self.ask(self.left.at(n), self.right.at(n)) == self.answer


class _Watch:
    def __init__(self, n: int) -> None:
        self.n = n
        self.asked: set[Question] = set()
        self.lost = False  # something was made of the number that is not followed


class _Count(int):
    """A number that depends on the batch size, and says what it is used for."""

    line: Line
    watch: _Watch

    @staticmethod
    def of(line: Line, watch: _Watch) -> int:
        if line.slope == 0:
            return line.start
        made = _Count(line.at(watch.n))
        made.line, made.watch = line, watch
        return made

    def _with(self, other: Any, combine: Callable[[Line, Line], Line | None], plain: Callable[..., Any]) -> Any:
        if not isinstance(other, int):
            self.watch.lost = True
            return plain(int(self), other)
        there = other.line if isinstance(other, _Count) else Line(0, int(other))
        line = combine(self.line, there)
        if line is None:
            self.watch.lost = True
            return plain(int(self), int(other))
        return _Count.of(line, self.watch)

    def __add__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: Line(a.slope + b.slope, a.start + b.start), operator.add)

    def __sub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: Line(a.slope - b.slope, a.start - b.start), operator.sub)

    def __rsub__(self, other: Any) -> Any:
        return self._with(other, lambda a, b: Line(b.slope - a.slope, b.start - a.start), lambda a, b: b - a)

    def __mul__(self, other: Any) -> Any:
        def product(a: Line, b: Line) -> Line | None:
            if a.slope and b.slope:
                return None
            c = b.start if a.slope else a.start
            return Line((a.slope or b.slope) * c, (a.start if a.slope else b.start) * c)

        return self._with(other, product, operator.mul)

    def __floordiv__(self, other: Any) -> Any:
        def quotient(a: Line, b: Line) -> Line | None:
            return (
                Line(a.slope // b.start, a.start // b.start)
                if not b.slope and b.start and a.slope % b.start == 0
                else None
            )

        return self._with(other, quotient, operator.floordiv)

    def __mod__(self, other: Any) -> Any:
        def rest(a: Line, b: Line) -> Line | None:
            return Line(0, a.start % b.start) if not b.slope and b.start and a.slope % b.start == 0 else None

        return self._with(other, rest, operator.mod)

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> int:
        return _Count.of(Line(-self.line.slope, -self.line.start), self.watch)

    def _compare(self, other: Any, ask: Callable[[Any, Any], bool]) -> Any:
        if not isinstance(other, int):
            self.watch.lost = self.watch.lost or other is not None
            return ask(int(self), other)
        there = other.line if isinstance(other, _Count) else Line(0, int(other))
        answer = ask(int(self), int(other))
        self.watch.asked.add(Question(ask, self.line, there, answer))
        return answer

    def __eq__(self, other: object) -> Any:
        return self._compare(other, operator.eq)

    def __ne__(self, other: object) -> Any:
        return self._compare(other, operator.ne)

    def __lt__(self, other: Any) -> Any:
        return self._compare(other, operator.lt)

    def __le__(self, other: Any) -> Any:
        return self._compare(other, operator.le)

    def __gt__(self, other: Any) -> Any:
        return self._compare(other, operator.gt)

    def __ge__(self, other: Any) -> Any:
        return self._compare(other, operator.ge)

    def __bool__(self) -> bool:
        return bool(self._compare(0, operator.ne))


def _losing(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: _Count, *args: Any) -> Any:
        self.watch.lost = True
        return plain(int(self), *args)

    return method


for _name in (
    "__abs__",
    "__and__",
    "__divmod__",
    "__float__",
    "__format__",
    "__hash__",
    "__invert__",
    "__lshift__",
    "__or__",
    "__pow__",
    "__rand__",
    "__rdivmod__",
    "__repr__",
    "__rfloordiv__",
    "__rlshift__",
    "__rmod__",
    "__ror__",
    "__round__",
    "__rpow__",
    "__rrshift__",
    "__rshift__",
    "__rtruediv__",
    "__rxor__",
    "__str__",
    "__truediv__",
    "__xor__",
    "bit_length",
):
    setattr(_Count, _name, _losing(_name))


class _Sizes(TorchFunctionMode):
    """Sizes of what depends on the input are counted when forward reads them."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def _count(self, size: int, dim: int) -> int:
        n = self.watch.n
        if size == n or (dim == 0 and size and size % n == 0):
            return _Count.of(Line(size // n, 0), self.watch)
        return size

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        size = isinstance(out, torch.Size) or (type(out) is int and name in ("size", "numel", "nelement", "__len__"))
        if not size or not self._depends(args[0]):
            return out
        if isinstance(out, torch.Size):
            return torch.Size([self._count(size, d) for d, size in enumerate(out)])
        if name == "__len__":  # which Python makes an ordinary number of
            self.watch.lost = True
            return out
        t = args[0]
        if name == "size":
            return self._count(out, (args[1] if len(args) > 1 else kwargs["dim"]) % t.dim())
        grown = any(type(self._count(n, d)) is _Count for d, n in enumerate(t.shape))
        return _Count.of(Line(out // self.watch.n, 0), self.watch) if grown and out else out

    @staticmethod
    def _depends(t: Any) -> bool:
        recorder = current()
        return recorder is not None and isinstance(t, Tensor) and t.untyped_storage()._cdata in recorder.values


class Family:
    """The steps for any batch size of one kind of call."""

    def __init__(self, steps: Steps, questions: set[Question]) -> None:
        self.steps, self.questions = steps, questions  # numbers that grow are Lines

    @staticmethod
    def of(snapshot: Any, call: Call) -> Family:
        """Records three batches. Raises NotGeneralError, or what the model raises for such batches."""
        made = [_record(snapshot, call, n) for n in SIZES]
        if any(w.lost or w.asked != made[0][1].asked for _, w in made):
            raise NotGeneralError
        parts = [s for s, _ in made]
        return Family(_walked(_Merge(), parts), made[0][1].asked)

    def renewed(self, snapshot: Any, call: Call) -> Family:
        """The same with the constants and layers of another state of the model, when it does the same with them."""
        steps, watch = _record(snapshot, call, SIZES[0])
        if watch.lost or watch.asked != self.questions:
            raise NotGeneralError
        return Family(_walked(_Renew(), [self.steps, steps]), self.questions)

    def serves(self, n: int) -> bool:
        return n > 1 and all(q.holds(n) for q in self.questions)

    def at(self, n: int) -> Steps:
        return _walked(_At(n), [self.steps])


def batch_of(call: Call) -> int:
    return call.tensors[0].shape[0] if call.tensors[0].dim() else 0


def kind_of(call: Call, key: Any) -> Any:
    """Equal for calls that differ in the batch size alone."""
    n = batch_of(call)
    if len(key) == 2 and isinstance(key[0], torch.Size):
        return (key[0][1:], *key[1:])
    return (
        key[0],
        *[("n", p[0][1:], *p[1:]) if isinstance(p[0], torch.Size) and p[0][:1] == (n,) else p for p in key[1:]],
    )


def _record(snapshot: Any, call: Call, n: int) -> tuple[Steps, _Watch]:
    have, watch = batch_of(call), _Watch(n)
    at = torch.arange(n) % have
    tensors = [t[at.to(t.device)] if t.dim() and t.shape[0] == have else t for t in call.tensors]
    return observe(snapshot, call, tensors, _Sizes(watch)), watch


# ---- walking through records side by side ----


class _Merge:
    """One number of each of SIZES to a line or a constant."""

    def number(self, v: list[Any]) -> Any:
        if len(set(v)) == 1:
            return v[0]
        (a, b, c), (i, j, k) = v, SIZES
        slope, rest = divmod(b - a, j - i)
        if rest or a + slope * (k - i) != c:
            raise NotGeneralError
        return Line(slope, a - slope * i)

    def constant(self, v: list[Constant]) -> Constant:
        first = v[0]
        for other in v[1:]:
            same = _place(first.tensor) == _place(other.tensor)
            if (first.base is None) != (other.base is None) or not (same or _equal(first, other)):
                raise NotGeneralError
        return first

    def module(self, v: list[Any]) -> Any:
        return self.other(v)

    def other(self, v: list[Any]) -> Any:
        if any(type(o) is not type(v[0]) or o != v[0] for o in v):
            raise NotGeneralError
        return v[0]


class _Renew(_Merge):
    """A general record, and one of SIZES[0] of another state of the model."""

    def number(self, v: list[Any]) -> Any:
        if (v[0].at(SIZES[0]) if isinstance(v[0], Line) else v[0]) != v[1]:
            raise NotGeneralError
        return v[0]

    def constant(self, v: list[Constant]) -> Constant:
        a, b = v
        if a.tensor.shape != b.tensor.shape or a.tensor.dtype != b.tensor.dtype or (a.base is None) != (b.base is None):
            raise NotGeneralError
        return b

    def module(self, v: list[Any]) -> Any:
        if type(v[0]) is not type(v[1]):
            raise NotGeneralError
        return v[1]


class _At:
    def __init__(self, n: int) -> None:
        self.n = n

    def number(self, v: list[Any]) -> Any:
        return v[0].at(self.n) if isinstance(v[0], Line) else v[0]

    def constant(self, v: list[Constant]) -> Constant:
        return v[0]

    def module(self, v: list[Any]) -> Any:
        return v[0]

    def other(self, v: list[Any]) -> Any:
        return v[0]


def _place(t: Tensor) -> Any:
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride(), t.dtype


def _equal(a: Constant, b: Constant) -> bool:
    """Computed alike in both calls."""
    alike = a.base is None and a.tensor.shape == b.tensor.shape and a.tensor.dtype == b.tensor.dtype
    return alike and bool(torch.equal(a.tensor, b.tensor))


def _walked(how: Any, parts: list[Steps]) -> Steps:
    first = parts[0]
    if any(len(p.steps) != len(first.steps) or p.spec != first.spec or p.count != first.count for p in parts):
        raise NotGeneralError
    values: dict[int, Value] = {}

    def value(v: list[Value | None]) -> Value | None:
        one = v[0]
        if one is None or any(o is None or o.index != one.index or o.dtype != one.dtype for o in v):
            if any(o is not None for o in v):
                raise NotGeneralError
            return None
        if one.index not in values:
            values[one.index] = Value(one.index, place([o.place for o in v if o is not None]), one.dtype)
        return values[one.index]

    def place(v: list[Place]) -> Place:
        return Place(walk([p.size for p in v]), walk([p.stride for p in v]), walk([p.offset for p in v]))

    def walk(v: list[Any]) -> Any:
        one = v[0]
        if isinstance(one, Line) or (isinstance(one, int) and not isinstance(one, bool)):
            if any(isinstance(o, bool) or not isinstance(o, (int, Line)) for o in v):
                raise NotGeneralError
            return how.number([o if isinstance(o, Line) else int(o) for o in v])
        if any(type(o) is not type(one) for o in v) and not isinstance(one, nn.Module):
            raise NotGeneralError
        if isinstance(one, Read):
            seen, shown = value([o.value for o in v]), place([o.place for o in v])
            assert seen is not None
            if isinstance(how, _Merge) and _grows(seen.place) and not _grows(shown):
                raise NotGeneralError  # some examples out of all: which, may depend on how many there are
            return type(one)(seen, shown)
        if isinstance(one, Constant):
            return how.constant(v)
        if isinstance(one, Place):
            return place(v)
        if isinstance(one, (list, tuple)):
            if any(len(o) != len(one) for o in v):
                raise NotGeneralError
            walked = [walk(list(o)) for o in zip(*v, strict=True)]
            return walked if isinstance(one, list) else tuple(walked)
        if isinstance(one, dict):
            if any(o.keys() != one.keys() for o in v):
                raise NotGeneralError
            return {k: walk([o[k] for o in v]) for k in one}
        return how.module(v) if isinstance(one, nn.Module) else how.other(v)

    inputs = [v for o in zip(*(p.inputs for p in parts), strict=True) if (v := value(list(o))) is not None]
    steps = []
    for step in zip(*(p.steps for p in parts), strict=True):
        one: Step = step[0]
        if any(s.name != one.name for s in step):
            raise NotGeneralError
        args, kwargs = walk([s.args for s in step]), walk([s.kwargs for s in step])
        results = [value(list(v)) for v in zip(*(s.results for s in step), strict=True)]
        steps.append(Step(one.name, walk([s.func for s in step]), args, kwargs, results))
    output = [walk(list(v)) for v in zip(*(p.output for p in parts), strict=True)]
    return replace(first, steps=steps, inputs=inputs, output=output)


def _grows(place: Place) -> bool:
    return any(isinstance(n, Line) for n in place.size)
