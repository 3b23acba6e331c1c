"""Perturbations kept from epoch to epoch, one for each example of a data set, in one tensor."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .augment import NO_MOVE, Move

_INITS = ("zero", "uniform", "normal")
_CHUNK = 1 << 24  # numbers drawn at a time


class PerturbationStore:
    """One perturbation for each of ``examples`` images of ``shape`` (C, H, W), in a tensor (N, C, H', W').

    Args:
        dtype: torch.float32 or torch.float16. Rounding does no harm: a start is projected after it is read.
        downsample: f, kept at 1/f of the resolution in height and width: means are written, bilinear interpolation is
        read.
        padding: kept of the image padded by so many pixels on each side, so that a crop loses nothing of what other
            crops found (the 40x40 stores of ATTA and ATAS for images of 32x32).
        augment_first: with f > 1, move at low resolution (thesis, algorithm 5.2 as printed) instead of full resolution.
        mmap: a file that holds the tensor, for data sets larger than memory. A new one is filled; one that is there
            must have the right size, and its perturbations are gone on with.
        init, scale: what an example has that was never written: "zero", "uniform" on [-scale, scale] or "normal" of
            that standard deviation. Drawn from ``seed`` and the number of resets alone.
        device: where the tensor lies. Batches may lie elsewhere: their rows travel.

    ``known`` (N,) tells which examples were written since the last reset.
    """

    def __init__(
        self,
        examples: int,
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype = torch.float32,
        downsample: int = 1,
        padding: int = 0,
        augment_first: bool = False,
        mmap: str | os.PathLike[str] | None = None,
        init: str = "zero",
        scale: float = 0.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in (torch.float32, torch.float16):
            raise TypeError(f"dtype: got {dtype}, expected torch.float32 or torch.float16")
        if examples < 0:
            raise ValueError(f"examples: got {examples}, expected at least 0")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape: got {tuple(shape)}, expected (C, H, W)")
        if padding < 0:
            raise ValueError(f"padding: got {padding}, expected at least 0")
        frame = tuple(n + 2 * padding for n in shape[1:])
        whole = (padding, *shape[1:]) if augment_first else frame
        if downsample < 1 or any(n % downsample for n in (*whole, *frame)):
            raise ValueError(f"downsample: got {downsample}, expected a divisor of {' and '.join(map(str, whole))}")
        if init not in _INITS:
            raise ValueError(f"init: got {init!r}, expected one of {', '.join(_INITS)}")
        if not (scale >= 0 and math.isfinite(scale)):
            raise ValueError(f"scale: got {scale}, expected a finite number of at least 0")
        self.downsample, self.padding, self.augment_first = int(downsample), int(padding), bool(augment_first)
        self.init, self.scale, self.seed, self.resets = init, float(scale), int(seed), 0
        size = (int(examples), int(shape[0]), *(n // downsample for n in frame))
        self.known = torch.zeros(examples, dtype=torch.bool)
        if mmap is None:
            self.perturbations = torch.empty(size, dtype=dtype, device=device)
            self._fill()
        else:
            self._map(Path(mmap), size, dtype, torch.device(device))

    def _map(self, file: Path, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(f"device: got {device}, expected the CPU for a store in a file")
        count, there = math.prod(size), file.stat().st_size if file.exists() else None
        if there is not None and there != count * dtype.itemsize:
            raise ValueError(f"mmap: got {file} of {there} bytes, expected {count * dtype.itemsize} for {size} {dtype}")
        self.perturbations = torch.from_file(str(file), shared=True, size=count, dtype=dtype).view(size)
        if there is None:
            self._fill()

    def _fill(self) -> None:
        flat = self.perturbations.view(-1)
        if self.init == "zero" or self.scale == 0:
            flat.zero_()
            return
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.resets) % 2**63)
        for first in range(0, flat.numel(), _CHUNK):
            part = flat[first : first + _CHUNK]
            drawn = torch.empty(part.shape, dtype=torch.float32)
            if self.init == "uniform":
                drawn.uniform_(-self.scale, self.scale, generator=generator)
            else:
                drawn.normal_(0.0, self.scale, generator=generator)
            part.copy_(drawn)

    def __len__(self) -> int:
        return self.perturbations.shape[0]

    @property
    def nbytes(self) -> int:
        return self.perturbations.numel() * self.perturbations.element_size()

    def _options(self, move: Move) -> dict[str, Any]:
        return {
            "offsets": move.offsets, "flips": move.flips, "padding": self.padding, "augment_first": self.augment_first,
        }  # fmt: skip

    def _rows(self, index: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tensor and the rows of it to work on, on x's device."""
        if self.perturbations.device == x.device:
            return self.perturbations, index
        there = index.to(self.perturbations.device)
        if len(there) and (int(there.min()) < 0 or int(there.max()) >= len(self)):
            raise ValueError(
                f"index: got numbers from {int(there.min())} to {int(there.max())}, expected 0 to {len(self) - 1}"
            )
        return self.perturbations[there].to(x.device), torch.arange(len(index), device=x.device)

    def start(
        self, index: Tensor, x: Tensor, eps: float | Tensor, norm: float | str = math.inf, clip: Any = (0.0, 1.0),
        move: Move = NO_MOVE,
    ) -> Tensor:  # fmt: skip
        """x, images already moved, with their stored perturbations moved alike, in the ball and the box."""
        return ops.store_gather(*self._rows(index, x), x, eps, norm, clip, **self._options(move))

    def update(self, index: Tensor, adv: Tensor, x: Tensor, move: Move = NO_MOVE) -> None:
        """Keep adv - x, the move taken back. Of examples that come twice the last one is kept."""
        rows, numbers = self._rows(index, x)
        ops.store_scatter(rows, numbers, adv, x, **self._options(move))
        if rows is not self.perturbations:
            last = {number: b for b, number in enumerate(index.tolist())}
            at = torch.tensor(list(last.values()), dtype=torch.int64)
            where = torch.tensor(list(last), dtype=torch.int64, device=self.perturbations.device)
            self.perturbations[where] = rows[at.to(rows.device)].to(self.perturbations.device)
        self.known[index.to("cpu")] = True

    def reset(self) -> None:
        """Forget what was written: draw anew."""
        self.resets += 1
        self.known.zero_()
        self._fill()

    def state_dict(self) -> dict[str, Any]:
        return {"perturbations": self.perturbations, "known": self.known, "resets": self.resets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        given = state["perturbations"]
        if given.shape != self.perturbations.shape or given.dtype != self.perturbations.dtype:
            raise ValueError(
                f"state: got perturbations {tuple(given.shape)} {given.dtype}, "
                f"expected {tuple(self.perturbations.shape)} {self.perturbations.dtype}"
            )
        self.perturbations.copy_(given)
        self.known.copy_(state["known"])
        self.resets = int(state["resets"])


__all__ = ["PerturbationStore"]
