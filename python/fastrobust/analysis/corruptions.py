"""Common corruptions of images at several severities, for table 4.4 of the thesis: what CIFAR10-C holds as files
(Hendrycks and Dietterich 2019), computed in plain torch for images of any size, with constants of our own."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def corrupt(images: Tensor, name: str, severity: int = 3, *, seed: int = 0) -> Tensor:
    """(N, C, H, W) images in [0, 1], corrupted and clipped to [0, 1] again.

    Args:
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of the noise; the caller's random numbers go on as if nothing had been drawn.
    Raises:
        ValueError: another name, severity or shape.
    """
    if name not in _KINDS:
        raise ValueError(f"name: got {name!r}, expected one of {', '.join(_KINDS)}")
    if severity not in range(1, 6):
        raise ValueError(f"severity: got {severity}, expected 1 to 5")
    if images.dim() != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (N, C, H, W)")
    if not len(images):
        return images.clone()
    generator = torch.Generator(images.device).manual_seed(seed)
    return _KINDS[name](images, severity / 5, generator).clamp(0, 1)


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(x.shape, generator=generator, dtype=x.dtype, device=x.device)


def _shot(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    photons = 60 * (1 - s) + 5
    return torch.poisson(x.clamp(0, 1) * photons, generator=generator) / photons


def _impulse(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    """Salt and pepper."""
    chance = _uniform(x, generator)
    salted = torch.where(chance < 0.15 * s, 1.0, x)
    return torch.where(chance > 1 - 0.15 * s, 0.0, salted)


def _filtered(x: Tensor, kernel: Tensor) -> Tensor:
    kernel = (kernel / kernel.sum()).to(x)
    reach = [k // 2 for k in kernel.shape]
    padded = F.pad(x, (reach[1], reach[1], reach[0], reach[0]), mode="replicate")
    return F.conv2d(padded, kernel.expand(x.shape[1], 1, *kernel.shape), groups=x.shape[1])


def _gaussian(sigma: float) -> Tensor:
    reach = max(1, math.ceil(2 * sigma))
    line = torch.exp(-(torch.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    return line[:, None] * line


def _blurred(x: Tensor, s: float, _: torch.Generator) -> Tensor:
    return _filtered(x, _gaussian(1.2 * s))


def _moved(x: Tensor, s: float, _: torch.Generator) -> Tensor:
    """Motion along a row, over up to a third of it."""
    length = s * x.shape[3] / 6
    reach = math.ceil(length)
    return _filtered(x, (length + 1 - torch.arange(-reach, reach + 1).abs()).clamp(0, 1)[None])


def _coarse(x: Tensor, s: float, _: torch.Generator) -> Tensor:
    height, width = (max(1, round(n * (1 - 0.6 * s))) for n in x.shape[2:])
    return F.interpolate(F.adaptive_avg_pool2d(x, (height, width)), size=x.shape[2:], mode="nearest")


def _contrast(x: Tensor, s: float, _: torch.Generator) -> Tensor:
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (1 - 0.8 * s) * (x - mean)


def _fog(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    """A smooth cloud over the image."""
    coarse = torch.rand(len(x), 1, 3, 3, generator=generator, dtype=x.dtype, device=x.device)
    cloud = F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=True)
    return (x + s * cloud) / (1 + 0.5 * s)


def _warped(x: Tensor, s: float, generator: torch.Generator, turn: float = 0.0, wave: float = 0.0) -> Tensor:
    """Turned by up to ``turn``, or moved by a smooth field of up to ``wave`` of the width."""
    n = len(x)
    sign = torch.where(torch.rand(n, generator=generator, device=x.device) < 0.5, -1.0, 1.0).to(x.dtype)
    angle = sign * turn * s
    theta = torch.stack([angle.cos(), -angle.sin(), 0 * angle, angle.sin(), angle.cos(), 0 * angle], 1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    coarse = torch.randn(n, 2, 4, 4, generator=generator, dtype=x.dtype, device=x.device)
    field = F.interpolate(coarse, size=x.shape[2:], mode="bilinear", align_corners=True)
    return F.grid_sample(x, grid + wave * s * field.movedim(1, 3), padding_mode="border", align_corners=False)


def _covered(x: Tensor, s: float, generator: torch.Generator) -> Tensor:
    """A grey square at a random place."""
    height, width = x.shape[2:]
    side = max(1, round(0.5 * s * min(height, width)))
    at = torch.rand(len(x), 2, generator=generator, device=x.device)
    corner = (at * torch.tensor([height - side + 1, width - side + 1], device=x.device)).floor()
    rows, columns = (torch.arange(n, device=x.device) for n in (height, width))
    inside_r = (rows >= corner[:, :1]) & (rows < corner[:, :1] + side)
    inside_c = (columns >= corner[:, 1:]) & (columns < corner[:, 1:] + side)
    return torch.where((inside_r[:, :, None] & inside_c[:, None, :]).unsqueeze(1), torch.full_like(x, 0.5), x)


_KINDS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "gaussian noise": lambda x, s, g: x + 0.3 * s * _normal(x, g),
    "uniform noise": lambda x, s, g: x + 0.5 * s * (2 * _uniform(x, g) - 1),
    "speckle noise": lambda x, s, g: x + 0.6 * s * x * _normal(x, g),
    "shot noise": _shot,
    "impulse noise": _impulse,
    "gaussian blur": _blurred,
    "motion blur": _moved,
    "pixelate": _coarse,
    "brightness": lambda x, s, _: x + 0.5 * s,
    "darkness": lambda x, s, _: x * (1 - 0.7 * s),
    "contrast": _contrast,
    "gamma": lambda x, s, _: x.clamp(min=0) ** (1 + 2 * s),
    "posterize": lambda x, s, _: (x * round(7 - 6 * s)).round() / round(7 - 6 * s),
    "fog": _fog,
    "rotation": lambda x, s, g: _warped(x, s, g, turn=math.pi / 6),
    "elastic": lambda x, s, g: _warped(x, s, g, wave=0.15),
    "translation": lambda x, s, _: torch.roll(x, max(1, round(0.2 * s * x.shape[3])), 3),
    "occlusion": _covered,
}
CORRUPTIONS = tuple(_KINDS)

__all__ = ["CORRUPTIONS", "corrupt"]
