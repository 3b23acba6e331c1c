"""What Auto-PGD notes of an example after a step: the kernel against its definition."""

from __future__ import annotations

import torch

from fastrobust.ops.pgd import _kernels as kernels
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
