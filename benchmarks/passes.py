"""Images that go through a model forwards and backwards: what attacks and training steps cost besides time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Counts:
    """Of one call: images that went through the model, and gradients that came back through it."""

    forwards: int
    backwards: int


class Passes:
    """Counts the images of a model's own calls while it is watched; `handle.remove()` ends that."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards = self.backwards = 0
        self.handle = model.register_forward_hook(self._forward)

    def _forward(self, model: nn.Module, given: Any, out: Tensor) -> None:
        self.forwards += len(out)
        if out.requires_grad:
            out.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)

    @property
    def counts(self) -> Counts:
        return Counts(self.forwards, self.backwards)


@contextlib.contextmanager
def watching(model: nn.Module | None) -> Iterator[Passes | None]:
    """A watch for the time of the block; nothing for no model."""
    watch = None if model is None else Passes(model)
    try:
        yield watch
    finally:
        if watch is not None:
            watch.handle.remove()


def said(result: Any) -> Counts | None:
    """What a result that is a mapping tells of its own passes."""
    if not isinstance(result, Mapping) or not {"forwards", "backwards"} <= result.keys():
        return None
    return Counts(int(result["forwards"]), int(result["backwards"]))
