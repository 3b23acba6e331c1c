"""Interval propagation, relaxations and the adjoint of convolutions; the formulas are those of
:mod:`fastrobust.reference.bounds`.

The ops on rows of linear bounds are in :mod:`fastrobust.ops.linear_bounds` and named here too.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _C
from ...reference import bounds as reference
from ...reference.bounds import Clip, center_radius, dual_exponent, eps_like
from .. import _checks as ck
from .._library import full_precision, on_cpu, require_cuda_build, stream_of
from . import _autograd as gradients
from ._conv import adjoint, interval_convolution, pair
from ._lines import interval_activation
from ._product import product_with_transpose
from ._rows import address, dense, native
from .linear import (
    INF,
    check_eps,
    check_norm,
    direct,
    register,
)

_TO_CENTER, _FROM_CENTER, _RELU_CENTER, _BOX, _BOX_ENDS = range(5)
CENTER, ENDS, RELU = range(3)  # what center_linear returns
_WIDE = _C.cpu_variant() == "v4"


# ---- intervals ----


def _step(
    a: Tensor, b: Tensor | None, step: int, eps: float = 0.0, lo: float = -INF, hi: float = INF
) -> tuple[Tensor, Tensor]:
    """One fused elementwise pass; a and b dense float32 in one memory format. Not recorded."""
    require_cuda_build(a.device)
    device, stream = stream_of(a.device)
    out_a, out_b = torch.empty_like(a), torch.empty_like(a)
    _C.bounds_interval_step(
        device, stream, a.data_ptr(), address(b), out_a.data_ptr(), out_b.data_ptr(), a.numel(), step, eps, lo, hi
    )
    return out_a, out_b


def _pair_dense(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    fmt = ck.dense_format(a) or torch.contiguous_format
    return ck.lay_out(a, fmt), ck.lay_out(b, fmt)


def to_center(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and radius."""
    if native(lower) and direct(lower, upper):
        require_cuda_build(lower.device)
        return _step(*_pair_dense(lower, upper), _TO_CENTER)
    return center_radius(lower, upper)


def from_center(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    if native(center) and direct(center, radius):
        return _step(*_pair_dense(center, radius), _FROM_CENTER)
    return center - radius, center + radius


def relu_center(center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Centre and radius of the ReLU of an interval given by centre and radius."""
    if native(center) and direct(center, radius):
        return _step(*_pair_dense(center, radius), _RELU_CENTER)
    return center_radius((center - radius).relu(), (center + radius).relu())


def box_center(x: Tensor, eps: float | Tensor, clip: Clip) -> tuple[Tensor, Tensor]:
    """Centre and radius of [x - eps, x + eps] cut at ``clip``."""
    per_element = clip is not None and isinstance(clip[0], Tensor)
    if native(x) and not per_element and direct(x, eps if isinstance(eps, Tensor) else None):
        require_cuda_build(x.device)
        fmt = ck.dense_format(x) or torch.contiguous_format
        x = ck.lay_out(x, fmt)
        e = ck.lay_out(eps_like(eps, x).expand_as(x), fmt) if isinstance(eps, Tensor) else None
        return _step(x, e, _BOX, 0.0 if e is not None else float(eps), *(clip or (-INF, INF)))
    return center_radius(*reference.input_box(x, eps, clip))


def _interval_definition(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, finish: int
) -> tuple[Tensor, Tensor]:
    c, r = F.linear(center, weight, bias), F.linear(radius, weight.abs())
    if finish == CENTER:
        return c, r.expand_as(c)
    low, up = c - r, c + r
    return (low, up) if finish == ENDS else center_radius(low.relu(), up.relu())


def _interval_by_products(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, finish: int
) -> tuple[Tensor, Tensor]:
    c = product_with_transpose(center, weight, bias)
    if radius.shape[0] == 1 and native(radius) and radius.is_cpu:  # |W| r of one row: W is read once, |W| not stored
        r = _interval_kernel(radius, radius, weight, None, CENTER)[1].expand_as(c)
    else:
        r = product_with_transpose(radius, weight.abs()).expand_as(c)
    if finish == CENTER:
        return c, r
    return from_center(c, r) if finish == ENDS else relu_center(c, r)


def _interval_kernel(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, finish: int
) -> tuple[Tensor, Tensor]:
    if not native(center):
        return _interval_definition(center, radius, weight, bias, finish)
    require_cuda_build(center.device)
    device, stream = stream_of(center.device)
    center, radius, weight = dense(center), dense(radius), dense(weight)
    bias = None if bias is None else dense(bias)
    batch, n, m = center.shape[0], center.shape[1], weight.shape[0]
    faster = _WIDE and radius.shape[0] == batch  # both products in one read of W
    if batch > 16 and (device >= 0 or (n >= 256 and not faster)):  # large dense products belong to the vendor's engine
        return _interval_by_products(center, radius, weight, bias, finish)
    out_a, out_b = center.new_empty(batch, m), center.new_empty(batch, m)
    _C.bounds_interval(
        device,
        stream,
        center.data_ptr(),
        radius.data_ptr(),
        weight.data_ptr(),
        address(bias),
        out_a.data_ptr(),
        out_b.data_ptr(),
        batch,
        n,
        m,
        finish,
        radius.shape[0] != batch,
    )
    return out_a, out_b


_interval = register(
    "bounds_interval_linear",
    "(Tensor center, Tensor radius, Tensor weight, Tensor? bias, int finish) -> (Tensor, Tensor)",
    _interval_kernel,
    lambda c, r, w, bias, finish: (c.new_empty(c.shape[0], w.shape[0]), c.new_empty(c.shape[0], w.shape[0])),
    gradients.interval,
)


def center_linear(
    center: Tensor, radius: Tensor, weight: Tensor, bias: Tensor | None, finish: int = ENDS
) -> tuple[Tensor, Tensor]:
    """The interval of a linear layer from centre (B, n) and radius (B, n), or (1, n) for all; finish CENTER: centre and
    radius,
    ENDS: its ends, RELU: centre and radius of the ReLU."""
    f = _interval_kernel if direct(center, radius, weight, bias) else _interval
    return f(center, radius, weight, bias, finish)


def _check_interval(lower: Tensor, upper: Tensor, weight: Tensor, bias: Tensor | None, features: int, dim: int) -> None:
    lower = ck.check_state(lower, "lower")
    ck.check_like(upper, "upper", lower, "lower")
    _check_weight(lower, weight, bias, features, dim)


def _check_weight(x: Tensor, weight: Tensor, bias: Tensor | None, features: int, dim: int) -> None:
    weight = ck.need_tensor(weight, "weight")
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"weight: got {ck.describe(weight)}, expected {x.dtype} on {x.device}")
    if weight.dim() != dim or weight.shape[1] != features:
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)}, expected {dim} dimensions and {features} in the second"
        )
    if bias is not None and tuple(ck.need_tensor(bias, "bias").shape) != (weight.shape[0],):
        raise ValueError(f"bias: got shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")


def _finish(low: Tensor, up: Tensor, activation: str | None, params: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    return (low, up) if activation is None else interval_activation(low, up, activation, params)


def interval_linear(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    params: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """W c + b -+ |W| r with c, r the centre and radius of [lower, upper], and the range of ``activation`` on it
    (thesis, eq. 3.8).

    lower, upper: (..., n); weight: (m, n); bias: (m,); two tensors (..., m). W is read once and |W| is never stored.
    """
    _check_interval(lower, upper, weight, bias, lower.shape[-1] if isinstance(lower, Tensor) and lower.dim() else 0, 2)
    lead = lower.shape[:-1]
    c, r = to_center(lower, upper)
    shape_in = (math.prod(lead), weight.shape[1])
    low, up = center_linear(c.reshape(shape_in), r.reshape(shape_in), weight, bias)
    shape = (*lead, weight.shape[0])
    return _finish(low.view(shape), up.view(shape), activation, params)


def interval_conv2d(
    lower: Tensor,
    upper: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
    params: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The same for a convolution with zero padding: (B, C, H, W) -> (B, O, H', W')."""
    if isinstance(lower, Tensor) and lower.dim() != 4:
        raise ValueError(f"lower: got shape {tuple(lower.shape)}, expected (B, C, H, W)")
    _check_interval(lower, upper, weight, bias, lower.shape[1] // groups, 4)
    return _finish(
        *center_conv2d(*to_center(lower, upper), weight, bias, stride, padding, dilation, groups, ENDS),
        activation,
        params,
    )


def _interval_conv_kernel(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    finish: int,
    dilation: Any,
    groups: int,
) -> tuple[Tensor, Tensor]:
    if on_cpu(center) and native(center):
        return interval_convolution(center, radius, weight, bias, stride, padding, finish, dilation, groups)
    conv = (stride, padding, dilation, groups)
    with full_precision(center):
        c, r = F.conv2d(center, weight, bias, *conv), F.conv2d(radius, weight.abs(), None, *conv)
    if finish == CENTER:
        return c, r.expand_as(c).contiguous()
    return from_center(c, r.expand_as(c)) if finish == ENDS else relu_center(c, r.expand_as(c))


def _interval_conv_fake(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    finish: int,
    dilation: Any,
    groups: int,
) -> tuple[Tensor, Tensor]:
    c = F.conv2d(center, weight, bias, stride, padding, dilation, groups)
    if center.device.type == "cpu" and native(center):
        c = c.contiguous(memory_format=torch.channels_last)
    return torch.empty_like(c), torch.empty_like(c)


_interval_conv = register(
    "bounds_interval_conv2d",
    "(Tensor center, Tensor radius, Tensor weight, Tensor? bias, int[] stride, int[] padding, int finish, int[] "
    "dilation, int groups) "
    "-> (Tensor, Tensor)",
    _interval_conv_kernel,
    _interval_conv_fake,
    gradients.interval_conv,
)


def center_conv2d(
    center: Tensor,
    radius: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    finish: int = CENTER,
) -> tuple[Tensor, Tensor]:
    """The same for a convolution: centre (B, C, H, W), radius of this shape or (1, C, H, W)."""
    if not isinstance(padding, str):
        f = _interval_conv_kernel if direct(center, radius, weight, bias) else _interval_conv
        shape = list(pair(stride)), list(pair(padding)), finish, list(pair(dilation)), groups
        return f(center, radius, weight, bias, *shape)
    with full_precision(center):
        c = F.conv2d(center, weight, bias, stride, padding, dilation, groups)
        r = F.conv2d(radius, weight.abs(), None, stride, padding, dilation, groups).expand_as(c)
    if finish == CENTER:
        return c, r
    return from_center(c, r) if finish == ENDS else relu_center(c, r)


def _tighter(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.maximum(a[0], b[0]), torch.minimum(a[1], b[1])


def _unit(e: Tensor) -> Tensor:
    """The largest radius, by which norms are multiplied before large weights can make them overflow; a constant."""
    top = e.detach().amax() if e.numel() else e.new_zeros(())
    return torch.where(top > 0, top, 1.0)


def interval_ball_linear(
    x: Tensor,
    eps: float | Tensor,
    norm: Any,
    clip: Clip,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    params: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Bounds of W x' + b over the l_p ball around x: W x + b -+ eps ||W||_q by rows (Algorithm 3.1, line 2), with
    ``clip`` the tighter of that and of the clipped box. x: (B, n) or (B, *shape) with n elements; eps: a number, (B,)
    or x's shape."""
    x = ck.check_state(x, "x")
    p = check_norm(norm)
    eps = check_eps(eps, x)
    _check_weight(x, weight, bias, math.prod(x.shape[1:]), 2)
    box = None
    if clip is not None or p == INF:
        c, r = box_center(x, eps, clip)
        box = center_linear(c.flatten(1), r.flatten(1), weight, bias)
    if p == INF:
        assert box is not None
        return _finish(*box, activation, params)
    scalar = not (isinstance(eps, Tensor) and eps.dim() == x.dim() and eps.dim() > 1)
    if scalar:  # one norm per row of W serves every example
        q, e = dual_exponent(p), eps_like(eps, x).reshape(-1, 1)
        unit = _unit(e)
        middle, reach = F.linear(x.flatten(1), weight, bias), e / unit * reference.row_norm(weight.abs(), q, unit)
        ball = middle - reach, middle + reach
    else:
        ball = reference.interval_ball_linear(x, eps, p, None, weight, bias)
    return _finish(*(ball if box is None else _tighter(box, ball)), activation, params)


def interval_ball_conv2d(
    x: Tensor,
    eps: float | Tensor,
    norm: Any,
    clip: Clip,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    activation: str | None = None,
    params: tuple[float, ...] = (),
) -> tuple[Tensor, Tensor]:
    """The same for a convolution of x: (B, C, H, W)."""
    x = ck.check_state(x, "x")
    if x.dim() != 4:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, C, H, W)")
    p, conv = check_norm(norm), (stride, padding, dilation, groups)
    eps = check_eps(eps, x)
    _check_weight(x, weight, bias, x.shape[1] // groups, 4)
    box = None
    if clip is not None or p == INF:
        c, r = box_center(x, eps, clip)
        if clip is None and not isinstance(eps, Tensor):  # the radius is the same for every example
            r = r[:1]
        box = center_conv2d(c, r, weight, bias, *conv, ENDS)
    if p != INF:
        scalar = not (isinstance(eps, Tensor) and eps.dim() > 1)
        if scalar and dual_exponent(p) != INF:
            e = eps_like(eps, x)
            unit = _unit(e)
            layer = lambda t, w: F.conv2d(t, w, None, *conv)  # noqa: E731
            size = reference.dual_norm(torch.ones_like(x[:1]) * unit, weight, dual_exponent(p), layer, conv)
            mid, reach = F.conv2d(x, weight, bias, *conv), e / unit * size
            ball = mid - reach, mid + reach
        else:
            ball = reference.interval_ball_conv2d(x, eps, p, None, weight, bias, *conv)
        box = ball if box is None else _tighter(box, ball)
    assert box is not None
    return _finish(*box, activation, params)


# ---- the adjoint of a convolution ----


_spread = register(
    "bounds_spread",
    "(Tensor a, Tensor weight, int[] stride, int[] padding, int[] size, int[] dilation, int groups) -> Tensor",
    adjoint,
    lambda a, weight, stride, padding, size, dilation, groups: a.new_empty(
        a.shape[0], weight.shape[1] * groups, *size
    ).contiguous(memory_format=torch.channels_last),
    gradients.spread,
)


def spread(
    a: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], size: tuple[int, int],
    dilation: tuple[int, int] = (1, 1), groups: int = 1,
) -> Tensor:  # fmt: skip
    """The adjoint of a convolution: a (N, O, h, w) to (N, C, *size), channels last; weight (O, C / groups, kh, kw)."""
    f = adjoint if direct(a, weight) else _spread
    return f(a, weight, list(stride), list(padding), list(size), list(dilation), groups)
