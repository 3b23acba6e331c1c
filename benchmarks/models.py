"""The small networks and inputs the suites attack: random weights, or trained on scikit-learn's digits."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .case import Context, Unavailable


def small_cnn(channels: int = 1, size: int = 28, classes: int = 10, seed: int = 0) -> nn.Sequential:
    """Two convolutions and two linear layers, the certification papers' CNN: conv(16,4,2,1)-conv(32,4,2,1)-100."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        side = size // 4
        return nn.Sequential(
            nn.Conv2d(channels, 16, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * side * side, 100),
            nn.ReLU(),
            nn.Linear(100, classes),
        ).eval()


def frozen(model: nn.Module) -> nn.Module:
    """Parameters that ask for no gradient: without this some peers compute gradients that nobody reads."""
    return model.requires_grad_(False)


def digits(size: int = 28) -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits as (N, 1, size, size) in [0, 1] by bilinear interpolation, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise Unavailable("scikit-learn is not installed (pip install scikit-learn)") from None
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(raw.target, dtype=torch.int64)
    images = nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return images.clamp_(0, 1), labels


def trained_cnn(images: Tensor, labels: Tensor, *, epochs: int = 4, seed: int = 0) -> nn.Sequential:
    """small_cnn after a few epochs of Adam on the given images: seconds on two cores, above 90 % on the digits."""
    model = small_cnn(images.shape[1], images.shape[2], int(labels.max()) + 1, seed).train()
    order = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(epochs):
            for batch in torch.randperm(len(images), generator=order).split(64):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
    return model.eval()


def random_batch(
    context: Context, batch: int, channels: int = 1, size: int = 28, classes: int = 10
) -> tuple[Tensor, Tensor]:
    """Generated images in [0, 1] and labels, on the context's device."""
    generator = context.generator()
    images = torch.rand(batch, channels, size, size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return images.to(context.device), labels.to(context.device)
