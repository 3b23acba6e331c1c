"""random_start: exact sets, reproducibility, and the distribution."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrobust import ops
from fastrobust.reference import pgd as reference
from pgd_oracles import BATCHES, INF, NORMS, SHAPES, assert_in_ball_and_box, images, same_bits, sizes

CLIPS = ((0.0, 1.0), None, (-0.3, 0.7), (0.1, 0.3))
seeds = st.integers(-(2**63), 2**64 - 1)


def ks(sample: torch.Tensor) -> float:
    """sqrt(n) times the Kolmogorov-Smirnov distance of a sample from the uniform law on [0, 1]."""
    n = sample.numel()
    u = sample.double().flatten().sort().values
    i = torch.arange(n, dtype=torch.float64)
    return math.sqrt(n) * max(((i + 1) / n - u).max().item(), (u - i / n).max().item())


KS_LIMIT = 1.95  # exceeded with probability 0.001 by a true uniform sample; the seeds here are fixed


@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES),
    norm=st.sampled_from(NORMS),
    eps=st.floats(0, 20),
    clip=st.sampled_from(CLIPS),
)
def test_inside_ball_and_box(seed, batch, shape, norm, eps, clip) -> None:
    _, x0, _ = images(seed % 2**31, batch, shape, clip)
    y = ops.random_start(x0, eps, norm, clip, seed=seed)
    assert y.shape == x0.shape and y.dtype == torch.float32
    assert_in_ball_and_box(y, x0, eps, norm, clip)


@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES),
    eps=st.floats(0, 2),
    clip=st.sampled_from(CLIPS),
    first=st.sampled_from([0, 5, 2**31, 2**32 - 16]),
)
def test_linf_is_the_reference_bit_for_bit(seed, batch, shape, eps, clip, first) -> None:
    _, x0, _ = images(seed % 2**31, batch, shape, clip)
    y = ops.random_start(x0, eps, INF, clip, seed=seed, first_example=first)
    assert torch.equal(y, reference.random_start(x0, eps, INF, clip, seed=seed, first_example=first))


@pytest.mark.parametrize("norm", [2, 1])
@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES),
    eps=st.floats(0, 20),
    clip=st.sampled_from(CLIPS),
    first=st.sampled_from([0, 5, 2**31]),
)
def test_l2_and_l1_are_the_reference(norm, seed, batch, shape, eps, clip, first) -> None:
    _, x0, _ = images(seed % 2**31, batch, shape, clip)
    y = ops.random_start(x0, eps, norm, clip, seed=seed, first_example=first)
    want = reference.random_start(x0, eps, norm, clip, seed=seed, first_example=first)
    different = (y - want).abs() > 1e-5 * (1 + eps)
    # a coordinate that just reaches a face is reflected by one and not by the other
    assert different.double().mean().nan_to_num() <= 1e-3 or different.sum() <= 1


def test_infinite_box_and_huge_examples() -> None:
    x0 = torch.zeros(2, 300_001)
    for norm in (2, 1):
        y = ops.random_start(x0, 3.0, norm, None, seed=4)
        size = sizes(y, norm)
        assert (size <= 3).all() and (size > 3 * (1 - 1e-4)).all()  # radius U^(1/n)


def test_kernel_draws_the_published_words() -> None:
    """seed 0, example 0, block 0 is the first known-answer vector of Philox4x32-10 (tests/core/test_philox.py)."""
    y = ops.random_start(torch.full((1, 4), 0.5), 0.5, seed=0)
    words = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert y[0].tolist() == [(w >> 8) * 2.0**-24 for w in words]


# ---- the numbers belong to (seed, example, element) ----


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(5,), (3, 7, 9), (3, 40, 41)])
def test_batches_can_be_cut_anywhere(norm, shape) -> None:
    _, x0, _ = images(1, 16, shape)
    y = ops.random_start(x0, 0.5, norm, seed=99)
    for cuts in ((16,), (1,) * 16, (3, 13), (7, 8, 1)):
        parts, first = [], 0
        for size in cuts:
            parts.append(ops.random_start(x0[first : first + size], 0.5, norm, seed=99, first_example=first))
            first += size
        assert same_bits(torch.cat(parts), y)


@pytest.mark.parametrize("norm", NORMS)
def test_memory_formats_get_the_same_numbers(norm) -> None:
    _, x0, _ = images(1, 3, (3, 6, 5))
    eps = torch.rand(x0.shape) if norm == INF else torch.rand(3)
    y = ops.random_start(x0, eps, norm, seed=99)
    last = x0.contiguous(memory_format=torch.channels_last)
    for other in (last, x0.transpose(1, 3).contiguous().transpose(1, 3), torch._neg_view(-x0)):
        assert torch.equal(ops.random_start(other, eps, norm, seed=99), y)
    assert ops.random_start(last, eps, norm, seed=99).is_contiguous(memory_format=torch.channels_last)
    if norm == INF:
        assert torch.equal(ops.random_start(x0, eps.contiguous(memory_format=torch.channels_last), norm, seed=99), y)


@pytest.mark.parametrize("norm", NORMS)
def test_threads_do_not_matter(norm) -> None:
    _, x0, _ = images(1, 8, (3, 80, 81))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.random_start(x0, 0.5, norm, seed=99)
        torch.set_num_threads(2)
        assert same_bits(ops.random_start(x0, 0.5, norm, seed=99), one)
    finally:
        torch.set_num_threads(before)


def test_seeds_and_examples_differ() -> None:
    x0 = torch.full((4, 64), 0.5)
    for norm in NORMS:
        y = ops.random_start(x0, 0.3, norm, seed=1)
        assert not torch.isclose(y[0], y[1]).all()
        for other in (2, -1, 2**32 + 1, 2**63 + 1, 2**64 - 1):
            assert (ops.random_start(x0, 0.3, norm, seed=other) != y).float().mean() > 0.9
        assert same_bits(ops.random_start(x0, 0.3, norm, seed=-1), ops.random_start(x0, 0.3, norm, seed=2**64 - 1))


def test_no_seed_follows_torchs_generator_and_disturbs_nothing_else() -> None:
    x0 = torch.full((2, 9), 0.5)
    torch.manual_seed(11)
    first, second = ops.random_start(x0, 0.3), ops.random_start(x0, 0.3)
    after = torch.get_rng_state()
    torch.manual_seed(11)
    assert torch.equal(ops.random_start(x0, 0.3), first) and not torch.equal(first, second)
    torch.manual_seed(11)
    for _ in range(2):
        torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    assert torch.equal(torch.get_rng_state(), after)  # one integer a call
    state, python = torch.get_rng_state(), random.getstate()
    ops.random_start(x0, 0.3, seed=3)
    assert torch.equal(torch.get_rng_state(), state) and random.getstate() == python


# ---- the distribution ----


def test_linf_is_uniform_on_the_intersection() -> None:
    x0 = torch.tensor([0.0, 0.1, 0.5, 0.95, 1.0]).repeat(20000, 1)
    y = ops.random_start(x0, 0.3, seed=7).double()
    low, high = (x0.double() - 0.3).clamp_min(0), (x0.double() + 0.3).clamp_max(1)
    u = (y - low) / (high - low)
    for j in range(5):
        assert ks(u[:, j]) < KS_LIMIT
    # neighbours, and the same element of neighbouring examples, are not correlated
    assert torch.corrcoef(u.T).fill_diagonal_(0).abs().max() < 4 / math.sqrt(20000)
    assert torch.corrcoef(torch.stack([u[1:, 0], u[:-1, 0]]))[0, 1].abs() < 4 / math.sqrt(20000)


@pytest.mark.parametrize("norm", [2, 1])
@pytest.mark.parametrize("n", [1, 2, 3, 20, 784])
def test_radius_is_distributed_as_a_power_of_a_uniform(norm, n) -> None:
    batch = 20000 if n <= 20 else 2000
    y = ops.random_start(torch.zeros(batch, n), 2.5, norm, None, seed=n).double()
    radius = y.abs().pow(norm).sum(1).pow(1 / norm) / 2.5
    assert ks(radius**n) < KS_LIMIT
    assert y.mean().abs() < 5 * y.std() / math.sqrt(batch * n)
    assert ((y > 0).double().mean() - 0.5).abs() < 3 / math.sqrt(batch * n)


def test_l2_directions_are_uniform() -> None:
    y = ops.random_start(torch.zeros(40000, 2), 1.0, 2, None, seed=3).double()
    assert ks(torch.atan2(y[:, 0], y[:, 1]) / (2 * math.pi) + 0.5) < KS_LIMIT
    y = ops.random_start(torch.zeros(40000, 3), 1.0, 2, None, seed=3).double()
    y = y / y.norm(dim=1, keepdim=True)
    for j in range(3):  # Archimedes: each coordinate of a point of the sphere is uniform
        assert ks(0.5 * (y[:, j] + 1)) < KS_LIMIT


def test_l1_directions_are_uniform_on_the_simplex() -> None:
    y = ops.random_start(torch.zeros(40000, 2), 1.0, 1, None, seed=3).double()
    assert ks(y[:, 0].abs() / y.abs().sum(1)) < KS_LIMIT
    quadrant = (y[:, 0] > 0) * 2 + (y[:, 1] > 0)
    counts = torch.bincount(quadrant, minlength=4).double()
    assert ((counts - 10000) ** 2 / 10000).sum() < 16.3  # chi-squared, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("norm", [2, 1])
def test_uniform_on_the_intersection_with_faces_at_the_centre(norm) -> None:
    """At a corner of the box the intersection is one orthant of the ball."""
    n = 3
    x0 = torch.tensor([0.0, 1.0, 0.0]).repeat(20000, 1)
    d = (ops.random_start(x0, 0.4, norm, seed=21) - x0).double()
    assert (d[:, 0] >= 0).all() and (d[:, 1] <= 0).all() and (d[:, 2] >= 0).all()
    radius = d.abs().pow(norm).sum(1).pow(1 / norm) / 0.4
    assert ks(radius**n) < KS_LIMIT


def test_normals_of_the_kernel_are_normal() -> None:
    """Element i of an L2 start is radius * t_i / size: with many elements the ratio is a standard normal."""
    y = ops.random_start(torch.zeros(20, 10000), 1.0, 2, None, seed=5).double()
    t = y / y.pow(2).mean(1, keepdim=True).sqrt()
    assert ks(0.5 * (1 + torch.erf(t / math.sqrt(2)))) < KS_LIMIT
    assert t.abs().max() > 4  # tails are there


def test_infinite_linf_radius_is_uniform_on_the_box() -> None:
    y = ops.random_start(torch.full((20000, 1), 0.9), INF, seed=3)
    assert ks(y) < KS_LIMIT


@pytest.mark.parametrize("norm", [2, 1])
@pytest.mark.parametrize("eps", [1e-45, 5e-44, 1e-38, 2.0**-97, 2.0**-95, 1e-20, 1e30, 3e38])
@pytest.mark.parametrize("n", [1, 2, 17, 4000])
def test_radii_at_the_ends_of_float32(norm, eps, n) -> None:
    """Subnormal coordinates do not leave the ball, and a radius over a small size does not overflow."""
    for x0 in (torch.zeros(5, n), torch.rand(5, n)):
        for seed in range(3):
            y = ops.random_start(x0, eps, norm, None, seed=seed)
            assert_in_ball_and_box(y, x0, eps, norm, None)
            assert y.isfinite().all()
        want = reference.random_start(x0, eps, norm, None, seed)
        torch.testing.assert_close(y, want, rtol=2e-5, atol=1e-5 * min(eps, 2.0**100))
    assert (y != 0).any()


@pytest.mark.parametrize("norm", [INF, 2, 1])
def test_numbers_of_examples(norm: float) -> None:
    x0 = torch.rand(7, 3, 5)
    numbers = torch.tensor([4, 2**32 - 1, 0, 11, 12, 3, 4])
    every = ops.random_start(x0, 0.2, norm, seed=5, first_example=numbers)
    for row, number in enumerate(numbers.tolist()):
        one = ops.random_start(x0[row : row + 1], 0.2, norm, seed=5, first_example=number)
        assert torch.equal(every[row : row + 1], one)
    double = ops.random_start(x0.double(), 0.2, norm, seed=5, first_example=numbers)
    assert (double - every).abs().max() < 1e-5
    box = torch.zeros_like(x0), torch.ones_like(x0)
    assert (ops.random_start(x0, 0.2, norm, box, seed=5, first_example=numbers) - every).abs().max() < 1e-6
    assert ops.random_start(x0[:0], 0.2, norm, seed=5, first_example=numbers[:0]).shape == (0, 3, 5)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (torch.tensor([0, 1]), r"first_example: got .*, expected a number or \(3,\) int64 numbers"),
        (torch.tensor([0.0, 1, 2]), r"first_example: got .*, expected a number or \(3,\) int64 numbers"),
        (torch.tensor([0, -1, 2]), r"first_example: got numbers from -1 to 2, expected 0 to 2\*\*32 - 1"),
        (torch.tensor([0, 2**32, 2]), "first_example: got numbers from 0 to 4294967296"),
    ],
)
def test_bad_numbers(numbers: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.random_start(torch.rand(3, 4), 0.1, seed=0, first_example=numbers)
