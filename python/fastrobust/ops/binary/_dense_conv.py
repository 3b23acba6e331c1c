"""torch's own convolution with a packed weight written out: what is called where it is the faster path."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference.binary import PackedWeight
from . import _feature_maps as fm
from ._feature_maps import ConvGeometry

_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_NOTHING = contextlib.nullcontext()


def in_full_precision(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Where torch's own operators keep the type of x: the kernels are float32 under autocast, and so is what stands in
    for them."""
    return torch.autocast(x.device.type, enabled=False) if _any_autocast() else _NOTHING


def memory_format(x: Tensor) -> torch.memory_format:
    """channels_last only when x is that and not also contiguous, as torch decides."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def dense_weight(packed: PackedWeight, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    """The weight as torch's convolution takes it (K, C / groups, kh, kw), kept with the index lists."""
    dense = fm.kept_with(packed, "dense")
    if (dtype, layout) not in dense:
        # Autograd may save it, which it refuses for a tensor made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            weight = packed.to_dense(dtype).reshape(fm.conv_shape(packed.shape))
            dense[dtype, layout] = weight.contiguous(memory_format=layout)
    found: Tensor = dense[dtype, layout]
    return found


def dense_conv(x: Tensor, packed: PackedWeight, g: ConvGeometry) -> Tensor:
    weight = dense_weight(packed, x.dtype, memory_format(x))
    with in_full_precision(x):
        if len(packed.shape) == 2:
            return F.linear(x.flatten(1), weight.flatten(1))[:, :, None, None]
        return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)


class Prepacked:
    """A weight in the order that oneDNN wants for one size of input, which torch otherwise makes anew in every call.

    For channels_last float32 on the CPU, where nothing is recorded. The operators are those that torch's compiler
    calls; `Prepacked.of` returns None where they are not to be had.
    """

    def __init__(self, weight: Tensor, size: tuple[int, ...], g: ConvGeometry) -> None:
        self.geometry = [list(v) for v in (g.padding, g.stride, g.dilation)]
        self.groups = g.groups
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, g.groups, list(size))

    @staticmethod
    def of(packed: PackedWeight, size: tuple[int, ...], g: ConvGeometry) -> Prepacked | None:
        weight = dense_weight(packed, torch.float32, torch.contiguous_format)
        if not torch.backends.mkldnn.is_available() or weight.device.type != "cpu" or not weight.numel():
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                made = Prepacked(weight, size, g)
                x = torch.zeros(size, dtype=torch.float32, device="cpu").contiguous(memory_format=torch.channels_last)
                fits = memory_format(x) == torch.channels_last == memory_format(made(x))
        except (AttributeError, RuntimeError):
            return None
        return made if fits else None

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = _pointwise(x, self.weight, None, *self.geometry, self.groups, "none", [], "")
        return found


_pointwise: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)


def dense_input_grad(grad: Tensor, packed: PackedWeight, size: tuple[int, ...], g: ConvGeometry) -> Tensor:
    weight = dense_weight(packed, grad.dtype, memory_format(grad))
    if len(packed.shape) == 2:
        with in_full_precision(grad):
            return F.linear(grad.flatten(1), weight.flatten(1).t())[:, :, None, None]
    return input_grad(grad, weight, size, g)


def input_grad(grad: Tensor, weight: Tensor, size: tuple[int, ...], g: ConvGeometry) -> Tensor:
    """Gradient of conv2d with respect to its input of `size`, in the memory format of `grad`.

    `torch.nn.grad.conv2d_input` makes the input up as an expanded scalar, which takes torch several passes to lay out.
    """
    # Only its sizes and format are looked at.
    x = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))
    with in_full_precision(grad):
        found: Tensor = torch.ops.aten.convolution_backward(
            grad, x, weight, None, g.stride, g.padding, g.dilation, False, [0, 0], g.groups, [True, False, False]
        )[0]
    return found
