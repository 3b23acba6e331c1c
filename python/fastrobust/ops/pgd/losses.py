"""Attack losses: value and gradient with respect to the logits in one pass, on CPU and CUDA."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from ...reference import losses as reference
from .. import _checks as ck
from .._library import below_autograd, define, is_transformed, nothing_intercepts, require_cuda_build, stream_of


class LossValue(NamedTuple):
    """``value`` (B,), differentiable with respect to the logits, as often as wanted; ``grad`` (B, K) its gradient, one
    row per example, a constant to autograd."""

    value: Tensor
    grad: Tensor


_KINDS = {"cross_entropy": 0, "margin_loss": 1, "dlr_loss": 2, "dlr_targeted_loss": 3, "kl_divergence": 4}


def _reference(name: str, logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    return getattr(reference, name)(logits, *others), reference.gradient(name, logits, *others)


def _launch(name: str, logits: Tensor, first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return _reference(name, logits, first, *(() if second is None else (second,)))
    require_cuda_build(logits.device)
    device, stream = stream_of(logits.device)
    z = logits.resolve_neg().contiguous()
    first = first.resolve_neg().contiguous()
    second = None if second is None else second.contiguous()
    value = torch.empty(z.shape[0], dtype=z.dtype, device=z.device)
    grad = torch.empty_like(z)
    kl = name == "kl_divergence"
    _C.pgd_loss(
        device, stream, _KINDS[name], z.data_ptr(), first.data_ptr() if kl else 0, 0 if kl else first.data_ptr(),
        0 if second is None else second.data_ptr(), value.data_ptr(), grad.data_ptr(), z.shape[0], z.shape[1],
    )  # fmt: skip
    return value, grad


class _Loss(torch.autograd.Function):
    """Backward is one product with the gradient that the forward computed; where it is recorded itself (create_graph),
    that gradient comes from its formula, which can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, name: str, logits: Tensor, first: Tensor, second: Tensor | None) -> tuple[Tensor, Tensor]:
        others = (first,) if second is None else (first, second)
        value, grad = below_autograd(_OPS[name].op, logits, *others)
        ctx.mark_non_differentiable(grad)
        ctx.save_for_backward(grad, logits, first, second)
        ctx.name = name
        return value, grad

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad, logits, first, second = ctx.saved_tensors
        to_logits = to_reference = None
        if ctx.needs_input_grad[1]:
            recorded = torch.is_grad_enabled()
            grad = reference.gradient(ctx.name, logits, first, second) if recorded else grad
            to_logits = upstream[:, None] * grad
        if ctx.needs_input_grad[2]:  # KL: d/dr_j = p_j (log p_j - log q_j - KL)
            log_p = torch.log_softmax(first, 1)
            p, ratio = log_p.exp(), log_p - torch.log_softmax(logits, 1)
            to_reference = upstream[:, None] * p * (ratio - (p * ratio).sum(1, keepdim=True))
        return None, to_logits, to_reference, None


def _define(name: str, schema: str) -> Any:
    def kernel(logits: Tensor, first: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _launch(name, logits, first, second)

    def fake(logits: Tensor, first: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return logits.new_empty(logits.shape[0]), logits.new_empty(logits.shape)

    def autograd(logits: Tensor, first: Tensor, second: Tensor | None = None) -> tuple[Tensor, Tensor]:
        others = (first,) if second is None else (first, second)
        if is_transformed():
            return _by_formulas(name, logits, *others)
        if torch.is_grad_enabled() and (logits.requires_grad or first.requires_grad):
            return _Loss.apply(name, logits, first, second)
        return below_autograd(_OPS[name].op, logits, *others)

    return define(name, schema, kernel, fake, autograd)


def _by_formulas(name: str, logits: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
    """In torch's own operations, for torch.func's transforms and forward mode, which know those."""
    value, grad = _reference(name, logits, *others)
    return value, grad.detach()


def _value_and_grad(name: str, logits: Tensor, *others: Tensor) -> LossValue:
    call = _OPS[name] if torch.compiler.is_compiling() or not is_transformed() else partial(_by_formulas, name)
    return LossValue(*call(logits, *others))


_LABELS = "(Tensor logits, Tensor labels) -> (Tensor, Tensor)"
_OPS = {name: _define(name, _LABELS) for name in ("cross_entropy", "margin_loss", "dlr_loss")}
_OPS["dlr_targeted_loss"] = _define(
    "dlr_targeted_loss", "(Tensor logits, Tensor labels, Tensor targets) -> (Tensor, Tensor)"
)
_OPS["kl_divergence"] = _define("kl_divergence", "(Tensor logits, Tensor reference) -> (Tensor, Tensor)")


def _logits(logits: Any, least: int, name: str) -> Tensor:
    logits = ck.need_dense(logits, "logits")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits: got {ck.describe(logits)}, expected a floating-point tensor")
    if logits.dim() != 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, expected (batch, classes)")
    if logits.shape[1] < least:
        raise ValueError(f"logits: got {logits.shape[1]} classes, expected at least {least} for {name}")
    return logits if logits.dtype == torch.float64 else logits.float()


def _labels(labels: Any, name: str, logits: Tensor, check: bool) -> Tensor:
    classes = (
        logits.shape[1]
        if check and logits.device.type == "cpu" and isinstance(labels, Tensor) and ck.has_values(labels)
        else None
    )
    return ck.check_labels(labels, name, logits.shape[0], classes, logits.device).long()


def _evaluate(name: str, least: int, few: str, logits: Any, labels: Any, targets: Any, check: bool) -> LossValue:
    # The inner loop of an attack takes the short way: dense float32 on the CPU, labels known to be valid.
    if not check and nothing_intercepts() and _is_plain(logits, torch.float32) and _is_plain(labels, torch.int64):
        shape = logits.shape
        wanted = logits.requires_grad and torch.is_grad_enabled()
        both = targets is None or (_is_plain(targets, torch.int64) and targets.shape == shape[:1])
        if both and not wanted and len(shape) == 2 and shape[1] >= least and labels.shape == shape[:1]:
            value, grad = logits.new_empty(shape[0]), torch.empty_like(logits)
            second = 0 if targets is None else targets.data_ptr()
            _C.pgd_loss(
                -1, 0, _KINDS[name], logits.data_ptr(), 0, labels.data_ptr(), second, value.data_ptr(), grad.data_ptr(),
                *shape,
            )  # fmt: skip
            return LossValue(value, grad)
    z = _logits(logits, least, few)
    others = [_labels(labels, "labels", z, check)]
    if targets is not None:
        others.append(_labels(targets, "targets", z, check))
    return _value_and_grad(name, z, *others)


def agrees(logits: Tensor, labels: Tensor, wanted: bool = True) -> Tensor:
    """``(logits.argmax(1) == labels) == wanted``, (B,) bool, in one kernel: what an attack asks after every pass. A
    label that is no class is never the largest."""
    device = logits.device
    if (
        logits.dtype is not torch.float32 or labels.dtype is not torch.int64 or labels.device != device
        or not logits.is_contiguous() or not labels.is_contiguous() or not nothing_intercepts()
        or type(logits) is not Tensor or logits.is_neg() or not (logits.is_cpu or logits.is_cuda)
    ):  # fmt: skip
        right = logits.argmax(1) == labels
        return right if wanted else ~right
    require_cuda_build(device)
    out = torch.empty(labels.shape, dtype=torch.bool, device=device)
    _C.pgd_agrees(
        *stream_of(device), logits.data_ptr(), labels.data_ptr(), wanted, out.data_ptr(), *logits.shape
    )  # fmt: skip
    return out


def _is_plain(t: Any, dtype: torch.dtype) -> bool:
    return type(t) is Tensor and t.dtype is dtype and t.is_cpu and t.is_contiguous() and not t.is_neg()


def cross_entropy(logits: Tensor, labels: Tensor, *, check: bool = True) -> LossValue:
    r"""``log sum_j exp(z_j) - z_y`` per example, and its gradient ``softmax(z) - e_y``, in one pass.

    Args:
        logits: (B, K); float16 and bfloat16 are widened to float32 first.
        labels: (B,) class indices, 0 to K - 1. Their values are checked on the CPU (``check=False`` skips it); on a GPU
            that would stop the device.

    Returns:
        :class:`LossValue`: ``value`` (B,) is differentiable with respect to the logits, twice and more too
        (input-gradient penalties), by autograd and by ``torch.func``; ``grad`` (B, K) is constant. A row with a NaN
        logit has a NaN value and gradient, which the steps take for zero.
    """
    return _evaluate("cross_entropy", 1, "cross_entropy", logits, labels, None, check)


def margin_loss(logits: Tensor, labels: Tensor, *, check: bool = True) -> LossValue:
    r"""CW margin ``max_{j != y} z_j - z_y`` (Carlini and Wagner 2017): positive when misclassified.

    At ties the lowest class index takes the gradient. Needs two classes. Arguments as in :func:`cross_entropy`.
    """
    return _evaluate("margin_loss", 2, "margin_loss", logits, labels, None, check)


def dlr_loss(logits: Tensor, labels: Tensor, *, check: bool = True) -> LossValue:
    r"""Difference of logits ratio ``-(z_y - max_{j != y} z_j) / (z_(1) - z_(3) + 1e-12)`` (Croce and Hein 2020).

    Invariant to shifting and scaling the logits. Needs three classes. Arguments as in :func:`cross_entropy`.
    """
    return _evaluate("dlr_loss", 3, "dlr_loss; use margin_loss for fewer", logits, labels, None, check)


def dlr_targeted_loss(logits: Tensor, labels: Tensor, targets: Tensor, *, check: bool = True) -> LossValue:
    r"""``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)`` (Croce and Hein 2020), ascended towards class t.

    Needs four classes. ``targets`` is (B,) like ``labels``.
    """
    few = "dlr_targeted_loss; use margin_loss for fewer"
    return _evaluate("dlr_targeted_loss", 4, few, logits, labels, ck.need_dense(targets, "targets"), check)


def kl_divergence(logits: Tensor, reference: Tensor) -> LossValue:
    r"""``KL(p || q) = sum_j p_j (log p_j - log q_j)`` with p = softmax(reference), q = softmax(logits).

    The inner objective of TRADES (thesis section 4.1.2): ``reference`` are the logits of the clean examples. ``grad``
    is ``q - p``, the gradient with respect to ``logits``; ``value`` is differentiable with respect to both.
    """
    z = _logits(logits, 1, "kl_divergence")
    r = ck.need_dense(reference, "reference")
    if r.shape != z.shape or r.device != z.device or not r.dtype.is_floating_point:
        raise ValueError(f"reference: got {ck.describe(r)}, expected logits of shape {tuple(z.shape)} on {z.device}")
    return _value_and_grad("kl_divergence", z, r.to(z.dtype))
