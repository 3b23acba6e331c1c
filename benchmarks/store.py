"""The store family: images moved, perturbations read into a batch and written back."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrobust as fr
from fastrobust.training.augment import ShiftFlip

from .case import OURS, Call, Candidate, Case, Context, Floor, Suite, once

EPS = 8 / 255
ROWS = 2048
SHAPES = {"smoke": [(4, 1, 8, 8)], "quick": [(128, 3, 32, 32)], "default": [(128, 1, 28, 28), (128, 3, 32, 32)]}
Inputs = dict[str, Any]


def inputs(context: Context, shape: tuple[int, ...], shift: int, dtype: torch.dtype) -> Inputs:
    """A padded store, a batch, and how its images were moved."""
    g, batch = context.generator(), shape[0]
    frame = (shape[2] + 2 * shift, shape[3] + 2 * shift)
    index = torch.randperm(ROWS, generator=g)[:batch]
    move = ShiftFlip(shift).moves(index)
    x = torch.rand(shape, generator=g)
    made = {
        "store": (0.05 * torch.randn(ROWS, shape[1], *frame, generator=g)).to(dtype), "index": index, "x": x,
        "adv": x + 0.02, "offsets": move.offsets, "flips": move.flips,
    }  # fmt: skip
    return {name: t.to(context.device) for name, t in made.items() if t is not None}


def places(offsets: Tensor, flips: Tensor, size: tuple[int, int], padding: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the padded image that the moved image shows."""
    rows, columns = (torch.arange(n, device=offsets.device)[None] for n in size)
    mirrored = padding + size[1] - 1 + offsets[:, 1:] - columns
    return padding - offsets[:, :1] + rows, torch.where(flips[:, None], mirrored, padding - offsets[:, 1:] + columns)


def eager_move(x: Tensor, offsets: Tensor, flips: Tensor, shift: int) -> Tensor:
    rows, columns = places(offsets, flips, (x.shape[2], x.shape[3]), shift)
    padded = F.pad(x, (shift,) * 4)
    each = torch.arange(len(x), device=x.device)
    return padded[each[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2).contiguous()


def eager_start(v: Inputs, shift: int) -> Tensor:
    x = v["x"]
    rows, columns = places(v["offsets"], v["flips"], (x.shape[2], x.shape[3]), shift)
    at = (v["index"][:, None, None], slice(None), rows[:, :, None], columns[:, None])
    d = v["store"][at].permute(0, 3, 1, 2).to(x.dtype)
    return (x + d.clamp(-EPS, EPS)).clamp(0, 1)


def eager_keep(v: Inputs, store: Tensor, shift: int) -> Tensor:
    x = v["x"]
    rows, columns = places(v["offsets"], v["flips"], (x.shape[2], x.shape[3]), shift)
    at = (v["index"][:, None, None], slice(None), rows[:, :, None], columns[:, None])
    store[at] = (v["adv"] - x).permute(0, 2, 3, 1).to(store.dtype)
    return store


def cases(context: Context) -> Iterator[Case]:
    for shape in SHAPES.get(context.level, SHAPES["default"]):
        shift, elements = 2 if shape[1] == 1 else 4, math.prod(shape)
        for dtype in (torch.float32, torch.float16):
            made = once(partial(inputs, context, shape, shift, dtype))
            size = dtype.itemsize
            axes = {"shape": "x".join(map(str, shape)), "store": str(dtype).removeprefix("torch.")}
            if dtype == torch.float32:

                def ours_move(made: Any = made) -> Call:
                    v = made()
                    return partial(fr.ops.shift_flip, v["x"], v["offsets"], v["flips"])

                def their_move(made: Any = made, shift: int = shift) -> Call:
                    v = made()
                    return partial(eager_move, v["x"], v["offsets"], v["flips"], shift)

                yield Case(
                    "shift_flip", {"shape": axes["shape"]}, Candidate(OURS, ours_move),
                    (Candidate("eager torch", their_move),), Floor(bytes=8 * elements), 0.0,
                )  # fmt: skip

            def ours_start(made: Any = made, shift: int = shift) -> Call:
                v = made()
                move = {"offsets": v["offsets"], "flips": v["flips"], "padding": shift}
                return partial(fr.ops.store_gather, v["store"], v["index"], v["x"], EPS, **move)

            def their_start(made: Any = made, shift: int = shift) -> Call:
                return partial(eager_start, made(), shift)

            yield Case(
                "store_gather", axes, Candidate(OURS, ours_start), (Candidate("eager torch", their_start),),
                Floor(bytes=(8 + size) * elements), 1e-6,
            )  # fmt: skip

            def ours_keep(made: Any = made, shift: int = shift) -> Call:
                v = made()
                move = {"offsets": v["offsets"], "flips": v["flips"], "padding": shift}
                return partial(fr.ops.store_scatter, v["store"].clone(), v["index"], v["adv"], v["x"], **move)

            def their_keep(made: Any = made, shift: int = shift) -> Call:
                v = made()
                return partial(eager_keep, v, v["store"].clone(), shift)

            yield Case(
                "store_scatter", axes, Candidate(OURS, ours_keep), (Candidate("eager torch", their_keep),),
                Floor(bytes=(8 + size) * elements), 1e-6,
            )  # fmt: skip


SUITE = Suite("store", cases, "crops and mirror images of a batch, and stored perturbations that follow them")
