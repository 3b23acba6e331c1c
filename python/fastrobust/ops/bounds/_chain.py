"""Rows of linear bounds through a chain of activations and convolutions down to the input, in blocks that stay in the
cache.

The way down is that of any graph of stages (``bounds_stage_rows``). Where gradients are recorded over a box, one kernel
takes a few rows of an example back up at a time; it reads the coefficients below each convolution as the way down kept
them, or goes down again where they are too many. It takes neither balls nor groups nor dilation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from . import _autograd as gradients
from . import linear
from ._live import LiveStep
from ._rows import Groups, address, by_example, dense, lanes_of, native, rows_args, spread_lanes, taps_of

MOST_STEPS = 32  # that the kernel of the gradients takes
_MOST_KEPT = 1 << 24  # numbers between the layers that are kept for the backward pass
Pair = tuple[Tensor, Tensor]


class ConvStep(NamedTuple):
    """An activation of an image and the convolution before it, whose bias is in the intercepts."""

    slopes: Tensor  # (1 or 2, B, map) of ``linear_back_step``, channels last
    intercepts: Tensor  # (2, B, map)
    shape: tuple[int, ...]  # of the activation: channels, height, width
    weight: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    shape_in: tuple[int, ...]  # of the convolution's input
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def plain(self) -> bool:
        """Whether the kernel of the gradients takes it."""
        return self.groups == 1 and self.dilation == (1, 1)

    @property
    def fits(self) -> bool:
        """Whether ``concretize_through`` takes rows here."""
        return self.weight.is_cpu and native(self.weight) and spread_lanes(self.weight, self.shape[2]) > 0


def recordable(steps: list[ConvStep]) -> bool:
    """Whether the kernel of the gradients takes these, over a box."""
    return len(steps) <= MOST_STEPS and all(s.plain for s in steps)


def concretize_through(
    A: Tensor, b: Tensor, example: Tensor, steps: list[ConvStep], box: Pair, rows: Tensor | None = None,
    minus: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``concretize_rows`` of rows of whole maps that first pass through ``steps`` (``linear_back_step`` and the adjoint
    of a convolution each): the coefficients between the layers never leave a core's cache. float32 on the CPU; recorded
    without groups and dilation (``recordable``)."""
    tensors = [t for step in steps for t in (step.slopes, step.intercepts, step.weight)]
    if linear.direct(A, b, *box, *tensors):
        return through(A, b, example, steps, box, rows, minus)
    if not recordable(steps):
        raise ValueError("steps: got gradients to record, expected no groups, no dilation and at most 32 steps")
    plain = [s._replace(slopes=None, intercepts=None, weight=None) for s in steps]  # type: ignore[arg-type]
    out: Tensor = _Through.apply(plain, example, rows, minus, A, b, *box, *tensors)
    return out


def through(
    A: Tensor, b: Tensor, example: Tensor, steps: list[ConvStep], box: Pair, rows: Tensor | None, minus: Tensor | None,
    between: Any = None,
) -> Tensor:  # fmt: skip
    """The kernel; ``between``: room for what the gradients take up again (``between_of``)."""
    if not b.numel():
        return torch.empty_like(b)
    A, b, example = dense(A), dense(b), dense(example)
    rows, minus = (None if t is None else t.contiguous() for t in (rows, minus))
    center, radius = map(dense, box)
    entry = _C.GraphEntry(
        A.data_ptr(), A.shape[1] * A.shape[2] if A.shape[0] == 2 else 0, address(rows), address(minus)
    )
    stages, links, kept = [], [], []
    for i, step in enumerate(steps):
        slopes, intercepts = dense(step.slopes), dense(step.intercepts)
        lanes = lanes_of(step.weight)
        taps = taps_of(step.weight, lanes)
        kept += [slopes, intercepts, taps]
        (c, h, w), of_lines = step.shape, (slopes.data_ptr(), slopes.shape[0], intercepts.data_ptr())
        start: Any = {"entry": 0} if i == 0 else {"kept_in": address(between and between[i - 1])}
        stages.append(_C.GraphStage((h, w, c), max(0, i - 1), int(i > 0), *of_lines, **start))
        how: Any = {"kernel": step.weight.shape[2:], "stride": step.stride, "padding": step.padding, "lanes": lanes,
               "dilation": step.dilation, "groups": step.groups}  # fmt: skip
        links.append(_C.GraphLink(i, _C.LinkKind.conv, weight=taps.data_ptr(), **how))
    c, h, w = steps[-1].shape_in
    stages.append(_C.GraphStage((h, w, c), len(steps) - 1, 1, kept_in=address(between and between[-1])))
    sizes = steps[0].slopes.shape[1], b.shape[1], b.shape[0]
    graph = _C.Graph(stages, links, [entry], *sizes, center.data_ptr(), radius.data_ptr())
    out = torch.empty_like(b)
    _C.bounds_stage_rows(graph, example.data_ptr(), b.data_ptr(), out.data_ptr())
    return out


def between_of(steps: Sequence[ConvStep | LiveStep], matrices: int, b: Tensor) -> list[Tensor] | None:
    """Room for the coefficients below each convolution; None where they are too many."""
    shapes = []
    for step in steps:
        matrices = b.shape[0] if step.slopes.shape[0] == 2 else matrices
        shapes.append((matrices, b.shape[1], math.prod(step.shape_in)))
    return [b.new_empty(s) for s in shapes] if sum(map(math.prod, shapes)) <= _MOST_KEPT else None


def _told(steps: list[ConvStep], between: Any) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """The steps as the kernel of the gradients is told of them, and the tensors that must stay alive meanwhile."""
    told: list[tuple[int, ...]] = []
    kept: list[Tensor] = []
    for i, step in enumerate(steps):
        slopes, intercepts = dense(step.slopes), dense(step.intercepts)
        lanes, (kh, kw) = lanes_of(step.weight), step.weight.shape[2:]
        taps = taps_of(step.weight, lanes)
        kept += [slopes, intercepts, taps]
        (c, mh, mw), (oc, oh, ow) = step.shape, step.shape_in
        told.append(
            (
                slopes.data_ptr(),
                slopes.shape[0],
                intercepts.data_ptr(),
                mh,
                mw,
                c,
                taps.data_ptr(),
                oh,
                ow,
                oc,
                kh,
                kw,
                *step.stride,
                *step.padding,
                lanes,
                0,
                address(between and between[i]),
            )
        )
    return told, kept


def _filled(steps: list[ConvStep], tensors: Any) -> list[ConvStep]:
    return [
        s._replace(slopes=tensors[3 * i], intercepts=tensors[3 * i + 1], weight=tensors[3 * i + 2])
        for i, s in enumerate(steps)
    ]


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        steps: list[ConvStep],
        example: Tensor,
        rows: Any,
        minus: Any,
        A: Tensor,
        b: Tensor,
        c: Tensor,
        r: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(example, rows, minus, A, c, r, *tensors)
        ctx.steps = steps
        steps = _filled(steps, tensors)
        ctx.between = between_of(steps, A.shape[0], b)
        return through(A, b, example, steps, (c, r), rows, minus, ctx.between)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        example, rows, minus, A, c, r, *tensors = ctx.saved_tensors
        steps, need = _filled(ctx.steps, tensors), ctx.needs_input_grad
        wanted = (*need[6:8], [need[8 + 3 * i + 2] for i in range(len(steps))])
        own, to_c, to_r, of_steps = chain_gradient(A, example, rows, minus, c, r, steps, g, wanted, ctx.between)
        own = gradients._to_rows(own, A, rows, minus)
        return (None, None, None, None, own, g, to_c, to_r, *[t for s in of_steps for t in s])


def chain_gradient(
    A: Tensor,
    example: Tensor,
    rows: Any,
    minus: Any,
    c: Tensor,
    r: Tensor,
    steps: list[ConvStep],
    g: Tensor,
    need: Any,
    between: Any,
    groups: Groups | None = None,
    living: bool = False,
) -> tuple[Tensor, Any, Any, list[tuple[Any, ...]]]:
    """All gradients over a box in one call, a few rows of one example at a time: of the rows before ``rows`` and
    ``minus`` pick, of c and r, and of slopes, intercepts and weight of each step. ``need``: whether those of c, r and
    each weight are wanted. living: lines that are zero have no gradients (any numbers may be returned), so that their
    neurons are left out."""
    A, g, c, r, example = (dense(t) for t in (A, g, c, r, example))
    rows, minus = (None if t is None else t.contiguous() for t in (rows, minus))
    batch, count = steps[0].slopes.shape[1], g.shape[1]
    told, kept = _told(steps, between)
    starts, order = groups or by_example(example, count, batch, A.device)
    to_a = A.new_empty(A.shape[0], count, A.shape[2])
    fresh = torch.empty_like if count else torch.zeros_like  # the kernel sets all of them, when there are rows
    to_c, to_r = (fresh(t) if n else None for t, n in ((c, need[0]), (r, need[1])))
    lines = [(fresh(s), fresh(i)) for s, i, _ in zip(*[iter(kept)] * 3, strict=True)]
    taps = [fresh(t) if n else None for t, n in zip(kept[2::3], need[2], strict=True)]
    _C.bounds_chain_grad(
        rows_args(A, g, example, rows, minus, None, None, None),
        told,
        [(s.data_ptr(), i.data_ptr(), address(t)) for (s, i), t in zip(lines, taps, strict=True)],
        batch,
        c.data_ptr(),
        r.data_ptr(),
        g.data_ptr(),
        starts.data_ptr(),
        address(order),
        to_a.data_ptr(),
        address(to_c),
        address(to_r),
        living,
    )
    found: list[tuple[Any, ...]] = []
    for step, pair, t in zip(steps, lines, taps, strict=True):
        o, channels, kh, kw = step.weight.shape
        w = None if t is None else t[:, : kh * kw * channels].view(o, kh, kw, channels).permute(0, 3, 1, 2)
        found.append((*pair, w))
    return to_a, to_c, to_r, found
