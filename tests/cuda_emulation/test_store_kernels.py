"""The CUDA kernels of the store, run on the CPU, against the CPU kernels: the same bits, duplicates included."""

from __future__ import annotations

import pytest
import torch

from fastrobust import ops
from pgd_oracles import INF, assert_in_ball_and_box, same_bits

CASES = [(f, p, first) for f in (1, 2, 4) for p in (0, 4) for first in (False, True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("factor", "padding", "first"), CASES)
@pytest.mark.parametrize("size", [(8, 12), (12, 20)])
def test_gather_and_scatter(on_device, dtype, factor, padding, first, size) -> None:
    g = torch.Generator().manual_seed(factor + padding)
    batch, channels = 4, 3
    frame = [(n + 2 * padding) // factor for n in size]
    store = (0.2 * torch.randn(7, channels, *frame, generator=g)).to(dtype)
    index = torch.tensor([3, 6, 3, 0])
    x = torch.rand(batch, channels, *size, generator=g)
    adv = x + 0.1 * torch.randn(x.shape, generator=g)
    move = {
        "offsets": torch.randint(-6, 7, (batch, 2), generator=g), "flips": torch.tensor([True, False, False, True]),
        "padding": padding, "augment_first": first,
    }  # fmt: skip
    for eps, clip in ((0.1, (0.0, 1.0)), (torch.rand(batch, generator=g), None)):
        got = on_device(ops.store_gather, store, index, x, eps, INF, clip, **move)
        assert same_bits(got, ops.store_gather(store, index, x, eps, INF, clip, **move))
        assert_in_ball_and_box(got, x, eps, INF, clip)
    out = store.clone()
    on_device(ops.store_scatter, out, index, adv, x, **move)
    assert same_bits(out.float(), ops.store_scatter(store, index, adv, x, **move).float())


@pytest.mark.parametrize("width", [1, 7, 12, 70])
@pytest.mark.parametrize("offset", [0, 1])
def test_shift_flip_of_every_alignment(on_device, width, offset) -> None:
    memory = torch.rand(3 * 2 * 5 * width + offset)
    x = memory[offset:].view(3, 2, 5, width)
    offsets, flips = torch.tensor([[1, -3], [-2, 9], [0, 0]]), torch.tensor([True, False, True])
    for inverse in (False, True):
        got = on_device(ops.shift_flip, x, offsets, flips, inverse)
        assert same_bits(got, ops.shift_flip(x, offsets, flips, inverse))
