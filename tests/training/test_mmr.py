"""Maximum margin regularisation: distances against geometry and Jacobians, the method against its algorithm written
out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust import training
from fastrobust.training.method import Batch
from fastrobust.training.mmr import MMR, MMRat, linear_region_distances, mmr_hinge
from method_helpers import EPS, blobs, by_hand, clipped, drawn, follow, moved, same, slope, split

NORMS = {math.inf: 1.0, 2.0: 2.0, 1.0: math.inf}


def net(batch_norm: bool = False, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = [nn.BatchNorm2d(3)] if batch_norm else []
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), *norm, nn.ReLU()),
        nn.Flatten(),
        nn.Linear(12, 5),
        nn.ReLU(),
        nn.Linear(5, 3),
    ).double()


def before_relus(model: nn.Module, x: Tensor) -> Tensor:
    """(N,) pre-activations of one image, layer by layer, and the logits behind them."""
    found: list[Tensor] = []
    leaves = [m for m in model.modules() if not list(m.children())]
    z = x[None]
    for layer in leaves:
        if isinstance(layer, nn.ReLU):
            found.append(z.flatten())
        z = layer(z)
    return torch.cat([*found, z.flatten()])


def distances_of(
    model: nn.Module, x: Tensor, y: int, q: float, create: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """One image: the hyperplanes one by one, their normals by torch's Jacobian."""
    jacobian = torch.autograd.functional.jacobian(lambda v: before_relus(model, v), x, create_graph=create).flatten(1)
    values, classes = before_relus(model, x), 3
    region = [z.abs() / row.norm(q) for z, row in zip(values[:-classes], jacobian[:-classes], strict=True)]
    logits, rows = values[-classes:], jacobian[-classes:]
    decision = [(logits[y] - logits[s]) / (rows[y] - rows[s]).norm(q) for s in range(classes) if s != y]
    return region, decision


@pytest.mark.parametrize("p", NORMS)
def test_distances_are_those_of_the_hyperplanes(p: float) -> None:
    model, (x, y) = net(), blobs(4)
    found = linear_region_distances(model, x, y, p)
    assert found.region.shape == (4, 17) and found.decision.shape == (4, 2)
    for k in range(4):
        region, decision = distances_of(model, x[k], int(y[k]), NORMS[p])
        torch.testing.assert_close(found.region[k], torch.stack(region))
        torch.testing.assert_close(found.decision[k], torch.stack(decision))


@pytest.mark.parametrize("p", NORMS)
def test_the_nearest_boundary_is_where_the_pattern_changes(p: float) -> None:
    model, (x, y) = net(seed=3), blobs(3)
    least = linear_region_distances(model, x, y, p).region.min(1)
    generator = torch.Generator().manual_seed(0)
    for k in range(3):
        pattern = lambda v: before_relus(model, v)[:-3] > 0
        for _ in range(50):
            step = torch.randn(x[k].shape, generator=generator, dtype=torch.float64)
            inside = x[k] + 0.999 * least.values[k] * step / step.flatten().norm(p)
            assert torch.equal(pattern(inside), pattern(x[k]))
        row = torch.autograd.functional.jacobian(lambda v: before_relus(model, v), x[k])[least.indices[k]]
        # the unit vector of norm p along which the unit changes fastest
        way = row.sign() if p == math.inf else row if p == 2 else row * (row.abs() == row.abs().max())
        way = -way / way.flatten().norm(p) * before_relus(model, x[k])[least.indices[k]].sign()
        beyond = pattern(x[k] + 1.001 * least.values[k] * way)
        assert (beyond != pattern(x[k])).nonzero().flatten().tolist() == [int(least.indices[k])]


def test_what_has_no_hyperplane_is_infinitely_far() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].bias.fill_(-10.0)  # both are off, so that what follows is constant
        model[1].weight.fill_(1.0)
        model[3].bias.fill_(0.5)
    for p, apart in ((math.inf, 2.0), (2.0, 4.0), (1.0, 8.0)):
        region, decision = linear_region_distances(model, torch.full((1, 1, 2, 2), 0.5), torch.tensor([1]), p)
        assert region.tolist() == [[apart, apart, math.inf, math.inf]] and decision.tolist() == [[math.inf]]
        total = mmr_hinge(region, 9.0, 4) + mmr_hinge(decision, 9.0, 1)
        grads = torch.autograd.grad(total.sum(), [model[1].weight, model[3].weight], allow_unused=True)
        assert all(g is None or bool(g.isfinite().all()) for g in grads) and bool(grads[0].any())


def test_hinge_counts_the_nearest() -> None:
    d = torch.tensor([[0.3, 0.1, 2.0], [-0.2, 0.5, 0.2]])
    assert mmr_hinge(d, 0.4, 2).tolist() == pytest.approx([(0.25 + 0.75) / 2, (1.5 + 0.5) / 2])
    assert mmr_hinge(d, 0.4, 9).tolist() == pytest.approx([1.0 / 3, 2.0 / 3])
    assert mmr_hinge(d[:, :0], 0.4, 2).tolist() == [0, 0]


def regulariser(model: nn.Module, x: Tensor, y: Tensor, batch: Batch, p: float) -> Tensor:
    """The regulariser of the batch as printed, weights included: weight 2, gamma_B .4, gamma_D .3, k_D = 1."""
    k_b = int(8 + (2 - 8) * (batch.epoch + 1) / 4)  # of 17 units, .5 to .15
    total = x.new_zeros(())
    for image, label in zip(x, y, strict=True):
        region, decision = distances_of(model, image, int(label), NORMS[p], create=True)
        near = sorted(region, key=Tensor.item)[:k_b]
        total = total + sum((1 - d / 0.4).clamp(min=0) for d in near) / k_b
        total = total + (1 - min(decision, key=Tensor.item) / 0.3).clamp(min=0)
    return 2 * min((batch.epoch + 1) / 2, 1) * total / len(x)


OPTIONS = {"weight": 2.0, "gamma": 0.4, "gamma_decision": 0.3, "nearest": (0.5, 0.15), "count": 1, "warm_up": 0.5}


@pytest.mark.parametrize("p", NORMS)
def test_mmr_is_algorithm(p: float) -> None:
    model, batches = net(), split(*blobs(6), 3, epochs=4)

    def body(model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        (F.cross_entropy(model(x), y) + regulariser(model, x, y, batch, p)).backward()

    got = follow(MMR(EPS, norm=p, **OPTIONS), model, batches, lr=0.01)  # type: ignore[arg-type]
    same(got, by_hand(body, model, batches, lr=0.01))
    assert moved(got, model)


def test_mmr_at_attacks_half_of_the_batch() -> None:
    model, batches = net(), split(*blobs(8), 4, epochs=4)

    def body(model: nn.Module, x: Tensor, y: Tensor, batch: Batch) -> None:
        adv = drawn(x[:2], EPS)
        for _ in range(3):
            adv = clipped(adv + 2 * EPS / 3 * slope(model, adv, y[:2]).sign(), x[:2], EPS)
        points = torch.cat([adv, x[2:]])
        (F.cross_entropy(model(points), y) + regulariser(model, points, y, batch, math.inf)).backward()

    got = follow(MMRat(EPS, attack_steps=3, **OPTIONS), model, batches, lr=0.01)  # type: ignore[arg-type]
    same(got, by_hand(body, model, batches, lr=0.01))


def test_batch_norm_is_that_of_the_batch() -> None:
    model, (x, y) = net(batch_norm=True), blobs(6)
    method = MMR(EPS, weight=1.0, gamma=0.5, nearest=(1.0, 1.0), warm_up=0.0)
    model.train()
    found = method.loss(model, Batch(x, y), x)
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == 1 and norm.training
    # the same with the statistics written into the layer
    seen = model[0][0](x)  # type: ignore[index,operator]
    norm.running_mean, norm.running_var = seen.mean((0, 2, 3)).detach(), seen.var((0, 2, 3), unbiased=False).detach()
    region, decision = linear_region_distances(model.eval(), x, y)
    expected = mmr_hinge(region, 0.5, 99).mean() + mmr_hinge(decision, 0.5, 99).mean()
    torch.testing.assert_close(found.value.detach() - F.cross_entropy(found.logits, y), expected, atol=1e-8, rtol=1e-6)


def test_training_moves_the_boundaries_away() -> None:
    torch.manual_seed(0)
    x, y = blobs(30)
    x = x.float()
    ends: dict[str, float] = {}
    for name in ("plain", "mmr", "mmr+at"):
        torch.manual_seed(2)
        model = net().float()
        options = {"eps": 0.05, "weight": 1.0, "attack_steps": 3, "subsample": 8} if name != "plain" else {}
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        batches = training.loader(x, y, 10)
        training.train(model, batches, training.make(name, **options), epochs=25, optimizer=optimizer)
        with torch.no_grad():
            ends[name] = float(linear_region_distances(model, x, y).region.min(1).values.mean())
    assert min(ends["mmr"], ends["mmr+at"]) > 2 * ends["plain"]


def test_bad_input_is_named() -> None:
    x, y = torch.rand(2, 1, 4, 4), torch.zeros(2, dtype=torch.int64)
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: got a layer MaxPool2d"):
        linear_region_distances(pooled, x, y)
    with pytest.raises(ValueError, match="batch normalisation on batch statistics"):
        linear_region_distances(nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2)), x, y)
    with pytest.raises(ValueError, match=r"output of shape \(2, 1, 4\)"):
        linear_region_distances(nn.Sequential(nn.Flatten(2), nn.Linear(16, 4)), x, y)
    for options, named in (
        ({"gamma": 0.0}, "gamma: got 0"),
        ({"nearest": (0.1, 2.0)}, "nearest: got"),
        ({"warm_up": 2.0}, "warm_up: got 2.0"),
        ({"count": 0}, "count: got 0"),
        ({"eps": 0.0}, "gamma: got 0"),
        ({"weight": -1}, "weight: got -1"),
    ):
        with pytest.raises(ValueError, match=named):
            MMR(**options)  # type: ignore[arg-type]
