"""The CUDA kernels of Auto-PGD, run on the CPU, against the CPU kernels."""

from __future__ import annotations

import math

import pytest
import torch

from fastrobust import ops
from fastrobust.ops.pgd import _kernels as kernels
from fastrobust.ops.pgd import losses
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


@pytest.mark.parametrize("shape", [(2, 5), (3, 16, 16), (8193,)])
def test_ascent_check(on_device, shape) -> None:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.rand(*s, generator=rng)
    points = [draw(16, *shape) for _ in range(4)]
    mark, value = draw(16).round(decimals=1), draw(16).round(decimals=1)
    state = [
        *points,
        draw(16),
        mark,
        torch.maximum(mark, value),
        draw(16),
        torch.arange(16),
        draw(16) > 0.5,
        draw(16) > 0.5,
    ]
    mine = [t.clone() for t in state]
    kernels.ascent_check(8.25, *state)
    on_device(kernels.ascent_check, 8.25, *mine)
    assert all(torch.equal(a, b) for a, b in zip(state, mine, strict=True)) and not torch.equal(state[0], points[2])


@pytest.mark.parametrize("classes", [2, 10, 64, 1001])
def test_agreement(on_device, classes) -> None:
    rng = torch.Generator().manual_seed(classes)
    logits = torch.randint(0, 4, (50, classes), generator=rng).float()
    logits[torch.rand(50, classes, generator=rng) < 0.5 / classes] = torch.nan
    labels = torch.where(
        torch.rand(50, generator=rng) < 0.5, logits.argmax(1), torch.randint(0, classes, (50,), generator=rng)
    )
    labels[:2] = torch.tensor([-100, classes])
    for wanted in (True, False):
        assert torch.equal(on_device(losses.agrees, logits, labels, wanted), (logits.argmax(1) == labels) == wanted)
