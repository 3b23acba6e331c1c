"""The CUDA kernels of Auto-PGD, run on the CPU, against the CPU kernels."""

from __future__ import annotations

import math

import pytest
import torch

from fastrobust import ops
from fastrobust.ops.pgd import _kernels as kernels
from pgd_oracles import INF, NORMS, assert_in_ball_and_box, images


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clip", [(0.0, 1.0), None, (0.1, 0.3)])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7, 9), (3, 16, 16), (8193,)])
def test_apgd_step(on_device, norm, clip, shape) -> None:
    x, x0, grad = images(4, 3, shape, clip)
    previous = images(5, 3, shape, clip)[0]
    n = math.prod(shape)
    keeps = [None, torch.tensor([1, max(1, n // 3), n])] if norm == 1 else [None]
    for eps in (0.3, torch.tensor([0.0, 0.2, 0.7])):
        for keep in keeps:
            for momentum in (0.75, 1.0):
                steps = torch.tensor([0.1, 0.3, 0.6])
                want = ops.apgd_step(x, previous, x0, grad, steps, eps, norm, clip, momentum=momentum, keep=keep)
                got = on_device(
                    ops.apgd_step, x, previous, x0, grad, steps, eps, norm, clip, momentum=momentum, keep=keep
                )
                torch.testing.assert_close(got, want, rtol=0, atol=0 if norm == INF else 1e-5)
                assert_in_ball_and_box(got, x0, eps, norm, clip)


@pytest.mark.parametrize("shape", [(2, 5), (3, 16, 16), (8193,)])
def test_ascent_note(on_device, shape) -> None:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.rand(*s, generator=rng)
    state = [draw(9, *shape), draw(9, *shape), draw(9), draw(9), draw(9), torch.arange(9), draw(9) > 0.5]
    mine = [t.clone() for t in state]
    for sign in (1.0, -1.0):
        value, score, left, grad = draw(9), draw(9), draw(9, *shape), draw(9, *shape)
        value[3] = torch.nan
        kernels.ascent_note(value, score, sign, left, grad, *state)
        on_device(kernels.ascent_note, value, score, sign, left, grad, *mine)
        for a, b in zip(state, mine, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)
