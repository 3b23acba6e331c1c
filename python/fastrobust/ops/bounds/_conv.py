"""The compiled convolutions of the bounds family: float32 on the CPU, not recorded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _C
from .._library import full_precision, on_cpu
from ._rows import address, dense, native, spread_lanes, taps_of

MAX_TAPS = 64  # of one position, where ``weight_gradient`` is faster than the vendor's engine


def pair(v: Any) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else (v[0], v[-1])


def spans(weight_shape: Any, dilation: Any) -> tuple[int, int]:
    """Height and width of what one position of a convolution reads."""
    return (weight_shape[2] - 1) * dilation[0] + 1, (weight_shape[3] - 1) * dilation[1] + 1


def _sizes(x: Tensor, weight_shape: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...]:
    (batch, c, h, w), (o, _, kh, kw) = x.shape, weight_shape
    span_h, span_w = spans(weight_shape, dilation)
    out_h, out_w = (h + 2 * padding[0] - span_h) // stride[0] + 1, (w + 2 * padding[1] - span_w) // stride[1] + 1
    if out_h <= 0 or out_w <= 0:
        raise ValueError(f"weight: got a kernel of {span_h} x {span_w}, larger than the padded image of {h} x {w}")
    return (batch, h, w, c, out_h, out_w, o, kh, kw, *stride, *padding)


def interval_convolution(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    finish: int,
    dilation: Any = (1, 1),
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """w * c + b and |w| * r finished as ``center_conv2d`` says, channels last."""
    center, radius, weight = center.resolve_neg(), radius.resolve_neg(), dense(weight)
    bias = None if bias is None else dense(bias)
    sizes, apart = _sizes(center, weight.shape, stride, padding, dilation), (*dilation, groups)
    (cb, cc, cy, cx), (rb, rc, ry, rx) = center.stride(), radius.stride()
    strides = (cb, cy, cx, cc), (rb if radius.shape[0] == center.shape[0] else 0, ry, rx, rc)
    shape = (sizes[0], sizes[6], sizes[4], sizes[5])
    out_a = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    out_b = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    given = (center.data_ptr(), radius.data_ptr(), weight.data_ptr(), address(bias))
    numbers = _C.bounds_interval_conv(sizes, *strides, 0, 1, 0, 0, 0, 0, 0, finish, apart)
    work = torch.empty(numbers, dtype=torch.float32)
    _C.bounds_interval_conv(sizes, *strides, *given, work.data_ptr(), out_a.data_ptr(), out_b.data_ptr(), finish, apart)
    return out_a, out_b


def convolution(
    x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any = (1, 1), groups: int = 1
) -> Tensor:
    """w * x, channels last."""
    x, weight = x.resolve_neg(), dense(weight)
    sizes, apart = _sizes(x, weight.shape, stride, padding, dilation), (*dilation, groups)
    b, c, y, w = x.stride()
    strides = (b, y, w, c), (0, 0, 0, 0)
    shape = (sizes[0], sizes[6], sizes[4], sizes[5])
    out = torch.empty(shape, dtype=torch.float32, memory_format=torch.channels_last)
    numbers = _C.bounds_interval_conv(sizes, *strides, 0, 0, 0, 0, 0, 0, 0, 0, apart)
    work = torch.empty(numbers, dtype=torch.float32)
    _C.bounds_interval_conv(
        sizes, *strides, x.data_ptr(), 0, weight.data_ptr(), 0, work.data_ptr(), out.data_ptr(), 0, 0, apart
    )
    return out


def adjoint_definition(
    a: Tensor, weight: Tensor, stride: Any, padding: Any, size: Any, dilation: Any = (1, 1), groups: int = 1
) -> Tensor:
    """The adjoint of ``convolution`` in torch: a (N, O, h, w) to (N, C, *size), channels last."""
    extra = [
        n - ((m - 1) * s - 2 * p + k)
        for n, m, s, p, k in zip(size, a.shape[2:], stride, padding, spans(weight.shape, dilation), strict=True)
    ]
    with full_precision(a):
        out = F.conv_transpose2d(a, weight, None, stride, padding, extra, groups, dilation)
    return out.contiguous(memory_format=torch.channels_last)


def adjoint(
    a: Tensor, weight: Tensor, stride: Any, padding: Any, size: Any, dilation: Any = (1, 1), groups: int = 1
) -> Tensor:
    """``adjoint_definition`` by the kernel, where it serves."""
    o, c, kh, kw = weight.shape
    lanes = spread_lanes(weight, a.shape[3])
    apart = groups > 1 or max(dilation) > 1  # the vendor's engine takes 0.6 to 0.75 of our time there
    if not on_cpu(a) or not native(a) or not lanes or apart:
        return adjoint_definition(a, weight, stride, padding, size, dilation, groups)
    a = a.resolve_neg().contiguous(memory_format=torch.channels_last)
    w = taps_of(weight, lanes)
    out = torch.empty((a.shape[0], c, *size), dtype=a.dtype, memory_format=torch.channels_last)
    _C.bounds_spread(
        a.data_ptr(),
        w.data_ptr(),
        out.data_ptr(),
        (a.shape[0], *a.shape[2:], o, *size, c, kh, kw, *stride, *padding, lanes),
    )
    return out


def weight_gradient(
    x: Tensor, a: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any = (1, 1), groups: int = 1
) -> Tensor:
    """The gradient of the weight of ``convolution(x, weight)`` from that of its result."""
    x, a = (t.resolve_neg().contiguous(memory_format=torch.channels_last) for t in (x, a))
    out = torch.empty(weight.shape, dtype=a.dtype)
    sizes = _sizes(x, weight.shape, stride, padding, dilation)
    _C.bounds_conv_grad(sizes, x.data_ptr(), a.data_ptr(), out.data_ptr(), 0, 0, 0, 0, (*dilation, groups))
    return out


def interval_weight_gradient(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    g_c: Tensor,
    g_r: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any = (1, 1),
    groups: int = 1,
) -> Tensor:
    """The gradient of the weight of ``interval_convolution`` before anything finishes it: channels-last centre (B, C,
    H, W), radius (B or 1, C, H, W), dense weight, and the gradients of the results, those of one radius for all summed
    over the examples."""
    out = torch.empty(weight.shape, dtype=weight.dtype)
    _C.bounds_conv_grad(
        _sizes(center, weight.shape, stride, padding, dilation),
        center.data_ptr(),
        g_c.data_ptr(),
        out.data_ptr(),
        weight.data_ptr(),
        radius.data_ptr(),
        g_r.data_ptr(),
        radius.shape[0],
        (*dilation, groups),
    )
    return out
