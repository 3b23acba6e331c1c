"""Distance to a hyperplane inside a box: the polyhedral envelope's solver, one kernel for many rows."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...reference import polyhedron as reference
from .. import _checks as ck
from .._library import below_autograd, define, first_order_only, is_transformed, require_cuda_build, stream_of

_MAX_DIMS = 6  # leading dimensions that the kernel walks by strides


def _strides(side: Tensor, shape: torch.Size) -> tuple[Tensor, tuple[int, list[int], int]]:
    """A side broadcast to ``shape`` without memory of its own: the tensor to keep alive, and what the kernel reads."""
    if side.is_neg():
        side = side.resolve_neg()
    if len(shape) - 1 > _MAX_DIMS:  # rows in one dimension, as their sizes are told
        side = side.expand(shape).reshape(-1, shape[-1])
        shape = side.shape
    if side.shape[-1] > 1 and side.stride(-1) != 1:
        side = side.contiguous()
    sizes, strides = side.shape, side.stride()
    leading = [0] * (len(shape) - len(sizes))
    leading += [0 if n == 1 else step for n, step in zip(sizes[:-1], strides[:-1], strict=True)]
    return side, (side.data_ptr(), leading, 0 if sizes[-1] == 1 else 1)


def _kernel(
    a: Tensor, b: Tensor, lower: Tensor, upper: Tensor, p: float, is_signed: bool, detailed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if a.dtype == torch.float64:
        distance, multiplier, point = reference.solve(a, b, lower, upper, p, is_signed)
        if a.device.type == "cpu" and bool(distance.isnan().any()):
            _explain_nan(lower, upper)
        if not detailed:
            multiplier, point = multiplier.new_empty(0), point.new_empty(0)
        return distance, multiplier, point
    require_cuda_build(a.device)
    device, stream = stream_of(a.device)
    a_, b_ = a.resolve_neg().contiguous(), b.resolve_neg().contiguous()
    distance = torch.empty_like(b_)
    multiplier = torch.empty_like(b_) if detailed else b_.new_empty(0)
    point = torch.empty_like(a_) if detailed else a_.new_empty(0)
    keep_lower, lower_args = _strides(lower, a.shape)
    keep_upper, upper_args = _strides(upper, a.shape)
    sizes = list(a.shape[:-1]) if a.dim() - 1 <= _MAX_DIMS else [b_.numel()]
    some_nan = _C.polyhedral_distance(
        device, stream, a_.data_ptr(), b_.data_ptr(), lower_args, upper_args, sizes, a.shape[-1], p, is_signed,
        distance.data_ptr(), multiplier.data_ptr() if detailed else 0, point.data_ptr() if detailed else 0,
    )  # fmt: skip
    if some_nan:
        _explain_nan(lower, upper)
    del keep_lower, keep_upper
    return distance, multiplier, point


def _fake(
    a: Tensor, b: Tensor, lower: Tensor, upper: Tensor, p: float, is_signed: bool, detailed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not detailed:
        return b.new_empty(b.shape), b.new_empty(0), a.new_empty(0)
    return b.new_empty(b.shape), b.new_empty(b.shape), a.new_empty(a.shape)


class _Distance(torch.autograd.Function):
    """The derivatives at the optimum d with multiplier m: m for b, m d for a, and what an active face of the box
    costs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, lower: Tensor, upper: Tensor, p: float, is_signed: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        distance, multiplier, point = below_autograd(_op, a, b, lower, upper, p, is_signed, True)
        return distance, multiplier, point

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        *tensors, ctx.p, _ = inputs
        distance, multiplier, point = output
        ctx.save_for_backward(*tensors, distance, multiplier, point)
        ctx.mark_non_differentiable(multiplier, point)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _multiplier: Tensor, _point: Tensor) -> tuple[Tensor | None, ...]:
        a, b, lower, upper, distance, multiplier, point = ctx.saved_tensors
        rate = torch.where(distance.isfinite() & (multiplier > 0), grad * multiplier, 0.0)
        grad_a = grad_b = grad_lower = grad_upper = None
        point = torch.where(point.isfinite(), point, 0.0)
        if ctx.needs_input_grad[0]:
            grad_a = rate[..., None] * point
        if ctx.needs_input_grad[1]:
            grad_b = rate
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            # d distance / d side = side's share of the norm's gradient + multiplier a, on the faces that d touches
            flip = torch.where(b < 0, -torch.ones_like(b), torch.ones_like(b))[..., None]
            direction = -flip * a.sign()
            share: Tensor | float = 0.0
            if ctx.p != math.inf:
                size = distance.abs()[..., None]
                share = flip * direction * (point.abs() / torch.where(size > 0, size, 1.0)) ** (ctx.p - 1.0)
            slope = torch.where(rate[..., None] != 0, grad[..., None] * share, 0.0) + rate[..., None] * a
            up, down = (point == upper) & (direction > 0), (point == lower) & (direction < 0)
            grad_upper = torch.where(up, slope, 0.0).sum_to_size(upper.shape)
            grad_lower = torch.where(down, slope, 0.0).sum_to_size(lower.shape)
        return grad_a, grad_b, grad_lower, grad_upper, None, None


def _autograd(
    a: Tensor, b: Tensor, lower: Tensor, upper: Tensor, p: float, is_signed: bool, detailed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if is_transformed() or (torch.is_grad_enabled() and any(t.requires_grad for t in (a, b, lower, upper))):
        distance, multiplier, point = _Distance.apply(a, b, lower, upper, p, is_signed)
        return (distance, multiplier, point) if detailed else (distance, b.new_empty(0), a.new_empty(0))
    return below_autograd(_op, a, b, lower, upper, p, is_signed, detailed)


_op = define(
    "polyhedral_distance",
    "(Tensor a, Tensor b, Tensor lower, Tensor upper, float p, bool is_signed, bool detailed) -> (Tensor, Tensor, "
    "Tensor)",
    _kernel,
    _fake,
    _autograd,
)


def _side(value: Any, name: str, a: Tensor) -> Tensor:
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return torch.full((1,), float(value), dtype=a.dtype, device=a.device)
    value = ck.need_dense(value, name)
    if value.dtype != a.dtype:
        raise TypeError(f"{name}: got {ck.describe(value)}, expected {a.dtype}, as a has")
    if value.device != a.device:
        raise ValueError(f"{name}: got device {value.device}, expected a's device {a.device}")
    have, want = value.shape, a.shape
    fits = have == want or (
        len(have) <= len(want) and all(n in (1, m) for n, m in zip(reversed(have), reversed(want), strict=False))
    )
    if not fits:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected one that broadcasts to a's {tuple(a.shape)}"
        )
    return value if value.dim() else value.reshape(1)


def _explain_nan(lower: Tensor, upper: Tensor) -> None:
    """A NaN came out: says so when the box is to blame; rows with non-finite coefficients keep their NaN."""
    if bool((lower > 0).any()):
        raise ValueError(
            f"lower: got values up to {lower.max().item():g}, expected lower <= 0 <= upper "
            "(the box is relative to the point: pass low - x)"
        )
    if bool((upper < 0).any()):
        raise ValueError(
            f"upper: got values down to {upper.min().item():g}, expected lower <= 0 <= upper "
            "(the box is relative to the point: pass high - x)"
        )


def polyhedral_distance(
    a: Tensor,
    b: Tensor,
    lower: Tensor | float,
    upper: Tensor | float,
    norm: float | str,
    signed: bool = False,
    return_point: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""The smallest perturbation inside a box that reaches a hyperplane (Liu 2022, problem 3.14 and Algorithm 3.4).

    .. math:: \min_d \|d\|_p \quad\text{s.t.}\quad a \cdot d + b \le 0, \; lower \le d \le upper

    The greedy algorithm is run to convergence, as Newton's method on a concave piecewise linear function that fixes at
    least one coordinate an iteration and never passes the root; norm 1 fills the largest coefficients first.

    Args:
        a: (..., M) coefficients, float32 (float64 runs the plain-torch reference). Any strides.
        b: (...) offsets; a row with b <= 0 has distance 0.
        lower, upper: broadcast to a's shape and never materialised, or numbers; ``lower <= 0 <= upper``, infinite
            allowed. The box is relative to the point: for pixels in [0, 1], ``-x`` and ``1 - x``.
        norm: 1, 2, inf (or "L1", "L2", "Linf") or any p > 1.
        signed: rows with b < 0 get minus the distance to ``a.d + b >= 0`` in place of 0.
        return_point: also return an optimal d.

    Returns:
        The distance (...): never above the exact value (signed: rounded towards minus infinity), within 1e-6 of it
        relatively; inf where the box does not reach the hyperplane (signed: -inf). With ``return_point`` also d (...,
        M), inside the box exactly and on the hyperplane up to rounding; the corner that goes furthest where
        unreachable. The distance is differentiable in a, b, lower and upper, once (closed form at the optimum, zero
        where unreachable), also by ``torch.func.grad`` and ``vmap``; a second derivative raises.
        A row with NaN or infinite a or b, or a NaN in its box, gives NaN, for that row alone.

    Raises:
        TypeError, ValueError: naming the argument. ``lower > 0`` or ``upper < 0`` is an error on the CPU; on a GPU,
        where reading values would stop the device, those rows give NaN.
    """
    p = reference.norm_value(norm)
    a = ck.need_dense(a, "a")
    if a.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"a: got {ck.describe(a)}, expected float32 (or float64 for checking)")
    if a.dim() == 0 or a.shape[-1] == 0:
        raise ValueError(f"a: got shape {tuple(a.shape)}, expected (..., M) with M >= 1")
    b = ck.need_dense(b, "b")
    if b.dtype != a.dtype:
        raise TypeError(f"b: got {ck.describe(b)}, expected {a.dtype}, as a has")
    if b.shape != a.shape[:-1]:
        raise ValueError(f"b: got shape {tuple(b.shape)}, expected a's leading dimensions {tuple(a.shape[:-1])}")
    if b.device != a.device:
        raise ValueError(f"b: got device {b.device}, expected a's device {a.device}")
    low, high = _side(lower, "lower", a), _side(upper, "upper", a)
    # torch.func wants to see the function itself, above the dispatcher.
    # in this order: torch 2.6 cannot trace the second question
    call = _autograd if not torch.compiler.is_compiling() and is_transformed() else _op
    distance, _, point = call(a, b, low, high, p, bool(signed), bool(return_point))
    return (distance, point) if return_point else distance
