"""Dynamic adversarial training (Wang et al. 2019): every example's steps, and what its passes cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.training import dynamic, registry
from fastrobust.training.method import Batch
from method_helpers import EPS, blobs, by_hand, clipped, drawn, follow, net, same, slope, split

STEPS = 6


def criterion(g: Tensor, x: Tensor, x0: Tensor) -> float:
    return float(EPS * g.abs().sum() - ((x - x0) * g).sum())


def algorithm_1(
    model: nn.Module, x0: Tensor, y: Tensor, start: Tensor, level: float, centre: Tensor
) -> tuple[Tensor, list[int]]:
    """One example after the other, with V as meant: 1(c(x^{k+1}) > c_t)."""
    points, moves = [], []
    for one, label, at, middle in zip(x0, y, start, centre, strict=True):
        x, v, k = at.clone(), True, 0
        while v and k < STEPS:
            g = slope(model, x[None], label[None])[0]
            x = clipped(x + EPS / 4 * g.sign(), one, EPS)
            k += 1
            v = criterion(slope(model, x[None], label[None])[0], x, middle) > level
        points.append(x)
        moves.append(k)
    return torch.stack(points), moves


class Counter:
    """Examples that go forth and back through a model."""

    def __init__(self, model: nn.Module) -> None:
        self.forth = self.back = 0
        model.register_forward_hook(self._forward)

    def _forward(self, _module: nn.Module, args: Any, out: Tensor) -> None:
        self.forth += len(args[0])
        if out.requires_grad:
            out.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self.back += len(grad)


@pytest.fixture
def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    model = net()
    with torch.no_grad():
        model[-1].weight *= 3  # large gradients on some examples, small ones on others
    return (model, *blobs(24))


@pytest.mark.parametrize("centre", ["clean", "start"])
@pytest.mark.parametrize("epoch", [0, 2, 4, 5])
def test_every_example_makes_the_steps_of_algorithm_1(
    problem: tuple[nn.Sequential, Tensor, Tensor], centre: str, epoch: int
) -> None:
    model, x, y = problem
    method = dynamic.DynamicAT(EPS, steps=STEPS, c_max=0.25, control=5, centre=centre)
    batch = Batch(x, y, None, epoch, 6)
    torch.manual_seed(3)
    adv = method.perturb(model, batch)
    torch.manual_seed(3)
    start = drawn(x, EPS)
    level = max(0.25 - epoch * 0.25 / 5, 0)
    want, moves = algorithm_1(model, x, y, start, level, start if centre == "start" else x)
    torch.testing.assert_close(adv, want)
    assert method._moves is not None and method._moves.tolist() == moves
    if epoch == 2 and centre == "clean":
        assert len(set(moves)) >= 3  # or the test would not see a mask that is late
    if epoch == 5:
        assert method.threshold(batch) == 0 and sum(moves) > 0.9 * STEPS * len(y)


def test_stopped_examples_cost_nothing(problem: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = problem
    method = dynamic.DynamicAT(EPS, steps=STEPS, c_max=0.2)
    counter = Counter(model)
    method.perturb(model, Batch(x, y, None, 0, 6))
    assert method._moves is not None
    moves = method._moves.tolist()
    cost = sum(m + (m < STEPS) for m in moves)  # the last gradient says that it is enough
    assert counter.forth == counter.back == cost < len(y) * STEPS


def test_training_is_algorithm(problem: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = problem
    batches = split(x, y, 8, epochs=3)
    for weighted in (False, True):

        def body(model: nn.Module, x: Tensor, y: Tensor, batch: Batch, weighted: bool = weighted) -> None:
            level = max(0.2 - batch.epoch * 0.2 / 2, 0)
            adv, _ = algorithm_1(model, x, y, drawn(x, EPS), level, x)
            each = F.cross_entropy(model(adv), y, reduction="none")
            (each.detach() * each if weighted and batch.epoch else each).mean().backward()

        method = dynamic.DynamicAT(EPS, steps=STEPS, c_max=0.2, control=2, weighted=weighted)
        same(follow(method, model, batches), by_hand(body, model, batches))


def test_schedule_and_settings_of_the_paper() -> None:
    method = registry.METHODS["dynamic"]()
    assert isinstance(method, dynamic.DynamicAT)
    assert (method.c_max, method.steps, method.eps) == (0.5, 10, 8 / 255)
    x = torch.zeros(1, 1)
    at = lambda epoch, epochs: method.threshold(Batch(x, x, None, epoch, epochs))
    assert [at(e, 120) for e in (0, 50, 100, 119)] == pytest.approx([0.5, 0.25, 0, 0])
    mnist = dynamic.DynamicAT(0.3, control=0.8)
    assert mnist.threshold(Batch(x, x, None, 20, 50)) == pytest.approx(0.25)
    assert dynamic.DynamicAT(control=40).threshold(Batch(x, x, None, 10, 50)) == pytest.approx(0.375)


def test_metrics_and_the_ball_without_a_box(problem: tuple[nn.Sequential, Tensor, Tensor]) -> None:
    model, x, y = problem
    method = dynamic.DynamicAT(EPS, steps=STEPS, c_max=0.2, clip=None)
    batch = Batch(x, y, None, 0, 6)
    adv = method.perturb(model, batch)
    found = method.loss(model, batch, adv)
    assert found.metrics["fosc_threshold"] == 0.2 and 1 <= float(found.metrics["attack_steps"]) < STEPS
    assert float((adv - x).abs().amax()) <= EPS and float(adv.min()) < 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="centre: got 'middle', expected 'clean' or 'start'"):
        dynamic.DynamicAT(centre="middle")
    with pytest.raises(ValueError, match="control: got 0"):
        dynamic.DynamicAT(control=0)
    with pytest.raises(ValueError, match="steps: got 0, expected at least 1"):
        dynamic.DynamicAT(steps=0)
    with pytest.raises(ValueError, match="c_max: got -1"):
        dynamic.DynamicAT(c_max=-1)
