"""Trajectories on the sphere against brute force on circles, dense derivatives and a plain loop."""

import torch

from fastrobust.analysis import trajectory as t


def _loss(net, y=1.5):
    return lambda points: (y - net(points)) ** 2


def test_optimality_against_naive_loop():
    net = t.TwoLayer(5, 40)
    draw = torch.Generator().manual_seed(1)
    x, delta = torch.randn(2, 3, 5, generator=draw, dtype=torch.float64)
    found = t.optimality(_loss(net), x, delta)
    for i in range(3):
        f = lambda p: (1.5 - torch.nn.functional.softplus(net.w @ p) @ net.a) ** 2
        g = torch.autograd.functional.jacobian(f, x[i] + delta[i])
        h = torch.autograd.functional.hessian(f, x[i] + delta[i])
        square = delta[i] @ delta[i]
        torch.testing.assert_close(found.multiplier[i], g @ delta[i] / (2 * square))
        torch.testing.assert_close(found.tangent[i], g - (g @ delta[i]) / square * delta[i])
        # Xi between two projections, whose spectrum is that on the tangent space and a zero
        values = torch.linalg.eigvalsh(
            (torch.eye(5).double() - torch.outer(delta[i], delta[i]) / square)
            @ (h - (g @ delta[i]) / square * torch.eye(5).double())
            @ (torch.eye(5).double() - torch.outer(delta[i], delta[i]) / square)
        )
        drop = values.abs().argmin()  # the normal direction, which the projection sends to 0
        kept = torch.cat([values[:drop], values[drop + 1 :]])
        torch.testing.assert_close(found.curvature[i], kept, rtol=1e-8, atol=1e-10)
    assert all(p.grad is None for p in net.parameters())


def test_search_finds_the_circles_extremes():
    net, x = t.TwoLayer(2, 200, seed=3), torch.tensor([[0.7, -0.4]], dtype=torch.float64)
    random = torch.get_rng_state()
    _, values, _ = t.circle(_loss(net), x[0], 3.0, points=20000)
    for lowest, want in ((False, values.max()), (True, values.min())):
        delta = t.search(_loss(net), x, 3.0, lowest=lowest)
        torch.testing.assert_close(delta.norm(), torch.tensor(3.0, dtype=torch.float64))
        torch.testing.assert_close(_loss(net)(x + delta)[0], want, rtol=1e-6, atol=1e-6)
    assert torch.equal(random, torch.get_rng_state())


def test_ascend_equals_a_loop():
    net, x = t.TwoLayer(4, 30), torch.full((2, 4), 0.3, dtype=torch.float64)
    start = torch.full((2, 4), 0.05, dtype=torch.float64)
    path = t.ascend(_loss(net), x, start, 0.5, 0.8, 6)
    for i in range(2):
        delta = start[i]
        for step in range(7):
            torch.testing.assert_close(path.deltas[step, i], delta)
            g = torch.autograd.functional.jacobian(lambda p: _loss(net)(p[None])[0], x[i] + delta)
            delta = delta + 0.8 * g
            delta = delta * min(1.0, 0.5 / float(delta.norm()))
    assert float(path.deltas[-1].norm(dim=1).max()) <= 0.5 * (1 + 1e-12)


def test_trajectories_end_in_maxima():
    net = t.TwoLayer(6, 400, seed=1)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = t.study(_loss(net, 3.0), x, [0.01], [0.1, 10.0], steps=300)
    assert found.passed.all() and (found.half < 200).all()
    assert (found.losses[:, :, -1] > found.losses[:, :, 0]).all()
    # a point half-way is none
    assert not t.optimality(_loss(net, 3.0), x, torch.roll(x, 1, 1)).maximum().any()
