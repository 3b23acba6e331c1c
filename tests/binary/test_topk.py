"""Top-k masks against a stable sort and the authors' rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastrobust as fr
from fastrobust.reference import binary as reference


def brute_force(scores: Tensor, keep: int) -> Tensor:
    """The keep largest pairs (value, index), in Python."""
    ranked = sorted(enumerate(scores.flatten().tolist()), key=lambda pair: (pair[1], pair[0]))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    for i, _ in ranked[len(ranked) - keep :]:
        mask[i] = True
    return mask.reshape(scores.shape)


@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=300),
    share=st.floats(0, 1),
)
def test_equals_brute_force(values: list[float], share: float) -> None:
    scores = torch.tensor(values, dtype=torch.float32)
    keep = int(share * len(values))
    want = brute_force(scores, keep)
    assert torch.equal(fr.ops.topk_mask(scores, keep), want)
    assert torch.equal(reference.topk_mask(scores, keep), want)
    assert torch.equal(fr.ops.topk_mask(scores.double(), keep), want)


@pytest.mark.parametrize("size", [1, 15, 65535, 65536, 65537, 300_001])
@pytest.mark.parametrize("levels", [1, 2, 50, None])
def test_large_and_tied(size: int, levels: int | None) -> None:
    scores = torch.randn(size)
    if levels is not None:
        scores = (scores * levels / 4).round() if levels > 1 else torch.zeros(size)
    for keep in {0, 1, size // 100, size // 3, size - 1, size}:
        mask = fr.ops.topk_mask(scores, keep)
        assert int(mask.sum()) == keep
        assert torch.equal(mask, reference.topk_mask(scores, keep))


def test_negative_zero_is_a_tie_and_denormals_are_not() -> None:
    scores = torch.tensor([0.0, -0.0, 0.0, -0.0])
    assert fr.ops.topk_mask(scores, 2).tolist() == [False, False, True, True]
    tiny = torch.tensor([1e-45, 0.0, -1e-45])
    assert fr.ops.topk_mask(tiny, 1).tolist() == [True, False, False]


@pytest.mark.parametrize("keep_rate, size, kept", [(0.8, 100, 81), (0.05, 589_824, 29_492), (0.002, 1728, 4)])
def test_the_authors_rule(keep_rate: float, size: int, kept: int) -> None:
    """GetSubnet of the authors' code: sort ascending, zero the first int((1 - k) n)."""
    assert reference.kept_by_rate(size, keep_rate) == kept
    scores = torch.randperm(size).float()
    flat = torch.ones(size)
    flat[scores.sort().indices[: int((1 - keep_rate) * size)]] = 0
    assert torch.equal(fr.ops.topk_mask(scores, kept).float(), flat)


def test_shapes_and_layers() -> None:
    layers = [torch.randn(3, 4, 3, 3), torch.randn(0), torch.randn(7, 2).t()]
    masks = fr.ops.topk_masks(layers, [5, 0, 14])
    assert [int(m.sum()) for m in masks] == [5, 0, 14]
    for scores, mask in zip(layers, masks, strict=True):
        assert mask.shape == scores.shape and mask.dtype == torch.bool


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite(bad: float) -> None:
    scores = torch.randn(1000)
    scores[77] = bad
    with pytest.raises(ValueError, match="scores: expected finite values, got 1 infinite or NaN of 1000"):
        fr.ops.topk_mask(scores, 10)
    with pytest.raises(ValueError, match="scores: expected finite"):
        fr.ops.topk_mask(scores.double(), 10)


def test_bad_arguments() -> None:
    scores = torch.randn(10)
    for keep in (-1, 11):
        with pytest.raises(ValueError, match=f"keep: expected 0 to 10, the number of scores, got {keep}"):
            fr.ops.topk_mask(scores, keep)
    with pytest.raises(TypeError, match="keep: expected an int"):
        fr.ops.topk_mask(scores, 2.0)
    with pytest.raises(TypeError, match="scores: expected float32"):
        fr.ops.topk_mask(scores.half(), 2)
    with pytest.raises(ValueError, match="keeps: expected one count per layer"):
        fr.ops.topk_masks([scores], [1, 2])


@pytest.mark.cuda
@pytest.mark.parametrize("size", [1, 5000, 300_001])
@pytest.mark.parametrize("levels", [1, 20, None])
def test_cuda_equals_reference(size: int, levels: int | None) -> None:
    scores = torch.randn(size)
    if levels is not None:
        scores = (scores * levels / 4).round()
    for keep in {0, 1, size // 3, size}:
        assert torch.equal(fr.ops.topk_mask(scores.cuda(), keep).cpu(), reference.topk_mask(scores, keep))
