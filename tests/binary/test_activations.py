"""Activations behind a sum and their gradients, in the write of the sum, against torch in float64."""

from __future__ import annotations

import math
import pathlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastrobust.nn._schedule import sides
from fastrobust.ops.binary import _feature_maps as fm
from fastrobust.ops.binary._activation import RELU, Act
from feature_maps import ACTS, act_ids, empty_lists, finished, laid, plain
from variant_runs import outputs_by_variant

TINY = 2.0**-126


def along(x: Tensor, lanes: int = 16) -> tuple[Tensor, fm.Maps]:
    """Numbers as maps of one channel, one row and as many images as lanes."""
    x = x[: x.numel() // lanes * lanes].reshape(lanes, 1, 1, -1)
    return x, fm.Maps(lanes, 1, 1, x.shape[3], lanes, x.shape[3], 0, 0)


def numbers() -> Tensor:
    large = torch.logspace(-45, 38.5, 3000)
    return torch.cat([torch.linspace(-20, 20, 40001), torch.linspace(-110, 110, 20001), large, -large])


def close(got: Tensor, want: Tensor, ulp: float, floor: float) -> None:
    """Within `ulp` units in the last place, or within `floor` of zero."""
    error = (got.double() - want).abs()
    bad = ~(error <= ulp * 2.0**-23 * want.abs() + floor) & (got.double() != want)
    assert not bad.any(), (got[bad][:3], want[bad][:3])


@pytest.mark.parametrize("act", ACTS, ids=act_ids)
def test_values_and_gradients_over_the_whole_range(act: Act) -> None:
    x, maps = along(numbers())
    # exp(u) has the absolute error of u, a product here; torch's own GELU in float64 is 1 + erf, which cancels.
    ulp = 40 if act.kind in ("softplus", "gelu_tanh") else 4
    # GELU is as exact as torch's in float32, by its factor of x.
    floor = {"gelu": 2.5e-7 * x.double().abs().clamp(1, 40), "gelu_tanh": 1e-15, "silu": 2e-36}.get(act.kind, 2 * TINY)
    slopes = torch.ones_like(x)
    close(finished(x, maps, act=act, slopes=slopes), act(x.double()), ulp, floor)
    assert torch.equal(finished(x, maps, act=act), finished(x, maps, act=act, slopes=torch.empty_like(x)))
    grad = torch.randn(x.shape).clamp(-3, 3)
    got = finished(grad, maps, gate=x if act.by_value else slopes, gate_act=act)
    # Sums of a positive and a negative term are as exact as their terms.
    floor = {"silu": 2e-7, "gelu": 2e-7, "gelu_tanh": 2e-7, "mish": 2e-7, "hardswish": 2e-7}.get(act.kind, 3e-16)
    close(got, act.gradient(grad.double(), x.double()), ulp, 3 * floor)


@pytest.mark.parametrize("act", ACTS, ids=act_ids)
def test_numbers_that_are_none(act: Act) -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 3e38, -3e38, 1e-42, -1e-42, 0, 3, -3, 6, 1, -1, 2])
    x, maps = along(x)
    got = finished(x, maps, act=act)
    room = 3e-7 if act.kind == "gelu" else 1e-37
    torch.testing.assert_close(got, act(x.double()).float(), equal_nan=True, rtol=1e-6, atol=room)
    finite = x.isfinite()
    slopes = torch.ones_like(x)
    finished(x, maps, act=act, slopes=slopes)
    want = act.gradient(torch.ones_like(x).double(), x.double()).float()
    torch.testing.assert_close(slopes[finite], want[finite], rtol=1e-6, atol=1e-6)
    if act.sided and act.slope == 0:  # nothing passes a closed side, whatever it is
        closed = ~(want != 0) & finite
        worst = finished(torch.full_like(x, math.inf), maps, gate=x, gate_act=act)
        assert closed.any() and not worst[closed].any()


def test_the_definition_is_torchs_function_and_gradient() -> None:
    x = torch.linspace(-7, 7, 501, dtype=torch.float64, requires_grad=True)
    for act in ACTS:
        (want,) = torch.autograd.grad(act(x).sum(), x)
        torch.testing.assert_close(act.gradient(torch.ones_like(x), x.detach()), want)
        assert torch.equal(act.inplace(x.detach().clone()), act(x.detach()))
        assert act(x.detach()).data_ptr() != x.data_ptr()
    with pytest.raises(ValueError, match="kind: got 'swish', expected one of none, relu"):
        Act("swish")


sizes = st.tuples(st.sampled_from([1, 3, 5, 16, 17]), st.integers(1, 4), st.integers(1, 9), st.integers(1, 20))


@given(sizes, st.sampled_from([1, 4, 8, 16]), st.integers(0, 2), st.sampled_from(ACTS), st.sampled_from(ACTS))
def test_everything_after_a_sum(size, lanes: int, border: int, act: Act, gate_act: Act) -> None:
    n, c, h, w = size
    maps = fm.Maps(n, c, h, w, lanes, w + border, border, border)
    x, gate = 3 * torch.randn(size), 3 * torch.randn(size)
    scale, shift, post = torch.randn(3, c)
    pre, slopes, steep = torch.empty(size), torch.ones(size), torch.ones(size)
    finished(gate, maps, act=gate_act, slopes=steep)
    told = gate if gate_act.by_value else steep
    after = {"act": act, "gate": told, "gate_act": gate_act, "post": post, "pre": pre, "slopes": slopes}
    got = finished(x, maps, scale=scale, shift=shift, **after)
    arg = (shift.view(1, -1, 1, 1) + x).double()
    if act.kind != "none":
        torch.testing.assert_close(slopes, act.gradient(torch.ones_like(arg), arg).float(), rtol=2e-6, atol=1e-6)
    want = gate_act.gradient(act(arg), gate.double())
    torch.testing.assert_close(pre, want.float(), rtol=2e-6, atol=1e-6)
    assert torch.equal(got, pre * post.view(1, -1, 1, 1))
    if gate_act.by_value:
        by_value = finished(x, maps, scale=scale, shift=shift, **{**after, "gate": gate_act(gate)})
        assert torch.equal(by_value, got)


SIDED = [act for act in ACTS if act.sided]


@given(sizes, st.sampled_from([1, 4, 8, 16]), st.integers(0, 2), st.sampled_from(SIDED))
def test_sides_as_bits(size, lanes: int, border: int, act: Act) -> None:
    n, c, h, w = size
    maps = fm.Maps(n, c, h, w, lanes, w + border, border, border)
    x, grad = 3 * torch.randn(size), torch.randn(size)
    bits, out = torch.zeros(sides(maps).floats), laid(torch.zeros(size), maps)
    lists, nothing = empty_lists(maps), torch.zeros(maps.blocks * maps.block + fm.SLACK)

    def run(residual: Tensor, act: Act, passed: int, open: int) -> Tensor:
        program = fm.new_program()
        program.gather(
            nothing.data_ptr(),
            out.data_ptr(),
            lists.bind(maps, maps),
            0,
            0,
            0,
            residual.data_ptr(),
            0,
            0,
            passed,
            open,
            0,
            c,
            act.code if passed else (0, 0.0, 0.0),
            act.code,
            False,
        )
        program.run(-1, 0, [])
        return plain(out, maps)

    assert torch.equal(run(laid(x, maps), act, bits.data_ptr(), 0), finished(x, maps, act=act))
    got = run(laid(grad, maps), act, 0, bits.data_ptr())
    slopes = torch.empty_like(x)
    finished(x, maps, act=act, slopes=slopes)
    assert torch.equal(got, finished(grad, maps, gate=x if act.by_value else slopes, gate_act=act))
    want = act.gradient(grad.double(), x.double())
    torch.testing.assert_close(got, want.float())


def test_codes_are_checked() -> None:
    maps = fm.Maps(1, 1, 1, 16, 1, 16, 0, 0)
    lists, x = empty_lists(maps), torch.zeros(200)
    at = x.data_ptr()
    good = (RELU.code, RELU.code)
    for acts, passed, open, message in (
        (((14, 0.0, 0.0), RELU.code), 0, 0, "act: got kind 14, expected 0 to 13"),
        ((RELU.code, (-1, 0.0, 0.0)), 0, 0, "gate_act: got kind -1, expected 0 to 13"),
        ((Act("silu").code, RELU.code), at, 0, "act: got kind 4 with bits of its sides"),
        ((RELU.code, Act("elu").code), 0, at, "gate_act: got kind 8 with bits of its sides"),
    ):
        with pytest.raises(ValueError, match=message):
            fm.new_program().gather(at, at, lists.bind(maps, maps), 0, 0, 0, 0, 0, 0, passed, open, 0, 1, *acts, False)
    fm.new_program().gather(at, at, lists.bind(maps, maps), 0, 0, 0, 0, 0, 0, at, at, 0, 1, *good, False)


def test_every_processor_variant_gives_the_same_bits() -> None:
    script = f"""
import hashlib, sys, torch
import fastrobust as fr
sys.path.insert(0, {str(pathlib.Path(__file__).parents[1])!r})
from feature_maps import ACTS, finished
from fastrobust.ops.binary import _feature_maps as fm
torch.manual_seed(3)
x = torch.cat([5 * torch.randn(4000), 60 * torch.randn(4000)]).reshape(4, 2, 10, 100)
maps = fm.Maps(*x.shape, 4, 102, 1, 2)
for act in ACTS:
    y, g = finished(x, maps, act=act), finished(torch.ones_like(x), maps, gate=x, gate_act=act)
    print(hashlib.sha256(y.numpy().tobytes() + g.numpy().tobytes()).hexdigest())
"""
    (first, *others) = outputs_by_variant(script).values()
    assert len(first) == len(ACTS)
    assert all(other == first for other in others)
