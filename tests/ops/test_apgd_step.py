"""The step of Auto-PGD: its definition, ball and box, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attack_helpers as h
import fastrobust as fr
from fastrobust.reference import pgd as reference

EPS = {h.INF: 0.1, 2: 0.7, 1: 2.3}


def _arguments(norm: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(seed)
    draw = lambda: torch.rand(5, 2, 6, 5, generator=rng)
    x0 = (draw() * 1.4 - 0.2).clamp(0, 1).to(dtype)
    eps = EPS[norm] * torch.tensor([0.0, 0.3, 1, 1, 2])
    points = [fr.ops.random_start(x0, eps, norm, seed=k) for k in range(2)]
    grad = torch.randn(5, 2, 6, 5, generator=rng).to(dtype)
    return {
        "x": points[0],
        "previous": points[1],
        "x0": x0,
        "grad": grad,
        "step_size": eps * 2,
        "eps": eps,
        "norm": norm,
    }


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("momentum", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("clip", [(0.0, 1.0), None, (0.0, 0.9)])
def test_definition_ball_and_box(norm: float, momentum: float, clip: Any) -> None:
    a = _arguments(norm)
    if clip == (0.0, 0.9):
        a |= {k: a[k].clamp(0, 0.9) for k in ("x", "previous", "x0")}
    found = fr.ops.apgd_step(**a, clip=clip, momentum=momentum)
    h.assert_inside(found, a["x0"], a["eps"], norm, clip)
    wanted = reference.apgd_step(**a, clip=clip, momentum=momentum)
    assert (found - wanted).abs().max().item() <= (0.0 if norm == h.INF else 2e-6)
    wide = reference.apgd_step(
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in a.items()}, clip=clip, momentum=momentum
    )
    assert (found.double() - wide).abs().max().item() <= 5e-6


@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("shape", [(1,), (3, 7), (17,), (2, 6, 5)])
def test_points_outside_of_a_box_without_zero(norm: float, shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(5)
    draw = lambda: torch.randn(4, *shape, generator=rng)
    x0, x, previous, grad = draw().clamp(0.11, 0.29), 0.2 + 0.2 * draw(), 0.2 + 0.2 * draw(), draw()
    for eps in (0.05, 0.3, 1.0):
        wide = [t.double() for t in (x, previous, x0, grad)]
        wanted = reference.apgd_step(*wide, 0.1, eps, norm, (0.1, 0.3), 0.75)
        found = fr.ops.apgd_step(x, previous, x0, grad, 0.1, eps, norm, (0.1, 0.3))
        assert (found.double() - wanted).abs().max().item() <= 5e-6
        h.assert_inside(found, x0, eps, norm, (0.1, 0.3))


@pytest.mark.parametrize("norm", [h.INF, 2])
def test_without_momentum_it_is_a_pgd_step(norm: float) -> None:
    a = _arguments(norm)
    found = fr.ops.apgd_step(**a, momentum=1.0)
    del a["previous"]
    assert torch.equal(found, fr.ops.pgd_step(**a))
    assert torch.equal(
        fr.ops.apgd_step(**a, previous=a["x"], momentum=1.0, targeted=True), fr.ops.pgd_step(**a, targeted=True)
    )


def test_sparse_steps() -> None:
    """Norm 1: as many coordinates as asked for, those of largest gradient, share the step evenly."""
    x0 = torch.full((3, 12), 0.5)
    g = torch.randn(3, 12, generator=torch.Generator().manual_seed(4))
    keep = torch.tensor([1, 4, 50])
    found = fr.ops.apgd_step(x0, x0, x0, g, 0.1, 1.0, 1, keep=keep, momentum=1.0)
    for row, k in enumerate([1, 4, 12]):
        moved = (found[row] - x0[row]).abs()
        top = g[row].abs().topk(k).indices
        assert set(moved.nonzero()[:, 0].tolist()) == set(top.tolist())
        assert torch.allclose(moved[top], torch.full((k,), 0.1 / k), rtol=1e-4)
        assert torch.equal((found[row] - x0[row]).sign()[top], g[row].sign()[top])


@pytest.mark.parametrize("norm", h.NORMS)
def test_zero_and_bad_gradients(norm: float) -> None:
    a = _arguments(norm)
    a["previous"] = a["x"]
    a["grad"][0] = 0
    a["grad"][1, 0, 0, 0] = math.nan
    a["grad"][2] = math.nan
    a["grad"][3, 0, 0, 0] = math.inf
    clean = fr.ops.apgd_step(**a)
    h.assert_inside(clean, a["x0"], a["eps"], norm)
    assert torch.equal(clean[[0, 2]], a["x"][[0, 2]])
    other = {**a, "grad": torch.where(a["grad"].isnan(), 0.0, a["grad"])}
    assert torch.equal(clean, fr.ops.apgd_step(**other))


def test_compiles() -> None:
    a = _arguments(h.INF)
    step = torch.compile(lambda *t: fr.ops.apgd_step(*t, 0.2, 0.1), fullgraph=True, backend="aot_eager")
    tensors = (a["x0"], a["x0"], a["x0"], a["grad"])
    assert torch.equal(step(*tensors), fr.ops.apgd_step(*tensors, 0.2, 0.1))


@pytest.mark.parametrize(
    ("bad", "error", "text"),
    [
        ({"previous": torch.zeros(5, 2)}, ValueError, "previous: got shape"),
        ({"momentum": 2}, ValueError, "momentum: got 2.0"),
        ({"keep": torch.ones(5, dtype=torch.int64)}, ValueError, "keep: got a tensor for norm inf"),
        ({"norm": 1, "keep": torch.ones(5)}, ValueError, "keep: got"),
        ({"norm": 1, "keep": torch.zeros(5, dtype=torch.int64)}, ValueError, "keep: got 0, expected at least 1"),
        ({"eps": -1.0}, ValueError, "eps: got -1.0"),
        ({"grad": [1]}, TypeError, "grad: got"),
    ],
    ids=lambda v: h.label(v)[:40],
)
def test_bad_input(bad: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fr.ops.apgd_step(**{**_arguments(h.INF), **bad})


@pytest.mark.parametrize("norm", h.NORMS)
def test_opcheck(norm: float) -> None:
    a = _arguments(norm)
    keep = torch.tensor([1, 4, 50, 60, 7]) if norm == 1 else None
    code = {h.INF: 0, 2: 1, 1: 2}[norm]
    grad = a["grad"].requires_grad_()
    args = (a["x"], a["previous"], a["x0"], grad, a["step_size"], 0.0, a["eps"], 0.0, code, 0.0, 1.0, 0.75, keep)
    torch.library.opcheck(torch.ops.fastrobust.apgd_step.default, args)
