"""Masks and masked convolutions in plain torch: the definition of every op of the family.

Everything here works on any floating dtype and any device and is written to be read. Where the kept
weights of a layer are -1 or +1 (thesis, section 5.1.3) it is two index lists, one of the inputs to
add and one of the inputs to subtract; others are one list of inputs with a value for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def kept_by_rate(size: int, rate: float) -> int:
    """Number of entries the authors' code keeps of `size` at a keep rate: n - int((1 - k) n).

    The product is taken in double precision and truncated, which is not round(k n): k = 0.8 of 100
    keeps 81.
    """
    return size - int((1 - rate) * size)


def topk_mask(scores: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` largest scores as given; of equal scores the larger flat index is kept.

    The rule is the authors' (sort ascending, drop the first n - keep) with a stable sort, so that it
    is defined on ties as well. Returns a bool tensor of the shape of `scores`.
    """
    flat = scores.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    mask = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    mask[order[flat.numel() - keep :]] = True
    return mask.reshape(scores.shape)


def encode_mask(mask: Sequence[bool]) -> bytes:
    """A mask as one number of an interval that shrinks with every entry; its size and count are known to the decoder.

    An entry is kept with the probability kept / left of those still to come, so the code of a mask of k of n entries
    takes log2(n choose k) bits. The interval [low, low + width) starts as [0, 2^64 - 1) and is given the factor 2^8
    whenever it is narrower than 2^56; kept is its lower part, (width div left) kept wide. The code is the least number
    of the interval with 56 zeros at its end, without trailing zero bytes.
    """
    left, kept = len(mask), sum(mask)
    low, width, size = 0, 2**64 - 1, 1
    for bit in mask:
        if kept in (0, left):
            break
        share = width // left * kept
        if bit:
            width, kept = share, kept - 1
        else:
            low, width = low + share, width - share
        left -= 1
        while width < 2**56:
            low, width, size = low << 8, width << 8, size + 1
    return (-(-low >> 56)).to_bytes(size, "big").rstrip(b"\0")


def decode_mask(data: bytes, size: int, kept: int) -> list[bool]:
    """The mask of `size` entries that `encode_mask` turned into `data`."""
    read = 8
    ahead, width = int.from_bytes(data[:read].ljust(read, b"\0"), "big"), 2**64 - 1
    mask = []
    for left in range(size, 0, -1):
        share = width // left * kept
        bit = kept == left or (kept > 0 and ahead < share)
        if 0 < kept < left:
            ahead, width = (ahead, share) if bit else (ahead - share, width - share)
        while width < 2**56:
            ahead, width, read = ahead << 8 | (data[read] if read < len(data) else 0), width << 8, read + 1
        mask.append(bit)
        kept -= bit
    return mask


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """The kept entries of a weight as index lists, two per output row.

    shape: (K, C / groups, kh, kw) of a convolution or (K, C) of a linear layer.
    ptr: int32 (2 K + 1). Row k adds index[ptr[2k] : ptr[2k + 1]] and subtracts
        index[ptr[2k + 1] : ptr[2k + 2]].
    index: int32 (kept,), flat position inside the row, c kh kw + ky kw + kx, ascending in each list.
    values: None where every kept entry is -1 or +1. Else (kept,), float32 or float64, finite: the
        entries in the order of index, with their signs; every row then has the first of its lists only.

    What is derived from the lists is kept with them: make new ones rather than write into these.
    """

    shape: tuple[int, ...]
    ptr: Tensor
    index: Tensor
    values: Tensor | None = None

    @property
    def kept(self) -> int:
        return self.index.numel()

    @property
    def density(self) -> float:
        size = 1
        for extent in self.shape:
            size *= extent
        return self.kept / size if size else 0.0

    def to(self, device: torch.device | str) -> PackedWeight:
        values = None if self.values is None else self.values.to(device)
        return PackedWeight(self.shape, self.ptr.to(device), self.index.to(device), values)

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight the lists stand for."""
        rows = self.shape[0]
        row_size = 1
        for extent in self.shape[1:]:
            row_size *= extent
        counts = (self.ptr[1:] - self.ptr[:-1]).long()
        lists = torch.repeat_interleave(torch.arange(2 * rows, device=counts.device), counts)
        dense = torch.zeros(rows * row_size, dtype=dtype, device=counts.device)
        entries = 1 - 2 * (lists % 2) if self.values is None else self.values
        dense[(lists // 2) * row_size + self.index.long()] = entries.to(dtype)
        return dense.reshape(self.shape)


def pack(weight: Tensor) -> PackedWeight:
    """Index lists of a finite weight, shape (K, C / groups, kh, kw) or (K, C); see `PackedWeight`."""
    rows = weight.reshape(weight.shape[0], -1)
    signs = bool(((rows == 0) | (rows.abs() == 1)).all())
    # For each row first its +1 columns and then its -1 columns, so one nonzero() of a (K, 2, size)
    # stack lists the entries in the final order.
    first, second = (rows > 0, rows < 0) if signs else (rows != 0, torch.zeros_like(rows, dtype=torch.bool))
    lists = torch.stack([first, second], dim=1)
    counts = lists.sum(dim=2).reshape(-1)
    ptr = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    index = lists.nonzero()[:, 2].to(torch.int32)
    return PackedWeight(tuple(weight.shape), ptr, index, None if signs else rows[first])


def epilogue(
    out: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """act((out + bias) scale + shift + residual), bias, scale and shift per channel (dimension 1)."""
    per_channel = (1, -1) + (1,) * (out.dim() - 2)
    if bias is not None:
        out = out + bias.reshape(per_channel)
    if scale is not None:
        out = out * scale.reshape(per_channel)
    if shift is not None:
        out = out + shift.reshape(per_channel)
    if residual is not None:
        out = out + residual
    return out.relu() if relu else out


def masked_conv2d(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Convolution of x (N, C, H, W) with a packed weight, then `epilogue`. Returns (N, K, H', W')."""
    weight = packed.to_dense(x.dtype)
    out = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return epilogue(out, bias, scale, shift, residual, relu)


def masked_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """x (N, C) times the transpose of a packed (K, C) weight, then `epilogue`. Returns (N, K)."""
    return epilogue(F.linear(x, packed.to_dense(x.dtype)), bias, scale, shift, residual, relu)


def straight_through(weight_grad: Tensor, weight: Tensor, scores: Tensor, absolute: bool) -> Tensor:
    """Gradient of the scores when mask() counts as the identity (thesis, section 5.1.1).

    weight_grad: dense gradient with respect to the masked weight; weight: the fixed signs times the
    layer's constant, before masking. With `absolute` the mask was taken of |scores|, whose derivative
    sign(scores) stays in the chain. Pruned entries get a gradient too.
    """
    grad = weight_grad * weight
    return grad * scores.sign() if absolute else grad
