"""Whether an attack can be trusted: what its passes show by the way, said in plain words."""

from __future__ import annotations

import os
import random
import sys
import types
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._modes import modules_of

_EMPTY = types.CellType()
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_deterministic: weakref.WeakSet[Any] = weakref.WeakSet()


class AttackWarning(UserWarning):
    """An attack that may be weaker than it looks: its robust accuracy cannot be trusted as it stands."""


def warn(message: str, category: type[Warning] = AttackWarning) -> None:
    """At the line outside this package that called the attack."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and os.path.dirname(os.path.abspath(frame.f_code.co_filename)) == _PACKAGE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


class Dice:
    """Positions of the random generators, global ones and the model's. A model that moves them draws random numbers."""

    def __init__(self, x: Tensor, model: Any) -> None:
        self.cuda = x.device if x.is_cuda else None
        self.own = list(_generators(model))
        self.before = self._positions()

    def _positions(self) -> tuple[Any, ...]:
        numpy: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # what a model draws from is looked at
        words = [np.asarray(v).tobytes() for v in numpy["state"].values()]
        own = [_position(g) for g in self.own]
        found = (torch.get_rng_state().numpy().tobytes(), words, random.getstate(), own)
        return found if self.cuda is None else (*found, torch.cuda.get_rng_state(self.cuda).numpy().tobytes())

    def rolled(self) -> bool:
        return self._positions() != self.before


def _generators(model: Any) -> Iterator[Any]:
    """Those kept by the modules of a model, or seen by a function."""
    places: list[Any] = [vars(m) for m in modules_of(model)]
    places.append({k: c.cell_contents for k, c in enumerate(getattr(model, "__closure__", None) or ()) if c != _EMPTY})
    for place in places:
        for value in place.values():
            if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
                yield value


def _position(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().cpu().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return repr(generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state())


def known_deterministic(model: Any) -> bool:
    try:
        return model in _deterministic
    except TypeError:
        return False


def note_deterministic(model: Any) -> None:
    try:
        _deterministic.add(model)
    except TypeError:  # no weak reference, or no hash: it is asked again next time
        return


def warn_random() -> None:
    warn(
        "model: returned two different outputs for the same images, so one gradient and one pass judge it by chance; "
        "average with eot_samples=20 (or put layers such as dropout in eval mode)"
    )


def report(outputs: Tensor, value: Tensor, stuck: Tensor | None, named: str | None) -> None:
    """Warnings about the last step, from numbers that it computed anyway; one reading from the device.

    ``stuck`` (B,): not fooled, and every gradient coordinate that may move zero or NaN. Such a step does not move, so
    zero in the last step means that every step after the gradient vanished was lost.
    """
    z = outputs.detach()
    classes = named is not None and z.dim() == 2 and z.shape[1] > 1
    rows = z.flatten(1) if z.dim() > 1 else z[:, None]
    counts = [
        (~torch.isfinite(value)).sum(),
        (rows.isnan() | (rows == float("inf"))).any(1).sum() if z.is_floating_point() else value.new_zeros(()),
        torch.zeros((), device=z.device) if stuck is None else stuck.sum(),
        ((z >= 0).all() & ((z.sum(1) - 1).abs() < 5e-3).all()) if classes else value.new_zeros(()),
    ]
    bad, broken, still, probabilities = torch.stack([c.to(torch.float32) for c in counts]).tolist()
    if bad:
        warn(
            f"pgd: the loss of {int(bad)} of {value.numel()} examples was not finite in the last step; "
            "NaN gradient coordinates did not move, so the attack is weaker than it looks"
        )
    if broken:
        warn(
            f"model: returned NaN or inf for {int(broken)} of {len(z)} examples in the last step; NaN counts as the "
            "largest output, so neither the attack nor what it calls fooled can be trusted there"
        )
    if still:
        hint = '; where large logits saturate it, loss="margin" or "dlr" do not' if named in ("ce", "kl") else ""
        warn(
            f"pgd: the gradient of {int(still)} of {len(z)} examples that are not fooled was zero or NaN in the last step: "
            f"they stayed where they were, and the attack has no strength there. Does the model round, threshold or "
            f"saturate{hint}?"
        )
    if probabilities:
        warn(
            "model: returned values that are >= 0 and sum to 1, as after softmax; the losses expect logits, and "
            "softmax flattens their gradients: attack the model without its last softmax"
        )
