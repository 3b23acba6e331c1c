"""Proposals of the Square attack; no ops of torch's: nothing but the attack's loop calls them, once a query."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _C
from ...reference import square as reference
from ...reference.square import NO_WINDOW, Settle, Window
from .._library import require_cuda_build, stream_of
from ._kernels import NORM_CODE

__all__ = ["NO_WINDOW", "Settle", "Window", "square_move", "square_propose"]


def square_propose(
    x: Tensor, new: Tensor, low: Tensor, high: Tensor, numbers: Tensor, seed: int, last: Window, window: Window,
    settled: Settle | None,
) -> None:  # fmt: skip
    """Norm inf: settles the last proposal and writes the next, in place and in the windows alone.

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
    if not _compiled(x, settled):
        reference.square_propose(x, new, low, high, numbers, seed, last, window, settled)
        return
    device, stream = stream_of(x.device)
    given, keep = _addresses(settled)
    _C.pgd_square(
        device, stream, x.data_ptr(), new.data_ptr(), low.data_ptr(), high.data_ptr(), numbers.data_ptr(),
        tuple(x.shape), seed, last, window, given,
    )  # fmt: skip
    del keep


def square_move(
    x: Tensor, new: Tensor, x0: Tensor, numbers: Tensor, seed: int, window: Window, norm: float, eps: float | Tensor,
    pattern: Tensor, settled: Settle | None,
) -> None:  # fmt: skip
    """Norms 2 and 1: settles the last proposal and writes the next, which has yet to be projected on ball and box.

    With ``settled``, x becomes new where the score is larger or the example is hit, and was not fooled before. Then new
    is x with, in each channel, the perturbation of two windows in the first of them: ``pattern``, up or down, added to
    the old perturbation there at length one, as long as the perturbation of both windows and what it has left of the
    radius; norm 2 stretches the whole to the radius. Places and signs are drawn from (seed, number, query).

    Args:
        x, new, x0: (B, C, H, W), contiguous, float32 or float64.
        numbers, seed, window, settled: as in :func:`square_propose`.
        eps: a number or (B,) of x's dtype.
        pattern: (2, height, width) of the window, x's dtype, contiguous: upright, and as the examples whose last word
            is odd have it.
    """
    if not _compiled(x, settled):
        reference.square_move(x, new, x0, numbers, seed, window, norm, eps, pattern, settled)
        return
    device, stream = stream_of(x.device)
    given, keep = _addresses(settled)
    radius = (eps.data_ptr(), 0.0, 1) if isinstance(eps, Tensor) else (0, eps, 0)
    _C.pgd_square_move(
        device, stream, x.data_ptr(), new.data_ptr(), x0.data_ptr(), numbers.data_ptr(), tuple(x.shape), seed, window,
        NORM_CODE[norm], radius, pattern.data_ptr(), given,
    )  # fmt: skip
    del keep


def _compiled(x: Tensor, settled: Settle | None) -> bool:
    if x.dtype != torch.float32 or (settled is not None and settled.value.dtype != torch.float32):
        return False
    require_cuda_build(x.device)
    return True


def _addresses(settled: Settle | None) -> tuple[tuple[int, ...] | None, tuple[Tensor, ...]]:
    """For the compiled module, and the tensors to keep alive."""
    if settled is None:
        return None, ()
    score, hit = settled.score.to(torch.float32).contiguous(), settled.hit.contiguous()
    tensors = (score, hit, settled.value, settled.fooled)
    return tuple([t.data_ptr() for t in tensors]), tensors
