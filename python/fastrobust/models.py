"""Small reference models of the command line, the benchmarks and the tests; one of them trained on the spot."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import data

__all__ = ["cache_folder", "digits_cnn", "mnist_cnn", "train_digits"]

_FORMAT = 2  # of the cached weights: raise it when the model or its training changes
_EPOCHS, _BATCH = 12, 128


def digits_cnn() -> nn.Sequential:
    """Logits of 10 classes from (B, 1, 8, 8): conv(16,3,1,1) - conv(32,4,2,1) - 64 - 10, 41 866 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def mnist_cnn() -> nn.Sequential:
    """Logits of 10 classes from (B, 1, 28, 28): the thesis' CNN, conv(16,4,2,1) - conv(32,4,2,1) - 100 - 10."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 100), nn.ReLU(),
        nn.Linear(100, 10),
    )  # fmt: skip


def train_digits(seed: int = 0, *, cache: bool = True) -> nn.Sequential:
    """:func:`digits_cnn` trained on the digits (plain cross-entropy, Adam): a few seconds, in eval mode on the CPU.

    One seed gives one model on one machine with one number of threads; the global random state is left as it was. The
    weights are kept in :func:`cache_folder`; a file there that cannot be used is replaced, and a line says so.
    """
    path = cache_folder() / f"digits_cnn-seed{seed}.pt"
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        torch.manual_seed(seed)
        model = digits_cnn()
    if cache and _restore(model, path, seed):
        return model.eval()
    _fit(model, seed)
    if cache:
        _keep(model, path, seed)
    return model.eval()


def cache_folder() -> Path:
    """FASTROBUST_CACHE, else ``fastrobust`` in the user's cache directory (XDG_CACHE_HOME, else ~/.cache)."""
    own = os.environ.get("FASTROBUST_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastrobust"


def _fit(model: nn.Sequential, seed: int) -> None:
    train = data.digits("train")
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)  # of the order
        optimiser = torch.optim.Adam(model.parameters(), lr=4e-3)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(train.labels)).split(_BATCH):
                loss = nn.functional.cross_entropy(model(train.images[rows]), train.labels[rows])
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        optimiser.zero_grad(set_to_none=True)


def _restore(model: nn.Sequential, path: Path, seed: int) -> bool:
    if not path.is_file():
        return False
    from .training.checkpoint import read  # which compares checksums; here, since the frame imports models

    try:
        kept: Any = read(path)
        if kept["format"] != _FORMAT or kept["seed"] != seed:
            raise ValueError("another format")
        model.load_state_dict(kept["state"])
    except Exception as error:  # whatever is wrong with a cache, the remedy is the same
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(
            f"fastrobust: training the digits model again, its cache {path} is not usable ({reason})", file=sys.stderr
        )
        return False
    return True


def _keep(model: nn.Sequential, path: Path, seed: int) -> None:
    from .training.checkpoint import write

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, {"format": _FORMAT, "seed": seed, "state": model.state_dict()})
    except OSError as error:
        print(f"fastrobust: the digits model is not cached ({error})", file=sys.stderr)
