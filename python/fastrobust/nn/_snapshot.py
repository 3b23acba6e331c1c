"""A model as it is now, in eval mode: a copy where that is safe, else the model itself while nobody else switches
it."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .._record import current, without_recording
from ..reference.binary import PackedWeight
from ._layers import Layer
from .masked import BinaryMaskedConv2d, BinaryMaskedLinear, masked_layers

_MODES = threading.RLock()
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class _Weight:
    """Stands for ``layer._apply_weight``: the weight as it was."""

    def __init__(self, module: nn.Module, layer: Layer) -> None:
        self.module, self.layer = module, layer

    def __call__(self, x: Tensor) -> Tensor:
        recorder = current()
        if recorder is not None:
            return recorder.leaf(self.module, x, self)
        return self.layer(x)


class _Packed:
    """Stands for ``layer.packed``."""

    def __init__(self, packed: PackedWeight) -> None:
        self.packed = packed

    def __call__(self) -> PackedWeight:
        return self.packed


class Snapshot:
    """``model`` is a copy that nobody else knows, or (``own`` False) the model itself, where hooks, patched forwards or
    what cannot be copied may lead from a copy back to it. Its scores and signs are left out: the masks are made."""

    def __init__(self, source: nn.Module) -> None:
        masked = masked_layers(source)
        self.layers = {id(layer): Layer.of(name, layer) for name, layer in masked.items()}
        copied = None if _patched(source) else _copied(source)
        self.own = copied is not None
        self.model = source if copied is None else copied
        for name, layer in masked_layers(self.model).items():
            self.layers[id(layer)] = self.layers[id(masked[name])]
            if self.own:
                layer.packed = _Packed(self.layers[id(layer)].packed)  # type: ignore[method-assign]
                # Past nn.Module, which would take it for a part of the layer.
                object.__setattr__(layer, "_apply_weight", _Weight(layer, self.layers[id(layer)]))
        self.owned: set[int] = set()
        if copied is not None:
            for m in copied.modules():
                m.training = False
            mine = [
                t for t in (*copied.parameters(), *copied.buffers()) if not isinstance(t, nn.UninitializedParameter)
            ]
            foreign = {_storage(t) for t in (*source.parameters(), *source.buffers())}
            for t in mine:
                t.requires_grad_(False)
            self.owned = {_storage(t) for t in mine} - foreign

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's own output, in eval mode, by its own code."""
        if self.own:
            return self.model(*args, **kwargs)
        with evaluating(self.model):
            return self.model(*args, **kwargs)

    def plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any], like: Tensor) -> Any:
        """The same outside of inference mode and autocast."""
        with without_recording(like):
            return self.call(args, kwargs)


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _patched(model: nn.Module) -> bool:
    """What runs may be a closure over the model's own modules, which a copy would not redirect."""
    return any("forward" in vars(m) or any(vars(m).get(h) for h in _HOOKS) for m in model.modules())


def _copied(source: nn.Module) -> nn.Module | None:
    memo: dict[int, Any] = {}
    for layer in masked_layers(source).values():
        if type(layer) not in (BinaryMaskedConv2d, BinaryMaskedLinear):
            continue  # which may read its scores in a way of its own
        # Whoever reads them gets no numbers that pass for the model's.
        scores = layer.scores.detach().new_full((), float("nan")).expand(layer.scores.shape)
        memo[id(layer.scores)] = nn.Parameter(scores, requires_grad=False)
        memo[id(layer.signs)] = layer.signs.new_zeros(()).expand(layer.signs.shape)
    try:
        copied = copy.deepcopy(source, memo)
    except Exception:  # whatever does not let itself be copied: tensors with a history, locks, files
        return None
    known = {id(m) for m in source.modules()}
    return None if any(id(m) in known for m in copied.modules()) else copied


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode by attribute, one thread at a time; every module's mode is put back."""
    with _MODES:
        switched = [m for m in model.modules() if m.training]
        for m in switched:
            m.training = False
        try:
            yield
        finally:
            for m in switched:
                m.training = True
