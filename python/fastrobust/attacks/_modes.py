"""A model while attacks run on it: modes, statistics and wrappers, put back as they were when the last one is done."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

Undo = Callable[[], None]
_OPPOSITE = {"eval": "keep", "keep": "eval"}


class _Held:
    """A change of one module that several attacks share: the first makes it, the last undoes it."""

    def __init__(self, module: nn.Module, undo: Undo) -> None:
        self.module = module  # kept alive: the table is keyed by its id
        self.undo = undo
        self.users = 0


_changed = threading.Condition()
_held: dict[tuple[str, int], _Held] = {}
_thread = threading.local()


def owner(model: Any) -> Any:
    """The module whose bound method, or whose partial, a model is; else the model itself."""
    while isinstance(model, functools.partial):
        model = model.func
    bound = None if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    return bound if isinstance(bound, nn.Module) else model


def modules_of(model: Any) -> list[nn.Module]:
    """Those with a training flag: a frozen TorchScript module has none, it is in eval mode for good."""
    root = owner(model)
    return [m for m in root.modules() if hasattr(m, "training")] if isinstance(root, nn.Module) else []


def _evaluate(module: nn.Module) -> Undo:
    flag = module.training
    module.training = False  # by attribute, so that overridden train() methods do nothing
    return lambda: setattr(module, "training", flag)


def _save_buffers(module: nn.Module) -> Undo:
    owner = module._buffers
    saved = [(name, b, b.detach().clone()) for name, b in owner.items() if b is not None]

    def undo() -> None:
        with torch.no_grad():
            for name, b, values in saved:
                owner[name] = b  # a forward may have put another tensor in its place
                b.copy_(values)

    return undo


def _step_aside(module: nn.Module) -> Undo:
    """DDP's forward broadcasts buffers and prepares to reduce parameters' gradients, which an attack has none of: ranks
    that make different numbers of passes would wait for each other."""
    space, before = vars(module), vars(module).get("forward")
    space["forward"] = module.module

    def undo() -> None:
        del space["forward"]
        if before is not None:
            space["forward"] = before

    return undo


_CHANGES: dict[str, Callable[[nn.Module], Undo]] = {"eval": _evaluate, "keep": _save_buffers, "ddp": _step_aside}


@contextlib.contextmanager
def undisturbed(model: Any, mode: str) -> Iterator[None]:
    """Run the model with gradients enabled for its input and leave no trace in it.

    mode "eval" attacks the model as it is deployed; "keep" leaves the training flags as they are and puts the buffers
    back afterwards, so that running statistics do not absorb attack iterates. Every module's own flag comes back (a
    BatchNorm frozen in eval stays frozen), also when several threads attack models that share modules: each change is
    made by the first of them and undone by the last. Only "eval" and "keep" of the same modules wait for each other.
    """
    if mode not in _OPPOSITE:
        raise ValueError(f"model_mode: got {mode!r}, expected 'eval' or 'keep'")
    modules = modules_of(model)
    depth = getattr(_thread, "depth", 0)
    taken: list[tuple[str, int]] = []

    def take(kind: str, m: nn.Module) -> None:
        key = (kind, id(m))
        if key not in _held:
            _held[key] = _Held(m, _CHANGES[kind](m))
        _held[key].users += 1
        taken.append(key)

    try:
        with _changed:
            # a thread that holds something does not wait, or two could wait for each other
            while not depth and _held and any((_OPPOSITE[mode], id(m)) in _held for m in modules):
                _changed.wait()
            for m in modules:
                if isinstance(m, DistributedDataParallel):
                    take("ddp", m)
            if mode == "eval" or any(m.training for m in modules):
                for m in modules:
                    take(mode, m)
        _thread.depth = depth + 1
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        _thread.depth = depth
        with _changed:
            for key in reversed(taken):
                held = _held[key]
                held.users -= 1
                if not held.users:
                    del _held[key]
                    held.undo()
            _changed.notify_all()
