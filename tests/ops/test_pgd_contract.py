"""The numerics contract: exact ball and box, zero, NaN, infinite, tiny and huge gradients, empty and single inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrobust import ops
from pgd_oracles import (
    BATCHES,
    INF,
    NORMS,
    SHAPES,
    assert_in_ball_and_box,
    bits,
    images,
    inside_box,
    rows,
    same_bits,
    step64,
)

CLIPS = ((0.0, 1.0), None, (-0.3, 0.7), (0.1, 0.3), (-2.1179, 2.64))
seeds = st.integers(0, 2**31)
radii = st.sampled_from([0.0, 1e-40, 1e-30, 1e-6, 8 / 255, 0.1, 0.3, 0.5, 1.0, 12.0, 1e30]) | st.floats(1e-7, 20.0)
norms = st.sampled_from(NORMS)


@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES),
    norm=norms,
    eps=radii,
    step=radii,
    clip=st.sampled_from(CLIPS),
)
def test_ball_and_box_hold_exactly(seed, batch, shape, norm, eps, step, clip) -> None:
    x, x0, grad = images(seed, batch, shape, clip)
    y = ops.pgd_step(x, x0, grad, step, eps, norm, clip)
    assert y.shape == x.shape and y.dtype == torch.float32
    assert_in_ball_and_box(y, x0, eps, norm, clip)
    # many steps accumulate nothing
    for _ in range(3):
        y = ops.pgd_step(y, x0, -grad, step, eps, norm, clip, out=y)
    assert_in_ball_and_box(y, x0, eps, norm, clip)


@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES),
    norm=norms,
    eps=radii,
    clip=st.sampled_from(CLIPS),
)
def test_projection_is_inside_and_idempotent(seed, batch, shape, norm, eps, clip) -> None:
    x, x0, _ = images(seed, batch, shape, clip)
    y = ops.project(x, x0, eps, norm, clip)
    assert_in_ball_and_box(y, x0, eps, norm, clip)
    assert same_bits(ops.project(y, x0, eps, norm, clip), y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("clip", [(0.0, 0.3), (0.1, 0.7), (1 / 3, 2 / 3), (-0.3, 0.9)])
def test_faces_that_float32_does_not_have_are_rounded_inwards(norm, clip) -> None:
    low, high = inside_box(clip)
    x0 = torch.full((2, 19), 0.5 * (low + high))
    for sign, face in ((1.0, high), (-1.0, low)):
        y = ops.pgd_step(x0, x0, torch.full_like(x0, sign), 100.0, 100.0, norm, clip)
        assert (y == face).all()
        assert_in_ball_and_box(y, x0, 100.0, norm, clip)
        start = ops.random_start(x0, 100.0, norm, clip, seed=1)
        assert_in_ball_and_box(start, x0, 100.0, norm, clip)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("clip", CLIPS)
def test_eps_zero_returns_x0_bit_for_bit(norm, batch, clip) -> None:
    x, x0, grad = images(3, batch, (3, 5, 7), clip)
    for eps in (0.0, 0, torch.zeros(batch)):
        assert same_bits(ops.pgd_step(x, x0, grad, 0.3, eps, norm, clip), x0)
        assert same_bits(ops.project(x, x0, eps, norm, clip), x0)
        assert same_bits(ops.random_start(x0, eps, norm, clip, seed=5), x0)


def test_eps_zero_keeps_the_sign_of_zero() -> None:
    x0 = torch.tensor([[0.0, -0.0] * 20])
    for x in (torch.full_like(x0, 0.3), torch.full_like(x0, -0.3), -x0, x0.clone()):
        for clip in ((0.0, 1.0), (-1.0, 0.0), None):
            assert same_bits(ops.pgd_step(x, x0, -x, 0.1, 0.0, INF, clip), x0)


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, batch=st.sampled_from(BATCHES), shape=st.sampled_from(SHAPES))
def test_zero_gradient_moves_nothing(norm, seed, batch, shape) -> None:
    _, x0, grad = images(seed, batch, shape)
    inside = ops.random_start(x0, 0.25, norm, seed=seed)
    for zero in (torch.zeros_like(x0), -torch.zeros_like(x0), torch.full_like(x0, math.nan)):
        assert same_bits(ops.pgd_step(inside, x0, zero, 0.1, 0.25, norm), inside)
    assert same_bits(ops.pgd_step(inside, x0, grad, 0.0, 0.25, norm), inside)  # nor does a step of zero


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(seed=seeds, shape=st.sampled_from(SHAPES[1:]))
def test_nan_coordinates_count_as_zero(norm, dtype, seed, shape) -> None:
    x, x0, grad = images(seed, 7, shape)
    grad = grad.to(dtype)
    hole = torch.rand(grad.shape, generator=torch.Generator().manual_seed(seed)) < 0.3
    hole[3:] = False  # examples 3 to 6 have no NaN
    broken, zeroed = grad.masked_fill(hole, math.nan), grad.masked_fill(hole, 0.0)
    y = ops.pgd_step(x, x0, broken, 0.1, 0.4, norm)
    assert same_bits(y, ops.pgd_step(x, x0, zeroed, 0.1, 0.4, norm))
    assert same_bits(y[3:], ops.pgd_step(x, x0, grad, 0.1, 0.4, norm)[3:])
    assert torch.equal(ops.fosc(x, x0, broken, 0.4, norm), ops.fosc(x, x0, zeroed, 0.4, norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("normalize", [True, False])
def test_infinite_gradients_stay_inside_and_touch_nobody_else(norm, normalize) -> None:
    x, x0, grad = images(11, 5, (3, 6, 6))
    broken = grad.clone()
    broken[0, 0, 0, 0] = INF
    broken[1, 1, 2, 3] = -INF
    broken[2] = INF
    broken[3, 0, 0] = torch.tensor([INF, -INF, math.nan, 1.0, -1.0, 0.0])
    y = ops.pgd_step(x, x0, broken, 0.3, 0.4, norm, normalize=normalize)
    assert_in_ball_and_box(y, x0, 0.4, norm, (0.0, 1.0))
    assert same_bits(y[4], ops.pgd_step(x, x0, grad, 0.3, 0.4, norm, normalize=normalize)[4])
    assert not ops.fosc(x, x0, broken, 0.4, norm).isnan().any()


def test_infinite_coordinate_takes_the_whole_l2_step() -> None:
    x0 = torch.full((1, 40), 0.5)
    grad = torch.randn(1, 40)
    grad[0, 7] = -INF
    y = ops.pgd_step(x0, x0, grad, 0.25, 10.0, norm=2)
    want = x0.clone()
    want[0, 7] = 0.25
    torch.testing.assert_close(y, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e-30, 1.0, 1e19, 1e30, 1e38, 3e38])
@pytest.mark.parametrize("n", [1, 5, 16, 33, 3072])
def test_l2_step_has_its_length_for_gradients_of_any_size(size, n) -> None:
    x0 = torch.zeros(3, n)
    signs = torch.randint(0, 2, (3, n), generator=torch.Generator().manual_seed(n)).float() * 2 - 1
    y = ops.pgd_step(x0, x0, signs * size, 0.5, 10.0, norm=2, clip=None)
    torch.testing.assert_close(y.double(), 0.5 * signs.double() / math.sqrt(n), rtol=1e-6, atol=0)


@given(seed=seeds, exponent=st.integers(-37, 38))
def test_l2_direction_does_not_depend_on_the_gradients_size(seed, exponent) -> None:
    x, x0, grad = images(seed, 3, (50,))
    grad = (grad / grad.abs().max()).double()
    want = step64(x, x0, grad, 0.2, 0.5, 2, None)
    y = ops.pgd_step(x, x0, (grad * 10.0**exponent).float(), 0.2, 0.5, 2, None)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-6)


@given(
    seed=seeds, batch=st.sampled_from(BATCHES), shape=st.sampled_from(SHAPES), norm=norms, clip=st.sampled_from(CLIPS)
)
def test_radius_of_every_kind_holds_exactly(seed, batch, shape, norm, clip) -> None:
    x, x0, grad = images(seed, batch, shape, clip)
    generator = torch.Generator().manual_seed(seed)
    per_example = torch.rand(batch, generator=generator, dtype=torch.float64)
    kinds = [per_example, per_example.float(), per_example.half(), torch.tensor(0.3, dtype=torch.float64)]
    if norm == INF:
        per_element = torch.rand(x.shape, generator=generator, dtype=torch.float64)
        kinds += [per_element, per_element.bfloat16()]
    for eps in kinds:
        y = ops.pgd_step(x, x0, grad, 0.3, eps, norm, clip)
        assert_in_ball_and_box(y, x0, eps, norm, clip)
        assert_in_ball_and_box(ops.random_start(x0, eps, norm, clip, seed=seed), x0, eps, norm, clip)


@given(seed=seeds, norm=norms)
def test_zeros_in_a_per_example_radius_and_step(seed, norm) -> None:
    x, x0, grad = images(seed, 7, (3, 4, 4))
    eps = torch.tensor([0.0, 0.3, 0.0, 0.1, 1.0, 0.0, 2.0])
    y = ops.pgd_step(x, x0, grad, 0.2, eps, norm)
    still = eps == 0
    assert same_bits(y[still], x0[still])
    assert not torch.equal(y[~still], x0[~still])
    inside = ops.project(x, x0, 1.0, norm)
    z = ops.pgd_step(inside, x0, grad, eps, 1.0, norm)
    assert same_bits(z[still], inside[still])
    assert (bits(z[~still]) != bits(inside[~still])).flatten(1).any(1).all()


@pytest.mark.parametrize("norm", NORMS)
def test_infinite_radius_is_no_ball(norm) -> None:
    x, x0, _ = images(2, 3, (4, 4))
    assert same_bits(ops.project(x, x0, INF, norm, None), x)
    assert same_bits(ops.project(x, x0, INF, norm), x.clamp(0, 1))


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (3, 0), (2, 3, 0, 4)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_inputs(shape, norm, dtype) -> None:
    x = torch.zeros(shape, dtype=dtype)
    parameters: list = [0.1, torch.full((shape[0],), 0.1)]
    if norm == INF:
        parameters.append(torch.full(shape, 0.1))
    for eps in parameters:
        assert ops.pgd_step(x, x, x, 0.1, eps, norm).shape == shape
        assert ops.project(x, x, eps, norm).shape == shape
        assert ops.random_start(x, eps, norm, seed=1).shape == shape
        assert ops.fosc(x, x, x, eps, norm).tolist() == [0.0] * shape[0]
        moved, value, keep = ops.pgd_step_fosc(x, x, x, 0.1, eps, 0.0, norm)
        assert moved.shape == shape and value.tolist() == [0.0] * shape[0] and keep.all()
        assert not ops.pgd_step_fosc(x, x, x, 0.1, eps, 0.0, norm, active=keep)[2].any()
        moved, v, alpha = ops.atas_step(x, x, x, torch.zeros(shape[0], dtype=dtype), 0.1, eps, norm)
        assert moved.shape == shape and v.tolist() == [0.0] * shape[0]
        torch.testing.assert_close(alpha, torch.full((shape[0],), 1.0, dtype=dtype))


def test_rows_of_a_radius_broadcast_as_documented() -> None:
    """(B,) is one value per example even when it would broadcast along the last dimension."""
    x0 = torch.full((3, 3), 0.5)
    eps = torch.tensor([0.1, 0.2, 0.3])
    y = ops.pgd_step(x0, x0, torch.ones(3, 3), 1.0, eps)
    torch.testing.assert_close(y.double(), (0.5 + rows(eps, x0)).expand(3, 3), rtol=0, atol=1e-7)


@given(seed=st.integers(0, 2**31), batch=st.sampled_from([1, 3, 7]), targeted=st.booleans())
def test_an_infinite_l2_step_ends_where_long_steps_end(seed, batch, targeted) -> None:
    """x0 + eps g / ||g||, the maximum of <g, .> over the ball."""
    x, x0, grad = images(seed, batch, (3, 5))
    grad[0] = 0
    sign = -1 if targeted else 1
    length = grad.double().flatten(1).norm(dim=1).clamp_min(1e-300)[:, None, None]
    want = x0.double() + sign * 0.5 * grad.double() / length
    for step in (math.inf, 1e30, 3e38):
        y = ops.pgd_step(x, x0, grad, step, 0.5, 2, clip=None, targeted=targeted)
        torch.testing.assert_close(y[1:].double(), want[1:], rtol=0, atol=1e-6)
        assert same_bits(y[:1], ops.project(x[:1], x0[:1], 0.5, 2, clip=None))


@st.composite
def on_the_sphere(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    """x, x0, a radius that is the distance to the last bit, and how much float32 is the next larger."""
    norm = draw(st.sampled_from([2, 1]))
    n = draw(st.integers(1, 40))
    size = draw(st.sampled_from([1.0, 3.0, 2.0**-20, 2.0**-40, 1024.0]))
    g = torch.Generator().manual_seed(draw(seeds))
    # multiples of a power of two: differences, squares and sums are exact
    steps = torch.randint(-3, 4, (1, n), generator=g).double()
    total = (steps**2).sum().item() if norm == 2 else steps.abs().sum().item()
    if norm == 2:  # Lagrange: four squares more make the sum a square
        target = (math.isqrt(int(total)) + 1) ** 2
        rest = int(target - total)
        extra = next(
            (a, b, c, d)
            for a in range(math.isqrt(rest), -1, -1) for b in range(math.isqrt(rest - a * a), -1, -1)
            for c in range(math.isqrt(rest - a * a - b * b), -1, -1)
            for d in [math.isqrt(rest - a * a - b * b - c * c)] if a * a + b * b + c * c + d * d == rest
        )  # fmt: skip
        steps, total = torch.cat([steps, torch.tensor([extra]).double()], 1), math.isqrt(target)
    base = torch.randint(-64, 64, steps.shape, generator=g).double()
    return (size * (base + steps)).float(), (size * base).float(), size * total, norm


@given(case=on_the_sphere(), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_a_point_on_the_sphere_is_inside(case, dtype) -> None:
    """Bit for bit, as the ball is closed; with a radius less by one unit in the last place it moves, and inwards."""
    x, x0, eps, norm = (t.to(dtype) if isinstance(t, torch.Tensor) else t for t in case)
    if eps == 0:
        return
    lo, hi = torch.minimum(x, x0).min().item(), torch.maximum(x, x0).max().item()
    for clip in (None, (lo, hi)):
        assert same_bits(ops.project(x, x0, eps, norm, clip), x)
        assert same_bits(ops.project(x, x0, torch.tensor([eps], dtype=torch.float64), norm, clip), x)
        assert same_bits(ops.pgd_step(x, x0, torch.zeros_like(x), 0.3, eps, norm, clip), x)
        less = eps * (1 - (2.0**-24 if dtype == torch.float32 else 2.0**-53))
        y = ops.project(x, x0, less, norm, clip)
        assert not torch.equal(y, x)
        assert_in_ball_and_box(y, x0, less, norm, clip)
        assert same_bits(ops.project(y, x0, less, norm, clip), y)
    assert same_bits(ops.project(x, x0, eps, norm, (torch.full_like(x[0], lo), hi)), x)


@pytest.mark.parametrize("norm", NORMS)
def test_a_radius_of_zero_gives_the_signs_of_x0(norm) -> None:
    """x at distance zero is x0 but for the sign of a zero."""
    x0 = torch.tensor([[0.0, -0.0, 0.0, -0.0, 0.0]])
    for clip in ((0.0, 0.0), (-0.0, 1.0), None):
        assert same_bits(ops.project(-x0, x0, 0.0, norm, clip), x0)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 2, 3, 4, 5)])
def test_equal_gradients_move_in_the_order_of_the_index_in_every_format(shape) -> None:
    fmt = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    x0 = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.5
    grad = torch.ones(shape)
    want = ops.pgd_step(x0, x0, grad, 4.0, 5.0, 1)
    got = ops.pgd_step(*(t.contiguous(memory_format=fmt) for t in (x0, x0, grad)), 4.0, 5.0, 1)
    assert same_bits(got, want) and got.is_contiguous(memory_format=fmt)
    out = torch.empty_like(x0, memory_format=fmt)
    assert same_bits(ops.pgd_step(x0, x0, grad, 4.0, 5.0, 1, out=out), want)
    moved = [ops.pgd_step_fosc(x, x0, grad, 4.0, 5.0, -INF, 1)[0] for x in (x0, x0.contiguous(memory_format=fmt))]
    assert same_bits(*moved)
