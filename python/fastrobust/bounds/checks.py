"""Checks of the arguments of compute_bounds; nothing is computed before they pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.ops.bounds import finite, margin_rows
from fastrobust.ops.linear_bounds import check_eps, check_norm


def check_inputs(x: Tensor, eps: float | Tensor, norm: float | str, clip: Any) -> tuple[Tensor, float | Tensor, float, tuple[float, float] | None]:  # fmt: skip
    if not isinstance(x, Tensor):
        raise TypeError(f"x: got {type(x).__name__}, expected a tensor")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x: got {x.dtype}, expected float32 or float64")
    if x.dim() < 2:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, *shape)")
    if not finite(x):
        raise ValueError("x: holds NaN or infinite values, expected finite ones")
    check_eps(eps, x)
    if clip is not None:
        clip = check_clip(clip)
        low, high = x.detach().aminmax() if x.numel() else (torch.tensor(clip[0]), torch.tensor(clip[1]))
        if float(low) < clip[0] or float(high) > clip[1]:
            raise ValueError(f"x: has values in [{float(low)}, {float(high)}], outside clip {clip}")
    return x, eps, check_norm(norm), clip


def check_options(rounding: str, refine: str, exact_input: bool, max_memory: int) -> None:
    """The options of the engine that the certificates pass on."""
    if rounding not in ("nearest", "outward"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'nearest' or 'outward'")
    if refine not in ("unstable", "all"):
        raise ValueError(f"refine: got {refine!r}, expected 'unstable' or 'all'")
    if not isinstance(exact_input, bool):
        raise TypeError(f"exact_input: got {exact_input!r}, expected True or False")
    if isinstance(max_memory, bool) or not isinstance(max_memory, int) or max_memory < 1:
        raise ValueError(f"max_memory: got {max_memory!r}, expected a number of bytes >= 1")


def check_clip(clip: Any) -> tuple[float, float]:
    try:
        low, high = (float(v) for v in clip)
    except (TypeError, ValueError):
        raise TypeError(f"clip: got {clip!r}, expected (low, high) or None") from None
    if not low < high:
        raise ValueError(f"clip: got ({low}, {high}), expected low < high")
    return low, high


def check_spec(
    labels: Tensor | None, spec: Tensor | None, x: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(example, plus, minus, matrix) of the rows to bound: differences of outputs, single outputs, or rows of a matrix."""
    batch, device = x.shape[0], x.device
    count = math.prod(shape)
    if labels is not None and spec is not None:
        raise ValueError("spec: give labels or spec, not both")
    if labels is not None:
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"labels: expected an int64 tensor, got {labels.dtype if isinstance(labels, Tensor) else type(labels).__name__}"
            )
        if tuple(labels.shape) != (batch,):
            raise ValueError(f"labels: got shape {tuple(labels.shape)}, expected ({batch},)")
        if len(shape) != 1 or count < 2:
            raise ValueError(f"labels: the model's output has shape {shape} per example, expected (K,) with K >= 2")
        labels = labels.to(device=device, dtype=torch.int64).contiguous()
        found = margin_rows(labels, count)
        if found is None:
            low, high = (t.item() for t in labels.aminmax())
            raise ValueError(f"labels: values in [{low}, {high}], expected [0, {count - 1}]")
        return (*found, None)
    if spec is not None:
        if not isinstance(spec, Tensor) or spec.dtype != x.dtype:
            raise TypeError(
                f"spec: expected a tensor of {x.dtype}, got {spec.dtype if isinstance(spec, Tensor) else type(spec).__name__}"
            )
        if spec.dim() not in (2, 3) or spec.shape[-1] != count or (spec.dim() == 3 and spec.shape[0] != batch):
            raise ValueError(f"spec: got shape {tuple(spec.shape)}, expected (S, {count}) or ({batch}, S, {count})")
        matrix = spec.expand(batch, *spec.shape[-2:]).reshape(-1, count)
        return _examples(batch, spec.shape[-2], device), None, None, matrix
    return _examples(batch, count, device), torch.arange(count, device=device).repeat(batch), None, None


def _examples(batch: int, rows: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device)[:, None].expand(-1, rows).contiguous().flatten()


def explain_not_finite(model: nn.Module, *sides: Tensor | None) -> None:
    """Raises for NaN bounds and names the parameter behind them; infinite bounds without NaN are valid and pass."""
    for kind in (model.named_parameters(), model.named_buffers()) if isinstance(model, nn.Module) else ():
        for name, p in kind:
            if p.dtype.is_floating_point and not bool(torch.isfinite(p.detach()).all()):
                raise ValueError(f"model: '{name}' holds NaN or infinite values")
    if any(t is not None and bool(torch.isnan(t).any()) for t in sides):
        raise ValueError("model: the bounds overflow the floating-point range (NaN); use float64 or a smaller eps")
