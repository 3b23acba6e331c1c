"""Bounds of regret and of gradients on a game: its gradients by autograd, its best answers by search, the runs by a
loop."""

import math

import numpy as np
import pytest
import torch

from fastrobust.analysis import convergence as C


def _value(game, theta, delta):
    s, b, c, u = (torch.as_tensor(v) for v in game[:4])
    pull = s * (delta @ (b @ theta + u))
    return game.convex / 2 * ((theta - c) ** 2).sum() + pull - game.concave / 2 * (delta**2).sum(1)


@pytest.mark.parametrize("concave", [0.0, 0.7])
def test_the_game(concave):
    game, random = C.game(5, concave=concave, seed=1), np.random.default_rng(2)
    theta, delta = random.standard_normal(4), random.uniform(-0.5, 0.5, (5, 3))
    leaves = [torch.tensor(v, requires_grad=True) for v in (theta, delta)]
    values = _value(game, *leaves)
    assert game.values(theta, delta) == pytest.approx(values.detach().numpy())
    in_theta = torch.stack([torch.autograd.grad(v, leaves[0], retain_graph=True)[0] for v in values])
    assert game.in_theta(theta, delta) == pytest.approx(in_theta.numpy())
    assert game.in_delta(theta, delta) == pytest.approx(torch.autograd.grad(values.sum(), leaves[1])[0].numpy())
    worst = game.values(theta, game.worst(theta))
    for _ in range(300):
        assert (game.values(theta, random.uniform(-0.5, 0.5, (5, 3))) <= worst + 1e-12).all()
    best = game.best(delta)
    assert np.abs(game.in_theta(best, delta).mean(axis=0)).max() < 1e-12
    known = C.constants(game)
    assert known.theta_distance >= np.linalg.norm(best) and (known.gradients > 0).all()


@pytest.mark.parametrize("rows", ["one", "all"])
@pytest.mark.parametrize("beta", [None, 0.5])
def test_regret_of_a_run_written_out(rows, beta):
    game, steps, n = C.game(4, concave=0.5, seed=3), 40, 4
    known = C.constants(game)
    rate = known.theta_distance / known.theta_gradient / math.sqrt(steps)
    total = math.sqrt((known.gradients**2).sum())
    eta = math.sqrt(n * 3) * 0.5 / (total * math.sqrt(steps))
    if beta is not None:
        eta = math.sqrt(3) * 0.5 * 0.5**0.25 / math.sqrt(steps)
    random = np.random.default_rng(7)
    theta, delta, v, top = np.zeros(4), np.zeros((4, 3)), np.zeros(4), np.zeros(4)
    thetas, deltas = [], []
    for _ in range(steps):
        k = int(random.integers(n))
        thetas.append(theta.copy())
        before, grad = delta.copy(), game.in_delta(theta, delta)
        for i in range(n) if rows == "all" else [k]:
            size = eta
            if beta is not None:
                v[i] = beta * v[i] + (1 - beta) * (grad[i] ** 2).sum()
                top[i] = max(top[i], v[i])
                size = eta / math.sqrt(top[i])
            delta[i] = np.clip(delta[i] + size * grad[i], -0.5, 0.5)
        deltas.append(before if rows == "one" else delta.copy())
        theta = theta - rate * game.in_theta(theta, delta)[k]
    found = (
        C.theorem_5_4(game, steps=steps, rows=rows, runs=1, seed=7)
        if beta is None
        else C.theorem_5_3(game, steps=steps, beta=beta, rows=rows, runs=1, seed=7)
    )

    def against(other):  # of the sums over the way, so that the largest over fixed answers is to be searched
        high = sum(game.values(t, other[0]).mean() for t in thetas)
        return high - sum(game.values(other[1], d).mean() for d in deltas)

    best = (game.worst(np.mean(thetas, axis=0)), game.best(np.mean(deltas, axis=0)))
    assert found.printed.left[0] == pytest.approx(against(best)) and found.derived.left[0] == found.printed.left[0]
    for _ in range(200):
        other = (random.uniform(-0.5, 0.5, (4, 3)), best[1] + 0.3 * random.standard_normal(4))
        assert against(other) <= found.printed.left[0] + 1e-9
    each = sum(
        game.values(t, game.worst(t)).mean() - game.values(game.best(d), d).mean()
        for t, d in zip(thetas, deltas, strict=True)
    )
    assert found.each_step == pytest.approx(each) and each >= found.printed.left[0] - 1e-9
    assert all(np.linalg.norm(t - game.centre) <= known.theta_distance + 1e-9 for t in thetas)


def test_bounds_hold_where_all_rows_move_and_fail_for_one_as_printed():
    game = C.game(100, concave=0.0, seed=0)
    for theorem in (C.theorem_5_3, C.theorem_5_4):
        every, one = (theorem(game, steps=400, rows=rows, runs=1) for rows in ("all", "one"))
        assert every.printed.margin > 0 and every.derived.margin > 0
        assert one.printed.margin < 0 < one.derived.margin
    known = C.constants(game)
    total = math.sqrt((known.gradients**2).sum())
    assert every.printed.right[0] == pytest.approx(
        known.theta_gradient * known.theta_distance * 20 + total * 0.5 * math.sqrt(3 * 400 / 100)
    )
    with pytest.raises(ValueError, match="rows: got 'two'"):
        C.theorem_5_3(game, rows="two")
    with pytest.raises(ValueError, match="beta: got 1"):
        C.theorem_5_3(game, beta=1.0)


def test_theorem_1_wang():
    game = C.game(12, seed=4)
    for delta in (0.05, 1e-4):
        known, sides = C.theorem_1_wang(game, delta, steps=150, batch=3)
        assert sides.margin > 0 and 0 < known["fosc"] <= delta
        wanted = 4 * known["sigma"] * math.sqrt(known["L"] * known["gap"] / 150) + 5 * known["L_tx"] ** 2 * delta
        assert sides.right[0] == pytest.approx(wanted)
    # the smoothness that the theorem gives: a Lipschitz constant of the gradient of max L
    random, outer = np.random.default_rng(5), lambda t: game.in_theta(t, game.worst(t)).mean(axis=0)
    for _ in range(50):
        a, b = random.standard_normal((2, 4))
        assert np.linalg.norm(outer(a) - outer(b)) <= known["L"] * np.linalg.norm(a - b)
    # without noise the printed bound would hold from the first step on, and does not
    assert C.theorem_1_wang(game, 0.0, steps=3, batch=12)[1].margin < 0
    with pytest.raises(ValueError, match="concave 0"):
        C.theorem_1_wang(C.game(3, concave=0.0), 0.1)
