"""What a model does with one input, as it runs: the one front end of all families that read models.

``record`` calls the model on a real input below autograd, where every operation of torch passes, whoever calls it: flags, shapes,
loops, hooks, patched forwards and values read from anywhere are what they are in that call. Views need no operations of their
own: a tensor is a place (size, stride, offset) in a storage, and each write leaves a new ``Value`` there. So names that share
memory see each other's in-place changes here as they do in torch.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

_TORCH = os.path.dirname(torch.__file__)
_ASKS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::item", "aten::allclose")
_RANDOM = torch.Tag.nondeterministic_seeded
_DYNAMIC = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


class UnreadableModelError(ValueError):
    """A model that computes in a way that no record of one call can stand for."""


class ModelMismatchError(ValueError):
    """What was read of a model does not compute what the model does: no result of it is returned."""


class Place(NamedTuple):
    """Where in its storage a tensor lies, in elements; strides of dimensions of size 1 count as 0."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        n = 1
        for s in self.size:
            n *= s
        return n

    def order(self) -> list[int]:
        """Dimensions larger than 1, from the outermost in memory to the innermost."""
        return sorted((d for d, s in enumerate(self.size) if s > 1), key=lambda d: -self.stride[d])

    def dense(self) -> bool:
        """Every element of the stretch behind ``offset`` once, in some order of the dimensions."""
        step = 1
        for d in reversed(self.order()):
            if self.stride[d] != step:
                return False
            step *= self.size[d]
        return True

    def positions(self) -> Tensor:
        """Of every element, in the storage: int64 of shape ``size``."""
        out = torch.full(self.size, self.offset)
        for d, (n, step) in enumerate(zip(self.size, self.stride, strict=True)):
            out += (torch.arange(n) * step).view(-1, *[1] * (len(self.size) - d - 1))
        return out


def place_of(t: Tensor) -> Place:
    size = tuple(t.shape)
    return Place(size, tuple(0 if n == 1 else s for n, s in zip(size, t.stride(), strict=True)), t.storage_offset())


@dataclass(slots=True, eq=False)
class Value:
    """What was written at a place; elements in the row-major order of ``place.size``. Depends on the input."""

    index: int
    place: Place
    dtype: torch.dtype


class Read(NamedTuple):
    """A tensor that was read: elements of ``value``, those at ``place``."""

    value: Value
    place: Place

    @property
    def shape(self) -> tuple[int, ...]:
        return self.place.size


class Constant(NamedTuple):
    """A tensor that does not depend on the input. ``base``: the tensor that existed before the call and that it is, or shows in
    another order; None for one that the call computed, which belongs to this call alone."""

    tensor: Tensor
    base: Tensor | None


@dataclass(slots=True, eq=False)
class Step:
    """One operation. ``name``: of the schema without the underscore of in-place forms, or "overlay" (old, new): the elements of old,
    with those at new's place taken from new. In-place operations are recorded as their functional forms."""

    name: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: list[Value | None]
    where: str = ""
    line: str = ""
    module: nn.Module | None = None


@dataclass(slots=True)
class Recording:
    steps: list[Step]
    input: Value
    output: Any  # what forward returned, with Read and Constant in place of tensors
    result: Any  # the same with the tensors
    computed: bool  # some constant was computed in the call
    key: tuple[Any, ...] = field(repr=False)  # equal for calls that did the same with the same tensors
    held: list[Tensor] = field(repr=False)  # what the key names by address


def replaced(v: Any, f: Any) -> Any:
    """``v`` with f of every tensor, Read and Constant inside."""
    if isinstance(v, (Tensor, Read, Constant)):
        return f(v)
    if isinstance(v, Place):
        return v
    if isinstance(v, (list, tuple)):
        return tuple(replaced(i, f) for i in v) if type(v) is tuple else [replaced(i, f) for i in v]
    if isinstance(v, dict):
        return {k: replaced(i, f) for k, i in v.items()}
    return v


def inside(v: Any) -> Iterator[Any]:
    """Every tensor, Read and Constant in ``v``."""
    if isinstance(v, (Tensor, Read, Constant)):
        yield v
    elif isinstance(v, (list, tuple)):
        for i in v:
            yield from inside(i)
    elif isinstance(v, dict):
        for i in v.values():
            yield from inside(i)


class Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # skipping imports the whole compiler, seconds of it, at the first operation

    def __init__(self, model: Any, named: bool):
        super().__init__()
        self.steps: list[Step] = []
        self.key: list[Any] = []
        self.values: dict[int, Value] = {}  # the present content of storages that depend on the input
        self.fresh: set[int] = set()  # storages that the call itself made
        self.bases: dict[tuple[int, Place], Tensor] = {}  # tensors from before the call
        self.views: dict[int, list[Tensor]] = {}  # those of them that lie in one storage
        self.derived: set[tuple[int, Place]] = set()  # places that the call made views of
        self.kept: list[Tensor] = []  # no storage may be freed and its address be used again
        self.held: list[Tensor] = []
        self.read: dict[int, list[Step]] = {}  # steps that read constants of the call, by storage
        self.count = 0
        self.computed = False
        self.names: dict[int, str] | None = None
        if named:
            named_modules = model.named_modules(remove_duplicate=True) if isinstance(model, nn.Module) else ()
            self.names = {id(m): n for n, m in named_modules}
        self.used: dict[str, int] = {}

    # -- values --------------------------------------------------------------------------------------------------------
    def value(self, t: Tensor) -> Value:
        self.count += 1
        return Value(self.count - 1, place_of(t), t.dtype)

    def start(self, t: Tensor) -> Value:
        v = self.values[_storage(t)] = self.value(t)
        self.kept.append(t)
        return v

    def marker(self, t: Tensor) -> Read | Constant:
        s = _storage(t)
        v = self.values.get(s)
        place = place_of(t)
        if v is not None:
            if t.dtype != v.dtype:
                raise UnreadableModelError(f"model: reads numbers of {v.dtype} as {t.dtype}{self.at()}")
            return Read(v, place)
        if s in self.fresh:
            self.kept.append(t)
            return Constant(t, None)
        base = self._base(t, s, place)
        return Constant(t, base)

    def _base(self, t: Tensor, s: int, place: Place) -> Tensor | None:
        base = self.bases.get((s, place))
        if base is None and (s, place) not in self.derived:
            base = self.bases[s, place] = t
            self.views.setdefault(s, []).append(t)
        if base is None:  # another order of all elements of one that is known
            for b in self.views.get(s, ()):
                if (
                    b.numel() == t.numel()
                    and place.offset == b.storage_offset()
                    and place.dense()
                    and b.is_contiguous()
                ):
                    base = b
        return base if base is not None and base.requires_grad == t.requires_grad else None

    # -- operations ----------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        given = list(inside((args, kwargs)))
        try:
            tracked = any(_storage(t) in self.values for t in given)
        except (RuntimeError, NotImplementedError):
            raise UnreadableModelError(f"model: {schema.name} works on tensors without plain storage (sparse, quantised){self.at()}") from None  # fmt: skip
        if func.tags and _RANDOM in func.tags and not _still(schema.name, args):
            raise UnreadableModelError(f"model: {schema.name.removeprefix('aten::')} draws random numbers{self.at()}; is the model in training mode? call model.eval() first")  # fmt: skip
        if tracked and (schema.name in _ASKS or any(t in func.tags for t in _DYNAMIC)):
            raise UnreadableModelError(f"model: forward branches on values of its input ({schema.name.removeprefix('aten::')}{self.at()}); what it does at other points of the input set would not be seen")  # fmt: skip
        if schema.is_mutable:
            return self._write(func, args, kwargs, tracked)
        if schema.name in ("aten::lift_fresh", "aten::lift") and not tracked:  # torch.tensor(numbers) in forward
            self.fresh.update(_storage(t) for t in given)
            self.kept += given
        marked = (replaced(args, self.marker), replaced(kwargs, self.marker)) if tracked else None
        out = func(*args, **kwargs)
        outs = list(inside(out))
        if marked is None:
            for t in outs:
                s = _storage(t)
                if any(s == _storage(g) for g in given) and s not in self.fresh:
                    for g in given:  # a view of a tensor from before the call
                        if _storage(g) == s and (s, place_of(g)) not in self.derived:
                            self._base(g, s, place_of(g))
                    self.derived.add((s, place_of(t)))
                else:
                    self.fresh.add(s)
                    self.kept.append(t)
            return out
        results: list[Value | None] = []
        new = False
        for t in outs:
            s = _storage(t)
            if s in self.values:  # a view: its place says all
                results.append(None)
                continue
            new = True
            results.append(self.start(t))
        if new:
            self._add(schema.name, func, marked[0], marked[1], results)
        return out

    def _add(self, name: str, func: Any, args: Any, kwargs: Any, results: list[Value | None]) -> Step:
        name = name.removeprefix("aten::")
        step = Step(name, func, args, kwargs, results)
        if self.names is not None:
            step.where, step.line, step.module = self._frame(name)
        self.steps.append(step)
        for c in inside((args, kwargs)):
            if isinstance(c, Constant):
                self.held.append(c.tensor)
                if c.base is None:
                    self.computed = True
                    self.read.setdefault(_storage(c.tensor), []).append(step)
        self.key.append((func, _key(args), _key(kwargs)))
        return step

    def _write(self, func: Any, args: Any, kwargs: Any, tracked: bool) -> Any:
        schema = func._schema
        targets: list[Tensor] = []
        for i, a in enumerate(schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                t = args[i] if i < len(args) else kwargs.get(a.name)
                targets += [t] if isinstance(t, Tensor) else list(inside(t))
        for t in targets:
            s = _storage(t)
            if s not in self.values and s not in self.fresh:
                raise UnreadableModelError(f"model: forward writes into a tensor that it keeps ({schema.name.removeprefix('aten::')}{self.at()}), as layers in training mode do; call model.eval() first, or compute it anew")  # fmt: skip
        if not tracked:
            self._spare(targets)
            return func(*args, **kwargs)
        if len(targets) != 1 or schema.name.removeprefix("aten::") in ("set_", "resize_", "resize_as_"):
            raise UnreadableModelError(f"model: {schema.name.removeprefix('aten::')} cannot be followed{self.at()}")
        target = targets[0]
        s = _storage(target)
        marked = (replaced(args, self.marker), {k: replaced(v, self.marker) for k, v in kwargs.items() if k != "out"})
        old = self.values.get(s)
        self._spare(targets)
        before = None
        if old is None:  # a tensor of the call itself, constant up to here
            whole = target.untyped_storage().nbytes() // target.element_size()
            before = torch.as_strided(target.detach(), (whole,), (1,), 0).clone()
            was = target.detach().clone()
            marked = replaced(marked, lambda m: Constant(was, None) if isinstance(m, Constant) and m.tensor is target else m)  # fmt: skip
        out = func(*args, **kwargs)
        name = schema.name.removeprefix("aten::")
        v = self.value(target)
        self._add(name[:-1] if name.endswith("_") else name, func, marked[0], marked[1], [v])
        known = old.place if old is not None else Place((before.numel(),), (1,), 0)  # type: ignore[union-attr]
        if v.place.numel == known.numel and v.place.dense() and known.dense() and v.place.offset == known.offset:
            self.values[s] = v
        else:
            w = self.values[s] = Value(self.count, known, target.dtype)
            self.count += 1
            first: Any = Read(old, known) if old is not None else Constant(before, None)  # type: ignore[arg-type]
            self._add("overlay", "overlay", (first, Read(v, v.place), known), {}, [w])
        self.kept.append(target)
        return out

    def _spare(self, targets: list[Tensor]) -> None:
        """Constants that a step has read keep the numbers that it read."""
        for s in {_storage(t) for t in targets}:

            def keep(c: Any, s: int = s) -> Any:
                return Constant(c.tensor.clone(), None) if isinstance(c, Constant) and _storage(c.tensor) == s else c

            for step in self.read.pop(s, ()):
                step.args, step.kwargs = replaced(step.args, keep), replaced(step.kwargs, keep)

    # -- modules that stay whole ---------------------------------------------------------------------------------------
    def leaf(self, module: nn.Module, x: Tensor, run: Any) -> Tensor:
        """One step for a whole module: ``run(x)`` is not looked into."""
        marked = self.marker(x)
        with _disable_current_modes():
            out: Tensor = run(x)
        if isinstance(marked, Constant):
            self.fresh.add(_storage(out))
            self.kept.append(out)
            return out
        self._add("leaf", module, (marked,), {}, [self.start(out)])
        return out

    # -- words ---------------------------------------------------------------------------------------------------------
    def _frame(self, name: str) -> tuple[str, str, nn.Module | None]:
        assert self.names is not None
        where, line, module = None, "", None
        f: Any = sys._getframe(2)
        while f is not None:
            code = f.f_code
            if code.co_filename == __file__ and code.co_name == "record":
                break
            if where is None and code.co_argcount and code.co_varnames[0] in ("self", "s"):
                owner = f.f_locals.get(code.co_varnames[0])
                if isinstance(owner, nn.Module) and id(owner) in self.names:
                    where, module = self.names[id(owner)], owner
                    if not code.co_filename.startswith(_TORCH):
                        where = f"{where}.{name}" if where else name
            if not line and not code.co_filename.startswith(_TORCH) and code.co_filename != __file__:
                line = f"{code.co_filename}:{f.f_lineno}"
            f = f.f_back
        where = where or name
        n = self.used[where] = self.used.get(where, -1) + 1
        return (f"{where}_{n}" if n else where), line, module

    def at(self) -> str:
        """ " at FILE:LINE: code" of the line of the model that runs."""
        f: Any = sys._getframe(1)
        while f is not None:
            name = f.f_code.co_filename
            if name != __file__ and not name.startswith(_TORCH):
                text = linecache.getline(name, f.f_lineno).strip()
                return f" at {name}:{f.f_lineno}" + (f": `{text}`" if text else "")
            f = f.f_back
        return ""


def _still(name: str, args: Any) -> bool:
    """Operations that draw numbers only when they train, and do not train."""
    if name in ("aten::rrelu_with_noise", "aten::rrelu_with_noise_"):
        return len(args) < 5 or not args[4]
    if name == "aten::native_dropout":
        return len(args) > 2 and args[2] is False
    return False


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _key(v: Any) -> Any:
    if isinstance(v, Read):
        return (v.value.index, v.place)
    if isinstance(v, Constant):
        return (_storage(v.tensor), place_of(v.tensor), v.tensor.requires_grad)
    if isinstance(v, (list, tuple)):
        return tuple(map(_key, v))
    if isinstance(v, dict):
        return tuple((k, _key(i)) for k, i in v.items())
    return v


def unwrapped(model: Any) -> Any:
    """The module inside wrappers that change how it runs, not what it computes."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod") and type(model).__name__ == "OptimizedModule":
            model = model._orig_mod
        else:
            return model


def current() -> Recorder | None:
    """The recorder whose call this is, where there is one."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return None
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Recorder) else None


def _eager() -> Any:
    """Compiled parts run as they are written, where anything can have been compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@contextlib.contextmanager
def without_recording(x: Tensor) -> Iterator[None]:
    """The model runs as in a record: outside inference mode and autocast, nothing compiled."""
    with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False), _eager():
        yield


def record(model: Any, x: Tensor, *, named: bool = False) -> Recording:
    """Calls ``model(x)`` on a copy of x (a batch as the model takes it) and returns what happened. No statistics, random state or
    parameter moves: what would move them raises. ``named``: steps know the module and the line they come from.

    Raises UnreadableModelError, which names the line, where one call cannot stand for all others: branches on values, random
    numbers, layers in training mode, writes into tensors that outlive the call.
    """
    x = x.detach()
    with without_recording(x):
        x = x.clone(memory_format=torch.preserve_format)
        recorder = Recorder(model, named)
        source = recorder.start(x)
        with recorder:
            result = unwrapped(model)(x)
        output = replaced(result, recorder.marker) if not isinstance(result, Tensor) else recorder.marker(result)
    key = (*recorder.key, _key(output))
    return Recording(recorder.steps, source, output, result, recorder.computed, key, recorder.held)
