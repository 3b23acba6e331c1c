"""fosc, pgd_step_fosc and atas_step against formulas in float64 and brute force."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastrobust import ops
from pgd_oracles import BATCHES, INF, NORMS, SHAPES, assert_in_ball_and_box, images, same_bits, sizes, step64

seeds = st.integers(0, 2**31)
DUAL = {INF: 1, 2: 2, 1: INF}


def fosc64(x, x0, grad, eps, norm):
    g, d = grad.double(), (x - x0).double()
    inner = (d * g).reshape(len(x), -1).sum(1) if x.numel() else torch.zeros(len(x), dtype=torch.float64)
    if isinstance(eps, torch.Tensor) and eps.shape == x.shape and x.dim() > 1:
        return (eps.double() * g.abs()).reshape(len(x), -1).sum(1) - inner
    radius = eps.double() if isinstance(eps, torch.Tensor) else eps
    return radius * sizes(g, DUAL[norm]) - inner


def scale(grad, eps):
    """What rounding is relative to: the sum of the terms' sizes."""
    top = eps.max().item() if isinstance(eps, torch.Tensor) else eps
    return 1 + (top + 1) * grad.double().abs().sum().item()


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, batch=st.sampled_from(BATCHES[1:]), shape=st.sampled_from(SHAPES), eps=st.floats(0.0, 5.0))
def test_fosc_is_its_formula(norm, seed, batch, shape, eps) -> None:
    x, x0, grad = images(seed, batch, shape)
    kinds = [eps, torch.rand(batch)] + ([torch.rand(x.shape)] if norm == INF else [])
    for e in kinds:
        value = ops.fosc(x, x0, grad, e, norm)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), fosc64(x, x0, grad, e, norm), rtol=1e-6, atol=1e-7 * scale(grad, e))


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, n=st.integers(1, 8), eps=st.floats(0.01, 3.0))
def test_fosc_is_the_maximum_over_the_ball(norm, seed, n, eps) -> None:
    """max over ||z - x0|| <= eps of <z - x, g>: vertices for Linf and L1, the maximiser and random points for L2."""
    x, x0, grad = images(seed, 1, (n,))
    if norm == INF:
        points = eps * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
    elif norm == 1:
        points = eps * torch.cat([torch.eye(n), -torch.eye(n)]).double()
    else:
        points = torch.randn(2000, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        points = torch.cat([points, grad.double()])
        points = eps * points / points.norm(dim=1, keepdim=True).clamp_min(1e-30)
    best = ((x0.double() + points - x.double()) * grad.double()).sum(1).max().item()
    assert ops.fosc(x, x0, grad, eps, norm).item() == pytest.approx(best, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_fosc_is_zero_where_the_inner_maximum_is_reached(norm) -> None:
    _, x0, grad = images(1, 7, (30,), None)
    at_best = ops.pgd_step(x0, x0, grad, 0.5 if norm == 1 else 100.0, 0.5, norm, clip=None)
    value = ops.fosc(at_best, x0, grad, 0.5, norm)
    away = ops.fosc(x0, x0, grad, 0.5, norm)
    assert (value.abs() <= 1e-5 * away).all() and (away > 0.1).all()


def test_fosc_of_huge_and_infinite_gradients_is_not_nan() -> None:
    x, x0, grad = images(1, 3, (64,))
    for g in (grad * 3e38, torch.full_like(grad, INF), torch.full_like(grad, math.nan)):
        for norm in NORMS:
            assert not ops.fosc(x, x0, g, 0.1, norm).isnan().any()
    assert (ops.fosc(x, x0, torch.full_like(grad, math.nan), 0.1) == 0).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("masked", [False, True])
@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_fused_criterion_is_the_two_ops(norm, masked, seed, batch, shape, dtype) -> None:
    x, x0, grad = images(seed, batch, shape)
    grad = grad.to(dtype)
    active = torch.rand(batch) < 0.6 if masked else None
    steps, radii = [0.1, torch.rand(batch)], [0.3, torch.rand(batch)]
    if norm == INF:
        steps.append(torch.rand(x.shape))
        radii.append(torch.rand(x.shape))
    for step, eps in itertools.product(steps, radii):
        value = ops.fosc(x, x0, grad, eps, norm)
        threshold = value.median().item() if batch else 0.0
        y, criterion, keep = ops.pgd_step_fosc(x, x0, grad, step, eps, threshold, norm, active=active)
        assert same_bits(criterion, value)
        # the first call, without a mask, moves all; later ones what is active and above the threshold
        want = torch.ones(batch, dtype=torch.bool) if active is None else (value > threshold) & active
        assert torch.equal(keep, want) and keep.dtype == torch.bool
        assert same_bits(y, ops.pgd_step(x, x0, grad, step, eps, norm, active=want))


def test_dynamic_training_stops_examples_one_by_one() -> None:
    """Algorithm 1 of Wang et al. 2019 on a linear function: FOSC falls to 0 when the corner is reached, and never
    rises."""
    x0 = torch.full((4, 10), 0.5)
    grad = torch.randn(4, 10) * torch.tensor([0.0, 0.01, 1.0, 10.0])[:, None]
    x, active, last = x0.clone(), torch.ones(4, dtype=torch.bool), None
    for _ in range(5):
        x, value, active = ops.pgd_step_fosc(x, x0, grad, 0.05, 0.1, 1e-4, active=active)
        assert last is None or (value <= last + 1e-6).all()
        last = value
    assert not active.any()
    torch.testing.assert_close(x[2:], x0[2:] + 0.1 * grad[2:].sign())
    assert torch.equal(x[0], x0[0])


def algorithm_1(x, x0, gradient, step, eps, threshold, steps):
    """Wang et al. 2019, algorithm 1, line by line for one example in float64, with V = 1(c > c_t); and its moves."""
    v, moves = 1, 0
    for _ in range(steps):
        if v == 0:
            break
        x = x + v * step * gradient(x).sign()
        x = (x0 + (x - x0).clamp(-eps, eps)).clamp(0, 1)
        moves += 1
        g = gradient(x)
        v = int(eps * g.abs().sum() - ((x - x0) * g).sum() > threshold)
    return x, moves


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float64", "box of tensors"])
@settings(max_examples=10)
@given(seed=seeds, level=st.floats(0.05, 0.6))
def test_each_example_takes_as_many_steps_as_algorithm_1(in_place, kind, seed, level) -> None:
    batch, steps, eps, step = 12, 10, 0.1, 0.025
    g = torch.Generator().manual_seed(seed)
    x0 = torch.rand(batch, 20, generator=g, dtype=torch.float64) * 0.8 + 0.1
    peak = x0 + 0.12 * torch.randn(batch, 20, generator=g, dtype=torch.float64)  # maxima of concave functions
    start = x0 + eps * (2 * torch.rand(batch, 20, generator=g, dtype=torch.float64) - 1)
    start = start.clamp(0, 1)
    dtype = torch.float64 if kind == "float64" else torch.float32
    clip = (0.0, 1.0) if kind != "box of tensors" else (torch.zeros(20), torch.ones(20))
    x, active, moved = start.to(dtype).clone(), None, torch.zeros(batch, dtype=torch.int64)
    for _ in range(steps):
        gradient = 2 * (peak.to(dtype) - x)
        out = x if in_place else None
        x, _, active = ops.pgd_step_fosc(x, x0.to(dtype), gradient, step, eps, level, clip=clip, active=active, out=out)
        moved += active
    for i in range(batch):
        want, count = algorithm_1(start[i], x0[i], lambda z, i=i: 2 * (peak[i] - z), step, eps, level, steps)
        # an example whose criterion comes within rounding of the threshold may go either way
        if dtype == torch.float64 or moved[i] == count:
            assert moved[i] == count
            torch.testing.assert_close(x[i].double(), want, rtol=0, atol=1e-5)
        else:
            assert (
                abs(float(ops.fosc(*(t[None].float() for t in (want, x0[i], 2 * (peak[i] - want))), eps)) - level)
                < 1e-4
            )


# ---- out ----


def _fosc_step(x, x0, grad, norm, active, **out):
    # between the examples' criteria, so that some move and some do not
    level = float(ops.fosc(x, x0, grad, 0.3, norm).median()) if len(x) == len(x0) and len(x) else 0.5
    return ops.pgd_step_fosc(x, x0, grad, 0.1, 0.3, level, norm, active=active, **out)


def _atas_step(x, x0, grad, norm, active, **out):
    v = torch.linspace(0, 1, len(x), dtype=x.dtype)
    return ops.atas_step(x, x0, grad, v, 0.1, 0.3, norm, active=active, **out)


@pytest.mark.parametrize("op", [_fosc_step, _atas_step])
@pytest.mark.parametrize("norm", NORMS)
@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    masked=st.booleans(),
    layout=st.sampled_from(["own", "x", "strided", "channels_last", "negated", "double"]),
)
def test_out_gets_the_same_bits(op, norm, seed, batch, masked, layout) -> None:
    x, x0, grad = images(seed, batch, (3, 4, 5))
    active = torch.rand(batch) < 0.6 if masked else None
    if layout == "double":
        x, x0, grad = x.double(), x0.double(), grad.double()
    want = op(x, x0, grad, norm, active)
    x = x.clone()
    out = {
        "x": x,
        "strided": torch.full((batch, 3, 4, 10), 7.0)[..., ::2],
        "channels_last": torch.empty_like(x, memory_format=torch.channels_last),
        "negated": torch._neg_view(torch.empty_like(x)),
    }.get(layout, torch.empty_like(x))
    version = out._version
    got = op(x, x0, grad, norm, active, out=out)
    assert got[0] is out and out._version > version
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype == torch.bool or same_bits(a.resolve_neg().contiguous(), b.contiguous())
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", [_fosc_step, _atas_step])
def test_bad_out_is_refused_before_anything_is_written(op) -> None:
    x, x0, grad = images(1, 3, (4,))
    before = [t.clone() for t in (x, x0, grad)]
    for out in (x0, grad, torch.empty(3, 5), torch.empty(3, 4, dtype=torch.float64), "x"):
        with pytest.raises((ValueError, TypeError), match="out"):
            op(x, x0, grad, INF, None, out=out)
    for t, b in zip((x, x0, grad), before, strict=True):
        assert torch.equal(t, b)


# ---- ATAS ----


def atas64(grad, v, step, beta, c, variant, limits):
    norm2 = sizes(grad, 2) ** 2
    average = beta * v.double() + (1 - beta) * norm2
    alpha = step / (average + c).sqrt() if variant == "paper" else step / (1 + average.sqrt() / c)
    return average, alpha if limits is None else alpha.clamp(*limits)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("variant", ["paper", "authors"])
@pytest.mark.parametrize("limits", [None, (0.01, 0.05)])
@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES),
    beta=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    c=st.sampled_from([0.01, 0.1, 2.0]),
)
def test_atas_is_its_formula(norm, variant, limits, seed, batch, shape, beta, c) -> None:
    x, x0, grad = images(seed, batch, shape)
    v = torch.rand(batch, generator=torch.Generator().manual_seed(seed))
    step = 16 / 255 * c if variant == "paper" else 16 / 255
    y, average, alpha = ops.atas_step(
        x, x0, grad, v, step, 0.3, norm, beta=beta, c=c, variant=variant, step_range=limits
    )
    default = limits if limits is not None or variant == "paper" else (4 / 255, 14 / 255)
    want_v, want_alpha = atas64(grad, v, step, beta, c, variant, default)
    torch.testing.assert_close(average.double(), want_v, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(alpha.double(), want_alpha, rtol=1e-6, atol=0)
    assert same_bits(y, ops.pgd_step(x, x0, grad, alpha, 0.3, norm))
    torch.testing.assert_close(y.double(), step64(x, x0, grad, want_alpha, 0.3, norm, (0, 1)), rtol=1e-5, atol=1e-5)
    assert_in_ball_and_box(y, x0, 0.3, norm, (0, 1))


@pytest.mark.parametrize("variant", ["paper", "authors"])
@pytest.mark.parametrize("norm", NORMS)
def test_atas_leaves_inactive_examples_alone(variant, norm) -> None:
    x, x0, grad = images(7, 7, (3, 5, 5))
    v, active = torch.rand(7), torch.tensor([True, False, True, True, False, False, True])
    y, average, _ = ops.atas_step(x, x0, grad, v, 0.05, 0.3, norm, variant=variant, active=active)
    assert same_bits(y[~active], x[~active]) and same_bits(average[~active], v[~active])
    alone = ops.atas_step(x[active], x0[active], grad[active], v[active], 0.05, 0.3, norm, variant=variant)
    assert same_bits(y[active], alone[0]) and same_bits(average[active], alone[1])


def test_atas_takes_step_sizes_per_example_and_strided_averages() -> None:
    x, x0, grad = images(7, 4, (3, 5))
    v, step = torch.rand(4), torch.rand(4)
    want = ops.atas_step(x, x0, grad, v, step, 0.3)
    wide = torch.rand(8)
    wide[::2] = v
    before = wide.clone()
    for other in (wide[::2], torch._neg_view(-v)):
        for got, expected in zip(ops.atas_step(x, x0, grad, other, step, 0.3), want, strict=True):
            assert torch.equal(got, expected)
    assert torch.equal(wide, before)
    expanded = torch.tensor(0.25).expand(4)
    for got, expected in zip(
        ops.atas_step(x, x0, grad, expanded, 0.1, 0.3),
        ops.atas_step(x, x0, grad, expanded.clone(), 0.1, 0.3),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_atas_of_a_zero_and_of_a_nan_gradient() -> None:
    _, x0, grad = images(7, 3, (30,))
    v = torch.tensor([0.0, 1.0, 4.0])
    for g in (torch.zeros_like(grad), torch.full_like(grad, math.nan)):
        y, average, alpha = ops.atas_step(x0, x0, g, v, 0.01, 0.3)
        assert same_bits(y, x0)
        assert torch.equal(average, 0.5 * v)
        torch.testing.assert_close(alpha, 0.01 / (0.5 * v + 0.01).sqrt())
    y, average, alpha = ops.atas_step(x0, x0, torch.full_like(grad, INF), v, 0.01, 0.3)
    assert (average == INF).all() and (alpha == 0).all() and same_bits(y, x0)
