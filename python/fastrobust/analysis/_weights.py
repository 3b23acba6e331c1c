"""A copy of a model at other weights: whatever is done to it, the model itself stays as it is."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Attack = Callable[[nn.Module, Tensor, Tensor], Tensor]
Batches = Iterable[Sequence[Tensor]]  # (images, labels, ...) each


def clean(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The attack that does nothing."""
    return x


def copied(model: nn.Module) -> nn.Module:
    """In evaluation mode, without gradients; frozen weights are weights as the others are."""
    other = copy.deepcopy(model).eval().requires_grad_(True)
    for p in other.parameters():
        p.grad = None
    return other


@contextlib.contextmanager
def noise(model: nn.Module, seed: int) -> Iterator[None]:
    """Dropout, and attacks without a seed of their own, draw from this seed; the caller's random numbers stay."""
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def flat(model: nn.Module) -> Tensor:
    """The weights as a vector (P,), in the order of ``parameters()``."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def put(model: nn.Module, weights: Tensor) -> nn.Module:
    """Set the weights of a copy from a vector."""
    parts = weights.split([p.numel() for p in model.parameters()])
    with torch.no_grad():
        for p, part in zip(model.parameters(), parts, strict=True):
            p.copy_(part.view_as(p))
    return model


def loss_at(model: nn.Module, weights: Tensor, x: Tensor, y: Tensor, attack: Attack) -> float:
    """The mean adversarial loss of a copy at these weights, which the attack is run against."""
    adv = attack(put(model, weights), x, y)
    with torch.no_grad():
        return float(cross_entropy(model(adv), y))
