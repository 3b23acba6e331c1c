"""Registration of the store's ops: schemas, kernels over dense tensors, fakes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...reference import store as reference
from .. import _checks as ck
from .._library import below_autograd, define, first_order_only, require_cuda_build, stream_of

_WHOLE_LINE = (-float("inf"), float("inf"))


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def sizes_of(store: Tensor, x: Tensor, padding: int) -> tuple[int, ...]:
    return (store.shape[0], *x.shape, *store.shape[2:], padding)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=ck.dense_format(x) or torch.contiguous_format)


def _in_format_of(x: Tensor, y: Tensor) -> Tensor:
    return y.contiguous(memory_format=ck.dense_format(x) or torch.contiguous_format)


def _shift_flip_kernel(x: Tensor, offsets: Tensor | None, flips: Tensor | None, inverse: bool) -> Tensor:
    if x.dtype != torch.float32:  # values only move: any type
        return _in_format_of(x, reference.shift_flip(x, offsets, flips, inverse))
    require_cuda_build(x.device)
    x_ = ck.lay_out(x, torch.contiguous_format)
    out = torch.empty_like(x_)
    _C.store_gather(
        *stream_of(x.device), x_.data_ptr(), False, 0, sizes_of(x_, x_, 0), False, inverse, _address(offsets),
        _address(flips), 0, out.data_ptr(), 0, 0.0, *_WHOLE_LINE,
    )  # fmt: skip
    return _in_format_of(x, out)


class _ShiftFlip(torch.autograd.Function):
    """Linear: the gradient takes the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor | None, flips: Tensor | None, inverse: bool) -> Tensor:
        ctx.save_for_backward(offsets, flips)
        ctx.inverse = inverse
        result: Tensor = below_autograd(torch.ops.fastrobust.shift_flip.default, x, offsets, flips, inverse)
        return result

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        offsets, flips = ctx.saved_tensors
        return torch.ops.fastrobust.shift_flip.default(grad, offsets, flips, not ctx.inverse), None, None, None


shift_flip = define(
    "shift_flip",
    "(Tensor x, Tensor? offsets, Tensor? flips, bool inverse) -> Tensor",
    _shift_flip_kernel,
    lambda x, *args: _like(x),
    _ShiftFlip.apply,
)


def _gather_kernel(
    store: Tensor, index: Tensor, x: Tensor, offsets: Tensor | None, flips: Tensor | None, eps_t: Tensor | None,
    eps: float, lo: float, hi: float, padding: int, augment_first: bool,
) -> Tensor:  # fmt: skip
    if x.dtype == torch.float64:
        radius = eps if eps_t is None else eps_t
        moved = (offsets, flips, padding, augment_first)
        return _in_format_of(x, reference.gather(store, index, x, radius, float("inf"), (lo, hi), *moved))
    require_cuda_build(x.device)
    if not store.is_contiguous() or store.is_neg():
        store, index = store[index].contiguous().resolve_neg(), torch.arange(len(index), device=index.device)
    x_ = ck.lay_out(x, torch.contiguous_format)
    out, keep = torch.empty_like(x_), None if eps_t is None else eps_t.contiguous()
    _C.store_gather(
        *stream_of(x.device), store.data_ptr(), store.dtype == torch.float16, index.data_ptr(),
        sizes_of(store, x, padding), augment_first, False, _address(offsets), _address(flips), x_.data_ptr(),
        out.data_ptr(), _address(keep), eps, lo, hi,
    )  # fmt: skip
    return _in_format_of(x, out)


gather = define(
    "store_gather",
    "(Tensor store, Tensor index, Tensor x, Tensor? offsets, Tensor? flips, Tensor? eps_t, float eps, float lo, float "
    "hi, "
    "int padding, bool augment_first) -> Tensor",
    _gather_kernel,
    lambda store, index, x, *args: _like(x),
)


def _scatter_kernel(
    index: Tensor,
    adv: Tensor,
    x: Tensor,
    offsets: Tensor | None,
    flips: Tensor | None,
    padding: int,
    augment_first: bool,
    store: Tensor,
) -> None:
    if x.dtype == torch.float64:
        reference.scatter(store, index, adv, x, offsets, flips, padding, augment_first)
        return
    require_cuda_build(x.device)
    if not store.is_contiguous() or store.is_neg():
        dense = store.resolve_neg().contiguous()
        _scatter_kernel(index, adv, x, offsets, flips, padding, augment_first, dense)
        store.copy_(dense)
        return
    adv_, x_ = (ck.lay_out(t, torch.contiguous_format) for t in (adv, x))
    _C.store_scatter(
        *stream_of(x.device), store.data_ptr(), store.dtype == torch.float16, index.data_ptr(),
        sizes_of(store, x, padding), augment_first, _address(offsets), _address(flips), adv_.data_ptr(), x_.data_ptr(),
    )  # fmt: skip


scatter = define(
    "store_scatter",
    "(Tensor index, Tensor adv, Tensor x, Tensor? offsets, Tensor? flips, int padding, bool augment_first, "
    "Tensor(a!) store) -> ()",
    _scatter_kernel,
    lambda *args: None,
)
