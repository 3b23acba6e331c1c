"""Attacks of no strength: refused or warned of, and silence for those that work."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import AttackWarning


def _warned(model: Any, **options: Any) -> list[str]:
    x, y = h.small_batch()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fr.attacks.pgd(model, x, y, **{"eps": 0.1, "steps": 3, **options})
    assert all(issubclass(w.category, AttackWarning) and w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0


RUNS: list[dict[str, Any]] = [
    {},
    {"random_start": False},
    {"norm": 2},
    {"loss": "margin"},
    {"loss": "kl"},
    {"keep": "best"},
    {"restarts": 2},
    {"targets": 2},
    {"early_stop": True},
    {"return_details": True},
    {"loss": lambda z, y: F.cross_entropy(z, y)},
    {"model_mode": "keep"},
]


@pytest.mark.parametrize("run", RUNS, ids=h.label)
def test_an_attack_that_works_says_nothing(run: dict[str, Any]) -> None:
    assert _warned(h.small_model(), **run) == []


@pytest.mark.parametrize("run", RUNS, ids=h.label)
def test_a_zero_gradient(run: dict[str, Any]) -> None:
    model = h.small_model()
    if run.get("early_stop"):
        run = {**run, "eps": 0.001}  # random starts fool this model
    found = _warned(lambda t: model(_Round.apply(t)), **run)
    assert any("gradient of" in m and "was zero or NaN in the last step" in m for m in found)
    assert _warned(lambda t: model(_Round.apply(t)), check=False, **run) == []


def test_a_zero_gradient_of_examples_that_are_fooled_anyway_or_may_not_move() -> None:
    model = h.small_model()
    x, y = h.small_batch()
    blind = lambda t: model(_Round.apply(t))
    with torch.no_grad():
        wrong = (blind(x).argmax(1) + 1) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        fr.attacks.fgsm(blind, x, wrong, eps=0.1)
        fr.attacks.fgsm(blind, x, y, eps=0.0)
        fr.attacks.fgsm(blind, x, y, eps=torch.zeros(7))
        fr.attacks.fgsm(blind, x, y, eps=0.1, step_size=0.0)


def test_saturated_logits_say_which_losses_help() -> None:
    model = h.small_model()
    x, _ = h.small_batch()
    y = model(x).argmax(1)
    with pytest.warns(AttackWarning, match='loss="margin" or "dlr" do not'):
        fr.attacks.pgd(lambda t: model(t) * 1e6, x, y, eps=0.01, random_start=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        fr.attacks.pgd(lambda t: model(t) * 1e6, x, y, eps=0.01, random_start=False, loss="margin")


def test_a_radius_that_float32_does_not_see() -> None:
    x, y = h.small_batch()
    with pytest.warns(AttackWarning, match="no image differs from the clean one"):
        fr.attacks.pgd(h.small_model(), x.clamp_min(0.1), y, eps=1e-10)
    wrong = (h.small_model()(x).argmax(1) + 1) % 5
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)  # fooled before the first step
        adv = fr.attacks.ifgsm(h.small_model(), x, wrong, eps=0.1, early_stop=True)
    assert torch.equal(adv, x)


def test_an_evaluation_without_steps_is_looked_at_too() -> None:
    model, options = h.small_model(), {"steps": 0, "return_details": True}
    assert _warned(model, **options) == []
    assert any("as after softmax" in m for m in _warned(lambda t: model(t).softmax(1), **options))
    assert any("returned NaN" in m for m in _warned(lambda t: model(t) * float("nan"), **options))


@pytest.mark.parametrize("loss", ["ce", "margin", "kl"])
def test_outputs_after_softmax(loss: str) -> None:
    model = h.small_model()
    assert any("as after softmax" in m for m in _warned(lambda t: model(t).softmax(1), loss=loss))
    assert any("as after softmax" in m for m in _warned(nn.Sequential(model, nn.Softmax(1)), loss=loss))
    assert _warned(lambda t: model(t).log_softmax(1), loss=loss) == []
    assert _warned(lambda t: model(t).relu() + 1, loss=loss) == []


@pytest.mark.parametrize("loss", ["ce", "margin"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(value: float, loss: str) -> None:
    model = h.small_model()
    bad = torch.tensor([0.0, value, 0.0, 0.0, 0.0])
    assert any("returned NaN or inf for 7 of 7" in m for m in _warned(lambda t: model(t) + bad, loss=loss))
    hidden = torch.tensor([0.0, 0.0, 0.0, 0.0, -float("inf")])  # classes that are masked out are fine
    x, _ = h.small_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AttackWarning)
        fr.attacks.pgd(lambda t: model(t) + hidden, x, torch.arange(7) % 4, eps=0.1, loss=loss)


@pytest.mark.parametrize("attack", ["apgd", "fab", "square"])
def test_clean_images_without_numbers(attack: str) -> None:
    """They count as fooled before the first step, so that no step sees them."""
    x, y = h.small_batch()
    model = h.small_model()
    with pytest.warns(AttackWarning, match=r"returned NaN or inf for 7 of 7 clean images"):
        getattr(fr.attacks, attack)(lambda z: model(z) * torch.nan, x, y, eps=0.1)


def test_outputs_without_numbers_are_not_randomised() -> None:
    x, y = h.small_batch()
    model = h.small_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fr.attacks.autoattack(lambda z: model(z) * torch.nan, x, y, eps=0.1, return_details=True)
    notes = found.report.notes
    assert any("NaN or inf" in note for note in notes) and not any("randomised" in note for note in notes)


class _Noisy(nn.Module):
    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.net, self.draw = h.small_model(), draw
        self.rng, self.torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        own = {"own": self.rng.random, "own torch": lambda: torch.rand((), generator=self.torch_rng)}
        return self.net(x + 0.1 * float((own[self.draw] if isinstance(self.draw, str) else self.draw)()))


DRAWS: dict[str, Any] = {
    "torch": lambda: torch.rand(()),
    "numpy": np.random.rand,
    "python": random.random,
    "own": "own",
    "own torch": "own torch",
}


@pytest.mark.parametrize("draw", list(DRAWS))
@pytest.mark.parametrize("run", [{}, {"random_start": False, "keep": "best"}, {"loss": "kl"}], ids=h.label)
def test_a_randomised_model(draw: str, run: dict[str, Any]) -> None:
    model = _Noisy(DRAWS[draw]).eval()
    for _ in range(2):
        assert [m for m in _warned(model, **run) if "two different outputs" in m and "eot_samples" in m]
    assert not _warned(model, eot_samples=3, **run)  # who averages knows
    assert not _warned(model, check=False, **run)


def test_random_numbers_that_do_not_matter() -> None:
    model = h.small_model()
    watch = h.Watch(lambda t: model(t) + 0 * torch.rand(()))  # type: ignore[arg-type]
    assert _warned(watch.eval()) == []
    assert len(watch.sizes) == 4  # one more than steps: it was looked at twice


def test_dropout_in_eval_and_by_request() -> None:
    model = nn.Sequential(h.small_model(), nn.Dropout(0.5))
    assert not _warned(model.eval()) and not _warned(model.train()) and not _warned(model.train(), model_mode="keep")
    always = lambda t: F.dropout(model[0](t), 0.5, training=True)
    assert any("two different outputs" in m for m in _warned(always))


@pytest.mark.parametrize("norm", h.NORMS)
def test_eot_averages_gradients(norm: float) -> None:
    """A model whose passes take turns between two functions: their mean is one function with a known gradient."""
    x, y = h.small_batch()
    nets = [h.small_model(seed=1).double(), h.small_model(seed=5).double()]
    turn = iter(range(1000))
    alternating = lambda t: nets[next(turn) % 2](t)
    leaf = x.double().requires_grad_()
    each = sum(F.cross_entropy(n(leaf), y, reduction="none") for n in nets) / 2
    (g,) = torch.autograd.grad(each.sum(), leaf)
    eps = 0.01
    found = fr.attacks.fgsm(alternating, x.double(), y, eps=eps, norm=norm, eot_samples=2, return_details=True)
    assert found.queries == 4 and next(turn) == 4
    plain = h.plain_step(x.double(), x.double(), g, eps, eps, norm)
    assert (found.adv - plain).abs().max().item() <= 1e-6
    with torch.no_grad():
        mean = (nets[0](found.adv) + nets[1](found.adv)) / 2
    assert torch.equal(found.fooled, mean.argmax(1) != y)


@pytest.mark.parametrize("attack", ["fgsm", "ifgsm", "pgd"])
@pytest.mark.parametrize("norm", h.NORMS)
def test_kl_leaves_the_clean_point(attack: str, norm: float) -> None:
    x, _ = h.digits_batch(80)
    model, eps = h.digits_model(), h.RADIUS[norm]
    options: dict[str, Any] = {"eps": eps, "norm": norm, "loss": "kl", "random_start": False, "seed": 3}
    adv = getattr(fr.attacks, attack)(model, x, **options)
    h.assert_inside(adv, x, eps, norm)
    assert bool((adv != x).flatten(1).any(1).all())
    y = model(x).argmax(1)
    usual = getattr(fr.attacks, attack)(model, x, **{**options, "random_start": True})
    assert h.accuracy(model, adv, y) <= h.accuracy(model, usual, y) + 10 < 90
    assert torch.equal(getattr(fr.attacks, attack)(model, x, **options), adv)  # by the seed alone


def test_kl_with_a_radius_for_each_example() -> None:
    x, _ = h.small_batch()
    eps = torch.tensor([0.0, 0.1, 0.0, 0.2, 0.1, 0.1, 0.1])
    adv = fr.attacks.fgsm(h.small_model(), x, eps=eps, loss="kl", seed=0)
    h.assert_inside(adv, x, eps, h.INF)
    assert torch.equal((adv != x).flatten(1).any(1), eps > 0)


class _Writes(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.net = how, h.small_model()

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "data":
            x.data.add_(0.7)
        elif self.how == "no_grad":
            with torch.no_grad():
                x.mul_(9).round_()
        elif self.how == "numpy":
            x.detach().numpy()[:] = 3
        elif self.how == "both":
            with torch.no_grad():
                x.mul_(9)
            x.sub_(0.25)
        elif self.how == "slice":
            x[:, 0] = x[:, 0] * 0.5
        else:
            x = F.relu(x.sub_(0.25), inplace=True)
        return self.net(x)


@pytest.mark.parametrize("how", ["data", "no_grad", "numpy", "both", "slice", "in place"])
@pytest.mark.parametrize(
    "run",
    [
        {},
        {"steps": 0, "return_details": True},
        {"keep": "best"},
        {"restarts": 2},
        {"loss": "kl"},
        {"normalize": (0.5, 0.25)},
    ],
    ids=h.label,
)
@pytest.mark.parametrize("norm", [h.INF, 2])
def test_models_that_write_into_their_input(how: str, run: dict[str, Any], norm: float) -> None:
    x, y = h.small_batch()
    images = x.clone()
    found = fr.attacks.pgd(_Writes(how), x, y, eps=0.1, norm=norm, seed=0, check=False, **run)
    adv = found.adv if isinstance(found, fr.attacks.AttackResult) else found
    assert torch.equal(x, images)
    h.assert_inside(adv, x, 0.1, norm)


def test_a_model_that_writes_is_attacked_as_its_twin_that_does_not() -> None:
    x, y = h.small_batch()
    net = h.small_model()
    twin = lambda t: net(F.relu(t - 0.25))
    options: dict[str, Any] = {"eps": 0.1, "seed": 0, "keep": "best"}
    assert torch.equal(fr.attacks.pgd(_Writes("in place"), x, y, **options), fr.attacks.pgd(twin, x, y, **options))
