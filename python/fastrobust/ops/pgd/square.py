"""A proposal of the Square attack, norm inf; no op of torch's: nothing but the attack's loop calls it, once a query."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ...reference import square as reference
from ...reference.square import NO_WINDOW, Settle, Window
from .._library import require_cuda_build, stream_of

__all__ = ["NO_WINDOW", "Settle", "Window", "square_propose"]


def square_propose(
    x: Tensor, new: Tensor, low: Tensor, high: Tensor, numbers: Tensor, seed: int, last: Window, window: Window,
    settled: Settle | None,
) -> None:  # fmt: skip
    """Settles the last proposal and writes the next, in place and in the windows alone.

    ``new`` equals x outside of the window ``last``. With ``settled``, x takes that window from new where the score is
    larger or the example is hit, and was not fooled before; else new takes it from x. Then the window ``window`` of new
    goes to ``low`` or ``high``, a sign for each channel. Places and signs are drawn from (seed, number, query).

    Args:
        x, new, low, high: (B, C, H, W), contiguous, float32 or float64.
        numbers: (B,) int64 of the examples.
        seed: at least 0, below 2**64.
        last, window: windows inside the image; ``NO_WINDOW`` writes nothing.
        settled: values of x's dtype and bools, (B,); ``value`` and ``fooled`` are written to.
    """
    if x.dtype != torch.float32 or (settled is not None and settled.value.dtype != torch.float32):
        reference.square_propose(x, new, low, high, numbers, seed, last, window, settled)
        return
    require_cuda_build(x.device)
    device, stream = stream_of(x.device)
    given = None
    if settled is not None:
        score, hit = settled.score.to(torch.float32).contiguous(), settled.hit.contiguous()
        given = (score.data_ptr(), hit.data_ptr(), settled.value.data_ptr(), settled.fooled.data_ptr())
    _C.pgd_square(
        device, stream, x.data_ptr(), new.data_ptr(), low.data_ptr(), high.data_ptr(), numbers.data_ptr(),
        tuple(x.shape), seed, last, window, given,
    )  # fmt: skip
