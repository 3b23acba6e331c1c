"""Tiny float64 problems on which methods are followed line by line."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.training.method import Batch, Method

EPS = 0.1


def blobs(count: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, 1, 4, 4) float64 images of three classes, some pixels at the faces of the box."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 3
    x = 0.5 * torch.rand(count, 1, 4, 4, generator=generator, dtype=torch.float64)
    for k in range(3):
        x[y == k, :, k] += 0.4
    x[:, :, 3, 3] = 1.0
    x[:, :, 3, 0] = 0.0
    return x, y


def net(batch_norm: bool = False, seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    norm = [nn.BatchNorm2d(4)] if batch_norm else []
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, 1, 1), *norm, nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)
    ).double()  # fmt: skip


def split(x: Tensor, y: Tensor, size: int, epochs: int = 1) -> list[Batch]:
    parts = list(zip(x.split(size), y.split(size), strict=True))
    return [
        Batch(a, b, None, epoch, epochs, step, len(parts))
        for epoch in range(epochs)
        for step, (a, b) in enumerate(parts)
    ]


def follow(method: Method, model: nn.Module, batches: Iterable[Batch], lr: float = 0.5) -> nn.Module:
    """A copy of the model trained by the method with plain SGD."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)

    def update(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    torch.manual_seed(7)
    batches = list(batches)
    method.begin(model, None, batches[0].epochs)
    for batch in batches:
        if batch.step == 0:
            method.begin_epoch(model, batch.epoch, batch.epochs)
        method.step(model, batch, update)
    return model


def by_hand(
    body: Callable[[nn.Module, Tensor, Tensor, Batch], None],
    model: nn.Module,
    batches: Iterable[Batch],
    lr: float = 0.5,
) -> nn.Module:
    """A copy trained by ``body``, which leaves the gradients in the parameters."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(7)
    for batch in batches:
        for p in model.parameters():
            p.grad = None
        body(model, batch.x, batch.y, batch)
        descend(model, lr)
    return model


def descend(model: nn.Module, lr: float = 0.5) -> None:
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= lr * p.grad


def same(a: nn.Module, b: nn.Module, tolerance: float = 1e-9) -> None:
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(
            value, b.state_dict()[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def moved(a: nn.Module, b: nn.Module) -> bool:
    return any(not torch.equal(v, b.state_dict()[n]) for n, v in a.state_dict().items())


def drawn(x: Tensor, eps: float, clip: tuple[float, float] | None = (0.0, 1.0)) -> Tensor:
    """The noise of a method in its next call."""
    return fr.ops.random_start(x, eps, clip=clip, seed=int(torch.randint(0, 2**62, (), dtype=torch.int64)))


def slope(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The input gradient by backward() through everything, one example at a time."""
    rows = []
    for one, label in zip(x, y, strict=True):
        leaf = one[None].clone().requires_grad_()
        loss = -model(leaf).log_softmax(1)[0, label]
        rows.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(rows)


def clipped(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)
