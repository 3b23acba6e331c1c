"""Proposals of the Square attack (Andriushchenko et al. 2020, algorithms 2 and 3), in plain torch."""

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
        here = inside(numbers, seed, last, x)
        taken = torch.where(here & better(settled)[:, None, None, None], new, x)
        x.copy_(taken)
        new.copy_(torch.where(here, taken, new))
    if window.height:
        down = signs(numbers, seed, window.query, x) < 0
        new.copy_(torch.where(inside(numbers, seed, window, x), torch.where(down, low, high), new))


def square_move(
    x: Tensor, new: Tensor, x0: Tensor, numbers: Tensor, seed: int, window: Window, norm: float, eps: float | Tensor,
    pattern: Tensor, settled: Settle | None,
) -> None:  # fmt: skip
    """See ``ops.pgd.square.square_move``. x, new, x0: (B, C, H, W), contiguous."""
    if settled is not None:
        x.copy_(torch.where(better(settled)[:, None, None, None], new, x))
    if not window.height:
        return
    channels, area = x.shape[1], window.height * window.width
    words = _words(numbers, seed, window.query, 0, 4, x)
    u = rnd.uniform(words)
    first, second = (_places(u[:, k : k + 2], window, x).expand(-1, channels, -1) for k in (0, 2))
    shape = pattern.reshape(2, 1, area)[words[:, 3] & 1]
    size = lambda t: torch.linalg.vector_norm(t, norm, 2, keepdim=True)
    delta = (x - x0).flatten(2)
    used = torch.linalg.vector_norm(delta.flatten(1), norm, 1).view(-1, 1, 1)
    old, rest = delta.gather(2, first), delta.scatter(2, first, 0.0)
    windows = size(torch.cat([size(old), size(rest.gather(2, second))], 2))
    fresh = shape * signs(numbers, seed, window.query, x).flatten(2) + old / size(old).clamp_min(1e-12)
    radius = eps.view(-1, 1, 1) if isinstance(eps, Tensor) else eps
    if norm == 2:
        room = ((radius**2 - used**2).clamp_min(0) / channels + windows**2).sqrt()
    else:
        room = (radius - used).clamp_min(0) + channels * windows
    moved = rest.scatter(2, second, 0.0).scatter(2, first, fresh / size(fresh).clamp_min(1e-12) * room)
    if norm == 2:
        moved = moved * (radius / torch.linalg.vector_norm(moved.flatten(1), dim=1).clamp_min(1e-12).view(-1, 1, 1))
    new.copy_(x0 + moved.view(x.shape))


def better(settled: Settle) -> Tensor:
    """(B,) bool: whose proposal is taken; notes its value and verdict. NaN is never the larger score."""
    score, hit, value, fooled = settled
    taken = ((score > value) | hit) & ~fooled
    value.copy_(torch.where(taken, score, value))
    fooled |= hit & taken
    return taken


def signs(numbers: Tensor, seed: int, query: int, x: Tensor) -> Tensor:
    """(B, C, 1, 1) of -1 and 1."""
    channels = x.shape[1]
    words = _words(numbers, seed, query, 1, math.ceil(channels / 32), x)
    bits = ((words[:, :, None] >> torch.arange(32, device=x.device)) & 1).flatten(1)[:, :channels, None, None]
    return (1 - 2 * bits).to(x.dtype)


def _words(numbers: Tensor, seed: int, query: int, block: int, count: int, x: Tensor) -> Tensor:
    return rnd.words_of(seed, numbers, count, STREAM, query * (2 + math.ceil(x.shape[1] / 128)) + block)


def _places(u: Tensor, window: Window, x: Tensor) -> Tensor:
    """(B, 1, height * width) places of a window in a channel, from two numbers on [0, 1)."""
    height, width = x.shape[2:]
    top, left = (u[:, 0] * (height - window.height + 1)).long(), (u[:, 1] * (width - window.width + 1)).long()
    rows = top[:, None, None] + torch.arange(window.height, device=x.device)[:, None]
    columns = left[:, None, None] + torch.arange(window.width, device=x.device)
    return (rows * width + columns).flatten(1)[:, None]


def inside(numbers: Tensor, seed: int, window: Window, x: Tensor) -> Tensor:
    """(B, 1, H, W) bool: the pixels of each example's window."""
    height, width = x.shape[2:]
    u = rnd.uniform(_words(numbers, seed, window.query, 0, 2, x))

    def along(u: Tensor, size: int, side: int) -> Tensor:
        first = (u * (size - side + 1)).long()[:, None]
        at = torch.arange(size, device=x.device)
        return (at >= first) & (at < first + side)

    return (along(u[:, 0], height, window.height)[:, :, None] & along(u[:, 1], width, window.width)[:, None])[:, None]
