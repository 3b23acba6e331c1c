"""Bounds of margins of ReLU networks whose layers form any acyclic graph, over a box: all stages in one op.

A stage is a ReLU, a linear node that several nodes read, or a scaling, together with the products and sums that feed it; stage 0 is the
input. Intervals go up the stages and, where lines are wanted (CROWN-IBP, IBP-inspired linear bounds), rows of coefficients come down
again; the gradients of both are written by hand. As in :mod:`fastrobust.ops.margin_bounds`, which is faster for chains, kernels follow
one another with nothing between them and maps are flat with their channels innermost. The definition is the engine of
:mod:`fastrobust.bounds`. float32 on the CPU.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from . import linear
from ._product import matrix_product
from ._rows import address, dense, lanes_of, taps_of
from .intervals import RELU, center_linear, relu_center
from .margins import Image, Rows

_CENTER = 0


class Link(NamedTuple):
    """What a stage reads: ``sign`` times a product with, or (``at`` None) the very numbers of, an earlier stage."""

    source: int
    at: int | None = None  # of the weights
    dense: bool = False
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    sign: int = 1


class Stage(NamedTuple):
    """The sum of its links and of signed biases, then a ReLU, nothing, or factor * . + shift by channels."""

    shape: Image  # channels, height, width; a vector has one position
    kind: str  # "input", "relu", "linear" or "scale"
    links: tuple[Link, ...] = ()  # products first
    biases: tuple[tuple[int, int], ...] = ()  # (number, sign)
    factor: int | None = None  # numbers among the scales
    shift: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Parameters(NamedTuple):
    """weights: (O, C, kh, kw) or (m, n), columns of a dense layer behind an image channels first; biases (O,); scales (C,) or (1,)."""

    weights: list[Tensor]
    biases: list[Tensor]
    scales: list[Tensor]


class Heads(NamedTuple):
    """The outputs are offset + the sum over stages of matrix * stage: numbers of the stages, matrices (K, n), offset (K,)."""

    stages: list[int]
    matrices: list[Tensor]
    offset: Tensor


class Held(NamedTuple):
    """What a stage leaves: centre and radius before and after it, its lines."""

    center: Tensor
    radius: Tensor
    bias: Tensor | None
    after: tuple[Tensor, Tensor]
    slopes: Any = None
    intercepts: Any = None
    living: float = 1.0


def image_of(t: Tensor, shape: Image) -> Tensor:
    """(R, n), channels innermost, as (R, C, H, W)."""
    return t.view(-1, shape[1], shape[2], shape[0]).permute(0, 3, 1, 2)


def flat_of(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).reshape(t.shape[0], -1)


def channels_first(t: Tensor, shape: Image) -> Tensor:
    """(R, n) in the order of a dense layer's columns: moving maps costs less than moving the weight of a layer behind an image."""
    if shape[0] == 1 or shape[1] * shape[2] == 1:
        return t
    return image_of(dense(t), shape).reshape(t.shape[0], -1)


def channels_last(t: Tensor, shape: Image) -> Tensor:
    if shape[0] == 1 or shape[1] * shape[2] == 1:
        return t
    return flat_of(t.view(-1, *shape))


def by_channel(t: Tensor, shape: Image) -> Tensor:
    """(..., n) as (..., positions, C)."""
    return t.unflatten(-1, (shape[1] * shape[2], shape[0]))


def signed(w: Tensor, sign: int) -> Tensor:
    return w if sign > 0 else -w


# ---- intervals ----


def boxes_of(stages: list[Stage], given: Parameters, center: Tensor, radius: Tensor, shared: bool, kind: str | None, recorded: bool) -> list[Held]:  # fmt: skip
    """Intervals of every stage, and lines of the ReLUs where ``kind`` ("crown", "parallel") is given."""
    held = [Held(center, radius, None, (center, radius[:1] if shared else radius))]
    for stage in stages[1:]:
        held.append(_box(stage, stages, given, held, kind, recorded))
    return held


def _box(stage: Stage, stages: list[Stage], given: Parameters, held: list[Held], kind: str | None, recorded: bool) -> Held:  # fmt: skip
    bias = None
    for at, sign in stage.biases:
        own = signed(given.biases[at], sign)
        bias = own if bias is None else bias + own
    joined = kind is None and not recorded and stage.kind == "relu" and len(stage.links) == 1
    c, r = _affine(stage, stages, given, held, bias, joined)
    if stage.kind == "linear":
        return Held(c, r, bias, (c, r))
    if stage.kind == "scale":
        return Held(c, r, bias, _scaled_box(stage, given, c, r))
    if joined and stage.links[0].at is not None:
        return Held(c, r, bias, (c, r))
    if kind is None and not recorded:
        return Held(c, r, bias, relu_center(c, r.expand_as(c)))
    batch, n = c.shape
    slopes = intercepts = None
    if kind is not None:
        slopes, intercepts = c.new_empty(1 + (kind == "crown"), batch, n), c.new_empty(2, batch, n)
    after = torch.empty_like(c), torch.empty_like(c)
    living = _C.bounds_relu_box(
        c.data_ptr(), r.data_ptr(), r.stride(0) == 0 or r.shape[0] != batch, address(bias), stage.shape[0], batch, n, kind == "crown",
        address(slopes), address(intercepts), *map(address, after),
    )  # fmt: skip
    return Held(c, r, bias, after, slopes, intercepts, living / max(1, c.numel()))


def _affine(stage: Stage, stages: list[Stage], given: Parameters, held: list[Held], bias: Tensor | None, joined: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Centre and radius of the sum of the links; of the ReLU of a single product where that is ``joined``."""
    c: Any = None
    r: Any = None
    for link in stage.links:
        x, y = held[link.source].after
        if link.at is None:
            x, y, owned = signed(x, link.sign), y, False
        else:
            w, b, finish = (
                signed(given.weights[link.at], link.sign),
                bias if c is None else None,
                RELU if joined else _CENTER,
            )
            if link.dense:
                before = stages[link.source].shape
                x, y = center_linear(channels_first(x, before), channels_first(y, before), w, b, finish)
                owned = y.stride(0) != 0 or y.shape[0] == 1
            else:
                x, y = _interval_conv(x, y, stages[link.source].shape, stage.shape, w, b, link, finish)
                owned = True
        if c is None:
            c, r, ours = x, y, owned
        elif ours:
            c, r = c.add_(x), r.add_(y)
        else:
            c, r, ours = c + x, r + y, True
    if bias is not None and stage.links[0].at is None:
        c = (by_channel(c, stage.shape) + bias).flatten(1)
    return c, r


def _interval_conv(x: Tensor, y: Tensor, before: Image, shape: Image, w: Tensor, b: Tensor | None, link: Link, finish: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``conv.interval_convolution`` of flat maps."""
    x, w = dense(x), dense(w)
    bias = None if b is None else dense(b)
    (c, height, width), batch = before, x.shape[0]
    image = (c * height * width, width * c, c, 1)
    shared = y.stride(0) == 0 or y.shape[0] != batch
    y = dense(y[:1] if shared else y)
    sizes = (batch, height, width, c, *shape[1:], shape[0], *w.shape[2:], *link.stride, *link.padding)
    strides = image, (0 if shared else image[0], *image[1:])
    out = x.new_empty(batch, math.prod(shape)), x.new_empty(batch, math.prod(shape))
    work = x.new_empty(_numbers(sizes, strides))
    given = (x.data_ptr(), y.data_ptr(), w.data_ptr(), address(bias), work.data_ptr(), *map(address, out))
    _C.bounds_interval_conv(sizes, *strides, *given, finish)
    return out


@functools.lru_cache(256)
def _numbers(sizes: tuple[int, ...], strides: tuple[tuple[int, ...], tuple[int, ...]]) -> int:
    """That the kernel of an interval convolution works with."""
    found: int = _C.bounds_interval_conv(sizes, *strides, 0, 1, 0, 0, 0, 0, 0, 0)
    return found


def spread(a: Tensor, taps: Tensor, shape: Image, source: Image, kernel: Any, link: Link) -> Tensor:
    """``conv.adjoint`` of flat maps, from the weight as ``taps_of`` gives it."""
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
    _C.bounds_spread(a.data_ptr(), taps.data_ptr(), out.data_ptr(), sizes)
    return out


def _scaled_box(stage: Stage, given: Parameters, c: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    c, r = by_channel(c, stage.shape), by_channel(r, stage.shape)
    if stage.factor is not None:
        f = given.scales[stage.factor]
        c, r = c * f, r * f.abs()
    if stage.shift is not None:
        c = c + given.scales[stage.shift]
    return c.flatten(1), r.flatten(1)


# ---- rows ----


class Kept(NamedTuple):
    """What the gradients need of the rows at a stage: the rows, what picks them, and they behind the stage."""

    A: Tensor
    pick: tuple[Any, Any]
    scaled: Any


def rows_down(
    stages: list[Stage], given: Parameters, heads: Heads, held: list[Held], b: Tensor, rows: Rows, kept: dict[Any, Any] | None
) -> Tensor:  # fmt: skip
    """The bounds (sides, R) from b: rows of the heads' matrices down to the box of the input."""
    entry = dict(zip(heads.stages, heads.matrices, strict=True))
    reached: dict[int, Tensor] = {}
    picks = (rows.plus, rows.minus)
    vectors = min((i for i, s in enumerate(stages) if any(link.dense for link in s.links)), default=len(stages))
    for i in range(len(stages) - 1, vectors - 1, -1):  # down to the first dense layer by products
        if i not in entry and i not in reached:
            continue
        A, pick = _meet(entry.pop(i, None), reached.pop(i, None), picks)
        stage, at = stages[i], held[i]
        if stage.kind == "relu":
            scaled, b = linear._back_kernel(A, b, at.slopes, at.intercepts, rows.example, *pick, None, None, [])
        else:
            A, pick = _solid(A, pick), (None, None)
            scaled, b = _through_linear(stage, given, at.bias, A, b)
        if kept is not None:
            kept[i] = Kept(A, pick, scaled)
        for link in stage.links:
            down, j = _link_down(link, stage, stages[link.source], given, scaled), link.source
            reached[j] = down if j not in reached else reached[j] + down
    given_rows = {i: _meet(entry.get(i), reached.get(i), picks) for i in {*entry, *reached}}
    return _rows_of_images(stages, given, held, b, rows.example, given_rows, kept)


class Told(NamedTuple):
    """Rows down stages without dense layers as the kernels are told of them, and what they need alive."""

    order: list[int]  # the stages
    stages: list[_C.GraphStage]
    links: list[_C.GraphLink]
    entries: list[_C.GraphEntry]
    matrices: list[int]  # that arrive at each stage
    link_of: list[tuple[int, Link]]  # of each of ``links``: the stage that reads, and its link
    alive: list[Any]


def _rows_of_images(
    stages: list[Stage], given: Parameters, held: list[Held], b: Tensor, example: Tensor, entry: dict[int, tuple[Tensor, Any]],
    kept: dict[Any, Any] | None,
) -> Tensor:  # fmt: skip
    """Rows (k, R, n), or such as are picked, down stages without dense layers: one kernel."""
    if set(entry) == {0}:
        A, pick = entry[0]
        if kept is not None:
            kept[0] = Kept(A, pick, None)
        return linear._concretize_kernel(
            A, b, example, pick[0], pick[1], held[0].center, held[0].radius, None, None, 1.0, None, None, []
        )
    b, out = dense(b), torch.empty_like(b)
    told = _told(stages, given, held, b, entry, kept is not None)
    _C.bounds_stage_rows(graph_of(told, held, b), example.data_ptr(), b.data_ptr(), out.data_ptr())
    if kept is not None:
        kept["kernel"] = told
    return out


def graph_of(told: Told, held: list[Held], b: Tensor) -> _C.Graph:
    center, radius = held[0].center, held[0].radius
    sizes = center.shape[0], b.shape[1], b.shape[0]
    return _C.Graph(told.stages, told.links, told.entries, *sizes, center.data_ptr(), radius.data_ptr())


def _told(stages: list[Stage], given: Parameters, held: list[Held], b: Tensor, entry: dict[int, tuple[Tensor, Any]], keep: bool) -> Told:  # fmt: skip
    order = [i for i in _below(stages, set(entry)) if i > 0] + [0]
    number = {i: k for k, i in enumerate(order)}
    into: dict[int, list[tuple[int, Link]]] = {i: [] for i in order}
    for i in order:
        for link in stages[i].links:
            into[link.source].append((i, link))
    told = Told(order, [], [], [], [], [], [b])
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
            if link.at is None:
                told.links.append(_C.GraphLink(number[j], _C.LinkKind.identity, link.sign))
                continue
            weight = signed(given.weights[link.at], link.sign)
            lanes = lanes_of(weight)
            taps = taps_of(weight, lanes)
            told.alive.append(taps)
            conv = {"kernel": weight.shape[2:], "stride": link.stride, "padding": link.padding, "lanes": lanes}
            told.links.append(_C.GraphLink(number[j], _C.LinkKind.conv, weight=taps.data_ptr(), **conv))
        slopes, intercepts = (None, None) if i == 0 else _lines_of(stages[i], given, held[i])
        two = slopes is not None and slopes.shape[0] == 2
        matrices[i] = sides if two else k
        ins = b.new_empty(k, count, c * h * w) if keep and into[i] else None
        outs = b.new_empty(matrices[i], count, c * h * w) if keep and i else None
        told.alive.extend((slopes, intercepts, ins, outs))
        shared, count_of = i > 0 and stages[i].kind != "relu", len(told.links) - first
        lines = (address(slopes), 1 + two, address(intercepts), shared)
        told.stages.append(_C.GraphStage((h, w, c), first, count_of, *lines, at, address(ins), address(outs)))
        told.matrices.append(k)
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
    if stage.kind == "relu":
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


def _link_down(link: Link, stage: Stage, source: Stage, given: Parameters, scaled: Tensor) -> Tensor:
    """The rows (k, R, n) of the source that a link brings."""
    if link.at is None:
        return signed(scaled, link.sign)
    w, rows = signed(given.weights[link.at], link.sign), scaled.flatten(0, 1)
    if link.dense:
        out = channels_last(matrix_product(rows, w), source.shape)
    else:
        taps = taps_of(w, lanes_of(w))
        out = spread(dense(rows), taps, stage.shape, source.shape, w.shape[2:], link)
    return out.unflatten(0, scaled.shape[:2])


# ---- the op ----


def stage_margins(
    stages: list[Stage], given: Parameters, heads: Heads, center: Tensor, radius: Tensor, shared: bool, rows: Rows, kind: str | None
) -> Tensor:  # fmt: skip
    """Bounds (sides, R) of rows of outputs over [center - radius, center + radius].

    center, radius: (B, n), channels innermost; shared: radius is the same for every example and needs no gradient. kind: "crown" or
    "parallel" lines, None: intervals alone, from the stages at which the outputs' matrices stand.
    """
    tensors = (center, radius, heads.offset, *heads.matrices, *given.weights, *given.biases, *given.scales)
    if linear.needs_grad(*tensors):
        from ._stage_gradients import Margins

        out: Tensor = Margins.apply(stages, heads.stages, shared, rows, kind, [len(p) for p in given], *tensors)
        return out
    return forward(stages, given, heads, center, radius, shared, rows, kind, None)


def forward(
    stages: list[Stage], given: Parameters, heads: Heads, center: Tensor, radius: Tensor, shared: bool, rows: Rows, kind: str | None,
    kept: dict[str, Any] | None,
) -> Tensor:  # fmt: skip
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
        return b
    if kept is not None:
        kept["rows"] = {}
    return rows_down(stages, given, heads, held, b, rows, None if kept is None else kept["rows"])
