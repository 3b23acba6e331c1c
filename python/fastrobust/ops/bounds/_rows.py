"""How tensors and rows of coefficients are handed to the compiled module."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _C
from .._library import nothing_intercepts, on_cpu

Groups = tuple[Tensor, Tensor | None]  # of ``by_example``
SPREAD_BUFFER = 32768  # numbers that the kernel of the adjoint of a convolution holds (csrc/bounds/args.h)


def native(t: Tensor) -> bool:
    """Served by a compiled kernel (float64 is checked against, and runs by the definition)."""
    return t.dtype == torch.float32


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def dense(t: Tensor) -> Tensor:
    return t.resolve_neg().contiguous()


def finite(t: Tensor) -> bool:
    """Whether no number is infinite or NaN."""
    t = t.detach()
    if _small(t) and native(t):
        return bool(_C.all_finite(t.data_ptr(), t.numel()))
    return math.isfinite(t.sum().item()) or bool(torch.isfinite(t).all())


def margin_rows(labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """(example, label, other) of each row of margins z_y - z_j, j ascending without y; None where a label is out of
    range. labels: (B,) int64."""
    batch = len(labels)
    if _small(labels):
        out = torch.empty(3, batch * (classes - 1), dtype=torch.int64)
        found = _C.bounds_margin_rows(labels.data_ptr(), batch, classes, out.data_ptr())
        return (out[0], out[1], out[2]) if found else None
    if batch and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        return None
    others, own = torch.arange(classes - 1, device=labels.device), labels[:, None].expand(-1, classes - 1)
    example = torch.arange(batch, device=labels.device)[:, None].expand(-1, classes - 1)
    return example.flatten(), own.flatten(), (others + (others >= own)).flatten()


def _small(t: Tensor) -> bool:
    """Whether one thread of the compiled module is faster than torch's calls."""
    return t.is_cpu and t.is_contiguous() and not t.is_neg() and t.numel() <= 1 << 20 and nothing_intercepts()


def turned(t: Tensor, count: int, rows: int, columns: int) -> Tensor:
    """t, which is (count, rows, columns) in any shape, as (count, columns, rows)."""
    t = dense(t)
    if t.is_cpu and native(t) and nothing_intercepts():
        out = t.new_empty(count, columns, rows)
        _C.bounds_turn(t.data_ptr(), out.data_ptr(), count, rows, columns)
        return out
    return t.reshape(count, rows, columns).transpose(1, 2).contiguous()


def rows_args(
    A: Tensor, b: Tensor, example: Tensor | None, rows: Tensor | None, minus: Tensor | None, corner_y: Tensor | None,
    corner_x: Tensor | None, window: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """The rows argument of the compiled module for dense A (k, rows of A, n) and b (m, R)."""
    placed = None if corner_y is None or corner_x is None else (corner_y.data_ptr(), corner_x.data_ptr(), *window)
    stride = A.shape[1] * A.shape[2] if A.shape[0] == 2 else 0
    return (
        A.data_ptr(),
        stride,
        address(rows),
        address(example),
        b.shape[1],
        A.shape[2],
        b.shape[0],
        placed,
        address(minus),
    )


def by_example(example: Tensor | None, count: int, batch: int, device: torch.device) -> Groups:
    """(starts, order): the rows of example i are order[starts[i] : starts[i + 1]], or this range itself without
    order."""
    if example is None:
        return torch.arange(count + 1, device=device), None
    order = None
    if count > 1 and (not on_cpu(example) or bool((example[1:] < example[:-1]).any())):  # without a look from the host
        order = example.argsort(stable=True)
        example = example[order]
    return torch.searchsorted(example, torch.arange(batch + 1, device=device)), order


def lanes_of(weight: Tensor) -> int:
    """Numbers of the taps of one position, in whole vectors."""
    return -(-weight[0].numel() // 16) * 16


def spread_lanes(weight: Tensor, width: int) -> int:
    """Lanes of the taps of one position for the adjoint of a convolution; 0 where they are too many for the kernel."""
    lanes = lanes_of(weight)
    return lanes if (width + 12) * lanes <= SPREAD_BUFFER else 0


def taps_of(weight: Tensor, lanes: int) -> Tensor:
    """A convolution's weight (O, C, kh, kw) as (O, lanes): taps (ky, kx, channel), then zeros."""
    taps = weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1)
    return dense(taps) if taps.shape[1] == lanes else F.pad(taps, (0, lanes - taps.shape[1]))
