"""Extremes over a ball cut by a box: attained inside, never beaten, and equal to a sorting solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fastrobust as fr
from fastrobust.bounds import compute_bounds
from fastrobust.reference import bounds as reference

from .nets import ONE_PASS, make, margins, points_of_set

P = (1.0, 1.5, 2.0, 3.0, math.inf)


def problem(seed: int, n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows with zeros and ties, pixels on the faces of the box, no room at all for some elements."""
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(4, 3, n, dtype=dtype, generator=g)
    A[0] = A[0].round()
    A[1] *= 10.0 ** torch.randint(-3, 3, (3, n), generator=g)
    A[3, 0] = 0
    x = torch.rand(4, n, dtype=dtype, generator=g)
    x[1] = (2 * x[1]).round() / 2
    eps = torch.rand(4, n, dtype=dtype, generator=g) * torch.tensor([1.0, 0.3, 3.0, 0.01], dtype=dtype)[:, None]
    eps[2, ::2] = 0
    return A, torch.randn(4, 3, dtype=dtype, generator=g), x, eps


def by_sorting(w: np.ndarray, room: np.ndarray, p: float) -> float:
    """max w.v, ||v||_p <= 1, 0 <= v <= room, through the sorted places where v = min(t w^(1/(p-1)), room) meets
    room."""
    w, room = w[w > 0], room[w > 0]
    if p == math.inf:
        return float((w * np.minimum(room, 1)).sum())
    if p == 1:
        value, left = 0.0, 1.0
        for k in np.argsort(-w):
            step = min(left, room[k])
            value, left = value + w[k] * step, left - step
        return value
    if (room**p).sum() <= 1:
        return float((w * room).sum())
    s = w ** (1 / (p - 1))
    order = np.argsort(room / s)
    for k in range(len(order)):
        fixed, free = order[:k], order[k:]
        t = ((1 - (room[fixed] ** p).sum()) / (s[free] ** p).sum()) ** (1 / p)
        if t * s[order[k]] <= room[order[k]]:
            return float((w[fixed] * room[fixed]).sum() + t * (w[free] * s[free]).sum())
    raise AssertionError


@given(st.integers(0, 30), st.sampled_from([1, 2, 7, 40]), st.sampled_from(P))
def test_equals_a_sorting_solver(seed: int, n: int, p: float) -> None:
    A, b, x, eps = problem(seed, n)
    for e in (0.0, 0.4, eps[:, 0].contiguous(), eps):
        low, up = reference.concretize(A, b, x, e, p, (0.0, 1.0))
        wide = reference.eps_like(e, x).expand_as(x)
        for i in range(4):
            for k in range(3):
                a = A[i, k]
                for got, sign in ((low[i, k], -1.0), (up[i, k], 1.0)):
                    room = torch.where(sign * a > 0, 1 - x[i], x[i]) / torch.where(wide[i] > 0, wide[i], math.inf)
                    most = by_sorting((a.abs() * wide[i]).numpy(), room.numpy(), p)
                    want = (a @ x[i] + b[i, k]).item() + sign * most
                    assert abs(got.item() - want) <= 1e-9 * (a.abs().sum().item() + 1)


@given(st.integers(0, 30), st.sampled_from([1, 7, 40]), st.sampled_from(P))
def test_is_attained_by_a_point_of_the_set(seed: int, n: int, p: float) -> None:
    A, b, x, eps = problem(seed, n)
    for e in (0.4, eps):
        for side in (0, 1):
            leaf = A.clone().requires_grad_(True)
            value = fr.ops.concretize(leaf, b, x, e, p, (0.0, 1.0))[side]
            (point,) = torch.autograd.grad(value.sum(), leaf)  # the derivative is where the extreme is attained
            assert (point >= -1e-12).all() and (point <= 1 + 1e-12).all()
            wide = reference.eps_like(e, x).expand_as(x)[:, None]
            v = torch.where(wide > 0, (point - x[:, None]) / torch.where(wide > 0, wide, 1.0), 0.0)
            assert (v.norm(p=p, dim=2) <= 1 + 1e-9).all()
            torch.testing.assert_close((A * point).sum(2) + b, value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p", P)
def test_is_never_beaten_by_samples(p: float) -> None:
    A, b, x, eps = problem(1, 6)
    low, up = reference.concretize(A, b, x, eps, p, (0.0, 1.0))
    v = torch.randn(100_000, 4, 6, dtype=torch.float64)
    v = v / v.norm(p=p, dim=2, keepdim=True).clamp(min=1e-12)
    points = (x + eps * v).clamp(0, 1)  # clipping towards x, which lies in the box, shortens the step
    z = torch.einsum("bsn,tbn->tbs", A, points) + b
    assert (z.amin(0) >= low - 1e-12).all() and (z.amax(0) <= up + 1e-12).all()


@given(st.integers(0, 30), st.sampled_from([1, 5, 33, 200]), st.sampled_from(P))
def test_kernel_equals_the_definition(seed: int, n: int, p: float) -> None:
    A, b, x, eps = problem(seed, n, torch.float32)
    for e in (0.0, 0.4, eps[:, 0].contiguous(), eps):
        got = fr.ops.concretize(A, b, x, e, p, (0.0, 1.0))
        wide = e.double() if isinstance(e, Tensor) else e
        want = reference.concretize(A.double(), b.double(), x.double(), wide, p, (0.0, 1.0))
        size = A.double().abs().sum(2) + b.double().abs()
        for g, w in zip(got, want, strict=True):
            assert ((g.double() - w).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", P)
def test_one_pixel_uses_up_the_ball_and_others_cannot_move(p: float, dtype: torch.dtype) -> None:
    A = torch.tensor([18.7, -0.5, 8.2, 0.01, -0.02], dtype=dtype).view(1, 1, 5)
    x, eps = torch.tensor([[1.0, 0.0, 0.0, 0.5, 1.0]], dtype=dtype), 0.073412992
    low, up = fr.ops.concretize(A, torch.zeros(1, 1, dtype=dtype), x, eps, p, (0.0, 1.0))
    alone = (A[0, 0] * x[0]).sum() + eps * A[0, 0, 2]  # the first two meet the box where they are
    most = alone if p == 1 else alone + eps * (0.01 + 0.02)
    assert alone - 1e-5 <= up <= most + 1e-5
    assert low.isfinite()


@pytest.mark.parametrize("p", P)
def test_at_least_as_tight_as_ball_and_box(p: float) -> None:
    A, b, x, eps = problem(3, 50)
    low, up = reference.concretize(A, b, x, eps, p, (0.0, 1.0))
    box, ball = reference.region(x, eps, p, (0.0, 1.0))
    example = torch.arange(4).repeat_interleave(3)
    rows, offsets = A.reshape(1, 12, 50), b.reshape(1, -1).expand(2, -1)
    for one in ((box, None),) if ball is None else ((box, None), (None, ball)):
        alone = reference.concretize_rows(rows, offsets, example, *one, reference.dual_exponent(p)).view(2, 4, 3)
        assert (low >= alone[0] - 1e-9).all() and (up <= alone[1] + 1e-9).all()
        if p not in (1.0, math.inf):
            assert (low > alone[0] + 1e-3).any()


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((x - 0.4) / torch.linspace(0.1, 0.5, 8, dtype=x.dtype))


@pytest.mark.parametrize("p", (1.0, 2.0, 3.0))
@pytest.mark.parametrize("clip", (None, (0.0, 1.0)))
def test_a_scaled_input_is_the_same_as_scaled_weights(p: float, clip: tuple[float, float] | None) -> None:
    net, scale = Scaled(), torch.linspace(0.1, 0.5, 8, dtype=torch.float64)
    folded = torch.nn.Sequential(*net.layers)
    first = torch.nn.Linear(8, 16).double()
    with torch.no_grad():
        first.weight.copy_(net.layers[0].weight / scale)
        first.bias.copy_(net.layers[0].bias - (0.4 * net.layers[0].weight / scale).sum(1))
        folded[0] = first
        x = torch.rand(3, 8, dtype=torch.float64)
        for eps in (0.3, torch.tensor([0.1, 0.2, 0.3]).double(), torch.rand(3, 8, dtype=torch.float64)):
            for method in ONE_PASS:
                got = compute_bounds(net, x, eps, norm=p, clip=clip, method=method)
                want = compute_bounds(folded, x, eps, norm=p, clip=clip, method=method)
                torch.testing.assert_close(got.lower, want.lower)
                torch.testing.assert_close(got.upper, want.upper)


@pytest.mark.parametrize("p", (1.0, 2.0))
def test_exact_input_is_tighter_and_sound(p: float) -> None:
    net, shape = make("cnn")
    net, x, y = net.double(), torch.rand(2, *shape, dtype=torch.float64).round(decimals=1), torch.tensor([0, 3])
    points = points_of_set(x, 0.6, p, (0.0, 1.0), 5000)
    with torch.no_grad():
        z = margins(net(points.flatten(0, 1)).view(5000, 2, -1), y)
        for method in ("fast-lin", "crown"):
            options = {"norm": p, "clip": (0.0, 1.0), "method": method, "labels": y}
            plain = compute_bounds(net, x, 0.6, **options)
            sharp = compute_bounds(net, x, 0.6, exact_input=True, **options)
            assert (sharp.upper - sharp.lower).mean() < 0.999 * (plain.upper - plain.lower).mean()
            assert (sharp.lower <= z.amin(0) + 1e-9).all() and (sharp.upper >= z.amax(0) - 1e-9).all()


@pytest.mark.parametrize("p", P)
def test_gradcheck(p: float) -> None:
    torch.manual_seed(0)
    A, b, x, eps = problem(0, 12)
    A = torch.randn_like(A)
    x = 0.05 + 0.9 * torch.rand_like(x)
    eps = 0.1 + 0.6 * torch.rand_like(eps)
    leaves = [t.requires_grad_(True) for t in (A, b, x, eps)]
    for f in (fr.ops.concretize, reference.concretize):
        assert torch.autograd.gradcheck(lambda *t, f=f: f(*t, p, (0.0, 1.0)), leaves)
