"""Windows of the Square attack: how large they are, and what is written into them."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import random as rnd

_START = 2  # stream; the first two are random_start's, the next the proposals'
_UNTIL = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the windows' share is halved


class Shape(NamedTuple):
    """Images as (B, channels, height, width); anything else is a row of one channel."""

    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, x: Tensor) -> Shape:
        return cls(*x.shape[1:]) if x.dim() == 4 else cls(1, 1, math.prod(x.shape[1:]))

    def images(self, x: Tensor) -> Tensor:
        return x.view(-1, *self)

    def side(self, share: float, least: int) -> tuple[int, int]:
        """Height and width of a square (in a row: a stretch) that covers a share of the pixels; odd from ``least`` 3
        on, so that it has a middle."""
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


def start_signs(seed: int, numbers: Tensor, n: int) -> Tensor:
    """(B, n) of -1 and 1, by the examples' numbers: neither the batch nor who left it matters."""
    return 1 - 2 * (rnd.words_of(seed, numbers, n, _START) >> 31).float()


def patterns(height: int, width: int, norm: float) -> Tensor:
    """(2, height, width): a window's bump, and the same turned by a quarter where the window is a square."""
    flat = bump(height, width, norm)
    return torch.stack([flat, flat.T if height == width else flat])


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
