"""Victims made ready for thousands of passes: only the input has a gradient, and nothing is computed that can be
known."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from .._record import unwrapped
from ..nn._snapshot import evaluating
from ..nn.freeze import _autocast, _dispatch_modes, _functorch_level, _is_compiling, _watched
from ..ops import _checks as ck
from ._making import Built, Call, Preparation, build, rebuilt
from ._modes import owner

__all__ = ["ROWS", "Preparation", "PreparedVictim", "prepare", "prepared_once"]

ROWS = 16  # images that ``prepare=True`` measures on


class PreparedVictim(nn.Module):
    """See :func:`prepare`. ``report`` says what became of the model; ``refresh()`` looks at once whether it has
    changed."""

    built: Built
    source: Any

    def __init__(self, model: Any, built: Built) -> None:
        super().__init__()
        kept = owner(model)
        if isinstance(kept, nn.Module):
            self.model = kept  # for its dtype, device and modes; it is never changed through here
            self.training = False
        object.__setattr__(self, "source", model)
        object.__setattr__(self, "built", built)
        self.generation = 0  # how often the weights were taken over

    @property
    def report(self) -> Preparation:
        return self.built.report

    def forward(self, x: Tensor) -> Any:
        built = self.built
        run = built.run
        if run is None or not built.fits(x) or not len(x) or _looked_on() or _autocast():
            return self._itself(x)
        if built.marks is not None and built.marks.moved():
            self.refresh()
            run = self.built.run
        return self._itself(x) if run is None else run(x)

    def _itself(self, x: Tensor) -> Any:
        model = owner(self.source)
        if isinstance(model, nn.Module) and any(m.training for m in model.modules()):
            with evaluating(model):
                return self.source(x)
        return self.source(x)

    def refresh(self) -> bool:
        """Whether the model has changed since it was prepared; if so it is prepared again, in the same way, and
        compared again. Every attack asks at its start."""
        built = self.built
        if built.marks is None or not built.marks.differs(unwrapped(self.source)):
            return False
        object.__setattr__(self, "built", rebuilt(unwrapped(self.source), built))
        self.generation += 1
        return True

    def __getstate__(self) -> dict[str, Any]:
        # what is run belongs to this process and to this model; copies and pickles make their own
        return {k: v for k, v in self.__dict__.items() if k != "built"} | {"made_of": self.built.example}

    def __setstate__(self, state: dict[str, Any]) -> None:
        example = state.pop("made_of")
        self.__dict__.update(state)
        object.__setattr__(self, "built", build(self.source, example))

    def train(self, mode: bool = True) -> PreparedVictim:
        """Does nothing: eval mode is what was prepared, and the model's own modes are not changed through here."""
        return self

    def extra_repr(self) -> str:
        return str(self.report).splitlines()[0]


def prepare(model: Call, example: Tensor) -> PreparedVictim:
    """The model made ready for thousands of passes of which only the input's gradient is wanted: a module that every
    attack takes in its place.

    Batch normalisation joins the layer before it, or the one behind it where no padding lies between (through residual
    graphs, which torch.fx reads), and else becomes one factor and shift with the ReLU behind it. Additions and clamps
    happen in the write of the convolution before them. Weights are reordered once, and no parameter has a gradient. The
    layout of maps and the kernels of each layer are chosen by measurement on ``example``. A model that torch.fx cannot
    read keeps its own code: normalisations, parameters and layout are prepared. Masked layers are frozen
    (:func:`fastrobust.nn.freeze`). Where nothing is at least 1.05 times as fast as the model, the model is run.

    Every way is compared with the model in eval mode before it is taken, on images of the example: outputs and input
    gradients as they are and in float64, within what ``report`` states. Images of another shape, dtype or device than
    the example's go to the model itself, as do calls under autocast, torch.compile, functorch and dispatch modes.
    Derivatives of second order need the model itself.

    The model is not changed. When it is, what is run follows: writes that torch counts are seen in every pass, others
    (through ``.data``, numpy, attributes) at the start of every attack and by ``refresh()``. It is then prepared again
    in the same way; nothing is measured anew.

    Args:
        model: an nn.Module (in any mode: its eval mode is prepared). Any other callable is run as it is.
        example: (B, ...) images as the model is given them (after ``normalize``), best as many as a batch of the
        attack.

    Returns:
        A module; ``print(victim.report)`` says what was done, how fast it is and how far from the model.

    Raises:
        TypeError, ValueError: for a model that is no callable, or an example that is no batch of floating-point images.
    """
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"model: got {ck.describe(model)}, expected an nn.Module or a callable")
    if not isinstance(example, Tensor) or not example.is_floating_point():
        raise TypeError(f"example: got {ck.describe(example)}, expected a tensor of floating-point images")
    if example.dim() < 2 or not example.numel():
        raise ValueError(f"example: got shape {tuple(example.shape)}, expected (B, ...) with at least one image")
    if isinstance(model, PreparedVictim):
        model = model.source
    return PreparedVictim(model, build(model, example.detach().clone()))


_kept: weakref.WeakKeyDictionary[nn.Module, dict[Any, Built]] = weakref.WeakKeyDictionary()


def prepared_once(model: Any, x: Tensor) -> PreparedVictim:
    """For ``prepare=True``: measured on the first images of x, and remembered with the model."""
    if isinstance(model, PreparedVictim):
        return model
    key = (x.shape[1:], x.dtype, x.device)
    known = _kept.setdefault(model, {}) if isinstance(model, nn.Module) else {}
    if key not in known:
        known[key] = build(model, x[:ROWS].detach().clone())
    victim = PreparedVictim(model, known[key])
    if victim.refresh():
        known[key] = victim.built
    return victim


def _looked_on() -> bool:
    return bool(_is_compiling() or _dispatch_modes() or _functorch_level() is not None or _watched())
