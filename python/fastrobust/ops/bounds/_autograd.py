"""Gradients of the bounds ops, by hand. Only inputs are kept; each ``backward`` returns one gradient per argument of
its op."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _C
from ...reference.bounds import room_of, row_maps, row_norm, split_support
from .._library import below_autograd, nothing_intercepts, on_cpu, require_cuda_build, stream_of
from . import _conv as conv
from ._product import product
from ._rows import Groups, address, by_example, dense, native, rows_args

Grads = tuple[Tensor | None, ...]


def differentiable(op: Callable[[], Any], gradient: Callable[..., Grads]) -> Callable[..., Any]:
    """The autograd form of an op: ``gradient(args, need, *grads)``; ``op`` gives the op itself, which is defined
    later."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            ctx.save_for_backward(*(a if isinstance(a, Tensor) else None for a in args))
            ctx.plain = [None if isinstance(a, Tensor) else a for a in args]
            return below_autograd(op(), *args)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> Any:
            args = [p if t is None else t for t, p in zip(ctx.saved_tensors, ctx.plain, strict=True)]
            found = gradient(args, ctx.needs_input_grad, *grads)
            return tuple(g if n else None for g, n in zip(found, ctx.needs_input_grad, strict=True))

    def call(*args: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
            return Function.apply(*args)
        return below_autograd(op(), *args)

    return call


def _corner(y: Tensor | None, x: Tensor | None, window: Any) -> tuple[Any, Any]:
    return (None, None) if y is None else ((y, x), tuple(window))


def _to_maps(
    g: Tensor, like: Tensor, example: Tensor | None, y: Tensor | None, x: Tensor | None, window: Any
) -> Tensor:
    """The adjoint of ``row_maps``: (m, R, length) to (m, B, map)."""
    m, batch, size = g.shape[0], like.shape[1], like.shape[2]
    if y is None or x is None:
        return g if example is None else g.new_zeros(m, batch, size).index_add(1, example, g)
    height, width, channels, h, w = window
    yy = y[:, None] + torch.arange(height, device=g.device)
    xx = x[:, None] + torch.arange(width, device=g.device)
    inside = ((yy >= 0) & (yy < h))[:, :, None] & ((xx >= 0) & (xx < w))[:, None, :]
    if example is None:
        example = torch.arange(len(y), device=g.device)
    at = (example[:, None, None] * h + yy.clamp(0, h - 1)[:, :, None]) * w + xx.clamp(0, w - 1)[:, None, :]
    g = g.unflatten(2, (height, width, channels)) * inside[..., None].to(g.dtype)
    return g.new_zeros(m, batch * h * w, channels).index_add(1, at.flatten(), g.flatten(1, 3)).view(m, batch, size)


def _rows_of(A: Tensor, rows: Tensor | None, minus: Tensor | None) -> Tensor:
    if rows is None:
        return A
    return A[:, rows] if minus is None else A[:, rows] - A[:, minus]


def _to_rows(g: Tensor, A: Tensor, rows: Tensor | None, minus: Tensor | None) -> Tensor:
    """The adjoint of ``_rows_of``."""
    if rows is None:
        return g
    if _by_kernel(g):
        return torch.stack([pick_gradient(part, rows, minus, A.shape[1]) for part in dense(g)])
    out = torch.zeros_like(A).index_add(1, rows, g)
    return out if minus is None else out.index_add(1, minus, -g)


def pick_gradient(g: Tensor, rows: Tensor, minus: Tensor | None, count: int) -> Tensor:
    """The gradient (count, n) of a matrix from that of the rows (R, n) that are picked from it."""
    out, rows, minus = g.new_empty(count, g.shape[1]), rows.contiguous(), None if minus is None else minus.contiguous()
    length, n = g.shape
    require_cuda_build(g.device)
    _C.bounds_pick_grad(
        *stream_of(g.device), g.data_ptr(), rows.data_ptr(), address(minus), out.data_ptr(), length, n, count
    )
    return out


def _by_kernel(A: Tensor) -> bool:
    return native(A) and nothing_intercepts()


def _by_cpu_kernel(x: Tensor) -> bool:
    """Convolutions: elsewhere the vendor's."""
    return _by_kernel(x) and on_cpu(x)


def back_step(args: list[Any], need: Any, g_out: Tensor, g_b: Tensor) -> Grads:
    A, b, slopes, intercepts, example, rows, minus, y, x, window = args
    if _by_kernel(A):
        return _back_step_kernel(args, g_out, g_b)
    seen = _rows_of(A, rows, minus)
    place = _corner(y, x, window)
    s, i = row_maps(slopes, example, *place), row_maps(intercepts, example, *place)
    two = slopes.shape[0] == 2
    g_a = [torch.zeros_like(seen[0]) for _ in range(A.shape[0])] if two else list((g_out * s).unbind(0))
    g_i = [torch.zeros_like(seen[0]), torch.zeros_like(seen[0])]
    g_s = [torch.zeros_like(seen[0]), torch.zeros_like(seen[0])]
    for side in range(b.shape[0]):
        k = min(side, A.shape[0] - 1)
        a = seen[k]
        positive = a >= 0
        through = g_b[side][:, None]
        g_a[k] = g_a[k] + through * torch.where(positive, i[side], i[1 - side])
        moved = through * a
        g_i[side] = g_i[side] + torch.where(positive, moved, 0.0)
        g_i[1 - side] = g_i[1 - side] + torch.where(positive, 0.0, moved)
        if two:
            g_a[k] = g_a[k] + g_out[side] * torch.where(positive, s[side], s[1 - side])
            scaled = g_out[side] * a
            g_s[side] = g_s[side] + torch.where(positive, scaled, 0.0)
            g_s[1 - side] = g_s[1 - side] + torch.where(positive, 0.0, scaled)
    slope_rows = torch.stack(g_s) if two else (g_out * seen).sum(0, keepdim=True)
    return (
        _to_rows(torch.stack(g_a), A, rows, minus), g_b, _to_maps(slope_rows, slopes, example, y, x, window),
        _to_maps(torch.stack(g_i), intercepts, example, y, x, window), None, None, None, None, None, None,
    )  # fmt: skip


def _back_step_kernel(args: list[Any], g_out: Tensor, g_b: Tensor) -> Grads:
    g_a, g_s, g_i = back_rows_kernel(args, g_out, g_b)
    return _to_rows(g_a, args[0], *args[5:7]), g_b, g_s, g_i, None, None, None, None, None, None


def back_rows_kernel(
    args: list[Any], g_out: Tensor, g_b: Tensor, groups: Groups | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the rows before ``rows`` and ``minus`` pick, of slopes and of intercepts. groups: ``by_example``,
    where known."""
    A, b, slopes, intercepts, example, rows, minus, y, x, window = args
    A, slopes, intercepts, g_out, g_b = (dense(t) for t in (A, slopes, intercepts, g_out, g_b))
    example, rows, minus = (None if t is None else t.contiguous() for t in (example, rows, minus))
    starts, order = groups or by_example(example, b.shape[1], slopes.shape[1], A.device)
    g_a = A.new_empty(A.shape[0], b.shape[1], A.shape[2])
    g_s, g_i = torch.zeros_like(slopes), torch.zeros_like(intercepts)
    require_cuda_build(A.device)
    _C.bounds_back_grad(
        *stream_of(A.device),
        rows_args(A, b, example, rows, minus, y, x, window),
        slopes.data_ptr(),
        slopes.shape[0],
        intercepts.data_ptr(),
        slopes.shape[1],
        g_out.data_ptr(),
        g_out.shape[0],
        g_b.data_ptr(),
        starts.data_ptr(),
        address(order),
        g_a.data_ptr(),
        g_s.data_ptr(),
        g_i.data_ptr(),
    )
    return g_a, g_s, g_i


def _concretize_kernel(args: list[Any], need: Any, g: Tensor) -> Grads:
    g_a, g_c, g_r = concretize_rows_kernel(args, need, g)
    return _to_rows(g_a, args[0], *args[3:5]), g, None, None, None, g_c, g_r, None, None, None, None, None, None


def concretize_rows_kernel(
    args: list[Any], need: Any, g: Tensor, groups: Groups | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of the rows before ``rows`` and ``minus`` pick, of centre and of radius."""
    A, b, example, rows, minus, center, radius, _, _, _, y, x, window = args
    A, center, radius, g = (dense(t) for t in (A, center, radius, g))
    example, rows, minus = (None if t is None else t.contiguous() for t in (example, rows, minus))
    starts, order = groups or by_example(example, b.shape[1], center.shape[0], A.device)
    g_a = A.new_empty(A.shape[0], b.shape[1], A.shape[2])
    g_c, g_r = torch.zeros_like(center) if need[5] else None, torch.zeros_like(radius) if need[6] else None
    require_cuda_build(A.device)
    _C.bounds_concretize_grad(
        *stream_of(A.device),
        rows_args(A, b, example, rows, minus, y, x, window),
        center.data_ptr(),
        radius.data_ptr(),
        center.shape[0],
        g.data_ptr(),
        starts.data_ptr(),
        address(order),
        g_a.data_ptr(),
        address(g_c),
        address(g_r),
    )
    return g_a, g_c, g_r


def _norm_slope(w: Tensor, q: float) -> Tensor:
    """The gradient of ||w||_q over the last dimension for w >= 0 (0 at 0)."""
    if q == math.inf:
        top = (w == w.amax(-1, keepdim=True)).to(w.dtype)
        return top / top.sum(-1, keepdim=True)
    if q == 1:
        return torch.ones_like(w)
    size = row_norm(w.flatten(0, -2), q).view(*w.shape[:-1], 1)
    return torch.where(size > 0, (w / torch.where(size > 0, size, 1.0)).pow(q - 1), 0.0)


def concretize(args: list[Any], need: Any, g: Tensor) -> Grads:
    A, b, example, rows, minus, center, radius, x0, eps, q, y, x, window = args
    if _by_kernel(A) and center is not None and x0 is None:
        return _concretize_kernel(args, need, g)
    seen = _rows_of(A, rows, minus)
    place = _corner(y, x, window)

    def maps(t: Tensor | None) -> Tensor | None:
        return None if t is None else row_maps(t[None], example, *place)[0]

    c, r, p, e = (maps(t) for t in (center, radius, x0, eps))
    g_a = [torch.zeros_like(t) for t in seen.unbind(0)]
    found: dict[str, Tensor] = {}

    def add(name: str, t: Tensor) -> None:
        found[name] = found[name] + t if name in found else t

    for side in range(b.shape[0]):
        k, sign = min(side, A.shape[0] - 1), 2.0 * side - 1.0
        a, through = seen[k], g[side][:, None]
        on_box, on_ball, full, slope = a, a, None, None
        if c is not None and r is not None and p is not None and e is not None:
            part, slope, full = split_support((a * e).abs(), room_of(a, side, c, r, p, e), q)
            on_ball = torch.where(full, a.sign() * part / torch.where(full, e, 1.0), a)
            on_box = a - on_ball
        elif p is not None and e is not None:
            slope = _norm_slope((a * e).abs(), q)
        end: Tensor | float = 0.0  # where the extreme is attained: the derivative with respect to A
        if c is not None and r is not None:
            end = c + sign * a.sign() * r
            add("center", through * on_box)
            add("radius", through * sign * on_box.abs())
        if p is not None and e is not None and slope is not None:
            inside = p + sign * slope * e * a.sign()
            end = inside if full is None else torch.where(full, end, inside)
            add("x", through * on_ball)
            add("eps", through * sign * slope * on_ball.abs())
        g_a[k] = g_a[k] + through * end
    back = [
        None if t is None else _to_maps(found[name][None], t[None], example, y, x, window)[0]
        for name, t in (("center", center), ("radius", radius), ("x", x0), ("eps", eps))
    ]
    return _to_rows(torch.stack(g_a), A, rows, minus), g, None, None, None, *back, None, None, None, None


def interval(args: list[Any], need: Any, g_a: Tensor, g_b: Tensor) -> Grads:
    center, radius, weight, bias, finish = args
    if finish == 0:
        g_c, g_r = g_a, g_b
    else:
        if finish == 2:  # centre and radius of the ReLU: through its ends
            c, r = F.linear(center, weight, bias), F.linear(radius, weight.abs())
            g_a, g_b = 0.5 * (g_a - g_b) * (c - r > 0), 0.5 * (g_a + g_b) * (c + r > 0)
        g_c, g_r = g_a + g_b, g_b - g_a
    if radius.shape[0] != center.shape[0]:  # one radius for all examples
        g_r = g_r.sum(0, keepdim=True)
    g_w = product(g_c.t(), center) + weight.sign() * product(g_r.t(), radius) if need[2] else None
    to_c, to_r = product(g_c, weight) if need[0] else None, product(g_r, weight.abs()) if need[1] else None
    return to_c, to_r, g_w, g_c.sum(0), None


def _weight_gradient(
    x: Tensor, g: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """Of a convolution of x, from the gradient of its result."""
    if _by_cpu_kernel(x) and len(x) and weight[0].numel() <= conv.MAX_TAPS:
        return conv.weight_gradient(x, g, weight, stride, padding, dilation, groups)
    found: Tensor = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [False, True, False]
    )[1]
    return found


def interval_conv(args: list[Any], need: Any, g_a: Tensor, g_b: Tensor) -> Grads:
    center, radius, weight, bias, stride, padding, finish, dilation, groups = args
    shape = (stride, padding, dilation, groups)
    if finish == 0:
        g_c, g_r = g_a, g_b
    else:
        if finish == 2:  # as in ``interval``
            c, r = (
                F.conv2d(center, weight, bias, *shape),
                F.conv2d(radius, weight.abs(), None, *shape),
            )
            g_a, g_b = 0.5 * (g_a - g_b) * (c - r > 0), 0.5 * (g_a + g_b) * (c + r > 0)
        g_c, g_r = g_a + g_b, g_b - g_a
    if radius.shape[0] != center.shape[0]:
        g_r = g_r.sum(0, keepdim=True)
    adjoint = conv.adjoint if _by_cpu_kernel(center) else conv.adjoint_definition
    rest = (dilation, groups)
    to_c = adjoint(g_c, weight, stride, padding, center.shape[2:], *rest) if need[0] else None
    to_r = adjoint(g_r, weight.abs(), stride, padding, radius.shape[2:], *rest) if need[1] else None
    to_w = None
    if need[2]:
        to_w = _weight_gradient(center, g_c, weight, *shape)
        to_w = to_w + weight.sign() * _weight_gradient(radius, g_r, weight, *shape)
    return to_c, to_r, to_w, g_c.sum((0, 2, 3)), None, None, None, None, None


def spread(args: list[Any], need: Any, g: Tensor) -> Grads:
    a, weight, stride, padding, size, dilation, groups = args
    shape = (stride, padding, dilation, groups)
    # too narrow for the vendor's engine
    narrow = _by_cpu_kernel(a) and a.shape[0] and weight[0].numel() <= conv.MAX_TAPS
    if narrow:
        g = g.contiguous(memory_format=torch.channels_last)
    forward = conv.convolution if narrow else F.conv2d
    g_a = forward(g, weight, stride=stride, padding=padding, dilation=dilation, groups=groups) if need[0] else None
    return g_a, _weight_gradient(g, a, weight, *shape) if need[1] else None, None, None, None, None, None
