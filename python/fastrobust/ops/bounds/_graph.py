"""Rows of linear bounds through a graph of activations and convolutions down to the input, leaving out neurons without lines.

Rows that need the same windows of every map are a group: those of the channels at one position of an image, or all rows of an
example. They share every read of a weight and of a line.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _C
from . import linear
from ._rows import address, by_example, dense

Pair = tuple[Tensor, Tensor]
MOST_LINES = 64  # of a kernel (csrc/bounds/live_graph_cpu.cpp)
MOST_ROWS = 48  # of a block: its workspace has so many numbers a neuron


class GraphLink(NamedTuple):
    """What a stage gets from another one, or from the unit vectors at the start (source -1): sign * its coefficients, or with
    ``weight`` (channels of the source, channels, kernel height, kernel width) the adjoint of the convolution to the source."""

    source: int
    weight: Tensor | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    sign: int = 1


class GraphStage(NamedTuple):
    """Lines of a map, and where rows come to it from; the last stage is the input, without lines."""

    shape: tuple[int, int, int]  # channels, height, width
    links: list[GraphLink]
    slopes: Tensor | None = None  # (1 or 2, B or 1, map) of ``linear_back_step``, channels last
    intercepts: Tensor | None = None  # (2, B or 1, map)
    rows: tuple[Tensor, Tensor | None, Tensor | None] | None = None  # that start here: A (1 or 2, ., map), pick, minus


def concretize_graph(
    b: Tensor, example: Tensor, examples: int, stages: list[GraphStage], box: Pair | None, ball: Pair | None, q: float,
    unit: tuple[Tensor, tuple[int, int, int]] | None = None,
) -> Tensor:  # fmt: skip
    """Extremes (sides, R) of rows over a box or a ball, from b (sides, R) and their example (R,). ``unit``: the neurons (R,) whose
    unit vectors the rows are, each once for an example, and the shape of their image; else rows start at stages. float32 on the CPU,
    not recorded."""
    b, count = dense(b), b.shape[1]
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
            if k.weight is None:
                links.append(_C.GraphLink(k.source, _C.LinkKind.identity, k.sign))
                continue
            to_input = s is last and k.source >= 0
            weight = dense((k.weight if k.sign > 0 else -k.weight).permute((0, 2, 3, 1) if to_input else (2, 3, 1, 0)))
            kept.append(weight)
            conv = {"kernel": k.weight.shape[2:], "stride": k.stride, "padding": k.padding}
            links.append(_C.GraphLink(k.source, _C.LinkKind.conv, weight=weight.data_ptr(), **conv))
    maps = [None if t is None else dense(t) for t in (*(box or (None, None)), *(ball or (None, None)))]
    out = torch.empty_like(b)
    ends = map(address, maps), 0 if ball is None else linear._DUAL[q]
    graph = _C.Graph(told, links, entries, examples, count, b.shape[0], *ends[0], ends[1])
    groups = map(address, (starts, order, of_group, *where)), 0 if unit is None else unit[1][0]
    _C.bounds_live_graph(graph, _C.Groups(len(of_group), *groups[0], groups[1]), b.data_ptr(), out.data_ptr())
    del kept
    return out
