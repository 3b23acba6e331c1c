"""What the programs of a region share: its nodes, how they run for a group of images, and small formulas."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..ops.binary import _conv_cost as cost
from ..ops.binary import _feature_maps as fm
from ..ops.binary._feature_maps import Maps
from ._choice import Part
from ._nodes import Mean, Node, Spread, Unit, ones
from ._schedule import Buffer, plain


@dataclasses.dataclass
class Read:
    """How a node runs on one map size: the layouts of what it reads and writes, and why."""

    read: Maps
    write: Maps
    choice: cost.Choice

    @property
    def dense(self) -> bool:
        return self.choice.path == "dense"


# For each value behind an activation, what tells its derivative, by the layout it was read in: the values, the
# derivatives (of plain tensors, the arguments of the activation), or the bits of the sides. Of a max pooling, who won;
# of torch's operations, what torch has saved.
Gates = dict[int, dict[Any, Buffer]]


class Graph:
    """Nodes in execution order; `outputs` are the values handed out."""

    def __init__(self, nodes: list[Node], inputs: int, outputs: list[int]) -> None:
        self.nodes, self.inputs, self.outputs = nodes, inputs, outputs
        device = next((n.device for n in nodes if isinstance(n, Unit)), None)
        assert device is not None
        self.device = device

    @property
    def units(self) -> list[Unit]:
        return [n for n in self.nodes if isinstance(n, Unit)]


class Group:
    """Programs for a group of images: forward, forward that keeps what the gradient needs, input gradient."""

    def __init__(self, part: Part, reads: list[Read], native: dict[int, Maps]) -> None:
        self.part, self.reads, self.native = part, reads, native
        self.forward, self.backward = fm.Recent(), fm.Recent()  # by strides


def fresh(x: Tensor) -> Tensor:
    """A copy, channels last: results of torch's part must not lie in the memory of what they were made from."""
    return x.clone(memory_format=torch.channels_last)


def rows_of(x: Tensor) -> Tensor:
    """Maps as rows, in memory of their own."""
    out = x.new_empty((x.shape[0], x[0].numel(), 1, 1))
    out.view(x.shape).copy_(x)
    return out


def act_code(unit: Unit) -> int:
    return unit.act.code[0]


def mean_plan(node: Mean, maps: Maps) -> fm.Plan:
    """Lists that add up all pixels of every map."""
    return fm.plan(*mean_weight(node, maps), maps, False)


def mean_weight(node: Mean | Spread, maps: Maps) -> tuple[Any, Any]:
    key = (maps.channels, maps.height, maps.width)
    known: dict[Any, Any] = node.__dict__.setdefault("weights", {})
    if key not in known:
        known[key] = ones(maps.channels, (maps.height, maps.width), node.device)
    return known[key], fm.ConvGeometry(groups=maps.channels)


def mean_scale(node: Mean, maps: Maps) -> Tensor:
    known: dict[Any, Tensor] = node.__dict__.setdefault("scales", {})
    key = (maps.channels, maps.height * maps.width)
    if key not in known:
        known[key] = torch.full((key[0],), 1.0 / key[1], dtype=torch.float32, device=node.device)
    return known[key]


def as_plain(like: Buffer) -> Buffer:
    """Room for the same maps as an ordinary tensor."""
    maps = like.maps
    return plain(like.shape if maps is None else maps.size)
