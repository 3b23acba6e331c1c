"""Networks that victims are prepared from, and what compares them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastrobust.attacks import _making

module = importlib.import_module("fastrobust.attacks.prepare")
LAST, FIRST = torch.channels_last, torch.contiguous_format
WAYS = [("written", FIRST), ("written", LAST), ("folded", FIRST), ("folded", LAST), ("fused", LAST)]


@pytest.fixture
def taken_whatever_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest way is run even where the model is faster: what is computed is tested here."""
    monkeypatch.setattr(_making, "PAYS", 0.0)
    monkeypatch.setattr("fastrobust.attacks._compared._ROUNDS", (1, 1))


def settled(model: nn.Module) -> nn.Module:
    """Random statistics and factors, as of a trained network; parameters ask for gradients."""
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            if m.running_mean is not None and m.running_var is not None:
                m.running_mean.normal_()
                m.running_var.uniform_(0.5, 2)
            if m.weight is not None:
                nn.init.uniform_(m.weight, 0.5, 2)
                nn.init.normal_(m.bias)
    return model.eval()


def outputs_and_gradient(model: Callable[[Tensor], Any], x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = model(leaf)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), torch.autograd.grad((out * weights).sum(), leaf)[0]


def apart(got: Callable[[Tensor], Any], want: Callable[[Tensor], Any], x: Tensor) -> float:
    """The larger of the relative differences of outputs and of input gradients."""
    pairs = zip(outputs_and_gradient(got, x), outputs_and_gradient(want, x), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


# ---- networks ----


class Shared(nn.Module):
    """One convolution, called twice, with two normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.l = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(self.c(x)))
        return self.l(F.relu(self.b(self.c(x))).view(x.size(0), -1))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.i, self.a, self.p = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.n, self.q, self.l = nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.i(x).relu()
        for _ in range(2):
            y = self.n(self.a(x))
            y += self.q(self.p(x))
            x = F.relu(y + x)
        return self.l(x.mean((2, 3)))


class Dense(nn.Module):
    """Normalisation before convolutions, padded and not, and concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.c, self.m = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(8)
        self.d, self.l = nn.Conv2d(8, 4, 1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([x, self.c(F.relu(self.n(x)))], 1)
        return self.l(self.d(F.relu(self.m(y))).reshape(-1, 256))


class InPlace(nn.Module):
    """What is added is read after it was written."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.r = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.d, self.l = nn.Conv2d(4, 4, 3, padding=1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.c(x))
        z = self.r(y)
        return self.l((self.d(z) + y).flatten(1))


class WrittenThroughView(nn.Module):
    """In another layout the view would be a copy, and its ReLU lost."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.l = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(x)
        y.view(y.size(0), -1).relu_()
        return self.l(y.flatten(1))


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(3, 1, 1))
        self.std = torch.rand(3, 1, 1) + 0.5  # no buffer
        self.model = Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)


class Branching(nn.Module):
    """torch.fx does not read it."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.l = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n(self.c(x))
        if x.mean() > 0:
            x = 2 * x
        return self.l(x.relu().flatten(1))


class Lines(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.n, self.m, self.l = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.BatchNorm1d(248), nn.Linear(248, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.l(self.m(self.n(self.c(x.flatten(2))).relu().flatten(1)))


def head(*layers: nn.Module, features: int) -> nn.Sequential:
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 5))


def conv(*args: Any, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(*args, **options)


# name: (network, normalisations that fold)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "plain": (lambda: head(conv(3, 8, 3), nn.ReLU(), features=288), 0),
    "normalisation before padding": (
        lambda: head(nn.BatchNorm2d(3), conv(3, 8, 3, padding=1), nn.ReLU(), features=512),
        0,
    ),
    "normalisation before groups": (
        lambda: head(nn.BatchNorm2d(3), conv(3, 6, 3, groups=3), nn.ReLU6(), features=216),
        1,
    ),
    "depthwise": (
        lambda: head(
            conv(3, 12, 3, 2, 1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU6(True),
            conv(12, 12, 3, 2, 1, groups=12),
            nn.BatchNorm2d(12),
            nn.Hardtanh(-1, 2),
            conv(12, 8, 1),
            features=32,
        ),
        2,
    ),
    "grouped, dilated": (
        lambda: head(
            conv(3, 8, 3, dilation=2, padding=2),
            conv(8, 12, 3, groups=4, padding=1),
            nn.BatchNorm2d(12),
            nn.SiLU(),
            features=768,
        ),
        1,
    ),
    "transposed": (
        lambda: head(
            conv(3, 4, 3, 2, 1),
            nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.1, True),
            features=384,
        ),
        1,
    ),
    "without affine": (
        lambda: head(conv(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Dropout(), features=288),
        1,
    ),
    "statistics of the batch": (
        lambda: head(conv(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), features=288),
        0,
    ),
    "other paddings": (
        lambda: head(
            conv(3, 8, 3, padding=1, padding_mode="reflect"),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.MaxPool2d(2),
            conv(8, 4, 3, padding="same"),
            features=64,
        ),
        1,
    ),
    "weight norm": (
        lambda: head(nn.utils.parametrizations.weight_norm(conv(3, 8, 3)), nn.BatchNorm2d(8), nn.ReLU(), features=288),
        0,
    ),
    "shared layer": (Shared, 2),
    "residual": (Residual, 4),
    "dense": (Dense, 0),
    "in place": (InPlace, 1),
    "written through a view": (WrittenThroughView, 0),
    "normalised inside": (Normalised, 4),
    "one dimension": (Lines, 2),
    "branching": (Branching, 0),
}


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return settled(NETWORKS[name][0]())
