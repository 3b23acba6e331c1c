"""Whether an attack can be trusted: what its passes show by the way, said in plain words."""

from __future__ import annotations

import math
import os
import random
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._modes import modules_of, owner

_EMPTY = types.CellType()
_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_deterministic: weakref.WeakSet[Any] = weakref.WeakSet()


class AttackWarning(UserWarning):
    """An attack that may be weaker than it looks: its robust accuracy cannot be trusted as it stands."""


def warn(message: str, category: type[Warning] = AttackWarning) -> None:
    """At the line outside this package that called the attack."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and os.path.abspath(frame.f_code.co_filename).startswith(_PACKAGE):
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


class Weights:
    """Parameters and buffers of a model, to be compared after a pass: an operation in place counts in ``_version``, one
    on ``.data`` changes the sums alone, and what is replaced is another tensor."""

    def __init__(self, model: Any) -> None:
        self.model = owner(model)
        self.before = self._now()

    def _now(self) -> dict[str, tuple[Any, ...]]:
        if not isinstance(self.model, torch.nn.Module):
            return {}
        tensors = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: (id(t), *_content(t)) for name, t in tensors}

    def changed(self) -> list[str]:
        now = self._now()
        return [name for name in {**self.before, **now} if self.before.get(name) != now.get(name)]


def _content(t: Tensor) -> tuple[Any, ...]:
    version = None if t.is_inference() else t._version
    if t.is_quantized or t.layout != torch.strided or t.is_complex():
        return (version,)
    with torch.no_grad():
        values = t.detach().double()
        return version, repr(torch.stack([values.sum(), values.square().sum()]).tolist())


def watched(model: Any, call: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """The outputs of a pass made without gradients, and whether a backward pass was run in it: one would ask for
    tensors that the forward pass saved, though nobody outside asked for a graph."""
    module, asked = owner(model), []
    if isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
        return call(), False  # their graphs are fixed, or are compiled anew under hooks

    def unpack(t: Tensor) -> Tensor:
        asked.append(True)
        return t

    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            return call(), bool(asked)
    except RuntimeError:  # transforms of torch.func refuse hooks
        return call(), False


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


def nothing_to_report(outputs: Tensor, value: Tensor, grad: Tensor) -> bool:
    """True for what nearly every last step is, from four numbers and one reading: finite, not >= 0 throughout, with a
    gradient that moves every example."""
    z = outputs if outputs.is_floating_point() and outputs.numel() else value
    most = torch.linalg.vector_norm(grad.flatten(1), math.inf, 1)
    low, still, *sums = torch.stack([z.min(), most.min(), z.sum(), value.sum()]).tolist()
    return low < 0 and still > 0 and all(map(math.isfinite, sums))


def warn_broken(outputs: Tensor, what: str) -> None:
    rows = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
    broken = int((rows.isnan() | (rows == math.inf)).any(1).sum())
    if broken:
        warn(
            f"model: returned NaN or inf for {broken} of {len(rows)} {what}; NaN counts as the "
            "largest output, so neither the attack nor what it calls fooled can be trusted there"
        )


def report(outputs: Tensor, value: Tensor, stuck: Tensor, named: str | None, attack: str = "pgd") -> None:
    """Warnings about the last step of an attack. ``stuck`` (B,): not fooled, and every gradient coordinate that may
    move is zero or NaN. Such a step does not move, so zero in the last step means that every step after the gradient
    vanished was lost.
    """
    rows = outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        warn(
            f"{attack}: the loss of {bad} of {value.numel()} examples was not finite in the last step; "
            "NaN gradient coordinates did not move, so the attack is weaker than it looks"
        )
    warn_broken(rows, "examples in the last step")
    still = int(stuck.sum())
    if still:
        hint = ' Where large logits saturate it, loss="margin" or "dlr" do not.' if named in ("ce", "kl") else ""
        warn(
            f"{attack}: the gradient of {still} of {len(rows)} examples that are not fooled was zero or NaN in the "
            "last "
            "step: they stayed where they were, and the attack has no strength there. Does the model round, threshold "
            f"or saturate?{hint}"
        )
    if named is not None and rows.shape[1] > 1 and bool((rows >= 0).all() & ((rows.sum(1) - 1).abs() < 5e-3).all()):
        warn(
            "model: returned values that are >= 0 and sum to 1, as after softmax; the losses expect logits, and "
            "softmax flattens their gradients: attack the model without its last softmax"
        )
