"""Convolutions whose mask is chosen from scores, and the index lists kept between calls.

What trains scores need not raise their version: fused optimisers and writes through `.data` do not. So lists are kept
beside a copy of what they were made of, and are used again only while that is still what is there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from ...reference.binary import PackedWeight, straight_through
from .._library import below_autograd, define
from . import _feature_maps as fm
from . import convolution as binary
from . import masks
from ._dense_conv import memory_format
from ._feature_maps import ConvGeometry

# A tensor of at most this many bytes is compared whole, of a larger one as many bytes, in lines spread evenly.
COMPARED_BYTES = 1 << 14
_LINE = 64


class _Watched:
    """A tensor and a copy of what it held."""

    def __init__(self, t: Tensor) -> None:
        # Bits are compared faster as long words, of memory without gaps.
        parts = _words(t.detach())
        self.whole = [(part, part.clone()) for part in parts]
        count, words = COMPARED_BYTES // _LINE, parts[0]
        self.sample = self.whole
        if words.dtype == torch.int64 and words.numel() * 8 > COMPARED_BYTES:
            lines = words.as_strided((count, _LINE // 8), (words.numel() // count, 1))
            self.sample = [(lines, lines.clone())]

    def same(self, whole: bool) -> bool:
        return all(torch.equal(*pair) for pair in (self.whole if whole else self.sample))


def _words(t: Tensor) -> list[Tensor]:
    """The memory of t as int64, and what is left over as bytes; t itself where it has gaps or begins inside a word."""
    dense = t.is_contiguous() or t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)
    if not dense or t.storage_offset() * t.element_size() % 8:
        return [t]
    memory = t.as_strided((t.numel(),), (1,)).view(torch.uint8)
    whole = memory.numel() // 8 * 8
    left = memory[whole:]
    return [memory[:whole].view(torch.int64), *([left] if left.numel() else [])]


class _Steps:
    """How many steps all optimisers of the process have made."""

    count = 0


def _count_step(*_: Any) -> None:
    # Steps that are compiled raise versions, and must not be compiled anew for every count.
    if not torch.compiler.is_compiling():
        _Steps.count += 1


register_optimizer_step_post_hook(_count_step)


@dataclasses.dataclass
class _Made:
    """Lists and what they were made of."""

    key: tuple[Any, ...]
    scores: _Watched
    signs: _Watched
    packed: PackedWeight
    steps: int  # at which all of it was last compared


class KeptLists:
    """The index lists of signs * topk_mask(scores), made anew when what they were made of changed.

    A change is seen for certain when torch counts it (versions), when the memory is another, after any step of a
    torch.optim.Optimizer, and always with `whole`, which compares every entry. Otherwise a write past torch's counting
    is seen when it changes one of the entries that are compared (see COMPARED_BYTES); on CUDA, where comparing would
    stop the device, only `whole` and optimiser steps compare.
    """

    def __init__(self) -> None:
        self.made: _Made | None = None  # replaced as a whole: threads may share a model

    def get(self, scores: Tensor, signs: Tensor, keep: int, absolute: bool, whole: bool) -> PackedWeight | None:
        """The lists, or None when they have to be made."""
        made, steps = self.made, _Steps.count
        if made is None or made.key != _key(scores, signs, keep, absolute):
            return None
        whole = whole or steps != made.steps or scores.is_inference()
        if whole or scores.device.type == "cpu":
            if not (made.scores.same(whole) and made.signs.same(whole)):
                return None
            made.steps = steps
        return made.packed

    def put(self, scores: Tensor, signs: Tensor, keep: int, absolute: bool, mask: Tensor) -> PackedWeight:
        steps, packed = _Steps.count, masks.pack(signs * mask)
        with torch.inference_mode(False), torch.no_grad():
            watched = _Watched(scores), _Watched(signs)
        self.made = _Made(_key(scores, signs, keep, absolute), *watched, packed, steps)
        return packed

    def drop(self) -> None:
        self.made = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Derived data: copies and pickles make it anew.
        return KeptLists, ()


def _key(scores: Tensor, signs: Tensor, keep: int, absolute: bool) -> tuple[Any, ...]:
    return (*_identity(scores), *_identity(signs), keep, absolute)


def _identity(t: Tensor) -> tuple[Any, ...]:
    return 0 if t.is_inference() else t._version, t.data_ptr(), t.shape, t.stride(), t.dtype, t.device


def ranking(scores: Tensor, absolute: bool) -> Tensor:
    """The values the mask ranks: the scores, or their absolute values."""
    scores = scores.detach()
    return scores.abs() if absolute else scores


# ---- the registered ops: what compiled, traced and exported models record, and second derivatives take ----

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_ARGS = "Tensor scores, Tensor signs, int keep, bool absolute, int[] stride, int[] padding, int[] dilation, int groups"


def _lists(scores: Tensor, signs: Tensor, keep: int, absolute: bool) -> PackedWeight:
    if signs.shape != scores.shape or signs.device != scores.device:
        raise ValueError(
            f"signs: got {tuple(signs.shape)} on {signs.device}, expected {tuple(scores.shape)} on {scores.device}, "
            "as scores"
        )
    lists = _kept.get(scores)
    if lists is None:
        lists = _kept[scores] = KeptLists()
    found: PackedWeight | None = lists.get(scores, signs, keep, absolute, True)
    if found is None:
        found = lists.put(scores, signs, keep, absolute, masks.topk_mask(ranking(scores, absolute), keep))
    return found


def _conv_kernel(x: Tensor, scores: Tensor, signs: Tensor, keep: int, absolute: bool, *geometry: Any) -> Tensor:
    packed = _lists(scores, signs, keep, absolute)
    return binary.conv_kernel(
        x, packed.ptr, packed.index, packed.values, packed.shape, *geometry, None, None, None, False
    )


def _conv_fake(x: Tensor, scores: Tensor, signs: Tensor, keep: int, absolute: bool, *geometry: Any) -> Tensor:
    shape = fm.conv_shape(tuple(scores.shape))
    size = x.shape[0], shape[0], *_geometry(geometry).out_size(shape, x.shape[2], x.shape[3])
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _grad_kernel(grad: Tensor, scores: Tensor, signs: Tensor, keep: int, absolute: bool, *rest: Any) -> Tensor:
    packed = _lists(scores, signs, keep, absolute)
    return binary.grad_kernel(grad, packed.ptr, packed.index, packed.values, packed.shape, *rest)


def _grad_fake(
    grad: Tensor, scores: Tensor, signs: Tensor, keep: int, absolute: bool, stride: Any, padding: Any, dilation: Any,
    groups: int, height: int, width: int,
) -> Tensor:  # fmt: skip
    size = (grad.shape[0], fm.conv_shape(tuple(scores.shape))[1] * groups, height, width)
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


def _geometry(given: Sequence[Any]) -> ConvGeometry:
    stride, padding, dilation, groups = given
    return ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def scores_grad(
    grad: Tensor, x: Tensor, scores: Tensor, signs: Tensor, absolute: bool, g: ConvGeometry
) -> Tensor:  # fmt: skip
    """Gradient of `scored_conv2d` with respect to the scores, straight through the mask: dense."""
    weight_grad = binary.conv_weight_grad(grad, x, tuple(scores.shape), g)
    return straight_through(weight_grad, signs.to(weight_grad.dtype), scores, absolute).to(scores.dtype)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, signs: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(x, scores, signs)
        ctx.args = args
        return below_autograd(_conv_op, x, scores, signs, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, scores, signs = ctx.saved_tensors
        grad_x = grad_scores = None
        if ctx.needs_input_grad[0]:
            grad_x = binary.for_batches(_grad_op, grad)(grad, scores, signs, *ctx.args, *x.shape[2:])
        if ctx.needs_input_grad[1]:
            grad_scores = scores_grad(grad, x, scores, signs, ctx.args[1], _geometry(ctx.args[2:]))
        return grad_x, grad_scores, *([None] * 7)


class _InputGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, scores: Tensor, signs: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(grad, scores, signs)
        ctx.args = args[:-2]
        return below_autograd(_grad_op, grad, scores, signs, *args)

    @staticmethod
    def backward(ctx: Any, wanted: Tensor) -> tuple[Any, ...]:
        # <wanted, input gradient of grad> = <conv(wanted), grad>, linear in both and in the weight.
        grad, scores, signs = ctx.saved_tensors
        back = grad_scores = None
        if ctx.needs_input_grad[0]:
            back = _conv_op(wanted, scores, signs, *ctx.args)
        if ctx.needs_input_grad[1]:
            grad_scores = scores_grad(grad, wanted, scores, signs, ctx.args[1], _geometry(ctx.args[2:]))
        return back, grad_scores, *([None] * 9)


_conv_op = define(
    "scored_conv2d", f"(Tensor x, {_ARGS}) -> Tensor", _conv_kernel, _conv_fake, _Conv.apply
)  # fmt: skip
_grad_op = define(
    "scored_conv2d_input_grad",
    f"(Tensor grad, {_ARGS}, int height, int width) -> Tensor",
    _grad_kernel,
    _grad_fake,
    _InputGrad.apply,
)


def scored_conv2d(x: Tensor, scores: Tensor, signs: Tensor, keep: int, absolute: bool, g: ConvGeometry) -> Tensor:
    """conv2d(x, signs * topk_mask(scores, keep)), of |scores| with `absolute`; as one op that graphs can hold.

    x: (N, C, H, W) float32. scores, signs: (K, C / groups, kh, kw), or (K, C) for 1x1 maps; signs are the fixed weights
    and may be any finite numbers. Differentiable any number of times in x and, straight through the mask, in the
    scores.
    """
    out: Tensor = _conv_op(x, scores, signs, keep, absolute, g.stride, g.padding, g.dilation, g.groups)
    return out


def scored_input_grad(
    grad: Tensor, scores: Tensor, signs: Tensor, keep: int, absolute: bool, g: ConvGeometry, size: Sequence[int]
) -> Tensor:
    """Gradient of `scored_conv2d` with respect to x of map size `size`, differentiable in turn."""
    geometry = g.stride, g.padding, g.dilation, g.groups
    out: Tensor = binary.for_batches(_grad_op, grad)(grad, scores, signs, keep, absolute, *geometry, *size)
    return out


def straight_through_weight(scores: Tensor, signs: Tensor, keep: int, absolute: bool, dtype: torch.dtype) -> Tensor:
    """signs * topk_mask(scores) as a dense weight whose gradient passes the mask, in torch's own operators."""
    values = scores.abs() if absolute else scores
    mask = masks.topk_mask(ranking(scores, absolute), keep)
    return signs.to(dtype) * (mask.to(dtype) + (values - values.detach()).to(dtype))
