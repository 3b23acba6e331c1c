"""Masks as bytes, as near their entropy as whole bytes allow (reference/binary.py defines the code)."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C


def encode_mask(mask: Tensor) -> bytes:
    """The bytes of a bool mask. Its size and the number of its kept entries are not in them."""
    flat = mask.detach().to("cpu", torch.bool).contiguous().reshape(-1)
    n = flat.numel()
    room = torch.empty(n // 8 + 32, dtype=torch.uint8)
    size = _C.binary_encode(flat.data_ptr(), n, int(flat.sum()), room.data_ptr())
    return room[:size].numpy().tobytes()


def decode_mask(data: bytes, size: int, kept: int) -> Tensor:
    """The flat mask of `size` entries, `kept` of them True. Other bytes than an encoder's give some such mask."""
    if not 0 <= kept <= size:
        raise ValueError(f"kept: expected 0 to {size}, the size of the mask, got {kept}")
    mask = torch.empty(size, dtype=torch.bool)
    source = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    _C.binary_decode(source.data_ptr(), len(data), mask.data_ptr(), size, kept)
    return mask
