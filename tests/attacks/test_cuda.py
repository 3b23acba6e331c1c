"""Attacks on a GPU: graph replay, no synchronisation, same ball; and the bookkeeping of graphs, tested anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attack_helpers as h
import fastrobust as fr
from fastrobust.attacks import _graph

OPTIONS: dict[str, Any] = {"eps": 0.1, "steps": 5, "step_size": 0.03, "seed": 0}


def _on_gpu() -> tuple[nn.Module, Tensor, Tensor]:
    x, y = h.digits_batch(64)
    return copy.deepcopy(h.digits_model()).cuda(), x.cuda(), y.cuda()


@pytest.mark.cuda
@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr", "kl"])
def test_graph_equals_eager(norm: float, loss: str) -> None:
    model, x, y = _on_gpu()
    options = {**OPTIONS, "eps": h.RADIUS[norm], "step_size": h.RADIUS[norm] / 4, "norm": norm, "loss": loss}
    torch.backends.cudnn.deterministic = True
    eager = fr.attacks.pgd(model, x, y, **options)
    for _ in range(2):
        assert torch.equal(fr.attacks.pgd(model, x, y, cuda_graph=True, **options), eager)
    h.assert_inside(eager.cpu(), x.cpu(), h.RADIUS[norm], norm)


@pytest.mark.cuda
@pytest.mark.parametrize("norm", h.NORMS)
def test_plain_path_never_waits_for_the_device(norm: float) -> None:
    model, x, y = _on_gpu()
    options = {**OPTIONS, "norm": norm, "check": False}
    eps = torch.full((64,), 0.1, device="cuda")
    fr.attacks.pgd(model, x, y, **options)  # lazy initialisation
    torch.cuda.set_sync_debug_mode("error")
    try:
        fr.attacks.pgd(model, x, y, **options)
        fr.attacks.pgd(model, x, y, **{**options, "eps": eps})
        fr.attacks.fgsm(model, x, y, eps=0.1, norm=norm, check=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
def test_graph_sees_training_in_place_and_moved_weights() -> None:
    model, x, y = _on_gpu()
    call = lambda graph: fr.attacks.pgd(model, x, y, cuda_graph=graph, **OPTIONS)
    call(True)
    (first,) = _graph._cache[model].values()
    with torch.no_grad():
        model[0].weight.mul_(-1.5)
    assert torch.equal(call(True), call(False)) and list(_graph._cache[model].values()) == [first]
    model[0].weight.data = model[0].weight.data.clone() * 0.5
    assert torch.equal(call(True), call(False)) and len(_graph._cache[model]) == 2


@pytest.mark.cuda
@pytest.mark.parametrize("norm", h.NORMS)
def test_gpu_and_cpu_agree(norm: float) -> None:
    model, x, y = _on_gpu()
    options = {**OPTIONS, "eps": h.RADIUS[norm], "step_size": h.RADIUS[norm] / 4, "norm": norm, "steps": 2}
    gpu = fr.attacks.pgd(model, x, y, **options).cpu()
    cpu = fr.attacks.pgd(h.digits_model(), x.cpu(), y.cpu(), **options)
    assert (gpu - cpu).abs().flatten(1).amax(1).gt(1e-5).double().mean().item() <= 0.05


@pytest.mark.cuda
def test_devices_must_match() -> None:
    model, x, y = _on_gpu()
    with pytest.raises(ValueError, match="y: got device cpu, expected cuda"):
        fr.attacks.pgd(model, x, y.cpu(), eps=0.1)
    with pytest.raises(ValueError, match="eps: got device cpu, expected x's device cuda"):
        fr.attacks.pgd(model, x, y, eps=torch.full((64,), 0.1))


# ---- which graph is used, with eager steps in the place of recorded ones ----


class _Eager:
    """Stands in for CapturedStep: same inputs, steps that run."""

    recorded = 0

    def __init__(self, step: Callable[[Any], Any], inputs: tuple[Any, ...]) -> None:
        type(self).recorded += 1
        self.step = step
        self.static = tuple(t.clone() if isinstance(t, Tensor) else t for t in inputs)
        self.seen = step(self.static)

    def run(self, inputs: tuple[Any, ...], steps: int, tick: Callable[[int], object]) -> tuple[Tensor, Any]:
        for static, given in zip(self.static, inputs, strict=True):
            if isinstance(static, Tensor):
                static.copy_(given)
        for _ in range(steps):
            seen = self.step(self.static)
        return self.static[0].clone(), seen


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Eager]]:
    import sys

    monkeypatch.setattr(_graph, "CapturedStep", _Eager)
    monkeypatch.setattr(sys.modules["fastrobust.attacks.pgd"], "_on_gpu", lambda _: True)
    monkeypatch.setattr(_Eager, "recorded", 0)
    _graph._cache.clear()
    yield _Eager
    _graph._cache.clear()


def test_a_second_call_reuses_the_graph(recorder: type[_Eager]) -> None:
    model = copy.deepcopy(h.digits_model())
    for first in (1500, 1600):
        x, y = h.digits_batch(20, first)
        found = fr.attacks.pgd(model, x, y, cuda_graph=True, return_details=True, **OPTIONS)
        assert torch.equal(found.adv, fr.attacks.pgd(model, x, y, **OPTIONS)) and found.queries == 6
    assert recorder.recorded == 1


def test_radii_per_example_are_inputs_of_the_graph(recorder: type[_Eager]) -> None:
    model = copy.deepcopy(h.digits_model())
    x, y = h.digits_batch(20)
    for scale in (0.05, 0.1, 0.2):
        options = {
            **OPTIONS,
            "eps": scale * torch.rand(20, dtype=torch.float64),
            "step_size": torch.full((20,), scale / 4),
        }
        adv = fr.attacks.pgd(model, x, y, cuda_graph=True, **options)
        assert torch.equal(adv, fr.attacks.pgd(model, x, y, **options))
        h.assert_inside(adv, x, options["eps"], h.INF)
    assert recorder.recorded == 1


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 0.2},
        {"step_size": 0.01},
        {"norm": 2},
        {"loss": "margin"},
        {"clip": None},
        {"normalize": (0.1, 0.5)},
        {"targeted": True},
    ],
    ids=str,
)
def test_another_setting_is_another_graph(recorder: type[_Eager], change: dict[str, Any]) -> None:
    model = copy.deepcopy(h.digits_model())
    x, y = h.digits_batch(20)
    fr.attacks.pgd(model, x, y, cuda_graph=True, **OPTIONS)
    adv = fr.attacks.pgd(model, x, y, cuda_graph=True, **{**OPTIONS, **change})
    assert recorder.recorded == 2 and torch.equal(adv, fr.attacks.pgd(model, x, y, **{**OPTIONS, **change}))


def test_moved_weights_record_again(recorder: type[_Eager]) -> None:
    model = copy.deepcopy(h.digits_model())
    x, y = h.digits_batch(20)
    fr.attacks.pgd(model, x, y, cuda_graph=True, **OPTIONS)
    model[0].weight.data = model[0].weight.data.clone()
    fr.attacks.pgd(model, x, y, cuda_graph=True, **OPTIONS)
    assert recorder.recorded == 2
    function = lambda t: model(t)  # its weights cannot be watched
    for _ in range(2):
        fr.attacks.pgd(function, x, y, cuda_graph=True, **OPTIONS)
    assert recorder.recorded == 4


def test_few_graphs_are_kept(recorder: type[_Eager]) -> None:
    model = copy.deepcopy(h.digits_model())
    for n in range(1, 8):
        fr.attacks.pgd(model, *h.digits_batch(n), cuda_graph=True, **OPTIONS)
    assert len(_graph._cache[model]) == _graph._KEPT


def test_labels_are_checked_when_the_graph_is_reused(recorder: type[_Eager]) -> None:
    model = copy.deepcopy(h.digits_model())
    x, y = h.digits_batch(20)
    fr.attacks.pgd(model, x, y, cuda_graph=True, **OPTIONS)
    with pytest.raises(ValueError, match="y: got class indices from .* to 12, expected 0 to 9"):
        fr.attacks.pgd(model, x, torch.full_like(y, 12), cuda_graph=True, **OPTIONS)


@pytest.mark.cuda
@pytest.mark.parametrize("attack", ["apgd", "square", "fab", "autoattack"])
@pytest.mark.parametrize("norm", h.NORMS)
def test_the_suite(attack: str, norm: float) -> None:
    model, x, y = _on_gpu()
    more: dict[str, Any] = {
        "square": {"queries": 40},
        "autoattack": {"version": ["apgd-ce", ("square", {"queries": 40})]},
    }.get(attack, {"steps": 10})
    found = getattr(fr.attacks, attack)(model, x, y, eps=h.RADIUS[norm], norm=norm, seed=0, return_details=True, **more)
    h.assert_inside(found.adv.cpu(), x.cpu(), h.RADIUS[norm], norm)
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y) and bool(found.fooled.any())


@pytest.mark.cuda
@pytest.mark.parametrize("attack", ["cw_inf", "cw_l2", "deepfool", "malt"])
def test_the_attacks_of_tables(attack: str) -> None:
    """As on the CPU, but for what float32 rounding of other kernels turns."""
    model, x, y = _on_gpu()
    options: dict[str, dict[str, Any]] = {
        "cw_inf": {"eps": 0.1, "seed": 0}, "cw_l2": {"steps": 40, "searches": 4, "c": 0.1}, "deepfool": {"norm": 2},
        "malt": {"eps": 0.1, "targets": 3, "steps": 10, "seed": 0},
    }  # fmt: skip
    call = lambda *args: getattr(fr.attacks, attack)(*args, **options[attack], return_details=True)
    found, host = call(model, x, y), call(copy.deepcopy(model).cpu(), x.cpu(), y.cpu())
    assert found.adv.is_cuda and found.fooled.is_cuda and found.loss.is_cuda
    assert torch.equal(found.fooled, model(found.adv).argmax(1) != y)
    assert int((found.fooled.cpu() != host.fooled).sum()) <= 2
    assert (found.loss.cpu().nan_to_num() - host.loss.nan_to_num()).abs().median().item() < 1e-2


@pytest.mark.cuda
def test_classes_move_inputs_to_the_model() -> None:
    model, x, y = _on_gpu()
    for name in ("PGD", "CW", "DeepFool", "FAB"):
        atk = getattr(fr.attacks.classes, name)(model)
        atk.set_normalization_used([0.5], [0.5])
        adv = atk((x.cpu() - 0.5) / 0.5, y.cpu())
        assert adv.is_cuda and atk.device == next(model.parameters()).device
    atk = fr.attacks.classes.PGD(model)
    atk.set_mode_targeted_random(quiet=True)
    assert atk(x, y).is_cuda
