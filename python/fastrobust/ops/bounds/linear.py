"""Ops on rows of linear bounds: the backward step through an activation and concretisation; the formulas are those of
:mod:`fastrobust.reference.bounds`. Also what every module of bounds ops uses: dispatch, registration, checks."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...reference import bounds as reference
from ...reference.bounds import Window, dual_exponent
from .. import _checks as ck
from .._library import define, nothing_intercepts, require_cuda_build, stream_of
from . import _autograd as gradients
from ._rows import address, dense, native, rows_args

INF = math.inf
_DUAL = {1.0: 1, 2.0: 2, INF: 3}


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def direct(*tensors: Tensor | None) -> bool:
    """Nothing records or traces: the kernel may be called without the dispatcher."""
    return not needs_grad(*tensors) and nothing_intercepts()


def register(
    name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], gradient: Callable[..., Any]
) -> Any:
    box: list[Any] = []
    box.append(define(name, schema, kernel, fake, gradients.differentiable(lambda: box[0], gradient)))
    return box[0]


# ---- rows of coefficients ----


def _corner(corner_y: Tensor | None, corner_x: Tensor | None, window: Any) -> tuple[Any, Any]:
    return (None, None) if corner_y is None else ((corner_y, corner_x), tuple(window))


def _back_definition(
    A: Any,
    b: Any,
    slopes: Any,
    intercepts: Any,
    example: Any,
    rows: Any,
    minus: Any,
    corner_y: Any,
    corner_x: Any,
    window: Any,
) -> Any:
    return reference.linear_back_step(
        A, b, slopes, intercepts, example, rows, *_corner(corner_y, corner_x, window), minus
    )


def _sides_out(A: Tensor, b: Tensor, slopes: Tensor) -> int:
    return b.shape[0] if slopes.shape[0] == 2 else A.shape[0]


def _back_kernel(
    A: Tensor,
    b: Tensor,
    slopes: Tensor,
    intercepts: Tensor,
    example: Tensor | None,
    rows: Tensor | None,
    minus: Tensor | None,
    corner_y: Tensor | None,
    corner_x: Tensor | None,
    window: Any,
) -> tuple[Tensor, Tensor]:
    if not native(A):
        return _back_definition(A, b, slopes, intercepts, example, rows, minus, corner_y, corner_x, window)
    require_cuda_build(A.device)
    device, stream = stream_of(A.device)
    A, b, slopes, intercepts = dense(A), dense(b), dense(slopes), dense(intercepts)
    example, rows, minus = (None if t is None else t.contiguous() for t in (example, rows, minus))
    args = rows_args(A, b, example, rows, minus, corner_y, corner_x, window)
    out = A.new_empty(_sides_out(A, b, slopes), b.shape[1], A.shape[2])
    b_out = torch.empty_like(b)
    _C.bounds_back(
        device, stream, args, slopes.data_ptr(), slopes.shape[0], intercepts.data_ptr(), slopes.shape[1],
        b.data_ptr(), b_out.data_ptr(), out.data_ptr(), out.shape[0],
    )  # fmt: skip
    return out, b_out


_back = register(
    "bounds_back_step",
    "(Tensor A, Tensor b, Tensor slopes, Tensor intercepts, Tensor? example, Tensor? rows, Tensor? minus, Tensor? "
    "corner_y, "
    "Tensor? corner_x, int[] window) -> (Tensor, Tensor)",
    _back_kernel,
    lambda A, b, slopes, *rest: (A.new_empty(_sides_out(A, b, slopes), b.shape[1], A.shape[2]), torch.empty_like(b)),
    gradients.back_step,
)


def _check_index(t: Tensor | None, name: str, count: int, like: Tensor) -> None:
    if t is None:
        return
    if t.dtype != torch.int64 or tuple(t.shape) != (count,) or t.device != like.device:
        raise ValueError(f"{name}: got {ck.describe(t)}, expected ({count},) int64 on {like.device}")


def _check_rows(
    A: Tensor,
    b: Tensor,
    example: Tensor | None,
    rows: Tensor | None,
    corner: Any,
    maps: dict[str, Tensor],
    window: Any,
    minus: Tensor | None,
) -> None:
    for name, t, dim in (("A", A, 3), ("b", b, 2), *((k, v, 0) for k, v in maps.items())):
        if not isinstance(t, Tensor) or t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name}: got {ck.describe(t)}, expected a float32 tensor")
        if dim and t.dim() != dim:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {dim} dimensions")
        if t.dtype != A.dtype or t.device != A.device:
            raise ValueError(f"{name}: got {ck.describe(t)}, expected {A.dtype} on {A.device}, as A has")
    if A.shape[0] not in (1, 2) or b.shape[0] not in (1, 2) or A.shape[0] > b.shape[0]:
        raise ValueError(
            f"A: got {A.shape[0]} matrices for b of shape {tuple(b.shape)}, expected one per side or one for all"
        )
    count = b.shape[1]
    if minus is not None and rows is None:
        raise ValueError("minus: needs rows")
    if rows is None and A.shape[1] != count:
        raise ValueError(f"b: got {count} rows, expected A's {A.shape[1]}")
    for name, index in (("example", example), ("rows", rows), ("minus", minus)):
        _check_index(index, name, count, A)
    if corner is not None:
        _check_index(corner[0], "corner", count, A)
        _check_index(corner[1], "corner", count, A)
        if A.shape[2] != window[0] * window[1] * window[2]:
            raise ValueError(
                f"window: {window} holds {window[0] * window[1] * window[2]} numbers, A's rows {A.shape[2]}"
            )
    size = A.shape[2] if corner is None else window[2] * window[3] * window[4]
    for name, t in maps.items():
        if t.shape[-1] != size:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {size} in the last dimension")
        if example is None and t.shape[-2] != count:
            raise ValueError(f"{name}: got shape {tuple(t.shape)}, expected {count} rows without `example`")


def linear_back_step(
    A: Tensor,
    b: Tensor,
    slopes: Tensor,
    intercepts: Tensor,
    example: Tensor | None = None,
    rows: Tensor | None = None,
    corner: tuple[Tensor, Tensor] | None = None,
    window: Window | None = None,
    minus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Moves linear bounds through an elementwise function in one pass over A; see
    ``reference.bounds.linear_back_step``.

    ``example``, ``rows`` and ``minus`` must hold valid indices: they are not read here.
    """
    _check_rows(A, b, example, rows, corner, {"slopes": slopes, "intercepts": intercepts}, window, minus)
    y, x = (None, None) if corner is None else (dense(corner[0]), dense(corner[1]))
    f = _back_kernel if direct(A, b, slopes, intercepts) else _back
    return f(A, b, slopes, intercepts, example, rows, minus, y, x, list(window or ()))


def _concretize_definition(
    A: Any,
    b: Any,
    example: Any,
    rows: Any,
    minus: Any,
    center: Any,
    radius: Any,
    x: Any,
    eps: Any,
    q: float,
    corner_y: Any,
    corner_x: Any,
    window: Any,
) -> Any:
    box, ball = (None if center is None else (center, radius)), (None if x is None else (x, eps))
    return reference.concretize_rows(A, b, example, box, ball, q, rows, *_corner(corner_y, corner_x, window), minus)


def _concretize_kernel(
    A: Tensor,
    b: Tensor,
    example: Tensor | None,
    rows: Tensor | None,
    minus: Tensor | None,
    center: Tensor | None,
    radius: Tensor | None,
    x: Tensor | None,
    eps: Tensor | None,
    q: float,
    corner_y: Tensor | None,
    corner_x: Tensor | None,
    window: Any,
) -> Tensor:
    if not native(A) or (x is not None and q not in _DUAL):
        return _concretize_definition(A, b, example, rows, minus, center, radius, x, eps, q, corner_y, corner_x, window)
    require_cuda_build(A.device)
    device, stream = stream_of(A.device)
    A, b = dense(A), dense(b)
    maps = [None if t is None else dense(t) for t in (center, radius, x, eps)]
    example, rows, minus = (None if t is None else t.contiguous() for t in (example, rows, minus))
    args = rows_args(A, b, example, rows, minus, corner_y, corner_x, window)
    out = torch.empty_like(b)
    c, r, at, e = map(address, maps)
    _C.bounds_concretize(device, stream, args, c, r, at, e, 0 if x is None else _DUAL[q], b.data_ptr(), out.data_ptr())
    return out


_concretize = register(
    "bounds_concretize",
    "(Tensor A, Tensor b, Tensor? example, Tensor? rows, Tensor? minus, Tensor? center, Tensor? radius, Tensor? x, "
    "Tensor? eps, float q, "
    "Tensor? corner_y, Tensor? corner_x, int[] window) -> Tensor",
    _concretize_kernel,
    lambda A, b, *rest: torch.empty_like(b),
    gradients.concretize,
)


def concretize_rows(
    A: Tensor,
    b: Tensor,
    example: Tensor | None,
    box: tuple[Tensor, Tensor] | None,
    ball: tuple[Tensor, Tensor] | None,
    q: float,
    rows: Tensor | None = None,
    corner: tuple[Tensor, Tensor] | None = None,
    window: Window | None = None,
    minus: Tensor | None = None,
) -> Tensor:
    """Extremes of linear bounds over boxes and balls; see ``reference.bounds.concretize_rows``."""
    maps: dict[str, Tensor] = {}
    if box is not None:
        maps.update(center=box[0], radius=box[1])
    if ball is not None:
        maps.update(x=ball[0], eps=ball[1])
    if not maps:
        raise ValueError("box: got None, and ball None too, expected at least one")
    _check_rows(A, b, example, rows, corner, maps, window, minus)
    y, x = (None, None) if corner is None else (dense(corner[0]), dense(corner[1]))
    f: Any = _concretize_kernel if direct(A, b, *maps.values()) else _concretize
    return f(A, b, example, rows, minus, *(box or (None, None)), *(ball or (None, None)), q, y, x, list(window or ()))


def concretize(
    A: Tensor, b: Tensor, x: Tensor, eps: float | Tensor, norm: Any = INF, clip: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of A x' + b over {x + d: ||d||_p <= eps} cut at ``clip``: two tensors (B, S).

    A: (B, S, n), or (B, S, *x.shape[1:]); b: (B, S); x: (B, *shape) with n elements; eps a number, (B,) or x's shape
    (then d = eps * v with ||v||_p <= 1). For p < inf with ``clip`` the extreme over the ball cut by the box, exactly.
    """
    p = check_norm(norm)
    x = ck.check_state(x, "x")
    if (
        A.dim() < 3
        or A.shape[:2] != b.shape
        or A.shape[0] != x.shape[0]
        or math.prod(A.shape[2:]) != math.prod(x.shape[1:])
    ):
        raise ValueError(
            f"A: got {tuple(A.shape)} with b {tuple(b.shape)} and x {tuple(x.shape)}, expected (B, S, n), (B, S), (B, "
            "*shape)"
        )
    eps = check_eps(eps, x)
    batch, per = b.shape
    box, ball = reference.region(x, eps, p, clip)
    example = torch.arange(batch, device=A.device).repeat_interleave(per)
    offset = b.reshape(1, -1).expand(2, -1)
    out = concretize_rows(
        A.reshape(1, batch * per, math.prod(x.shape[1:])), offset, example, box, ball, dual_exponent(p)
    )
    return out[0].view(batch, per), out[1].view(batch, per)


_NORMS = {"l1": 1.0, "l2": 2.0, "linf": INF, "inf": INF, "1": 1.0, "2": 2.0}


def check_norm(norm: Any) -> float:
    """A norm exponent >= 1, by number (of any kind) or name."""
    if isinstance(norm, str):
        if norm.lower() not in _NORMS:
            raise ValueError(f"norm: got {norm!r}, expected 1, 2, inf, a number >= 1, or 'L1', 'L2', 'Linf'")
        return _NORMS[norm.lower()]
    if isinstance(norm, bool) or not isinstance(norm, (int, float, numbers.Real)):
        raise TypeError(f"norm: got {type(norm).__name__}, expected a number >= 1 or a name")
    p = float(norm)
    if not p >= 1:
        raise ValueError(f"norm: got {p}, expected 1, 2, inf or a number >= 1")
    return p


def check_eps(eps: Any, x: Tensor) -> float | Tensor:
    """A finite number >= 0, or a tensor of one per example, or one that broadcasts to x; CPU values are read.

    Returns a float, or a tensor without dimensions, (B,), or of x's shape."""
    if isinstance(eps, Tensor):
        if not eps.dtype.is_floating_point:
            raise TypeError(f"eps: got {eps.dtype}, expected floating point")
        if eps.dim() > 0 and eps.device != x.device:
            raise ValueError(f"eps: got a tensor on {eps.device}, expected x's device {x.device}")
        e = eps.detach()
        if nothing_intercepts() and e.numel() and not bool(((e >= 0) & (e <= torch.finfo(x.dtype).max)).all()):
            raise ValueError(
                f"eps: got negative, NaN or infinite values, expected ones >= 0 that are finite in {x.dtype}"
            )
        if eps.dim() == 0 or eps.shape == x.shape or eps.shape == x.shape[:1]:
            return eps
        if eps.shape == (1,):
            return eps.reshape(())
        if eps.dim() == 1 or not broadcasts(eps, x):
            raise ValueError(
                f"eps: got shape {tuple(eps.shape)}, expected a number, ({x.shape[0]},) or one that broadcasts to "
                f"{tuple(x.shape)}"
            )
        return eps.expand(x.shape)
    if isinstance(eps, bool) or not isinstance(eps, (int, float, numbers.Real)):
        raise TypeError(f"eps: got {ck.describe(eps)}, expected a number or a tensor")
    radius = float(eps)
    if not 0 <= radius <= torch.finfo(x.dtype).max:
        raise ValueError(f"eps: got {radius}, expected a number >= 0 that is finite in {x.dtype}")
    return radius


def broadcasts(t: Tensor, x: Tensor) -> bool:
    """Whether t broadcasts to x's shape without enlarging it."""
    return t.dim() <= x.dim() and all(n in (1, m) for n, m in zip(reversed(t.shape), reversed(x.shape), strict=False))
