"""What follows an interval product where a ReLU reads it, in one pass over its centre and radius, and the gradients.

With l = c - r and u = c + r: the lines of ReLU on [l, u], in terms of the product without its bias b (slope * b joins
their intercepts), and centre and radius of [relu(l), relu(u)]. float32, not recorded.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ... import _C
from .._library import on_cpu, require_cuda_build, stream_of
from ._rows import address, dense

_RUNS = 16  # csrc/bounds/args.h: kReluBoxRuns

Pair = tuple[Tensor, Tensor]


class ReluBox(NamedTuple):
    lines: Pair | None  # slopes (1 or 2, B, n), intercepts (2, B, n)
    after: Pair | None  # centre and radius behind the ReLU
    living: float  # the share of neurons that have lines; 1 on CUDA, where they are not counted


def is_shared(center: Tensor, radius: Tensor) -> bool:
    """Whether one radius serves all examples."""
    return radius.stride(0) == 0 or radius.shape[0] != center.shape[0]


def relu_box(
    center: Tensor, radius: Tensor, bias: Tensor | None, channels: int, adaptive: bool | None, after: bool = True
) -> ReluBox:
    """center (B, n), radius (B, n) or (1, n), dense, channels innermost; bias (channels,). adaptive: CROWN's lower
    slopes, False: one slope, None: no lines."""
    require_cuda_build(center.device)
    device, stream = stream_of(center.device)
    batch, n = center.shape
    lines = behind = None
    if adaptive is not None:
        lines = center.new_empty(1 + adaptive, batch, n), center.new_empty(2, batch, n)
    if after:
        behind = torch.empty_like(center), torch.empty_like(center)
    living = _C.bounds_relu_box(
        device, stream, center.data_ptr(), radius.data_ptr(), is_shared(center, radius), address(bias), channels,
        batch, n, bool(adaptive), *map(address, lines or (None, None)), *map(address, behind or (None, None)),
    )  # fmt: skip
    return ReluBox(lines, behind, living / max(1, center.numel()))


def relu_box_gradient(
    center: Tensor, radius: Tensor, shared: bool, bias: Tensor | None, channels: int, adaptive: bool,
    to_lines: Pair | None, to_after: Pair | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of centre (B, n), radius (B, n), or (1, n) where it is ``shared``, and bias (channels,), with what
    reaches the bias through the centre, from those of the lines and of what lies behind the ReLU."""
    require_cuda_build(center.device)
    device, stream = stream_of(center.device)
    batch, n = center.shape
    to_center, to_radius = torch.empty_like(center), center.new_empty(1 if shared else batch, n)
    to_bias, work = center.new_empty(channels), None if on_cpu(center) else center.new_empty(1 + shared, _RUNS, n)
    given = [None if t is None else dense(t) for t in (*(to_lines or (None, None)), *(to_after or (None, None)))]
    _C.bounds_relu_box_grad(
        device, stream, center.data_ptr(), radius.data_ptr(), shared, address(bias), channels, batch, n, adaptive,
        list(map(address, given)), to_center.data_ptr(), to_radius.data_ptr(), to_bias.data_ptr(), address(work),
    )  # fmt: skip
    return to_center, to_radius, to_bias
