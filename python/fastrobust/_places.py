"""Where tensors lie and what was written there: the vocabulary of records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Where in its storage a tensor lies, in elements."""

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

    def row_major(self) -> bool:
        """Dense, and in the order of the dimensions."""
        order = self.order()
        return self.dense() and order == sorted(order)

    def positions(self) -> Tensor:
        """Of every element, in the storage: int64 of shape ``size``."""
        out = torch.full(self.size, self.offset)
        for d, (n, step) in enumerate(zip(self.size, self.stride, strict=True)):
            out += (torch.arange(n) * step).view(-1, *[1] * (len(self.size) - d - 1))
        return out


def place_of(t: Tensor) -> Place:
    return Place(tuple(t.shape), t.stride(), int(t.storage_offset()))


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
    """A tensor that does not depend on the input. ``base``: the tensor that existed before the call and that it is, or
    shows in another order; None for one that the call computed, which belongs to this call alone."""

    tensor: Tensor
    base: Tensor | None


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


def wave(t: Tensor) -> Tensor:
    """Numbers in [-1, 1] for every element of t, the same in every run: points to compare on, and no random state is
    touched."""
    ramp = torch.sin(torch.arange(t.numel(), dtype=torch.float64) * 12.9898 + 4.1414) * 43758.5453
    return (2 * (ramp - ramp.floor()) - 1).to(t.device, t.dtype).view(t.shape)
