"""The Square attack's proposals: the kernel against its definition, bit for bit."""

from __future__ import annotations

import pytest
import torch

from fastrobust.ops.pgd.square import NO_WINDOW, Settle, Window, square_move, square_propose
from fastrobust.reference import square as reference
from fastrobust.reference.random import words_of
from pgd_oracles import assert_moves_agree, assert_proposals_agree

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


@pytest.mark.parametrize("norm", [1.0, 2.0])
@pytest.mark.parametrize("shape", [*SHAPES, (3, 16, 20), (1, 40, 40)])
def test_moves_are_the_definitions(shape: tuple[int, int, int], norm: float) -> None:
    assert_moves_agree(square_move, shape, norm)


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_moves_are_algorithm_3(norm: float) -> None:
    """Pixel by pixel: Andriushchenko et al. 2020, algorithm 3; norm 1: the public AutoAttack's variant of it."""
    rng, (channels, height, width), size = torch.Generator().manual_seed(1), (3, 6, 7), 3
    x0 = torch.rand(4, channels, height, width, generator=rng, dtype=torch.float64)
    x = x0 + 0.1 * torch.randn(x0.shape, generator=rng, dtype=torch.float64)
    pattern = torch.randn(2, size, size, generator=rng, dtype=torch.float64)
    seed, query, eps, new = 77, 5, 3.0, torch.empty_like(x)
    square_move(x, new, x0, torch.arange(4), seed, Window(query, size, size), norm, eps, pattern, None)
    length = lambda values: sum(abs(v) ** norm for v in values) ** (1 / norm)
    for b in range(4):
        words = words_of(seed, torch.tensor([b]), 8, reference.STREAM, 3 * query)[0].tolist()
        places = [(words[k] >> 8) * (side - size + 1) >> 24 for k, side in enumerate((height, width, height, width))]
        first, second = ([(r + top, c + left) for r in range(size) for c in range(size)] for top, left in
                         (places[:2], places[2:]))  # fmt: skip
        shape = pattern[words[3] & 1].flatten().tolist()
        delta = (x[b] - x0[b]).tolist()
        used = length([v for plane in delta for row in plane for v in row])
        for k, plane in enumerate(delta):
            both = length([plane[r][c] for r, c in {*first, *second}])
            old = [plane[r][c] for r, c in first]
            sign = -1 if words[4] >> k & 1 else 1
            fresh = [sign * p + o / length(old) for p, o in zip(shape, old, strict=True)]
            if norm == 2:
                room = (max(eps**2 - used**2, 0) / channels + both**2) ** 0.5
            else:
                room = max(eps - used, 0) + channels * both
            unit = length(fresh)
            for r, c in second:
                plane[r][c] = 0.0
            for (r, c), v in zip(first, fresh, strict=True):
                plane[r][c] = v / unit * room
        want = torch.tensor(delta, dtype=torch.float64)
        if norm == 2:
            want *= eps / want.norm()
        torch.testing.assert_close(new[b] - x0[b], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm", [1.0, 2.0])
def test_moves_do_not_depend_on_the_batch(norm: float) -> None:
    x0 = torch.rand(6, 3, 9, 8)
    x, pattern, numbers = x0 + 0.1 * torch.rand(6, 3, 9, 8), torch.randn(2, 3, 3), torch.tensor([5, 1, 2, 9, 4, 7])
    whole, some = torch.empty_like(x), torch.empty(2, 3, 9, 8)
    square_move(x, whole, x0, numbers, 1, Window(3, 3, 3), norm, 2.0, pattern, None)
    keep = torch.tensor([4, 1])
    square_move(x[keep], some, x0[keep], numbers[keep], 1, Window(3, 3, 3), norm, 2.0, pattern, None)
    assert torch.equal(whole[keep], some)


def test_windows_outside_are_refused() -> None:
    x = torch.zeros(1, 1, 4, 4)
    for window in (Window(0, 5, 1), Window(0, 1, 5), Window(-1, 1, 1), Window(0, -1, 1)):
        with pytest.raises(ValueError, match="window: got a window larger than the image"):
            square_propose(x, x.clone(), x, x, torch.arange(1), 0, NO_WINDOW, window, None)
        with pytest.raises(ValueError, match="window: got a window larger than the image"):
            square_move(x, x.clone(), x, torch.arange(1), 0, window, 2.0, 1.0, torch.ones(2, 5, 5), None)
