"""An attack leaves no trace: model, gradients, modes, running statistics, random state, and the caller's tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import attack_helpers as h
import fastrobust as fr

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "restarts": {"restarts": 2},
    "early stop": {"early_stop": True, "keep": "best"},
    "multi-targeted": {"targets": "all"},
    "own loss": {"loss": lambda z, y: F.cross_entropy(z, y, reduction="none")},
    "kl": {"loss": "kl"},
    "half images": {"autocast": torch.bfloat16},
}
each_run = pytest.mark.parametrize("run", list(RUNS))


def _mixed() -> nn.Sequential:
    """In train mode but for a frozen batch normalisation; one parameter is frozen, one has a gradient."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(4 * 4 * 3, 5),
    )  # fmt: skip
    model.train()
    model[4].eval()
    model[3].weight.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 7.0)
    return model


def _trace(model: nn.Module) -> dict[str, Any]:
    parameters = {
        n: (p.clone(), p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()
    }
    return {
        "modes": [m.training for m in model.modules()],
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "parameters": parameters,
        "versions": [p._version for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
        "keys": list(vars(model)),
        "random": torch.get_rng_state(),
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(_same(u, v) for u, v in zip(a, b, strict=True))
    return bool(a == b)


@each_run
def test_model_and_random_state(run: str) -> None:
    x, y = h.small_batch()
    model, images, labels = _mixed(), x.clone(), y.clone()
    before = _trace(model)
    fr.attacks.pgd(model, x, y, eps=0.1, seed=0, **RUNS[run])
    assert _same(before, _trace(model))
    assert torch.equal(x, images) and torch.equal(y, labels) and not x.requires_grad and x.grad is None


def test_global_random_state_is_drawn_from_once_without_a_seed() -> None:
    x, y = h.small_batch()
    torch.manual_seed(5)
    a = fr.attacks.pgd(h.small_model(), x, y, eps=0.1, restarts=3)
    torch.manual_seed(5)
    torch.randint(0, 2**62, (), dtype=torch.int64)
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    b = fr.attacks.pgd(h.small_model(seed=1), x, y, eps=0.1, restarts=3)
    assert torch.equal(a, b)
    torch.manual_seed(5)
    model = h.small_model(seed=1)
    torch.manual_seed(5)
    fr.attacks.pgd(model, x, y, eps=0.1, restarts=3)
    assert torch.equal(torch.get_rng_state(), expected)
    fr.attacks.pgd(model, x, y, eps=0.1, random_start=False)
    assert torch.equal(torch.get_rng_state(), expected)


class _Replacing(nn.Module):
    """Counts calls in a buffer that each forward replaces, as hand-written running averages often do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("empty", None)
        self.layer = nn.Linear(60, 5)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls = self.calls + 1
        return self.layer(x.flatten(1))


def test_keep_mode_attacks_in_train_mode_and_restores_buffers() -> None:
    x, y = h.small_batch()
    model = _mixed()
    seen: list[list[bool]] = []
    model.register_forward_hook(lambda *_: seen.append([m.training for m in model.modules()]))
    before = _trace(model)
    adv = fr.attacks.pgd(model, x, y, eps=0.1, seed=0, steps=3, model_mode="keep")
    after = _trace(model)
    before.pop("random"), after.pop("random")  # dropout draws
    assert _same(before, after) and seen == [before["modes"]] * 3
    seen.clear()
    evaluated = fr.attacks.pgd(model, x, y, eps=0.1, seed=0, steps=3)
    assert seen == [[False] * len(before["modes"])] * 3
    assert not torch.equal(adv, evaluated)


def test_keep_mode_restores_replaced_buffers() -> None:
    x, y = h.small_batch()
    model = _Replacing().train()
    buffer = model.calls
    fr.attacks.pgd(model, x, y, eps=0.1, steps=3, model_mode="keep")
    assert model.calls is buffer and model.calls.item() == 0


@pytest.mark.parametrize("mode", ["eval", "keep"])
@pytest.mark.parametrize("call", [0, 2])
def test_an_exception_in_the_model_restores_everything(mode: str, call: int) -> None:
    x, y = h.small_batch()
    model = _mixed()
    model[6].p = 0.0  # dropout draws no numbers
    calls = iter(range(100))

    def fail(*_: Any) -> None:
        if next(calls) == call:
            raise RuntimeError("out of memory, say")

    handle = model[5].register_forward_hook(fail)
    before, images = _trace(model), x.clone()
    with pytest.raises(RuntimeError, match="out of memory, say"):
        fr.attacks.pgd(model, x, y, eps=0.1, seed=0, model_mode=mode)
    handle.remove()
    handle = model[5].register_forward_hook(fail)
    assert _same(before, _trace(model)) and torch.equal(x, images)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class _Backwards(TorchDispatchMode):
    """Notes what every backward of a convolution or a matrix product computes."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: list[list[bool]] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution_backward.default:
            self.masks.append(list(args[-1]))
        self.products += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))


@each_run
def test_no_parameter_gradient_is_computed(run: str) -> None:
    x, y = h.small_batch()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 3, 5))

    def fail(_: Tensor) -> None:
        raise AssertionError("a parameter received a gradient")

    for p in model.parameters():
        p.register_hook(fail)
    with _Backwards() as seen:
        fr.attacks.pgd(model, x, y, eps=0.1, steps=3, **{**RUNS[run], "early_stop": False})
    assert len(seen.masks) >= 3 and seen.products == len(seen.masks)  # one product a backward: the input's
    assert all(mask == [True, False, False] for mask in seen.masks)


def test_the_watch_sees_parameter_gradients() -> None:
    """The test above can fail."""
    x, y = h.small_batch()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4 * 4 * 3, 5))
    with _Backwards() as seen:
        F.cross_entropy(model(x.requires_grad_()), y).backward()
    assert seen.masks == [[True, True, True]] and seen.products == 2


@each_run
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_works_without_gradients_around_it(run: str, guard: Callable[[], Any]) -> None:
    x, y = h.small_batch()
    model, options = h.small_model(), {"eps": 0.1, "seed": 0, "steps": 3, **RUNS[run]}
    wanted = fr.attacks.pgd(model, x, y, **options)
    with guard():
        inner_x, inner_y = x.clone(), y.clone()  # inference tensors, where that is the mode
        adv = fr.attacks.pgd(model, inner_x, inner_y, normalize=(0.0, 1.0), **options)
        assert torch.is_inference_mode_enabled() == (guard is torch.inference_mode) and not torch.is_grad_enabled()
    assert torch.equal(adv, wanted) and not adv.requires_grad


def test_inference_tensors_as_targets_with_an_own_loss() -> None:
    x, y = h.small_batch()
    model = h.small_model()
    with torch.inference_mode():
        targets = ((y + 1) % 5)[:, None]
        adv = fr.attacks.pgd(model, x, y, eps=0.1, targets=targets, **RUNS["own loss"])
    h.assert_inside(adv, x, 0.1, h.INF)


@pytest.mark.parametrize(
    "options", [{"steps": 0, "random_start": False}, {"steps": 2}, {"keep": "best"}, {"eps": 0.0}], ids=str
)
def test_result_is_detached_and_new(options: dict[str, Any]) -> None:
    x, y = h.small_batch()
    for images in (x, x.clone().requires_grad_(), x.half(), x[:0]):
        adv = fr.attacks.pgd(h.small_model(), images, y[: len(images)], **{"eps": 0.1, **options})
        assert not adv.requires_grad and adv.is_leaf and images.grad is None
        assert not len(adv) or adv.untyped_storage().data_ptr() != images.untyped_storage().data_ptr()


def test_a_model_that_writes_into_its_input_does_not_reach_the_caller() -> None:
    x, _ = h.small_batch()
    model = nn.Sequential(nn.Hardtanh(0.2, 0.8, inplace=True), nn.Flatten(), nn.Linear(60, 5))
    images = x.clone()
    fr.attacks.pgd(model, x, eps=0.1)
    assert torch.equal(x, images)
    fr.attacks.pgd(model, x, eps=0.1, normalize=(0.0, 1.0))
    assert torch.equal(x, images)


def test_weights_stay_usable_for_training_afterwards() -> None:
    x, y = h.small_batch()
    model = h.small_model().train()
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        adv = fr.attacks.pgd(model, x, y, eps=0.1, seed=0)
    adv = adv.clone()
    F.cross_entropy(model(adv), y).backward()
    F.cross_entropy(twin(adv), y).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
