"""Checks of the arguments of compute_bounds; nothing is computed before they pass."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust._input_sets import Clip
from fastrobust.ops._checks import describe
from fastrobust.ops.bounds import broadcasts, check_eps, check_norm, finite, margin_rows


def check_inputs(x: Tensor, eps: Any, norm: Any, clip: Any) -> tuple[Tensor, float | Tensor, float, Clip]:
    """The input set as the engine takes it."""
    check_input(x)
    if not finite(x):
        raise ValueError("x: got NaN or infinite values, expected finite ones")
    eps = check_eps(as_tensor(eps), x)
    if clip is not None:
        clip = check_clip(clip, x)
        low, high = clip
        inside = isinstance(low, Tensor) or not x.numel()
        if not inside:
            least, most = (float(t) for t in x.detach().aminmax())
            inside = low <= least and most <= high
        elif x.numel():
            inside = bool(((x >= low) & (x <= high)).all())
        if not inside:
            least, most = (float(t) for t in x.detach().aminmax())
            raise ValueError(f"x: got values in [{least:.9g}, {most:.9g}], expected all in clip {_named(clip)}")
    return x, eps, check_norm(norm), clip


def check_input(x: Any) -> Tensor:
    """(B, *shape) of a floating-point type that the bounds run in."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a tensor")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: got {x.dtype}, expected float32 or float64")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, *shape); x[None] is a batch of one")
    return x


def as_tensor(value: Any) -> Any:
    """numpy arrays as tensors; everything else as it is."""
    if type(value) in (float, int, Tensor):
        return value
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 0) > 0:
        return torch.as_tensor(value)
    return value.item() if type(value).__name__ == "ndarray" else value


def number(value: Any, name: str) -> float:
    """A real number of any kind, numpy's too."""
    value = as_tensor(value)
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: got {describe(value)}, expected a number")
    return float(value)


def check_method(method: Any, names: Iterable[str]) -> str:
    """The name as it is written in ``names``; "CROWN" and "crown_ibp" are taken as well."""
    names = tuple(names)
    name = method.lower().replace("_", "-") if isinstance(method, str) else method
    if name not in names:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(names)}")
    return str(name)


def check_options(rounding: str, refine: str, exact_input: bool, max_memory: int) -> None:
    """The options of the engine that the certificates pass on."""
    if rounding not in ("nearest", "outward"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'nearest' or 'outward'")
    if refine not in ("unstable", "all"):
        raise ValueError(f"refine: got {refine!r}, expected 'unstable' or 'all'")
    if not isinstance(exact_input, bool):
        raise TypeError(f"exact_input: got {exact_input!r}, expected True or False")
    if isinstance(max_memory, bool) or not isinstance(max_memory, (int, numbers.Integral)) or max_memory < 1:
        raise ValueError(f"max_memory: got {max_memory!r}, expected a number of bytes >= 1")


def check_clip(clip: Any, x: Tensor) -> tuple[float, float] | tuple[Tensor, Tensor]:
    """(low, high) as two numbers, or two tensors where one of them has more than one element."""
    try:
        low, high = (as_tensor(v) for v in clip)
    except (TypeError, ValueError):
        raise TypeError(f"clip: got {clip!r}, expected (low, high) or None") from None
    if not any(isinstance(v, Tensor) and v.numel() != 1 for v in (low, high)):
        try:
            low, high = float(low), float(high)
        except (TypeError, ValueError):
            raise TypeError(f"clip: got {clip!r}, expected (low, high) or None") from None
        if not low < high:
            raise ValueError(f"clip: got ({low}, {high}), expected low < high")
        return low, high
    low, high = (torch.as_tensor(v, device=x.device if not isinstance(v, Tensor) else None) for v in (low, high))
    for name, side in (("low", low), ("high", high)):
        if not broadcasts(side, x):
            raise ValueError(
                f"clip: got a {name} of shape {tuple(side.shape)}, expected one that broadcasts to x's "
                f"{tuple(x.shape)}, "
                "as (C, 1, 1) does for images"
            )
        if side.numel() > 1 and side.device != x.device:
            raise ValueError(f"clip: got a tensor on {side.device}, expected x's device {x.device}")
    low, high = (v.detach().to(x.device).to(torch.promote_types(v.dtype, x.dtype)) for v in (low, high))
    if not bool((low < high).all()):
        raise ValueError(f"clip: got {_named((low, high))}, expected low < high everywhere")
    return low, high


def clip_of(clip: Clip, index: Tensor, x: Tensor) -> Clip:
    """The clip of some examples of x."""
    if clip is None or not isinstance(clip[0], Tensor) or not isinstance(clip[1], Tensor):
        return clip
    low, high = (c[index] if c.dim() == x.dim() and len(c) > 1 else c for c in clip)
    return low, high


def _named(clip: Any) -> str:
    low, high = clip
    if not isinstance(low, Tensor):
        return f"({low}, {high})"
    return f"(low in [{float(low.min()):.9g}, {float(low.max()):.9g}], high in [{float(high.min()):.9g}, {float(high.max()):.9g}])"


def check_labels(labels: Any, batch: int, device: torch.device) -> Tensor:
    """(B,) int64 on ``device`` from integers of any type, numpy's too."""
    given = as_tensor(labels)
    if (
        not isinstance(given, Tensor)
        or given.dtype.is_floating_point
        or given.dtype.is_complex
        or given.dtype == torch.bool
    ):
        what = given.dtype if isinstance(given, Tensor) else type(given).__name__
        raise TypeError(f"labels: got {what}, expected a tensor of integers")
    if tuple(given.shape) != (batch,):
        raise ValueError(f"labels: got shape {tuple(given.shape)}, expected ({batch},)")
    return given.to(device=device, dtype=torch.int64).contiguous()


def check_spec(
    labels: Any, spec: Tensor | None, x: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(example, plus, minus, matrix) of the rows to bound: differences of outputs, single outputs, or rows of a
    matrix."""
    batch, device = x.shape[0], x.device
    count = math.prod(shape)
    if labels is not None and spec is not None:
        raise ValueError("spec: give labels or spec, not both")
    if labels is not None:
        labels = check_labels(labels, batch, device)
        if len(shape) != 1 or count < 2:
            raise ValueError(f"labels: the model's output has shape {shape} per example, expected (K,) with K >= 2")
        found = margin_rows(labels, count)
        if found is None:
            low, high = (t.item() for t in labels.aminmax())
            raise ValueError(f"labels: got values in [{low}, {high}], expected [0, {count - 1}]")
        return (*found, None)
    if spec is not None:
        if not isinstance(spec, Tensor) or spec.dtype != x.dtype:
            raise TypeError(
                f"spec: expected a tensor of {x.dtype}, got "
                f"{spec.dtype if isinstance(spec, Tensor) else type(spec).__name__}"
            )
        if spec.dim() not in (2, 3) or spec.shape[-1] != count or (spec.dim() == 3 and spec.shape[0] != batch):
            raise ValueError(f"spec: got shape {tuple(spec.shape)}, expected (S, {count}) or ({batch}, S, {count})")
        matrix = spec.expand(batch, *spec.shape[-2:]).reshape(-1, count)
        return _examples(batch, spec.shape[-2], device), None, None, matrix
    return _examples(batch, count, device), torch.arange(count, device=device).repeat(batch), None, None


def _examples(batch: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device)[:, None].expand(-1, rows).contiguous().flatten()


def explain_not_finite(model: Any, low: Tensor | None, up: Tensor | None) -> None:
    """Raises for bounds that hold nothing and names the parameter behind them; a lower bound of -inf is valid and
    passes."""
    for kind in (model.named_parameters(), model.named_buffers()) if isinstance(model, nn.Module) else ():
        for name, p in kind:
            if p.dtype.is_floating_point and not bool(torch.isfinite(p.detach()).all()):
                raise ValueError(f"model: '{name}' holds NaN or infinite values")
    sound = [t > -math.inf if t is up else t < math.inf for t in (low, up) if t is not None]
    if not all(bool(t.all()) for t in sound):  # NaN too
        raise ValueError("model: the bounds overflow the floating-point range; use float64 or a smaller eps")
