"""ReLU networks that are no chains in one op: bounds and every gradient against the engine in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from combinations import combinations
from fastrobust.bounds import compute_bounds
from variant_runs import outputs_by_variant

from .nets import random_statistics, spied
from .test_live_graph import IMAGE, Block, Forks, residual
from .test_margins import bounds_and_gradients, near


class Dense(nn.Module):
    """Skips between dense layers, one of them from the input to the output, a layer used twice and negated, a
    normalised vector."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(126, 20), nn.Linear(20, 20), nn.BatchNorm1d(20)
        self.c, self.out, self.short = nn.Linear(20, 20, bias=False), nn.Linear(20, 5), nn.Linear(126, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        h = torch.relu(self.a(x))
        k = self.norm(torch.relu(self.b(h) - h) + self.c(h))
        return self.out(torch.relu(self.b(torch.relu(k)) - self.c(k))) - self.short(x) * 2 + 1


class Mixed(nn.Module):
    """Convolutions in a row, a linear value that several nodes read, a dense layer behind an image, two ways to the
    output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 5, 3, 1, 1),
            nn.Conv2d(5, 7, 1, bias=False),
            nn.Conv2d(7, 7, (3, 2), (2, 1), (1, 0)),
        )
        self.d, self.e, self.out, self.pooled = (
            nn.Linear(140, 20),
            nn.Conv2d(7, 3, 3, 1, 1),
            nn.Linear(20, 5),
            nn.Linear(3, 5, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.b(self.a(x))
        h = self.c(torch.relu(h) + 0.1 * h)
        k = torch.relu(self.d(torch.relu(h).flatten(1)))
        return self.out(k) + self.pooled(F.adaptive_avg_pool2d(self.e(torch.relu(h) - h), 1).flatten(1))


NETS: dict[str, Any] = {
    "residual": lambda: residual(False),
    "before activation": lambda: residual(True),
    "forks": lambda: Forks(5),
    "dense": Dense,
    "mixed": Mixed,
}


def network(name: str) -> nn.Module:
    torch.manual_seed(4)
    net: nn.Module = NETS[name]().eval()
    net(torch.zeros(2, *IMAGE))
    random_statistics(net)
    for m in net.modules():
        if isinstance(m, Block) and not m.before:
            m.norm = nn.Identity()  # not used: it would have no gradient
    return net


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the op took each call in float32."""
    return spied(monkeypatch, "margins_of_stages")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "ibp-linear"])
@pytest.mark.parametrize("sides", ["lower", "both", "upper"])
def test_bounds_and_gradients_equal_the_engine(name: str, method: str, sides: str, taken: list[bool]) -> None:
    for batch, eps_kind, input_too in combinations((1, 3, 7, 16), ("all", "each"), (False, True)):
        net = network(name)
        x, y = torch.rand(batch, *IMAGE), torch.randint(net(torch.zeros(1, *IMAGE)).shape[1], (batch,))
        eps = 0.05 if eps_kind == "all" else torch.rand_like(x) / 10
        labels = y if batch != 3 or method == "ibp" or sides == "upper" else None
        kwargs = {"method": method, "clip": None if batch < 7 else (0.0, 1.0), "sides": sides}
        taken.clear()
        got = bounds_and_gradients(net, x, eps, labels, torch.float32, input_too, **kwargs)
        assert taken == [True, True]
        near(got, bounds_and_gradients(net, x, eps, labels, torch.float64, input_too, **kwargs), 1e-4)
        assert taken == [True, True, False, False]  # float64 is the engine's


@pytest.mark.parametrize("name", [*NETS, "chain"])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "ibp-linear", "crown"])
def test_parameters_may_be_stored_in_any_order(name: str, method: str) -> None:
    torch.manual_seed(1)
    chain = nn.Sequential(nn.Flatten(), nn.Linear(126, 30), nn.ReLU(), nn.Linear(30, 25), nn.ReLU(), nn.Linear(25, 5))
    net = chain if name == "chain" else network(name)
    for m in net.modules():
        if isinstance(m, nn.Linear):
            m.weight = nn.Parameter(m.weight.detach().t().contiguous().t())
        elif isinstance(m, nn.Conv2d):
            m.weight = nn.Parameter(m.weight.detach().contiguous(memory_format=torch.channels_last))
    x = torch.rand(7, *IMAGE)
    y = torch.randint(net(torch.zeros(1, *IMAGE)).shape[1], (7,))
    got, want = (bounds_and_gradients(net, x, 0.05, y, d, True, method=method) for d in (torch.float32, torch.float64))
    near(got, want, 1e-4)


def test_intervals_of_chains_are_taken_here(taken: list[bool]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(5, 4, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.ReLU(),
        nn.Linear(7, 4),
    )
    x, y = torch.rand(7, *IMAGE), torch.randint(4, (7,))
    got = bounds_and_gradients(net, x, 0.05, y, torch.float32, False, method="ibp")
    assert taken == [True]  # without gradients small batches are one call
    near(got, bounds_and_gradients(net, x, 0.05, y, torch.float64, False, method="ibp"))


def test_dead_neurons_have_no_gradient_and_constant_ones_no_nan(taken: list[bool]) -> None:
    net = network("residual")
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Conv2d) and m.bias is not None:
                m.bias -= 1.0
                m.weight[0] = 0.0
    x, y = torch.rand(3, *IMAGE), torch.tensor([0, 1, 4])
    for method in ("ibp", "crown-ibp"):
        for eps in (0.0, 0.02):
            got = bounds_and_gradients(net, x, eps, y, torch.float32, True, method=method)
            near(got, bounds_and_gradients(net, x, eps, y, torch.float64, True, method=method), 1e-4)
    assert all(taken[:2])


def test_what_is_left_to_the_engine(taken: list[bool]) -> None:
    net = network("residual")
    x, y = torch.rand(2, *IMAGE), torch.tensor([0, 3])
    for change in (
        {"max_memory": 1},
        {"method": "ibp", "labels": None},
        {"method": "crown"},
        {"rounding": "outward"},
        {"return_intermediate": True},
    ):
        taken.clear()
        compute_bounds(net, x, 0.05, **{"method": "crown-ibp", "labels": y, **change})
        assert not any(taken)
    assert compute_bounds(net, x[:0], 0.05, method="crown-ibp", labels=y[:0]).lower.shape == (0, 4)


def test_a_network_that_trains_is_read_anew() -> None:
    net = network("before activation")
    x, y = torch.rand(3, *IMAGE), torch.tensor([0, 1, 4])
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    values = []
    for _ in range(6):
        optimizer.zero_grad()
        low = compute_bounds(net, x, 0.02, method="crown-ibp", labels=y, sides="lower").lower
        loss = F.softplus(-low).sum()
        loss.backward()
        optimizer.step()
        values.append(float(loss))
    assert values[-1] < values[0]
    want = compute_bounds(net.double(), x.double(), 0.02, method="crown-ibp", labels=y, sides="lower").lower
    near([compute_bounds(net.float(), x, 0.02, method="crown-ibp", labels=y, sides="lower").lower], [want])


_SCRIPT = """
import torch, sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import fastrobust as fr
from tests.bounds.test_stage_margins import NETS, network
for name in NETS:
    for method in ("ibp", "crown-ibp", "ibp-linear"):
        net = network(name)
        torch.manual_seed(1)
        found = fr.bounds.compute_bounds(net, torch.rand(5, 3, 7, 6), 0.05, method=method, labels=torch.tensor([0, 1, 2, 3, 0]))
        (found.lower.sum() - found.upper.sum()).backward()
        for v in (found.lower, found.upper, *(p.grad for p in net.parameters())):
            print(float(v.double().sum()), float(v.double().abs().sum()))
"""


def test_every_variant_gives_the_same_bounds_and_gradients() -> None:
    script = _SCRIPT.format(root=str(Path(__file__).parents[2]))
    first, *others = (list(map(float, words)) for words in outputs_by_variant(script).values())
    for other in others:
        assert all(abs(a - b) <= 1e-3 * max(1.0, abs(a)) for a, b in zip(first, other, strict=True))
