"""Copies between plain tensors of any strides and the fast layout, pixel by pixel where the layout says they lie."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrobust.ops.binary import _feature_maps as fm


def places(maps: fm.Maps) -> Tensor:
    """Where each pixel (N, C, H, W) lies."""
    n, c, y, x = torch.meshgrid(*(torch.arange(s) for s in maps.size), indexing="ij")
    lanes, block, channel, row, col, phase, phases_h, phases_w, origin = maps.layout
    at = n // lanes * block + n % lanes + origin + c * channel + y // phases_h * row + x // phases_w * col
    return at + (y % phases_h * phases_w + x % phases_w) * phase


sizes = st.tuples(
    st.sampled_from([1, 3, 16, 17]), st.sampled_from([1, 3, 4, 18, 37]), st.integers(1, 9), st.integers(1, 11)
)
forms = st.sampled_from(["contiguous", "channels last", "turned"])


def formed(x: Tensor, form: str) -> Tensor:
    if form == "contiguous":
        return x.contiguous()
    if form == "turned":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).contiguous().as_strided((n, c, h, w), (h * w * c, 1, w * c, c))


@given(
    sizes, st.sampled_from([1, 4, 8, 16]), st.integers(0, 2), st.sampled_from([(1, 1), (2, 2), (1, 3)]), forms, forms
)
def test_copies(size, lanes: int, border: int, phases: tuple[int, int], form: str, back: str) -> None:
    n, c, h, w = size
    maps = fm.Maps(n, c, h, w, lanes, -(-w // phases[1]) + border, border, border, phases)
    x, at = torch.randn(size), places(maps)
    data = fm.to_maps(formed(x, form), maps, torch.full((maps.blocks * maps.block + fm.SLACK,), 7.0))
    assert torch.equal(data[at], x)
    beside = torch.ones(maps.blocks * maps.block, dtype=torch.bool)
    beside[at.flatten()] = False
    assert not data[: len(beside)][beside].any()
    assert torch.equal(data[len(beside) :], torch.full((fm.SLACK,), 7.0))
    out = formed(torch.zeros(size), back)
    assert torch.equal(fm.from_maps(data, maps, out), x)
    other = fm.Maps(n, c, h, w, lanes, w + 1, 1, 1)
    moved = fm.convert_maps(data, maps, other)
    assert torch.equal(moved[places(other)], x)
