"""Random moves of a batch's images that stored perturbations can follow forth and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .method import Batch

_WORD = 2**64 - 1
# SplitMix64 (Steele et al. 2014); torch's integers are signed
_STEP, _FIRST, _SECOND = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class Move(NamedTuple):
    """``offsets`` (B, 2), pixels down and to the right, and ``flips`` (B,): what :func:`fastrobust.ops.shift_flip`
    takes."""

    offsets: Tensor | None = None
    flips: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        return x if self == (None, None) else ops.shift_flip(x, *self)

    def invert(self, x: Tensor) -> Tensor:
        """The move taken back; what had left the image comes back as zero."""
        return x if self == (None, None) else ops.shift_flip(x, *self, inverse=True)


NO_MOVE = Move()


class ShiftFlip:
    """Crops with a padding of ``shift`` zeros, and mirror images half of the time.

    The move of an example is a function of (seed, epoch, its number) alone: it does not depend on how the data set is
    cut into batches or over processes, and a training that resumes finds it again with nothing saved. Where batches
    tell no numbers, the place in the epoch takes theirs.
    """

    def __init__(self, shift: int = 4, flip: bool = True, seed: int = 0) -> None:
        if isinstance(shift, bool) or not 0 <= shift < 2**15:
            raise ValueError(f"shift: got {shift!r}, expected an integer of at least 0")
        self.shift, self.flip, self.seed = int(shift), bool(flip), int(seed)

    def draw(self, batch: Batch) -> Move:
        """The moves of a batch's images."""
        index = batch.index
        if index is None:
            index = torch.arange(len(batch.x)) + (batch.step + 1) * 2**32
        return self.moves(index, batch.epoch)

    def moves(self, index: Tensor, epoch: int = 0) -> Move:
        """The moves in an epoch of the examples with these numbers."""
        if not self.shift and not self.flip:
            return NO_MOVE
        words = _words(index.to(torch.int64), (self.seed * 0xD1342543DE82EF95 + epoch * 0x2545F4914F6CDD1D) & _WORD)
        places = 2 * self.shift + 1
        offsets = torch.stack([((words >> at & 0xFFFF) * places >> 16) - self.shift for at in (0, 16)], 1)
        return Move(offsets if self.shift else None, (words >> 32 & 1).bool() if self.flip else None)


def _words(index: Tensor, key: int) -> Tensor:
    """A 64-bit word for each number."""
    z = index * _STEP + (key - 2**64 if key >= 2**63 else key)
    z = (z ^ (z >> 30 & 2**34 - 1)) * _FIRST
    z = (z ^ (z >> 27 & 2**37 - 1)) * _SECOND
    return z ^ (z >> 31 & 2**33 - 1)


__all__ = ["NO_MOVE", "Move", "ShiftFlip"]
