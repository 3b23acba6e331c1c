"""Projected training and the networks of Gao et al. (2019)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrobust as fr
from fastrobust.training import projected, registry
from fastrobust.training.method import Batch
from method_helpers import follow, same


def sphere(count: int = 8, features: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, features, generator=generator, dtype=torch.float64)
    return x / x.norm(dim=1, keepdim=True), torch.arange(count) % 2


def test_two_layer_net_is_eq_4() -> None:
    net = projected.TwoLayerNTK(5, 6, "tanh", seed=3).double()
    x, _ = sphere(4)
    # to rounding: the matrix library need not add what cancels side by side
    torch.testing.assert_close(net(x), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-15)
    w, a = net.weight.detach(), net.ends
    assert torch.equal(w[:3], w[3:]) and torch.equal(a[:3], -a[3:]) and set(a.abs().tolist()) == {1.0}
    with torch.no_grad():
        net.weight += torch.randn_like(net.weight)
    for i in range(4):
        want = sum(a[r] * torch.tanh(net.weight[r] @ x[i]) for r in range(6)) / math.sqrt(6)
        assert float(net(x)[i].detach()) == pytest.approx(float(want.detach()))
    assert [n for n, p in net.named_parameters()] == ["weight"]
    assert projected.TwoLayerNTK(400, 1000, seed=0).weight.std().item() == pytest.approx(1, rel=0.01)


def test_deep_net_is_eq_1() -> None:
    net = projected.DeepNTK(5, 7, 2, seed=3).double()
    x, _ = sphere(3)
    h = net.first @ x.T
    for w in net.layers:
        h = (w @ h).clamp_min(0)
    torch.testing.assert_close(net(x), net.ends @ h)
    wide = projected.DeepNTK(50, 400, 1, seed=0)
    assert wide.first.std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert wide.layers[0].std().item() == pytest.approx(math.sqrt(2 / 400), rel=0.02)
    assert wide.ends.std().item() == pytest.approx(1, rel=0.1) and len(list(wide.parameters())) == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_training_is_projected_gradient_descent(depth: int) -> None:
    """V = W - rate grad, then each layer back to its ball; the attack by hand, its output a constant."""
    net, (x, y) = projected.DeepNTK(5, 6, depth, seed=1).double(), sphere()
    radius, delta, rate, target = 0.3, 0.2, 0.5, y * 2.0 - 1
    method = projected.Projected(radius, delta=delta, steps=3)
    batches = [Batch(x, y, None, t, 5) for t in range(5)]
    got = follow(method, net, batches, lr=rate)

    torch.manual_seed(7)
    hand, start, losses, shortened = copy.deepcopy(net), [w.detach().clone() for w in net.layers], [], 0
    eps = delta * math.sqrt(1 - delta**2 / 4)
    for _ in range(5):
        seed = int(torch.randint(0, 2**62, ()))
        adv = fr.ops.random_start(x, eps, 2, None, seed)
        for _k in range(3):
            leaf = adv.clone().requires_grad_()
            value = F.smooth_l1_loss(hand(leaf), target.double(), reduction="sum")
            (grad,) = torch.autograd.grad(value, leaf)
            adv = adv + 2.5 * eps / 3 * grad / grad.norm(dim=1, keepdim=True)
            away = adv - x
            adv = x + away * (eps / away.norm(dim=1, keepdim=True)).clamp_max(1)
        adv = adv / adv.norm(dim=1, keepdim=True)
        value = F.smooth_l1_loss(hand(adv), target.double())
        losses.append(float(value.detach()))
        grads = torch.autograd.grad(value, list(hand.layers))
        with torch.no_grad():
            for w, w0, g in zip(hand.layers, start, grads, strict=True):
                moved = w - rate * g - w0
                shortened += float(moved.norm()) > radius / math.sqrt(6)
                w.copy_(w0 + moved * min(1.0, radius / math.sqrt(6) / float(moved.norm())))
    same(got, hand, 1e-5)  # a step of the kernels stops 2^-21 short of the sphere
    assert shortened >= depth
    assert method.least == pytest.approx(min(losses), rel=1e-5)
    assert method.distance(got) == pytest.approx(1.0, rel=1e-9)


def test_attacked_points_are_on_the_sphere_within_delta() -> None:
    net, (x, y) = projected.TwoLayerNTK(5, 8, seed=2).double(), sphere(32)
    with torch.no_grad():
        net.weight += torch.randn_like(net.weight)
    for delta in (0.1, 0.7, 1.4):
        method = projected.Projected(delta=delta, steps=20, step_size=delta)
        adv = method.perturb(net, Batch(x * 3, y))
        torch.testing.assert_close(adv.norm(dim=1), torch.ones(32, dtype=torch.float64))
        chords = (adv - x).norm(dim=1)
        assert float(chords.max()) <= delta * (1 + 1e-12) and float(chords.max()) > 0.6 * delta
    plain = projected.Projected(steps=0).perturb(net, Batch(x * 3, y))
    torch.testing.assert_close(plain, x)


def test_joint_ball_and_no_projection() -> None:
    net, (x, y) = projected.DeepNTK(5, 6, 3, seed=1).double(), sphere()
    batches = [Batch(x, y, None, t, 6) for t in range(6)]
    method = projected.Projected(0.5, joint=True, steps=0)
    got = follow(method, net, batches, lr=1.0)
    moved = [a.detach() - b.detach() for a, b in zip(got.layers, net.layers, strict=True)]
    assert float(torch.stack([m.norm() for m in moved]).norm()) == pytest.approx(0.5, rel=1e-12)
    free = projected.Projected(0.5, joint=True, project=False, steps=0)
    other = follow(free, net, batches, lr=1.0)
    assert free.distance(other) > 1  # measured all the same
    state = projected.Projected(0.5, joint=True, steps=0)
    state.load_state_dict(method.state_dict())
    assert state.distance(got) == method.distance(got) and state.least == method.least


def test_kernel_is_the_expectation_and_the_limit_of_gradients() -> None:
    x, _ = sphere(4, 3)
    x = x * torch.tensor([[1.0], [0.5], [2.0], [1.5]])
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(400_000, 3, generator=generator, dtype=torch.float64)
    for name, (_, derivative) in projected.ACTIVATIONS.items():
        slopes = derivative(x @ w.T)
        want = (x @ x.T) * (slopes @ slopes.T) / len(w)
        torch.testing.assert_close(projected.ntk(x, x, name), want, rtol=0.02, atol=0.01)
    net = projected.TwoLayerNTK(3, 60_000, "softplus", seed=1).double()
    rows = [torch.autograd.grad(net(one[None])[0], net.weight)[0].flatten() for one in x]
    torch.testing.assert_close(torch.stack(rows) @ torch.stack(rows).T, projected.ntk(x, x), rtol=0.03, atol=0.01)


def test_closed_forms_agree_with_quadrature() -> None:
    x, y = sphere(6, 4)[0], sphere(5, 4, seed=3)[0]
    smooth = projected.ACTIVATIONS["quadratic-relu"]
    projected.ACTIVATIONS["by-points"] = smooth
    try:
        by_points = projected.ntk(x, y, "by-points", nodes=200)
    finally:
        del projected.ACTIVATIONS["by-points"]
    torch.testing.assert_close(by_points, projected.ntk(x, y, "quadratic-relu"), rtol=1e-3, atol=1e-3)


def test_gap_to_the_linear_model_is_what_it_says_and_falls_with_the_width() -> None:
    x, _ = sphere(6)
    gaps = []
    for width in (50, 800):
        net = projected.TwoLayerNTK(5, width, seed=4).double()
        start = {n: p.detach().clone() for n, p in net.named_parameters()}
        torch.manual_seed(1)
        step = torch.randn_like(net.weight)
        with torch.no_grad():
            net.weight += step / step.norm() * 3
        found = projected.linearisation_gap(net, start, x)
        at_start = projected.TwoLayerNTK(5, width, seed=4).double()
        moved = net.weight.detach() - start["weight"]
        for i in range(6):
            (grad,) = torch.autograd.grad(at_start(x[i : i + 1])[0], at_start.weight)
            want = net(x[i : i + 1])[0] - at_start(x[i : i + 1])[0] - (grad * moved).sum()
            assert float(found[i]) == pytest.approx(abs(float(want.detach())), rel=1e-9, abs=1e-14)
        gaps.append(float(found.max()))
    assert gaps[1] < gaps[0] / 2
    with pytest.raises(ValueError, match="start: got"):
        projected.linearisation_gap(net, {}, x)


def test_kernel_fits_whole_balls() -> None:
    x, y = sphere(6, 4)
    target = y * 2.0 - 1
    plain = projected.RobustKernelFit(x, target.double(), 0.15, rounds=0)
    robust = projected.RobustKernelFit(x, target.double(), 0.15, rounds=4)
    torch.testing.assert_close(plain(x), target.double(), rtol=0, atol=1e-2)
    assert robust.worst < 0.5 * plain.worst and robust.norm > plain.norm
    # the norm is that of the function: ||f||^2 = sum c_i c_j K(z_i, z_j) = sum c_i f(z_i)
    values = robust(robust.points) @ robust.coefficients
    assert robust.norm == pytest.approx(math.sqrt(float(values)), rel=1e-6)


def test_wide_nets_reach_a_small_surrogate_loss_near_their_start() -> None:
    x, y = sphere(8, 6)
    method = registry.METHODS["projected"](20.0, delta=0.1, steps=4, joint=True)
    assert isinstance(method, projected.Projected)
    net = projected.TwoLayerNTK(6, 256, "tanh", seed=0).double()
    got = follow(method, net, [Batch(x, y, None, t, 100) for t in range(100)], lr=4.0)
    assert method.least < 0.02 and method.distance(got) < 1
    assert "least" not in method.settings() and method.settings()["surrogate"] == "huber"


def test_bad_arguments() -> None:
    for make, words in (
        (lambda: projected.TwoLayerNTK(3, 5), "width: got 5, expected an even number"),
        (lambda: projected.TwoLayerNTK(3, 4, "sine"), "activation: got 'sine'"),
        (lambda: projected.Projected(-1.0), "radius: got -1"),
        (lambda: projected.Projected(loss="square"), "loss: got 'square', expected one of huber, logistic"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
