"""How the papers train with each method: epochs, batches, optimiser and rates (CIFAR-10, PreAct ResNet-18 or the
like)."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .schedules import Periodic


@dataclasses.dataclass(frozen=True)
class Recipe:
    """``schedule`` "steps": the rate times ``factor`` at each of ``drops``, shares of the training; "triangle": from 0
    to lr in the middle and back; "cosine": from lr to 0; "constant". ``resets``: shares of the training at which the
    schedule begins anew, scaled to the period. SGD has momentum .9. ``max_grad_norm``: gradients are clipped to it."""

    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    schedule: Literal["steps", "triangle", "cosine", "constant"] = "steps"
    drops: tuple[float, ...] = (24 / 30, 28 / 30)
    factor: float = 0.1
    optimizer: Literal["sgd", "adam"] = "sgd"
    max_grad_norm: float | None = None
    resets: tuple[float, ...] = ()

    def rate(self, progress: float) -> float:
        """The rate when that share of the training is done; :func:`train` takes it as ``scheduler``."""
        return Periodic(self._rate, self.resets)(progress) if self.resets else self._rate(progress)

    def _rate(self, progress: float) -> float:
        if self.schedule == "triangle":
            return self.lr * (1 - abs(2 * progress - 1))
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * progress))
        drops = self.drops if self.schedule == "steps" else ()
        # a drop is often the share of a whole epoch, which a float only comes close to
        return self.lr * self.factor ** sum(progress > drop - 1e-9 for drop in drops)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        learned: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(learned, lr=self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(learned, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay)

    def text(self) -> str:
        shape = {"steps": f"x{self.factor:g} at " + ", ".join(f"{d * self.epochs:.4g}" for d in self.drops)}
        how = shape.get(self.schedule, self.schedule) if self.schedule != "steps" or self.drops else "constant"
        if self.resets:
            how += ", anew at " + ", ".join(f"{r * self.epochs:.4g}" for r in self.resets)
        return f"{self.epochs} epochs of {self.batch_size}, {self.optimizer} {self.lr:g} ({how}), decay {self.weight_decay:g}"


_WANG = Recipe(120, 128, 0.01, 1e-4, drops=(60 / 120, 100 / 120))  # Wang et al. 2019, section 5.1, CIFAR-10
_ATTA = Recipe(38, 64, 0.1, 2e-4, drops=(30 / 38, 36 / 38))  # Zheng et al. 2020
_CERTIFIED = Recipe(160, 128, 5e-4, 0.0, drops=(120 / 160, 140 / 160), factor=0.2, optimizer="adam", max_grad_norm=10.0)
_CHAPTER_3 = Recipe(100, 100, 1e-3, 0.0, drops=(), schedule="constant", optimizer="adam")  # thesis 3.3.5
# Croce et al. 2019 (their code): the last tenth, counted from 1, at a tenth; for l2 on MNIST 1e-4 (with attacks 5e-5)
_MMR = Recipe(100, 128, 1e-3, 0.0, drops=(0.89,), optimizer="adam")

RECIPES: dict[str, Recipe] = {
    "plain": Recipe(), "pgd": _WANG, "curriculum": _WANG, "dynamic": _WANG,
    "fgsm-rs": Recipe(15, 128, 0.2, 5e-4, "triangle"),
    "n-fgsm": Recipe(30, 128, 0.2, 5e-4, "triangle"),
    "gradalign": Recipe(30, 128, 0.3, 5e-4, "triangle"),
    "free": Recipe(10, 128, 0.04, 5e-4, "triangle"),
    "yopo": Recipe(36, 128, 0.08, 5e-4, drops=(30 / 36, 34 / 36)),
    "atta": _ATTA, "reweight": _ATTA, "adaptive-targets": _ATTA,
    "atas": Recipe(30, 128, 0.1, 5e-4, drops=(24 / 30, 28 / 30)),
    "trades": Recipe(76, 128, 0.1, 2e-4, drops=(75 / 76,)),
    "mart": Recipe(120, 128, 0.01, 3.5e-3, drops=(75 / 120, 90 / 120, 100 / 120)),
    "awp": Recipe(200, 128, 0.1, 5e-4, drops=(0.5, 0.75)),
    "pas": Recipe(200, 128, 0.1, 1e-3, drops=(0.5, 0.75), resets=(0.5, 0.75)),  # radius and rate alike (thesis 4.2.4)
    "kl-finetune": Recipe(5, 128, 1e-3, 5e-4, "constant"),
    "edge-popup": Recipe(400, 128, 0.1, 5e-4, "cosine"), "edge-popup-fast": Recipe(400, 128, 0.1, 5e-4, "cosine"),
    "worst-case": _CERTIFIED, "ibp": _CERTIFIED, "crown-ibp": _CERTIFIED, "sabr": _CERTIFIED, "mtl-ibp": _CERTIFIED,
    "kw": _CHAPTER_3, "l-per": _CHAPTER_3, "l-per+at": _CHAPTER_3, "i-per": _CHAPTER_3, "i-per+at": _CHAPTER_3,
    "mmr": _MMR, "mmr+at": _MMR,
}  # fmt: skip


def recipe(name: str, **changes: Any) -> Recipe:
    """The paper's recipe of a method, or the usual one, with changes (those that are not None)."""
    return dataclasses.replace(RECIPES.get(name, Recipe()), **{k: v for k, v in changes.items() if v is not None})


__all__ = ["RECIPES", "Recipe", "recipe"]
