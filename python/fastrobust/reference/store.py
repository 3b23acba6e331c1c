"""The store of perturbations in plain torch: the definition of its ops and the oracle of their tests.

An image is flipped where ``flips`` says so, then shifted by ``offsets`` (down, right), zeros coming in. A row of the
store is the frame of its image, ``padding`` pixels more on every side, down-sampled by a whole number in height and
width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .pgd import project


def factor_of(store: Tensor, x: Tensor, padding: int) -> int:
    """How many image pixels one pixel of the store stands for, in each direction."""
    return (x.shape[2] + 2 * padding) // store.shape[2] if store.shape[2] else 1


def nearest_parts(offsets: Tensor | None, factor: int) -> Tensor | None:
    """Offsets in low-resolution pixels: the nearest whole number, halves towards zero."""
    return (
        None
        if offsets is None
        else offsets.sign() * ((offsets.abs() + (factor - 1) // 2).div(factor, rounding_mode="floor"))
    )


def _places(
    batch: int, size: tuple[int, int], padding: int, offsets: Tensor | None, flips: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Frame rows (B, H) and columns (B, W) of the pixels of the moved images."""
    offsets = torch.zeros(batch, 2, dtype=torch.int64, device=device) if offsets is None else offsets.to(device)
    flips = torch.zeros(batch, dtype=torch.bool, device=device) if flips is None else flips.to(device)
    rows, columns = (torch.arange(n, device=device)[None] for n in size)
    down, right = offsets[:, :1], offsets[:, 1:]
    mirrored = padding + size[1] - 1 + right - columns
    return padding - down + rows, torch.where(flips[:, None], mirrored, padding - right + columns)


def _pick(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x[b, :, rows[b], columns[b]], zero outside."""
    height, width = x.shape[2:]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None]
    if not height or not width:
        return x.new_zeros(x.shape[0], x.shape[1], *inside.shape[1:])
    each = torch.arange(x.shape[0], device=x.device)[:, None, None]
    found = x[each, :, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None]].permute(0, 3, 1, 2)
    return torch.where(inside[:, None], found, torch.zeros((), dtype=x.dtype, device=x.device))


def _back(x: Tensor, frame: tuple[int, int], padding: int, offsets: Tensor | None, flips: Tensor | None) -> Tensor:
    """The moved images x in their frames, zero where they do not show."""
    batch, _, height, width = x.shape
    zero = torch.zeros(batch, 2, dtype=torch.int64, device=x.device)
    offsets = zero if offsets is None else offsets.to(x.device)
    down, right = offsets[:, :1], offsets[:, 1:]
    rows, columns = (torch.arange(n, device=x.device)[None] for n in frame)
    flipped = torch.zeros(batch, dtype=torch.bool, device=x.device) if flips is None else flips.to(x.device)
    mirrored = padding + width - 1 + right - columns
    return _pick(x, rows - padding + down, torch.where(flipped[:, None], mirrored, columns - padding + right))


def shift_flip(x: Tensor, offsets: Tensor | None, flips: Tensor | None, inverse: bool = False) -> Tensor:
    """See :func:`fastrobust.ops.shift_flip`."""
    size = (x.shape[2], x.shape[3])
    if inverse:
        return _back(x, size, 0, offsets, flips)
    return _pick(x, *_places(x.shape[0], size, 0, offsets, flips, x.device))


def perturbation(
    store: Tensor, index: Tensor, x: Tensor, offsets: Tensor | None = None, flips: Tensor | None = None,
    padding: int = 0, augment_first: bool = False,
) -> Tensor:  # fmt: skip
    """The stored perturbations as the moved images x see them."""
    kept, f = store[index.to(store.device)].to(x.dtype), factor_of(store, x, padding)
    size = (x.shape[2], x.shape[3])
    if augment_first and f > 1:
        low = (size[0] // f, size[1] // f)
        places = _places(len(x), low, padding // f, nearest_parts(offsets, f), flips, x.device)
        return F.interpolate(_pick(kept, *places), size, mode="bilinear", align_corners=False)
    if f > 1 and kept.numel():
        frame = (size[0] + 2 * padding, size[1] + 2 * padding)
        kept = F.interpolate(kept, frame, mode="bilinear", align_corners=False)
    return _pick(kept, *_places(len(x), size, padding, offsets, flips, x.device))


def gather(
    store: Tensor, index: Tensor, x: Tensor, eps: Any, norm: float = math.inf, clip: Any = (0.0, 1.0),
    offsets: Tensor | None = None, flips: Tensor | None = None, padding: int = 0, augment_first: bool = False,
) -> Tensor:  # fmt: skip
    """See :func:`fastrobust.ops.store_gather`."""
    return project(x + perturbation(store, index, x, offsets, flips, padding, augment_first), x, eps, norm, clip)


def scatter(
    store: Tensor, index: Tensor, adv: Tensor, x: Tensor, offsets: Tensor | None = None, flips: Tensor | None = None,
    padding: int = 0, augment_first: bool = False,
) -> None:  # fmt: skip
    """See :func:`fastrobust.ops.store_scatter`."""
    f, moved = factor_of(store, x, padding), adv - x
    shown = torch.ones_like(moved)
    frame = (x.shape[2] + 2 * padding, x.shape[3] + 2 * padding)
    if augment_first and f > 1:
        moved, shown = F.avg_pool2d(moved, f), F.avg_pool2d(shown, f)
        frame, padding, offsets, f = (frame[0] // f, frame[1] // f), padding // f, nearest_parts(offsets, f), 1
    moved, shown = (_back(t, frame, padding, offsets, flips) for t in (moved, shown))
    if f > 1 and moved.numel():
        moved, shown = F.avg_pool2d(moved, f), F.avg_pool2d(shown, f)
    numbers = index.tolist()
    for b, i in enumerate(numbers):
        if i not in numbers[b + 1 :]:  # of images with the same number the last one writes
            store[i] = torch.where(shown[b] > 0, (moved[b] / shown[b]).to(store.dtype), store[i])
