"""Hessian eigenpairs against a dense eigensolver; the model is left as it was."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fastrobust.analysis import connectivity, landscape
from fastrobust.analysis.landscape import hessian_eigenpairs


def _case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3)).double()
    return net, torch.rand(20, 5, dtype=torch.float64), torch.randint(0, 3, (20,))


def test_against_dense():
    net, x, y = _case()
    net.eval()
    shapes = [(n, p.shape, p.numel()) for n, p in net.named_parameters()]

    def loss(flat):
        parts = flat.split([s[2] for s in shapes])
        named = {n: v.view(s) for (n, s, _), v in zip(shapes, parts, strict=True)}
        return nn.functional.cross_entropy(functional_call(net, named, (x,)), y)

    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    want = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat)).flip(0)[:3]
    found = hessian_eigenpairs(net, x, y, k=3, steps=60)
    torch.testing.assert_close(found.values, want, rtol=1e-4, atol=1e-6)
    assert found.residuals.max() < 1e-4


@pytest.mark.parametrize("fails", [False, True])
def test_leaves_the_model(fails):
    net, x, y = _case()
    net.train()
    net[3].eval()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError):
            hessian_eigenpairs(net, x[:, :4], y)
    else:
        hessian_eigenpairs(net, x, y, steps=3)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert net.training and net[1].training and not net[3].training
    assert all(p.grad is None for p in net.parameters()) and torch.equal(random, torch.get_rng_state())


def _step(model, x, y):
    """One FGSM step, written out."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), x)
    return (x + 0.1 * g.sign()).detach()


def _images():
    torch.manual_seed(1)
    nets = [
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)).double()
        for _ in range(2)
    ]
    return *nets, torch.rand(24, 1, 4, 4, dtype=torch.float64), torch.randint(0, 3, (24,))


def _state(net):
    return {n: v.clone() for n, v in net.state_dict().items()}


def _unchanged(net, before, random):
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert net.training and net[1].training and all(p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_gradient_norms_and_surface_against_loops():
    net, _, x, y = _images()
    before, random = _state(net), torch.get_rng_state()
    batches = [(x[:10], y[:10]), (x[10:], y[10:])]
    norms = landscape.gradient_norms(net, batches, _step)
    directions = torch.randn(2, landscape.flat(net).numel(), generator=torch.Generator().manual_seed(0)).double()
    plane = landscape.surface(net, x, y, _step, directions, (-0.1, 0.0, 0.2))
    line = landscape.surface(net, x, y, _step, directions[:1], (-0.1, 0.0, 0.2))
    cosines = landscape.perturbation_cosines(net, x, y, _step, directions[0], (0.0, 0.3), runs=2)
    _unchanged(net, before, random)

    twin = copy.deepcopy(net).eval()
    for (a, b), want in zip(batches, norms, strict=True):
        twin.zero_grad()
        nn.functional.cross_entropy(twin(_step(twin, a, b)), b).backward()
        torch.testing.assert_close(sum((p.grad**2).sum() for p in twin.parameters()).sqrt(), want)

    def moved(step):
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(net.parameters()) + step, twin.parameters())
        return _step(twin, x, y)

    loss = lambda step: nn.functional.cross_entropy(twin(moved(step)), y)
    torch.testing.assert_close(plane[0, 2], loss(-0.1 * directions[0] + 0.2 * directions[1]).detach())
    torch.testing.assert_close(line[2], loss(0.2 * directions[0]).detach())
    torch.testing.assert_close(line, plane[:, 1])
    torch.testing.assert_close(cosines[0], torch.ones_like(cosines[0]))
    one, two = (moved(s * directions[0]) - x for s in (0.3, -0.3))
    want = torch.stack([(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(one, two, strict=True)]).mean()
    torch.testing.assert_close(cosines[1], want)


def test_curve_ends_are_the_networks():
    first, last, x, y = _images()
    before, random = (_state(first), _state(last)), torch.get_rng_state()
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    curve = connectivity.connect(first, last, batches, _step, order=3, epochs=8, lr=0.02)
    straight = connectivity.connect(first, last, batches, _step, order=3, epochs=0)
    t = (0.0, 0.3, 0.5, 0.7, 1.0)
    found = [connectivity.along(first, c, t, x, y, _step, batches) for c in (curve, straight)]
    for net, state in zip((first, last), before, strict=True):
        _unchanged(net, state, random)
    assert torch.equal(curve.at(0.0), landscape.flat(first)) and torch.equal(curve.at(1.0), landscape.flat(last))
    p = curve.points
    torch.testing.assert_close(curve.at(0.3), 0.343 * p[0] + 0.441 * p[1] + 0.189 * p[2] + 0.027 * p[3])
    torch.testing.assert_close(straight.at(0.3), 0.7 * p[0] + 0.3 * p[3])
    assert found[0].loss[1:4].mean() < found[1].loss[1:4].mean()  # training lowers it
    twin = copy.deepcopy(last).train()  # batch norm anew, by hand: cumulative means over the batches
    twin[1].reset_running_stats()
    twin[1].momentum = None
    for a, _ in batches:
        twin(a)
    logits = twin.eval()(_step(twin, x, y)).detach()
    assert found[0].loss[-1] == pytest.approx(float(nn.functional.cross_entropy(logits, y)), rel=1e-5)
    assert found[0].error[-1] == pytest.approx(float((logits.argmax(1) != y).double().mean()))


def test_left_alone_after_an_exception():
    net, last, x, y = _images()
    before, random = _state(net), torch.get_rng_state()
    line = torch.ones(1, landscape.flat(net).numel()).double()

    def fails(model, x, y):
        raise RuntimeError("no")

    for call in (
        lambda: landscape.gradient_norms(net, [(x, y)], fails),
        lambda: landscape.surface(net, x, y, fails, line, (0.1,)),
        lambda: landscape.perturbation_cosines(net, x, y, fails, line[0], (0.1,)),
        lambda: connectivity.connect(net, last, [(x, y)], fails),
    ):
        with pytest.raises(RuntimeError, match="no"):
            call()
        _unchanged(net, before, random)


def test_first_updates_are_those_of_a_loop():
    net, x, y = _case()
    batches = [(x[:12], y[:12]), (x[12:], y[12:])]
    attack = lambda m, a, b: a + 0.1 * torch.sign(m[0].weight.sum(0))
    found = landscape.first_updates(net, batches, attack, updates=3, lr=0.1, seed=2)
    other, start = copy.deepcopy(net), landscape.flat(net)
    torch.manual_seed(2)  # of dropout
    for i, (a, b) in enumerate([*batches, batches[0]]):
        adv = attack(other, a, b)
        other.train().zero_grad()
        logits = other(adv)
        nn.functional.cross_entropy(logits, b).backward()
        grads = torch.cat([p.grad.flatten() for p in other.parameters()])
        assert found.norms[i] == pytest.approx(float(grads.norm()))
        assert found.errors[i] == pytest.approx(float((logits.argmax(1) != b).double().mean()))
        with torch.no_grad():
            for p in other.parameters():
                p -= 0.1 * p.grad
        assert found.distances[i] == pytest.approx(float((landscape.flat(other) - start).norm()))
    with pytest.raises(ValueError, match="batches"):
        landscape.first_updates(net, [], attack)
