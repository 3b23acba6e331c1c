"""Whether a model is still the one that something was made of: its tensors, structure, hooks and plain attributes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import _C

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Place(NamedTuple):
    """Where a tensor is kept, and what it was like."""

    space: dict[Any, Any]
    name: Any
    tensor: Tensor
    version: int
    address: int
    registered: bool  # a parameter or buffer

    def moved(self) -> bool:
        t = self.tensor
        return self.space.get(self.name) is not t or t._version != self.version or t.data_ptr() != self.address


class Marks:
    """``moved`` reads addresses and version counters, in microseconds: what torch writes is seen. ``differs`` also
    reads numbers and attributes: what is written past the counters (``p.data``, numpy) is seen too. No module is kept
    alive."""

    def __init__(self, model: nn.Module) -> None:
        self.places = [_Place(s, name, t, t._version, t.data_ptr(), known) for s, name, t, known in _tensors(model)]
        self.sums = [_digest(place.tensor) for place in self.places]
        self.words = words(model)
        self.own: frozenset[Any] = frozenset()  # attributes and tensors that the model's passes change

    def moved(self) -> bool:
        return any(place.moved() for place in self.places)

    def differs(self, model: nn.Module) -> bool:
        now = words(model)
        if self.moved() or now.keys() != self.words.keys():
            return True
        if any(now[key] != self.words[key] for key in now if key not in self.own):
            return True
        return any(_digest(place.tensor) != seen for place, seen in zip(self.places, self.sums, strict=True))

    def settle(self, model: nn.Module) -> bool:
        """Called after passes of the model: attributes that they change (counters, caches) say nothing about it and are
        not looked at again. Whether they changed parameters or buffers."""
        now = words(model)
        self.own = frozenset(key for key in self.words if now.get(key) != self.words[key])
        wrote = any(place.moved() for place in self.places if place.registered)
        still = [k for k, place in enumerate(self.places) if place.registered or not place.moved()]
        self.places, self.sums = [self.places[k] for k in still], [self.sums[k] for k in still]
        return wrote


def _tensors(model: nn.Module) -> Iterator[tuple[dict[Any, Any], Any, Tensor, bool]]:
    """Parameters, buffers, and tensors that are attributes or lie in an attribute's lists and dictionaries."""
    for module in model.modules():
        for space in (module._parameters, module._buffers):
            yield from ((space, name, t, True) for name, t in space.items() if t is not None)
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                yield vars(module), name, value, False
            elif isinstance(value, (list, tuple, dict)) and name not in ("_parameters", "_buffers", "_modules"):
                yield from (({"": t}, "", t, False) for t in tree_leaves(value) if isinstance(t, Tensor))


def watchable(model: nn.Module) -> bool:
    """Inference tensors have no version counter, tensors on the meta device and sparse ones no memory to read."""
    tensors = (t for _, _, t, _ in _tensors(model))
    return not any(t.is_inference() or t.is_meta or t.layout != torch.strided or t.is_quantized for t in tensors)


def words(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Of every module its kind, its hooks, its plain attributes and the names of its tensors."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[path, ""] = (
            id(type(module)),
            id(module),
            tuple(len(vars(module).get(h) or ()) for h in _HOOKS),
            "forward" in vars(module),
            tuple(
                name for space in (module._parameters, module._buffers) for name, t in space.items() if t is not None
            ),
        )
        for name, value in vars(module).items():
            if name != "training" and _plain(value):
                found[path, name] = value
    return found


def _plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, (tuple, list)) and all(isinstance(v, _PLAIN) for v in value))


def _digest(t: Tensor) -> tuple[Any, ...]:
    """What is changed or exchanged changes it; elsewhere than on the CPU, sums over the bits by rows and by columns."""
    if t.is_cpu and t.is_contiguous():
        return t.shape, t.dtype, _C.digest(t.data_ptr(), t.numel() * t.element_size())
    with torch.no_grad():
        flat = t.detach().contiguous()
        flat = torch.view_as_real(flat) if flat.is_complex() else flat
        kind = _WORDS.get(flat.element_size())
        if kind is None or not flat.numel():
            return tuple(flat.shape), flat.dtype
        bits = flat.reshape(len(flat) if flat.dim() else 1, -1).view(kind)
        sums = (bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64))
        by = [int((part * torch.arange(1, len(part) + 1, device=part.device)).sum()) for part in sums]
        return tuple(flat.shape), flat.dtype, *by
