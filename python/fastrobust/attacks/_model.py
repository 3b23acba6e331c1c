"""The model as an attack sees it: logits in float32 from images in [0, 1], left exactly as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks as ck


class Victim:
    """A model with its input conversion: normalisation, half-precision weights, autocast."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        normalize: Any = None,
        autocast: torch.dtype | None = None,
        x: Tensor | None = None,
    ) -> None:
        if not callable(model):
            raise TypeError(f"model: got {ck.describe(model)}, expected an nn.Module or a callable")
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise TypeError(f"autocast: got {ck.describe(autocast)}, expected torch.float16, torch.bfloat16 or None")
        self.model = model
        self.autocast = autocast
        self.mean: Tensor | None = None
        self.std: Tensor | None = None
        if normalize is not None:
            with torch.inference_mode(False):  # autograd saves them
                self.mean, self.std = _mean_std(normalize, x)
        self.feed = _weight_dtype(model) if autocast is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, K) logits in float32 (float64 for float64 images)."""
        wide = x.dtype
        if self.mean is not None and self.std is not None:
            x = (x - self.mean) / self.std
        if self.feed is not None and x.dtype != self.feed:
            x = x.to(self.feed)
        with torch.autocast(x.device.type, self.autocast) if self.autocast is not None else contextlib.nullcontext():
            logits = self.model(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != x.shape[0]:
            raise ValueError(f"model: returned {ck.describe(logits)}, expected logits of shape ({x.shape[0]}, classes)")
        return logits if logits.dtype == wide else logits.to(wide)


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


@contextlib.contextmanager
def undisturbed(model: Any, mode: str) -> Iterator[None]:
    """Run the model with gradients enabled for its input and leave no trace in it.

    Every module's own ``training`` flag is kept and put back (a BatchNorm frozen in eval stays frozen), by attribute, so
    that overridden ``train()`` methods do nothing. mode "eval" attacks the model as it is deployed; "keep" leaves the
    flags as they are and puts the buffers back afterwards, so that running statistics do not absorb attack iterates.
    """
    if mode not in ("eval", "keep"):
        raise ValueError(f"model_mode: got {mode!r}, expected 'eval' or 'keep'")
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [m.training for m in modules]
    buffers: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = []
    if mode == "keep" and any(flags):
        owners = [m._buffers for m in modules]
        buffers = [(o, name, b, b.detach().clone()) for o in owners for name, b in o.items() if b is not None]
    try:
        if mode == "eval":
            for m in modules:
                m.training = False
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for m, flag in zip(modules, flags, strict=True):
            m.training = flag
        with torch.no_grad():
            for owner, name, b, saved in buffers:
                owner[name] = b  # a forward may have put another tensor in its place
                b.copy_(saved)


def usable(t: Tensor) -> Tensor:
    """A tensor that autograd may save: inference tensors are cloned."""
    return t.clone() if t.is_inference() else t
