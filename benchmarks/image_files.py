"""Images of the data sets of the thesis' tables, and where they are to be had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_FILES = {
    "mnist": ("mnist.npz", "http://yann.lecun.com/exdb/mnist"),
    "cifar10": ("cifar10_subset.npz", "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "fashion": ("fashion_mnist.npz", "https://github.com/zalandoresearch/fashion-mnist"),
    "svhn": ("svhn.npz", "http://ufldl.stanford.edu/housenumbers"),
}


def images_of(folder: Path, data: str, split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], and labels."""
    file, source = _FILES[data]
    if not (folder / file).is_file():
        arrays = "uint8 arrays train_images, train_labels, test_images, test_labels"
        raise FileNotFoundError(f"data: there is no {file} in {folder}: an npz file of {arrays}, made from {source}")
    with np.load(folder / file) as archive:
        x = torch.tensor(archive[f"{split}_images"][:count]).float() / 255
        y = torch.tensor(archive[f"{split}_labels"][:count]).long()
    return (x.view(-1, 1, 28, 28) if data in ("mnist", "fashion") else x), y
