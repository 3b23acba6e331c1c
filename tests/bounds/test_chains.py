"""Chains of convolutions, and windows down them: the kernel against plain torch in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.ops import bounds as ops
from fastrobust.reference import bounds as reference

from .test_stage_rows import grads, near

# of each convolution from the rows on: groups, channels of one before and behind it, kernel, stride, padding, dilation
CHAINS = [
    [((1, 3, 8), (3, 3), (1, 1), (1, 1), (1, 1)), ((1, 2, 3), (4, 4), (2, 2), (1, 1), (1, 1))],
    [((8, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1)), ((2, 3, 4), (3, 2), (1, 2), (1, 0), (2, 1))],
    [
        ((2, 2, 4), (2, 3), (2, 1), (0, 2), (1, 2)),
        ((4, 1, 1), (3, 3), (1, 1), (2, 2), (2, 2)),
        ((1, 1, 4), (3, 3), (1, 1), (1, 1), (1, 1)),
    ],
]


def steps_of(chain: list[Any], batch: int, two: int) -> list[ops.ConvStep]:
    """The last convolution's input is 13 x 11."""
    size, found = (13, 11), []
    for (groups, before, behind), kernel, stride, padding, dilation in reversed(chain):
        shape_in = (groups * before, *size)
        size = tuple(
            (n + 2 * p - (k - 1) * d - 1) // s + 1
            for n, p, k, d, s in zip(size, padding, kernel, dilation, stride, strict=True)
        )
        shape = (groups * behind, *size)
        lines = torch.rand(two, batch, math.prod(shape)), torch.randn(2, batch, math.prod(shape))
        w = torch.randn(groups * behind, before, *kernel) * 0.3
        found.insert(0, ops.ConvStep(*lines, shape, w, stride, padding, shape_in, dilation, groups))
    return found


def down(A: Tensor, b: Tensor, example: Tensor, steps: list[ops.ConvStep], ends: list[Any], q: float) -> Tensor:
    """``ops.concretize_through`` of whole maps in plain torch."""
    for s in steps:
        A, b = reference.linear_back_step(A, b, s.slopes, s.intercepts, example)
        zeros = torch.zeros(A.shape[0] * A.shape[1], *s.shape_in, dtype=A.dtype, requires_grad=True)
        image = A.reshape(-1, *s.shape[1:], s.shape[0]).permute(0, 3, 1, 2)
        out = (F.conv2d(zeros, s.weight, None, s.stride, s.padding, s.dilation, s.groups) * image).sum()
        found = torch.autograd.grad(out, zeros, create_graph=True)[0]
        A = found.permute(0, 2, 3, 1).reshape(A.shape[0], A.shape[1], -1)
    return reference.concretize_rows(A, b, example, *ends, q)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("two,sides", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_chains_with_groups_and_dilation(chain: list[Any], two: int, sides: int) -> None:
    torch.manual_seed(5)
    batch, count = 3, 11
    steps = steps_of(chain, batch, two)
    n = math.prod(steps[-1].shape_in)
    box = torch.randn(batch, n), torch.rand(batch, n)
    wide = [(box[0].double(), box[1].double()), None]
    A, b, example = (
        torch.randn(1, count, math.prod(steps[0].shape)),
        torch.randn(sides, count),
        torch.arange(count) % batch,
    )

    double = [
        s._replace(slopes=s.slopes.double(), intercepts=s.intercepts.double(), weight=s.weight.double()) for s in steps
    ]
    plain = ops.concretize_through(A, b, example, steps, box)
    near(plain, down(A.double(), b.double(), example, double, wide, 1.0).detach(), 2e-5)
    if not ops.recordable(steps):
        with pytest.raises(ValueError, match="got gradients to record, expected no groups"):
            ops.concretize_through(A.requires_grad_(), b, example, steps, box)
        return
    leaves = [A.requires_grad_(), *(t.requires_grad_() for s in steps for t in (s.slopes, s.intercepts, s.weight))]
    others = [
        A.detach().double().requires_grad_(),
        *(t.requires_grad_() for s in double for t in (s.slopes, s.intercepts, s.weight)),
    ]
    got = ops.concretize_through(A, b, example, steps, box)
    assert torch.equal(got.detach(), plain)
    want = down(others[0], b.double(), example, double, wide, 1.0)
    for own, v in zip(grads([got], leaves), grads([want], others), strict=True):
        near(own, v, 1e-4)


def test_no_rows_down_a_chain() -> None:
    steps = steps_of(CHAINS[0], 0, 1)
    n = math.prod(steps[-1].shape_in)
    A, example = torch.zeros(1, 0, math.prod(steps[0].shape)), torch.zeros(0, dtype=torch.int64)
    box = torch.zeros(0, n), torch.zeros(0, n)
    assert ops.concretize_through(A, torch.zeros(2, 0), example, steps, box).shape == (2, 0)
