"""FOSC of examples against a loop over them; groups against counting; the model is left as it was."""

import pytest
import torch
from torch import nn

from fastrobust import attacks
from fastrobust.analysis import fosc


def _case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 3))
    return net, torch.rand(30, 1, 3, 3), torch.randint(0, 3, (30,))


@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_against_a_loop(clip):
    net, x, y = _case()
    before, random = {n: v.clone() for n, v in net.state_dict().items()}, torch.get_rng_state()
    settings = [(1, 0.05), (8, 0.02)]
    found = fosc.by_attack(net, x, y, 0.1, settings, seed=4, clip=clip)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items()) and net.training
    assert all(p.grad is None for p in net.parameters()) and torch.equal(random, torch.get_rng_state())
    net.eval()
    for row, (steps, step) in enumerate(settings):
        adv = attacks.pgd(net, x, y, eps=0.1, steps=steps, step_size=step, seed=4, clip=clip)
        for i in range(30):
            point = adv[i : i + 1].clone().requires_grad_()
            loss = nn.functional.cross_entropy(net(point), y[i : i + 1])
            (g,) = torch.autograd.grad(loss, point)
            want = 0.1 * g.abs().sum() - ((point - x[i]) * g).sum()
            torch.testing.assert_close(found.fosc[row, i], want.detach(), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.loss[row, i], loss.detach())
            assert bool(found.fooled[row, i]) == (int(net(point).argmax()) != int(y[i]))
    assert found.fosc[1].mean() < found.fosc[0].mean()


def test_does_not_depend_on_batches():
    net, x, y = _case()
    for whole, parts in zip(
        fosc.measure(net, x, x, y, 0.1), fosc.measure(net, x, x, y, 0.1, batch_size=7), strict=True
    ):
        torch.testing.assert_close(whole, parts)


def test_groups():
    found = fosc.Measured(
        torch.tensor([0.0, 0.01, 0.5, 1.0, 2.0, 0.2]), torch.arange(6.0), torch.tensor([1, 0, 1, 1, 1, 0]).bool()
    )
    grouped = fosc.groups(found, (0.0, 0.1, 0.2, 0.5, 1.0))
    assert grouped.examples.tolist() == [2, 0, 1, 2]
    torch.testing.assert_close(grouped.success, torch.tensor([0.5, float("nan"), 0.0, 1.0]).double(), equal_nan=True)
    torch.testing.assert_close(grouped.loss, torch.tensor([0.5, float("nan"), 5.0, 2.5]).double(), equal_nan=True)


def test_left_alone_after_an_exception():
    net, x, y = _case()
    random = torch.get_rng_state()
    with pytest.raises(RuntimeError):
        fosc.measure(net, x[:, :, :2], x[:, :, :2], y, 0.1)
    assert net.training and net[2].training and all(p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())
