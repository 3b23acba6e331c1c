"""Products with a matrix of signs, and the gradients of linear bounds that take them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastrobust.ops.bounds import _stage_live as stage_live
from fastrobust.ops.bounds._product import sign_product
from variant_runs import outputs_by_variant

from .test_margins import bounds_and_gradients, near


def matrix(rows: int, columns: int, turned: bool) -> Tensor:
    return torch.randn(columns, rows).t() if turned else torch.randn(rows, columns)


@given(
    st.integers(1, 70),
    st.integers(1, 110),
    st.integers(1, 80),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 1, 2]),
    st.integers(0, 99),
)
def test_product_with_signs(
    rows: int,
    count: int,
    columns: int,
    turn_x: bool,
    turn_b: bool,
    turn_out: bool,
    scaled: bool,
    based: bool,
    zeros: int,
    seed: int,
) -> None:
    """Any layout; zeros one by one, in whole rows and in whole columns."""
    torch.manual_seed(seed)
    x, b = matrix(rows, count, turn_x), matrix(count, columns, turn_b)
    if zeros:
        x[rows // 2], x[:, count // 3] = 0.0, 0.0
    if zeros == 2:
        x[rows // 3, count // 2] = 0.0
    scale, b_scale = torch.randn(rows), torch.randn(count) if scaled else None
    base = (torch.randn(4, columns), torch.randn(rows), torch.randint(4, (rows,))) if based else None
    out = torch.full_like(matrix(rows, columns, turn_out), math.nan)
    done = sign_product(x, b, scale, out, b_scale, base)
    assert done or (zeros == 2 and rows * count < 32)
    if not done:
        assert bool(out.isnan().all())
        return
    wide = b.double() if b_scale is None else b.double() * b_scale.double()[:, None]
    want = scale.double()[:, None] * (x.double().sign() @ wide)
    size = (scale.double().abs()[:, None] * wide.abs().sum(0)).max()
    if base is not None:
        want = want + base[1].double()[:, None] * base[0].double()[base[2]]
        size = size + (base[1].abs().max() * base[0].abs().max()).double()
    assert (out.double() - want).abs().max() <= 1e-6 * size


@pytest.mark.parametrize("turn", [False, True])
def test_what_the_product_refuses(turn: bool) -> None:
    """NaN, and more single zeros than pay: nothing is written."""
    for spoil in ("nan", "zeros"):
        x, b, out = matrix(60, 70, turn), torch.randn(70, 20), torch.full((60, 20), 7.0)
        if spoil == "nan":
            x[3, 4] = math.nan
        else:
            x[torch.rand(60, 70) < 0.1] = 0.0
        assert not sign_product(x, b, torch.ones(60), out)
        assert bool((out == 7.0).all())


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the op took each product with signs; it tries however small they are."""
    calls: list[bool] = []

    def spy(*args: Any) -> bool:
        calls.append(sign_product(*args))
        return calls[-1]

    monkeypatch.setattr(stage_live, "sign_product", spy)
    monkeypatch.setattr(stage_live, "MANY", 1)
    monkeypatch.setattr(stage_live, "FEW", 0.0)
    return calls


def nets() -> dict[str, tuple[tuple[int, ...], nn.Sequential]]:
    torch.manual_seed(5)
    plain = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 5))
    blind = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 33, bias=False), nn.ReLU(), nn.Linear(33, 17), nn.ReLU(), nn.Linear(17, 4)
    )
    with torch.no_grad():
        blind[1].weight[:, ::5] = 0.0  # inputs that nothing depends on
        blind[1].weight[7] = 0.0
        blind[5].weight[1] = blind[5].weight[0]  # a margin without a coefficient
    masked = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 5))
    with torch.no_grad():
        masked[0].weight *= torch.rand(40, 50) < 0.5
    return {"plain": ((50,), plain), "blind": ((3, 4, 4), blind), "masked": ((50,), masked)}


@pytest.mark.parametrize("name", ["plain", "blind", "masked"])
@pytest.mark.parametrize("method", ["crown-ibp", "ibp-linear"])
@pytest.mark.parametrize("sides", ["lower", "both", "upper"])
@pytest.mark.parametrize("leave_out", [False, True])
def test_gradients_from_signs(
    name: str, method: str, sides: str, leave_out: bool, used: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_live, "leaving_out_pays", lambda *a: leave_out)
    shape, net = nets()[name]
    for batch in (1, 3, 7, 16):
        torch.manual_seed(batch)
        x, y = torch.rand(batch, *shape), torch.randint(net[-1].out_features, (batch,))
        kwargs = {"method": method, "sides": sides}
        used.clear()
        got = bounds_and_gradients(net, x, 0.05, y, torch.float32, False, **kwargs)
        assert used == [True, True]
        near(got, bounds_and_gradients(net, x, 0.05, y, torch.float64, False, **kwargs))


def test_radii_of_their_own_take_products(used: list[bool]) -> None:
    """A box cut at its faces, an eps for each example, a gradient of the input."""
    shape, net = nets()["plain"]
    x, y = torch.rand(6, *shape), torch.arange(6) % 5
    for eps, clip, input_too in ((0.1, (0.0, 1.0), False), (torch.rand(6) / 9, None, False), (0.1, None, True)):
        kwargs = {"method": "crown-ibp", "clip": clip}
        got = bounds_and_gradients(net, x, eps, y, torch.float32, input_too, **kwargs)
        near(got, bounds_and_gradients(net, x, eps, y, torch.float64, input_too, **kwargs))
    assert not used


def test_many_single_zeros_take_products(used: list[bool]) -> None:
    net = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 5))
    with torch.no_grad():  # each input meets two neurons, half of them dead
        net[0].weight *= torch.rand(40, 50) < 0.04
        net[0].bias -= 0.1
    torch.manual_seed(0)
    x, y = torch.rand(7, 50), torch.arange(7) % 5
    got = bounds_and_gradients(net, x, 0.02, y, torch.float32, False, method="crown-ibp")
    assert used == [False]
    near(got, bounds_and_gradients(net, x, 0.02, y, torch.float64, False, method="crown-ibp"))


_SCRIPT = """
import torch
import fastrobust as fr
from torch import nn
torch.manual_seed(1)
net = nn.Sequential(nn.Linear(101, 83), nn.ReLU(), nn.Linear(83, 12))
found = fr.bounds.compute_bounds(net, torch.rand(31, 101), 0.05, method="crown-ibp", labels=torch.arange(31) % 12)
(found.lower.sum() - found.upper.sum()).backward()
for v in (found.lower, found.upper, *(p.grad for p in net.parameters())):
    print(float(v.double().sum()), float(v.double().abs().sum()))
"""


def test_every_variant_gives_the_same_gradients() -> None:
    first, *others = (list(map(float, words)) for words in outputs_by_variant(_SCRIPT).values())
    for other in others:
        assert all(abs(a - b) <= 1e-4 * max(1.0, abs(a)) for a, b in zip(first, other, strict=True))
