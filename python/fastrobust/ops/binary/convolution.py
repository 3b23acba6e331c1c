"""Masked convolutions (thesis, section 5.1); masks and index lists are in masks.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ...reference import binary as reference
from ...reference.binary import PackedWeight
from .._library import below_autograd, define, is_transformed, nothing_intercepts
from . import _feature_maps as fm
from . import _known_calls as known
from ._conv_recipe import path_of as path_of
from ._conv_recipe import recipe_for, run_sparse
from ._dense_conv import dense_conv, dense_input_grad, in_full_precision, memory_format
from ._feature_maps import ConvGeometry

# ---- convolutions: kernels ----

_CONV_ARGS = (
    "Tensor ptr, Tensor index, Tensor? values, int[] shape, int[] stride, int[] padding, int[] dilation, int groups"
)


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> ConvGeometry:
    return ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]


def _arguments(packed: PackedWeight, g: ConvGeometry) -> tuple[Any, ...]:
    """A packed weight and a geometry as the registered ops take them (see _CONV_ARGS)."""
    return packed.ptr, packed.index, packed.values, packed.shape, g.stride, g.padding, g.dilation, g.groups


def conv_kernel(
    x: Tensor, ptr: Tensor, index: Tensor, values: Tensor | None, shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, *rest: Any,
) -> Tensor:  # fmt: skip
    packed, g = PackedWeight(tuple(shape), ptr, index, values), _geometry(stride, padding, dilation, groups)
    check_conv(x, fm.conv_shape(packed.shape), g, packed)
    return _run_conv(x, packed, g, *rest)


def _run_conv(
    x: Tensor, packed: PackedWeight, g: ConvGeometry, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    batch, _, height, width = x.shape
    recipe = recipe_for(x, packed, batch, height, width, g, False)
    if x.dtype != torch.float32 or recipe.choice.path == "dense":
        return reference.epilogue(dense_conv(x, packed, g), None, scale, shift, residual, relu)
    size = (batch, packed.shape[0], *recipe.out_size)
    out = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    return run_sparse(x, recipe, out, scale, shift, residual, relu)


def _conv_fake(
    x: Tensor, ptr: Tensor, index: Tensor, values: Tensor | None, shape: Sequence[int], *args: Any
) -> Tensor:
    out_size = _geometry(*args[:4]).out_size(fm.conv_shape(tuple(shape)), x.shape[2], x.shape[3])
    return torch.empty(
        (x.shape[0], shape[0], *out_size), dtype=x.dtype, device=x.device, memory_format=memory_format(x)
    )


def grad_kernel(
    grad: Tensor, ptr: Tensor, index: Tensor, values: Tensor | None, shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, height: int, width: int,
) -> Tensor:  # fmt: skip
    packed, g = PackedWeight(tuple(shape), ptr, index, values), _geometry(stride, padding, dilation, groups)
    weight = fm.conv_shape(packed.shape)
    size = (grad.shape[0], weight[1] * groups, height, width)
    check_operand(grad, packed, "grad")
    expected = (grad.shape[0], weight[0], *g.out_size(weight, height, width))
    if tuple(grad.shape) != expected or min(expected[2:]) < 1:
        raise ValueError(f"grad: expected {expected}, got {tuple(grad.shape)}")
    recipe = recipe_for(grad, packed, size[0], height, width, g, True)
    if grad.dtype != torch.float32 or recipe.choice.path == "dense":
        return dense_input_grad(grad, packed, size, g)
    out = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))
    return run_sparse(grad, recipe, out)


def _grad_fake(
    grad: Tensor, ptr: Tensor, index: Tensor, values: Tensor | None, shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, height: int, width: int,
) -> Tensor:  # fmt: skip
    size = (grad.shape[0], fm.conv_shape(tuple(shape))[1] * groups, height, width)
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


# ---- convolutions: autograd ----


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        out = below_autograd(_conv_op, x, *args)
        lists, scale, relu = args[:8], args[8], args[11]
        ctx.save_for_backward(*lists[:3], scale, out if relu else None)
        ctx.rest, ctx.size = lists[3:], x.shape[2:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ptr, index, values, scale, out = ctx.saved_tensors
        if out is not None:
            grad = grad * (out > 0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            through = grad if scale is None else grad * scale.reshape(1, -1, 1, 1)
            grad_x = for_batches(_grad_op, through)(through, ptr, index, values, *ctx.rest, *ctx.size)
        grad_shift = grad.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[10] else None
        return grad_x, *([None] * 9), grad_shift, grad if ctx.needs_input_grad[11] else None, None


class _InputGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:3])
        ctx.rest = args[3:8]
        return below_autograd(_grad_op, grad, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # The input gradient is linear in the output gradient; its adjoint is the convolution.
        return _conv_op(grad, *ctx.saved_tensors, *ctx.rest, None, None, None, False), *([None] * 10)


_conv_op = define(
    "masked_conv2d",
    f"(Tensor x, {_CONV_ARGS}, Tensor? scale, Tensor? shift, Tensor? residual, bool relu) -> Tensor",
    conv_kernel,
    _conv_fake,
    _Conv.apply,
)
_grad_op = define(
    "masked_conv2d_input_grad",
    f"(Tensor grad, {_CONV_ARGS}, int height, int width) -> Tensor",
    grad_kernel,
    _grad_fake,
    _InputGrad.apply,
)


# ---- convolutions: the functions ----


def masked_conv2d(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """act((conv2d(x, W) + bias) scale + shift + residual) for a packed weight W.

    x: (N, C, H, W) float32, NCHW or channels_last (the output follows). packed: from `pack`, shape (K, C / groups, kh,
    kw). bias, scale, shift: (K,), for instance an eval-mode batch normalisation; residual: the output's shape; act: the
    identity or, with relu, ReLU. Everything after the sum happens in the same write.
    Returns (N, K, H', W') as `torch.nn.functional.conv2d`, equal to it within float32 rounding. The result of an image
    depends neither on the rest of the batch nor on the threads, as long as the same path is taken.

    Only the kept weights are visited, forward and in the gradient of x; where a cost model finds torch's dense
    convolution faster, that is called instead (FASTROBUST_BINARY=sparse|dense overrides). float64 takes the dense path.
    Under torch.autocast float16 and bfloat16 arguments are taken too, as float32: the result is float32 on every path.
    Differentiable, any number of times, in x, bias, scale, shift and residual, not in the weight (masked layers learn
    scores); inside the transforms of torch.func and
    in forward mode as torch's dense convolution.
    Raises TypeError or ValueError for arguments that do not fit together.
    """
    plain = bias is scale is shift is residual is None and not relu
    if plain:
        out = known.again(x, packed, stride, padding, dilation, groups)
        if out is not None:
            return out
    g = ConvGeometry.of(stride, padding, dilation, groups)
    check_packed(packed)
    if len(packed.shape) != 4:
        raise ValueError(f"packed: expected a weight (K, C / groups, kh, kw), got {packed.shape}")
    x = as_operand(x)
    check_conv(x, packed.shape, g, packed)
    if plain and nothing_intercepts():
        known.remember(x, packed, g, (stride, padding, dilation, groups))
        out = known.again(x, packed, stride, padding, dilation, groups)
        if out is not None:
            return out
    return _masked_conv(x, packed, g, bias, scale, shift, residual, relu)


def masked_linear(
    x: Tensor,
    packed: PackedWeight,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """act((x W^T + bias) scale + shift + residual) for a packed weight W of shape (K, C).

    x: (..., C) float32; residual: (..., K); otherwise as `masked_conv2d`. Returns (..., K).
    """
    check_packed(packed)
    if len(packed.shape) != 2:
        raise ValueError(f"packed: expected a weight (K, C), got {packed.shape}")
    x = as_operand(x)
    check_operand(x, packed)
    if x.dim() < 1 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x: expected (..., {packed.shape[1]}), got {tuple(x.shape)}")
    out_shape = (*x.shape[:-1], packed.shape[0])
    if residual is not None:
        check_float("residual", as_operand(residual))
        if tuple(residual.shape) != out_shape:
            raise ValueError(f"residual: expected {out_shape}, got {tuple(residual.shape)}")
        residual = residual.reshape(-1, packed.shape[0], 1, 1)
    maps = x.reshape(-1, packed.shape[1], 1, 1)
    return _masked_conv(maps, packed, ConvGeometry(), bias, scale, shift, residual, relu).reshape(out_shape)


def _masked_conv(
    x: Tensor, packed: PackedWeight, g: ConvGeometry, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    out_shape = (x.shape[0], packed.shape[0], *g.out_size(fm.conv_shape(packed.shape), x.shape[2], x.shape[3]))
    bias, scale, shift, residual = (t if t is None else as_operand(t) for t in (bias, scale, shift, residual))
    for name, t, shape in (
        ("bias", bias, out_shape[1:2]),
        ("scale", scale, out_shape[1:2]),
        ("shift", shift, out_shape[1:2]),
        ("residual", residual, out_shape),
    ):
        if t is None:
            continue
        check_float(name, t)
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(t.shape)}")
        if t.dtype != x.dtype or t.device != x.device:
            raise TypeError(f"{name}: expected {x.dtype} on {x.device} as x, got {t.dtype} on {t.device}")
    if not torch.compiler.is_compiling() and is_transformed():
        # Torch's own operators know every transform.
        out = dense_by_torch(x, packed.to_dense(x.dtype), g)
        return reference.epilogue(out, bias, scale, shift, residual, relu)
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        # The gradient of the scale needs the sums themselves.
        return reference.epilogue(
            _conv_op(x, *_arguments(packed, g), None, None, None, False), bias, scale, shift, residual, relu
        )
    if bias is not None:
        scaled = bias if scale is None else bias * scale
        shift = scaled if shift is None else scaled + shift
    # The inner loop of an attack takes the short way, past the dispatcher.
    if nothing_intercepts() and _plain(x, scale, shift, residual) and not _records(x, shift, residual):
        return _run_conv(x, packed, g, scale, shift, residual, relu)
    found: Tensor = _conv_op(x, *_arguments(packed, g), scale, shift, residual, relu)
    return found


def dense_by_torch(x: Tensor, weight: Tensor, g: ConvGeometry) -> Tensor:
    """conv2d(x, weight) by torch, recorded by torch, in the type of x also under autocast; (K, C) for 1x1 maps."""
    with torch.autocast(x.device.type, enabled=False):
        weight = weight.reshape(fm.conv_shape(tuple(weight.shape)))
        return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)


def _plain(*tensors: Tensor | None) -> bool:
    """No subclass, whose memory may not be its own."""
    return all(t is None or type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors)


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- what the modules use ----


def conv_forward(
    x: Tensor, packed: PackedWeight, g: ConvGeometry, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """conv2d(x, W) scale + bias, not recorded."""
    return below_autograd(_conv_op, x, *_arguments(packed, g), scale, bias, None, False)


def conv_input_grad(
    grad: Tensor, packed: PackedWeight, size: Sequence[int], g: ConvGeometry, scale: Tensor | None = None
) -> Tensor:
    """Gradient of `conv_forward` with respect to x of map size `size`."""
    if scale is not None:
        grad = grad * scale.reshape(1, -1, 1, 1)
    return below_autograd(for_batches(_grad_op, grad), grad, *_arguments(packed, g), *size)


def for_batches(op: Callable[..., Any], grad: Tensor) -> Callable[..., Any]:
    """`op` for a gradient that may be several (is_grads_batched): torch then calls the registered op for each."""
    found: Callable[..., Any] = op.op if torch._C._functorch.is_legacy_batchedtensor(grad) else op  # type: ignore[attr-defined]
    return found


def conv_weight_grad(grad: Tensor, x: Tensor, shape: tuple[int, ...], g: ConvGeometry) -> Tensor:
    """Dense gradient of conv2d(x, W) with respect to W: every entry, kept or pruned."""
    size = fm.conv_shape(shape)
    with in_full_precision(x):
        return conv2d_weight(x, size, grad, g.stride, g.padding, g.dilation, g.groups).reshape(shape)


# ---- checks ----


def check_packed(packed: PackedWeight) -> None:
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"packed: expected the result of fastrobust.ops.pack, got {type(packed).__name__}")


def as_operand(x: Tensor) -> Tensor:
    """x as the kernels take it: under autocast what came in half precision becomes float32, as the results are."""
    if (
        isinstance(x, Tensor)
        and x.dtype in (torch.float16, torch.bfloat16)
        and torch.is_autocast_enabled(x.device.type)
    ):
        return x.float()
    return x


def check_float(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 (or float64), got {t.dtype}")
    if t.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided (dense) tensor, got {t.layout}")


def check_operand(x: Tensor, packed: PackedWeight, name: str = "x") -> None:
    """TypeError or ValueError when x cannot meet these lists: its dtype or its device."""
    check_float(name, x)
    if x.device != packed.index.device:
        raise ValueError(f"packed: expected index lists on {x.device} as {name}, got {packed.index.device}")


def check_conv(x: Tensor, shape: tuple[int, ...], g: ConvGeometry, packed: PackedWeight | None = None) -> None:
    """ValueError or TypeError when x does not fit a weight of `shape`."""
    check_float("x", x)
    channels = shape[1] * g.groups
    if x.dim() != 4 or x.shape[1] != channels:
        raise ValueError(f"x: expected (N, {channels}, H, W), got {tuple(x.shape)}")
    if shape[0] % g.groups:
        raise ValueError(f"groups: expected a divisor of the {shape[0]} output channels, got {g.groups}")
    if any(size < 1 for size in g.out_size(shape, x.shape[2], x.shape[3])):
        raise ValueError(
            f"x: expected maps at least as large as the kernel {tuple(shape[2:])} with padding {g.padding} and "
            f"dilation {g.dilation}, got {tuple(x.shape[2:])}"
        )
    if packed is not None:
        check_operand(x, packed)
