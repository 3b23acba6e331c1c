"""Nothing of fr.analysis changes a model: weights, statistics, gradients, modes, hooks and random state stay, also
after an exception in any of the model's passes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastrobust as fr
from fastrobust.analysis import connectivity, difficulty, fosc, landscape, overparametrized, subnetwork, trajectory

X, Y = torch.rand(12, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
SPHERE = overparametrized.on_sphere(torch.randn(6, 15, generator=torch.Generator().manual_seed(1)))
SIGNS = torch.tensor([1.0, -1.0] * 3, dtype=torch.float64)


class Stop(RuntimeError):
    pass


def _model() -> nn.Module:
    """Parts in either mode, a part that is frozen, gradients from before, dropout and running statistics."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(48, 8),
        nn.Tanh(), nn.Linear(8, 3),
    )  # fmt: skip
    net[1].eval()
    net[0].bias.requires_grad_(False)
    for p in net[5].parameters():
        p.grad = torch.randn_like(p)
    return net


def _other() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 1), nn.Flatten(0)).double()


def _attack(m: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return fr.attacks.pgd(m, x, y, eps=0.1, steps=2)  # from a random start of the global generator


def _line(m: nn.Module, count: int = 1) -> Tensor:
    return torch.randn(count, landscape.flat(m).numel(), generator=torch.Generator().manual_seed(5))


def _loss(m: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda p: cross_entropy(m(p), Y[:2], reduction="none")


def _masked() -> nn.Module:
    return fr.nn.convert(_model(), 0.5, 0.5, init="binary")


BATCHES = [(X[:6], Y[:6]), (X[6:], Y[6:])]
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "hessian_eigenpairs": (_model, lambda m: landscape.hessian_eigenpairs(m, X, Y, k=2, steps=4)),
    "gradient_norms": (_model, lambda m: landscape.gradient_norms(m, BATCHES, _attack)),
    "first_updates": (_model, lambda m: landscape.first_updates(m, BATCHES, _attack, updates=3)),
    "surface": (_model, lambda m: landscape.surface(m, X, Y, _attack, _line(m, 2), (-0.1, 0.1))),
    "perturbation_cosines": (
        _model,
        lambda m: landscape.perturbation_cosines(m, X, Y, _attack, _line(m)[0], (0.1,), runs=1),
    ),
    "connect": (_model, lambda m: connectivity.connect(m, m, BATCHES, _attack, epochs=1)),
    "along": (
        _model,
        lambda m: connectivity.along(m, connectivity.Curve(_line(m, 3)), (0.0, 0.5), X, Y, _attack, BATCHES),
    ),
    "fosc.measure": (_model, lambda m: fosc.measure(m, X, X, Y, 0.1)),
    "fosc.by_attack": (_model, lambda m: fosc.by_attack(m, X, Y, 0.1, [(1, 0.1), (2, 0.05)])),
    "feature_norms": (_model, lambda m: difficulty.feature_norms(m, X)),
    "lipschitz_bound": (_model, lambda m: difficulty.lipschitz_bound(m, (1, 4, 4), iterations=3)),
    "kept_weights": (_masked, subnetwork.kept_weights),
    "pattern": (_masked, lambda m: subnetwork.pattern(m[0])),
    "flops": (_masked, lambda m: subnetwork.flops(m, (1, 4, 4), binary=True)),
    "subnetwork.study": (
        _model,
        lambda m: subnetwork.study(
            m, BATCHES, subnetwork.grid((0.5,), (1.0,)), lambda n: float(n(X).sum()), epochs=1,
            method=fr.training.make("edge-popup", eps=0.1, steps=1),
        ),
    ),
    "optimality": (_model, lambda m: trajectory.optimality(_loss(m.eval()), X[:2], 0.1 + 0 * X[:2])),
    "ascend": (_model, lambda m: trajectory.ascend(_loss(m.eval()), X[:2], 0.1 * X[:2], 0.4, 0.1, 2)),
    "trajectory.search": (_model, lambda m: trajectory.search(_loss(m.eval()), X[:2], 0.1, steps=2, restarts=2)),
    "cap attack": (_other, lambda m: overparametrized.attack(0.2, steps=2, restarts=2)(m, SPHERE, SIGNS)),
    "descend": (
        _other,
        lambda m: overparametrized.descend(m, SPHERE, SIGNS, overparametrized.attack(0.2, steps=1), lr=0.1, steps=2),
    ),
}  # fmt: skip


def _states() -> list[Any]:
    # the generator's state as Python sees it; numpy's global one, too
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002


def _seen(model: nn.Module) -> list[Any]:
    found: list[Any] = [
        (n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), m._parameters.keys())
        for n, m in model.named_modules()
    ]
    for n, p in model.named_parameters():
        found.append((n, id(p), p.requires_grad, p.dtype, p.tolist(), None if p.grad is None else p.grad.tolist()))
    found += [(n, id(b), b.tolist()) for n, b in model.named_buffers()]
    return found


@pytest.mark.filterwarnings("ignore::fastrobust.attacks.AttackWarning")
@pytest.mark.parametrize("name", CASES)
def test_left_alone(name: str) -> None:
    build, call = CASES[name]
    model = build()
    if "eval" in call.__code__.co_names:  # where the caller's own loss needs it
        model.eval()
    passes, limit = [0], [10**9]

    def count(_: nn.Module, __: Any) -> None:
        passes[0] += 1
        if passes[0] > limit[0]:
            raise Stop

    model.register_forward_pre_hook(count)  # copies carry it along
    before, states, enabled = _seen(model), _states(), torch.is_grad_enabled()
    call(model)
    assert _seen(model) == before and _states() == states and torch.is_grad_enabled() == enabled
    whole = passes[0]
    for stop in sorted({0, 1, whole // 2, whole - 1} & set(range(whole))):
        passes[0], limit[0] = 0, stop
        with pytest.raises(Stop):
            call(model)
        assert _seen(model) == before and _states() == states and torch.is_grad_enabled() == enabled
    with torch.no_grad():
        passes[0], limit[0] = 0, 10**9
        call(model)
    assert _seen(model) == before


def test_every_function_of_a_model_is_among_the_cases() -> None:
    """A function that is added has to be listed: those whose first argument is a model."""
    import inspect

    known = {"linearisation_gap"}  # of a network of this module, which only its weights are read of
    for module in (connectivity, difficulty, fosc, landscape, overparametrized, subnetwork, trajectory):
        for name, function in vars(module).items():
            if name.startswith("_") or not inspect.isfunction(function) or function.__module__ != module.__name__:
                continue
            first = next(iter(inspect.signature(function).parameters), "")
            if first in ("model", "net") and name not in known:
                assert any(name in case for case in (*CASES, "connect", "along")), name
