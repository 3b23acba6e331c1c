"""The op against exact answers: every kind of row, every norm, shapes and strides, every CPU variant."""

from __future__ import annotations

import math
import os
import pathlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastrobust as fr
from fastrobust.ops import polyhedral_distance
from fastrobust.reference import polyhedron as reference
from polyhedron_cases import KINDS, check_signed, rows, short_rows, staircase
from polyhedron_oracle import NORMS, bisected_float64, close_and_never_above, exact, exact_signed, sorted_float64
from variant_runs import run_script


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_exact_rationals(kind, p):
    for size, count in ((1, 3), (17, 7)):
        a, b, lower, upper = rows(kind, count, size)
        got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
        close_and_never_above(got, [exact(*row, p) for row in zip(a, b, lower, upper, strict=False)])
        got = polyhedral_distance(*map(torch.tensor, (a, -b, lower, upper)), p, signed=True)
        close_and_never_above(got, [exact_signed(*row, p) for row in zip(a, -b, lower, upper, strict=False)])


@pytest.mark.parametrize("p", (1, 2, math.inf))
@pytest.mark.parametrize("kind", KINDS)
def test_equals_sorting_on_long_rows(kind, p):
    for size in (785, 3072):
        a, b, lower, upper = rows(kind, 16, size, seed=1)
        got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
        close_and_never_above(got, sorted_float64(a, b, lower, upper, p))


@pytest.mark.parametrize("p", (1.5, 3, 4))
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("tiny", "huge", "heavy", "geometric")])
def test_equals_bisection_on_long_rows(kind, p):
    for size in (100, 785, 3072):
        a, b, lower, upper = rows(kind, 8, size, seed=2)
        got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
        close_and_never_above(got, bisected_float64(a, b, lower, upper, p))


@given(
    p=st.sampled_from((1.5, 2, 3, math.inf)),
    kind=st.sampled_from([kind for kind in KINDS if kind not in ("tiny", "huge", "heavy", "geometric")]),
    size=st.integers(250, 1100),
    share=st.floats(1e-6, 0.999),
    room=st.floats(1e-3, 1e3),
    seed=st.integers(0, 1000),
)
def test_one_pass_over_a_band_of_the_row(p, kind, size, share, room, seed):
    """Rows long enough for a sample, whose root the first band may miss; boxes of any size, budgets of any share."""
    a, _, lower, upper = rows(kind, 1, size, seed=seed)
    lower, upper = lower * np.float32(room), upper * np.float32(room)
    b = ((np.abs(a) * np.where(a > 0, -lower, upper)).sum(1, dtype=np.float64) * share).astype(np.float32)
    if not b[0] > 0:
        return
    got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
    oracle = sorted_float64 if p in (2, math.inf) else bisected_float64
    close_and_never_above(got, oracle(a, b, lower, upper, p))


@pytest.mark.parametrize("p", (1, 2, math.inf))
def test_imagenet_sized_row(p):
    a, b, lower, upper = rows("heavy", 1, 150_528)
    got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
    close_and_never_above(got, sorted_float64(a, b, lower, upper, p))


@pytest.mark.parametrize("p", NORMS)
def test_staircase_that_needs_many_iterations(p):
    a, lower, upper = staircase()
    room = float((np.abs(a) * upper).sum())
    for fraction in (0.5, 0.99, 0.99999):
        b = np.float32([room * fraction])
        got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
        close_and_never_above(got, [exact(a[0], b[0], lower[0], upper[0], p)])


def test_cancellation_down_to_the_last_bits():
    """b minus what the box gives is a millionth of a millionth of b: plain float64 sums would not do."""
    small = np.float32(2.0**-45)
    a = np.float32([[1.0, small]])
    lower, upper = np.float32([[-1.0, -1.0]]), np.float32([[1.0, 1.0]])
    b = np.float32([1.0])
    for p in NORMS:
        got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
        close_and_never_above(got, [exact(a[0], b[0], lower[0], upper[0], p)])
    # 1 + 2^-45 is not a float32: the coefficient of a third coordinate brings it in
    a = np.float32([[1.0, small, 1.0]])
    lower, upper = np.float32([[-1.0, -1.0, -(2.0**-46)]]), np.float32([[1.0, 1.0, 2.0**-46]])
    b = np.float32([np.nextafter(np.float32(1), np.float32(2))])
    for p in NORMS:
        got = polyhedral_distance(*map(torch.tensor, (a, b, lower, upper)), p)
        close_and_never_above(got, [exact(a[0], b[0], lower[0], upper[0], p)])


@given(p=st.sampled_from(NORMS), row=short_rows(20), b=st.floats(-2, 2, width=32))
def test_signed_property(p, row, b):
    check_signed(polyhedral_distance, p, row, b)


@given(
    p=st.sampled_from((1, 2, math.inf)),
    batch=st.sampled_from((0, 1, 3, 7, 16)),
    size=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_shapes_strides_and_broadcast_boxes(p, batch, size, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(size, 4, batch, generator=generator).permute(2, 1, 0)  # no stride is 1
    x = torch.rand(batch, 1, 2 * size, generator=generator)[..., ::2]
    b = torch.rand(batch, 4, generator=generator) * 0.4
    full = (-x).expand_as(a).contiguous(), (1 - x).expand_as(a).contiguous()
    want = reference.polyhedral_distance(a, b, *full, p)
    got = polyhedral_distance(a, b, -x, 1 - x, p)
    assert torch.equal(got, polyhedral_distance(a.contiguous(), b, *full, p))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    wide = polyhedral_distance(a, b, -1.0, torch.full((size,), 0.5), p)
    torch.testing.assert_close(
        wide, reference.polyhedral_distance(a, b, torch.tensor(-1.0), torch.tensor(0.5), p), rtol=1e-6, atol=0
    )


def test_many_leading_dimensions():
    a, x = torch.randn(2, 1, 2, 1, 2, 1, 2, 5), torch.rand(2, 1, 1, 1, 2, 1, 1, 5)
    b = torch.rand(a.shape[:-1])
    torch.testing.assert_close(
        polyhedral_distance(a, b, -x, 1 - x, 2), reference.polyhedral_distance(a, b, -x, 1 - x, 2), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("p", NORMS)
def test_without_a_box_it_is_the_dual_norm(p):
    a, b = torch.randn(7, 33), torch.rand(7)
    q = math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)
    got = polyhedral_distance(a, b, -math.inf, math.inf, p)
    want = b.double() / torch.linalg.vector_norm(a.double(), q, -1)
    close_and_never_above(got, (want * (1 + 1e-14)).tolist())


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("sign", (1, -1))
def test_point(p, sign):
    a, b, lower, upper = (torch.tensor(v) for v in rows("normal", 16, 33))
    b = sign * b.clamp_max(0.5 * (a.abs() * torch.minimum(-lower, upper)).sum(-1))
    distance, point = polyhedral_distance(a, b, lower, upper, p, signed=True, return_point=True)
    assert bool(((lower <= point) & (point <= upper)).all())
    scale = (a * point).abs().sum(-1) + b.abs()
    assert bool((((a * point).double().sum(-1) + b).abs() <= 1e-6 * scale).all())
    torch.testing.assert_close(torch.linalg.vector_norm(point, p, -1), distance.abs(), rtol=2e-6, atol=0)


def test_point_of_a_row_that_need_not_move_is_zero():
    a, lower, upper = torch.tensor([[1.0, -2.0, 0.0]]).repeat(2, 1), torch.full((3,), -0.5), torch.full((3,), 0.25)
    for p in NORMS:
        distance, point = polyhedral_distance(a, torch.tensor([0.0, -0.3]), lower, upper, p, return_point=True)
        assert distance.tolist() == [0, 0]
        assert point.tolist() == [[0, 0, 0], [0, 0, 0]]


def test_point_of_an_unreachable_row_is_the_corner():
    a, lower, upper = torch.tensor([[1.0, -2.0, 0.0]]), torch.full((3,), -0.5), torch.full((3,), 0.25)
    for p in NORMS:
        distance, point = polyhedral_distance(a, torch.tensor([5.0]), lower, upper, p, return_point=True)
        assert distance.item() == math.inf
        assert point.tolist() == [[-0.5, 0.25, 0.0]]


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("sign", (1, -1))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_gradients_equal_the_differentiated_definition(p, sign, dtype):
    a, b, lower, upper = (torch.tensor(v) for v in rows("normal", 16, 40, seed=2))
    b = sign * b.clamp_max(0.9 * (a.abs() * torch.where(sign * a > 0, -lower, upper)).sum(-1))
    upstream = torch.randn(16, dtype=torch.float64)
    double = [t.double().requires_grad_() for t in (a, b, lower, upper)]
    want = torch.autograd.grad(reference.polyhedral_distance(*double, p, signed=True), double, upstream)
    leaves = [t.to(dtype).requires_grad_() for t in (a, b, lower, upper)]
    got = torch.autograd.grad(polyhedral_distance(*leaves, p, signed=True), leaves, upstream.to(dtype))
    for g, w in zip(got, want, strict=False):
        torch.testing.assert_close(g.double(), w, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("p", NORMS)
def test_gradcheck_with_broadcast_box(p):
    a = torch.randn(3, 2, 7, dtype=torch.float64, requires_grad=True)
    b = (torch.rand(3, 2, dtype=torch.float64) * 0.4).requires_grad_()
    x = torch.rand(3, 1, 7, dtype=torch.float64)
    lower, upper = (-x).requires_grad_(), (1 - x).requires_grad_()
    assert torch.autograd.gradcheck(lambda *args: polyhedral_distance(*args, p), (a, b, lower, upper))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("detailed", (False, True))
def test_opcheck(dtype, detailed):
    a = torch.randn(3, 2, 7, dtype=dtype, requires_grad=True)
    b = torch.rand(3, 2, dtype=dtype).requires_grad_()
    x = torch.rand(3, 1, 7, dtype=dtype)
    lower, upper = (-x).requires_grad_(), (1 - x).requires_grad_()
    torch.library.opcheck(
        torch.ops.fastrobust.polyhedral_distance.default, (a, b, lower, upper, math.inf, True, detailed)
    )


def test_compiles_as_one_graph():
    def loss(a, b, x):
        return polyhedral_distance(a, b, -x, 1 - x, 2, signed=True).clamp_max(0.3).sum()

    a, b, x = torch.randn(5, 3, 20), torch.randn(5, 3), torch.rand(5, 1, 20)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for f in (loss, compiled):
        leaf = a.clone().requires_grad_()
        value = f(leaf, b, x)
        grads.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    assert torch.equal(grads[0][0], grads[1][0])
    torch.testing.assert_close(grads[0][1], grads[1][1])


def test_inference_mode():
    with torch.inference_mode():
        a, x = torch.randn(4, 9), torch.rand(4, 9)
        assert polyhedral_distance(a, torch.rand(4), -x, 1 - x, 2).shape == (4,)


@pytest.mark.parametrize("p", (1, 2, math.inf, 3))
def test_rows_do_not_see_each_other_or_the_threads(p):
    a, b, lower, upper = (torch.tensor(v) for v in rows("normal", 64, 785))
    together = polyhedral_distance(a, b, lower, upper, p)
    alone = torch.cat(
        [polyhedral_distance(a[i : i + 1], b[i : i + 1], lower[i : i + 1], upper[i : i + 1], p) for i in range(64)]
    )
    assert torch.equal(together, alone)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(together, polyhedral_distance(a, b, lower, upper, p))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("p", NORMS)
def test_bad_rows_stay_alone(p):
    a, b, lower, upper = (torch.tensor(v) for v in rows("normal", 7, 40))
    clean = polyhedral_distance(a, b, lower, upper, p)
    a[1, 39], a[3, 0], b[2], b[4], lower[5, 0] = math.nan, math.inf, math.inf, math.nan, math.nan
    got, point = polyhedral_distance(a, b, lower, upper, p, return_point=True)
    bad = torch.tensor([False, True, True, True, True, True, False])
    assert bool(got[bad].isnan().all())
    assert bool(point[bad].isnan().all())
    assert torch.equal(got[~bad], clean[~bad])


def test_a_wrong_box_is_an_error_inside_a_compiled_graph_too():
    a, b, x = torch.randn(3, 5), torch.rand(3) * 0.1, torch.rand(3, 5)
    compiled = torch.compile(polyhedral_distance, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b, -x, 1 - x, 2), polyhedral_distance(a, b, -x, 1 - x, 2))
    with pytest.raises(ValueError, match="lower: got values up to"):
        compiled(a, b, 0.5 + x, 1 - x, 2)


def test_errors_name_the_argument():
    a, b, x = torch.randn(3, 5), torch.rand(3), torch.rand(3, 5)
    with pytest.raises(ValueError, match="lower: got values up to"):  # lower > upper
        polyhedral_distance(a, b, 2 - x, 1 - x, 2)
    with pytest.raises(ValueError, match="lower: got values up to"):
        polyhedral_distance(a, b, 1 - x, 1 - x, 2)
    with pytest.raises(ValueError, match="upper: got values down to"):
        polyhedral_distance(a, b, -x, -x - 0.1, 2)
    with pytest.raises(ValueError, match="norm"):
        polyhedral_distance(a, b, -x, 1 - x, 0.5)
    with pytest.raises(TypeError, match="norm"):
        polyhedral_distance(a, b, -x, 1 - x, None)
    with pytest.raises(TypeError, match="a: got"):
        polyhedral_distance(a.half(), b, -x, 1 - x, 2)
    with pytest.raises(TypeError, match="a: got list"):
        polyhedral_distance([1.0], b, -x, 1 - x, 2)
    with pytest.raises(ValueError, match="a: got shape"):
        polyhedral_distance(a[:, :0], b, -x[:, :0], x[:, :0], 2)
    with pytest.raises(TypeError, match="b: got"):
        polyhedral_distance(a, b.double(), -x, 1 - x, 2)
    with pytest.raises(ValueError, match="b: got shape"):
        polyhedral_distance(a, b[:2], -x, 1 - x, 2)
    with pytest.raises(TypeError, match="lower: got"):
        polyhedral_distance(a, b, (-x).double(), 1 - x, 2)
    with pytest.raises(ValueError, match="upper: got shape"):
        polyhedral_distance(a, b, -x, (1 - x)[:, :2], 2)
    with pytest.raises(ValueError, match="upper: got shape"):
        polyhedral_distance(a, b, -x, (1 - x)[None], 2)


def test_variants_give_the_same_bits(tmp_path: pathlib.Path):
    """Every instruction set of this build that this processor runs."""
    script = (
        "import sys, torch, numpy as np; sys.path.insert(0, {folder!r}); from polyhedron_cases import KINDS, rows\n"
        "from fastrobust.ops import polyhedral_distance as f\n"
        "out = [f(*map(torch.tensor, rows(kind, 7, n)), p, signed=True, return_point=True)\n"
        "       for kind in KINDS for n in (1, 40, 785) for p in (1, 1.5, 2, 3, 4, float('inf'))]\n"
        "torch.save(out, {file!r})\n"
    )
    results = {}
    available = ("v2", "v3", "v4") if "v2" in fr.build_info()["cpu_variants"] else ()
    for variant in available:
        file = tmp_path / f"{variant}.pt"
        here = script.format(folder=os.path.dirname(os.path.dirname(__file__)), file=str(file))
        run = run_script(here, os.environ | {"FASTROBUST_CPU": variant})
        if run.returncode == 0:
            results[variant] = torch.load(file)
        else:
            assert "does not" in run.stderr or "cannot" in run.stderr or "support" in run.stderr, run.stderr
    if not available:
        pytest.skip("one CPU variant in this build")
    first = results.pop("v2")
    assert results
    for other in results.values():
        for (d0, p0), (d1, p1) in zip(first, other, strict=False):
            assert torch.equal(d0, d1)
            assert torch.equal(p0, p1)


AWKWARD = [0.0, 1.0, 0.5, 1e-3, 1e-20, 1e-38, 1e-44, 1e20, 1 / 3, 1 + 2**-23, 3.0]


@given(
    p=st.sampled_from((1, 2, math.inf)),
    row=st.lists(
        st.tuples(
            st.sampled_from(AWKWARD + [-v for v in AWKWARD]),
            st.sampled_from([*AWKWARD, math.inf]),
            st.sampled_from([*AWKWARD, math.inf]),
        ),
        min_size=1,
        max_size=6,
    ),
    share=st.sampled_from((1.0, 1 - 1e-7, 1 + 1e-7, 0.5, 1e-9)),
)
def test_ties_denormals_and_budgets_that_just_suffice(p, row, share):
    a, down, up = (np.array(column, np.float32) for column in zip(*row, strict=True))
    room = sum(float(abs(x)) * float(lo if x > 0 else hi) for x, lo, hi in zip(a, down, up, strict=True) if x != 0)
    b = np.float32(share * room if math.isfinite(room) else share)
    if not 0 < b < 1e37:
        return
    got = polyhedral_distance(*map(torch.tensor, (a, b, -down, up)), p).item()
    want = exact(a, b, -down, up, p)
    if math.isinf(want):
        assert got == math.inf
    elif want > 3e38:
        assert got <= want
    else:
        assert got <= want
        assert abs(got - float(want)) <= 1e-6 * float(want) + 1e-44
