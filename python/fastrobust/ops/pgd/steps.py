"""Fused steps of projected gradient descent and its relatives, one kernel each, on CPU and CUDA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _C
from .. import _checks as ck
from .._library import nothing_intercepts
from . import _box
from . import _kernels as op
from ._box import Box
from ._kernels import NORM_CODE
from ._overlap import meets_itself, overlap, same_places

INF = math.inf
_GRADS = (torch.float32, torch.float16, torch.bfloat16)
_NO_FOSC = "the criterion is eps times the gradient's size"
_AUTHORS_RANGE = (4 / 255, 14 / 255)
_FLOAT = torch.float32
_increment_version = torch._C._increment_version


Clip = tuple[Any, Any] | None  # numbers, or tensors that broadcast


def _checked(x: Any, x0: Any, grad: Any, norm: Any, clip: Any) -> tuple[Tensor, Tensor, Tensor, float, Any]:
    p = ck.parse_norm(norm)
    x = ck.check_state(x, "x")
    box = _box.parse_box(clip, x)
    x0 = ck.check_like(x0, "x0", x, "x")
    grad = ck.check_like(grad, "grad", x, "x", _GRADS if x.dtype == torch.float32 else (*_GRADS, torch.float64))
    return x, x0, grad, p, box


def _check_out(out: Any, x: Tensor, **read: Tensor | None) -> Tensor:
    """out: like x, x itself or memory of its own, and nothing that autograd would take for what it was before."""
    out = ck.check_like(out, "out", x, "x")
    if not ck.has_values(out):
        return out
    if torch.is_grad_enabled() and not out.is_leaf:
        raise ValueError(
            "out: got a tensor with a gradient history, expected one without (detach it): the step is not recorded"
        )
    if meets_itself(out):
        raise ValueError("out: got memory that several of its elements share, expected a place for each")
    if not same_places(out, x):
        read["x"] = x
    for name, other in read.items():
        if other is not None and ck.has_values(other) and overlap(out, other):
            raise ValueError(f"out: got memory of {name}, expected memory of its own or x itself")
    return out


def pgd_step(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: Clip = (0.0, 1.0),
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
    the exact maximum of ``<g, p>`` over ``||p||_1 <= step_size`` inside the box: coordinates move in order of ``|g|``
    up to the face of the box until the length is spent; the projection is the exact one on ball and box together.

    Guarantees, in exact arithmetic on the float32 result: ``||x' - x0|| <= eps`` for x0 in the box and
    ``lo <= x' <= hi``. A zero or NaN gradient coordinate does not move; ``eps = 0`` returns x0.

    Args:
        x: (B, ...) current point, float32 (float64 runs the plain-torch reference). Any strides.
        x0: (B, ...) centre of the ball, inside the box (not checked: it would read the tensor once more).
        grad: (B, ...) gradient of the loss, float32, float16 or bfloat16.
        step_size: a number >= 0, (B,), or for norm inf whatever broadcasts to x's shape: (3, 1, 1) is one per channel,
            (B, 1, 1, 1) one per example (for every norm). Tensors, numpy arrays or lists, in the units of x.
        eps: the radius, of the same kinds; rounded down to float32.
        norm: inf, 2, 1 or "Linf", "L2", "L1".
        clip: (lo, hi), each a number or a tensor or array that broadcasts to x's shape, as of images that were
            normalised per channel; None for no box.
        active: (B,) bool; examples with False keep x.
        out: where to write: x itself, or memory that no argument has. Its autograd version is bumped.
        targeted: descend instead (the loss is that of a target class).
        normalize: norm 2 only; False takes ``step_size * grad``.

    Returns:
        x', or ``out``. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument; nothing is written before.
    """
    # The inner loop of an attack takes the short way: one number each, dense float32 on the CPU, nothing that
    # intercepts.
    if (
        (norm == INF or (norm == 2 and normalize is True))
        and active is None
        and type(step_size) is float
        and type(eps) is float
        and step_size >= 0.0
        and eps >= 0.0
        and type(clip) is tuple
        and getattr(out, "is_leaf", True)
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
        except (
            TypeError,
            ValueError,
            RuntimeError,
        ):  # a clip of tensors, a bad clip or out: nothing was written, and the checks below say what it is
            pass
    x, x0, grad, p, box = _checked(x, x0, grad, norm, clip)
    step_p = ck.check_parameter(step_size, "step_size", x, p)
    eps_p = ck.check_parameter(eps, "eps", x, p)
    active = ck.check_active(active, x)
    if out is not None:
        out = _check_out(out, x, x0=x0, grad=grad, step_size=step_p.tensor, eps=eps_p.tensor, active=active)
    if targeted and p == 1:
        grad = -grad  # the L1 step is a length, not a multiple of a direction
    elif targeted:
        step_p = ck.Parameter(None if step_p.tensor is None else -step_p.tensor, -step_p.value)
    return _step(x, x0, grad, step_p, eps_p, p, box, active, normalize, out)


def _step(
    x: Tensor, x0: Tensor, grad: Tensor | None, step_p: ck.Parameter, eps_p: ck.Parameter, p: float, box: Any,
    active: Tensor | None, normalize: bool, out: Tensor | None,
) -> Tensor:  # fmt: skip
    if isinstance(box, Box):
        y = _box.step(x, x0, grad, step_p, eps_p, p, box, active, normalize)
        return y if out is None else _copy_into(out, y)
    args = (x, x0, grad, *step_p, *eps_p, NORM_CODE[p], *box, active, normalize)
    if out is None:
        return op.pgd_step(*args)
    if ck.has_values(out) and out.is_neg():  # torch cannot resolve a mutable argument beside absent ones
        return _copy_into(out, op.pgd_step(*args))
    op.pgd_step_out(*args, out)
    return out


def _copy_into(out: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return out.copy_(y)


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


def _with_out(fresh: Any, into: Any, args: tuple[Any, ...], out: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """An op of (x', two values per example), or its variant that writes x' into out."""
    if out is None:
        return fresh(*args)
    if ck.has_values(out) and out.is_neg():
        moved, *values = fresh(*args)
        return (_copy_into(out, moved), *values)
    return (out, *into(*args, out))


def project(
    x: Tensor,
    x0: Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: Clip = (0.0, 1.0),
    out: Tensor | None = None,
) -> Tensor:
    r"""Projection on the ball around x0, then on the box: ``pgd_step`` without a step.

    For norm inf and 1 it is the exact projection on the intersection; for norm 2 the ball comes first, then the box
    (the usual choice; the result lies in both). A point already inside is returned bit for bit, on the sphere too; one
    outside goes to ``(1 - 2**-21) eps`` for norms 2 and 1, so that no rounding leaves the ball. Projecting twice
    changes nothing. Arguments, guarantees and errors are those of :func:`pgd_step`.
    """
    x, x0, _, p, box = _checked(x, x0, x, norm, clip)
    eps_p = ck.check_parameter(eps, "eps", x, p)
    if out is not None:
        out = _check_out(out, x, x0=x0, eps=eps_p.tensor)
    return _step(x, x0, None, ck.Parameter(None, 0.0), eps_p, p, box, None, True, out)


def random_start(
    x0: Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: Clip = (0.0, 1.0),
    seed: int | None = None,
    first_example: int | Tensor = 0,
) -> Tensor:
    r"""A random point of the ball around x0 inside the box.

    Norm inf: uniform on the intersection of ball and box. Norms 2 and 1: uniform in the ball (Barthe et al. 2005); a
    coordinate that leaves the box is reflected about x0 where that lies inside and clipped otherwise, which is uniform
    on the intersection when every face is at distance 0 or at least eps. The ball and the box hold exactly.

    Counter-based (Philox4x32-10): element i of example b depends on (seed, first_example + b, i) alone, so the numbers
    are the same on CPU and CUDA and for every batch size, memory format and number of threads.

    Args:
        x0: (B, ...) float32, inside the box.
        eps: radius, finite unless norm inf meets a box; of the kinds that :func:`pgd_step` takes. For norms 2 and 1 a
            radius below 2^-96, whose points float32 cannot tell from the centre in most images, gives x0.
        norm, clip: as in :func:`pgd_step`.
        seed: 64-bit key, any integral number. None draws one from torch's default CPU generator (so
            ``torch.manual_seed`` governs it); in a compiled, exported or traced graph it is drawn anew in each run.
        first_example: number of the first example, to draw a batch in parts, or (B,) int64, the numbers of all, which
            stand for first_example + b above; below 2^32.
    """
    p = ck.parse_norm(norm)
    x0 = ck.check_state(x0, "x0")
    box = _box.parse_box(clip, x0)
    eps_p = ck.check_parameter(eps, "eps", x0, p)
    if p != INF or not _box.is_finite(box):
        ck.check_finite(eps_p, "eps", "there is no uniform point of an unbounded set")
    drawn = None
    if seed is None:
        number, seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu"), 0
        if nothing_intercepts():
            seed = int(number)
        else:
            drawn = number
    seed = ck.check_integer(seed, "seed", "an integer or None")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**64:
            raise ValueError(f"seed: got {seed}, expected an integer of at most 64 bits")
        seed = (seed + 2**63) % 2**64 - 2**63  # schemas have signed integers
    numbers, first_example = _example_numbers(first_example, x0)
    if isinstance(box, Box):
        return _box.random_start(x0, eps_p, p, box, (seed, first_example, drawn, numbers))
    return op.random_start(x0, *eps_p, NORM_CODE[p], *box, seed, first_example, drawn, numbers)


def _example_numbers(given: Any, x0: Tensor) -> tuple[Tensor | None, int]:
    """(numbers, 0) or (None, number of the first)."""
    if not (isinstance(given, Tensor) and given.dim()):
        first = ck.check_integer(given, "first_example")
        if not 0 <= first <= 2**32 - x0.shape[0]:
            raise ValueError(f"first_example: got {first}, expected 0 to 2**32 - {x0.shape[0]}, the batch")
        return None, first
    if given.dtype != torch.int64 or tuple(given.shape) != (x0.shape[0],):
        raise ValueError(
            f"first_example: got {ck.describe(given)}, expected a number or ({x0.shape[0]},) int64 numbers"
        )
    numbers = ck.need_dense(given, "first_example").to(x0.device).contiguous()
    if numbers.is_cpu and ck.has_values(numbers) and len(numbers):
        low, high = (int(v) for v in torch.aminmax(numbers))
        if low < 0 or high >= 2**32:
            raise ValueError(f"first_example: got numbers from {low} to {high}, expected 0 to 2**32 - 1")
    return numbers, 0


def fosc(x: Tensor, x0: Tensor, grad: Tensor, eps: float | Tensor, norm: float | str = INF) -> Tensor:
    r"""First-order stationary condition: how far the inner maximisation is from converged.

    .. math:: c(x) = \max_{\|z - x_0\|_p \le eps} \langle z - x, g \rangle = eps \|g\|_q - \langle x - x_0, g \rangle

    with q the dual norm (Wang et al. 2019, eq. 4; the paper has p = inf). Zero at a stationary point. NaN gradient
    coordinates count as zero. Returns (B,) float32. Arguments as in :func:`pgd_step`.
    """
    x, x0, grad, p, _ = _checked(x, x0, grad, norm, None)
    eps_p = ck.check_parameter(eps, "eps", x, p)
    ck.check_finite(eps_p, "eps", _NO_FOSC)
    return op.fosc(x, x0, grad, *eps_p, NORM_CODE[p])


def pgd_step_fosc(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    threshold: float,
    norm: float | str = INF,
    clip: Clip = (0.0, 1.0),
    active: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Update, criterion and mask of dynamic adversarial training (Wang et al. 2019, algorithm 1) in one pass.

    Computes the criterion :func:`fosc` at the incoming x, and moves by :func:`pgd_step` the examples that are
    ``active`` and whose criterion is above ``threshold`` (the paper's c_t): an example stops where its criterion has
    fallen to it. Without ``active``, in the first call, all move: the algorithm starts with V = 1, whatever the
    criterion of the start. Feed the mask back::

        x, active = start, None
        for _ in range(steps):
            x, value, active = pgd_step_fosc(x, x0, gradient(x), step_size, eps, threshold, active=active)

    An example that the mask has left does not move again, and its gradient is not needed any more. (The algorithm is
    printed with V = 1 where c <= c_t, against its own comment; meant is c > c_t.)

    Returns:
        (x', fosc (B,), active (B,) bool: who moved in this call); x' is ``out`` where given. Other arguments as in
        :func:`pgd_step`.
    """
    x, x0, grad, p, box = _checked(x, x0, grad, norm, clip)
    step_p, eps_p = ck.check_parameter(step_size, "step_size", x, p), ck.check_parameter(eps, "eps", x, p)
    ck.check_finite(eps_p, "eps", _NO_FOSC)
    level = ck.check_number(threshold, "threshold")
    active = ck.check_active(active, x)
    if out is not None:
        out = _check_out(out, x, x0=x0, grad=grad, step_size=step_p.tensor, eps=eps_p.tensor, active=active)
    if isinstance(box, Box):
        value = op.fosc(x, x0, grad, *eps_p, NORM_CODE[p])
        moves = torch.ones_like(value, dtype=torch.bool) if active is None else active & (value > level)
        return _step(x, x0, grad, step_p, eps_p, p, box, moves, True, out), value, moves
    args = (x, x0, grad, *step_p, *eps_p, level, NORM_CODE[p], *box, active)
    return _with_out(op.pgd_step_fosc, op.pgd_step_fosc_out, args, out)


def atas_step(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    v: Tensor,
    step_size: float | Tensor,
    eps: float | Tensor,
    norm: float | str = INF,
    clip: Clip = (0.0, 1.0),
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
    x, x0, grad, p, box = _checked(x, x0, grad, norm, clip)
    v = ck.need_dense(v, "v")
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
    active = ck.check_active(active, x)
    if out is not None:
        out = _check_out(out, x, x0=x0, grad=grad, v=v, step_size=step_p.tensor, eps=eps_p.tensor, active=active)
    state = (b, constant, variant == "authors", low, high, active)
    if isinstance(box, Box):
        moved, v_out, alpha = op.atas_step(x, x0, grad, v, *step_p, *eps_p, NORM_CODE[p], -INF, INF, *state)
        own = p == 1 or x.dtype == torch.float64  # else what moved needs clipping alone
        length = ck.Parameter(alpha, 0.0)
        y = _box.step(x, x0, grad, length, eps_p, p, box, active) if own else _box.clip(moved, x, box, active)
        return (y if out is None else _copy_into(out, y)), v_out, alpha
    args = (x, x0, grad, v, *step_p, *eps_p, NORM_CODE[p], *box, *state)
    return _with_out(op.atas_step, op.atas_step_out, args, out)
