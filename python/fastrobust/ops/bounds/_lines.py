"""Lines around activations: the kernels, their registration and gradients. Definition:
:mod:`fastrobust.reference.relaxations`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...reference import relaxations
from .. import _checks as ck
from .._library import define, require_cuda_build, stream_of
from . import _autograd as gradients
from ._rows import address, dense, native
from .linear import direct, register

# csrc/bounds/args.h; leaky ReLU is a ReLU with a slope below 0, ReLU6 a hardtanh
_NUMBERS = ("relu", "hardtanh", "sigmoid", "tanh", "arctan", "softplus", "elu", "silu", "gelu", "gelu_tanh")


def told(activation: str, params: tuple[float, ...]) -> tuple[int, float, float]:
    """An activation as the kernels are told of it: its number and two parameters."""
    params = relaxations.parameters_of(activation, params)
    if activation == "relu6":
        activation, params = "hardtanh", (0.0, 6.0)
    p0, p1 = (*params, 0.0, 0.0)[:2]
    return _NUMBERS.index("relu" if activation == "leaky_relu" else activation), p0, p1


def _empty(like: Tensor, sides: int) -> Tensor:
    """(sides, *shape), each side in the order of ``like``."""
    form = ck.dense_format(like)
    if form is None or form == torch.contiguous_format:
        return like.new_empty(sides, *like.shape)
    last = (like.shape[0], *like.shape[2:], like.shape[1])
    return like.new_empty(sides, *last).movedim(-1, 2)


def _ordered(t: Tensor, form: torch.memory_format) -> Tensor:
    """(sides, *shape) with every side in this order in memory."""
    return dense(t if form == torch.contiguous_format else t.movedim(2, -1))


def _kernel(
    lower: Tensor, upper: Tensor, activation: int, p0: float, p1: float, adaptive: bool, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    require_cuda_build(lower.device)
    device, stream = stream_of(lower.device)
    form = ck.dense_format(lower) or torch.contiguous_format
    lower, upper = ck.lay_out(lower, form), ck.lay_out(upper, form)
    slopes, intercepts = _empty(lower, 2 if adaptive else 1), _empty(lower, 2)
    _C.bounds_lines(
        device,
        stream,
        lower.dtype == torch.float64,
        lower.data_ptr(),
        upper.data_ptr(),
        slopes.data_ptr(),
        intercepts.data_ptr(),
        lower.numel(),
        activation,
        p0,
        p1,
        adaptive,
        address(bias),
        1 if bias is None else bias.numel(),
    )
    return slopes, intercepts


def _grad_kernel(
    lower: Tensor,
    upper: Tensor,
    to_slopes: Tensor,
    to_intercepts: Tensor,
    activation: int,
    p0: float,
    p1: float,
    adaptive: bool,
) -> tuple[Tensor, Tensor]:
    require_cuda_build(lower.device)
    device, stream = stream_of(lower.device)
    form = ck.dense_format(lower) or torch.contiguous_format
    lower, upper = ck.lay_out(lower, form), ck.lay_out(upper, form)
    to_slopes, to_intercepts = _ordered(to_slopes, form), _ordered(to_intercepts, form)
    to_lower, to_upper = torch.empty_like(lower), torch.empty_like(upper)
    tensors = [t.data_ptr() for t in (lower, upper, to_slopes, to_intercepts, to_lower, to_upper)]
    _C.bounds_lines_grad(
        device, stream, lower.dtype == torch.float64, tensors, lower.numel(), activation, p0, p1, adaptive
    )
    return to_lower, to_upper


def _grad_fake(lower: Tensor, upper: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    form = ck.dense_format(lower) or torch.contiguous_format
    return torch.empty_like(lower, memory_format=form), torch.empty_like(lower, memory_format=form)


_lines_grad = define(
    "bounds_lines_grad",
    "(Tensor lower, Tensor upper, Tensor to_slopes, Tensor to_intercepts, int activation, float p0, float p1, bool "
    "adaptive)"
    " -> (Tensor, Tensor)",
    _grad_kernel,
    _grad_fake,
)


def _gradient(args: list[Any], need: Any, to_slopes: Tensor, to_intercepts: Tensor) -> gradients.Grads:
    lower, upper, *plain = args
    return *_lines_grad(lower, upper, to_slopes, to_intercepts, *plain), None, None, None, None


_lines = register(
    "bounds_lines",
    "(Tensor lower, Tensor upper, int activation, float p0, float p1, bool adaptive) -> (Tensor, Tensor)",
    _kernel,
    lambda l, u, activation, p0, p1, adaptive: (_empty(l, 2 if adaptive else 1), _empty(l, 2)),
    _gradient,
)


def relax(
    lower: Tensor, upper: Tensor, activation: str, kind: str = "parallel", params: tuple[float, ...] = ()
) -> relaxations.Lines:
    """Lines around an activation s on [lower, upper], elementwise: slopes (1 or 2, *shape), intercepts (2, *shape),
    lower first,

        slopes[0] x + intercepts[0] <= s(x) <= slopes[-1] x + intercepts[1]        for lower <= x <= upper

    lower, upper: float32 or float64 of one shape, lower <= upper. activation: one of
    ``reference.relaxations.ACTIVATIONS``,
    params: its parameters (torch's defaults where empty). kind: "parallel" (one slope: Liu 2022, equations 3.3 to 3.5
    and table 3.1) or "crown" (adaptive: Zhang et al. 2018; the lines that leave the least area, see
    ``reference.relaxations``). Intercepts of smooth activations are padded by the rounding errors of the value and of
    the line, so that the lines hold for s in real arithmetic. Ends that are not finite give horizontal lines at the
    range of s, NaN gives NaN. Differentiable once.

    ValueError or TypeError: shapes, dtypes or devices differ; an unknown activation or kind; parameters out of range.
    """
    lower = ck.check_state(lower, "lower")
    ck.check_like(upper, "upper", lower, "lower")
    plain = told(activation, params)
    if kind not in ("parallel", "crown"):
        raise ValueError(f"kind: got {kind!r}, expected 'parallel' or 'crown'")
    f = _kernel if direct(lower, upper) else _lines
    return relaxations.Lines(*f(lower, upper, *plain, kind == "crown"))


def _support_kernel(
    slopes: Tensor, lower: Tensor, upper: Tensor, activation: int, p0: float, p1: float, above: bool
) -> tuple[Tensor, Tensor]:
    require_cuda_build(lower.device)
    device, stream = stream_of(lower.device)
    slopes, lower, upper = dense(slopes), dense(lower), dense(upper)
    out, points = torch.empty_like(lower), torch.empty_like(lower)
    tensors = [t.data_ptr() for t in (slopes, lower, upper, out, points)]
    _C.bounds_support(device, stream, lower.dtype == torch.float64, tensors, lower.numel(), activation, p0, p1, above)
    return out, points


def _support_gradient(args: list[Any], need: Any, to_intercepts: Tensor, to_points: Tensor) -> gradients.Grads:
    """The intercept is s(t) - d t, least or greatest in t: only an end that it touches moves it."""
    slopes, lower, upper, activation, p0, p1, above = args
    points = _support(*args)[1]
    name = _NUMBERS[activation]
    told_of = {
        "relu": ("leaky_relu", (p0,)),
        "hardtanh": (name, (p0, p1)),
        "softplus": (name, (p0, p1)),
        "elu": (name, (p0,)),
    }
    name, params = told_of.get(name, (name, ()))
    first = points == lower
    by_end = [
        torch.where(touched, (relaxations.derivative(end, name, params) - slopes) * to_intercepts, 0.0)
        for end, touched in ((lower, first), (upper, (points == upper) & ~first))
    ]
    return -points * to_intercepts, by_end[0], by_end[1], None, None, None, None


_support = register(
    "bounds_support",
    "(Tensor slopes, Tensor lower, Tensor upper, int activation, float p0, float p1, bool above) -> (Tensor, Tensor)",
    _support_kernel,
    lambda d, l, *_: (l.new_empty(l.shape), l.new_empty(l.shape)),
    _support_gradient,
)


def support(
    slopes: Tensor, lower: Tensor, upper: Tensor, activation: str, params: tuple[float, ...] = (), above: bool = False
) -> tuple[Tensor, Tensor]:
    """The tightest intercept of a line of any slope d below (``above``) an activation s on [lower, upper], and where it
    touches:

        intercept = min (max) over lower <= t <= upper of s(t) - d t,        point = the t that attains it

    elementwise, padded outwards as in ``relax``; minus the point is the intercept's derivative by d. slopes, lower,
    upper: float32 or float64 of one shape, finite, lower <= upper; activation, params: as in ``relax``. Differentiable
    once (alpha-CROWN, Xu et al. 2021, moves slopes by it).

    ValueError or TypeError: shapes, dtypes or devices differ; an unknown activation; parameters out of range.
    """
    lower = ck.check_state(lower, "lower")
    ck.check_like(upper, "upper", lower, "lower")
    ck.check_like(slopes, "slopes", lower, "lower")
    plain = told(activation, params)
    f = _support_kernel if direct(slopes, lower, upper) else _support
    intercepts, points = f(slopes, lower, upper, *plain, above)
    return intercepts, points.detach()


# where one pass over both ends beats torch's function of each; elsewhere that one is as fast, and rounds as the network
# does
_FUSED = ("tanh", "arctan", "silu", "gelu", "gelu_tanh")


def interval_activation(
    lower: Tensor, upper: Tensor, activation: str, params: tuple[float, ...] = ()
) -> tuple[Tensor, Tensor]:
    """The range [min s, max s] of an activation over [lower, upper], elementwise, to float32 rounding (Liu 2022,
    Algorithm 3.2).

    lower, upper: float32 or float64 of one shape; activation, params: as in ``relax``. Differentiable.
    """
    same = lower.shape == upper.shape and lower.dtype == upper.dtype and lower.device == upper.device
    if activation not in _FUSED or not same or not native(lower) or not direct(lower, upper):
        return relaxations.interval_activation(lower, upper, activation, params)
    require_cuda_build(lower.device)
    device, stream = stream_of(lower.device)
    form = ck.dense_format(lower) or torch.contiguous_format
    lower, upper = ck.lay_out(lower, form), ck.lay_out(upper, form)
    low, up = torch.empty_like(lower), torch.empty_like(upper)
    _C.bounds_range(
        device,
        stream,
        lower.data_ptr(),
        upper.data_ptr(),
        low.data_ptr(),
        up.data_ptr(),
        lower.numel(),
        *told(activation, params),
    )
    return low, up


def relax_behind(
    lower: Tensor, upper: Tensor, activation: str, kind: str, params: tuple[float, ...], bias: Tensor
) -> relaxations.Lines:
    """``relax`` in terms of the input less ``bias``, the bias of the layer before (of the first dimension after the
    batch, or broadcast): slope * bias joins the intercepts, in the same pass where nothing is recorded."""
    flat = bias.reshape(-1)
    innermost = lower.dim() == 2 or (lower.dim() == 4 and lower.is_contiguous(memory_format=torch.channels_last))
    fits = innermost and len(flat) == lower.shape[1] and upper.shape == lower.shape
    if fits and flat.dtype == lower.dtype and direct(lower, upper, bias):
        return relaxations.Lines(*_kernel(lower, upper, *told(activation, params), kind == "crown", dense(flat)))
    slopes, intercepts = relax(lower, upper, activation, kind, params)
    return relaxations.Lines(slopes, intercepts + slopes * bias)
