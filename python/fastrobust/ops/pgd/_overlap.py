"""Whether tensors share memory, exactly, whatever their strides."""

from __future__ import annotations

import torch
from torch import Tensor


def _span(t: Tensor) -> tuple[int, int]:
    """Addresses from the first byte of t's elements to the one past the last."""
    start, size = t.data_ptr(), t.element_size()
    if t.is_contiguous():
        return start, start + t.numel() * size
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * size


def _bytes(t: Tensor) -> Tensor:
    """Offsets, from t's first byte, of all its elements' bytes."""
    offsets = torch.zeros((), dtype=torch.int64, device="cpu")
    for n, stride in zip(t.shape, t.stride(), strict=True):
        offsets = offsets[..., None] + torch.arange(n, dtype=torch.int64, device="cpu") * stride
    size = t.element_size()
    return (offsets[..., None] * size + torch.arange(size, dtype=torch.int64, device="cpu")).flatten()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Do a and b have a byte in common? Looked at element by element only where their spans cross."""
    if not a.numel() or not b.numel():
        return False
    (a0, a1), (b0, b1) = _span(a), _span(b)
    if a1 <= b0 or b1 <= a0:
        return False
    if a.is_contiguous() and b.is_contiguous():
        return True
    start = min(a0, b0)
    taken = torch.zeros(max(a1, b1) - start, dtype=torch.bool, device="cpu")
    taken[_bytes(a) + (a0 - start)] = True
    return bool(taken[_bytes(b) + (b0 - start)].any())


def same_places(a: Tensor, b: Tensor) -> bool:
    """Is every element of a where b's element of the same index is?"""
    if a.data_ptr() != b.data_ptr() or a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(n == 1 or s == t for n, s, t in zip(a.shape, a.stride(), b.stride(), strict=True))


def meets_itself(t: Tensor) -> bool:
    """Do two elements of t share a place, as in an expanded tensor?"""
    if t.is_contiguous() or not t.numel():
        return False
    reach = 1  # elements spanned by the dimensions so far, from the smallest stride on
    for stride, n in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n > 1):
        if stride < reach:
            return _bytes(t).unique().numel() < t.numel() * t.element_size()
        reach += stride * (n - 1)
    return False
