"""Perturbations of a data set in one tensor: read into a batch, moved as its images are, and written back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _checks as ck
from ..pgd import _box
from ..pgd._box import Box
from ..pgd.steps import Clip, project
from . import _kernels as op

INF = math.inf
_STORED = (torch.float32, torch.float16)


def _check_images(x: Any, name: str) -> Tensor:
    x = ck.check_state(x, name)
    if x.dim() != 4:
        raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (B, C, H, W)")
    return x


def _check_move(offsets: Any, flips: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(B, 2) int64 and (B,) bool, dense, on x's device."""
    if offsets is not None:
        offsets = ck.need_dense(offsets, "offsets")
        if offsets.dtype not in (torch.int64, torch.int32) or tuple(offsets.shape) != (x.shape[0], 2):
            raise ValueError(
                f"offsets: got {ck.describe(offsets)}, expected ({x.shape[0]}, 2) integers, pixels down and to the "
                "right"
            )
        offsets = offsets.to(x.device, torch.int64).contiguous()
    if flips is not None:
        flips = ck.need_dense(flips, "flips")
        if flips.dtype != torch.bool or tuple(flips.shape) != (x.shape[0],):
            raise ValueError(f"flips: got {ck.describe(flips)}, expected ({x.shape[0]},) bool, one per example")
        flips = flips.to(x.device).contiguous()
    return offsets, flips


def _check_store(
    store: Any, index: Any, x: Any, padding: Any, augment_first: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    x, store = _check_images(x, "x"), ck.need_dense(store, "store")
    kinds = _STORED if x.dtype == torch.float32 else (*_STORED, torch.float64)
    if store.dtype not in kinds:
        raise TypeError(f"store: got {ck.describe(store)}, expected {' or '.join(map(str, kinds))}")
    padding = ck.check_integer(padding, "padding")
    if padding < 0:
        raise ValueError(f"padding: got {padding}, expected at least 0")
    if store.device != x.device:
        raise ValueError(f"store: got device {store.device}, expected x's device {x.device}")
    if store.dim() != 4 or store.shape[1] != x.shape[1]:
        raise ValueError(f"store: got shape {tuple(store.shape)}, expected (N, {x.shape[1]}, height, width)")
    frame = (x.shape[2] + 2 * padding, x.shape[3] + 2 * padding)
    factor = frame[0] // store.shape[2] if store.shape[2] else 1
    if factor < 1 or (store.shape[2] * factor, store.shape[3] * factor) != frame:
        raise ValueError(
            f"store: got rows of {store.shape[2]}x{store.shape[3]}, expected {frame[0]}x{frame[1]} (images of "
            f"{x.shape[2]}x{x.shape[3]} with padding {padding}) over one whole number"
        )
    if augment_first and any(n % factor for n in (padding, *x.shape[2:])):
        raise ValueError(
            f"augment_first: got a store down-sampled by {factor}, expected a divisor of the padding {padding} and of "
            f"the images' {x.shape[2]}x{x.shape[3]}"
        )
    index = ck.need_dense(index, "index")
    if index.dtype not in (torch.int64, torch.int32) or tuple(index.shape) != (x.shape[0],):
        raise ValueError(f"index: got {ck.describe(index)}, expected ({x.shape[0]},) integers, the examples' numbers")
    if index.device.type == "cpu" and ck.has_values(index) and index.numel():
        least, most = (int(v) for v in torch.aminmax(index))
        if least < 0 or most >= store.shape[0]:
            raise ValueError(f"index: got numbers from {least} to {most}, expected 0 to {store.shape[0] - 1}")
    return store, index.to(x.device, torch.int64).contiguous(), x, padding


def shift_flip(x: Tensor, offsets: Tensor | None, flips: Tensor | None = None, inverse: bool = False) -> Tensor:
    r"""Mirror images and shift them: cropping with padding and flipping of a batch, in one pass.

    Image b is mirrored left to right where ``flips[b]``, then moved by ``offsets[b]`` = (down, right) pixels, zeros
    coming
    in: ``out[i, j] = x[i - down, j - right]``. A crop of the image padded by p at (top, left) is the offset
    ``(p - top, p - left)``. ``inverse`` takes the same move back; what had left the image comes back as zero.

    Args:
        x: (B, C, H, W), floating point (float32 by its own kernel, others in plain torch), any strides.
        offsets: (B, 2) integers of any size, or None.
        flips: (B,) bool, or None.

    Returns:
        The moved images. Differentiable in x (the gradient takes the way back).
    """
    x = ck.need_dense(x, "x")
    if not x.dtype.is_floating_point or x.dim() != 4:
        raise ValueError(f"x: got {ck.describe(x)}, expected floating-point images (B, C, H, W)")
    offsets, flips = _check_move(offsets, flips, x)
    moved: Tensor = op.shift_flip(x, offsets, flips, bool(inverse))
    return moved


def store_gather(
    store: Tensor,
    index: Tensor,
    x: Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: Clip = (0.0, 1.0),
    *,
    offsets: Tensor | None = None,
    flips: Tensor | None = None,
    padding: int = 0,
    augment_first: bool = False,
) -> Tensor:
    r"""Where a batch starts: its stored perturbations, moved as its images were, added to them and projected.

    .. math:: \Pi_{[lo, hi]} \Pi_{\|z - x\|_p \le eps} (x + U(A(store[index])))

    with A the move of :func:`shift_flip` and U the bilinear up-sampling where the store has fewer pixels; for norm inf
    (one number, or one per example, as radius, and a box of numbers) in one pass. The ball and the box hold exactly, as
    for :func:`project`, whatever rounding the store's type brought.

    Args:
        store: (N, C, H', W') float32 or float16, any strides. Its rows are images padded by ``padding`` on every side,
            ``H' = (H + 2 padding) / f`` with a whole number f, in both directions: what a crop leaves out is kept
            there.
        index: (B,) integers, rows of the store. CPU values are checked; a CUDA tensor's are not read, and a number out
            of range stands for a zero perturbation.
        x: (B, C, H, W) float32, the images after augmentation (float64 runs the plain-torch reference).
        eps, norm, clip: as in :func:`pgd_step`.
        offsets, flips: the move that made x, as in :func:`shift_flip`.
        augment_first: for f > 1, move at low resolution by ``offsets / f`` to the nearest whole number (halves towards
            zero), then up-sample (thesis, algorithm 5.2 as printed); else up-sample, then move exactly.

    Returns:
        (B, C, H, W) start points. Not differentiable.
    """
    p = ck.parse_norm(norm)
    store, index, x, padding = _check_store(store, index, x, padding, augment_first)
    box = _box.parse_box(clip, x)
    eps_p = ck.check_parameter(eps, "eps", x, p)
    offsets, flips = _check_move(offsets, flips, x)
    move = (padding, bool(augment_first))
    simple = p == INF and not isinstance(box, Box) and (eps_p.tensor is None or eps_p.tensor.dim() == 1)
    if simple:
        start: Tensor = op.gather(store, index, x, offsets, flips, *eps_p, *box, *move)
        return start
    start = op.gather(store, index, x, offsets, flips, None, INF, -INF, INF, *move)
    return project(start, x, eps, norm, clip)


def store_scatter(
    store: Tensor,
    index: Tensor,
    adv: Tensor,
    x: Tensor,
    *,
    offsets: Tensor | None = None,
    flips: Tensor | None = None,
    padding: int = 0,
    augment_first: bool = False,
) -> Tensor:
    r"""Write the perturbations ``adv - x`` of a batch into the store: the way back of :func:`store_gather`.

    Each pixel of the store that the moved image shows becomes the mean of the perturbation over the image pixels that
    it stands for (itself, at full resolution); one that the image does not show keeps its value. float16 rounds to
    nearest. Where ``index`` names a row twice, the last example alone writes it.

    Args:
        store: as in :func:`store_gather`; written in place.
        adv, x: (B, C, H, W), the adversarial examples and the images after augmentation.

    Returns:
        ``store``.

    Raises:
        ValueError, TypeError: naming the argument, before anything is written; also for a row number out of range (of a
        CUDA tensor, whose values are not read, such a row is left out).
    """
    store, index, x, padding = _check_store(store, index, x, padding, augment_first)
    adv = ck.check_like(adv, "adv", x, "x")
    offsets, flips = _check_move(offsets, flips, x)
    if torch.is_grad_enabled() and store.requires_grad:
        raise ValueError("store: got a tensor that requires grad, expected one without: writing is not recorded")
    op.scatter(index, adv.detach(), x.detach(), offsets, flips, padding, bool(augment_first), store)
    return store
