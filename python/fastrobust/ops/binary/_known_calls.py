"""Calls of `masked_conv2d` that came before, without an epilogue: the checks are done, and what runs is known.

Around a convolution of a few microseconds the checks themselves would show. A call is known by the identity of its
integers and by the size and strides of x; the rest is looked at again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...reference.binary import PackedWeight
from .._library import nothing_intercepts
from . import _conv_cost as cost
from . import _conv_recipe as recipes
from . import _feature_maps as fm
from ._dense_conv import Prepacked, dense_weight, memory_format
from ._feature_maps import ConvGeometry

# Kinds of calls of one weight that are known, in one setting of FASTROBUST_BINARY.
_REMEMBERED = 16
# Largest output for which the order of a dense weight is worth keeping: the rest is the convolution's own time.
_PREPACKED_FLOATS = 1 << 18

_NAME = "_fastrobust_calls"
_float32 = torch.float32
_any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def again(x: Tensor, packed: PackedWeight, stride: Any, padding: Any, dilation: Any, groups: Any) -> Tensor | None:
    """The result with as little around it as there can be, None where the long way has to be taken."""
    if type(x) is not Tensor or type(packed) is not PackedWeight or not nothing_intercepts():
        return None
    calls = packed.__dict__.get(_NAME)
    if calls is None:
        return None
    shape, strides = x.shape, x.stride()
    for known in calls.get(cost.variable(), ()):
        k_stride, k_padding, k_dilation, k_groups, k_shape, k_strides, run = known
        if (
            stride is k_stride
            and padding is k_padding
            and dilation is k_dilation
            and groups is k_groups
            and shape == k_shape
            and strides == k_strides
        ):
            found: Tensor | None = run(x) if x.is_cpu and x.dtype is _float32 else None
            return found
    return None


def remember(x: Tensor, packed: PackedWeight, g: ConvGeometry, given: tuple[Any, ...]) -> None:
    """Know a call that was checked. given: stride, padding, dilation and groups as they came."""
    unchanging = all(type(v) is int or type(v) is tuple for v in given)
    if type(x) is not Tensor or type(packed) is not PackedWeight or not unchanging:
        return
    if fm.device_of(x)[0] >= 0 or x.dtype is not _float32 or x.shape[0] == 0:
        return
    run = _dense(x, packed, g, given) or _sparse(x, packed, g)
    calls = packed.__dict__.setdefault(_NAME, fm.Derived())
    calls[cost.variable()] = [(*given, x.shape, x.stride(), run), *calls.get(cost.variable(), ())][:_REMEMBERED]


def _dense(x: Tensor, packed: PackedWeight, g: ConvGeometry, given: tuple[Any, ...]) -> Any:
    """torch's own convolution, None where the sparse path is taken."""
    batch, _, height, width = x.shape
    recipe = recipes.recipe_for(x, packed, batch, height, width, g, False)
    if recipe.choice.path != "dense":
        return None
    layout = memory_format(x)
    weight = dense_weight(packed, x.dtype, layout)
    small = math.prod((batch, packed.shape[0], *recipe.out_size)) <= _PREPACKED_FLOATS
    prepacked = Prepacked.of(packed, tuple(x.shape), g) if small and layout == torch.channels_last else None
    # Recorded by torch itself where the gradient is dense too.
    recorded = recipes.path_of(packed, batch, height, width, g, True, layout == torch.contiguous_format).path == "dense"
    # The fewer arguments, the less there is to read.
    args = given if given[2:] != (1, 1) else given[:2]
    conv2d = torch.conv2d

    def run(x: Tensor) -> Tensor | None:
        if _any_autocast() and torch.is_autocast_enabled("cpu"):
            return None
        if x.requires_grad and torch.is_grad_enabled():
            if not recorded:
                return None
        elif prepacked is not None:
            return prepacked(x)
        return conv2d(x, weight, None, *args)

    return run


def _sparse(x: Tensor, packed: PackedWeight, g: ConvGeometry) -> Any:
    batch, _, height, width = x.shape
    recipe = recipes.recipe_for(x, packed, batch, height, width, g, False)
    size, layout = (batch, packed.shape[0], *recipe.out_size), memory_format(x)
    program = recipes.program_for(recipe, x, torch.empty(size, dtype=_float32, memory_format=layout))
    # The lists belong to the recipe, which belongs to the weight.
    run_program, empty, direct = program.run, torch.empty, recipe.direct is not None

    def run(x: Tensor) -> Tensor | None:
        if x.requires_grad and torch.is_grad_enabled() or x.is_neg():
            return None
        out = empty(size, dtype=_float32, memory_format=layout)
        if direct:
            run_program(-1, 0, [x.data_ptr(), out.data_ptr()])
        else:
            rooms = [t.data_ptr() for t in recipes.rooms(recipe, x)]
            run_program(-1, 0, [x.data_ptr(), out.data_ptr(), 0, 0, 0, *rooms])
        return out

    return run
