"""Registration of the PGD ops: schemas, kernels over dense tensors, fakes. The public functions are in pgd.py."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...reference import pgd as reference
from .. import _checks as ck
from .._library import define, require_cuda_build, stream_of

INF = math.inf
NORM_CODE = {INF: 0, 2.0: 1, 1.0: 2}
_CODE_NORM = (INF, 2.0, 1.0)
_GRAD_CODE = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


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
    apgd: Any = None,
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
        apgd,
        0 if workspace is None else workspace.data_ptr(),
    )
    del keep_step, keep_eps, keep_active, workspace


def _format(x: Tensor) -> torch.memory_format:
    return ck.dense_format(x) or torch.contiguous_format


def _working_format(x: Tensor, norm: int) -> torch.memory_format:
    """The L1 step takes equal gradients in the order of their index: that order is the logical one."""
    return torch.contiguous_format if norm == NORM_CODE[1.0] else _format(x)


def _target(x: Tensor, out: Tensor | None, fmt: torch.memory_format) -> Tensor:
    """Where the kernel writes: out itself when it is dense in fmt."""
    if out is not None and not out.is_neg() and out.is_contiguous(memory_format=fmt):
        return out
    return torch.empty_like(x, memory_format=fmt)


def _deliver(target: Tensor, out: Tensor | None, x: Tensor | None = None) -> Tensor:
    """What is returned, or written to out; in x's format where target may have another."""
    if out is not None:
        return target if target is out else out.copy_(target)
    return target if x is None else target.contiguous(memory_format=_format(x))


def _reordered(x: Tensor, norm: int) -> Tensor | None:
    return x if norm == NORM_CODE[1.0] else None


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
        return _deliver(y, out, x)
    fmt = _working_format(x, norm)
    x_, x0_ = ck.lay_out(x, fmt), ck.lay_out(x0, fmt)
    grad_ = None if grad is None else ck.lay_out(grad, fmt)
    target = _target(x_, out, fmt)
    _call(x_, x0_, grad_, (step_t, step), (eps_t, eps), norm, lo, hi, active, normalize, target, fmt)
    return _deliver(target, out, _reordered(x, norm))


def _like(x: Tensor) -> Tensor:
    """What an op that keeps x's layout returns."""
    return torch.empty_like(x, memory_format=_format(x))


_STEP_ARGS = (
    "Tensor x, Tensor x0, Tensor? grad, Tensor? step_t, float step, Tensor? eps_t, float eps, "
    "int norm, float lo, float hi, Tensor? active, bool normalize"
)
pgd_step = define("pgd_step", f"({_STEP_ARGS}) -> Tensor", _step_kernel, lambda x, *args: _like(x))


def _step_out_kernel(*args: Any) -> None:
    _step_kernel(*args)


pgd_step_out = define("pgd_step_out", f"({_STEP_ARGS}, Tensor(a!) out) -> ()", _step_out_kernel, lambda *args: None)


_APGD_ARGS = (
    "Tensor x, Tensor previous, Tensor x0, Tensor grad, Tensor? step_t, float step, Tensor? eps_t, float eps, int "
    "norm, "
    "float lo, float hi, float momentum, Tensor? keep"
)


def apgd_kernel(
    x: Tensor,
    previous: Tensor,
    x0: Tensor,
    grad: Tensor,
    step_t: Tensor | None,
    step: float,
    eps_t: Tensor | None,
    eps: float,
    norm: int,
    lo: float,
    hi: float,
    momentum: float,
    keep: Tensor | None,
) -> Tensor:
    if x.dtype == torch.float64:
        y = reference.apgd_step(
            x,
            previous,
            x0,
            grad,
            _per_value(step_t, step),
            _per_value(eps_t, eps),
            _CODE_NORM[norm],
            _clip(lo, hi),
            momentum,
            keep,
        )
        return y.contiguous(memory_format=_format(x))
    fmt = _format(x)
    x_, x0_, grad_, previous_ = (ck.lay_out(t, fmt) for t in (x, x0, grad, previous))
    out = torch.empty_like(x_, memory_format=fmt)
    keep_ = None if keep is None else keep.contiguous()
    state = (previous_.data_ptr(), momentum, 1 - momentum, 0 if keep_ is None else keep_.data_ptr())
    _call(x_, x0_, grad_, (step_t, step), (eps_t, eps), norm, lo, hi, None, True, out, fmt, apgd=state)
    return out


apgd_step = define("apgd_step", f"({_APGD_ARGS}) -> Tensor", apgd_kernel, lambda x, *args: _like(x))


def ascent_note(value: Tensor, score: Tensor, sign: float, left: Tensor, left_grad: Tensor, *state: Tensor) -> None:
    """``reference.ascent_note`` in place; no op of torch's: nothing but the loop of Auto-PGD calls it, once a step."""
    if left.dtype == torch.float64:
        reference.ascent_note(value, score, sign, left, left_grad, *state)
        return
    device, stream = stream_of(left.device)
    left_, left_grad_ = left, left_grad
    if not (left.is_contiguous() and left_grad.is_contiguous() and state[0].is_contiguous()):
        fmt = _format(state[0])  # rows are copied as they lie
        left_, left_grad_ = ck.lay_out(left, fmt), ck.lay_out(left_grad, fmt)
    value_, score_ = value.contiguous(), score.contiguous()
    workspace = None if device < 0 else torch.empty(len(left), dtype=torch.uint8, device=left.device)
    _C.pgd_ascent(
        device, stream, value_.data_ptr(), score_.data_ptr(), sign, left_.data_ptr(), left_grad_.data_ptr(),
        tuple([t.data_ptr() for t in state]), left.shape[0], _examples(left),
        0 if workspace is None else workspace.data_ptr(),
    )  # fmt: skip
    del workspace


def ascent_check(needed: float, *state: Tensor) -> None:
    """``reference.ascent_check`` in place, of dense x and gradient in one format."""
    x = state[0]
    if x.dtype == torch.float64:
        reference.ascent_check(needed, *state)
        return
    device, stream = stream_of(x.device)
    workspace = None if device < 0 else torch.empty(len(x), dtype=torch.uint8, device=x.device)
    _C.pgd_ascent_check(
        device, stream, tuple([t.data_ptr() for t in state]), needed, len(x), _examples(x),
        0 if workspace is None else workspace.data_ptr(),
    )  # fmt: skip
    del workspace


def quick_apgd_step(
    x: Tensor, previous: Tensor, x0: Tensor, grad: Tensor, length: Tensor, eps: float, norm: float,
    box: tuple[float, float], momentum: float,
) -> Tensor | None:  # fmt: skip
    """``apgd_step`` of contiguous float32 tensors on the CPU, norms inf and 2, a length for each example; None for
    others."""
    out = torch.empty_like(x)
    done = _C.pgd_quick_apgd(x, previous, x0, grad, length, out, NORM_CODE[norm], eps, *box, momentum)
    return out if done else None


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


fosc = define(
    "fosc",
    "(Tensor x, Tensor x0, Tensor grad, Tensor? eps_t, float eps, int norm) -> Tensor",
    _fosc_kernel,
    lambda x, *args: x.new_empty(x.shape[0]),
)


_STEP_FOSC_ARGS = (
    "Tensor x, Tensor x0, Tensor grad, Tensor? step_t, float step, Tensor? eps_t, float eps, float threshold, "
    "int norm, float lo, float hi, Tensor? active"
)


def _step_fosc_kernel(
    x: Tensor, x0: Tensor, grad: Tensor, step_t: Tensor | None, step: float, eps_t: Tensor | None, eps: float,
    threshold: float, norm: int, lo: float, hi: float, active: Tensor | None, out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if x.dtype == torch.float64:
        y, value, keep = reference.pgd_step_fosc(
            x, x0, grad, _per_value(step_t, step), _per_value(eps_t, eps), threshold, _CODE_NORM[norm], _clip(lo, hi),
            active,
        )  # fmt: skip
        return _deliver(y, out, x), value, keep
    fmt = _working_format(x, norm)
    value = torch.empty(x.shape[0], dtype=x.dtype, device=x.device)
    keep = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    x_, x0_, grad_ = (ck.lay_out(t, fmt) for t in (x, x0, grad))
    target = _target(x_, out, fmt)
    outputs = (value.data_ptr(), keep.data_ptr(), threshold)
    _call(x_, x0_, grad_, (step_t, step), (eps_t, eps), norm, lo, hi, active, True, target, fmt, fosc=outputs)
    return _deliver(target, out, _reordered(x, norm)), value, keep


def _fosc_fakes(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0]), x.new_empty(x.shape[0], dtype=torch.bool)


pgd_step_fosc = define(
    "pgd_step_fosc",
    f"({_STEP_FOSC_ARGS}) -> (Tensor, Tensor, Tensor)",
    _step_fosc_kernel,
    lambda x, *args: (_like(x), *_fosc_fakes(x)),
)
pgd_step_fosc_out = define(
    "pgd_step_fosc_out",
    f"({_STEP_FOSC_ARGS}, Tensor(a!) out) -> (Tensor, Tensor)",
    lambda *args: _step_fosc_kernel(*args)[1:],
    lambda x, *args: _fosc_fakes(x),
)

_ATAS_ARGS = (
    "Tensor x, Tensor x0, Tensor grad, Tensor v, Tensor? step_t, float step, Tensor? eps_t, float eps, int norm, "
    "float lo, float hi, float beta, float c, bool authors, float min_step, float max_step, Tensor? active"
)


def _atas_kernel(
    x: Tensor,
    x0: Tensor,
    grad: Tensor,
    v: Tensor,
    step_t: Tensor | None,
    step: float,
    eps_t: Tensor | None,
    eps: float,
    norm: int,
    lo: float,
    hi: float,
    beta: float,
    c: float,
    authors: bool,
    min_step: float,
    max_step: float,
    active: Tensor | None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        y, v_out, step_out = reference.atas_step(
            x,
            x0,
            grad,
            v,
            _per_value(step_t, step),
            _per_value(eps_t, eps),
            _CODE_NORM[norm],
            _clip(lo, hi),
            beta,
            c,
            "authors" if authors else "paper",
            (min_step, max_step),
            active,
        )
        return _deliver(y, out, x), v_out, step_out
    fmt = _working_format(x, norm)
    v_, v_out, step_out = v.contiguous(), torch.empty_like(v), torch.empty_like(v)
    x_, x0_, grad_ = (ck.lay_out(t, fmt) for t in (x, x0, grad))
    target = _target(x_, out, fmt)
    state = (v_.data_ptr(), v_out.data_ptr(), step_out.data_ptr(), beta, c, authors, min_step, max_step)
    _call(x_, x0_, grad_, (step_t, step), (eps_t, eps), norm, lo, hi, active, True, target, fmt, atas=state)
    return _deliver(target, out, _reordered(x, norm)), v_out, step_out


atas_step = define(
    "atas_step",
    f"({_ATAS_ARGS}) -> (Tensor, Tensor, Tensor)",
    _atas_kernel,
    lambda x, x0, grad, v, *args: (_like(x), torch.empty_like(v), torch.empty_like(v)),
)
atas_step_out = define(
    "atas_step_out",
    f"({_ATAS_ARGS}, Tensor(a!) out) -> (Tensor, Tensor)",
    lambda *args: _atas_kernel(*args)[1:],
    lambda x, x0, grad, v, *args: (torch.empty_like(v), torch.empty_like(v)),
)


def _random_start_kernel(
    x0: Tensor, eps_t: Tensor | None, eps: float, norm: int, lo: float, hi: float, seed: int, first_example: int,
    drawn: Tensor | None = None, numbers: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if drawn is not None:  # in place of seed: in a graph the number is drawn when the graph runs
        seed = int(drawn.item())
    if x0.dtype == torch.float64:
        first = first_example if numbers is None else numbers
        return reference.random_start(x0, _per_value(eps_t, eps), _CODE_NORM[norm], _clip(lo, hi), seed, first)
    require_cuda_build(x0.device)
    device, stream = stream_of(x0.device)
    x0_ = x0.resolve_neg().contiguous()  # numbers belong to logical positions, whatever the strides
    out = torch.empty_like(x0_)
    eps_args, keep = _param(eps_t, eps, x0_, torch.contiguous_format)
    workspace = torch.empty(x0.shape[0] if device >= 0 and norm != 0 else 0, dtype=torch.int64, device=x0.device)
    _C.pgd_random_start(
        device, stream, x0_.data_ptr(), out.data_ptr(), x0.shape[0], _examples(x0), norm, eps_args, lo, hi,
        seed & 0xFFFFFFFFFFFFFFFF, first_example, 0 if numbers is None else numbers.data_ptr(), workspace.data_ptr(),
    )  # fmt: skip
    del keep, workspace
    return out.contiguous(memory_format=_format(x0))


random_start = define(
    "random_start",
    "(Tensor x0, Tensor? eps_t, float eps, int norm, float lo, float hi, int seed, int first_example, "
    "Tensor? drawn=None, Tensor? numbers=None) -> Tensor",
    _random_start_kernel,
    lambda x0, *args: _like(x0),
)
