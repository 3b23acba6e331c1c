"""Rows of linear bounds through a graph of activations and convolutions down to the input, leaving out neurons without
lines.

Rows that need the same windows of every map are a group: those of the channels at one position of an image, or all rows
of an example. They share every read of a weight and of a line.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from ...reference.bounds import Window
from . import linear
from ._rows import address, by_example, dense

Pair = tuple[Tensor, Tensor]
MOST_ROWS = 48  # of a block: its workspace has so many numbers a neuron


class GraphLink(NamedTuple):
    """What a stage gets from another one, or from the unit vectors at the start (source -1): sign * its coefficients,
    or with ``weight`` (channels of the source, channels / groups, kernel height, kernel width) the adjoint of the
    convolution to the source. With ``follows`` (B, map of the source) int32 those of a pooling over windows of
    ``kernel``: each of its neurons follows the neuron of that channels-last number."""

    source: int
    weight: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    sign: int = 1
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    follows: Tensor | None = None
    kernel: tuple[int, int] = (1, 1)


class GraphStage(NamedTuple):
    """Lines of a map, and where rows come to it from; the last stage is the input, without lines."""

    shape: tuple[int, int, int]  # channels, height, width
    links: list[GraphLink]
    slopes: Tensor | None = None  # (1 or 2, B or 1, map) of ``linear_back_step``, channels last
    intercepts: Tensor | None = None  # (2, B or 1, map)
    rows: tuple[Tensor, Tensor | None, Tensor | None] | None = None  # that start here: A (1 or 2, ., map), pick, minus


Unit = tuple[Tensor, tuple[int, int, int]]


class _Told(NamedTuple):
    graph: Any
    groups: Any
    kept: list[Tensor]  # what their addresses point to


def concretize_graph(
    b: Tensor, example: Tensor, examples: int, stages: list[GraphStage], box: Pair | None, ball: Pair | None, q: float,
    unit: Unit | None = None,
) -> Tensor:  # fmt: skip
    """Extremes (sides, R) of rows over a box or a ball, from b (sides, R) and their example (R,). ``unit``: the neurons
    (R,) whose unit vectors the rows are, each once for an example, and the shape of their image; else rows start at
    stages. float32 on the CPU, not recorded."""
    b = dense(b)
    maps = [None if t is None else dense(t) for t in (*(box or (None, None)), *(ball or (None, None)))]
    told = _tell(b, example, examples, stages, unit, (*map(address, maps), 0 if ball is None else linear._DUAL[q]))
    out = torch.empty_like(b)
    _C.bounds_live_graph(told.graph, told.groups, b.data_ptr(), out.data_ptr())
    return out


def graph_maps(
    b: Tensor, example: Tensor, examples: int, stages: list[GraphStage], unit: Unit | None = None, windows: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None, Window | None]:
    """The linear bounds at the input of the rows of ``concretize_graph``: A (1 or 2, R, n) and b (sides, R). With
    ``windows`` A holds windows, and their corners and ``window`` as ``concretize_rows`` takes them come with them."""
    b = dense(b)
    told = _tell(b, example, examples, stages, unit, ())
    c, h, w = stages[-1].shape
    size: Any = (0, 0)
    corner = None
    if windows and b.shape[1]:
        size = _C.bounds_live_graph_window(told.graph, told.groups)
        corner = torch.empty_like(example), torch.empty_like(example)
    apart = any(s.slopes is not None and len(s.slopes) == 2 for s in stages)
    apart = len(b) == 2 and (apart or any(s.rows is not None and len(s.rows[0]) == 2 for s in stages))
    window = None if corner is None else (*size, c, h, w)
    A = b.new_empty(2 if apart else 1, b.shape[1], c * (h * w if corner is None else size[0] * size[1]))
    offset = torch.empty_like(b)
    at: Any = (
        {} if corner is None else {"window": size, "corner_y": corner[0].data_ptr(), "corner_x": corner[1].data_ptr()}
    )
    _C.bounds_live_graph(told.graph, told.groups, b.data_ptr(), 0, A.data_ptr(), offset.data_ptr(), **at)
    return A, offset, corner, window


def _tell(b: Tensor, example: Tensor, examples: int, stages: list[GraphStage], unit: Unit | None, end: Any) -> _Told:
    count = b.shape[1]
    order: Tensor | None
    kept: list[Tensor] = []
    where: list[Tensor | None] = [None, None, None]
    if unit is None:
        starts, order = by_example(example, count, examples, b.device)
        of_group = torch.arange(examples, device=b.device)
    else:
        neuron, (c, h, w) = unit
        place = example * (h * w) + neuron % (h * w)
        channel = neuron // (h * w)
        key = place * c + channel
        order = None
        if count > 1 and not bool((key[1:] > key[:-1]).all()):
            order = key.argsort()
            place, channel = place[order], channel[order]
        at, sizes = torch.unique_consecutive(place, return_counts=True)
        starts = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        of_group, inner = at // (h * w), at % (h * w)
        where = [inner // w, inner % w, channel.contiguous()]
    told: list[_C.GraphStage] = []
    links: list[_C.GraphLink] = []
    entries: list[_C.GraphEntry] = []
    last = stages[-1]
    for s in stages:
        slopes, intercepts = (None if t is None else dense(t) for t in (s.slopes, s.intercepts))
        kept += [t for t in (slopes, intercepts) if t is not None]
        entry = -1
        if s.rows is not None:
            A, pick, minus = dense(s.rows[0]), *(None if t is None else t.contiguous() for t in s.rows[1:])
            kept += [t for t in (A, pick, minus) if t is not None]
            entry = len(entries)
            stride = A.shape[1] * A.shape[2] if A.shape[0] == 2 else 0
            entries.append(_C.GraphEntry(A.data_ptr(), stride, address(pick), address(minus)))
        sides, shared = (0, False) if slopes is None else (slopes.shape[0], slopes.shape[1] != examples)
        channels, *size = s.shape
        told.append(
            _C.GraphStage(
                (*size, channels), len(links), len(s.links), address(slopes), sides, address(intercepts), shared, entry
            )
        )
        for k in s.links:
            moved: Any = {"stride": k.stride, "padding": k.padding, "dilation": k.dilation}
            if k.follows is not None:
                kept.append(index := k.follows.contiguous())
                picked: Any = {"kernel": k.kernel, "index": index.data_ptr()}
                links.append(_C.GraphLink(k.source, _C.LinkKind.pick, **picked, **moved))
                continue
            if k.weight is None:
                links.append(_C.GraphLink(k.source, _C.LinkKind.identity, k.sign))
                continue
            to_input = s is last and k.source >= 0
            weight = dense((k.weight if k.sign > 0 else -k.weight).permute((0, 2, 3, 1) if to_input else (2, 3, 1, 0)))
            kept.append(weight)
            conv: Any = {"kernel": tuple(k.weight.shape[2:]), "weight": weight.data_ptr(), "groups": k.groups}
            links.append(_C.GraphLink(k.source, _C.LinkKind.conv, **conv, **moved))
    places = (starts, order, of_group, *where)
    kept += [t for t in places if t is not None]
    graph = _C.Graph(told, links, entries, examples, count, b.shape[0], *end)
    first, sequence, of, y, x, lane = map(address, places)
    groups = _C.Groups(len(of_group), first, sequence, of, y, x, lane, 0 if unit is None else unit[1][0])
    return _Told(graph, groups, kept)
