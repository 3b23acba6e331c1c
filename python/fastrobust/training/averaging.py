"""Weight averaging: exponential (EMA) and over epochs (SWA), used for evaluation and saved beside the weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed import average_statistics


@dataclasses.dataclass(frozen=True)
class Averaging:
    r"""How weights are averaged.

    kind "ema": after every step ``a <- d a + (1 - d) w`` with ``d = min(decay, (1 + t) / (10 + t))`` after t steps, so
    that a short training is not held at its start; running statistics are averaged alike. kind "swa" (Izmailov et al.
    2018): the mean of the weights at the ends of epochs, whose batch normalisations are estimated anew on the training
    images. ``start``: share of the training after which averaging begins.
    """

    kind: Literal["ema", "swa"] = "ema"
    decay: float = 0.999
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("ema", "swa"):
            raise ValueError(f"average: got kind {self.kind!r}, expected 'ema' or 'swa'")
        if not 0 <= self.decay < 1:
            raise ValueError(f"average: got decay {self.decay}, expected at least 0 and less than 1")
        if not 0 <= self.start < 1:
            raise ValueError(f"average: got start {self.start}, expected a share of the training, in [0, 1)")


def averaging(given: Averaging | str | None) -> Averaging | None:
    """ "ema", "swa" (over the last quarter), an :class:`Averaging`, or None."""
    if given is None or isinstance(given, Averaging):
        return given
    if given not in ("ema", "swa"):
        raise ValueError(f"average: got {given!r}, expected 'ema', 'swa', an Averaging or None")
    return Averaging("swa", start=0.75) if given == "swa" else Averaging("ema")


class Average:
    """The running average of a model's floating-point parameters and, for EMA, buffers."""

    def __init__(self, model: nn.Module, how: Averaging) -> None:
        self.how = how
        self.kept: dict[str, Tensor] = {}
        self.count = 0
        self._model = model

    def _live(self) -> dict[str, Tensor]:
        named: list[tuple[str, Tensor]] = list(self._model.named_parameters())
        if self.how.kind == "ema":
            named += list(self._model.named_buffers())
        return {name: t.detach() for name, t in named if t.is_floating_point()}

    def after_step(self, progress: float) -> None:
        """``progress``: share of the training that is done."""
        if self.how.kind == "ema" and progress >= self.how.start:
            decay = min(self.how.decay, (1 + self.count) / (10 + self.count)) if self.count else 0.0
            self._move(1 - decay)

    def after_epoch(self, progress: float) -> None:
        if self.how.kind == "swa" and progress > self.how.start:
            self._move(1 / (self.count + 1))

    @torch.no_grad()
    def _move(self, weight: float) -> None:
        for name, t in self._live().items():
            if self.count:
                self.kept[name].lerp_(t, weight)
            else:
                self.kept[name] = t.clone()
        self.count += 1

    @contextlib.contextmanager
    def applied(self, batches: Callable[[], Iterable[Any]]) -> Iterator[None]:
        """The model carries the average inside the block, and its own weights and statistics afterwards."""
        if not self.count:
            yield
            return
        own = {n: t.detach().clone() for n, t in (*self._model.named_parameters(), *self._model.named_buffers())}
        try:
            self.put(batches)
            yield
        finally:
            with torch.no_grad():
                for name, t in (*self._model.named_parameters(), *self._model.named_buffers()):
                    t.copy_(own[name])

    @torch.no_grad()
    def put(self, batches: Callable[[], Iterable[Any]]) -> None:
        """The average into the model. ``batches()``: images to estimate statistics on, for SWA."""
        if not self.count:
            return
        for name, t in self._live().items():
            t.copy_(self.kept[name])
        if self.how.kind == "swa":
            estimate_statistics(self._model, batches())
            average_statistics(self._model)

    def state_dict(self) -> dict[str, Any]:
        return {"kept": dict(self.kept), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        live = self._live()
        self.count = state["count"]
        self.kept = {name: t.to(live[name].device, live[name].dtype).clone() for name, t in state["kept"].items()}


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Running statistics of batch normalisations as the mean over the batches' images; everything else stays in eval
    mode. ``batches``: images, or tuples that begin with them."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return
    device = next(model.parameters()).device
    modes, momenta = [(m, m.training) for m in model.modules()], [m.momentum for m in norms]
    try:
        model.eval()
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # the mean over all batches
            m.training = True
        for batch in batches:
            x = batch if isinstance(batch, Tensor) else batch[0]
            model(x.to(device))
    finally:
        for module, mode in modes:
            module.training = mode
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum


__all__ = ["Average", "Averaging", "averaging", "estimate_statistics"]
