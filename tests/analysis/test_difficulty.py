import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastrobust as fr
from fastrobust.analysis import difficulty as D


def data(count=30):
    g = torch.Generator().manual_seed(3)
    return torch.rand(count, 1, 4, 4, generator=g), torch.arange(count) % 3


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def train(method, epochs=3, **options):
    x, y = data()
    model = net()
    torch.manual_seed(5)
    fr.training.train(model, fr.training.loader(x, y, 8), method, epochs=epochs, **options)
    return model


class Watch(fr.training.Method):
    """PGD whose examples and losses are kept line by line."""

    needs_index = True

    def __init__(self):
        self.inner, self.found = fr.training.make("pgd"), {}

    def step(self, model, batch, update):
        adv = self.inner.perturb(model, batch)
        model.train()
        logits = copy.deepcopy(model)(adv).detach()
        for row, i in enumerate(batch.index.tolist()):
            one = F.cross_entropy(logits[row : row + 1], batch.y[row : row + 1]).item()
            self.found[batch.epoch, i] = one, float(logits[row].argmax() != batch.y[row])
        loss = self.inner.loss(model, batch, adv)
        update(loss.value)
        return loss


def test_recorder_keeps_what_a_loop_sees_and_training_keeps_its_bits():
    recorder, watch = D.Recorder("pgd"), Watch()
    alone, recorded = train("pgd"), train(recorder)
    train(watch)
    for a, b in zip(alone.state_dict().values(), recorded.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert recorder.losses.shape == recorder.errors.shape == (3, 30)
    for (epoch, i), (loss, error) in watch.found.items():
        assert recorder.losses[epoch, i].item() == pytest.approx(loss, abs=1e-6)
        assert recorder.errors[epoch, i].item() == error
    assert recorder.eps == fr.training.make("pgd").eps and recorder.settings() == fr.training.make("pgd").settings()


def test_recorder_resumes(tmp_path):
    whole = D.Recorder("pgd")
    train(whole)

    class Stop(Exception):
        pass

    def stop(model, record):
        if record["epoch"] == 2:
            raise Stop

    with pytest.raises(Stop):
        train(D.Recorder("pgd"), checkpoint=tmp_path, callbacks=stop)
    again = D.Recorder("pgd")
    train(again, checkpoint=tmp_path, resume=True)
    assert torch.equal(again.losses, whole.losses) and torch.equal(again.errors, whole.errors)


def test_recorder_needs_a_known_number_of_examples():
    x, y = data()
    endless = ((x, y, torch.arange(30)) for _ in range(1))
    with pytest.raises(ValueError, match="loader: got one that does not tell"):
        fr.training.train(net(), endless, D.Recorder("plain"), epochs=1)


def test_difficulty_is_the_printed_probability():
    losses = np.random.default_rng(0).integers(0, 6, (3, 40)).astype(float)
    losses[0, 5] = np.nan
    mean = [sum(v for v in column if v == v) / sum(v == v for v in column) for column in losses.T]
    wanted = [sum((m < o) + 0.5 * (m == o) for o in mean) / 40 for m in mean]
    assert D.difficulty(losses) == pytest.approx(wanted, abs=1e-12)
    assert D.difficulty(torch.tensor(losses)) == pytest.approx(wanted, abs=1e-12)
    d = D.difficulty([3.0, 1.0, 2.0])
    assert d.argmin() == 0 and d.argmax() == 1
    with pytest.raises(ValueError, match="1 examples that were never seen"):
        D.difficulty([1.0, np.nan])


def test_d_distance_of_equal_reversed_and_independent_orders():
    random = np.random.default_rng(1)
    n = 20000
    a, b = D.difficulty(random.random(n)), D.difficulty(random.random(n))
    assert D.d_distance(a, a) == 0
    assert D.d_distance(a, 1 - a) == pytest.approx(0.5, abs=1e-6)
    assert D.d_distance(a, b) == pytest.approx(1 / 3, abs=5 * (1 / 18 / n) ** 0.5)
    with pytest.raises(ValueError, match="second: got shape"):
        D.d_distance(a, b[1:])


def test_groups_and_their_means():
    d = np.array([0.0, 0.1, 0.19, 0.5, 0.95, 1.0])
    assert D.groups(d).tolist() == [0, 1, 1, 5, 9, 9]
    table = np.arange(12.0).reshape(2, 6)
    table[1, 1] = np.nan
    means = D.group_means(table, D.groups(d))
    assert means[0, [0, 1, 5, 9]].tolist() == [0, 1.5, 3, 4.5] and means[1, 1] == 8
    assert np.isnan(means[:, 2]).all()
    with pytest.raises(ValueError, match="values"):
        D.groups([1.5])


def test_subsets_are_balanced_and_the_extremes():
    random = np.random.default_rng(2)
    d, y = D.difficulty(random.random(90)), np.arange(90) % 3
    for which in D.SUBSETS:
        chosen = D.subset(d, torch.tensor(y), 31, which)
        assert np.bincount(y[chosen]).tolist() == [11, 10, 10] and len(set(chosen.tolist())) == 31
    for label, wanted in ((0, 11), (1, 10)):
        order = sorted((i for i in range(90) if y[i] == label), key=lambda i: d[i])
        hard, easy = (set(D.subset(d, y, 31, w).tolist()) for w in ("hard", "easy"))
        assert set(order[:wanted]) <= hard and set(order[-wanted:]) <= easy
    assert (D.subset(d, y, 31, "random", seed=1) != D.subset(d, y, 31, "random", seed=2)).any()
    with pytest.raises(ValueError, match="count: got 91"):
        D.subset(d, y, 91, "easy")
    with pytest.raises(ValueError, match="which: got 'medium'"):
        D.subset(d, y, 3, "medium")


def test_lipschitz_bound_is_the_product_of_spectral_norms_and_leaves_no_trace():
    model = net().train()
    with torch.no_grad():
        model[1].running_var.uniform_(0.5, 2)
        model[1].weight.uniform_(-2, 2)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = D.lipschitz_bound(model, (1, 4, 4), iterations=5000, tolerance=1e-12)
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())
    eye = torch.eye(16).double().view(16, 1, 4, 4)
    with torch.no_grad():
        conv = F.conv2d(eye, model[0].weight.double(), padding=1).flatten(1)
        scale = model[1].weight.double() / (model[1].running_var.double() + model[1].eps).sqrt()
        wanted = [conv.svd()[1].max(), scale.abs().max(), 1.0, 1.0, model[4].weight.double().svd()[1].max()]
    assert found.norms == pytest.approx([float(v) for v in wanted], rel=1e-5)
    assert found.bound == pytest.approx(float(np.prod([float(v) for v in wanted])), rel=1e-5)
    # no pair of images shows a steeper slope
    x = torch.rand(64, 1, 4, 4)
    model.eval()
    slope = (model(x[:32]) - model(x[32:])).norm(dim=1) / (x[:32] - x[32:]).flatten(1).norm(dim=1)
    assert slope.max() <= found.bound
    with pytest.raises(TypeError, match="layer LSTM"):
        D.lipschitz_bound(nn.Sequential(nn.LSTM(3, 3)), (3,))


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1), nn.AvgPool2d(2)])
def test_pools_do_not_exceed_their_constant(pool):
    bound = D._constant(pool) or D._spectral(pool, (1, 1, 6, 6), torch.Generator(), 300, 1e-9)[0]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 1, 6, 6, generator=g).double()
    z = x + 1e-3 * torch.randn(x.shape, generator=g).double()
    z[0], x[0] = 0, 0
    z[0, 0, 3, 3] = 1  # one pixel that is the largest of every window that holds it
    slope = (pool(x) - pool(z)).flatten(1).norm(dim=1) / (x - z).flatten(1).norm(dim=1)
    assert slope.max() <= bound + 1e-9
