"""Prepared victims whose model changes, and attacks on them: never stale, verdicts are the model's."""

from __future__ import annotations

import copy
import importlib
import linecache
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import graph_module

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import prepare
from fastrobust.benchmarks import models_of_others
from prepared_networks import Residual, apart, network, settled, taken_whatever_the_speed

module = importlib.import_module("fastrobust.attacks.prepare")

pytestmark = pytest.mark.usefixtures(taken_whatever_the_speed.__name__)


# ---- the original ----


@pytest.mark.parametrize("name", ["residual", "branching", "weight norm", "in place"])
def test_original_is_untouched(name: str) -> None:
    model, x = network(name).train(), torch.rand(4, 3, 8, 8)
    model.get_submodule(next(n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d))).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds, modes = [type(m) for m in model.modules()], [m.training for m in model.modules()]
    state = torch.get_rng_state()
    want = copy.deepcopy(model).eval()(x)
    victim = prepare(model, x)
    victim(x).sum().backward() if victim(x).requires_grad else None
    fr.attacks.pgd(victim, x, torch.zeros(4).long(), eps=0.1, steps=2, check=False, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert kinds == [type(m) for m in model.modules()] and modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(model.eval()(x), want)
    model(x).sum().backward()  # a parametrised layer still makes its weight
    assert all(p.grad is not None for p in model.parameters())


def _no_grad_write(model: Any) -> None:
    with torch.no_grad():
        model.i.weight.mul_(1.5)


def _training_step(model: Any) -> None:
    model.train()
    F.cross_entropy(model(torch.rand(8, 3, 8, 8)), torch.arange(8) % 5).backward()
    torch.optim.SGD(model.parameters(), 0.5).step()
    model.eval()


def _load(model: Any) -> None:
    model.load_state_dict({k: 1.5 * v if v.is_floating_point() else v for k, v in model.state_dict().items()})


def _new_parameter(model: Any) -> None:
    model.l.weight = nn.Parameter(2 * model.l.weight.detach())


@pytest.mark.parametrize("change", [_no_grad_write, _training_step, _load, _new_parameter])
def test_changed_weights_are_seen_in_the_next_pass(change: Callable[[Any], None]) -> None:
    model, x = network("residual"), torch.rand(4, 3, 8, 8)
    victim, before = prepare(model, x), network("residual")(x)
    change(model)
    assert not torch.allclose(model(x), before, atol=1e-2)
    assert apart(victim, model, x) < 1e-4
    assert victim.report.prepared and victim.generation == 1
    assert not victim.refresh()


def _past_the_counters(model: Any) -> None:
    model.model.l.bias.data.add_(1.0)


def _numpy(model: Any) -> None:
    model.model.l.weight.detach().numpy()[:, 0] += 1.0


def _exchanged(model: Any) -> None:
    w = model.model.l.weight.detach().numpy()
    w[0, 0], w[0, 1] = w[0, 1].copy(), w[0, 0].copy()


def _attribute(model: Any) -> None:
    model.std.numpy()[...] *= 2


def _new_attribute(model: Any) -> None:
    model.std = 2 * model.std


def _new_layer(model: Any) -> None:
    model.model.l = nn.Linear(8, 5)


def _new_number(model: Any) -> None:
    model.model.n.eps = 1.0


def _new_hook(model: Any) -> None:
    model.model.i.register_forward_hook(lambda m, given, out: 2 * out)


@pytest.mark.parametrize(
    "change",
    [_past_the_counters, _numpy, _exchanged, _attribute, _new_attribute, _new_layer, _new_number, _new_hook],
)
def test_other_changes_are_seen_at_the_start_of_an_attack(change: Callable[[Any], None]) -> None:
    model, x, y = network("normalised inside"), torch.rand(4, 3, 8, 8), torch.zeros(4).long()
    victim = prepare(model, x)
    before = model(x)
    change(model)
    assert not torch.equal(model(x), before)
    fr.attacks.pgd(victim, x, y, eps=0.1, steps=1, check=False, seed=0)
    assert apart(victim, model, x) < 1e-4
    assert victim.report.prepared == (change is not _new_hook)


def test_counters_of_the_model_are_no_change() -> None:
    class Calls(Residual):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x.detach()
            return super().forward(x)

    model, x = settled(Calls()), torch.rand(4, 3, 8, 8)
    model.calls = 0
    model.last = x
    victim = prepare(model, x)
    model(x)
    assert victim.report.prepared and not victim.refresh()


def test_copies_and_pickles() -> None:
    model, x = network("plain"), torch.rand(4, 3, 8, 8)
    victim = prepare(model, x)
    for other in (copy.deepcopy(victim), pickle.loads(pickle.dumps(victim))):
        assert other.source is not model and apart(other, model, x) < 1e-4
        with torch.no_grad():
            next(other.source.parameters()).mul_(2)
        assert apart(other, other.source, x) < 1e-4 and apart(victim, model, x) < 1e-4


# ---- attacks ----


ATTACKS: dict[str, Callable[..., Any]] = {
    "pgd": lambda *a, **o: fr.attacks.pgd(*a, eps=0.1, steps=5, **o),
    "pgd, best": lambda *a, **o: fr.attacks.pgd(*a, eps=0.1, steps=5, keep="best", restarts=2, **o),
    "pgd, targets": lambda *a, **o: fr.attacks.pgd(*a, eps=0.1, steps=3, targets="all", **o),
    "pgd, norm 2": lambda *a, **o: fr.attacks.pgd(*a, eps=0.5, norm=2, steps=5, normalize=([0.5], [0.3]), **o),
    "apgd": lambda *a, **o: fr.attacks.apgd(*a, eps=0.1, steps=8, **o),
    "fab": lambda *a, **o: fr.attacks.fab(*a, eps=0.1, steps=5, **o),
    "fab, targets": lambda *a, **o: fr.attacks.fab(*a, eps=0.1, steps=5, targets=2, **o),
    "square": lambda *a, **o: fr.attacks.square(*a, eps=0.1, queries=40, **o),
    "malt": lambda *a, **o: fr.attacks.malt(*a, eps=0.1, steps=4, targets=2, **o),
    "cw_inf": lambda *a, **o: fr.attacks.cw_inf(*a, eps=0.1, steps=5, **o),
    "cw_l2": lambda *a, seed, **o: fr.attacks.cw_l2(*a, steps=10, searches=2, c=1.0, lr=0.05, **o),
    "deepfool": lambda *a, seed, **o: fr.attacks.deepfool(*a, steps=5, **o),
    "autoattack": lambda *a, **o: fr.attacks.autoattack(
        *a, eps=0.05, version=[("apgd-ce", {"steps": 6}), ("fab-t", {"steps": 3, "targets": 2})], batch_size=12, **o
    ),
}  # fmt: skip


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with normalisations, trained for some steps on the embedded digits."""
    found = fr.data.load("digits", "train")
    x, y = found.images[:256], found.labels[:256]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(15):
        optimiser.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimiser.step()
    return model.eval(), x[:24], y[:24]


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    return digits()


@pytest.mark.parametrize("name", ATTACKS)
def test_same_verdicts_which_are_the_models(name: str, trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = trained
    attack, details = ATTACKS[name], {"seed": 3, "return_details": True, "check": False}
    plain, found = attack(model, x, y, **details), attack(model, x, y, prepare=True, **details)
    victim = module.prepared_once(model, x)
    assert victim.report.prepared, victim.report
    assert torch.equal(plain.fooled, found.fooled)
    assert bool(found.fooled.any())
    scaled = (found.adv - 0.5) / 0.3 if "norm 2" in name else found.adv
    with torch.no_grad():
        assert torch.equal(model(scaled).argmax(1) != y, found.fooled)
    assert torch.equal(attack(model, x, y, prepare=True, **details | {"return_details": False}), found.adv)


def test_the_search_runs_on_what_was_prepared(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[nn.Module, Tensor, Tensor]
) -> None:
    """A victim that is wrong everywhere finds nothing true; what is said to be fooled is still the model's word."""
    model, x, y = trained
    y = model(x).argmax(1)
    bad = copy.deepcopy(model)
    bad[-1].bias.data[:] = torch.linspace(0, 1e4, 10)  # always the last class
    real, calls = module.prepared_once(model, x), []

    def wrong(given: Any, images: Tensor) -> Any:
        calls.append(len(images))
        real.built.run = bad
        return real

    monkeypatch.setattr("fastrobust.attacks._model.prepared_once", wrong)
    was = real.built.run
    try:
        for name, attack in ATTACKS.items():
            calls.clear()
            found = attack(model, x, y, seed=3, return_details=True, check=False, prepare=True)
            scaled = (found.adv - 0.5) / 0.3 if "norm 2" in name else found.adv
            with torch.no_grad():
                assert torch.equal(model(scaled).argmax(1) != y, found.fooled), name
            assert calls, name
            if name.startswith("fab"):
                assert torch.equal(found.adv[~found.fooled], x[~found.fooled])
    finally:
        real.built.run = was


def test_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = digits()
    made: list[Any] = []
    monkeypatch.setattr(module, "build", lambda *a, build=module.build: made.append(a) or build(*a))
    for _ in range(3):
        fr.attacks.pgd(model, x, y, eps=0.1, steps=1, prepare=True, check=False)
    assert len(made) == 1
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    fr.attacks.pgd(model, x, y, eps=0.1, steps=1, prepare=True, check=False)
    assert len(made) == 1 and apart(module.prepared_once(model, x), model, x) < 1e-4


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"autocast": torch.bfloat16}, "autocast"),
        ({"model_mode": "keep"}, "training mode"),
        ({"model": "function"}, "not an nn.Module"),
    ],
)
def test_attacks_say_why_nothing_is_prepared(options: dict[str, Any], why: str) -> None:
    model, x, y = digits()
    model.train("model_mode" in options)
    given_model: Any = (lambda t: model(t)) if options.pop("model", None) else model
    with pytest.warns(UserWarning, match=f"prepare: the model itself is attacked: .*{why}") as seen:
        fr.attacks.pgd(given_model, x, y, eps=0.1, steps=1, prepare=True, check=False, **options)
    assert len(seen) == 1 and "\n" not in str(seen[0].message)


def test_frozen_models_and_other_lists_need_no_word() -> None:
    model, shape = models_of_others.masked("ResNet-18", "ReLU", 0.9, 0.1, small=True)
    x = torch.rand(3, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fr.attacks.pgd(fr.nn.freeze(model), x, torch.zeros(3).long(), eps=0.1, steps=1, prepare=True, check=False)
        assert fr.attacks.pgd(model, x[:0], torch.zeros(0).long(), eps=0.1, steps=1, prepare=True).shape == x[:0].shape


def test_prepare_is_a_bool() -> None:
    x, y = h.small_batch(4)
    for attack in (fr.attacks.pgd, fr.attacks.apgd, fr.attacks.square, fr.attacks.autoattack):
        with pytest.raises(TypeError, match="prepare: got .*expected a bool"):
            attack(h.small_model(), x, y, eps=0.1, prepare=1)  # type: ignore[operator]


def test_victims_leave_no_text_of_theirs_behind() -> None:
    """torch.fx keeps what it compiled in linecache and in a table of its own, for ever."""
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    x = torch.rand(2, 1, 8, 8)
    victim = prepare(model, x)
    before = len(linecache.cache), len(graph_module._loader.eval_cache)  # type: ignore[attr-defined]
    with torch.no_grad():
        model[0].weight.mul_(1.1)
    assert victim.refresh()
    prepare(copy.deepcopy(model), x)
    assert (len(linecache.cache), len(graph_module._loader.eval_cache)) == before  # type: ignore[attr-defined]
