"""fr.certify.verify on graphs of all kinds, norms and options: networks of two inputs, so that a grid sees every
piece."""

import math

import pytest
import torch
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.certify import _milp
from fastrobust.certify._branch import Entry
from fastrobust.certify._relu_network import Network
from fastrobust.certify._subproblems import Problems
from fastrobust.certify.exact import _root, _Task

GRID = torch.cartesian_prod(torch.linspace(-1, 1, 121), torch.linspace(-1, 1, 121))


class Two(nn.Module):
    """Two inputs, spread over a map of 2 x 4 x 4, a body, and three classes."""

    def __init__(self, body: nn.Module, features: int) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(2, 32), body, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).view(-1, 2, 4, 4)
        return self.last(self.body(z).flatten(1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(z + self.b(torch.relu(self.norm(self.a(z))))) - 0.5 * z


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 1, 2, 2), nn.Conv2d(2, 2, 2, 2)

    def forward(self, z: Tensor) -> Tensor:
        return torch.relu(torch.cat([self.a(z), nn.functional.leaky_relu(self.b(z), 0.2)], 1))


class Clipped(nn.Module):
    def __init__(self, low: float | None, high: float | None) -> None:
        super().__init__()
        self.low, self.high = low, high

    def forward(self, z: Tensor) -> Tensor:
        return z.clamp(self.low, self.high)


BODIES = {
    "residual with batch norm": (Residual, 32),
    "concat, leaky": (Joined, 12),
    "average pooling": (lambda: nn.Sequential(nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(2, 3, 1), nn.ReLU()), 12),
    "max pooling": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(2, 3, 1), nn.ReLU()), 12),
    "padded max pooling": (lambda: nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.ReLU()), 8),
    "clipped": (lambda: nn.Sequential(nn.Hardtanh(-0.3, 0.4), nn.Conv2d(2, 3, 3, 2), nn.Hardtanh(-0.1, 0.2)), 3),
    "two kinds of clips": (lambda: nn.Sequential(nn.Hardtanh(-1, 1), nn.Conv2d(2, 3, 3, 2), nn.ReLU6()), 3),
    "clipped once": (lambda: nn.Sequential(Clipped(-0.2, None), nn.Conv2d(2, 2, 3, 2), Clipped(None, 0.3)), 2),
    "leaky": (lambda: nn.Sequential(nn.LeakyReLU(0.1), nn.Conv2d(2, 2, 3, 2), nn.LeakyReLU(0.3)), 2),
}


def network(kind: str, seed: int) -> nn.Module:
    body, features = BODIES[kind]
    torch.manual_seed(seed)
    model = Two(body(), features)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
            nn.init.normal_(m.weight)
    with torch.no_grad():
        model.first.weight.mul_(2)
        model.last.weight.mul_(2)
    return model.eval()


def right(model: nn.Module, points: Tensor, y: int) -> bool:
    with torch.no_grad():
        return bool((model(points).argmax(1) == y).all())


@pytest.mark.parametrize("kind", BODIES)
def test_every_kind_of_graph_is_decided_as_on_a_grid(kind: str) -> None:
    found = []
    for seed in range(3):
        model = network(kind, seed)
        x = torch.rand(4, 2, generator=torch.Generator().manual_seed(seed))
        y = model(x).argmax(1)
        v = fr.certify.verify(model, x, y, 0.3, clip=None, method="ibp", restarts=1, steps=1, timeout=100)
        assert v.note == ""
        for i, status in enumerate(v.status):
            if status == "verified":
                assert right(model, x[i] + 0.3 * GRID, int(y[i])), (kind, seed, i)
            elif status == "falsified":
                point = v.counterexamples[i : i + 1]
                assert model(point).argmax() != y[i] and (point.double() - x[i].double()).abs().max() <= 0.3
        found += list(zip(v.stage, v.status, strict=True))
    statuses = [s for _, s in found]
    assert statuses.count("unknown") == 0, (kind, found)
    assert "branch" in [s for s, _ in found] and "verified" in statuses


def test_a_hard_sigmoid_is_read() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 12), nn.Hardsigmoid(), nn.Linear(12, 12), nn.Hardsigmoid(), nn.Linear(12, 3))
    with torch.no_grad():
        model[0].weight.mul_(8)
        model[2].weight.mul_(8)
        model[4].weight.mul_(8)
    x = torch.rand(6, 2)
    y = model(x).argmax(1)
    v = fr.certify.verify(model, x, y, 0.2, clip=None, method="ibp", restarts=1, steps=1, timeout=100)
    assert v.note == "" and "branch" in v.stage and "unknown" not in v.status
    for i, status in enumerate(v.status):
        assert status == "falsified" or right(model, x[i] + 0.2 * GRID, int(y[i])), i


@pytest.mark.skipif(not _milp.available(), reason="highspy is not installed")
def test_what_does_not_end_goes_to_the_mixed_integer_solver() -> None:
    model = network("clipped", 1)
    x = torch.rand(4, 2, generator=torch.Generator().manual_seed(1))[1:2]
    y = model(x).argmax(1)
    v = fr.certify.verify(model, x, y, 0.6, clip=None, method="ibp", restarts=1, steps=1, timeout=100)
    assert v.status == ["verified"] and v.stage == ["branch"] and 1000 <= int(v.subproblems) < 5000
    assert right(model, x[0] + 0.6 * GRID, int(y))


@pytest.mark.parametrize("norm", [1, 2])
def test_balls_of_other_norms(norm: int) -> None:
    statuses = []
    for seed in range(4):
        model = network("leaky", seed)
        x = torch.rand(4, 2, generator=torch.Generator().manual_seed(seed))
        y = model(x).argmax(1)
        eps = torch.tensor([0.1, 0.3, 0.5, 0.7])
        v = fr.certify.verify(model, x, y, eps, norm=norm, method="ibp", steps=1, timeout=100, max_subproblems=200)
        for i, status in enumerate(v.status):
            near = (x[i] + eps[i] * GRID).clamp(0, 1)
            near = near[(near - x[i]).norm(norm, 1) <= eps[i]]
            if status == "verified":
                assert right(model, near, int(y[i])), (norm, seed, i)
            elif status == "falsified":
                point = v.counterexamples[i].double()
                assert model(v.counterexamples[i : i + 1]).argmax() != y[i]
                assert (point - x[i].double()).norm(norm) <= eps[i].double() and 0 <= point.min() <= point.max() <= 1
        statuses += v.status
    assert statuses.count("unknown") <= 2 and min(statuses.count("verified"), statuses.count("falsified")) >= 2


def test_eps_of_each_example_and_the_rest_of_the_batch() -> None:
    model = network("residual with batch norm", 1)
    x = torch.rand(6, 2)
    y = model(x).argmax(1)
    eps = torch.tensor([0.0, 0.02, 0.05, 0.1, 0.2, 0.4])
    together = fr.certify.verify(model, x, y, eps, method="ibp", steps=1)
    alone = [fr.certify.verify(model, x[[i]], y[[i]], float(eps[i]), method="ibp", steps=1) for i in range(6)]
    assert together.status == [v.status[0] for v in alone] and together.status[0] == "verified"
    per_pixel = fr.certify.verify(model, x, y, eps[:, None].expand(6, 2), method="ibp", steps=1)
    assert per_pixel.status == together.status


def test_training_mode_is_kept_and_the_evaluated_model_is_meant() -> None:
    model = network("residual with batch norm", 2)
    x = torch.rand(3, 2)
    y = model(x).argmax(1)
    want = fr.certify.verify(model, x, y, 0.1)
    model.train()
    model.first.eval()
    before = [t.clone() for t in model.state_dict().values()]
    ticks: list[int] = []
    got = fr.certify.verify(model, x, y, 0.1, progress=ticks.append)
    assert got.status == want.status and sum(ticks) == 3
    assert model.training and not model.first.training and model.body.norm.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


def test_what_cannot_be_split_is_said() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 6), nn.Sigmoid(), nn.Linear(6, 3)).eval()
    x = torch.rand(8, 2)
    y = model(x).argmax(1)
    v = fr.certify.verify(model, x, y, 0.3, method="ibp")
    assert "sigmoid" in v.note and v.count("unknown") + v.count("verified") + v.count("falsified") == 8
    assert "branch" not in v.stage


def test_outward_counts_the_errors_of_float32() -> None:
    """A margin of 1e-6 between numbers of about 1000: proven in real arithmetic, not for every float32 evaluation."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[0].bias.copy_(torch.tensor([-0.5, 0.5]))
        # z_0 - z_1 = |x - 0.5| + 2^-13, the outputs near 1024; bounds without a split cannot see that
        model[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        model[2].bias.copy_(torch.tensor([1024.0 + 2**-13, 1024.0]))
    x, y = torch.tensor([[0.6]]), torch.tensor([0])
    near = fr.certify.verify(model, x, y, 0.3, method="ibp")
    assert near.status == ["verified"] and float(near.lower) <= 2**-13
    outward = fr.certify.verify(model, x, y, 0.3, method="ibp", rounding="outward")
    assert outward.status == ["unknown"]
    with torch.no_grad():
        model[2].bias[0] = 1024.125
    assert fr.certify.verify(model, x, y, 0.3, method="ibp", rounding="outward").status == ["verified"]


def test_leaves_bound_the_pieces_they_are_of() -> None:
    pytest.importorskip("highspy")
    empty = reached = 0
    for seed in range(4):
        torch.manual_seed(seed)
        model = (
            nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
            .eval()
            .requires_grad_(False)
            .double()
        )
        x = torch.rand(1, 2, dtype=torch.float64)
        task = _Task(model, x, torch.tensor([0]), 0.5, math.inf, None, "nearest")
        net, sets = Network(model, x), task.sets()
        root = _root(net, task, sets, "crown", 1 << 30)
        p = Problems(net, sets, root, task.y)
        leaves = _milp.Leaves(p, False)
        points = x + 0.5 * GRID
        first = model[:1](points)
        second = model[1:3](first)
        out = model[3:](second)
        margin = out[:, 0] - out[:, 1]
        open_ = ((root.low < 0) & (root.up > 0))[0]
        own = 2 * (torch.cat([first, second], 1)[:, open_] > 0).to(torch.int8) - 1
        patterns = [own[0], own[5000], own[-1], -own[0], -own[5000]]
        for s in patterns:
            low, up = (
                torch.where(s > 0, p.low[0].clamp(min=0), p.low[0]),
                torch.where(s < 0, p.up[0].clamp(max=0), p.up[0]),
            )
            zero = torch.zeros(p.size)
            value, point = leaves(0, Entry(0, s, zero, zero, low, up, 0.0))
            there = (own == s).all(1)
            if bool(there.any()):
                reached += 1
                least = float(margin[there].min())
                assert least - 0.05 <= value <= least + 1e-6 and point is not None
            else:
                empty += 1
    assert reached >= 8 and empty >= 1


@pytest.mark.parametrize("how", ["never", "always"])
def test_with_and_without_highs(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "always":
        pytest.importorskip("highspy")
    model = network("average pooling", 0)
    x = torch.rand(6, 2)
    y = model(x).argmax(1)
    want = fr.certify.verify(model, x, y, 0.2, method="ibp", steps=1)
    got = fr.certify.verify(model, x, y, 0.2, method="ibp", steps=1, milp=how)
    assert all(a == b for a, b in zip(got.status, want.status, strict=True) if "unknown" not in (a, b))
    assert got.count("unknown") <= 1
    monkeypatch.setattr("fastrobust.certify.exact.available", lambda: False)
    with pytest.raises(ValueError, match="highspy"):
        fr.certify.verify(model, x, y, 0.2, milp="always")
    cut = fr.certify.verify(model, x, y, 0.2, method="ibp", steps=1, max_subproblems=0)
    assert "highspy" in cut.note or cut.count("unknown") == 0


def test_arguments() -> None:
    model, x, y = network("leaky", 0), torch.rand(2, 2), torch.tensor([0, 1])
    for name, value in {"timeout": 0, "max_subproblems": -1, "batch_size": 0, "iterations": 0, "milp": "often"}.items():
        with pytest.raises(ValueError, match=f"{name}: got"):
            fr.certify.verify(model, x, y, 0.1, **{name: value})
    with pytest.raises(ValueError, match="labels: got"):
        fr.certify.verify(model, x, y[:1], 0.1)
    with pytest.raises(ValueError, match="eps: got shape"):
        fr.certify.verify(model, x, y, torch.rand(2, 2), norm=2)
    assert fr.certify.verify(model, x[:0], y[:0], 0.1).status == []
