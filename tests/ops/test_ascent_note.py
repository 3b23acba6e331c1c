"""What Auto-PGD notes of an example after a step, and what is fooled: the kernels against their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrobust.ops.pgd import _kernels as kernels
from fastrobust.ops.pgd.losses import agrees
from fastrobust.reference import pgd as reference


def test_notes_are_the_definitions() -> None:
    rng = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=rng)
    state = [draw(9, 2, 5), draw(9, 2, 5), draw(9), draw(9), draw(9), torch.arange(9), draw(9) > 0.5]
    mine = [t.clone() for t in state]
    for sign in (1.0, -1.0, 1.0):
        value, score, left, grad = draw(9), draw(9), draw(9, 2, 5), draw(9, 2, 5)
        value[3] = torch.nan
        reference.ascent_note(value, score, sign, left, grad, *state)
        kernels.ascent_note(value, score, sign, left, grad, *mine)
        for a, b in zip(state, mine, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=0, equal_nan=True)


def checkpoint(rng: torch.Generator, batch: int = 16) -> list[Tensor]:
    """Of a run's examples, every case of a checkpoint: in the order of ``ascent_check``'s arguments."""
    draw = lambda *shape: torch.rand(*shape, generator=rng)
    value, mark = draw(batch).round(decimals=1), draw(batch).round(decimals=1)
    rises = torch.randint(0, 20, (batch,), generator=rng)
    points = [draw(batch, 2, 5) for _ in range(4)]
    return [
        *points,
        draw(batch),
        mark,
        torch.maximum(value, mark),
        draw(batch),
        rises,
        draw(batch) > 0.5,
        draw(batch) > 0.5,
    ]


def test_checkpoints_are_the_definitions() -> None:
    """Condition 1 and 2 of Croce & Hein 2020, section 3, example by example, and the kernel as the definition."""
    state = checkpoint(torch.Generator().manual_seed(0), 64)
    first, mine, want = ([t.clone() for t in state] for _ in range(3))
    kernels.ascent_check(8.25, *mine)
    reference.ascent_check(8.25, *want)
    for a, b in zip(mine, want, strict=True):
        assert torch.equal(a, b)
    went = 0
    x, grad, best, best_grad, value, mark, best_value, factor, rises, best_is_x, halved = first
    for k in range(64):
        halve = int(rises[k]) < 8.25 or (not halved[k] and float(best_value[k]) == float(mark[k]))
        back = halve and not best_is_x[k]
        went += back
        assert torch.equal(mine[0][k], best[k] if back else x[k])
        assert torch.equal(mine[1][k], best_grad[k] if back else grad[k])
        assert float(mine[4][k]) == float(best_value[k] if back else value[k])
        assert float(mine[7][k]) == float(factor[k]) / (2 if halve else 1)
        assert float(mine[5][k]) == float(best_value[k]) and int(mine[8][k]) == 0 and bool(mine[10][k]) == halve
    assert 10 < went < 50


@pytest.mark.parametrize("classes", [2, 10, 33])
def test_agreement_is_argmaxs(classes: int) -> None:
    """Ties go to the first class, NaN is the largest; what is no class is never the answer."""
    rng = torch.Generator().manual_seed(classes)
    logits = torch.randint(0, 4, (200, classes), generator=rng).float()
    logits[torch.rand(200, classes, generator=rng) < 0.02] = torch.nan
    labels = torch.where(
        torch.rand(200, generator=rng) < 0.5, logits.argmax(1), torch.randint(0, classes, (200,), generator=rng)
    )
    labels[:2] = torch.tensor([-100, classes])
    want = logits.argmax(1) == labels
    assert 20 < int(want.sum()) < 200
    for given in (logits, logits.double(), logits.T.contiguous().T):
        assert torch.equal(agrees(given, labels), want) and torch.equal(agrees(given, labels, False), ~want)
