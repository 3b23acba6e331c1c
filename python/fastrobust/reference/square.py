"""A proposal of the Square attack, norm inf (Andriushchenko et al. 2020, algorithm 2), in plain torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import random as rnd

STREAM = 3


class Window(NamedTuple):
    """Of which query, and its size; height 0 is none."""

    query: int
    height: int
    width: int


NO_WINDOW = Window(0, 0, 0)


class Settle(NamedTuple):
    """(B,) each: score and verdict of the proposed points; score and verdict of x, which they replace where better."""

    score: Tensor
    hit: Tensor
    value: Tensor
    fooled: Tensor


def square_propose(
    x: Tensor, new: Tensor, low: Tensor, high: Tensor, numbers: Tensor, seed: int, last: Window, window: Window,
    settled: Settle | None,
) -> None:  # fmt: skip
    """See ``ops.pgd.square.square_propose``. x, new, low, high: (B, C, H, W), contiguous."""
    if settled is not None:
        score, hit, value, fooled = settled
        better = ((score > value) | hit) & ~fooled
        value.copy_(torch.where(better, score, value))
        fooled |= hit & better
        here = inside(numbers, seed, last, x)
        taken = torch.where(here & better[:, None, None, None], new, x)
        x.copy_(taken)
        new.copy_(torch.where(here, taken, new))
    if window.height:
        channels = x.shape[1]
        block = window.query * (2 + math.ceil(channels / 128)) + 1
        words = rnd.words_of(seed, numbers, math.ceil(channels / 32), STREAM, block)
        down = ((words[:, :, None] >> torch.arange(32, device=x.device)) & 1).flatten(1)[:, :channels, None, None] != 0
        new.copy_(torch.where(inside(numbers, seed, window, x), torch.where(down, low, high), new))


def inside(numbers: Tensor, seed: int, window: Window, x: Tensor) -> Tensor:
    """(B, 1, H, W) bool: the pixels of each example's window."""
    channels, height, width = x.shape[1:]
    u = rnd.uniform(rnd.words_of(seed, numbers, 2, STREAM, window.query * (2 + math.ceil(channels / 128))))

    def along(u: Tensor, size: int, side: int) -> Tensor:
        first = (u * (size - side + 1)).long()[:, None]
        at = torch.arange(size, device=x.device)
        return (at >= first) & (at < first + side)

    return (along(u[:, 0], height, window.height)[:, :, None] & along(u[:, 1], width, window.width)[:, None])[:, None]
