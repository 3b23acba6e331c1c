"""Bounds of margins of networks whose layers form any acyclic graph, over a box: all stages in one op.

A stage is an activation, a linear node that several nodes read, or a scaling, together with the products and sums that
feed it; stage 0 is the input. Intervals go up the stages and, where lines are wanted (CROWN-IBP, IBP-inspired linear
bounds), rows of coefficients come down again; the gradients of both are written by hand. Kernels follow one another
with nothing between them and maps are flat with their channels innermost. Where a chain of ReLUs is left, neurons
without lines are left out if that pays. The definition is the engine of :mod:`fastrobust.bounds`. float32.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from .._library import on_cpu
from . import linear
from ._conv import adjoint_definition
from ._product import matrix_product
from ._rows import address, dense, lanes_of, taps_of
from ._stage import (
    Heads,
    Held,
    Image,
    Link,
    Parameters,
    Rows,
    Stage,
    by_channel,
    channels_last,
    flat_of,
    image_of,
    signed,
)
from ._stage_boxes import boxes_of
from ._stage_live import rows_of_chain


def spread(a: Tensor, taps: Tensor, shape: Image, source: Image, kernel: Any, link: Link) -> Tensor:
    """``conv.adjoint`` of flat maps, from the weight as ``taps_of`` gives it."""
    if not on_cpu(a):  # the vendor's
        channels = source[0] // link.groups
        weight = taps[:, : math.prod(kernel) * channels].view(-1, *kernel, channels).permute(0, 3, 1, 2)
        geometry = link.stride, link.padding, source[1:], link.dilation, link.groups
        return flat_of(adjoint_definition(image_of(a, shape), weight, *geometry))
    out = a.new_empty(a.shape[0], math.prod(source))
    sizes = (
        a.shape[0],
        *shape[1:],
        shape[0],
        *source[1:],
        source[0],
        *kernel,
        *link.stride,
        *link.padding,
        taps.shape[1],
    )
    _C.bounds_spread(a.data_ptr(), taps.data_ptr(), out.data_ptr(), sizes, (*link.dilation, link.groups))
    return out


# ---- rows ----


class Kept(NamedTuple):
    """What the gradients need of the rows at a stage: the rows, what picks them, and they behind the stage."""

    A: Tensor
    pick: tuple[Any, Any]
    scaled: Any


def rows_down(
    stages: list[Stage],
    given: Parameters,
    heads: Heads,
    held: list[Held],
    b: Tensor,
    rows: Rows,
    kept: dict[Any, Any] | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    """The bounds (sides, R) from b: rows of the heads' matrices down to the box of the input. keep: instead the rows (1
    or 2, R, n) and offsets (sides, R) that arrive there."""
    entry = dict(zip(heads.stages, heads.matrices, strict=True))
    reached: dict[int, Tensor] = {}
    picks = (rows.plus, rows.minus)
    vectors = min((i for i, s in enumerate(stages) if any(link.dense for link in s.links)), default=len(stages))
    if not on_cpu(b):  # no kernel takes rows of images: one link after the other, down to the input
        vectors = 1
    for i in range(len(stages) - 1, vectors - 1, -1):  # down to the first dense layer by products
        if i not in entry and i not in reached:
            continue
        A, pick = _meet(entry.pop(i, None), reached.pop(i, None), picks)
        stage, at = stages[i], held[i]
        if not (entry or reached or keep):
            bounds = rows_of_chain(stages, given, held, i, A, pick, b, rows, kept)
            if bounds is not None:
                return (bounds,)
        if stage.relaxed:
            scaled, b = linear._back_kernel(A, b, at.slopes, at.intercepts, rows.example, *pick, None, None, [])
        else:
            A, pick = _solid(A, pick), (None, None)
            scaled, b = _through_linear(stage, given, at.bias, A, b)
        if kept is not None:
            kept[i] = Kept(A, pick, scaled)
        for link in stage.links:
            j = link.source
            down = _link_down(link, stage, stages[j], given, scaled, rows.example, at.index)
            reached[j] = down if j not in reached else reached[j] + down
    given_rows = {i: _meet(entry.get(i), reached.get(i), picks) for i in {*entry, *reached}}
    if len(given_rows) == 1 and not keep:
        ((i, (A, pick)),) = given_rows.items()
        bounds = rows_of_chain(stages, given, held, i, A, pick, b, rows, kept) if i else None
        if bounds is not None:
            return (bounds,)
    return _rows_of_images(stages, given, held, b, rows.example, given_rows, kept, keep)


class Told(NamedTuple):
    """Rows down stages without dense layers as the kernels are told of them, and what they need alive."""

    order: list[int]  # the stages
    stages: list[_C.GraphStage]
    links: list[_C.GraphLink]
    entries: list[_C.GraphEntry]
    matrices: list[int]  # that arrive at each stage
    link_of: list[tuple[int, Link]]  # of each of ``links``: the stage that reads, and its link
    alive: list[Any]
    examples: int
    arrived: Tensor | None = None  # the rows at the input


def _rows_of_images(
    stages: list[Stage],
    given: Parameters,
    held: list[Held],
    b: Tensor,
    example: Tensor,
    entry: dict[int, tuple[Tensor, Any]],
    kept: dict[Any, Any] | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    """Rows (k, R, n), or such as are picked, down stages without dense layers: one kernel."""
    box = held[0].center, held[0].radius
    if set(entry) == {0}:
        A, pick = entry[0]
        if keep:
            A, pick = _solid(A, pick), (None, None)
        if kept is not None:
            kept[0] = Kept(A, pick, None)
        if keep:
            return A, b
        out = linear._concretize_kernel(
            A, b, example, pick[0], pick[1], box[0], box[1], None, None, 1.0, None, None, []
        )
        return (out,)
    b, out = dense(b), torch.empty_like(b)
    told = _told(stages, given, held, b, entry, kept is not None, keep)
    bounds, offset = (0, out.data_ptr()) if keep else (out.data_ptr(), 0)
    graph = graph_of(told, None if keep else box, b)
    _C.bounds_stage_rows(graph, example.data_ptr(), b.data_ptr(), bounds, offset=offset)
    if kept is not None:
        kept["kernel"] = told
    if not keep:
        return (out,)
    assert told.arrived is not None
    return told.arrived, out


def graph_of(told: Told, box: tuple[Tensor, Tensor] | None, b: Tensor) -> _C.Graph:
    """With the box at the input, or without an input set: then rows and their offsets are what is asked for."""
    ends = () if box is None else tuple(map(address, box))
    return _C.Graph(told.stages, told.links, told.entries, told.examples, b.shape[1], b.shape[0], *ends)


def _told(
    stages: list[Stage],
    given: Parameters,
    held: list[Held],
    b: Tensor,
    entry: dict[int, tuple[Tensor, Any]],
    recorded: bool,
    keep: bool,
) -> Told:
    order = [i for i in _below(stages, set(entry)) if i > 0] + [0]
    number = {i: k for k, i in enumerate(order)}
    into: dict[int, list[tuple[int, Link]]] = {i: [] for i in order}
    for i in order:
        for link in stages[i].links:
            into[link.source].append((i, link))
    told = Told(order, [], [], [], [], [], [b], len(held[0].center))
    sides, count = b.shape
    matrices: dict[int, int] = {}  # that leave each stage
    for i in order:
        (c, h, w), at, first, k = stages[i].shape, -1, len(told.links), 1
        if i in entry:
            A, pick = dense(entry[i][0]), [None if t is None else t.contiguous() for t in entry[i][1]]
            told.alive.extend((A, *pick))
            at, k = len(told.entries), A.shape[0]
            apart = A.shape[1] * A.shape[2] if k == 2 else 0
            told.entries.append(_C.GraphEntry(A.data_ptr(), apart, *map(address, pick)))
        for j, link in sorted(into[i], key=lambda found: found[1].at is None):  # a product sets what others add to
            k = max(k, matrices[j])
            told.link_of.append((j, link))
            if link.window is not None:
                told.links.append(_C.GraphLink(number[j], _C.LinkKind.pick, index=held[j].index.data_ptr()))
                continue
            if link.at is None:
                told.links.append(_C.GraphLink(number[j], _C.LinkKind.identity, link.sign))
                continue
            weight = signed(given.weights[link.at], link.sign)
            lanes = lanes_of(weight)
            taps = taps_of(weight, lanes)
            told.alive.append(taps)
            told.links.append(
                _C.GraphLink(
                    number[j], _C.LinkKind.conv, weight=taps.data_ptr(), kernel=weight.shape[2:], stride=link.stride,
                    padding=link.padding, dilation=link.dilation, groups=link.groups, lanes=lanes,
                )
            )  # fmt: skip
        slopes, intercepts = (None, None) if i == 0 else _lines_of(stages[i], given, held[i])
        two = slopes is not None and slopes.shape[0] == 2
        matrices[i] = sides if two else k
        ins = b.new_empty(k, count, c * h * w) if (recorded or (keep and i == 0)) and into[i] else None
        outs = b.new_empty(matrices[i], count, c * h * w) if recorded and i else None
        told.alive.extend((slopes, intercepts, ins, outs))
        shared, count_of = i > 0 and not stages[i].relaxed, len(told.links) - first
        lines = (address(slopes), 1 + two, address(intercepts), shared)
        told.stages.append(_C.GraphStage((h, w, c), first, count_of, *lines, at, address(ins), address(outs)))
        told.matrices.append(k)
        if i == 0:
            told = told._replace(arrived=ins)
    return told


def _below(stages: list[Stage], tops: set[int]) -> list[int]:
    """The stages that rows at ``tops`` reach, from the last on."""
    found: set[int] = set()
    left = list(tops)
    while left:
        i = left.pop()
        if i not in found:
            found.add(i)
            left += [link.source for link in stages[i].links]
    return sorted(found, reverse=True)


def _lines_of(stage: Stage, given: Parameters, at: Held) -> tuple[Tensor, Tensor]:
    """Of a linear stage: what it does to a row, as lines that both sides and all examples share."""
    if stage.relaxed:
        return at.slopes, at.intercepts
    slope = at.center.new_ones(stage.shape[0])
    if stage.factor is not None:
        slope = slope * given.scales[stage.factor]
    offset = torch.zeros_like(slope) if at.bias is None else slope * at.bias
    if stage.shift is not None:
        offset = offset + given.scales[stage.shift]
    positions = stage.shape[1] * stage.shape[2]
    return slope.repeat(positions).view(1, 1, -1), offset.repeat(2 * positions).view(2, 1, -1)


def _meet(matrix: Tensor | None, reached: Tensor | None, picks: tuple[Any, Any]) -> tuple[Tensor, tuple[Any, Any]]:
    """The rows at a stage: given ones, such as came from above, or their sum."""
    if matrix is None:
        assert reached is not None
        return reached, (None, None)
    if reached is None:
        return matrix[None], picks
    return reached + _solid(matrix[None], picks), (None, None)


def _solid(A: Tensor, pick: tuple[Any, Any]) -> Tensor:
    if pick[0] is None:
        return A
    return A[:, pick[0]] if pick[1] is None else A[:, pick[0]] - A[:, pick[1]]


def _through_linear(
    stage: Stage, given: Parameters, bias: Tensor | None, A: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    sums = by_channel(A, stage.shape).sum(2)
    if stage.shift is not None:
        shift = given.scales[stage.shift]
        b = b + (sums @ shift if len(shift) > 1 else sums.sum(2) * shift)
    if stage.factor is not None:
        factor = given.scales[stage.factor]
        A, sums = (by_channel(A, stage.shape) * factor).flatten(2), sums * factor
    return A, b if bias is None else b + sums @ bias


def _link_down(
    link: Link, stage: Stage, source: Stage, given: Parameters, scaled: Tensor, example: Tensor, index: Tensor | None
) -> Tensor:
    """The rows (k, R, n) of the source that a link brings. index: of max pooling."""
    if index is not None:
        follows = index.long()[example].expand_as(scaled)
        return scaled.new_zeros(*scaled.shape[:2], source.size).scatter_add_(2, follows, scaled)
    if link.at is None:
        return signed(scaled, link.sign)
    w, rows = signed(given.weights[link.at], link.sign), scaled.flatten(0, 1)
    if link.dense:
        out = channels_last(matrix_product(rows, w), source.shape)
    else:
        taps = taps_of(w, lanes_of(w))
        out = spread(dense(rows), taps, stage.shape, source.shape, w.shape[2:], link)
    return out.unflatten(0, scaled.shape[:2])


# ---- forward ----


def forward(
    stages: list[Stage],
    given: Parameters,
    heads: Heads,
    center: Tensor,
    radius: Tensor,
    shared: bool,
    rows: Rows,
    kind: str | None,
    keep: bool,
    kept: dict[str, Any] | None,
) -> tuple[Tensor, ...]:
    """The bounds; what the gradients need is put into ``kept``."""
    held = boxes_of(stages, given, center, radius, shared, kind, kept is not None)
    own = heads.offset[rows.plus]
    b = (own if rows.minus is None else own - heads.offset[rows.minus]).expand(rows.sides, -1)
    if kept is not None:
        kept["held"] = held
    if kind is None:
        for i, A in zip(heads.stages, heads.matrices, strict=True):
            c, r = held[i].after
            box = (c, r.expand_as(c))
            b = linear._concretize_kernel(
                A[None], b, rows.example, rows.plus, rows.minus, *box, None, None, 1.0, None, None, []
            )
        return (b,)
    if kept is not None:
        kept["rows"] = {}
    return rows_down(stages, given, heads, held, b, rows, None if kept is None else kept["rows"], keep)
