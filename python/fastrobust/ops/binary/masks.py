"""Top-k masks, and index lists of masked weights (thesis, section 5.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import _C
from ..._heap import keep_pages
from ...reference import binary as reference
from ...reference.binary import PackedWeight
from .._library import define, require_cuda_build, stream_of
from ._feature_maps import whole

# ---- top-k masks ----


def _topk_kernel(scores: Tensor, keep: int) -> Tensor:
    if scores.dtype == torch.float64:
        _require_finite(scores)
        return reference.topk_mask(scores, keep)
    require_cuda_build(scores.device)
    flat = scores.contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    device, stream = stream_of(scores.device)
    workspace = None
    if device >= 0:
        workspace = torch.zeros(_C.binary_topk_workspace(flat.numel()), dtype=torch.int32, device=scores.device)
    address = 0 if workspace is None else workspace.data_ptr()
    finite = _C.binary_topk(device, stream, flat.data_ptr(), mask.data_ptr(), flat.numel(), keep, address)
    if not finite:
        _require_finite(scores)
    return mask


def _require_finite(scores: Tensor) -> None:
    bad = int((~torch.isfinite(scores)).sum())
    if bad:
        raise ValueError(f"scores: expected finite values, got {bad} infinite or NaN of {scores.numel()}")


_topk_op = define(
    "topk_mask",
    "(Tensor scores, int keep) -> Tensor",
    _topk_kernel,
    lambda scores, keep: torch.empty(scores.shape, dtype=torch.bool, device=scores.device),
)


def topk_mask(scores: Tensor, keep: int) -> Tensor:
    """Mask of the ``keep`` largest scores as given (take ``abs()`` yourself for a mask by magnitude).

    Of equal scores the larger flat index is kept, so that exactly ``keep`` entries are True; off ties this is the rule
    of the authors' code. -0 equals 0. Radix selection, no sort.

    scores: any shape, float32 (float64 through the reference), finite. keep: 0 to the number of scores.
    Returns a bool tensor of the shape of scores. Not differentiable.
    Raises ValueError for a keep out of range and, on the CPU, for scores that are not finite; on CUDA, where looking
    would synchronise, infinities rank as usual and NaN above them.
    """
    _check_scores("scores", scores, keep)
    return _topk_op(scores, int(keep))


def topk_masks(scores: Sequence[Tensor], keeps: Sequence[int]) -> list[Tensor]:
    """`topk_mask` of several layers; everything is checked before the first mask is computed."""
    if len(scores) != len(keeps):
        raise ValueError(f"keeps: expected one count per layer, got {len(keeps)} for {len(scores)} layers")
    for i, (s, k) in enumerate(zip(scores, keeps, strict=True)):
        _check_scores(f"scores[{i}]", s, k)
    return [_topk_op(s, int(k)) for s, k in zip(scores, keeps, strict=True)]


def _check_scores(name: str, scores: Tensor, keep: int) -> None:
    if not isinstance(scores, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(scores).__name__}")
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 or float64, got {scores.dtype}")
    whole("keep", keep)
    if not 0 <= keep <= scores.numel():
        raise ValueError(f"keep: expected 0 to {scores.numel()}, the number of scores, got {keep}")


# ---- index lists ----


def pack(weight: Tensor) -> PackedWeight:
    """Index lists of the entries of a weight that are not zero, for `masked_conv2d` and `masked_linear`.

    weight: (K, C / groups, kh, kw) or (K, C), any real dtype, finite. Where all entries are in {-1, 0, +1} the lists
    are all there is; else they have `values`, which cost a multiplication a term: float32, or float64 of a float64
    weight (the kernels, which are float32, then take them rounded). The length of the lists is data, so on CUDA this
    waits for the device. Not differentiable. Raises ValueError for entries that are not finite in float32, and for
    other ranks.
    """
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight: expected a tensor, got {type(weight).__name__}")
    if weight.dim() not in (2, 4):
        raise ValueError(f"weight: expected (K, C / groups, kh, kw) or (K, C), got {tuple(weight.shape)}")
    if weight.is_complex():
        raise TypeError(f"weight: expected real entries, got {weight.dtype}")
    if weight.device.type != "cpu" and weight.numel():
        return _pack_there(weight.detach())
    keep_pages()  # the maps of the convolutions that follow come and go
    host = weight.detach().resolve_neg().to(dtype=torch.float32).contiguous()
    rows = host.shape[0]
    size = host.numel() // rows if rows else 0
    ptr = torch.zeros(2 * rows + 1, dtype=torch.int32)
    entries = _C.binary_pack(host.data_ptr(), rows, size, ptr.data_ptr(), 0, 0, True)
    if entries == _NOT_FINITE:
        raise _not_finite(host)
    if weight.dtype == torch.float64 and not bool((weight == host).all()):
        return reference.pack(weight.detach())
    index = torch.empty(int(ptr[-1]), dtype=torch.int32)
    values = torch.empty(index.numel(), dtype=torch.float32) if entries == _REAL else None
    address = 0 if values is None else values.data_ptr()
    _C.binary_pack(host.data_ptr(), rows, size, ptr.data_ptr(), index.data_ptr(), address, False)
    return PackedWeight(tuple(weight.shape), ptr, index, values)


# What the compiled module finds in a weight (`Entries` in csrc/binary/args.h).
_REAL, _NOT_FINITE = 1, 2


def _not_finite(weight: Tensor) -> ValueError:
    return ValueError(
        f"weight: expected entries that are finite in float32, got {weight[~weight.isfinite()][0].item()}"
    )


def _pack_there(weight: Tensor) -> PackedWeight:
    """On the weight's own device: no copy of it leaves, only the number of kept entries does."""
    weight = weight if weight.dtype == torch.float64 else weight.float()
    if not bool(weight.float().isfinite().all()):
        raise _not_finite(weight.float())
    return reference.pack(weight)
