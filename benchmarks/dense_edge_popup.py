"""Edge-popup in ordinary torch, as what the time of our epochs is compared with.

Two ways of training the same masked model: "authors" sorts the scores of every layer in every forward pass and takes
all gradients in every attack step, "tuned" makes the masks once a batch and takes the input gradient only.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.nn.masked import MaskedLayer


class Select(torch.autograd.Function):
    """The mask of the `keep` largest scores by a sort; backward it is the identity."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, keep: int) -> Tensor:
        order = scores.detach().flatten().sort().indices
        mask = torch.zeros_like(scores)
        mask.view(-1)[order[scores.numel() - keep :]] = 1
        return mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class DenseLayer(nn.Module):
    """A masked layer whose weight is written out in every forward pass, or once by `fix`."""

    def __init__(self, layer: MaskedLayer) -> None:
        super().__init__()
        self.scores, self.keep = nn.Parameter(layer.scores.detach().clone()), layer.keep
        self.register_buffer("weight", layer.unmasked_weight())
        self.conv = isinstance(layer, fr.nn.BinaryMaskedConv2d)
        self.geometry = layer.geometry()
        self.fixed: Tensor | None = None

    def fix(self, fixed: bool) -> None:
        with torch.no_grad():
            self.fixed = self.masked() if fixed else None

    def masked(self) -> Tensor:
        return self.weight * Select.apply(self.scores, self.keep)

    def forward(self, x: Tensor) -> Tensor:
        w = self.masked() if self.fixed is None else self.fixed
        g = self.geometry
        return F.conv2d(x, w, None, g.stride, g.padding, g.dilation, g.groups) if self.conv else F.linear(x, w)


def dense_model(model: nn.Module) -> nn.Module:
    """The same model, layers without a bias, in ordinary torch."""
    model = copy.deepcopy(model)
    for name, layer in fr.nn.masked_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, DenseLayer(layer))
    return model


def train_epoch(model: nn.Module, batches: list[tuple[Tensor, Tensor]], eps: float, steps: int, tuned: bool) -> None:
    """Algorithm 5.1 on running statistics, as `fastrobust.training.edge_popup` does by default."""
    optimizer = fr.training.score_optimizer(model)
    layers = [m for m in model.modules() if isinstance(m, DenseLayer)]
    for x, y in batches:
        model.eval()
        for layer in layers:
            layer.fix(tuned)
        adversarial = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(steps):
            adversarial.requires_grad_()
            loss = F.cross_entropy(model(adversarial), y)
            if tuned:
                (grad,) = torch.autograd.grad(loss, adversarial)
            else:
                loss.backward()
                assert adversarial.grad is not None
                grad = adversarial.grad
            moved = adversarial.detach() + 2.5 * eps / steps * grad.sign()
            adversarial = (x + (moved - x).clamp(-eps, eps)).clamp(0, 1)
        model.train()
        for layer in layers:
            layer.fix(False)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(adversarial), y).backward()
        optimizer.step()
