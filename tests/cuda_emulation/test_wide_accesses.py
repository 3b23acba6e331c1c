"""CUDA kernels by 16 bytes a thread, run on the CPU: the same bits wherever memory lies and however long rows are.

The emulation stops at a 16-byte access of an address that is no multiple of 16.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrobust.ops.bounds as bounds
from fastrobust import ops
from fastrobust.reference import bounds as reference
from pgd_oracles import INF, NORMS, images, same_bits


def moved(t: Any, numbers: int = 1) -> Any:
    """The same numbers, so many places after an address that the allocator gave (a multiple of 16 bytes)."""
    if isinstance(t, tuple):
        return tuple(moved(v, numbers) for v in t)
    if not isinstance(t, Tensor) or not t.is_floating_point() or t.dim() == 0 or not t.numel():
        return t
    there = torch.empty(t.numel() + numbers, dtype=t.dtype)[numbers:].view(t.shape).copy_(t)
    assert there.data_ptr() % 16 == numbers * t.element_size() % 16
    return there


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result for t in flat(part)]


def assert_same_wherever(run: Any, op: Any, *args: Any, numbers: int = 1, **kwargs: Any) -> list[Tensor]:
    aligned = flat(run(op, *args, **kwargs))
    elsewhere = flat(run(op, *moved(args, numbers), **{k: moved(v, numbers) for k, v in kwargs.items()}))
    assert len(aligned) == len(elsewhere) > 0
    for a, b in zip(aligned, elsewhere, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    return aligned


# a word or two, part of a tile of 2048 with and without whole words of 16-bit numbers, more than one tile
SIZES = (8, 28, 520, 2068)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", SIZES)
def test_steps(on_device, norm, dtype, n) -> None:
    x, x0, grad = images(11, 2, (n,))
    grad = (grad * 1e-2).to(dtype)
    step, eps = torch.rand(2), torch.rand(2)
    assert_same_wherever(on_device, ops.pgd_step, x, x0, grad, step, eps, norm)
    assert_same_wherever(on_device, ops.fosc, x, x0, grad, eps, norm)
    assert_same_wherever(on_device, ops.pgd_step_fosc, x, x0, grad, step, eps, 0.1, norm)
    assert_same_wherever(on_device, ops.atas_step, x, x0, grad, torch.rand(2), 0.1, 0.3, norm)
    if norm == INF:
        each = torch.rand(x.shape), torch.rand(x.shape)
        assert_same_wherever(on_device, ops.pgd_step, x, x0, grad, *each, norm)
        assert_same_wherever(on_device, ops.pgd_step_fosc, x, x0, grad, *each, 0.1, norm)


@pytest.mark.parametrize("n", (3, 6, 9, 13, 1027))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numbers", (0, 1, 2, 3, 4))
def test_rows_that_start_anywhere(on_device, n, dtype, numbers) -> None:
    """Each row of a batch lies otherwise: 16-byte accesses start at the first word and end at the last."""
    x, x0, grad = images(12, 6, (n,))
    args = moved((x, x0, grad.to(dtype)), numbers) if numbers else (x, x0, grad.to(dtype))
    eps, active = torch.rand(6), torch.tensor([True, True, False, True, True, True])
    for step in (torch.rand(6), torch.rand(x.shape)):
        want = ops.pgd_step(x, x0, grad.to(dtype), step, eps, INF, active=active)
        room = torch.full((6 * n + numbers + 8,), 7.0)
        out = room[numbers : numbers + 6 * n].view(6, n)
        on_device(ops.pgd_step, *args, step, eps, INF, active=active, out=out)
        assert same_bits(out, want)
        assert (room[:numbers] == 7).all() and (room[numbers + 6 * n :] == 7).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("n", (4, 36, 1028))
def test_random_starts(on_device, norm, n) -> None:
    _, x0, _ = images(13, 3, (n,))
    assert_same_wherever(on_device, ops.random_start, x0, torch.rand(3), norm, seed=3)


@pytest.mark.parametrize("name", ["cross_entropy", "margin_loss", "dlr_loss", "kl_divergence"])
@pytest.mark.parametrize("classes", (4, 12, 260))
def test_losses(on_device, name, classes) -> None:
    logits = (3 * torch.randn(7, classes)).round()  # with ties
    logits[1, 2], logits[2, 1], logits[3] = math.nan, INF, -INF
    other = torch.randn(7, classes) if name == "kl_divergence" else torch.randint(0, classes, (7,))
    assert_same_wherever(on_device, getattr(ops, name), logits, other)


WINDOWS = [(c, sides) for c in (4, 8, 20) for sides in (1, 2)]


def window(channels: int, sides: int, rows: int = 9, batch: int = 3) -> tuple[Tensor, Tensor, dict[str, Any], int]:
    """Rows of windows of 3 x 4 positions that hang over the borders of a map of 6 x 7."""
    corner = (torch.randint(-4, 8, (rows,)), torch.randint(-5, 9, (rows,)))
    place = {"example": torch.randint(0, batch, (rows,)), "corner": corner, "window": (3, 4, channels, 6, 7)}
    return torch.randn(sides, rows, 12 * channels), torch.randn(sides, rows), place, 42 * channels


@pytest.mark.parametrize(("channels", "sides"), WINDOWS)
def test_windows(bounds_on_device, channels, sides) -> None:
    A, b, place, size = window(channels, sides)
    lines = torch.randn(sides, 3, size), torch.randn(2, 3, size)
    got = assert_same_wherever(bounds_on_device, bounds.linear_back_step, A, b, *lines, **place)
    for g, want in zip(got, bounds.linear_back_step(A, b, *lines, **place), strict=True):
        torch.testing.assert_close(g, want, rtol=1e-5, atol=1e-5)
    x, eps = torch.rand(3, size), 0.3 * torch.rand(3, size)
    eps[:, ::3] = 0
    box = reference.center_radius((x - eps).clamp(min=0), (x + eps).clamp(max=1))
    example = place.pop("example")
    for q, (inside, ball) in itertools.product((1.0, 2.0, INF), ((box, None), (None, (x, eps)), (box, (x, eps)))):
        args = A, b, example, inside, ball, q
        (got,) = assert_same_wherever(bounds_on_device, bounds.concretize_rows, *args, **place)
        torch.testing.assert_close(got, bounds.concretize_rows(*args, **place), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", (4, 132, 1036))
@pytest.mark.parametrize("minus", (False, True))
def test_dense_rows(bounds_on_device, n, minus) -> None:
    A, b = torch.randn(2, 5, n), torch.randn(2, 7)
    place = {"example": torch.randint(0, 3, (7,)), "rows": torch.randint(0, 5, (7,))}
    if minus:
        place["minus"] = torch.randint(0, 5, (7,))
    assert_same_wherever(
        bounds_on_device, bounds.linear_back_step, A, b, torch.randn(1, 3, n), torch.randn(2, 3, n), **place
    )


@pytest.mark.parametrize("activation", ["relu", "hardtanh", "tanh", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", (3, 12, 1031, 3000))
def test_lines(bounds_on_device, activation, dtype, count) -> None:
    lower = torch.randn(count, dtype=dtype)
    upper = lower + torch.rand(count, dtype=dtype)
    for kind in ("parallel", "crown"):
        assert_same_wherever(bounds_on_device, lambda *a: tuple(bounds.relax(*a)), lower, upper, activation, kind, ())
    if dtype == torch.float32:
        assert_same_wherever(bounds_on_device, bounds.interval_activation, lower, upper, activation, ())


@pytest.mark.parametrize("period", (1, 4, 6, 12))
def test_lines_behind_a_bias(bounds_on_device, period) -> None:
    lower = torch.randn(36 // period * 4, period)
    args = lower, lower + torch.rand(lower.shape), "relu", "crown", (), torch.randn(period)
    got = assert_same_wherever(bounds_on_device, lambda *a: tuple(bounds.relax_behind(*a)), *args)
    for g, want in zip(got, bounds.relax_behind(*args), strict=True):
        torch.testing.assert_close(g, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", (4, 260, 784))
@pytest.mark.parametrize("batch", (1, 11))
def test_interval_products(bounds_on_device, n, batch) -> None:
    args = torch.randn(batch, n), torch.rand(batch, n), torch.randn(9, n), torch.randn(9), bounds.ENDS
    assert_same_wherever(bounds_on_device, bounds.center_linear, *args)
    assert_same_wherever(bounds_on_device, bounds.from_center, *args[:2])


@pytest.mark.parametrize("p", (1, 2, INF, 3.0))
@pytest.mark.parametrize("m", (4, 516, 4100))  # the last is too long for shared memory
def test_distances(on_device, p, m) -> None:
    a, b = torch.randn(2, 2, m), torch.rand(2, 2) * m / 50
    sides = -0.3 * torch.rand(2, 2, m), 0.4 * torch.rand(2, 2, m)
    for lower, upper in (sides, (sides[0][:1, :1], sides[1][:, :1]), (sides[0][..., :1], torch.tensor(0.2))):
        assert_same_wherever(on_device, ops.polyhedral_distance, a, b, lower, upper, p, signed=True, return_point=True)
