"""The Square attack's proposals: the kernel against its definition, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastrobust.attacks._windows import Dice, Shape, indices
from fastrobust.ops.pgd.square import NO_WINDOW, Settle, Window, square_propose
from fastrobust.reference import square as reference
from pgd_oracles import assert_proposals_agree

SHAPES = [(1, 1, 1), (1, 1, 9), (3, 8, 7), (33, 5, 5), (130, 3, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_proposals_are_the_definitions(shape: tuple[int, int, int]) -> None:
    assert_proposals_agree(square_propose, shape)


def test_float64_and_strided_scores() -> None:
    x = torch.rand(3, 2, 4, 4, dtype=torch.float64)
    low, high, new, fooled = x - 1, x + 1, x.clone(), torch.zeros(3, dtype=torch.bool)
    window = Window(0, 2, 3)
    square_propose(x, new, low, high, torch.arange(3), 1, NO_WINDOW, window, None)
    assert ((new == low) | (new == high)).flatten(1).sum(1).tolist() == [12, 12, 12]
    single = [t.float() for t in (x, new, low, high)]
    value = torch.zeros(3)
    settled = Settle(torch.ones(1).expand(3), torch.zeros(3, dtype=torch.bool), value, fooled)
    square_propose(*single, torch.arange(3), 1, window, NO_WINDOW, settled)
    assert torch.equal(single[0], new.float()) and value.tolist() == [1, 1, 1] and not fooled.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_windows_are_the_dices(shape: tuple[int, int, int]) -> None:
    """The places and signs that the other norms' windows are drawn with."""
    numbers, seed = torch.tensor([3, 0, 70000]), 2**63 + 5
    dice = Dice(seed, Shape(*shape))
    x = torch.zeros(3, *shape)
    for query in (0, 1, 77):
        dice.places(query, numbers)
        height, width = -(-shape[1] // 2), -(-shape[2] // 2)
        place = indices(*dice.corner(query, 0, height, width), height, width, Shape(*shape)).expand(-1, shape[0], -1)
        signs = dice.channel_signs(query)[:, :, None].expand(-1, -1, place.shape[2])
        want = torch.zeros(3, shape[0], shape[1] * shape[2]).scatter(2, place, signs).view(x.shape)
        for propose in (square_propose, reference.square_propose):
            new = x.clone()
            propose(x, new, x - 1, x + 1, numbers, seed, NO_WINDOW, Window(query, height, width), None)
            assert torch.equal(new, want)


def test_windows_outside_are_refused() -> None:
    x = torch.zeros(1, 1, 4, 4)
    for window in (Window(0, 5, 1), Window(0, 1, 5), Window(-1, 1, 1), Window(0, -1, 1)):
        with pytest.raises(ValueError, match="window: got a window larger than the image"):
            square_propose(x, x.clone(), x, x, torch.arange(1), 0, NO_WINDOW, window, None)
