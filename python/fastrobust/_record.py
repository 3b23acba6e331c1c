"""What a model does with one input, as it runs: the one front end of all families that read models.

``record`` calls the model on a real input below autograd, where every operation of torch passes, whoever calls it:
flags, shapes, loops, hooks, patched forwards and values read from anywhere are what they are in that call. Views need
no operations of their own: a tensor is a place (size, stride, offset) in a storage, and each write leaves a new
``Value`` there. So names that share memory see each other's in-place changes here as they do in torch.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import os
import sys
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode

from fastrobust._places import Constant, Place, Read, Value, inside, place_of, replaced

_TORCH = os.path.dirname(torch.__file__)
_ASKS = ("_local_scalar_dense", "is_nonzero", "equal", "item", "allclose")
_SHAPES = (
    "new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided", "empty_like", "zeros_like", "ones_like",
    "full_like",
)  # fmt: skip
_EMPTY = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
# Views of the same memory that show other numbers, as operations that write them down.
_SIGNED = {"_neg_view": torch.ops.aten.neg.default, "_conj": torch.ops.aten.conj_physical.default}
_MOVES = ("set_", "resize_", "resize_as_")  # to other memory


class _Kind(NamedTuple):
    """What there is to know of an operation before it runs."""

    name: str
    writes: bool
    view: bool
    random: bool
    asks: bool  # Python gets to know values
    shapes: bool  # no value of its tensors matters
    empty: bool  # leaves memory as it was


@functools.cache
def _kind(func: Any) -> _Kind:
    name, tags, returns = func._schema.name.removeprefix("aten::"), func.tags, func._schema.returns
    asks = name in _ASKS or torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
    # The noise of rrelu is nothing where it does not train.
    writes = func._schema.is_mutable and name != "rrelu_with_noise"
    view = not writes and bool(returns) and all(r.alias_info is not None for r in returns)
    return _Kind(name, writes, view, torch.Tag.nondeterministic_seeded in tags, asks, name in _SHAPES, name in _EMPTY)


class UnreadableModelError(ValueError):
    """A model that computes in a way that no record of one call can stand for."""


class ModelMismatchError(ValueError):
    """What was read of a model does not compute what the model does: no result of it is returned."""


@dataclass(slots=True, eq=False)
class Step:
    """One operation. ``name``: of the schema without the underscore of in-place forms, or "overlay" (old, new): the
    elements of old, with those at new's place taken from new. In-place operations are recorded as their functional
    forms."""

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


def _tensors(args: Any, kwargs: Any) -> list[Tensor]:
    """Those in the arguments of an operation, which nests them in lists at most."""
    found: list[Tensor] = []
    for a in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found += [t for t in a if isinstance(t, Tensor)]
    return found


class Recorder(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """The compiler is told to stand aside where it is loaded (``_eager``); torch's own way would load it."""
        return False

    def __init__(self, model: Any, named: bool):
        super().__init__()
        self.steps: list[Step] = []
        self.key: list[Any] = []
        self.values: dict[int, Value] = {}  # the present content of storages that depend on the input
        self.fresh: set[int] = set()  # storages that the call itself made
        self.bases: dict[tuple[int, Place], Tensor] = {}  # tensors from before the call
        self.views: dict[int, list[Tensor]] = {}  # those of them that lie in one storage
        self.derived: set[tuple[int, Place]] = set()  # places that the call made views of
        self.signed: set[int] = set()  # storages with a part that a view shows with another sign
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
        return self._told(t)[0]

    def _told(self, t: Tensor) -> tuple[Read | Constant, Any]:
        """What stands for t in a step, and in the key of the recording."""
        s = _storage(t)
        v = self.values.get(s)
        if v is not None:
            if t.dtype != v.dtype:
                raise UnreadableModelError(f"model: reads numbers of {v.dtype} as {t.dtype}{self.at()}")
            place = place_of(t)
            return Read(v, place), (v.index, place)
        if s in self.fresh:
            self.kept.append(t)
            return Constant(t, None), s
        place = place_of(t)
        return Constant(t, self._base(t, s, place)), (s, place, t.requires_grad)

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
        values, kind = self.values, _kind(func)
        given = _tensors(args, kwargs)
        try:
            storages = [t.untyped_storage()._cdata for t in given]
        except (RuntimeError, NotImplementedError):
            raise UnreadableModelError(
                f"model: {kind.name} works on tensors without plain storage (sparse, quantised){self.at()}"
            ) from None
        tracked = False
        if not kind.shapes:
            for s in storages:
                if s in values:
                    tracked = True
                    break
        if kind.random and not _still(kind.name, args):
            raise UnreadableModelError(
                f"model: {kind.name} draws random numbers{self.at()}; is the model in training mode? call model.eval() "
                "first"
            )
        # At constant places an index is as long as those say.
        if tracked and kind.asks and not (kind.name == "index" and not any(s in values for s in storages[1:])):
            raise UnreadableModelError(
                f"model: forward branches on values of its input ({kind.name}{self.at()}); what it does at other "
                "points "
                "of the input set would not be seen"
            )
        if kind.writes:
            return self._write(func, args, kwargs, tracked)
        if not tracked:
            if kind.name in ("lift_fresh", "lift"):  # torch.tensor(...) of the call itself
                self.fresh.update(storages)
                self.kept += given
            out = func(*args, **kwargs)
            self._constants(out, given, storages)
            if kind.empty:  # what was there before is nothing that a model computes
                out.zero_()
            return out
        if kind.view and kind.name not in _SIGNED:  # its place says all
            return func(*args, **kwargs)
        if kind.name in _SIGNED:
            func = _SIGNED[kind.name]
            self.signed.update(storages)
        key: list[Any] = [func]
        marked = [self._marked(v, key) for v in args], {k: self._marked(v, key) for k, v in kwargs.items()}
        out = func(*args, **kwargs)
        results: list[Value | None] = []
        new = False
        for t in (out,) if isinstance(out, Tensor) else inside(out):
            if _storage(t) in values:  # a view that does not call itself one
                results.append(None)
            else:
                new = True
                results.append(self.start(t))
        if kind.name in _SIGNED:
            self.signed.add(_storage(out))
        if new:
            self._add(_kind(func).name, func, *marked, results, key)
        return out

    def _constants(self, out: Any, given: list[Tensor], storages: list[int]) -> None:
        """Results that do not depend on the input: new tensors of the call, or views of what was there before."""
        for t in (out,) if isinstance(out, Tensor) else inside(out):
            s = _storage(t)
            if s in self.fresh:
                continue
            if s not in storages:
                self.fresh.add(s)
                self.kept.append(t)
                continue
            for g, own in zip(given, storages, strict=True):
                if own == s:
                    self._base(g, s, place_of(g))
            self.derived.add((s, place_of(t)))

    def _marked(self, v: Any, key: list[Any]) -> Any:
        """``v`` with Read and Constant in place of tensors; ``key`` is told of everything in it."""
        if isinstance(v, Tensor):
            m, told = self._told(v)
            key.append(told)
            return m
        if isinstance(v, (list, tuple)):
            key.append(len(v))
            return [self._marked(i, key) for i in v]
        key.append(v)
        return v

    def _add(self, name: str, func: Any, args: Any, kwargs: Any, results: list[Value | None], key: list[Any]) -> None:
        step = Step(name, func, tuple(args), kwargs, results)
        if self.names is not None:
            step.where, step.line, step.module = self._frame(name)
        self.steps.append(step)
        self.key.append(tuple(key))
        for c in (*step.args, *kwargs.values()):
            for i in c if isinstance(c, list) else (c,):
                if isinstance(i, Constant):
                    self.held.append(i.tensor)
                    if i.base is None:
                        self.computed = True
                        self.read.setdefault(_storage(i.tensor), []).append(step)

    def _write(self, func: Any, args: Any, kwargs: Any, tracked: bool) -> Any:
        schema, name = func._schema, _kind(func).name
        targets: list[Tensor] = []
        for i, a in enumerate(schema.arguments):
            if a.alias_info is not None and a.alias_info.is_write:
                targets += _tensors((args[i] if i < len(args) else kwargs.get(a.name),), None)
        for t in targets:
            s = _storage(t)
            if s not in self.values and s not in self.fresh:
                raise UnreadableModelError(
                    f"model: forward writes into a tensor that it keeps ({name}{self.at()}), as layers in training "
                    f"mode do; "
                    "call model.eval() first, or compute it anew"
                )
        if name not in _MOVES and (name == "detach_" or torch.Tag.inplace_view in func.tags):
            return func(*args, **kwargs)  # another shape of the same numbers
        if not tracked:
            self._spare(targets)
            return func(*args, **kwargs)
        if len(targets) != 1 or name in _MOVES or _storage(targets[0]) in self.signed:
            raise UnreadableModelError(f"model: {name} cannot be followed{self.at()}")
        target = targets[0]
        s = _storage(target)
        key: list[Any] = [func]
        given = {k: v for k, v in kwargs.items() if k != "out"}
        marked = [self._marked(v, key) for v in args], {k: self._marked(v, key) for k, v in given.items()}
        old = self.values.get(s)
        self._spare(targets)
        before = None
        if old is None:  # a tensor of the call itself, constant up to here
            whole = target.untyped_storage().nbytes() // target.element_size()
            before = torch.as_strided(target.detach(), (whole,), (1,), 0).clone()
            marked = replaced(marked[0], self._copied(s)), replaced(marked[1], self._copied(s))
        out = func(*args, **kwargs)
        v = self.value(target)
        self._add(name[:-1] if name.endswith("_") else name, func, *marked, [v], key)
        known = old.place if old is not None else Place((before.numel(),), (1,), 0)  # type: ignore[union-attr]
        if v.place.numel == known.numel and v.place.dense() and known.dense() and v.place.offset == known.offset:
            self.values[s] = v
        else:
            w = self.values[s] = Value(self.count, known, target.dtype)
            self.count += 1
            first: Any = Read(old, known) if old is not None else Constant(before, None)  # type: ignore[arg-type]
            self._add("overlay", "overlay", (first, Read(v, v.place), known), {}, [w], ["overlay", v.place, known])
        self.kept.append(target)
        return out

    def _spare(self, targets: list[Tensor]) -> None:
        """Constants that a step has read keep the numbers that it read."""
        for s in {_storage(t) for t in targets}:
            for step in self.read.pop(s, ()):
                step.args, step.kwargs = replaced(step.args, self._copied(s)), replaced(step.kwargs, self._copied(s))

    @staticmethod
    def _copied(s: int) -> Any:
        """Of what was read of the storage s, which is about to be written."""
        return lambda c: Constant(c.tensor.clone(), None) if isinstance(c, Constant) and _storage(c.tensor) == s else c

    # -- modules that stay whole ---------------------------------------------------------------------------------------
    def leaf(self, module: nn.Module, x: Tensor, run: Any) -> Tensor:
        """One step for a whole module: ``run(x)`` is not looked into."""
        marked, told = self._told(x)
        with _disable_current_modes():
            out: Tensor = run(x)
        if isinstance(marked, Constant):
            self.fresh.add(_storage(out))
            self.kept.append(out)
            return out
        self._add("leaf", module, (marked,), {}, [self.start(out)], [module, told])
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
    if name in ("rrelu_with_noise", "rrelu_with_noise_"):
        return len(args) < 5 or not args[4]
    if name == "native_dropout":
        return len(args) > 2 and args[2] is False
    return False


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


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


def without_recording(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The model runs as in a record: outside inference mode (which has operations of its own) and autocast, nothing
    compiled."""
    inference, autocast = torch.is_inference_mode_enabled(), torch.is_autocast_enabled(x.device.type)
    compiled = "torch._dynamo" in sys.modules
    if not (inference or autocast or compiled):
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if inference:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # leaving inference mode turns recording on
    if autocast:
        stack.enter_context(torch.autocast(x.device.type, enabled=False))
    if compiled:  # compiled parts run as they are written
        stack.enter_context(torch.compiler.set_stance("force_eager"))
    return stack


# (whether it is on, the switch, what it has to be) of what runs attention as one operation, or written out
_FUSED: tuple[tuple[Any, Any, bool], ...] = tuple(
    (getattr(torch.backends.cuda, f"{name}_sdp_enabled"), getattr(torch.backends.cuda, f"enable_{name}_sdp"), on)
    for name, on in (("flash", False), ("mem_efficient", False), ("cudnn", False), ("math", True))
) + ((torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, False),)


class _WrittenOut:
    """Within, attention runs as products and a softmax, not as one operation that hides them. The switches are torch's
    and of all threads: the first that enters turns them, the last that leaves turns them back."""

    def __init__(self) -> None:
        self.lock, self.inside, self.before = threading.Lock(), 0, [False] * len(_FUSED)

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.before = [enabled() for enabled, _, _ in _FUSED]
                for _enabled, switch, on in _FUSED:
                    switch(on)
            self.inside += 1

    def __exit__(self, *_: Any) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                for (_enabled, switch, _on), was in zip(_FUSED, self.before, strict=True):
                    switch(was)


_WRITTEN_OUT = _WrittenOut()


def record(model: Any, x: Tensor, *, named: bool = False) -> Recording:
    """Calls ``model(x)`` on a copy of x (a batch as the model takes it) and returns what happened. No statistics,
    random state or parameter moves: what would move them raises. ``named``: steps know the module and the line they
    come from.

    Raises UnreadableModelError, which names the line, where one call cannot stand for all others: branches on values,
    random numbers, layers in training mode, writes into tensors that outlive the call.
    """
    x = x.detach()
    with without_recording(x):
        x = x.clone(memory_format=torch.preserve_format)
        recorder = Recorder(model, named)
        source = recorder.start(x)
        with recorder, _WRITTEN_OUT:
            result = unwrapped(model)(x)
        told: list[Any] = []
        output = recorder._marked(result, told) if not isinstance(result, dict) else replaced(result, recorder.marker)
    key = (*recorder.key, *told)
    return Recording(recorder.steps, source, output, result, recorder.computed, key, recorder.held)
