"""Fused steps of projected gradient descent and its relatives, one kernel each, on CPU and CUDA."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..reference import pgd as reference
from . import _checks as ck
from ._library import define, nothing_intercepts, require_cuda_build, stream_of

INF = math.inf
_NORM_CODE = {INF: 0, 2.0: 1, 1.0: 2}
_CODE_NORM = (INF, 2.0, 1.0)
_GRAD_CODE = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}
_GRADS = (torch.float32, torch.float16, torch.bfloat16)
_AUTHORS_RANGE = (4 / 255, 14 / 255)
_FLOAT = torch.float32
_linf_step = _C.pgd_linf_step
_increment_version = torch._C._increment_version  # what torch.autograd.graph.increment_version calls; torch 2.6 has it


# ---- kernels: dense tensors in, the compiled module called ----


def _param(
    tensor: Tensor | None, value: float, x: Tensor, fmt: torch.memory_format
) -> tuple[tuple[int, float, int], Any]:
    """(address, value, per) for the compiled module, and the tensor to keep alive."""
    if tensor is None:
        return (0, value, 0), None
    if tensor.dim() == 1 and tensor.shape[0] == x.shape[0]:
        t = tensor.contiguous()
        return (t.data_ptr(), 0.0, 1), t
    t = ck.lay_out(tensor, fmt)
    return (t.data_ptr(), 0.0, 2), t


def _per_value(tensor: Tensor | None, value: float) -> float | Tensor:
    return value if tensor is None else tensor


def _clip(lo: float, hi: float) -> tuple[float, float]:
    return (lo, hi)


def _examples(x: Tensor) -> int:
    return math.prod(x.shape[1:])


def _call(
    x: Tensor,
    x0: Tensor,
    grad: Tensor | None,
    step: tuple[Tensor | None, float],
    eps: tuple[Tensor | None, float],
    norm: int,
    lo: float,
    hi: float,
    active: Tensor | None,
    normalize: bool,
    out: Tensor | None,
    fmt: torch.memory_format,
    fosc: Any = None,
    atas: Any = None,
) -> None:
    """x, x0, grad and out are dense in fmt."""
    require_cuda_build(x.device)
    device, stream = stream_of(x.device)
    batch, n = x.shape[0], _examples(x)
    step_args, keep_step = _param(*step, x, fmt)
    eps_args, keep_eps = _param(*eps, x, fmt)
    keep_active = None if active is None else active.contiguous()
    workspace = None
    if device >= 0 and (norm != 0 or fosc is not None or atas is not None):
        workspace = torch.empty(_C.pgd_workspace_doubles(batch, n), dtype=torch.float64, device=x.device)
    _C.pgd_step(
        device,
        stream,
        x.data_ptr(),
        x0.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if out is None else out.data_ptr(),
        batch,
        n,
        norm,
        0 if grad is None else _GRAD_CODE[grad.dtype],
        step_args,
        eps_args,
        lo,
        hi,
        0 if keep_active is None else keep_active.data_ptr(),
        normalize,
        fosc,
        atas,
        0 if workspace is None else workspace.data_ptr(),
    )
    del keep_step, keep_eps, keep_active, workspace


def _format(x: Tensor) -> torch.memory_format:
    return ck.dense_format(x) or torch.contiguous_format


def _step_kernel(
    x: Tensor, x0: Tensor, grad: Tensor | None, step_t: Tensor | None, step: float, eps_t: Tensor | None, eps: float,
    norm: int, lo: float, hi: float, active: Tensor | None, normalize: bool, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if x.dtype == torch.float64:
        p, clip, radius = _CODE_NORM[norm], _clip(lo, hi), _per_value(eps_t, eps)
        if grad is None:
            y = reference.project(x, x0, radius, p, clip)
        else:
            y = reference.pgd_step(x, x0, grad, _per_value(step_t, step), radius, p, clip, active, normalize)
        return y if out is None else out.copy_(y)
    fmt = _format(x)
    x_, x0_ = ck.lay_out(x, fmt), ck.lay_out(x0, fmt)
    grad_ = None if grad is None else ck.lay_out(grad, fmt)
    direct = out is not None and not out.is_neg() and out.is_contiguous(memory_format=fmt)
    target = out if direct else torch.empty_like(x_, memory_format=fmt)
    assert target is not None
    _call(x_, x0_, grad_, (step_t, step), (eps_t, eps), norm, lo, hi, active, normalize, target, fmt)
    return target if out is None or direct else out.copy_(target)


def _like(x: Tensor) -> Tensor:
    """What an op that keeps x's layout returns."""
    return torch.empty_like(x, memory_format=_format(x))


_STEP_ARGS = (
    "Tensor x, Tensor x0, Tensor? grad, Tensor? step_t, float step, Tensor? eps_t, float eps, "
    "int norm, float lo, float hi, Tensor? active, bool normalize"
)
_pgd_step = define("pgd_step", f"({_STEP_ARGS}) -> Tensor", _step_kernel, lambda x, *args: _like(x))


def _step_out_kernel(*args: Any) -> None:
    _step_kernel(*args)


_pgd_step_out = define("pgd_step_out", f"({_STEP_ARGS}, Tensor(a!) out) -> ()", _step_out_kernel, lambda *args: None)


def _fosc_kernel(x: Tensor, x0: Tensor, grad: Tensor, eps_t: Tensor | None, eps: float, norm: int) -> Tensor:
    if x.dtype == torch.float64:
        return reference.fosc(x, x0, grad, _per_value(eps_t, eps), _CODE_NORM[norm])
    fmt = _format(x)
    value = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
    x_, x0_, grad_ = (ck.lay_out(t, fmt) for t in (x, x0, grad))
    _call(
        x_,
        x0_,
        grad_,
        (None, 0.0),
        (eps_t, eps),
        norm,
        -INF,
        INF,
        None,
        True,
        None,
        fmt,
        fosc=(value.data_ptr(), 0, 0.0),
    )
    return value


_fosc = define(
    "fosc",
    "(Tensor x, Tensor x0, Tensor grad, Tensor? eps_t, float eps, int norm) -> Tensor",
    _fosc_kernel,
    lambda x, *args: x.new_empty(x.shape[0]),
)


def _step_fosc_kernel(
    x: Tensor, x0: Tensor, grad: Tensor, step_t: Tensor | None, step: float, eps_t: Tensor | None, eps: float,
    threshold: float, norm: int, lo: float, hi: float, active: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return reference.pgd_step_fosc(
            x,
            x0,
            grad,
            _per_value(step_t, step),
            _per_value(eps_t, eps),
            threshold,
            _CODE_NORM[norm],
            _clip(lo, hi),
            active,
        )
    fmt = _format(x)
    value = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
    keep = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    out = torch.empty_like(x, memory_format=fmt)
    x_, x0_, grad_ = (ck.lay_out(t, fmt) for t in (x, x0, grad))
    outputs = (value.data_ptr(), keep.data_ptr(), threshold)
    _call(x_, x0_, grad_, (step_t, step), (eps_t, eps), norm, lo, hi, active, True, out, fmt, fosc=outputs)
    return out, value, keep


_pgd_step_fosc = define(
    "pgd_step_fosc",
    "(Tensor x, Tensor x0, Tensor grad, Tensor? step_t, float step, Tensor? eps_t, float eps, float threshold, "
    "int norm, float lo, float hi, Tensor? active) -> (Tensor, Tensor, Tensor)",
    _step_fosc_kernel,
    lambda x, *args: (_like(x), x.new_empty(x.shape[0]), x.new_empty(x.shape[0], dtype=torch.bool)),
)


def _atas_kernel(
    x: Tensor, x0: Tensor, grad: Tensor, v: Tensor, step_t: Tensor | None, step: float, eps_t: Tensor | None, eps: float,
    norm: int, lo: float, hi: float, beta: float, c: float, authors: bool, min_step: float, max_step: float,
    active: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        return reference.atas_step(
            x, x0, grad, v, _per_value(step_t, step), _per_value(eps_t, eps), _CODE_NORM[norm], _clip(lo, hi),
            beta, c, "authors" if authors else "paper", (min_step, max_step), active,
        )  # fmt: skip
    fmt = _format(x)
    out = torch.empty_like(x, memory_format=fmt)
    v_, v_out, step_out = v.contiguous(), torch.empty_like(v), torch.empty_like(v)
    x_, x0_, grad_ = (ck.lay_out(t, fmt) for t in (x, x0, grad))
    state = (v_.data_ptr(), v_out.data_ptr(), step_out.data_ptr(), beta, c, authors, min_step, max_step)
    _call(x_, x0_, grad_, (step_t, step), (eps_t, eps), norm, lo, hi, active, True, out, fmt, atas=state)
    return out, v_out, step_out


_atas_step = define(
    "atas_step",
    "(Tensor x, Tensor x0, Tensor grad, Tensor v, Tensor? step_t, float step, Tensor? eps_t, float eps, int norm, "
    "float lo, float hi, float beta, float c, bool authors, float min_step, float max_step, Tensor? active) "
    "-> (Tensor, Tensor, Tensor)",
    _atas_kernel,
    lambda x, x0, grad, v, *args: (_like(x), torch.empty_like(v), torch.empty_like(v)),
)


def _random_start_kernel(
    x0: Tensor, eps_t: Tensor | None, eps: float, norm: int, lo: float, hi: float, seed: int, first_example: int
) -> Tensor:
    if x0.dtype == torch.float64:
        return reference.random_start(x0, _per_value(eps_t, eps), _CODE_NORM[norm], _clip(lo, hi), seed, first_example)
    require_cuda_build(x0.device)
    device, stream = stream_of(x0.device)
    x0_ = x0.resolve_neg().contiguous()  # numbers belong to logical positions, whatever the strides
    out = torch.empty_like(x0_)
    eps_args, keep = _param(eps_t, eps, x0_, torch.contiguous_format)
    workspace = torch.empty(x0.shape[0] if device >= 0 and norm != 0 else 0, dtype=torch.int64, device=x0.device)
    _C.pgd_random_start(
        device, stream, x0_.data_ptr(), out.data_ptr(), x0.shape[0], _examples(x0), norm, eps_args, lo, hi,
        seed & 0xFFFFFFFFFFFFFFFF, first_example, workspace.data_ptr(),
    )  # fmt: skip
    del keep, workspace
    return out.contiguous(memory_format=_format(x0))


_random_start = define(
    "random_start",
    "(Tensor x0, Tensor? eps_t, float eps, int norm, float lo, float hi, int seed, int first_example) -> Tensor",
    _random_start_kernel,
    lambda x0, *args: _like(x0),
)


# ---- public functions: checks, then the op ----


def _checked(x: Any, x0: Any, grad: Any, norm: Any, clip: Any) -> tuple[Tensor, Tensor, Tensor, float, float, float]:
    p = ck.parse_norm(norm)
    lo, hi = ck.parse_clip(clip)
    x = ck.check_state(x, "x")
    x0 = ck.check_like(x0, "x0", x, "x")
    grad = ck.check_like(grad, "grad", x, "x", _GRADS if x.dtype == torch.float32 else (*_GRADS, torch.float64))
    return x, x0, grad, p, lo, hi


def _check_out(out: Any, x: Tensor, x0: Tensor, grad: Tensor | None) -> Tensor:
    out = ck.check_like(out, "out", x, "x")
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
        norm == INF
        and active is None
        and type(step_size) is float
        and type(eps) is float
        and step_size >= 0.0
        and eps >= 0.0
        and type(clip) is tuple
        and nothing_intercepts()
        and _is_simple(x)
        and _is_simple(x0)
        and _is_simple(grad)
    ):
        lo, hi = clip
        target = torch.empty_like(x) if out is None else out
        shape = x.shape
        if (
            lo <= hi
            and _is_simple(target)
            and shape == x0.shape
            and shape == grad.shape
            and shape == target.shape
            and shape
        ):
            px, p0, pg, pt = x.data_ptr(), x0.data_ptr(), grad.data_ptr(), target.data_ptr()
            if (pt != p0 and pt != pg) or not pt:
                _linf_step(px, p0, pg, pt, x.numel(), -step_size if targeted else step_size, eps, lo, hi)
                if out is not None:
                    _increment_version((out,))
                return target
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
    args = (x, x0, grad, *step_p, *eps_p, _NORM_CODE[p], lo, hi, active, normalize)
    if out is None:
        return _pgd_step(*args)
    _pgd_step_out(*args, out)
    _bump(out)
    return out


def _is_simple(t: Any) -> bool:
    """A dense float32 CPU tensor whose memory holds its values."""
    return type(t) is Tensor and t.dtype is _FLOAT and t.is_cpu and t.is_contiguous() and not t.is_neg()


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
    args = (x, x0, None, None, 0.0, *eps_p, _NORM_CODE[p], lo, hi, None, True)
    if out is None:
        return _pgd_step(*args)
    out = _check_out(out, x, x0, None)
    _pgd_step_out(*args, out)
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
        eps: radius: a number, (B,), or for norm inf a tensor of x0's shape.
        norm, clip: as in :func:`pgd_step`.
        seed: 64-bit key. None draws one from torch's default generator (so ``torch.manual_seed`` governs it).
        first_example: number of the first example, to draw a batch in parts.
    """
    p = ck.parse_norm(norm)
    lo, hi = ck.parse_clip(clip)
    x0 = ck.check_state(x0, "x0")
    eps_p = ck.check_parameter(eps, "eps", x0, p)
    if seed is None:
        seed = int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64).item())
    if isinstance(seed, bool) or not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"seed: got {ck.describe(seed)}, expected an integer or None")
    return _random_start(x0, *eps_p, _NORM_CODE[p], lo, hi, seed, first_example)


def fosc(x: Tensor, x0: Tensor, grad: Tensor, eps: float | Tensor, norm: float | str = INF) -> Tensor:
    r"""First-order stationary condition: how far the inner maximisation is from converged.

    .. math:: c(x) = \max_{\|z - x_0\|_p \le eps} \langle z - x, g \rangle = eps \|g\|_q - \langle x - x_0, g \rangle

    with q the dual norm (Wang et al. 2019, eq. 4; the paper has p = inf). Zero at a stationary point. NaN gradient
    coordinates count as zero. Returns (B,) float32. Arguments as in :func:`pgd_step`.
    """
    x, x0, grad, p, _, _ = _checked(x, x0, grad, norm, None)
    return _fosc(x, x0, grad, *ck.check_parameter(eps, "eps", x, p), _NORM_CODE[p])


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
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Update, criterion and mask of dynamic adversarial training (Wang et al. 2019, algorithm 1) in one pass.

    Moves the examples that are ``active`` (all, when None) by :func:`pgd_step`, computes the criterion
    :func:`fosc` at the incoming x, and returns ``active & (fosc > threshold)`` for the next step: an example stops when
    its criterion has fallen to ``threshold`` (the paper's c_t).

    Returns:
        (x', fosc (B,), active (B,) bool). Other arguments as in :func:`pgd_step`.
    """
    x, x0, grad, p, lo, hi = _checked(x, x0, grad, norm, clip)
    step_p, eps_p = ck.check_parameter(step_size, "step_size", x, p), ck.check_parameter(eps, "eps", x, p)
    level = ck.check_number(threshold, "threshold")
    return _pgd_step_fosc(x, x0, grad, *step_p, *eps_p, level, _NORM_CODE[p], lo, hi, ck.check_active(active, x))


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
        (x', v' (B,), alpha (B,)). Examples that are not ``active`` keep x and v. Other arguments as in :func:`pgd_step`.
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
    low, high = ck.parse_clip(limits)
    return _atas_step(
        x, x0, grad, v, *step_p, *eps_p, _NORM_CODE[p], lo, hi, b, constant, variant == "authors", low, high,
        ck.check_active(active, x),
    )  # fmt: skip
