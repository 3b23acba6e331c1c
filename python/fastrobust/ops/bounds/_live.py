"""Rows of linear bounds through chains of activations and linear layers in which neurons without lines are left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import _C
from . import linear
from ._rows import Groups, address, by_example, dense, rows_args, turned

_MOST_LINES = 64  # of a kernel that meet one output (csrc/bounds/live_chain_cpu.cpp)
_WIDE = _C.cpu_variant() == "v4"  # our products are as fast as the vendor's there
Pair = tuple[Tensor, Tensor]


class LiveStep(NamedTuple):
    """An activation and the linear layer before it, whose bias is in the intercepts. A dense layer is the convolution
    of a map of one position whose kernel is the whole image."""

    slopes: Tensor  # (1 or 2, B, map) of ``linear_back_step``, channels last
    intercepts: Tensor  # (2, B, map)
    shape: tuple[int, int, int]  # of the activation: channels, height, width
    weight: Tensor  # (channels, channels before, kernel height, kernel width)
    stride: tuple[int, int]
    padding: tuple[int, int]
    shape_in: tuple[int, int, int]  # of the layer's input


def leaving_out_pays(steps: list[LiveStep], rows: float, shares: list[float] | None = None) -> bool:
    """Whether ``concretize_live`` is the faster way for so many rows an example: products with all neurons take less
    time each, and rows that do not fill a vector cost as if they did. shares: of living neurons by step, where they are
    known. The constants were fitted on the certification papers' networks."""
    if any(min(s.weight.shape[2], s.shape[1]) > _MOST_LINES for s in steps):
        return False
    if shares is None:
        every = max(1, steps[0].slopes.shape[1] // 16)
        shares = [_share(s.slopes[-1, ::every]) for s in steps]
    shares = [*shares, 1.0]
    work = [s.weight.numel() * s.shape[1] * s.shape[2] for s in steps]
    living = sum(w * a * b for w, a, b in zip(work, shares, shares[1:], strict=False))
    if len(steps) == 1 and steps[0].shape[1:] == (
        1,
        1,
    ):  # a kernel of its own, which at best is as fast as the vendor's product
        return shares[0] < (0.95 if _WIDE else 0.5)
    neurons = sum(math.prod(s.shape) for s in steps) + math.prod(steps[-1].shape_in)
    vectors = -(-rows // 16)
    rate = 17.0 if vectors == 1 else 13.0 if vectors == 2 else 10.0  # of 16 products, in units of one of the dense way
    return vectors * rate * living + (140 + 60 * vectors) * neurons < rows * sum(work)


def _share(slopes: Tensor) -> float:
    return float(torch.count_nonzero(slopes)) / max(1, slopes.numel())


def _told(step: LiveStep, turn: bool, below: Tensor | None) -> tuple[tuple[int, ...], list[Tensor]]:
    """A step as the kernels are told of it, and the tensors that must stay alive meanwhile."""
    (c, h, w), (oc, oh, ow) = step.shape, step.shape_in
    slopes, intercepts, taps = (
        dense(step.slopes),
        dense(step.intercepts),
        dense(step.weight.permute(0, 2, 3, 1).flatten(1)),
    )
    if turn:
        taps = turned(taps, 1, *taps.shape)[0]
    told = (
        slopes.data_ptr(),
        slopes.shape[0],
        intercepts.data_ptr(),
        h,
        w,
        c,
        taps.data_ptr(),
        oh,
        ow,
        oc,
        *step.weight.shape[2:],
        *step.stride,
        *step.padding,
        taps.shape[1],
        int(turn),
        address(below),
    )
    return told, [slopes, intercepts, taps]


def concretize_live(
    A: Tensor,
    b: Tensor,
    example: Tensor,
    steps: list[LiveStep],
    box: Pair | None,
    ball: Pair | None,
    q: float,
    rows: Tensor | None = None,
    minus: Tensor | None = None,
    below: Sequence[Tensor | None] | None = None,
    groups: Groups | None = None,
) -> Tensor:
    """``concretize_through`` over whole maps and a box or a ball, leaving out neurons whose lines are zero: what a
    product takes from them or gives to them changes nothing. float32 on the CPU, not recorded. below: for each step,
    room for the rows below its layer, (1 or 2, R, n), which the gradients take up (``between_of``); zero where neurons
    have no lines."""
    A, b, example = dense(A), dense(b), dense(example)
    rows, minus = (None if t is None else t.contiguous() for t in (rows, minus))
    told, kept = [], []
    for s, room in zip(steps, below or [None] * len(steps), strict=True):
        numbers, tensors = _told(s, s is not steps[-1], room)
        told.append(numbers)
        kept.append(tensors)
    batch = steps[0].slopes.shape[1]
    starts, order = groups or by_example(example, b.shape[1], batch, A.device)
    maps = [None if t is None else dense(t) for t in (*(box or (None, None)), *(ball or (None, None)))]
    out = torch.empty_like(b)
    c, r, at, e = map(address, maps)
    _C.bounds_chain(
        rows_args(A, b, example, rows, minus, None, None, None), told, batch, c, r, at, e,
        0 if ball is None else linear._DUAL[q], b.data_ptr(), out.data_ptr(), starts.data_ptr(), address(order),
    )  # fmt: skip
    del kept
    return out


def live_gradient(
    A: Tensor,
    rows: Tensor | None,
    minus: Tensor | None,
    example: Tensor,
    step: LiveStep,
    from_rows: Tensor,
    g: Tensor,
    groups: Groups,
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Gradients of rows that go through the lines and the dense layer of one step: of A (of the whole matrix where
    ``rows`` pick from one, else (k, R, channels)), of slopes and intercepts, and of the weight (channels, n), its
    columns channels last; of lines and weight only where a neuron has lines. From those of the rows at the input (k, R,
    n) and of the bounds, g (sides, R). groups: ``by_example`` of the rows."""
    A, from_rows, g = dense(A), dense(from_rows), dense(g)
    rows, minus = (None if t is None else t.contiguous() for t in (rows, minus))
    told, kept = _told(step, False, None)
    starts, order = groups
    picked = 0 if rows is None else A.shape[1]
    to_a = A.new_empty(A.shape[1:] if picked else (A.shape[0], g.shape[1], A.shape[2]))
    to_lines = torch.empty_like(kept[0]), torch.empty_like(kept[1])
    to_weight = A.new_empty(A.shape[2], from_rows.shape[2])
    tensors = [from_rows, g, starts, order, to_a, *to_lines, to_weight]
    _C.bounds_live_grad(
        told, rows_args(A, g, example, rows, minus, None, None, None), step.slopes.shape[1], from_rows.shape[0], picked,
        list(map(address, tensors)),
    )  # fmt: skip
    return to_a, to_lines, to_weight
