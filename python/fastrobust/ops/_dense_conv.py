"""torch's own convolution with a packed weight written out: what is called where it is the faster path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference.binary import PackedWeight
from . import _feature_maps as fm
from ._feature_maps import ConvGeometry


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last only when x is that and not also contiguous, as torch decides."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def dense_weight(packed: PackedWeight, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """The weight as torch's convolution takes it (K, C / groups, kh, kw), kept with the index lists."""
    dense = fm.kept_with(packed, "dense")
    if (dtype, layout) not in dense:
        weight = packed.to_dense(dtype).reshape(fm.conv_shape(packed.shape))
        dense[dtype, layout] = weight.contiguous(memory_format=layout)
    found: Tensor = dense[dtype, layout]
    return found


def dense_conv(x: Tensor, packed: PackedWeight, g: ConvGeometry) -> Tensor:
    weight = dense_weight(packed, x.dtype, memory_format(x))
    if len(packed.shape) == 2:
        return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]
    return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)


def dense_input_grad(grad: Tensor, packed: PackedWeight, size: tuple[int, ...], g: ConvGeometry) -> Tensor:
    weight = dense_weight(packed, grad.dtype, memory_format(grad))
    if len(packed.shape) == 2:
        return F.linear(grad.flatten(1), weight.flatten(1).t())[:, :, None, None]
    return input_grad(grad, weight, size, g)


def input_grad(grad: Tensor, weight: Tensor, size: tuple[int, ...], g: ConvGeometry) -> Tensor:
    """Gradient of conv2d with respect to its input of `size`, in the memory format of `grad`.

    `torch.nn.grad.conv2d_input` makes the input up as an expanded scalar, which takes torch several passes to lay out.
    """
    # Only its sizes and format are looked at.
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))
    found: Tensor = torch.ops.aten.convolution_backward(
        grad, x, weight, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, [True, False, False]
    )[0]
    return found
