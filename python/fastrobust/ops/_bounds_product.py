"""Products of rows with weights, by the faster of torch's two engines."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _C
from ._bounds_rows import native
from ._library import nothing_intercepts

_WIDE = _C.cpu_variant() == "v4"


def product(a: Tensor, weight: Tensor) -> Tensor:
    """a @ weight for rows a (R, K) and weight (K, N), recorded. Large ones on the CPU run as the adjoint of a 1 x 1 convolution:
    oneDNN uses AVX-512 on every processor that has it, the matrix library behind ``@`` only on some (twice as fast there)."""
    if torch.is_grad_enabled() and (a.requires_grad or weight.requires_grad) and a.is_cpu and nothing_intercepts():
        out: Tensor = _Product.apply(a, weight)
        return out
    count, k = a.shape
    if not (_large(a) and weight.shape[1] >= 32):
        return a @ weight
    out = F.conv_transpose2d(_as_line(a), weight.contiguous().view(k, weight.shape[1], 1, 1))
    return out.permute(0, 2, 3, 1).reshape(count, weight.shape[1])


def product_with_transpose(a: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ weight.t() + bias for rows a (R, K) and weight (N, K): ``product`` the other way."""
    count, k = a.shape
    if not (_large(a) and weight.shape[0] >= 32):
        return F.linear(a, weight, bias)
    out = F.conv2d(_as_line(a), weight.contiguous().view(weight.shape[0], k, 1, 1), bias)
    return out.permute(0, 2, 3, 1).reshape(count, weight.shape[0])


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a (R, K) and b (K, N) in any layout, not recorded; by our kernel where it is the faster."""
    if not (_WIDE and a.is_cpu and native(a)) or 1 not in b.stride():
        return product(a, b)
    out = a.new_empty(a.shape[0], b.shape[1])
    sizes = (*a.shape, b.shape[1])
    _C.bounds_product(a.data_ptr(), b.data_ptr(), out.data_ptr(), *sizes, (*a.stride(), *b.stride()))
    return out


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
    """torch takes smaller inputs of a transposed convolution by a way of its own, which is slower than ``@``."""
    return bool(a.is_cpu and native(a) and a.shape[0] >= 64 and a.shape[1] >= 32 and a.numel() > 20480 and _mkldnn())


def _as_line(a: Tensor) -> Tensor:
    """Rows (R, K) as an image (1, K, R, 1), channels last."""
    return a.contiguous().view(1, a.shape[0], 1, a.shape[1]).permute(0, 3, 1, 2)


def _mkldnn() -> bool:
    return bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
