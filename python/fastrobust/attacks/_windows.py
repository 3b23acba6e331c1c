"""Windows of the Square attack: where they lie, what is written into them, and the random numbers that decide."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import random as rnd

_START, _STEPS = 2, 3  # streams; the first two are random_start's
_UNTIL = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the windows' share is halved


class Shape(NamedTuple):
    """Images as (B, channels, height, width); anything else is a row of one channel."""

    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, x: Tensor) -> Shape:
        return cls(*x.shape[1:]) if x.dim() == 4 else cls(1, 1, math.prod(x.shape[1:]))

    def side(self, share: float, least: int) -> tuple[int, int]:
        """Height and width of a square (in a row: a stretch) that covers a share of the pixels; odd from ``least`` 3 on,
        so that it has a middle."""
        if self.height == 1:
            return 1, min(max(round(share * self.width), least), self.width)
        side = max(round(math.sqrt(share * self.height * self.width)), least)
        side += least > 1 and side % 2 == 0
        return min(side, self.height), min(side, self.width)


def share_at(query: int, queries: int, first: float, rescale: bool) -> float:
    """The share of the pixels in a window (Andriushchenko et al. 2020, section 3.2), for 10 000 queries; ``rescale``
    stretches it over ``queries``."""
    at = query * 10000 // queries if rescale else query
    return first / 2.0 ** sum(at > limit for limit in _UNTIL)


class Dice:
    """Random numbers of the examples by their numbers in the data set: neither the batch nor who left it matters."""

    _AHEAD = 64  # queries drawn at once

    def __init__(self, seed: int, shape: Shape) -> None:
        self.seed, self.shape = seed, shape
        self.each = 4 * (2 + math.ceil(shape.channels / 128))  # words a query: four places, then signs
        self.drawn: Tensor | None = None
        self.first = 0

    def signs(self, numbers: Tensor, n: int) -> Tensor:
        """(B, n) of -1 and 1, for the start."""
        return 1 - 2 * (rnd.words_of(self.seed, numbers, n, _START) >> 31).float()

    def places(self, query: int, numbers: Tensor) -> None:
        """Draws ahead where needed; ``numbers`` are those of the rows that :meth:`take` left."""
        if self.drawn is None or query >= self.first + self._AHEAD:
            self.first = query
            block = query * self.each // 4
            self.drawn = rnd.words_of(self.seed, numbers, self._AHEAD * self.each, _STEPS, block)

    def take(self, left: Tensor) -> None:
        if self.drawn is not None:
            self.drawn = self.drawn[left]

    def _words(self, query: int, begin: int, count: int) -> Tensor:
        assert self.drawn is not None
        at = (query - self.first) * self.each + begin
        return self.drawn[:, at : at + count]

    def corner(self, query: int, which: int, height: int, width: int) -> tuple[Tensor, Tensor]:
        """(B,) top row and left column of the first or second window of that size."""
        u = rnd.uniform(self._words(query, 2 * which, 2))
        top = (u[:, 0] * (self.shape.height - height + 1)).long()
        return top, (u[:, 1] * (self.shape.width - width + 1)).long()

    def turned(self, query: int) -> Tensor:
        """(B,) bool; the low bits of a word are not part of its place."""
        return (self._words(query, 3, 1)[:, 0] & 1) != 0

    def channel_signs(self, query: int) -> Tensor:
        """(B, channels) of -1 and 1."""
        words = self._words(query, 4, math.ceil(self.shape.channels / 32))
        bits = (words[:, :, None] >> torch.arange(32, device=words.device)) & 1
        return 1 - 2 * bits.flatten(1)[:, : self.shape.channels].float()


def indices(top: Tensor, left: Tensor, height: int, width: int, shape: Shape) -> Tensor:
    """(B, 1, height * width) places of a window in an image's rows."""
    rows = top[:, None, None] + torch.arange(height, device=top.device)[:, None]
    columns = left[:, None, None] + torch.arange(width, device=top.device)
    return (rows * shape.width + columns).flatten(1)[:, None]


def bump(height: int, width: int, norm: float) -> Tensor:
    """Two pyramids, one up and one down, of unit norm (Andriushchenko et al. 2020, section 3.4): height x width, split
    along the rows, or in a row along its length."""
    if height == 1:
        return bump(width, 1, norm).T if width > 1 else torch.ones(1, 1)
    upper = height // 2
    pattern = torch.cat([_pyramid(upper, width, norm), -_pyramid(height - upper, width, norm)])
    return pattern / torch.linalg.vector_norm(pattern, norm)


def _pyramid(height: int, width: int, norm: float) -> Tensor:
    """Sum of rectangles around the middle, the k-th of height 1 / k^2 (norm 1: 1 / k^4)."""
    middle_row, middle_column = height // 2, width // 2
    far_row = (torch.arange(height) - middle_row).abs()[:, None]
    far = torch.maximum(far_row, (torch.arange(width) - middle_column).abs())
    layers = max(middle_row, middle_column) + 1
    heights = 1 / torch.arange(1, layers + 1).double() ** (4 if norm == 1 else 2)
    tails = heights.flip(0).cumsum(0).flip(0)
    pattern = torch.where(far < layers, tails[far.clamp_max(layers - 1)], 0).float()
    return pattern / torch.linalg.vector_norm(pattern, norm)
