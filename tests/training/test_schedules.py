"""Schedules and periodic adversarial scheduling (thesis 4.2.4)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastrobust.training import adversarial, registry, schedules
from fastrobust.training._passes import at
from fastrobust.training.method import Batch
from method_helpers import EPS, blobs, clipped, drawn, follow, net, same, slope, split


def test_warm_up_is_4_29() -> None:
    D, target = 100, 0.4
    cosine, linear = schedules.WarmUp(target), schedules.WarmUp(target, "linear")
    for d in range(D):
        want = 0.5 * (1 - math.cos(d / D * math.pi)) * 0.6
        assert cosine(d / D) == pytest.approx(min(max(want, 0), target))
        assert linear(d / D) == pytest.approx(min(0.8 * d / D, target))
    below = schedules.WarmUp(0.4, "linear", high=0.8, low=-0.4)
    assert [below(p) for p in (0, 0.25, 1 / 3, 0.5, 0.9)] == pytest.approx([0, 0, 0, 0.2, 0.4])
    assert math.isclose(schedules.WarmUp(8 / 255, high=16 / 255)(0.5), 8 / 255)


def test_periods_scale_the_schedule_to_their_length() -> None:
    seen: list[float] = []
    periodic = schedules.Periodic(lambda p: seen.append(p) or p)  # type: ignore[func-returns-value]
    for epoch in range(200):
        periodic(epoch / 200)
    want = [e / 100 for e in range(100)] + [e / 50 for e in range(50)] * 2
    assert seen == pytest.approx(want)
    thirds = schedules.Periodic(lambda p: p, (1 / 3, 2 / 3))
    assert [round(thirds(e / 9), 9) for e in range(9)] == pytest.approx([0, 1 / 3, 2 / 3] * 3, abs=1e-8)


def test_rates() -> None:
    assert [schedules.Piecewise((24 / 30, 28 / 30))(e / 30) for e in (0, 23, 24, 27, 28, 29)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert [schedules.Cyclic()(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert [schedules.Cyclic(peak=0.4)(p) for p in (0.2, 0.4, 0.7)] == pytest.approx([0.5, 1, 0.5])
    assert [schedules.Cosine(0.2)(p) for p in (0, 0.5, 1)] == pytest.approx([0.2, 0.1, 0])
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    rate = schedules.scheduler(optimizer, schedules.Piecewise((0.5,)), 4)
    seen = []
    for _ in range(4):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rate.step()
    assert seen == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_by_epoch_or_by_batch() -> None:
    x = torch.zeros(1, 1)
    batch = Batch(x, x, None, 1, 4, 1, 2)
    assert at(schedules.WarmUp(1.0, "linear", 1.0), batch) == 0.25
    assert at(schedules.WarmUp(1.0, "linear", 1.0, by_epoch=False), batch) == 0.375
    assert at(lambda progress: progress, batch) == 0.375 and at(0.1, batch) == 0.1
    assert at(schedules.Periodic(schedules.WarmUp(1.0, "linear", 1.0), (0.5,)), batch) == 0.5


def test_pas_trains_by_the_schedule_and_keeps_the_ends_of_its_periods() -> None:
    model, batches = net(batch_norm=True), split(*blobs(), 6, epochs=8)
    method = schedules.PAS(EPS, shape="linear", steps=2)
    got = follow(method, model, batches)
    # the same in three trainings of PGD, each with its own radius an epoch
    torch.manual_seed(0)
    ends, now = [], model
    eps = [0, 0.5, 1, 1, 0, 1, 0, 1]  # of EPS: 2 d / D clipped to 1, over periods of 4, 2 and 2 epochs
    state = None
    for epoch, share in enumerate(eps):
        parts = [b for b in batches if b.epoch == epoch]
        plain = adversarial.PGD(share * EPS, steps=2)
        torch.manual_seed(7)
        if state is not None:
            torch.set_rng_state(state)
        now = _continue(plain, now, parts)
        state = torch.get_rng_state()
        if epoch in (3, 5):
            ends.append(now)
    same(got, now, 0)
    ensemble = method.ensemble(got)
    for kept, want in zip(ensemble.models, [*ends, now], strict=True):
        same(kept, want, 0)
    x, _ = blobs(4, seed=5)
    mean = torch.stack([m.eval()(x).softmax(1) for m in (*ends, now)]).mean(0)
    torch.testing.assert_close(ensemble(x).softmax(1), mean)
    again = schedules.PAS(EPS, shape="linear", steps=2)
    again.load_state_dict(method.state_dict())
    torch.testing.assert_close(again.ensemble(got)(x), ensemble(x))


def test_pas_may_begin_within_a_step() -> None:
    """The start of the author's code, else PGD."""
    model, (x, y) = net(), blobs(8)
    method = schedules.PAS(EPS, shape="constant", resets=(), steps=2, start="step")
    torch.manual_seed(3)
    adv = method.perturb(model, Batch(x, y))
    torch.manual_seed(3)
    want = drawn(x, EPS / 4)
    for _ in range(2):
        want = clipped(want + EPS / 4 * slope(model, want, y).sign(), x, EPS)
    torch.testing.assert_close(adv, want)
    with pytest.raises(ValueError, match="start: got 'here'"):
        schedules.PAS(start="here")


def _continue(method: adversarial.PGD, model: nn.Module, batches: list[Batch]) -> nn.Module:
    """As ``follow``, from the random state that stands."""
    import copy

    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

    def update(loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    for batch in batches:
        method.step(model, batch, update)
    return model


def test_settings_of_the_thesis() -> None:
    method = registry.METHODS["pas"]()
    assert isinstance(method, schedules.PAS)
    x = torch.zeros(1, 1)
    at_epoch = lambda e: method.radius(Batch(x, x, None, e, 200))
    assert at_epoch(0) == at_epoch(100) == at_epoch(150) == 0
    assert at_epoch(50) == pytest.approx(8 / 255) == pytest.approx(at_epoch(99))
    assert at_epoch(110) == pytest.approx(8 / 255 * (1 - math.cos(0.2 * math.pi)))
    constant = schedules.PAS(0.4, shape="constant", resets=())
    assert constant.radius(Batch(x, x, None, 0, 100)) == 0.4 and constant.settings()["resets"] == ()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="shape: got 'square', expected 'cosine' or 'linear'"):
        schedules.WarmUp(0.1, "square")
    with pytest.raises(ValueError, match="resets: got"):
        schedules.Periodic(schedules.Cosine(), (0.7, 0.5))
    with pytest.raises(ValueError, match="resets: got .* expected an epoch in every period of 1"):
        schedules.PAS().begin(net(), None, 1)
    with pytest.raises(ValueError, match="models: got none"):
        schedules.Ensemble([])
