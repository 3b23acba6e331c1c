"""pgd_step and project: against float64 formulas, the reference, brute force, and over layouts, masks and outputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastrobust import ops
from fastrobust.reference import pgd as reference
from pgd_oracles import (
    BATCHES,
    INF,
    NORMS,
    SHAPES,
    assert_in_ball_and_box,
    images,
    l1_ascent,
    l1_best_by_enumeration,
    l1_projection,
    same_bits,
    sizes,
    step64,
)  # fmt: skip

CLIPS = ((0.0, 1.0), None, (-0.3, 0.7), (0.1, 0.3))
seeds = st.integers(0, 2**31)
radii = st.floats(1e-3, 20.0)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    # a few roundings of float32 numbers of size 1; L2 and L1 shrink by at most 2^-20 of the distance
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)


# ---- values ----


@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES),
    step=radii,
    eps=radii,
    clip=st.sampled_from(CLIPS),
)
def test_linf_is_the_reference_bit_for_bit_and_the_formula(seed, batch, shape, step, eps, clip) -> None:
    x, x0, grad = images(seed, batch, shape, clip)
    y = ops.pgd_step(x, x0, grad, step, eps, INF, clip)
    assert torch.equal(y, reference.pgd_step(x, x0, grad, step, eps, INF, clip))
    close(y, step64(x, x0, grad, step, eps, INF, clip))


@pytest.mark.parametrize("norm", [2, 1])
@given(
    seed=seeds,
    batch=st.sampled_from(BATCHES),
    shape=st.sampled_from(SHAPES[:-1]),
    step=radii,
    eps=radii,
    clip=st.sampled_from(CLIPS),
)
def test_l2_and_l1_are_the_reference_and_the_formula(norm, seed, batch, shape, step, eps, clip) -> None:
    x, x0, grad = images(seed, batch, shape, clip)
    y = ops.pgd_step(x, x0, grad, step, eps, norm, clip)
    scale = 1 + step + eps
    want = step64(x, x0, grad, step, eps, norm, clip)
    torch.testing.assert_close(y.double(), want, rtol=3e-6, atol=3e-6 * scale)
    torch.testing.assert_close(y, reference.pgd_step(x, x0, grad, step, eps, norm, clip), rtol=3e-6, atol=3e-6 * scale)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_large_examples(norm, batch) -> None:
    """More than one block and chunk, and an odd tail."""
    x, x0, grad = images(9, batch, (3, 97, 101))
    eps = {INF: 8 / 255, 2: 3.0, 1: 50.0}[norm]
    y = ops.pgd_step(x, x0, grad, eps / 3, eps, norm)
    assert_in_ball_and_box(y, x0, eps, norm, (0, 1))
    torch.testing.assert_close(y.double(), step64(x, x0, grad, eps / 3, eps, norm, (0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("offset", [0, 1, 16])
def test_streaming_stores_of_large_outputs(offset) -> None:
    """Above 24 MB in flight outputs are written past the caches, when aligned."""
    n = 1_700_003
    x0 = torch.rand(n + offset)[offset:][None]
    x = (x0 + 0.1 * torch.randn(1, n)).clamp(0, 1)
    grad = torch.randn(1, n)
    want = reference.pgd_step(x, x0, grad, 0.02, 0.1)
    assert torch.equal(ops.pgd_step(x, x0, grad, 0.02, 0.1), want)
    out = torch.full((n + offset,), 7.0)
    ops.pgd_step(x, x0, grad, 0.02, 0.1, out=out[offset:][None])
    assert torch.equal(out[offset:], want[0]) and (out[:offset] == 7).all()
    eps = torch.rand(16)
    x, x0, grad = (t[:, : 106240 * 16].reshape(16, -1) for t in (x, x0, grad))
    assert torch.equal(ops.pgd_step(x, x0, grad, 0.02, eps), reference.pgd_step(x, x0, grad, 0.02, eps))


def test_unnormalised_l2_ascent() -> None:
    x, x0, grad = images(5, 4, (3, 5, 5), None)
    y = ops.pgd_step(x, x0, grad, 0.01, 100.0, norm=2, clip=None, normalize=False)
    close(y, x.double() + 0.01 * grad.double())
    close(ops.pgd_step(x, x0, grad, 0.01, 0.0, norm=2, clip=None, normalize=False), x0.double())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_targeted_descends(norm, dtype) -> None:
    x, x0, grad = images(6, 7, (3, 5, 5))
    grad, step = grad.to(dtype), torch.linspace(0, 0.4, 7)
    for s in (0.1, step) + ((torch.rand_like(x),) if norm == INF else ()):
        assert same_bits(
            ops.pgd_step(x, x0, grad, s, 0.3, norm, targeted=True), ops.pgd_step(x, x0, -grad, s, 0.3, norm)
        )


# ---- the L1 step and projection are exact ----


@given(seed=seeds, n=st.integers(1, 7), step=st.floats(0.01, 4.0), clip=st.sampled_from([(0.0, 1.0), (-0.3, 0.7)]))
def test_l1_step_attains_the_best_vertex(seed, n, step, clip) -> None:
    _, x, grad = images(seed, 1, (n,), clip)
    y = ops.pgd_step(x, x, grad, step, INF, 1, clip)
    moved = (y - x).double()
    assert moved.abs().sum() <= step * (1 + 1e-6)
    gain = (moved * grad.double()).sum().item()
    assert gain == pytest.approx(
        l1_best_by_enumeration(x[0].double(), grad[0].double(), step, *clip), rel=1e-5, abs=1e-6
    )


@given(seed=seeds, n=st.integers(1, 60), step=st.floats(0.01, 30.0))
def test_l1_step_attains_the_optimum_of_the_linear_program(seed, n, step) -> None:
    optimize = pytest.importorskip("scipy.optimize", reason="needs scipy for the linear program")
    _, x, grad = images(seed, 1, (n,))
    g, room = grad[0].double().numpy(), x[0].double().numpy()
    # p = u - v with 0 <= u <= 1 - x, 0 <= v <= x, sum(u + v) <= step
    bounds = [(0, 1 - r) for r in room] + [(0, r) for r in room]
    best = -optimize.linprog([*-g, *g], A_ub=[[1.0] * (2 * n)], b_ub=[step], bounds=bounds).fun
    y = ops.pgd_step(x, x, grad, step, INF, 1)
    assert ((y - x).double() * grad.double()).sum().item() == pytest.approx(best, rel=1e-5, abs=1e-6)


@given(seed=seeds, n=st.sampled_from([2, 15, 16, 17, 100]), levels=st.integers(1, 4))
def test_l1_step_breaks_ties_by_index(seed, n, levels) -> None:
    _, x, grad = images(seed, 3, (n,))
    grad = (grad * levels).round() / levels  # many equal |g|
    y = ops.pgd_step(x, x, grad, 1.7, INF, 1)
    close(y, torch.stack([l1_ascent(a.double(), b.double(), 1.7, 0, 1) for a, b in zip(x, grad, strict=True)]))


@pytest.mark.parametrize("clip", CLIPS)
@given(seed=seeds, n=st.sampled_from([1, 2, 15, 16, 17, 33, 200]), eps=st.floats(1e-3, 20.0))
def test_l1_projection_is_exact(clip, seed, n, eps) -> None:
    x, x0, _ = images(seed, 3, (n,), clip)
    y = ops.project(x, x0, eps, 1, clip).double()
    lo, hi = clip or (-INF, INF)
    want = torch.stack([l1_projection(a.double(), b.double(), eps, lo, hi) for a, b in zip(x, x0, strict=True)])
    torch.testing.assert_close(y, want, rtol=0, atol=2e-6 * (1 + eps))


@pytest.mark.parametrize("clip", CLIPS)
@given(seed=seeds, n=st.sampled_from([1, 2, 17, 40]), eps=st.floats(1e-2, 10.0))
def test_l1_projection_satisfies_the_kkt_conditions(clip, seed, n, eps) -> None:
    """No oracle: y is the projection exactly when <x - y, z - y> <= 0 for all z of the set; a multiplier certifies
    it."""
    x, x0, _ = images(seed, 1, (n,), clip)
    lo, hi = clip or (-INF, INF)
    y = ops.project(x, x0, eps, 1, clip)
    d, moved = (x - x0).double()[0], (y - x0).double()[0]
    room = torch.where(d > 0, hi - x0[0].double(), x0[0].double() - lo)
    slack = 4e-6 * (1 + eps)
    assert (moved * d >= 0).all()  # never to the other side
    if moved.abs().sum() < eps - slack:  # the ball is not active: the box alone
        torch.testing.assert_close(moved.abs(), torch.minimum(d.abs(), room), rtol=0, atol=slack)
        return
    free = (moved != 0) & (moved.abs() < room - slack)
    multipliers = (d.abs() - moved.abs())[free]
    lower = (d.abs() - room)[(moved != 0) & ~free]  # at the face: lambda <= |d| - room
    upper = d.abs()[moved == 0]  # at x0: lambda >= |d|, unless there is no room
    upper = upper[room[moved == 0] > slack]
    if len(multipliers):
        assert multipliers.max() - multipliers.min() <= slack
        assert multipliers.min() >= -slack
    top = multipliers.max() if len(multipliers) else (lower.min() if len(lower) else math.inf)
    assert (upper <= top + slack).all() and (lower >= (multipliers.min() if len(multipliers) else 0) - slack).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_l1_projection_of_widely_spread_distances(scale) -> None:
    """Newton's method meets one breakpoint after the other here."""
    d = scale * 2.0 ** -torch.arange(0, 60, dtype=torch.float32)[None]
    x0 = torch.zeros_like(d)
    for fraction in (1e-6, 1e-3, 0.5, 0.999):
        eps = fraction * d.double().sum().item()
        y = ops.project(d, x0, eps, 1, None)
        size = sizes(y, 1).item()
        assert eps * (1 - 1e-5) - 2e-7 * 60 * scale <= size <= eps


# ---- layouts, masks, parameters, outputs ----


def layouts(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same (B, C, H, W) values in memory of every kind."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1]), 9.0, dtype=t.dtype)
    wide[..., ::2] = t
    return {
        "contiguous": t.clone(),
        "channels_last": t.contiguous(memory_format=torch.channels_last),
        "transposed": t.transpose(1, 3).contiguous().transpose(1, 3),
        "batch_last": t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "strided": wide[..., ::2],
        "offset": torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
        "negative": torch._neg_view(-t),
    }


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "batch_last", "strided", "offset", "negative"])
@pytest.mark.parametrize("which", ["x", "x0", "grad", "all"])
def test_strides_do_not_matter(norm, layout, which) -> None:
    given_ = dict(zip(("x", "x0", "grad"), images(8, 3, (3, 6, 5)), strict=True))
    want = ops.pgd_step(*given_.values(), 0.1, 0.5, norm)
    other = {k: layouts(v)[layout] if which in (k, "all") else v for k, v in given_.items()}
    y = ops.pgd_step(*other.values(), 0.1, 0.5, norm)
    if norm == INF:
        assert torch.equal(y, want)
    else:  # channels_last adds up in its own order
        torch.testing.assert_close(y, want, rtol=0, atol=1e-6)
    if layout == "channels_last" and which == "all":
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert_in_ball_and_box(y, given_["x0"], 0.5, norm, (0, 1))
    torch.testing.assert_close(
        ops.fosc(*other.values(), 0.5, norm), ops.fosc(*given_.values(), 0.5, norm), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        ops.project(other["x"], other["x0"], 0.5, norm), ops.project(given_["x"], given_["x0"], 0.5, norm)
    )


def test_expanded_inputs() -> None:
    x, x0, grad = images(1, 1, (3, 6, 5))
    y = ops.pgd_step(x.expand(4, -1, -1, -1), x0.expand(4, -1, -1, -1), grad.expand(4, -1, -1, -1), 0.1, 0.3, 2)
    assert torch.equal(y, ops.pgd_step(x, x0, grad, 0.1, 0.3, 2).expand(4, -1, -1, -1))
    same = torch.tensor(0.3).expand(4)
    assert torch.equal(ops.pgd_step(*(t.expand(4, -1, -1, -1) for t in (x, x0, grad)), same, same, 2),
                       ops.pgd_step(*(t.expand(4, -1, -1, -1) for t in (x, x0, grad)), 0.3, same, 2))  # fmt: skip


@pytest.mark.parametrize("norm", NORMS)
@given(seed=seeds, batch=st.sampled_from(BATCHES), shape=st.sampled_from(SHAPES[1:]))
def test_parameters_per_example_are_the_rows_done_alone(norm, seed, batch, shape) -> None:
    x, x0, grad = images(seed, batch, shape)
    step, eps = torch.rand(2, batch, generator=torch.Generator().manual_seed(seed))
    y = ops.pgd_step(x, x0, grad, step, eps, norm)
    for i in range(batch):
        alone = ops.pgd_step(x[i : i + 1], x0[i : i + 1], grad[i : i + 1], step[i].item(), eps[i].item(), norm)
        assert same_bits(y[i : i + 1], alone)
    negative = ops.pgd_step(x, x0, grad, torch._neg_view(-step), torch._neg_view(-eps), norm)
    assert same_bits(negative, y)


@given(seed=seeds, batch=st.sampled_from(BATCHES), shape=st.sampled_from(SHAPES))
def test_parameters_per_element(seed, batch, shape) -> None:
    x, x0, grad = images(seed, batch, shape)
    step, eps = torch.rand(2, *x.shape, generator=torch.Generator().manual_seed(seed))
    for s, e in ((step, eps), (0.1, eps), (step, 0.1), (torch.rand(batch), eps), (step, torch.rand(batch))):
        y = ops.pgd_step(x, x0, grad, s, e)
        assert torch.equal(y, reference.pgd_step(x, x0, grad, s, e))
        close(y, step64(x, x0, grad, s, e, INF, (0, 1)))


def test_parameters_per_element_follow_the_memory_format() -> None:
    x, x0, grad = images(3, 2, (3, 6, 5))
    step, eps = torch.rand(2, *x.shape)
    want = reference.pgd_step(x, x0, grad, step, eps)
    for name in ("channels_last", "transposed", "strided", "negative"):
        assert torch.equal(
            ops.pgd_step(layouts(x)["channels_last"], x0, grad, layouts(step)[name], layouts(eps)[name]), want
        )


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1,), (17,), (3, 8, 8), (3, 61, 67)])
def test_active_mask_keeps_x_bit_for_bit(norm, shape) -> None:
    x, x0, grad = images(4, 7, shape)
    x[0].view(-1)[0] = math.nan  # kept as it is: example 0 is not active
    active = torch.tensor([False, True, True, False, True, False, True])
    y = ops.pgd_step(x, x0, grad, 0.1, 0.2, norm, active=active)
    assert same_bits(y[~active], x[~active])
    assert same_bits(y[active], ops.pgd_step(x[active], x0[active], grad[active], 0.1, 0.2, norm))
    inplace = x.clone()
    assert same_bits(ops.pgd_step(inplace, x0, grad, 0.1, 0.2, norm, active=active, out=inplace), y)
    strided = torch.zeros(14, dtype=torch.bool)
    strided[::2] = active
    assert same_bits(ops.pgd_step(x, x0, grad, 0.1, 0.2, norm, active=strided[::2]), y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "layout", ["contiguous", "channels_last", "transposed", "batch_last", "strided", "offset", "negative"]
)
@pytest.mark.parametrize("x_layout", ["contiguous", "channels_last", "strided"])
def test_out_of_every_layout(norm, layout, x_layout) -> None:
    x, x0, grad = images(2, 3, (3, 6, 5))
    x = layouts(x)[x_layout]
    want = ops.pgd_step(x, x0, grad, 0.1, 0.5, norm)
    out = layouts(torch.full(x.shape, 5.0))[layout]
    strides = out.stride()
    got = ops.pgd_step(x, x0, grad, 0.1, 0.5, norm, out=out)
    assert got is out and out.stride() == strides and torch.equal(out, want)
    projected = layouts(torch.full(x.shape, 5.0))[layout]
    assert ops.project(x, x0, 0.5, norm, out=projected) is projected
    assert torch.equal(projected, ops.project(x, x0, 0.5, norm))
    before = x.clone()
    assert ops.pgd_step(x, x0, grad, 0.1, 0.5, norm, out=x) is x  # in place, whatever its strides
    assert torch.equal(x, want) and not torch.equal(x, before)


def test_out_writes_nothing_beside_itself() -> None:
    x, x0, grad = images(2, 1, (19,))
    for norm in NORMS:
        memory = torch.full((64,), 7.0)
        ops.pgd_step(x, x0, grad, 0.1, 0.5, norm, out=memory[16:35].view(1, 19))
        assert (memory[:16] == 7).all() and (memory[35:] == 7).all() and (memory[16:35] != 7).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@given(seed=seeds, batch=st.sampled_from(BATCHES), shape=st.sampled_from(SHAPES))
def test_half_gradients_are_widened_exactly(norm, dtype, seed, batch, shape) -> None:
    x, x0, grad = images(seed, batch, shape)
    scale = torch.randint(-10, 5, grad.shape, generator=torch.Generator().manual_seed(seed))
    half = (grad * 10.0**scale).to(dtype)  # subnormals and infinities among them
    y = ops.pgd_step(x, x0, half, 0.1, 0.3, norm)
    assert y.dtype == torch.float32
    assert same_bits(y, ops.pgd_step(x, x0, half.float(), 0.1, 0.3, norm))
    assert torch.equal(ops.fosc(x, x0, half, 0.3, norm), ops.fosc(x, x0, half.float(), 0.3, norm))


@pytest.mark.parametrize("norm", NORMS)
def test_float64_runs_the_reference(norm) -> None:
    x, x0, grad = (t.double() for t in images(3, 4, (3, 5)))
    eps = torch.linspace(0.1, 0.5, 4, dtype=torch.float64)
    y = ops.pgd_step(x, x0, grad, 0.1, eps, norm)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, step64(x, x0, grad, 0.1, eps, norm, (0, 1)), rtol=0, atol=2e-6)
    assert (sizes(y - x0, norm) <= eps).all()
    out = torch.empty_like(x)
    assert ops.pgd_step(x, x0, grad, 0.1, eps, norm, out=out) is out and torch.equal(out, y)


@pytest.mark.parametrize("name", ["inf", "Linf", "linf", "2", "L2", "l2", "1", "L1", "l1"])
def test_names_of_norms(name) -> None:
    x, x0, grad = images(3, 4, (3, 5))
    norm = INF if "inf" in name else int(name[-1])
    assert torch.equal(ops.pgd_step(x, x0, grad, 0.1, 0.3, name), ops.pgd_step(x, x0, grad, 0.1, 0.3, norm))
