"""torch.compile of whole steps: an attack's, in one graph, and a certified training's, whose bounds break the graph.
The same numbers as without."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastrobust as fr
from fastrobust.training.certified import worst_case_loss
from hardening_jobs import network

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.thorough)]


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 1, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_three_steps_of_an_attack_are_one_graph(backend: str) -> None:
    model = network()
    x0, y = batch()

    def attack(x0: Tensor, y: Tensor) -> Tensor:
        x = fr.ops.random_start(x0, 0.1, seed=3)
        for _ in range(3):
            # the kernel's loss and its gradient at the logits, and the network's backward pass as a vector-Jacobian
            # product
            logits, back = torch.func.vjp(model, x)
            x = fr.ops.pgd_step(x, x0, back(fr.ops.cross_entropy(logits, y).grad)[0], 0.04, 0.1)
        return x

    compiled = torch.compile(attack, fullgraph=True, backend=backend)
    adv, want = compiled(x0, y), attack(x0, y)
    if backend == "aot_eager":
        assert torch.equal(adv, want)
    assert ((adv - want).abs() < 1e-6).float().mean() > 0.95  # a sign of a gradient near 0 may be another one
    assert ((adv - x0).double().abs() <= 0.1).all() and adv.min() >= 0 and adv.max() <= 1


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_a_whole_attack(backend: str) -> None:
    model = network()
    x0, y = batch()

    def attack(x0: Tensor, y: Tensor) -> Any:
        return fr.attacks.pgd(model, x0, y, eps=0.1, steps=3, seed=0)

    assert torch.equal(torch.compile(attack, backend=backend)(x0, y), attack(x0, y))


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
@pytest.mark.parametrize("method", ["ibp", "crown-ibp"])
def test_a_certified_training_step(backend: str, method: str) -> None:
    x, y = batch()

    def trained(compile_it: bool) -> list[Tensor]:
        model = copy.deepcopy(network()).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

        def loss_of(x: Tensor, y: Tensor) -> Tensor:
            return 0.5 * F.cross_entropy(model(x), y) + 0.5 * worst_case_loss(model, x, y, 0.05, method=method)

        f = torch.compile(loss_of, backend=backend) if compile_it else loss_of
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = f(x, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return [*losses, *(p.detach() for p in model.parameters())]

    for got, want in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_frozen_network_inside_a_compiled_one() -> None:
    net = fr.nn.freeze(fr.nn.convert(network(), 0.5, 0.5).eval())
    x, _ = batch()

    def f(x: Tensor) -> Tensor:
        return F.log_softmax(net(x * 2 - 1), 1)

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), f(x))
