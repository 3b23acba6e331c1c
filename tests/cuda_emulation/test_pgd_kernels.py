"""The CUDA kernels of the PGD family, run on the CPU, against the CPU kernels: the same formulas, other loops."""

from __future__ import annotations

import math

import pytest
import torch

from fastrobust import ops
from fastrobust.ops.pgd.square import square_move, square_propose
from pgd_oracles import (
    INF,
    NORMS,
    assert_in_ball_and_box,
    assert_moves_agree,
    assert_proposals_agree,
    images,
    same_bits,
)

# unaligned and aligned rows, one thread's work, more than one block, more than one chunk of 8192
SHAPES = ((1,), (5,), (16,), (3, 7, 9), (3, 16, 16), (8193,), (3, 60, 96))
SMALL = SHAPES[:5]
CLIPS = ((0.0, 1.0), None, (0.1, 0.3))
# every box on the smallest examples, one on larger ones, which take long here
BOXES = [(shape, clip) for shape in SHAPES[:3] for clip in CLIPS] + [(shape, (0.1, 0.3)) for shape in SHAPES[3:]]


def check(got, want, norm) -> None:
    if norm == INF:
        assert same_bits(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def parameters(batch, x, norm):
    kinds = [(0.1, 0.3), (torch.rand(batch), torch.rand(batch))]
    if norm == INF:
        kinds += [(torch.rand(x.shape), 0.3), (0.1, torch.rand(x.shape)), (torch.rand(batch), torch.rand(x.shape))]
    return kinds


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "clip"), BOXES)
def test_step(on_device, norm, shape, clip) -> None:
    batch = 3
    x, x0, grad = images(1, batch, shape, clip)
    for step, eps in parameters(batch, x, norm):
        for active in (None, torch.tensor([True, False, True])):
            want = ops.pgd_step(x, x0, grad, step, eps, norm, clip, active)
            got = on_device(ops.pgd_step, x, x0, grad, step, eps, norm, clip, active)
            check(got, want, norm)
            if active is None:
                assert_in_ball_and_box(got, x0, eps, norm, clip)
            elif shape in SMALL:
                in_place = x.clone()
                on_device(ops.pgd_step, in_place, x0, grad, step, eps, norm, clip, active, out=in_place)
                assert same_bits(in_place, got)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES[1:6])
def test_project(on_device, norm, shape) -> None:
    x, x0, _ = images(2, 3, shape)
    for _, eps in parameters(3, x, norm):
        got = on_device(ops.project, x, x0, eps, norm)
        check(got, ops.project(x, x0, eps, norm), norm)
        assert_in_ball_and_box(got, x0, eps, norm, (0, 1))
        assert same_bits(on_device(ops.project, got, x0, eps, norm), got)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5,), (16,), (3, 16, 16)])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_half_gradients_of_every_alignment(on_device, norm, dtype, shape, offset) -> None:
    x, x0, grad = images(3, 2, shape)
    memory = torch.cat([torch.zeros(offset, dtype=dtype), (grad * 1e-4).to(dtype).flatten()])
    half = memory[offset:].view(x.shape)
    check(on_device(ops.pgd_step, x, x0, half, 0.1, 0.3, norm), ops.pgd_step(x, x0, half, 0.1, 0.3, norm), norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned_memory(on_device, norm, offset) -> None:
    x, x0, grad = images(4, 2, (64,))
    moved = [torch.cat([torch.zeros(offset), t.flatten()])[offset:].view(t.shape) for t in (x, x0, grad)]
    out = torch.full((128 + offset + 4,), 7.0)
    on_device(ops.pgd_step, *moved, 0.1, 0.3, norm, out=out[offset : offset + 128].view(2, 64))
    check(out[offset : offset + 128].view(2, 64), ops.pgd_step(x, x0, grad, 0.1, 0.3, norm), norm)
    assert (out[:offset] == 7).all() and (out[offset + 128 :] == 7).all()


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_that_are_not_finite_or_of_extreme_size(on_device, norm) -> None:
    x, x0, grad = images(5, 4, (3, 20, 60))
    grad[0, 0, 0] = torch.tensor([math.nan, INF, -INF, 0.0, -0.0] * 12)
    for size in (1e-42, 1e-38, 1.0, 1e38):
        g = grad * size
        got = on_device(ops.pgd_step, x, x0, g, 0.1, 0.3, norm)
        check(got, ops.pgd_step(x, x0, g, 0.1, 0.3, norm), norm)
        assert_in_ball_and_box(got, x0, 0.3, norm, (0, 1))
    for eps in (0.0, torch.zeros(4)):
        assert same_bits(on_device(ops.pgd_step, x, x0, grad, 0.1, eps, norm), x0)


def test_l1_ties_are_shared_in_index_order(on_device) -> None:
    x = torch.rand(2, 1500)
    grad = torch.randint(-2, 3, x.shape).float()
    for step in (0.3, 700.0, 2000.0):
        torch.testing.assert_close(
            on_device(ops.pgd_step, x, x, grad, step, INF, 1), ops.pgd_step(x, x, grad, step, INF, 1), rtol=0, atol=1e-6
        )


def test_unnormalised_and_targeted(on_device) -> None:
    x, x0, grad = images(6, 3, (9000,))
    for options in ({"normalize": False}, {"targeted": True}):
        for norm in NORMS if "targeted" in options else (2,):
            check(
                on_device(ops.pgd_step, x, x0, grad, 0.1, 0.3, norm, **options),
                ops.pgd_step(x, x0, grad, 0.1, 0.3, norm, **options),
                norm,
            )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_fosc_and_fused_step(on_device, norm, shape) -> None:
    x, x0, grad = images(7, 3, shape)
    for step, eps in parameters(3, x, norm):
        want = ops.fosc(x, x0, grad, eps, norm)
        torch.testing.assert_close(on_device(ops.fosc, x, x0, grad, eps, norm), want, rtol=1e-6, atol=1e-5)
        threshold = want.sort().values[:2].mean().item()  # between two of them
        for active in (None, torch.tensor([True, False, True])):
            got = on_device(ops.pgd_step_fosc, x, x0, grad, step, eps, threshold, norm, active=active)
            cpu = ops.pgd_step_fosc(x, x0, grad, step, eps, threshold, norm, active=active)
            check(got[0], cpu[0], norm)
            torch.testing.assert_close(got[1], cpu[1], rtol=1e-6, atol=1e-5)
            assert torch.equal(got[2], cpu[2])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", ["paper", "authors"])
@pytest.mark.parametrize("shape", [(5,), (16,), (3, 60, 96)])
def test_atas(on_device, norm, variant, shape) -> None:
    x, x0, grad = images(8, 3, shape)
    v = torch.rand(3)
    for active in (None, torch.tensor([True, False, True])):
        for step in (0.05, torch.rand(3)):
            got = on_device(ops.atas_step, x, x0, grad, v, step, 0.3, norm, variant=variant, active=active)
            want = ops.atas_step(x, x0, grad, v, step, 0.3, norm, variant=variant, active=active)
            for a, b in zip(got, want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("shape", "clip"), BOXES)
def test_random_start_draws_the_same_numbers(on_device, norm, shape, clip) -> None:
    _, x0, _ = images(9, 3, shape, clip)
    kinds = [0.3, torch.rand(3)] + ([torch.rand(x0.shape)] if norm == INF else [])
    for eps in kinds:
        for seed, first in ((0, 0), (2**64 - 1, 2**31), (7, torch.tensor([9, 2**32 - 1, 0]))):
            got = on_device(ops.random_start, x0, eps, norm, clip, seed=seed, first_example=first)
            assert same_bits(got, ops.random_start(x0, eps, norm, clip, seed=seed, first_example=first))


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (3, 0)])
def test_empty(on_device, shape) -> None:
    x = torch.zeros(shape)
    for norm in NORMS:
        assert on_device(ops.pgd_step, x, x, x, 0.1, 0.3, norm).shape == shape
        assert on_device(ops.random_start, x, 0.3, norm, seed=1).shape == shape
        assert on_device(ops.fosc, x, x, x, 0.3, norm).tolist() == [0.0] * shape[0]
        assert on_device(ops.pgd_step_fosc, x, x, x, 0.1, 0.3, 0.0, norm)[0].shape == shape
        assert on_device(ops.atas_step, x, x, x, torch.zeros(shape[0]), 0.1, 0.3, norm)[0].shape == shape


@pytest.mark.parametrize("name", ["cross_entropy", "margin_loss", "dlr_loss", "dlr_targeted_loss", "kl_divergence"])
@pytest.mark.parametrize("classes", [4, 10, 32, 33, 1000])
@pytest.mark.parametrize("tied", [False, True])
def test_losses(on_device, name, classes, tied) -> None:
    batch = 9  # not a multiple of the warps of a block
    logits = 3 * torch.randn(batch, classes)
    if tied:
        logits = logits.round()
        if name.startswith("dlr"):
            logits[:, 1] += 7
    labels, targets = torch.randint(0, classes, (2, batch))
    others = {"kl_divergence": (torch.randn(batch, classes),), "dlr_targeted_loss": (labels, targets)}.get(
        name, (labels,)
    )
    want, got = getattr(ops, name)(logits, *others), on_device(getattr(ops, name), logits, *others)
    torch.testing.assert_close(got.value, want.value, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.grad, want.grad, rtol=1e-6, atol=1e-7)
    assert on_device(getattr(ops, name), logits[:0], *(o[:0] for o in others)).value.shape == (0,)


@pytest.mark.parametrize("shape", [(1, 1, 9), (3, 8, 7), (130, 3, 4), (1, 28, 28)])
def test_square_proposals(on_device, shape) -> None:
    assert_proposals_agree(lambda *args: on_device(square_propose, *args), shape)


@pytest.mark.parametrize("norm", [1.0, 2.0])
@pytest.mark.parametrize("shape", [(1, 1, 9), (3, 8, 7), (130, 3, 4), (3, 16, 20)])
def test_square_moves(on_device, shape, norm) -> None:
    assert_moves_agree(lambda *args: on_device(square_move, *args), shape, norm)
