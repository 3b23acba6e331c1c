"""Calls of a model with any arguments, recorded: what a program of a frozen model is made from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .._places import Constant, Read, Value, wave
from .._record import Recorder, UnreadableModelError, unwrapped, without_recording
from ._layers import Cut
from ._program import Steps

_PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.Size, torch.dtype, torch.device)


class Call:
    """The arguments of a call: tensors apart from what is written into the program."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.leaves, self.spec = tree_flatten((args, kwargs))
        self.at = [i for i, v in enumerate(self.leaves) if isinstance(v, Tensor)]
        self.tensors: list[Tensor] = [self.leaves[i] for i in self.at]

    def key(self) -> Any:
        """Equal for calls that one program serves."""
        if not any(t.dtype == torch.float32 for t in self.tensors):
            raise TypeError(f"x: expected a float32 tensor, got {', '.join(map(_described, self.leaves)) or 'nothing'}")
        parts: list[tuple[Any, ...]] = []
        for v in self.leaves:
            if isinstance(v, Tensor):
                if v.is_floating_point() and v.dtype != torch.float32 or v.is_complex():
                    raise TypeError(f"x: expected float32, got {v.dtype}")
                parts.append((v.shape, v.dtype, v.device))
                continue
            try:
                hash(v)
            except TypeError:
                raise TypeError(f"model: expected arguments that are tensors or can be hashed, got {v!r}") from None
            parts.append((type(v), v))
        return (str(self.spec), *parts)

    def arguments(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves = list(self.leaves)
        for i, t in zip(self.at, tensors, strict=True):
            leaves[i] = t
        args, kwargs = tree_unflatten(leaves, self.spec)
        return args, kwargs


def _described(v: Any) -> str:
    return str(v.dtype) if isinstance(v, Tensor) else type(v).__name__


class _Recorder(Recorder):
    """Knows which reads no gradient passes (with ``cuts``), and that tensors of numbers in forward are the call's
    own."""

    def __init__(self, model: Any, cuts: bool) -> None:
        super().__init__(model, False)
        self.cuts = cuts

    def _add(self, name: str, func: Any, args: Any, *rest: Any) -> None:
        # What was there before a write was read by it as its first argument.
        if name == "overlay" and isinstance(args[0], Read) and isinstance(self.steps[-1].args[0], Cut):
            args = (Cut(*args[0]), *args[1:])
        super()._add(name, func, args, *rest)

    def _told(self, t: Tensor) -> tuple[Read | Constant, Any]:
        found, key = super()._told(t)
        if self.cuts and isinstance(found, Read) and t.is_floating_point() and not t.requires_grad:
            return Cut(*found), key
        return found, key


def observe(
    snapshot: Any, call: Call, tensors: list[Tensor], sizes: AbstractContextManager[Any] | None = None
) -> Steps:
    """The steps of the model on tensors in place of the call's; other numbers than theirs, so that what forward
    computes outside of torch does not pass for a constant of the model. ``sizes``: entered while forward runs."""
    sizes = nullcontext() if sizes is None else sizes
    try:
        return _observed(snapshot, call, tensors, sizes, True)
    except RuntimeError:  # some of what forward does cannot be differentiated (out=)
        return _observed(snapshot, call, tensors, sizes, False)


def _observed(
    snapshot: Any, call: Call, tensors: list[Tensor], sizes: AbstractContextManager[Any], grad: bool
) -> Steps:
    with without_recording(tensors[0]), torch.set_grad_enabled(grad):
        given = []
        for t in tensors:
            t = t.detach().clone(memory_format=torch.preserve_format)
            if t.is_floating_point():
                size = 0.1 * t.abs().amax().nan_to_num(1.0, 1.0, 1.0) + 1e-3 if t.numel() else 0.0
                t = (t + size * wave(t)).requires_grad_(grad).clone(memory_format=torch.preserve_format)
            given.append(t)
        recorder = _Recorder(unwrapped(snapshot.model), grad)
        inputs: list[Value] = [recorder.start(t) for t in given]
        args, kwargs = call.arguments(given)
        with recorder, sizes:
            result = snapshot.call(args, kwargs)
        leaves, spec = tree_flatten(result)
        output = [recorder.marker(v) if isinstance(v, Tensor) else _plain(v) for v in leaves]
    return Steps(recorder.steps, inputs, output, spec, recorder.count)


def _plain(v: Any) -> Any:
    if not isinstance(v, _PLAIN):
        raise UnreadableModelError(
            f"model: returned {type(v).__name__}, expected tensors and numbers in tuples, lists and dicts"
        )
    return v


def assembled(leaves: list[Any], spec: TreeSpec) -> Any:
    return leaves[0] if len(leaves) == 1 and spec.num_nodes == 1 else tree_unflatten(leaves, spec)
