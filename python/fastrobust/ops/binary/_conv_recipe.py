"""How one masked convolution of plain tensors is done: the path, and the program of the sparse ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference.binary import PackedWeight
from . import _conv_cost as cost
from . import _feature_maps as fm
from . import _plain_maps as plain_maps
from ._activation import NONE, RELU
from ._feature_maps import ConvGeometry


class Recipe(NamedTuple):
    """How a convolution of one batch size and map size is done. On the dense path there is neither `direct` nor
    `parts`."""

    choice: cost.Choice
    out_size: tuple[int, int]
    direct: plain_maps.DirectPlan | None  # from plain maps to plain maps
    lists: fm.Plan | None
    parts: list[tuple[int, fm.Maps, fm.Maps]]  # first image, layouts of what is read and written
    programs: fm.Recent  # by the strides and what is applied


def path_of(
    packed: PackedWeight, batch: int, height: int, width: int, g: ConvGeometry, transposed: bool = False,
    plain: bool | None = None,
) -> cost.Choice:  # fmt: skip
    """Which path `masked_conv2d` or its input gradient (`transposed`) takes for maps of this size, and why.

    plain: what is read is contiguous and on the CPU; by default it is where the lists are, and contiguous.
    """
    shape = fm.conv_shape(packed.shape)
    plain = packed.index.device.type == "cpu" if plain is None else plain
    valued = packed.values is not None
    return cost.choose(batch, height, width, shape, g, packed.kept, cost.forced_path(), transposed, plain, valued)


def recipe_for(
    x: Tensor, packed: PackedWeight, batch: int, height: int, width: int, g: ConvGeometry, transposed: bool
) -> Recipe:
    """The recipe for reading x: the convolution's input of map size (height, width) or, transposed, its output
    gradient."""
    recipes = fm.kept_with(packed, "recipes")
    plain = x.is_contiguous() and fm.device_of(x)[0] < 0
    key = (batch, height, width, g, transposed, len(packed.shape), cost.forced_path(), plain)
    found: Recipe | None = recipes.get(key)
    if found is None:
        found = recipes[key] = _new_recipe(packed, batch, height, width, g, transposed, plain)
    return found


def _new_recipe(
    packed: PackedWeight, batch: int, height: int, width: int, g: ConvGeometry, transposed: bool, plain: bool
) -> Recipe:
    shape = fm.conv_shape(packed.shape)
    out_size = g.out_size(shape, height, width)
    choice = path_of(packed, batch, height, width, g, transposed, plain)
    if choice.path == "dense" or batch == 0:
        return Recipe(choice, out_size, None, None, [], fm.Recent())
    if choice.lanes == cost.PLAIN:
        return Recipe(choice, out_size, plain_maps.plan(packed, g, height, width, transposed), None, [], fm.Recent())

    def layouts(count: int) -> tuple[fm.Maps, fm.Maps]:
        if transposed:
            return fm.grad_maps(count, height, width, shape, g, choice.lanes)
        source = fm.input_maps(count, shape[1] * g.groups, height, width, shape, g, choice.lanes)
        return source, fm.Maps(count, shape[0], *out_size, choice.lanes, source.pitch, 0, 0)

    whole = layouts(batch)
    # Whole groups of lanes that fit the cache.
    step = max(1, cost.CHUNK_FLOATS // max(whole[0].block, whole[1].block)) * choice.lanes
    parts = [(n, *layouts(min(batch, n + step) - n)) for n in range(0, batch, step)]
    return Recipe(choice, out_size, None, fm.plan(packed, g, whole[0], transposed), parts, fm.Recent())


# What a program is given, in this order; whatever is not there is 0.
_X, _OUT, _RESIDUAL, _SCALE, _SHIFT, _READ, _WRITTEN, _ADDED = ((i + 1) << 56 for i in range(8))


def run_sparse(
    x: Tensor, recipe: Recipe, out: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """The sums and what follows them, with the copies into the fast layout and out of it where there are such, in one
    call of the compiled module."""
    if not recipe.parts and recipe.direct is None:  # no images
        return out
    # Only addresses go in: whatever does not fit would be read past its end.
    sizes = {"scale": (out.shape[1],), "shift": (out.shape[1],), "residual": tuple(out.shape)}
    for name, t in (("scale", scale), ("shift", shift), ("residual", residual)):
        if t is not None and (t.dtype != torch.float32 or t.device != x.device or tuple(t.shape) != sizes[name]):
            got = f"{tuple(t.shape)} {t.dtype} on {t.device}"
            raise TypeError(f"{name}: expected {sizes[name]} torch.float32 on {x.device} as x, got {got}")
    if x.is_neg() or residual is not None and residual.is_neg():
        x, residual = x.resolve_neg(), None if residual is None else residual.resolve_neg()
    scale, shift = (None if t is None else t.resolve_neg().contiguous() for t in (scale, shift))
    if residual is not None and recipe.direct is not None:
        residual = residual.contiguous()
    program = program_for(recipe, x, out, scale, shift, residual, relu)
    given = (x, out, residual, scale, shift, *rooms(recipe, x, residual is not None))
    program.run(*fm.device_of(x), [0 if t is None else t.data_ptr() for t in given])
    return out


def rooms(recipe: Recipe, x: Tensor, residual: bool = False) -> list[Tensor]:
    """Working memory of this thread for what a program reads, writes and adds."""
    if not recipe.parts:
        return []
    _, source, target = recipe.parts[0]
    return [fm.scratch(0, source, x), fm.scratch(1, target, x), *([fm.scratch(2, target, x)] if residual else [])]


def program_for(
    recipe: Recipe, x: Tensor, out: Tensor, scale: Tensor | None = None, shift: Tensor | None = None,
    residual: Tensor | None = None, relu: bool = False,
) -> Any:  # fmt: skip
    """The program for tensors laid out as these, kept with the recipe."""
    added = None if residual is None else residual.stride()
    key = (fm.device_of(x)[0], x.stride(), out.stride(), scale is None, shift is None, added, relu)
    program = recipe.programs.get(key)
    if program is None:
        program = recipe.programs[key] = _program(recipe, x, out, scale, shift, residual, relu)
    return program


def _program(
    recipe: Recipe, x: Tensor, out: Tensor, scale: Tensor | None, shift: Tensor | None, residual: Tensor | None,
    relu: bool,
) -> Any:  # fmt: skip
    program = fm.new_program()
    scaled, shifted = 0 if scale is None else _SCALE, 0 if shift is None else _SHIFT
    if recipe.direct is not None:
        sizes = recipe.direct.bind(x.shape[0])
        program.direct(_X, _OUT, sizes, scaled, shifted, 0 if residual is None else _RESIDUAL, relu)
        return program
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
            _READ, _WRITTEN, recipe.lists.bind(source, target), scaled, shifted, 0, 0 if residual is None else _ADDED,
            0, 0, 0, 0, 0, target.channels, (RELU if relu else NONE).code, NONE.code, False,
        )  # fmt: skip
        program.relayout(_WRITTEN, at[_OUT], target.layout, fm.plain_layout(out), *target.size, 0)
    return program
