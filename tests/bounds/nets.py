"""Networks of the bounds tests: every layer kind, small."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import METHODS, api

# alpha-crown takes a search, whose steps depend on the last bits: test_slopes.py
ONE_PASS = [method for method in METHODS if method != "alpha-crown"]


class Residual(nn.Module):
    """Normalised input, convolution + BatchNorm blocks, a strided shortcut, a scaled output."""

    def __init__(self, act: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.c0, self.b0, self.act = nn.Conv2d(3, 6, 3, 1, 1), nn.BatchNorm2d(6), act()
        self.c1, self.b1, self.c2 = nn.Conv2d(6, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, 1, 1)
        self.short, self.out = nn.Conv2d(6, 6, 1, 2, 0), nn.Linear(6 * 16, 5)
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.b0(self.c0((x - 0.5) / self.std)))
        h = self.act(self.c2(self.act(self.b1(self.c1(h)))) + self.short(h))
        return self.out(h.view(h.size(0), -1)) * 2 - 1


class Mixed(nn.Module):
    """Reflected "same" padding, transposed convolution, pooling of any stride, concatenation, slices, a shared
    layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding="same", padding_mode="reflect")
        self.up, self.drop = nn.ConvTranspose2d(4, 3, 3, 2, 1, 1), nn.Dropout(0.3)
        self.mid, self.out = nn.Linear(3 * 16 + 4 * 4, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        a = F.leaky_relu(self.conv(x), 0.1)
        b = F.max_pool2d(a, 3, 2, 1)
        c = F.avg_pool2d(F.relu(self.up(b)), 2, 2)
        d = torch.cat([torch.flatten(c, 1), F.max_pool2d(a, 4, 3).flatten(1)[:, :16]], 1)
        e = torch.tanh(self.mid(self.drop(d)))
        e = e + self.out(e)
        return self.out(F.silu(e).clamp(min=-0.1))


def mlp(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(7, 12), act, nn.Linear(12, 10), act, nn.Linear(10, 5))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, 1, 1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, dilation=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def one_dimensional() -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(3, 5, 4, 2, 1),
        nn.ReLU(),
        nn.MaxPool1d(3, 2),
        nn.Conv1d(5, 4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.2),
    "hardtanh": nn.Hardtanh(),
    "relu6": nn.ReLU6(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "elu": nn.ELU(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
}
NETS: dict[str, tuple[tuple[int, ...], object]] = {
    **{f"mlp-{k}": ((7,), lambda a=v: mlp(a)) for k, v in ACTIVATIONS.items()},
    "cnn": ((3, 8, 8), cnn),
    "grouped": ((4, 8, 8), grouped),
    "conv1d": ((3, 20), one_dimensional),
    "residual": ((3, 8, 8), Residual),
    "residual-sigmoid": ((3, 8, 8), lambda: Residual(nn.Sigmoid)),
    "mixed": ((3, 8, 8), Mixed),
}


def random_statistics(net: nn.Module) -> None:
    """BatchNorm statistics that do something."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
            m.weight.data.normal_()
            m.bias.data.normal_()


def make(name: str, seed: int = 0) -> tuple[nn.Module, tuple[int, ...]]:
    """The network in eval mode, with BatchNorm statistics that do something."""
    torch.manual_seed(seed)
    shape, build = NETS[name]
    net = build().eval()
    random_statistics(net)
    return net, shape


def margins(z: Tensor, y: Tensor) -> Tensor:
    """z (..., B, K) to z_y - z_j, j ascending without y: (..., B, K - 1)."""
    k = z.shape[-1]
    rows = []
    for i, label in enumerate(y.tolist()):
        rows.append(torch.stack([z[..., i, label] - z[..., i, j] for j in range(k) if j != label], -1))
    return torch.stack(rows, -2)


def points_of_set(x: Tensor, eps: Tensor | float, p: float, clip: tuple[float, float] | None, count: int) -> Tensor:
    """Points of the input set, corners and faces first: (count, *x.shape)."""
    v = torch.randn(count, *x.shape, dtype=x.dtype)
    flat = v.flatten(2)
    if p == math.inf:
        v = v.sign() * torch.rand(count, 1, *[1] * (x.dim() - 1), dtype=x.dtype) ** 0.2
    else:
        flat = flat / flat.norm(p=p, dim=2, keepdim=True)
        half = count // 2
        single = torch.zeros_like(flat[:half])
        where = torch.randint(flat.shape[2], (half, x.shape[0], 1))
        single.scatter_(2, where, torch.randint(2, where.shape).to(x.dtype) * 2 - 1)
        v = torch.cat([single, flat[half:]]).view_as(v)
    e = eps.view(-1, *[1] * (x.dim() - 1)) if isinstance(eps, Tensor) and eps.dim() == 1 else eps
    points = x + e * v
    return points if clip is None else points.clamp(*clip)


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """Whether the function ``name`` of the interface took each call."""
    calls: list[bool] = []
    real = getattr(api, name)

    def spy(*args: Any) -> Tensor | None:
        out: Tensor | None = real(*args)
        calls.append(out is not None)
        return out

    monkeypatch.setattr(api, name, spy)
    return calls
