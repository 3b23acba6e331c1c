"""The model as an attack sees it: outputs in float32 from images in [0, 1]."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.freeze import FrozenModel
from ..ops import _checks as ck
from ._modes import modules_of, owner
from ._modes import undisturbed as undisturbed
from .prepare import ROWS, PreparedVictim, prepared_once

Output = str | int | Callable[[Any], Tensor]


class Victim:
    """A model with its input conversion (normalisation, half-precision weights, autocast) and what is taken of its
    output. ``logits``: the output must be (B, classes); else any tensor with the batch first."""

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        normalize: Any = None,
        autocast: torch.dtype | None = None,
        x: Tensor | None = None,
        output: Output | None = None,
        logits: bool = True,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: got {ck.describe(model)}, expected an nn.Module or a callable")
        if isinstance(model, PreparedVictim):
            model.refresh()
        if isinstance(model, type):
            raise TypeError(f"model: got the class {model.__name__}, expected an instance of it")
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise TypeError(f"autocast: got {ck.describe(autocast)}, expected torch.float16, torch.bfloat16 or None")
        if isinstance(output, bool) or not (output is None or isinstance(output, (str, int)) or callable(output)):
            raise TypeError(f"output: got {ck.describe(output)}, expected a key, an index, a callable or None")
        self.model: Callable[[Tensor], Any] = model
        self.autocast = autocast
        self.output = output
        self.logits = logits
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        if normalize is not None:
            with torch.inference_mode(False):  # autograd saves them
                self.mean, self.std = _mean_std(normalize, x)
        self.feed = _weight_dtype(owner(model)) if autocast is None else None
        self.converts = self.mean is not None or (x is not None and self.feed not in (None, x.dtype))
        self.writes = False  # the model's first operation writes in place, which autograd forbids on a leaf

    def __call__(self, x: Tensor) -> Tensor:
        """The outputs in float32 (float64 for float64 images). A model may write into what it is given, by whatever
        road: that is never x itself."""
        return self._outputs(x if self.converts else x.clone())

    def differentiable(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A leaf with x's values, and the outputs for it."""
        leaf = (x.detach() if self.converts or self.writes else x.detach().clone()).requires_grad_()
        try:
            return leaf, self._outputs(leaf.clone() if self.writes else leaf)
        except RuntimeError as error:
            if self.converts or self.writes or "a leaf Variable that requires grad" not in str(error):
                raise
        self.writes = True
        return self.differentiable(x)

    def prepared(self, x: Tensor) -> tuple[Victim, str]:
        """The same with the model prepared for the images, and why it is not, where that has another reason than
        speed."""
        if self.autocast is not None:
            return self, "under autocast nothing is prepared"
        if any(m.training for m in modules_of(self.model)):
            return self, "the model is attacked in training mode, and eval mode is what can be prepared"
        if isinstance(self.model, FrozenModel):
            return self, ""  # that is prepared already
        victim = copy.copy(self)
        victim.model = found = prepared_once(self.model, self._fed(x[:ROWS]))
        victim.writes = False
        report = found.report
        return victim, "" if report.ratios else report.why

    def _fed(self, x: Tensor) -> Tensor:
        """The images as the model is given them."""
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        return x.to(self.feed) if self.feed is not None and x.dtype != self.feed else x

    def _outputs(self, x: Tensor) -> Tensor:
        given, fed = x, self._fed(x)
        outputs: Any
        with torch.autocast(x.device.type, self.autocast) if self.autocast is not None else contextlib.nullcontext():
            outputs = self.model(fed)
        if self.output is not None:
            outputs = _select(outputs, self.output)
        if not self._fits(outputs, x):
            want = f"logits of shape ({x.shape[0]}, classes)" if self.logits else f"a tensor ({x.shape[0]}, ...)"
            raise ValueError(f"model: returned {_returned(outputs)}, expected {want}{_hint(outputs, x)}")
        narrow = outputs.is_floating_point() and outputs.dtype != given.dtype
        found: Tensor = outputs.to(given.dtype) if narrow else outputs
        return found

    def _fits(self, outputs: Any, x: Tensor) -> bool:
        if not isinstance(outputs, Tensor) or outputs.dim() == 0 or outputs.shape[0] != x.shape[0]:
            return False
        # one logit is always the largest: nothing would ever count as fooled
        return not self.logits or (outputs.dim() == 2 and outputs.shape[1] > 1 and outputs.is_floating_point())


def _select(outputs: Any, key: Output) -> Any:
    if callable(key):
        return key(outputs)
    try:
        return outputs[key] if isinstance(outputs, Mapping) or isinstance(key, int) else getattr(outputs, key)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError(f"output: got {key!r}, but the model returned {_returned(outputs)}") from None


def _returned(outputs: Any) -> str:
    if isinstance(outputs, Mapping):
        return f"{type(outputs).__name__} with keys {', '.join(map(repr, outputs))}"
    if isinstance(outputs, (tuple, list)):
        return f"{type(outputs).__name__} of {len(outputs)} ({', '.join(ck.describe(o) for o in outputs[:3])})"[:160]
    return ck.describe(outputs)


def _hint(outputs: Any, x: Tensor) -> str:
    if isinstance(outputs, Mapping) and outputs:
        return f"; pick one, say output={next(iter(outputs))!r}"
    if isinstance(outputs, (tuple, list)):
        return "; pick one, say output=0"
    if isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape == (x.shape[0], 1):
        return (
            " with at least 2 classes; of one logit for two classes make both: "
            "output=lambda z: torch.cat([torch.zeros_like(z), z], 1)"
        )
    if isinstance(outputs, Tensor) and outputs.dim() >= 1 and outputs.shape[0] == x.shape[0]:
        return "; for anything but classification give loss= a callable(outputs, y)"
    return ""


def _weight_dtype(model: Any) -> torch.dtype | None:
    """The dtype of a half-precision or double model's weights, which the input must have."""
    if isinstance(model, nn.Module):
        for p in model.parameters():
            if p.dtype.is_floating_point:
                return p.dtype
    return None


def _mean_std(normalize: Any, x: Tensor | None) -> tuple[Tensor, Tensor]:
    try:
        mean, std = (torch.as_tensor(v, dtype=torch.float32) for v in normalize)
    except (TypeError, ValueError):
        raise TypeError(f"normalize: got {ck.describe(normalize)}, expected (mean, std)") from None
    if not bool((std > 0).all()):
        raise ValueError(f"normalize: got std {std.tolist()}, expected values > 0")
    if x is not None:
        shape = [-1] + [1] * max(0, x.dim() - 2)
        channels = x.shape[1] if x.dim() > 1 else 1
        for v, name in ((mean, "mean"), (std, "std")):
            if v.numel() not in (1, channels):
                raise ValueError(
                    f"normalize: got {v.numel()} values of {name}, expected 1 or one per channel ({channels})"
                )
        mean, std = (v.reshape(shape).to(x.device, x.dtype) for v in (mean, std))
    return mean, std


def usable(t: Tensor) -> Tensor:
    """A tensor that autograd may save: inference tensors are cloned."""
    return t.clone() if t.is_inference() else t
