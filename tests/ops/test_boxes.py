"""Radii, steps and boxes that broadcast: per channel, per example, per pixel, as tensors, arrays and lists."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastrobust import ops
from fastrobust.ops import _checks as ck
from fastrobust.reference import pgd as reference
from pgd_oracles import INF, NORMS, images, same_bits, sizes

SHAPE = (3, 4, 5)
seeds = st.integers(0, 2**31)


def rand(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def boxes(seed: int, batch: int) -> dict[str, tuple[Any, Any]]:
    """Per-channel, per-pixel and per-example boxes, also of types that float32 does not hold."""
    wide = {"dtype": torch.float64}
    return {
        "channels": (-rand(seed, 3, 1, 1) - 0.1, rand(seed + 1, 3, 1, 1) + 0.1),
        "pixels": (-rand(seed, *SHAPE, **wide), rand(seed + 1, 1, *SHAPE, **wide)),
        "examples": (-rand(seed, batch, 1, 1, 1, **wide), rand(seed + 1, batch, *SHAPE, **wide)),
        "one side": (-INF, rand(seed + 1, 3, 1, 1, **wide)),
        "arrays": (-rand(seed, 3, 1, 1, **wide).numpy(), np.float32(0.75)),
        "lists": ([[[-0.3]], [[-0.1]], [[-1 / 3]]], [[[0.1]], [[2.1]], [[1 / 3]]]),
        "half": (-rand(seed, 3, 4, 1).half(), rand(seed + 1, 1, 3, 4, 1).bfloat16()),
    }


BOXES = tuple(boxes(0, 1))


def exact(side: Any, like: Tensor) -> Tensor:
    return (
        torch.as_tensor(np.asarray(side, dtype=np.float64) if not isinstance(side, Tensor) else side)
        .double()
        .expand(like.shape)
    )


def inside(clip: tuple[Any, Any], x: Tensor) -> Tensor:
    """x moved to the largest float32 box inside."""
    lo, hi = (exact(side, x) for side in clip)
    y = torch.minimum(torch.maximum(x.double(), lo), hi).float()
    y = torch.where(y.double() > hi, torch.nextafter(y, torch.full_like(y, -INF)), y)
    return torch.where(y.double() < lo, torch.nextafter(y, torch.full_like(y, INF)), y)


def assert_contract(y: Tensor, x0: Tensor, eps: float, norm: float, clip: tuple[Any, Any]) -> None:
    assert (sizes(y.double() - x0.double(), norm) <= eps).all()
    assert (y.double() >= exact(clip[0], y)).all() and (y.double() <= exact(clip[1], y)).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", BOXES)
@settings(max_examples=8)
@given(seed=seeds, batch=st.sampled_from([0, 1, 4]), masked=st.booleans())
def test_ball_and_box_hold_exactly(norm: float, kind: str, seed: int, batch: int, masked: bool) -> None:
    clip = boxes(seed, batch)[kind]
    x, x0, grad = images(seed, batch, SHAPE, None)
    x0 = inside(clip, x0)
    active = rand(seed, batch) < 0.5 if masked else None
    every = torch.ones(batch, dtype=torch.bool)
    rows = every if active is None else active
    eps = 0.4 if norm == INF else 1.5
    y = ops.pgd_step(x, x0, grad, 0.7, eps, norm, clip, active)
    moved, value, keep = ops.pgd_step_fosc(x, x0, grad, 0.7, eps, 0.5, norm, clip, active)
    ascended, average, alpha = ops.atas_step(x, x0, grad, torch.ones(batch), 0.7, eps, norm, clip, active=active)
    for z, moves in ((y, rows), (moved, keep), (ascended, rows)):
        assert z.dtype == torch.float32 and z.shape == x.shape
        assert_contract(z[moves], x0[moves], eps, norm, tuple(exact(side, x)[moves] for side in clip))  # type: ignore[arg-type]
        assert same_bits(z[~moves], x[~moves])
    assert same_bits(moved, torch.where(keep.view(-1, 1, 1, 1), y, x))
    assert torch.equal(keep, every if active is None else active & (value > 0.5))
    same = ops.pgd_step_fosc(x, x0, grad, 0.7, eps, 0.5, norm, None, active)
    assert torch.equal(value, same[1]) and torch.equal(keep, same[2])
    same = ops.atas_step(x, x0, grad, torch.ones(batch), 0.7, eps, norm, None, active=active)
    assert torch.equal(average, same[1]) and torch.equal(alpha, same[2])
    for z in (ops.project(x, x0, eps, norm, clip), ops.random_start(x0, eps, norm, clip, seed=seed)):
        assert_contract(z, x0, eps, norm, clip)
    out = x.clone()
    assert ops.pgd_step(out, x0, grad, 0.7, eps, norm, clip, active, out=out) is out and same_bits(out, y)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_constant_box_is_that_of_two_numbers(norm: float, layout: torch.memory_format) -> None:
    x, x0, grad = (t.contiguous(memory_format=layout) for t in images(5, 4, SHAPE, (0.1, 0.9)))
    low, high = torch.full((3, 1, 1), 0.1, dtype=torch.float64), torch.full((3, 1, 1), 0.9, dtype=torch.float64)
    for f in (
        lambda clip: ops.pgd_step(x, x0, grad, 0.3, 0.5, norm, clip),
        lambda clip: ops.project(x, x0, 0.5, norm, clip),
        lambda clip: ops.random_start(x0, 0.5, norm, clip, seed=3),
        lambda clip: ops.random_start(x0, rand(1, 4), norm, clip, seed=3, first_example=9),
        lambda clip: ops.atas_step(x, x0, grad, torch.zeros(4), 0.3, 0.5, norm, clip)[0],
        lambda clip: ops.pgd_step(x.double(), x0.double(), grad.double(), 0.3, 0.5, norm, clip),
        lambda clip: ops.random_start(x0.double(), 0.5, norm, clip, seed=3),
    ):
        numbers, tensors = f((0.1, 0.9)), f((low, high))
        assert numbers.dtype == tensors.dtype
        if norm == 1 and numbers.dtype == torch.float32:  # the step's definition in torch against its kernel
            torch.testing.assert_close(tensors, numbers, rtol=0, atol=2e-6)
        else:
            assert torch.equal(tensors, numbers)
        assert tensors.stride() == numbers.stride()


def test_clips_that_are_two_numbers_in_other_clothes() -> None:
    x, x0, grad = images(6, 4, SHAPE)
    want = ops.pgd_step(x, x0, grad, 0.3, 0.5)
    for clip in ([0, 1], np.array([0.0, 1.0]), torch.tensor([0.0, 1.0]), (np.float32(0), np.int64(1)),
                 (torch.tensor(0.0), torch.tensor([1.0])), (torch.zeros(1, 1, 1), np.ones((1, 1, 1)))):  # fmt: skip
        assert same_bits(ops.pgd_step(x, x0, grad, 0.3, 0.5, clip=clip), want)
        assert same_bits(ops.pgd_step(x, x0, grad, 0.3, torch.full((4,), 0.5), clip=clip), want)


def test_eps_zero_in_a_box_of_tensors_is_x0_with_its_signs() -> None:
    x0 = torch.tensor([0.0, -0.0] * 10).reshape(2, 2, 5)
    for clip in ((torch.zeros(2, 5), torch.ones(2, 5)), (torch.full((2, 1), -1.0), torch.zeros(2, 1))):
        for norm in NORMS:
            assert same_bits(ops.pgd_step(-x0, x0, x0 + 1, 0.1, 0.0, norm, clip), x0)


# ---- radii and steps ----

RADII: dict[str, tuple[Any, Any]] = {  # what is handed over, and its value for every element of (4, 3, 4, 5)
    "(B, 1, 1, 1)": (rand(1, 4, 1, 1, 1), rand(1, 4, 1, 1, 1)),
    "(C, 1, 1)": (rand(2, 3, 1, 1, dtype=torch.float64), rand(2, 3, 1, 1, dtype=torch.float64)),
    "(1, C, 1, 1)": (rand(3, 1, 3, 1, 1), rand(3, 1, 3, 1, 1)),
    "(C, H, W)": (rand(4, *SHAPE).half(), rand(4, *SHAPE).half()),
    "(B, 1, H, 1)": (rand(5, 4, 1, 4, 1), rand(5, 4, 1, 4, 1)),
    "list": ([0.1, 0.2, 0.3, 0.4], torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).view(4, 1, 1, 1)),
    "array": (np.array([1, 0, 2, 1]), torch.tensor([1.0, 0, 2, 1]).view(4, 1, 1, 1)),
    "array (C, 1, 1)": (np.full((3, 1, 1), 8 / 255), torch.full((3, 1, 1), 8 / 255, dtype=torch.float64)),
    "one number": (torch.full((1, 1, 1), 0.2), torch.tensor(0.2)),
    "numpy number": (np.float64(0.1), torch.tensor(0.1, dtype=torch.float64)),
    "0-d array": (np.array(0.1), torch.tensor(0.1, dtype=torch.float64)),
}
PER_EXAMPLE = ("(B, 1, 1, 1)", "list", "array", "one number", "numpy number", "0-d array")


@pytest.mark.parametrize("kind", RADII)
@pytest.mark.parametrize(
    "clip", [(0.0, 1.0), (torch.zeros(3, 1, 1), torch.full((3, 1, 1), 0.7))], ids=["numbers", "channels"]
)
def test_radius_of_any_shape(kind: str, clip: Any) -> None:
    given_, value = RADII[kind]
    x, x0, grad = images(7, 4, SHAPE, (0.0, 0.7))
    wide = value.double().expand(x.shape)
    for y in (
        ops.pgd_step(x, x0, grad, 0.5, given_, clip=clip),
        ops.project(x, x0, given_, clip=clip),
        ops.random_start(x0, given_, clip=clip, seed=2),
        ops.pgd_step_fosc(x, x0, grad, 0.5, given_, -INF, clip=clip)[0],
        ops.atas_step(x, x0, grad, torch.zeros(4), 0.5, given_, clip=clip)[0],
    ):
        assert ((y.double() - x0.double()).abs() <= wide).all()
        assert (y >= 0).all() and (y.double() <= (0.7 if isinstance(clip[1], Tensor) else 1.0)).all()
    as_elements = ops.pgd_step(x, x0, grad, 0.5, wide.contiguous(), clip=clip)
    assert same_bits(ops.pgd_step(x, x0, grad, 0.5, given_, clip=clip), as_elements)
    dual = (grad.abs() * wide).flatten(1).sum(1) - ((x - x0).double() * grad).flatten(1).sum(1)
    torch.testing.assert_close(ops.fosc(x, x0, grad, given_).double(), dual, rtol=1e-5, atol=1e-5)
    exactly = reference.pgd_step(x, x0, grad, 0.5, value.expand(x.shape), clip=(0.0, 1.0))
    assert same_bits(ops.pgd_step(x, x0, grad, 0.5, given_), exactly)


@pytest.mark.parametrize("norm", [2, 1])
@pytest.mark.parametrize("kind", RADII)
def test_radius_of_any_shape_for_norms_of_an_example(kind: str, norm: float) -> None:
    given_, value = RADII[kind]
    x, x0, grad = images(8, 4, SHAPE)
    if kind not in PER_EXAMPLE:
        with pytest.raises(ValueError, match="^eps: got one value per element, expected .*one per example"):
            ops.pgd_step(x, x0, grad, 0.5, given_, norm)
        return
    radius = value.double().reshape(-1).expand(4)
    y = ops.pgd_step(x, x0, grad, 0.5, given_, norm)
    assert (sizes(y.double() - x0.double(), norm) <= radius).all()
    assert same_bits(y, ops.pgd_step(x, x0, grad, 0.5, radius.clone(), norm))


def test_step_of_any_shape() -> None:
    x0 = torch.full((2, 3, 2, 2), 0.5)
    step = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    y = ops.pgd_step(x0, x0, torch.ones_like(x0), step, 1.0)
    assert torch.equal(y, x0 + step)
    assert torch.equal(ops.pgd_step(x0, x0, torch.ones_like(x0), step.numpy(), 1.0, targeted=True), x0 - step)


@pytest.mark.parametrize("x", [torch.rand(4, 5), torch.rand(3, 4, 5)])
def test_a_vector_is_one_value_per_example_or_nothing(x: Tensor) -> None:
    """Along the last dimension it would mean something else for a batch of that size."""
    ops.project(x, x, torch.zeros(len(x)))
    with pytest.raises(ValueError, match=r"^eps: got shape \(5,\), expected .*per example"):
        ops.project(x, x, torch.zeros(5))


@pytest.mark.parametrize("norm", NORMS)
def test_boxes_under_compile(norm: float) -> None:
    torch._dynamo.reset()
    x, x0, grad = images(9, 4, SHAPE)
    lo, hi, eps = torch.zeros(3, 1, 1), torch.full((3, 1, 1), 0.8), rand(3, 4, 1, 1, 1)

    def f(x: Tensor, x0: Tensor, lo: Tensor, hi: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        return ops.pgd_step(x, x0, grad, 0.2, eps, norm, (lo, hi)), ops.random_start(x0, 0.2, norm, (lo, hi), seed=1)

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, x0, lo, hi, eps), f(x, x0, lo, hi, eps), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-7)


# ---- values outside the box ----


def test_the_message_shows_what_lies_outside() -> None:
    x = torch.rand(2, 3, 4)
    x[1, 2, 3] = 1.0000001
    with pytest.raises(
        ValueError,
        match=r"^x: got values from 0\.\d+ to 1\.00000011920928\d*, expected .*\(1 of 24 lie outside\).*clamp",
    ):
        ck.check_values_in_box(x, "x", 0.0, 1.0)
    ck.check_values_in_box(x.clamp(0, 1), "x", 0.0, 1.0)
    x[0, 0, 0] = -3e-8
    with pytest.raises(ValueError, match=r"from -\d\.\d+e-08 to .*\(2 of 24 lie outside\)"):
        ck.check_values_in_box(x, "x", 0.0, 1.0)
    with pytest.raises(ValueError, match=r"\(\d+ of 24 lie outside\).*torch\.maximum"):
        ck.check_values_in_box(x, "x", torch.zeros(3, 1), torch.full((3, 1), 0.5))
    with pytest.raises(ValueError, match="nan"):
        ck.check_values_in_box(torch.tensor([0.5, float("nan")]), "x", 0.0, 1.0)


# ---- integers ----


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8, int, torch.tensor, np.array])
def test_any_integral_number_is_an_integer(integer: Any) -> None:
    x0 = rand(1, 3, 5)
    want = ops.random_start(x0, 0.1, seed=6, first_example=2)
    assert same_bits(ops.random_start(x0, 0.1, seed=integer(6), first_example=integer(2)), want)


@pytest.mark.parametrize(
    "value", [np.bool_(True), np.float32(2), torch.tensor(True), torch.tensor(2.0), np.array([1, 2])]
)
def test_what_is_no_integer(value: Any) -> None:
    for name in ("seed", "first_example"):
        with pytest.raises(TypeError, match=f"^{name}: got .*expected an integer"):
            ops.random_start(rand(1, 3, 5), 0.1, **{"seed": 1, name: value})
