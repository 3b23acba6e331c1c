"""Fused steps of projected gradient descent and its relatives, one kernel each, on CPU and CUDA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from . import _checks as ck
from . import _pgd_ops as op
from ._library import nothing_intercepts
from ._pgd_ops import NORM_CODE

INF = math.inf
_GRADS = (torch.float32, torch.float16, torch.bfloat16)
_AUTHORS_RANGE = (4 / 255, 14 / 255)
_FLOAT = torch.float32
_increment_version = torch._C._increment_version  # what torch.autograd.graph.increment_version calls; torch 2.6 has it


def _checked(x: Any, x0: Any, grad: Any, norm: Any, clip: Any) -> tuple[Tensor, Tensor, Tensor, float, float, float]:
    p = ck.parse_norm(norm)
    lo, hi = ck.parse_clip(clip)
    x = ck.check_state(x, "x")
    x0 = ck.check_like(x0, "x0", x, "x")
    grad = ck.check_like(grad, "grad", x, "x", _GRADS if x.dtype == torch.float32 else (*_GRADS, torch.float64))
    return x, x0, grad, p, lo, hi


def _check_out(out: Any, x: Tensor, x0: Tensor, grad: Tensor | None) -> Tensor:
    out = ck.check_like(out, "out", x, "x")
    if not ck.has_values(out):
        return out
    for other, name in ((x0, "x0"), (grad, "grad")):
        if other is not None and out.numel() and out.data_ptr() == other.data_ptr():
            raise ValueError(f"out: got the memory of {name}, expected memory of its own or x's")
    return out


def pgd_step(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: tuple[float, float] | None = (0.0, 1.0),
    active: Tensor | None = None,
    out: Tensor | None = None,
    *,
    targeted: bool = False,
    normalize: bool = True,
) -> Tensor:
    r"""One step of projected gradient ascent, in one kernel.

    .. math:: x' = \Pi_{[lo, hi]} \Pi_{\|x' - x_0\|_p \le eps} (x + step\_size \cdot s(g))

    where s(g) is the direction of steepest ascent: ``sign(g)`` for norm inf (thesis eq. 2.2), ``g / ||g||_2`` for norm
    2 (``g`` itself with ``normalize=False``, the projected gradient ascent of Deng et al. 2020). For norm 1 the step is
    the exact maximum of ``<g, p>`` over ``||p||_1 <= step_size`` inside the box: coordinates move in order of ``|g|`` up
    to the face of the box until the length is spent; the projection is the exact one on ball and box together.

    Guarantees, in exact arithmetic on the float32 result: ``||x' - x0|| <= eps`` for x0 in the box and
    ``lo <= x' <= hi``. A zero or NaN gradient coordinate does not move; ``eps = 0`` returns x0.

    Args:
        x: (B, ...) current point, float32 (float64 runs the plain-torch reference). Any strides.
        x0: (B, ...) centre of the ball, inside the box (not checked: it would read the tensor once more).
        grad: (B, ...) gradient of the loss, float32, float16 or bfloat16.
        step_size: a number >= 0, (B,), or for norm inf a tensor of x's shape; in the units of x.
        eps: the radius, of the same kinds; a Python float is rounded down to float32.
        norm: inf, 2, 1 or "Linf", "L2", "L1".
        clip: (lo, hi) or None for no box.
        active: (B,) bool; examples with False keep x.
        out: where to write; may be x. Its autograd version is bumped.
        targeted: descend instead (the loss is that of a target class).
        normalize: norm 2 only; False takes ``step_size * grad``.

    Returns:
        x', or ``out``. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument; nothing is written before.
    """
    # The inner loop of an attack takes the short way: one number each, dense float32 on the CPU, nothing that intercepts.
    if (
        (norm == INF or (norm == 2 and normalize is True))
        and active is None
        and type(step_size) is float
        and type(eps) is float
        and step_size >= 0.0
        and eps >= 0.0
        and type(clip) is tuple
        and nothing_intercepts()
    ):
        try:
            lo, hi = clip
            target: Any = torch.empty_like(x) if out is None and lo <= hi and _is_simple(x) else out
            length = -step_size if targeted else step_size
            if lo <= hi and _quick_step(x, x0, grad, target, 0 if norm == INF else 1, length, eps, lo, hi):
                if out is not None:
                    _increment_version((out,))
                return target
        except (TypeError, ValueError):  # a bad clip or out: nothing was written, and the checks below say what it is
            pass
    x, x0, grad, p, lo, hi = _checked(x, x0, grad, norm, clip)
    step_p = ck.check_parameter(step_size, "step_size", x, p)
    eps_p = ck.check_parameter(eps, "eps", x, p)
    active = ck.check_active(active, x)
    if out is not None:
        out = _check_out(out, x, x0, grad)
    if targeted and p == 1:
        grad = -grad  # the L1 step is a length, not a multiple of a direction
    elif targeted:
        step_p = ck.Parameter(None if step_p.tensor is None else -step_p.tensor, -step_p.value)
    args = (x, x0, grad, *step_p, *eps_p, NORM_CODE[p], lo, hi, active, normalize)
    if out is None:
        return op.pgd_step(*args)
    if ck.has_values(out) and out.is_neg():  # torch cannot resolve a mutable argument beside absent ones
        return out.copy_(op.pgd_step(*args))
    op.pgd_step_out(*args, out)
    _bump(out)
    return out


def _is_simple(t: Any) -> bool:
    """A dense float32 CPU tensor whose memory holds its values."""
    return type(t) is Tensor and t.dtype is _FLOAT and t.is_cpu and t.is_contiguous() and not t.is_neg()


def _step_by_attributes(x: Any, x0: Any, grad: Any, out: Any, norm: int, *numbers: float) -> bool:
    """What ``_C.pgd_quick_step`` does, for a torch without the table that it reads tensors by."""
    if not (_is_simple(x) and _is_simple(x0) and _is_simple(grad) and _is_simple(out)):
        return False
    shape = x.shape
    if not shape or shape != x0.shape or shape != grad.shape or shape != out.shape:
        return False
    _C.pgd_simple_step(
        x.data_ptr(), x0.data_ptr(), grad.data_ptr(), out.data_ptr(), x.numel(), shape[0], norm, *numbers
    )
    return True


_quick_step = _C.pgd_quick_step if _C.learn_tensor_type(Tensor) else _step_by_attributes


def _with_out(
    fresh: Any, into: Any, args: tuple[Any, ...], out: Tensor | None, x: Tensor, x0: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """An op of (x', two values per example), or its variant that writes x' into out."""
    if out is None:
        return fresh(*args)
    out = _check_out(out, x, x0, grad)
    if ck.has_values(out) and out.is_neg():
        moved, *values = fresh(*args)
        return (out.copy_(moved), *values)
    values = into(*args, out)
    _bump(out)
    return (out, *values)


def _bump(out: Tensor) -> None:
    """Raw writes are invisible to autograd; without this a saved tensor would be used after it changed."""
    if type(out) is Tensor and nothing_intercepts():
        _increment_version((out,))


def project(
    x: Tensor,
    x0: Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: tuple[float, float] | None = (0.0, 1.0),
    out: Tensor | None = None,
) -> Tensor:
    r"""Projection on the ball around x0, then on the box: ``pgd_step`` without a step.

    For norm inf and 1 it is the exact projection on the intersection; for norm 2 the ball comes first, then the box
    (the usual choice; the result lies in both). A point already inside is returned bit for bit. Arguments, guarantees
    and errors are those of :func:`pgd_step`.
    """
    x, x0, _, p, lo, hi = _checked(x, x0, x, norm, clip)
    eps_p = ck.check_parameter(eps, "eps", x, p)
    args = (x, x0, None, None, 0.0, *eps_p, NORM_CODE[p], lo, hi, None, True)
    if out is None:
        return op.pgd_step(*args)
    out = _check_out(out, x, x0, None)
    if ck.has_values(out) and out.is_neg():
        return out.copy_(op.pgd_step(*args))
    op.pgd_step_out(*args, out)
    _bump(out)
    return out


def random_start(
    x0: Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: tuple[float, float] | None = (0.0, 1.0),
    seed: int | None = None,
    first_example: int = 0,
) -> Tensor:
    r"""A random point of the ball around x0 inside the box.

    Norm inf: uniform on the intersection of ball and box. Norms 2 and 1: uniform in the ball (Barthe et al. 2005); a
    coordinate that leaves the box is reflected about x0 where that lies inside and clipped otherwise, which is uniform on
    the intersection when every face is at distance 0 or at least eps. The ball and the box hold exactly.

    Counter-based (Philox4x32-10): element i of example b depends on (seed, first_example + b, i) alone, so the numbers
    are the same on CPU and CUDA and for every batch size, memory format and number of threads.

    Args:
        x0: (B, ...) float32, inside the box.
        eps: radius, finite unless norm inf meets a box: a number, (B,), or for norm inf a tensor of x0's shape.
        norm, clip: as in :func:`pgd_step`.
        seed: 64-bit key. None draws one from torch's default generator (so ``torch.manual_seed`` governs it).
        first_example: number of the first example, to draw a batch in parts; below 2^32.
    """
    p = ck.parse_norm(norm)
    lo, hi = ck.parse_clip(clip)
    x0 = ck.check_state(x0, "x0")
    eps_p = ck.check_parameter(eps, "eps", x0, p)
    if p != INF or lo == -INF or hi == INF:
        ck.check_finite(eps_p, "eps")
    if seed is None:
        seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64).item())
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed: got {ck.describe(seed)}, expected an integer or None")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: got {seed}, expected an integer of at most 64 bits")
        seed = (seed + 2**63) % 2**64 - 2**63  # schemas have signed integers
    if isinstance(first_example, bool) or not isinstance(first_example, (int, torch.SymInt)):
        raise TypeError(f"first_example: got {ck.describe(first_example)}, expected an integer")
    if not 0 <= first_example <= 2**32 - x0.shape[0]:
        raise ValueError(f"first_example: got {first_example}, expected 0 to 2**32 - {x0.shape[0]}, the batch")
    return op.random_start(x0, *eps_p, NORM_CODE[p], lo, hi, seed, first_example)


def fosc(x: Tensor, x0: Tensor, grad: Tensor, eps: float | Tensor, norm: float | str = INF) -> Tensor:
    r"""First-order stationary condition: how far the inner maximisation is from converged.

    .. math:: c(x) = \max_{\|z - x_0\|_p \le eps} \langle z - x, g \rangle = eps \|g\|_q - \langle x - x_0, g \rangle

    with q the dual norm (Wang et al. 2019, eq. 4; the paper has p = inf). Zero at a stationary point. NaN gradient
    coordinates count as zero. Returns (B,) float32. Arguments as in :func:`pgd_step`.
    """
    x, x0, grad, p, _, _ = _checked(x, x0, grad, norm, None)
    return op.fosc(x, x0, grad, *ck.check_parameter(eps, "eps", x, p), NORM_CODE[p])


def pgd_step_fosc(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    threshold: float,
    norm: float | str = INF,
    clip: tuple[float, float] | None = (0.0, 1.0),
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Update, criterion and mask of dynamic adversarial training (Wang et al. 2019, algorithm 1) in one pass.

    Moves the examples that are ``active`` (all, when None) by :func:`pgd_step`, computes the criterion
    :func:`fosc` at the incoming x, and returns ``active & (fosc > threshold)`` for the next step: an example stops when
    its criterion has fallen to ``threshold`` (the paper's c_t).

    Returns:
        (x', fosc (B,), active (B,) bool); x' is ``out`` where given. Other arguments as in :func:`pgd_step`.
    """
    x, x0, grad, p, lo, hi = _checked(x, x0, grad, norm, clip)
    step_p, eps_p = ck.check_parameter(step_size, "step_size", x, p), ck.check_parameter(eps, "eps", x, p)
    level = ck.check_number(threshold, "threshold")
    args = (x, x0, grad, *step_p, *eps_p, level, NORM_CODE[p], lo, hi, ck.check_active(active, x))
    return _with_out(op.pgd_step_fosc, op.pgd_step_fosc_out, args, out, x, x0, grad)


def atas_step(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    v: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: tuple[float, float] | None = (0.0, 1.0),
    *,
    beta: float = 0.5,
    c: float = 0.01,
    variant: str = "paper",
    step_range: tuple[float, float] | None = None,
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""A step of adversarial training with adaptive step size (ATAS, thesis algorithm 5.3), in one op.

    .. math:: v' = \beta v + (1 - \beta) \|g\|_2^2, \qquad \alpha = \frac{step\_size}{\sqrt{v' + c}} \quad (5.15, 5.16)

    then :func:`pgd_step` with step alpha per example. ``variant="authors"`` takes the authors' code instead:
    ``alpha = step_size / (1 + sqrt(v') / c)``, clipped to ``step_range`` (by default [4, 14]/255; their step_size is
    16/255). The thesis sets ``step_size / c = 16/255`` with c = 0.01 (0.1 for ImageNet) and beta = 0.5. Mind that a
    mean-reduced loss makes ||g|| depend on the batch size.

    Args:
        v: (B,) float32 moving average, zero at first.
        step_range: (min, max) of alpha; None: no limits for "paper", [4, 14]/255 for "authors".

    Returns:
        (x', v' (B,), alpha (B,)). Examples that are not ``active`` keep x and v; x' is ``out`` where
        given. Other arguments as in :func:`pgd_step`.
    """
    x, x0, grad, p, lo, hi = _checked(x, x0, grad, norm, clip)
    v = ck.need_tensor(v, "v")
    if v.dtype != x.dtype or tuple(v.shape) != (x.shape[0],) or v.device != x.device:
        raise ValueError(f"v: got {ck.describe(v)}, expected a ({x.shape[0]},) {x.dtype} tensor on {x.device}")
    step_p, eps_p = ck.check_parameter(step_size, "step_size", x, p), ck.check_parameter(eps, "eps", x, p)
    if step_p.tensor is not None and step_p.tensor.dim() != 1:
        raise ValueError("step_size: got one value per element, expected a number or one per example")
    if variant not in ("paper", "authors"):
        raise ValueError(f"variant: got {variant!r}, expected 'paper' or 'authors'")
    b, constant = ck.check_number(beta, "beta", 0, 1), ck.check_number(c, "c", 0)
    if constant == 0 and variant == "authors":
        raise ValueError("c: got 0, expected a number > 0 for variant 'authors'")
    limits = step_range if step_range is not None else (_AUTHORS_RANGE if variant == "authors" else (0.0, INF))
    low, high = ck.parse_clip(limits, "step_range")
    args = (
        x, x0, grad, v, *step_p, *eps_p, NORM_CODE[p], lo, hi, b, constant, variant == "authors", low, high,
        ck.check_active(active, x),
    )  # fmt: skip
    return _with_out(op.atas_step, op.atas_step_out, args, out, x, x0, grad)
