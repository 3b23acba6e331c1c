"""Philox4x32-10 and the variates drawn from it, in plain torch (integers in int64)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


def philox(seed: int, stream: int, example: Tensor, block: Tensor) -> list[Tensor]:
    """Four 32-bit words for every (example, block): Philox4x32-10 with counter (block, example, stream), key seed."""
    c = [block & MASK, (block >> 32) & MASK, example.expand_as(block), torch.full_like(block, stream)]
    key = [seed & MASK, (seed >> 32) & MASK]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [((p1 >> 32) & MASK) ^ c[1] ^ key[0], p1 & MASK, ((p0 >> 32) & MASK) ^ c[3] ^ key[1], p0 & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return c


def words(
    seed: int, batch: int, n: int, first_example: int | Tensor = 0, stream: int = 0, device: object = None
) -> Tensor:
    """(batch, n) words: element i of an example is word ``i % 4`` of block ``i // 4``. first_example: or (B,)
    numbers."""
    if isinstance(first_example, Tensor):
        return words_of(seed, first_example, n, stream)
    example = torch.arange(first_example, first_example + batch, dtype=torch.int64, device=device)  # type: ignore[call-overload]
    return words_of(seed, example, n, stream)


def words_of(seed: int, example: Tensor, n: int, stream: int, first_block: int = 0) -> Tensor:
    """(B, n) words of the examples with these numbers, from a block on."""
    block = torch.arange(first_block, first_block + (n + 3) // 4, dtype=torch.int64, device=example.device)[None]
    four = philox(seed, stream, example[:, None], block.expand(len(example), -1))
    return torch.stack(four, -1).reshape(len(example), 4 * block.shape[1])[:, :n]


def uniform(u: Tensor) -> Tensor:
    """24 bits on [0, 1)."""
    return (u >> 8).double() * 2.0**-24


def uniform_open(u: Tensor) -> Tensor:
    """23 bits on (0, 1)."""
    return ((u >> 9).double() + 0.5) * 2.0**-23


def normals(u: Tensor) -> Tensor:
    """Standard normals from pairs of words along the last dimension (Box and Muller 1958); u has even length."""
    pair = u.reshape(*u.shape[:-1], u.shape[-1] // 2, 2)
    radius = (-2 * uniform_open(pair[..., 0]).log()).sqrt()
    angle = 2 * math.pi * uniform(pair[..., 1])
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1).reshape(u.shape)


def laplace(u: Tensor) -> Tensor:
    """Density exp(-|t|) / 2; the lowest bit is the sign."""
    size = -uniform_open(u).log()
    return torch.where((u & 1) != 0, -size, size)
