"""Masked convolutions straight from one plain tensor to another: plans of the kernel in csrc/binary/direct_cpu.cpp.

Where the outputs of a convolution are as wide as the phases of its inputs, output p of a map reads input p + shift,
whatever the row, unless that lies beside the map: a mask per tap and sixteen outputs says where. The lists and the
order of their sums are those of the fast layout (`_feature_maps`), and so are the results, bit for bit. For the CPU,
contiguous NCHW and float32.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from ...reference.binary import PackedWeight
from . import _feature_maps as fm
from ._feature_maps import VECTOR, ConvGeometry

# What the kernel has room for: phases in a word of 64 bits, taps in sixteen.
_MOST_PHASES, _MOST_TAPS = 64, 1 << 15


def fits(height: int, width: int, shape: tuple[int, int, int, int], g: ConvGeometry, transposed: bool) -> bool:
    """Whether a convolution of maps of this size can be read so; its input gradient only without a stride."""
    if math.prod(g.stride) > _MOST_PHASES or shape[2] * shape[3] > _MOST_TAPS or transposed and g.stride != (1, 1):
        return False
    return g.out_size(shape, height, width)[1] == -(-width // g.stride[1])


@dataclasses.dataclass(frozen=True, eq=False)
class DirectPlan:
    """Lists into plain maps, the tap of every entry, and by tap which of sixteen outputs read a pixel."""

    lists: fm.Plan
    taps: Tensor  # int16
    masks: Tensor  # int16 (taps, vectors), lane i of sixteen as bit i
    rest: tuple[int, ...]  # what the kernel is told of the sizes, from the channels on

    def bind(self, batch: int) -> tuple[int, ...]:
        """The arguments of a call on `batch` images."""
        lists = self.lists
        return (
            lists.ptr.data_ptr(), lists.offsets.data_ptr(), self.taps.data_ptr(), self.masks.data_ptr(), lists.rows,
            lists.segments, lists.offsets.numel(), self.masks.shape[0], batch, math.prod(self.rest[:3]),
            *self.rest, fm.address(lists.values),
        )  # fmt: skip


def plan(packed: PackedWeight, g: ConvGeometry, height: int, width: int, transposed: bool) -> DirectPlan:
    """The plan for maps of (height, width), the convolution's input, built once."""
    plans = fm.kept_with(packed, "plain plans")
    key = (g, transposed, height, width, len(packed.shape))
    found: DirectPlan | None = plans.get(key)
    if found is None:
        found = plans[key] = _build(packed, g, height, width, transposed)
    return found


def _build(packed: PackedWeight, g: ConvGeometry, height: int, width: int, transposed: bool) -> DirectPlan:
    shape = fm.conv_shape(packed.shape)
    out_size = g.out_size(shape, height, width)
    read, written = (out_size, (height, width)) if transposed else ((height, width), out_size)
    phase = tuple(-(-size // s) for size, s in zip(read, g.stride, strict=True))
    taps = torch.empty(packed.kept, dtype=torch.int16)
    lists = fm.build_lists(packed, g, transposed, 1, math.prod(phase), phase[1], taps)
    reads = [
        _reads(dim, kernel, read[dim], written[dim], g, transposed) for dim, kernel in enumerate((shape[2], shape[3]))
    ]
    inside = (reads[0][:, None, :, None] & reads[1][None, :, None, :]).reshape(shape[2] * shape[3], -1)
    inside = torch.nn.functional.pad(inside, (0, -inside.shape[1] % VECTOR)).reshape(inside.shape[0], -1, VECTOR)
    bits = (inside.int() << torch.arange(VECTOR, dtype=torch.int32)).sum(2)
    masks = torch.where(bits < 1 << 15, bits, bits - (1 << 16)).to(torch.int16)
    channels = shape[0] if transposed else shape[1] * g.groups
    phases = 0
    for ky in range(shape[2]):
        for kx in range(shape[3]):
            at = (g.dilation[0] * ky - g.padding[0]) % g.stride[0], (g.dilation[1] * kx - g.padding[1]) % g.stride[1]
            phases |= 1 << at[0] * g.stride[1] + at[1]
    # The binding takes signed words.
    phases -= (phases >> 63) << 64
    return DirectPlan(lists, taps, masks, (channels, *read, *g.stride, phases, *written))


def _reads(dim: int, kernel: int, size: int, out: int, g: ConvGeometry, transposed: bool) -> Tensor:
    """(kernel, out): whether an output reads a pixel of an input of `size` through a tap, in one dimension."""
    taps = torch.arange(kernel)[:, None] * g.dilation[dim] - g.padding[dim]
    at = torch.arange(out)[None, :] - taps if transposed else torch.arange(out)[None, :] * g.stride[dim] + taps
    return (at >= 0) & (at < size)
