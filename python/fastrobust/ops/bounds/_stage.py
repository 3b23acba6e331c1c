"""What the stages of a network are, and how their flat maps are laid out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor

from ._pool import PoolWindow
from ._rows import dense

Image = tuple[int, int, int]
_LINEAR = ("input", "linear", "scale")


class Link(NamedTuple):
    """What a stage reads: ``sign`` times a product with, or (``at`` None) the very numbers of, an earlier stage; with a
    window, of each window the largest."""

    source: int
    at: int | None = None  # of the weights
    dense: bool = False
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    sign: int = 1
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    window: PoolWindow | None = None


class Rows(NamedTuple):
    """The rows: outputs ``plus`` (less ``minus``) of each row's ``example``, as many of each and one after the other;
    lower bounds, or both."""

    example: Tensor
    plus: Tensor
    minus: Tensor | None
    sides: int


class Stage(NamedTuple):
    """The sum of its links and of signed biases, then an activation, nothing, or factor * . + shift by channels; or the
    maximum over the windows of its one link."""

    shape: Image  # channels, height, width; a vector has one position
    kind: str  # "input", "linear", "scale", "max", or an activation of ``reference.relaxations``
    links: tuple[Link, ...] = ()  # products first
    biases: tuple[tuple[int, int], ...] = ()  # (number, sign)
    factor: int | None = None  # numbers among the scales
    shift: int | None = None
    params: tuple[float, ...] = ()  # of the activation
    box: int | None = None  # number of its interval among those that are given

    @property
    def relaxed(self) -> bool:
        """Whether it has lines of its own per example; others are linear, and all examples share what they do."""
        return self.kind not in _LINEAR

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Parameters(NamedTuple):
    """weights: (O, C, kh, kw) or (m, n), columns of a dense layer behind an image channels first; biases (O,); scales
    (C,) or (1,);
    boxes: centre and radius (B, n) of one stage after the other whose intervals are given, biases and all."""

    weights: list[Tensor]
    biases: list[Tensor]
    scales: list[Tensor]
    boxes: list[Tensor]


class Heads(NamedTuple):
    """The outputs are offset + the sum over stages of matrix * stage: numbers of the stages, matrices (K, n), offset
    (K,)."""

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
    index: Any = None  # of max pooling: (B, n) int32, the number of the neuron that each one follows


def image_of(t: Tensor, shape: Image) -> Tensor:
    """(R, n), channels innermost, as (R, C, H, W)."""
    return t.view(-1, shape[1], shape[2], shape[0]).permute(0, 3, 1, 2)


def flat_of(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1).reshape(t.shape[0], -1)


def channels_first(t: Tensor, shape: Image) -> Tensor:
    """(R, n) in the order of a dense layer's columns: moving maps costs less than moving the weight of a layer behind
    an image."""
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
