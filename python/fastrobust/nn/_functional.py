"""Operations of a record as functions that write into nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._record import Step, UnreadableModelError

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
