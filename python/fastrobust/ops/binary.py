"""Masked convolutions (thesis, section 5.1); masks and index lists are in masks.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ..reference import binary as reference
from ..reference.binary import PackedWeight
from . import _conv_cost as cost
from . import _feature_maps as fm
from ._dense_conv import Prepacked, dense_conv, dense_input_grad, dense_weight, memory_format
from ._feature_maps import ConvGeometry
from ._library import below_autograd, define, nothing_intercepts

# Largest output for which the order of a dense weight is worth keeping: the rest is the convolution's own time.
_PREPACKED_FLOATS = 1 << 18
# Kinds of calls of one weight that are known by heart.
_REMEMBERED = 16


# ---- convolutions: kernels ----

_CONV_ARGS = "Tensor ptr, Tensor index, int[] shape, int[] stride, int[] padding, int[] dilation, int groups"


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> ConvGeometry:
    return ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), groups)  # type: ignore[arg-type]


def _arguments(packed: PackedWeight, g: ConvGeometry) -> tuple[Any, ...]:
    """A packed weight and a geometry as the registered ops take them (see _CONV_ARGS)."""
    return packed.ptr, packed.index, packed.shape, g.stride, g.padding, g.dilation, g.groups


class _Recipe(NamedTuple):
    """How a convolution of one batch size and map size is done; `parts` are empty on the dense path."""

    choice: cost.Choice
    out_size: tuple[int, int]
    lists: fm.Plan | None
    parts: list[tuple[int, fm.Maps, fm.Maps]]  # first image, layouts of what is read and written
    programs: dict[Any, Any]  # by the strides and what is applied


def _recipe(packed: PackedWeight, batch: int, height: int, width: int, g: ConvGeometry, transposed: bool) -> _Recipe:
    recipes = fm.kept_with(packed, "recipes")
    key = (batch, height, width, g, transposed, len(packed.shape), cost.forced_path())
    found: _Recipe | None = recipes.get(key)
    if found is None:
        found = recipes[key] = _new_recipe(packed, batch, height, width, g, transposed)
    return found


def _new_recipe(
    packed: PackedWeight, batch: int, height: int, width: int, g: ConvGeometry, transposed: bool
) -> _Recipe:
    shape = fm.conv_shape(packed.shape)
    out_size = g.out_size(shape, height, width)
    choice = path_of(packed, batch, height, width, g, transposed)
    if choice.path == "dense" or batch == 0:
        return _Recipe(choice, out_size, None, [], {})

    def layouts(count: int) -> tuple[fm.Maps, fm.Maps]:
        if transposed:
            return fm.grad_maps(count, height, width, shape, g, choice.lanes)
        source = fm.input_maps(count, shape[1] * g.groups, height, width, shape, g, choice.lanes)
        return source, fm.Maps(count, shape[0], *out_size, choice.lanes, source.pitch, 0, 0)

    whole = layouts(batch)
    # Whole groups of lanes that fit the cache.
    step = max(1, cost.CHUNK_FLOATS // max(whole[0].block, whole[1].block)) * choice.lanes
    parts = [(n, *layouts(min(batch, n + step) - n)) for n in range(0, batch, step)]
    return _Recipe(choice, out_size, fm.plan(packed, g, whole[0], transposed), parts, {})


# What a program is given, in this order; whatever is not there is 0.
_X, _OUT, _RESIDUAL, _SCALE, _SHIFT, _READ, _WRITTEN, _ADDED = ((i + 1) << 56 for i in range(8))


def _run_sparse(
    x: Tensor, recipe: _Recipe, out: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """Into the fast layout, the kernel, and out of it, part by part, in one call of the compiled module."""
    if not recipe.parts:  # no images
        return out
    if x.is_neg() or residual is not None and residual.is_neg():
        x, residual = x.resolve_neg(), None if residual is None else residual.resolve_neg()
    scale, shift = (None if t is None else t.contiguous() for t in (scale, shift))
    added = None if residual is None else residual.stride()
    device, stream = fm.device_of(x)
    key = (device, x.stride(), out.stride(), scale is None, shift is None, added, relu)
    program = recipe.programs.get(key)
    if program is None:
        program = recipe.programs[key] = _program(recipe, x, out, scale, shift, residual, relu)
    _, source, target = recipe.parts[0]
    rooms = [fm.scratch(0, source, x), fm.scratch(1, target, x)]
    if residual is not None:
        rooms.append(fm.scratch(2, target, x))
    given = (x, out, residual, scale, shift, *rooms)
    program.run(device, stream, [0 if t is None else t.data_ptr() for t in given])
    return out


def _program(
    recipe: _Recipe, x: Tensor, out: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    relu: bool,
) -> Any:  # fmt: skip
    program = fm.new_program()
    assert recipe.lists is not None
    for first, source, target in recipe.parts:
        at = {
            base: base | 4 * first * t.stride(0)
            for base, t in ((_X, x), (_OUT, out), (_RESIDUAL, residual))
            if t is not None
        }
        program.relayout(at[_X], _READ, fm.plain_layout(x), source.layout, *source.size, source.plane)
        if residual is not None:
            program.relayout(
                at[_RESIDUAL], _ADDED, fm.plain_layout(residual), target.layout, *target.size, target.plane
            )
        program.gather(
            _READ, _WRITTEN, recipe.lists.bind(source, target), 0 if scale is None else _SCALE,
            0 if shift is None else _SHIFT, 0, 0 if residual is None else _ADDED, 0, 0, 0, 0, target.channels, relu, False,
        )  # fmt: skip
        program.relayout(_WRITTEN, at[_OUT], target.layout, fm.plain_layout(out), *target.size, 0)
    return program


def _conv_kernel(
    x: Tensor, ptr: Tensor, index: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, *rest: Any,
) -> Tensor:  # fmt: skip
    return _run_conv(x, PackedWeight(tuple(shape), ptr, index), _geometry(stride, padding, dilation, groups), *rest)


def _run_conv(
    x: Tensor, packed: PackedWeight, g: ConvGeometry, scale: Tensor | None, shift: Tensor | None,
    residual: Tensor | None, relu: bool,
) -> Tensor:  # fmt: skip
    batch, _, height, width = x.shape
    recipe = _recipe(packed, batch, height, width, g, False)
    if x.dtype != torch.float32 or recipe.choice.path == "dense":
        return reference.epilogue(dense_conv(x, packed, g), None, scale, shift, residual, relu)
    out = torch.empty((batch, packed.shape[0], *recipe.out_size), device=x.device, memory_format=memory_format(x))
    return _run_sparse(x, recipe, out, scale, shift, residual, relu)


def _conv_fake(x: Tensor, ptr: Tensor, index: Tensor, shape: Sequence[int], *args: Any) -> Tensor:
    out_size = _geometry(*args[:4]).out_size(fm.conv_shape(tuple(shape)), x.shape[2], x.shape[3])
    return torch.empty(
        (x.shape[0], shape[0], *out_size), dtype=x.dtype, device=x.device, memory_format=memory_format(x)
    )


def _grad_kernel(
    grad: Tensor, ptr: Tensor, index: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, height: int, width: int,
) -> Tensor:  # fmt: skip
    packed, g = PackedWeight(tuple(shape), ptr, index), _geometry(stride, padding, dilation, groups)
    size = (grad.shape[0], fm.conv_shape(packed.shape)[1] * groups, height, width)
    recipe = _recipe(packed, size[0], height, width, g, True)
    if grad.dtype != torch.float32 or recipe.choice.path == "dense":
        return dense_input_grad(grad, packed, size, g)
    return _run_sparse(grad, recipe, torch.empty(size, device=grad.device, memory_format=memory_format(grad)))


def _grad_fake(
    grad: Tensor, ptr: Tensor, index: Tensor, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, height: int, width: int,
) -> Tensor:  # fmt: skip
    size = (grad.shape[0], fm.conv_shape(tuple(shape))[1] * groups, height, width)
    return torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=memory_format(grad))


# ---- convolutions: autograd ----


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        out = below_autograd(_conv_op, x, *args)
        lists, scale, relu = args[:7], args[7], args[10]
        ctx.save_for_backward(lists[0], lists[1], scale, out if relu else None)
        ctx.rest, ctx.size = lists[2:], x.shape[2:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ptr, index, scale, out = ctx.saved_tensors
        if out is not None:
            grad = grad * (out > 0)
        grad_x = None
        if ctx.needs_input_grad[0]:
            through = grad if scale is None else grad * scale.reshape(1, -1, 1, 1)
            grad_x = _grad_op(through, ptr, index, *ctx.rest, *ctx.size)
        grad_shift = grad.sum(dim=(0, 2, 3)) if ctx.needs_input_grad[9] else None
        return grad_x, *([None] * 8), grad_shift, grad if ctx.needs_input_grad[10] else None, None


class _InputGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:2])
        ctx.rest = args[2:7]
        return below_autograd(_grad_op, grad, *args)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        # The input gradient is linear in the output gradient; its adjoint is the convolution.
        return _conv_op(grad, *ctx.saved_tensors, *ctx.rest, None, None, None, False), *([None] * 9)


_conv_op = define(
    "masked_conv2d",
    f"(Tensor x, {_CONV_ARGS}, Tensor? scale, Tensor? shift, Tensor? residual, bool relu) -> Tensor",
    _conv_kernel,
    _conv_fake,
    _Conv.apply,
)
_grad_op = define(
    "masked_conv2d_input_grad",
    f"(Tensor grad, {_CONV_ARGS}, int height, int width) -> Tensor",
    _grad_kernel,
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
    """act((conv2d(x, W) + bias) scale + shift + residual) for a packed weight W with entries in {-1, 0, +1}.

    x: (N, C, H, W) float32, NCHW or channels_last (the output follows). packed: from `pack`, shape (K, C / groups, kh,
    kw). bias, scale, shift: (K,), for instance an eval-mode batch normalisation; residual: the output's shape; act: the
    identity or, with relu, ReLU. Everything after the sum happens in the same write.
    Returns (N, K, H', W') as `torch.nn.functional.conv2d`, equal to it within float32 rounding. The result of an image
    depends neither on the rest of the batch nor on the threads, as long as the same path is taken.

    Only the kept weights are visited, forward and in the gradient of x; where a cost model finds torch's dense
    convolution faster, that is called instead (FASTROBUST_BINARY=sparse|dense overrides). float64 takes the dense path.
    Differentiable, any number of times, in x, bias, scale, shift and residual.
    Raises TypeError or ValueError for arguments that do not fit together.
    """
    key = None
    plain = bias is scale is shift is residual is None and not relu
    ints = type(stride) is type(padding) is type(dilation) is type(groups) is int
    if plain and ints and type(x) is Tensor and isinstance(packed, PackedWeight) and nothing_intercepts():
        key = (x.shape, x.dtype, x.device, x.is_contiguous(), stride, padding, dilation, groups, cost.variable())
        known: _KnownCall | None = fm.kept_with(packed, "calls").get(key)
        out = None if known is None else _known_call(known, x, (stride, padding, dilation, groups))
        if out is not None:
            return out
    g = ConvGeometry.of(stride, padding, dilation, groups)
    check_packed(packed)
    if len(packed.shape) != 4:
        raise ValueError(f"packed: expected a weight (K, C / groups, kh, kw), got {packed.shape}")
    check_conv(x, packed.shape, g, packed)
    if key is not None and x.is_cpu and x.dtype == torch.float32:
        calls = fm.kept_with(packed, "calls")
        if len(calls) >= _REMEMBERED:
            calls.clear()
        known = calls[key] = _KnownCall.of(x, packed, g)
        out = _known_call(known, x, (stride, padding, dilation, groups))
        if out is not None:
            return out
    return _masked_conv(x, packed, g, bias, scale, shift, residual, relu)


class _KnownCall(NamedTuple):
    """A call without an epilogue that has been checked: torch's convolution, or a recipe for what is not recorded."""

    dense: tuple[Tensor, Tensor] | None  # the weight, NCHW and channels last
    prepacked: Prepacked | None  # for channels_last
    recorded: bool  # by torch itself: the gradient is dense too
    recipe: _Recipe
    out_shape: tuple[int, ...]

    @staticmethod
    def of(x: Tensor, packed: PackedWeight, g: ConvGeometry) -> _KnownCall:
        batch, _, height, width = x.shape
        recipe = _recipe(packed, batch, height, width, g, False)
        dense = prepacked = None
        if recipe.choice.path == "dense":
            contiguous = dense_weight(packed, x.dtype, torch.contiguous_format)
            dense = contiguous, dense_weight(packed, x.dtype, torch.channels_last)
            small = math.prod((batch, packed.shape[0], *recipe.out_size)) <= _PREPACKED_FLOATS
            if small and memory_format(x) == torch.channels_last:
                prepacked = Prepacked.of(packed, tuple(x.shape), g)
        recorded = path_of(packed, batch, height, width, g, True).path == "dense"
        return _KnownCall(dense, prepacked, recorded, recipe, (batch, packed.shape[0], *recipe.out_size))


def _known_call(known: _KnownCall, x: Tensor, geometry: tuple[Any, ...]) -> Tensor | None:
    """The result with as little around it as there can be, None where the long way has to be taken."""
    recorded = x.requires_grad and torch.is_grad_enabled()
    if known.dense is not None:
        if recorded and not known.recorded or torch.is_autocast_enabled("cpu"):
            return None
        channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        if channels_last and not recorded and known.prepacked is not None:
            return known.prepacked(x)
        return torch.conv2d(x, known.dense[channels_last], None, *geometry)
    if recorded or not known.recipe.parts:
        return None
    return _run_sparse(x, known.recipe, torch.empty(known.out_shape, memory_format=memory_format(x)))


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
    check_operand(x, packed)
    if x.dim() < 1 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"x: expected (..., {packed.shape[1]}), got {tuple(x.shape)}")
    out_shape = (*x.shape[:-1], packed.shape[0])
    if residual is not None:
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
    for name, t, shape in (
        ("bias", bias, out_shape[1:2]),
        ("scale", scale, out_shape[1:2]),
        ("shift", shift, out_shape[1:2]),
        ("residual", residual, out_shape),
    ):
        if t is None:
            continue
        _check_float(name, t)
        if tuple(t.shape) != tuple(shape):
            raise ValueError(f"{name}: expected {tuple(shape)}, got {tuple(t.shape)}")
        if t.dtype != x.dtype or t.device != x.device:
            raise TypeError(f"{name}: expected {x.dtype} on {x.device} as x, got {t.dtype} on {t.device}")
    if scale is not None and scale.requires_grad and torch.is_grad_enabled():
        # The gradient of the scale needs the sums themselves.
        return reference.epilogue(
            _conv_op(x, *_arguments(packed, g), None, None, None, False), bias, scale, shift, residual, relu
        )
    if bias is not None:
        scaled = bias if scale is None else bias * scale
        shift = scaled if shift is None else scaled + shift
    # The inner loop of an attack takes the short way, past the dispatcher.
    if nothing_intercepts() and not _records(x, shift, residual):
        return _run_conv(x, packed, g, scale, shift, residual, relu)
    out: Tensor = _conv_op(x, *_arguments(packed, g), scale, shift, residual, relu)
    return out


def _records(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


# ---- what the modules use ----


def conv_forward(
    x: Tensor, packed: PackedWeight, g: ConvGeometry, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """conv2d(x, W) scale + bias, not recorded."""
    return below_autograd(_conv_op, x, *_arguments(packed, g), scale, bias, None, False)


def conv_input_grad(
    grad: Tensor, packed: PackedWeight, size: tuple[int, int], g: ConvGeometry, scale: Tensor | None = None
) -> Tensor:
    """Gradient of `conv_forward` with respect to x of map size `size`."""
    if scale is not None:
        grad = grad * scale.reshape(1, -1, 1, 1)
    return below_autograd(_grad_op, grad, *_arguments(packed, g), *size)


def conv_weight_grad(grad: Tensor, x: Tensor, shape: tuple[int, ...], g: ConvGeometry) -> Tensor:
    """Dense gradient of conv2d(x, W) with respect to W: every entry, kept or pruned."""
    size = fm.conv_shape(shape)
    return conv2d_weight(x, size, grad, g.stride, g.padding, g.dilation, g.groups)


def path_of(
    packed: PackedWeight, batch: int, height: int, width: int, g: ConvGeometry, transposed: bool = False
) -> cost.Choice:
    """Which path `masked_conv2d` or its input gradient (`transposed`) takes for maps of this size, and why."""
    shape = fm.conv_shape(packed.shape)
    return cost.choose(batch, height, width, shape, g, packed.kept, cost.forced_path(), transposed)


# ---- checks ----


def check_packed(packed: PackedWeight) -> None:
    if not isinstance(packed, PackedWeight):
        raise TypeError(f"packed: expected the result of fastrobust.ops.pack, got {type(packed).__name__}")


def _check_float(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: expected float32 (or float64), got {t.dtype}")


def check_operand(x: Tensor, packed: PackedWeight) -> None:
    """TypeError or ValueError when x cannot meet these lists: its dtype or its device."""
    _check_float("x", x)
    if x.device != packed.index.device:
        raise ValueError(f"packed: expected index lists on {x.device} as x, got {packed.index.device}")


def check_conv(x: Tensor, shape: tuple[int, ...], g: ConvGeometry, packed: PackedWeight | None = None) -> None:
    """ValueError or TypeError when x does not fit a weight of `shape`."""
    _check_float("x", x)
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
