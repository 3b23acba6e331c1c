"""Products of rows with weights, by the fastest engine: our kernel or one of torch's two."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _C
from .._library import nothing_intercepts
from ._rows import address, native

_VARIANT = _C.cpu_variant()
_WIDE = _VARIANT == "v4"
_MOST_COUNT = 2048  # numbers in a sum, of our kernel: a packed panel stays in the second cache


def product(a: Tensor, weight: Tensor) -> Tensor:
    """a @ weight for rows a (R, K) and weight (K, N), recorded."""
    if torch.is_grad_enabled() and (a.requires_grad or weight.requires_grad) and a.is_cpu and nothing_intercepts():
        out: Tensor = _Product.apply(a, weight)
        return out
    return matrix_product(a, weight)


def product_with_transpose(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ weight.t() + bias for rows a (R, K) and weight (N, K), not recorded."""
    if _ours(a, weight.t()):
        out = matrix_product(a, weight.t())
        return out if bias is None else out.add_(bias)
    count, k = a.shape
    if not (_large(a) and weight.shape[0] >= 32):
        return F.linear(a, weight, bias)
    out = F.conv2d(_as_line(a), weight.contiguous().view(weight.shape[0], k, 1, 1), bias)
    return out.permute(0, 2, 3, 1).reshape(count, weight.shape[0])


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a (R, K) and b (K, N), not recorded. With AVX-512, large ones outside our kernel run as the adjoint of
    a 1 x 1
    convolution: oneDNN uses AVX-512 on every processor that has it, the matrix library behind ``@`` only on some (twice
    as fast there). Without it, ``@`` is the faster one."""
    (count, k), n = a.shape, b.shape[1]
    if _ours(a, b):
        own = a.new_empty(count, n)
        _C.bounds_product(a.data_ptr(), b.data_ptr(), own.data_ptr(), count, k, n, (*a.stride(), *b.stride()))
        return own
    if not (_large(a) and n >= 32):
        return a @ b
    out = F.conv_transpose2d(_as_line(a), b.contiguous().view(k, n, 1, 1))
    return out.permute(0, 2, 3, 1).reshape(count, n)


def sign_product(
    x: Tensor,
    b: Tensor,
    scale: Tensor,
    out: Tensor,
    b_scale: Tensor | None = None,
    base: tuple[Tensor, Tensor, Tensor] | None = None,
) -> bool:
    """out = scale * (x.sign() @ (b_scale * b)) for x (R, K), b (K, N) and out (R, N), one stride of each 1, scale (R,)
    and b_scale (K,).
    base: (matrix, factor, row), to which factor[i] * matrix[row[i]] is added in out[i]. float32 on the CPU. False, and
    nothing is written, where x has a NaN or more single zeros than pay."""
    (count, k), n = x.shape, b.shape[1]
    bases = (0, 0, 0) if base is None else tuple(t.data_ptr() for t in base)
    done: bool = _C.bounds_sign_product(
        x.data_ptr(),
        b.data_ptr(),
        address(b_scale),
        scale.data_ptr(),
        bases,
        out.data_ptr(),
        count,
        k,
        n,
        (*x.stride(), *b.stride(), *out.stride()),
    )
    return done


def _ours(a: Tensor, b: Tensor) -> bool:
    """Whether the kernel is the fastest: packing b pays from some rows on; with AVX2, ``@`` is better at rows that lie
    apart."""
    return (
        (_WIDE or (_VARIANT == "v3" and a.stride(1) == 1))
        and a.is_cpu
        and native(a)
        and 0 < a.shape[1] <= _MOST_COUNT
        and a.shape[0] >= 8
        and a.shape[0] * b.shape[1] >= 4096
        and 1 in b.stride()
        and not a.is_neg()
        and not b.is_neg()
        and nothing_intercepts()
        and not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad))
    )


class _Product(torch.autograd.Function):
    """The gradients of ``product`` are products, too."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(a, weight)
        return product(a, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        a, weight = ctx.saved_tensors
        to_a = product_with_transpose(g, weight) if ctx.needs_input_grad[0] else None
        return to_a, product(a.t(), g) if ctx.needs_input_grad[1] else None


def _large(a: Tensor) -> bool:
    """Whether a convolution serves. torch takes smaller inputs of a transposed one by a way of its own, which is slower
    than ``@``."""
    large = a.shape[0] >= 64 and a.shape[1] >= 32 and a.numel() > 20480
    return bool(_WIDE and large and a.is_cpu and native(a) and _mkldnn())


def _as_line(a: Tensor) -> Tensor:
    """Rows (R, K) as an image (1, K, R, 1), channels last."""
    return a.contiguous().view(1, a.shape[0], 1, a.shape[1]).permute(0, 3, 1, 2)


def _mkldnn() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
