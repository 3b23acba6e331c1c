"""Models, exact checks and a plain float64 PGD that shares no code with the package."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INF = math.inf
NORMS = (INF, 2, 1)
RADIUS = {INF: 0.1, 2: 0.6, 1: 2.0}  # on 8x8 digits: hard enough to fool some and not all


def label(v: object) -> str:
    """The name of a parameter of a test, without the addresses of functions, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(v))


@functools.lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits as (1797, 1, 8, 8) images in [0, 1] and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int = 128, lr: float = 3e-3) -> nn.Module:
    rng = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(steps):
        rows = torch.randint(0, len(x), (batch,), generator=rng)
        optimiser.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
    optimiser.zero_grad(set_to_none=True)
    return model.eval()


@functools.lru_cache(maxsize=1)
def digits_model() -> nn.Module:
    """A small convolutional network with batch normalisation, trained on the first 1500 digits. Do not change it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(24 * 16, 10),
    )  # fmt: skip
    x, y = digits()
    return train(model, x[:1500], y[:1500], 250)


def digits_batch(n: int, first: int = 1500) -> tuple[Tensor, Tensor]:
    x, y = digits()
    return x[first : first + n].clone(), y[first : first + n].clone()


def small_model(classes: int = 5, channels: int = 2, seed: int = 1) -> nn.Module:
    """Untrained; (B, channels, 6, 5) images."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 4 * 3, classes))
    return nn.Sequential(*layers).eval()


def small_batch(n: int = 7, channels: int = 2, classes: int = 5, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Images with values on both faces of the box."""
    rng = torch.Generator().manual_seed(seed)
    x = (torch.rand(n, channels, 6, 5, generator=rng) * 1.4 - 0.2).clamp(0, 1)
    return x, torch.randint(0, classes, (n,), generator=rng)


def distance(adv: Tensor, x: Tensor, norm: float) -> Tensor:
    """(B,) exact up to float64 rounding, which is far below one unit of float32."""
    d = (adv.double() - x.double()).flatten(1)
    if d.shape[1] == 0 or d.shape[0] == 0:
        return torch.zeros(len(d), dtype=torch.float64)
    if norm == INF:
        return d.abs().amax(1)
    rows = d.numpy()
    if norm == 1:  # correctly rounded sums
        return torch.tensor([math.fsum(np.abs(r)) for r in rows], dtype=torch.float64)
    return torch.tensor([math.sqrt(math.fsum(r * r)) for r in rows], dtype=torch.float64)


def assert_inside(
    adv: Tensor, x: Tensor, eps: float | Tensor, norm: float, clip: tuple[float, float] | None = (0.0, 1.0)
) -> None:
    """The ball and the box hold exactly, on the values handed back."""
    assert adv.shape == x.shape and adv.dtype == x.dtype and adv.device == x.device
    assert bool(torch.isfinite(adv).all())
    if isinstance(eps, Tensor) and eps.shape == x.shape:
        assert bool(((adv.double() - x.double()).abs() <= eps.double()).all())
    else:
        past = distance(adv, x, norm) - (eps.double() if isinstance(eps, Tensor) else eps)
        assert bool((past <= 0).all()), f"outside the ball by {past.max().item():.3e}"
    if clip is not None and adv.numel():
        assert clip[0] <= adv.double().min().item() and adv.double().max().item() <= clip[1]


# ---- plain PGD in float64 ----


def l1_step(x: Tensor, g: Tensor, step: float) -> Tensor:
    """Largest <g, p> with ||p||_1 <= step and x + p in [0, 1]: the steepest coordinates go to the box first."""
    flat, gf = x.flatten(1), g.flatten(1)
    room = torch.where(gf > 0, 1 - flat, flat) * (gf != 0)
    order = gf.abs().argsort(dim=1, descending=True, stable=True)
    sorted_room = room.gather(1, order)
    left = (step - (sorted_room.cumsum(1) - sorted_room)).clamp_min(0)
    length = torch.zeros_like(flat).scatter(1, order, torch.minimum(sorted_room, left))
    return (flat + length * gf.sign()).view_as(x)


def l1_project(x: Tensor, x0: Tensor, eps: float) -> Tensor:
    """The closest point of ball and box: shrink all by one lambda, found by bisection."""
    d = (x - x0).flatten(1)
    box = torch.where(d > 0, 1 - x0.flatten(1), x0.flatten(1))
    length = lambda lam: torch.minimum((d.abs() - lam[:, None]).clamp_min(0), box)
    low, high = torch.zeros(len(x), dtype=x.dtype), d.abs().amax(1)
    for _ in range(52):
        middle = (low + high) / 2
        fits = length(middle).sum(1) <= eps
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    lam = torch.where(length(torch.zeros_like(low)).sum(1) <= eps, 0, high)
    return (x0.flatten(1) + d.sign() * length(lam)).view_as(x)


def plain_step(x: Tensor, x0: Tensor, g: Tensor, step: float, eps: float, norm: float) -> Tensor:
    if norm == INF:
        return torch.clamp(x0 + torch.clamp(x + step * g.sign() - x0, -eps, eps), 0, 1)
    if norm == 1:
        return l1_project(l1_step(x, g, step), x0, eps)
    rows = lambda t: t.flatten(1).norm(dim=1).clamp_min(1e-300).view(-1, *[1] * (x.dim() - 1))
    d = x + step * g / rows(g) - x0
    return torch.clamp(x0 + d * torch.clamp(eps / rows(d), max=1), 0, 1)


def plain_pgd(
    model: nn.Module, x: Tensor, y: Tensor, start: Tensor, eps: float, step: float, steps: int, norm: float,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> list[Tensor]:  # fmt: skip
    """Every iterate, in float64, from ``start``; ``model`` is in double."""
    x0, here = x.double(), start.double()
    out = [here]
    for _ in range(steps):
        leaf = here.clone().requires_grad_()
        (g,) = torch.autograd.grad(loss(model(leaf), y, reduction="sum"), leaf)
        here = plain_step(here, x0, g, step, eps, norm)
        out.append(here)
    return out


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """In percent."""
    with torch.no_grad():
        return 100 * (model(x).argmax(1) == y).double().mean().item()


class Watch(nn.Module):
    """Passes through to a model and notes the batch sizes it saw."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(x.shape[0])
        return self.model(x)
