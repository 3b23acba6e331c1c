"""Gao et al. in small: kernel against draws, caps against their definition, training against a loop, shattering by
hand."""

import itertools
import math

import numpy as np
import pytest
import torch

from fastrobust.analysis import overparametrized as O


def corners(d=4):
    eye = torch.eye(d, dtype=torch.float64)
    return torch.cat([eye, -eye]), torch.where(torch.arange(2 * d) % d < d // 2, 1.0, -1.0).double()


def test_caps():
    draw = torch.Generator().manual_seed(0)
    x = O.on_sphere(torch.randn(50, 3, generator=draw))
    assert x.shape == (50, 4) and torch.allclose(x.norm(dim=1), torch.ones(50).double())
    points = x + 0.5 * torch.randn(50, 4, generator=draw)
    inside = O.cap(points, x, 0.3)
    assert torch.allclose(inside.norm(dim=1), torch.ones(50).double())
    assert (inside - x).norm(dim=1).max() <= 0.3 + 1e-12 and (inside - x).norm(dim=1).max() > 0.299
    unit = points / points.norm(dim=1, keepdim=True)
    near = (unit - x).norm(dim=1) <= 0.3
    assert near.any() and torch.allclose(inside[near], unit[near])
    for _ in range(200):  # no nearer point of the cap
        other = O.cap(x + 0.4 * torch.randn(50, 4, generator=draw), x, 0.3)
        assert ((inside - unit).norm(dim=1) <= (other - unit).norm(dim=1) + 1e-12).all()


def test_attack_finds_the_worst_of_a_linear_model_and_stays_in_the_cap():
    x, y = corners()
    w = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    model = torch.nn.Linear(4, 1, bias=False).double()
    model.weight.data[0] = w
    flat = torch.nn.Sequential(model, torch.nn.Flatten(0))
    found = O.attack(0.4, steps=30, restarts=2)(flat, x, y)
    assert (found - x).norm(dim=1).max() <= 0.4 + 1e-9
    angle = math.acos(1 - 0.08)  # the worst point of a cap lies on its edge, towards -y w
    for i in range(8):
        side = -y[i] * w + y[i] * (w @ x[i]) * x[i]
        worst = math.cos(angle) * x[i] + math.sin(angle) * side / side.norm()
        assert float(y[i] * (w @ found[i])) == pytest.approx(float(y[i] * (w @ worst)), abs=0.02)
    assert torch.equal(O.attack(0.4, steps=0)(flat, x, y), x)


def test_networks_and_kernel():
    x, _ = corners()
    net = O.Paired(4, 20, seed=1)
    assert net(x).abs().max() < 1e-12  # f = 0 at the start
    z = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(O.smooth_relu(z).sum(), z)
    assert torch.allclose(slope, torch.special.ndtr(z.detach()))
    deep = O.Deep(4, 6, 2)
    a, w1, w2, last = (
        dict([*deep.named_parameters(), *deep.named_buffers()])[n] for n in ("first", "layers.0", "layers.1", "last")
    )
    by_hand = [float((last @ (w2 @ (w1 @ (a @ row)).relu()).relu()).detach()) for row in x]
    assert deep(x).tolist() == pytest.approx(by_hand)
    points = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    w = torch.randn(300_000, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = torch.special.ndtr(w @ torch.cat([x, points]).T)
    drawn = (s[:, :8].T @ s[:, 8:]) / len(w) * (x @ points.T)
    assert (O.tangent_kernel(x, points) - drawn).abs().max() < 5e-3
    with pytest.raises(ValueError, match="width: got 3"):
        O.Paired(4, 3)


def test_descent_is_that_of_a_loop_and_keeps_within_the_radius():
    x, y = corners()
    net, attack = O.Deep(4, 12, 2, seed=5), O.attack(0.2, steps=2)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    found = O.descend(net, x, y, attack, lr=0.3, steps=6, radius=0.4)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    weights = [p.detach().clone() for p in net.parameters()]
    start, losses = [w.clone() for w in weights], []
    for _ in range(6):
        model = O.Deep(4, 12, 2, seed=5)
        for p, w in zip(model.parameters(), weights, strict=True):
            p.data.copy_(w)
        adv = attack(model, x, y)
        value = torch.log1p(torch.exp(-y * model(adv))).mean()
        value.backward()
        losses.append(value.item())
        for i, p in enumerate(model.parameters()):
            moved = weights[i] - 0.3 * p.grad - start[i]
            if moved.norm() > 0.4 / math.sqrt(12):
                moved = moved * (0.4 / math.sqrt(12) / moved.norm())
            weights[i] = start[i] + moved
    assert found.losses.tolist() == pytest.approx(losses)
    assert 0.39 < found.distance <= 0.4 + 1e-9


def test_wider_networks_reach_the_loss_and_are_nearer_to_their_linearisation():
    x, y = corners()
    narrow, wide = (O.theorem_5_1(x, y, m, reach=0.2, steps=25, step=25.0, radius=30.0) for m in (16, 128))
    assert wide[1].margin > 0 and wide[0].losses.min() < 0.1
    gaps = [O.linearisation_gap(O.Paired(4, m), f[0].model, x) for m, f in ((16, narrow), (128, wide))]
    assert gaps[1] < 0.3 * gaps[0]
    first = O.Paired(4, 16)  # and the linearisation by autograd
    slopes = [torch.autograd.grad(first(row[None]).sum(), first.w)[0] for row in x]
    with torch.no_grad():
        line = torch.stack([(s * (narrow[0].model.w - first.w)).sum() for s in slopes])
        assert gaps[0] == pytest.approx(float((narrow[0].model(x) - line).abs().max()))
    _, sides = O.theorem_4_1(x, y, 64, reach=0.2, steps=50, step=12.0)
    assert sides.margin > 0


def test_a_robust_network_exists_near_the_start():
    x, y = corners()
    fit = O.robust_fit(x, y, 0.2, target=4.0, tolerance=1.0)
    draw = torch.Generator().manual_seed(1)
    for _ in range(100):
        inside = O.cap(x + 0.3 * torch.randn(8, 4, generator=draw, dtype=torch.float64), x, 0.2)
        assert ((fit(inside) - 4 * y).abs() <= 1.0).all()
    assert O.theorem_5_2(x, y, 16, reach=0.2)[1].margin < 0
    net, sides = O.theorem_5_2(x, y, 512, reach=0.2)
    assert sides.margin > 0 and float((net.w - O.Paired(4, 512).w).norm()) == pytest.approx(sides.left[1])
    assert sides.left[1] == pytest.approx(fit.radius, rel=0.1)
    with pytest.raises(ValueError, match="target: got 1"):
        O.theorem_5_2(x, y, 16, target=1.0)
    with pytest.raises(ValueError, match="reach: got 1.5"):
        O.robust_fit(x, y, 1.5, rounds=2)


def test_theorem_6_1_shatters():
    points, sides = O.theorem_6_1(4, 3, reach=0.7)
    assert len(points) == 6 and sides.margin > 0
    assert O.theorem_6_1(5, 8)[1].margin > 0 and len(O.theorem_6_1(5, 8)[0]) == 16
    # every labelling of a place by two balls, found here by moving their centres instead of by the formula
    place = points[:3].numpy()
    for labels in itertools.product((1.0, -1.0), repeat=3):
        normal = np.array(labels) / math.sqrt(3)
        ahead = 0.7 * (1 + 1e-4)
        for sign in (1.0, -1.0):
            held = place[np.array(labels) == sign]
            assert (np.linalg.norm(held - sign * ahead * normal, axis=1) <= 0.7).all()
    with pytest.raises(ValueError, match="inputs"):
        O.theorem_6_1(4, 1)
