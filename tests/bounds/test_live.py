"""Rows through layers without the neurons that have no lines: against the definition in float64, with every mixture of
dead neurons."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrobust.bounds import compute_bounds, ways
from fastrobust.ops import bounds as ops
from fastrobust.ops.bounds import _stage_live as stage_live
from fastrobust.reference import bounds as reference
from variant_runs import outputs_by_variant

INPUT = (2, 9, 8)
# (channels out, kernel, stride, padding) from the input up; a number: a dense layer
CHAINS = {
    "dense": [37],
    "two dense": [21, 18],
    "conv": [(5, (3, 4), (2, 2), (1, 1))],
    "convs": [(17, (3, 3), (1, 2), (1, 0)), (20, (4, 3), (2, 1), (1, 1)), 33],
    "far": [(4, (2, 2), (3, 3), (0, 2)), (6, (1, 2), (1, 1), (0, 0)), 10],
}


def chain(name: str, batch: int, dead: str, sides: int) -> list[ops.LiveStep]:
    """The steps from the top down."""
    steps = []
    before = INPUT
    for layer in CHAINS[name]:
        if isinstance(layer, int):
            c, kernel, stride, padding = layer, before[1:], (1, 1), (0, 0)
        else:
            c, kernel, stride, padding = layer
        size = [(m + 2 * p - k) // s + 1 for m, p, k, s in zip(before[1:], padding, kernel, stride, strict=True)]
        shape = (c, *size)
        w = torch.randn(c, before[0], *kernel) / 4
        numbers = math.prod(shape)
        slopes, intercepts = torch.rand(sides, batch, numbers), torch.randn(2, batch, numbers)
        alive = {
            "none": torch.ones(batch, numbers, dtype=torch.bool),
            "all": torch.zeros(batch, numbers, dtype=torch.bool),
            "one": torch.arange(numbers).expand(batch, -1) == numbers // 2,
            "mixed": torch.rand(batch, numbers) < torch.rand(batch, 1) ** 2,
        }[dead]
        slopes, intercepts = slopes * alive, intercepts * alive
        slopes[-1] *= torch.rand(batch, numbers) < 0.8  # lines of one kind alone
        steps.append(ops.LiveStep(slopes, intercepts, shape, w, stride, padding, before))
        before = shape
    return steps[::-1]


def definition(
    A: Tensor,
    b: Tensor,
    example: Tensor,
    steps: list[ops.LiveStep],
    maps: tuple[Tensor, Tensor],
    q: float | None,
    rows: Tensor | None,
    minus: Tensor | None,
) -> Tensor:
    A, b = A.double(), b.double()
    for s in steps:
        A, b = reference.linear_back_step(A, b, s.slopes.double(), s.intercepts.double(), example, rows, minus=minus)
        rows = minus = None
        c, h, wide = s.shape
        image = A.reshape(-1, h, wide, c).permute(0, 3, 1, 2)
        extra = [
            n - ((m - 1) * t - 2 * p + k)
            for n, m, t, p, k in zip(s.shape_in[1:], (h, wide), s.stride, s.padding, s.weight.shape[2:], strict=True)
        ]
        out = F.conv_transpose2d(image, s.weight.double(), None, s.stride, s.padding, extra)
        A = out.permute(0, 2, 3, 1).reshape(*A.shape[:2], math.prod(s.shape_in))
    pair = (maps[0].double(), maps[1].double())
    box, ball = (pair, None) if q is None else (None, pair)
    return reference.concretize_rows(A, b, example, box, ball, 1.0 if q is None else q)


@given(
    st.sampled_from(sorted(CHAINS)),
    st.sampled_from([0, 1, 3, 7, 16]),
    st.sampled_from(["none", "all", "one", "mixed"]),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 2]),
    st.booleans(),
    st.sampled_from([1, 9, 17, 50]),
    st.sampled_from(["own", "rows", "less"]),
    st.sampled_from([None, 1.0, 2.0, math.inf]),
    st.booleans(),
    st.integers(0, 99),
)
def test_rows_through_live_neurons(
    name: str,
    batch: int,
    dead: str,
    lines: int,
    sides: int,
    apart: bool,
    per: int,
    form: str,
    q: float | None,
    shuffled: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    steps = chain(name, batch, dead, lines)
    count, n = batch * per, math.prod(steps[0].shape)
    example = torch.arange(batch).repeat_interleave(per)
    if shuffled:
        example = example[torch.randperm(count)]
    k = 2 if apart and sides == 2 else 1
    rows, minus = (
        None if form == "own" else torch.randint(0, 5, (count,)),
        torch.randint(0, 5, (count,)) if form == "less" else None,
    )
    A, b = torch.randn(k, count if rows is None else 5, n), torch.randn(sides, count)
    maps = (torch.randn(batch, math.prod(INPUT)), torch.rand(batch, math.prod(INPUT)))
    box, ball = (maps, None) if q is None else (None, maps)
    got = ops.concretize_live(A, b, example, steps, box, ball, 1.0 if q is None else q, rows, minus)
    want = definition(A, b, example, steps, maps, q, rows, minus)
    assert got.shape == want.shape
    if count:
        assert (got.double() - want).abs().max() <= 2e-5 * (1.0 + want.abs().max())


def test_coefficients_that_are_no_numbers_reach_their_row() -> None:
    """Of a neuron without lines too, as they would by a product with zero; lines that are no numbers count as lines."""
    torch.manual_seed(0)
    steps = chain("convs", 2, "one", 1)
    A, b, example = torch.randn(1, 6, 33), torch.zeros(1, 6), torch.tensor([0, 0, 0, 1, 1, 1])
    box = (torch.randn(2, 144), torch.rand(2, 144))
    A[0, 1, 2], A[0, 4, 16] = math.nan, math.inf  # neuron 16 has lines
    got = ops.concretize_live(A, b, example, steps, box, None, 1.0)[0]
    assert got.isfinite().tolist() == [True, False, True, True, False, True]
    steps[1].slopes[:, 1, 7] = steps[1].intercepts[:, 1, 7] = math.nan  # as lines of an interval that is no number
    got = ops.concretize_live(A, b, example, steps, box, None, 1.0)[0]
    assert got.isfinite().tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize("method", ["crown-ibp", "fast-lin", "crown"])
@pytest.mark.parametrize("norm,clip", [(math.inf, (0.0, 1.0)), (2.0, None), (1.0, None)])
@pytest.mark.parametrize("sides", ["both", "lower"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.usefixtures("engine_alone")
def test_bounds_without_dead_neurons_equal_the_others(
    method: str, norm: float, clip: tuple[float, float] | None, sides: str, flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    if flat:
        net: nn.Sequential = nn.Sequential(
            nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 5)
        )
        x = torch.rand(7, 30)
    else:
        net = nn.Sequential(
            nn.Conv2d(2, 5, 4, 2, 1), nn.ReLU(), nn.Conv2d(5, 18, (3, 2), 1, (1, 0)), nn.ReLU(), nn.Flatten(),
            nn.Linear(648, 20), nn.ReLU(), nn.Linear(20, 5),
        )  # fmt: skip
        x = torch.rand(7, 2, 12, 14)
    for layer in net:
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and layer is not net[-1]:
            layer.bias.data -= 0.2  # some neurons are dead
    net.requires_grad_(False)
    kwargs = {"eps": 0.02, "norm": norm, "clip": clip, "method": method, "labels": torch.arange(7) % 5, "sides": sides}
    calls = []
    through = ops.concretize_live
    monkeypatch.setattr(ops, "leaving_out_pays", lambda *a: True)
    monkeypatch.setattr(ops, "concretize_live", lambda *a: calls.append(len(a[3])) or through(*a))
    got = compute_bounds(net, x, **kwargs)
    assert calls
    with ways(without="living layers"):
        want = compute_bounds(net, x, **kwargs)
    wide = compute_bounds(net.double(), x.double(), **kwargs)
    for other in (want, wide):
        scale = other.lower.abs().max()
        assert (got.lower.double() - other.lower).abs().max() <= 1e-5 * scale
        if sides == "both":
            assert (got.upper.double() - other.upper).abs().max() <= 1e-5 * other.upper.abs().max()


@pytest.mark.parametrize("module", [ops, stage_live])
def test_it_is_chosen_where_many_neurons_are_dead(module: Any) -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )  # fmt: skip
    net.requires_grad_(False)
    x, y = torch.rand(4, 1, 28, 28), torch.arange(4)
    chosen = []
    pays = ops.leaving_out_pays
    for shift in (0.0, -0.5):
        net[0].bias.data += shift
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "leaving_out_pays", lambda *a: chosen.append(pays(*a)) or chosen[-1])
            with ways(without=() if module is stage_live else "graph op"):
                compute_bounds(net, x, 0.01, method="crown-ibp", labels=y, sides="lower")
    assert not chosen[0] and chosen[-1]


_SCRIPT = """
import torch
import fastrobust as fr
from torch import nn
from fastrobust.ops import bounds as ops
from fastrobust.bounds import api
from fastrobust.ops.bounds import _stage_live as stage_live
ops.leaving_out_pays = stage_live.leaving_out_pays = lambda *a: True
torch.manual_seed(1)
net = nn.Sequential(nn.Conv2d(1, 7, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(175, 33), nn.ReLU(), nn.Linear(33, 12))
net.requires_grad_(False)
for method in ("crown-ibp", "crown-ibp", "crown", "fast-lin"):  # the first in one op
    found = fr.bounds.compute_bounds(net, torch.rand(5, 1, 9, 9), 0.05, method=method, labels=torch.arange(5))
    print(round(float(found.lower.sum()), 3), round(float(found.upper.sum()), 3))
    api.margins_of_stages = lambda *a: None
"""


def test_every_variant_gives_the_same_bounds() -> None:
    results = outputs_by_variant(_SCRIPT)
    first, *others = (list(map(float, words)) for words in results.values())
    for other in others:
        assert all(abs(a - b) <= 2e-3 for a, b in zip(first, other, strict=True))
