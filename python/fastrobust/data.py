"""Data sets of the command line, the benchmarks and the tests: images in [0, 1] and integer labels.

The embedded default is scikit-learn's digits. MNIST and the CIFAR-10 subset are archives in a folder of the user's
(``folder=`` or the environment variable FASTROBUST_DATA); nothing is ever downloaded.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Images", "MissingDependency", "digits", "find_folder", "load"]

ARCHIVES = {"mnist": "mnist.npz", "cifar10": "cifar10_subset.npz"}
NAMES = ("digits", *ARCHIVES)
ENVIRONMENT = "FASTROBUST_DATA"
_TEST_EVERY = 4  # of the digits: images 0, 4, 8, ... are the test set


class Images(NamedTuple):
    """``images`` (N, C, H, W) or (N, F), float32 in [0, 1]; ``labels`` (N,), int64; ``name`` for reports."""

    images: Tensor
    labels: Tensor
    name: str


class MissingDependency(ImportError):
    """An optional package is not installed; the message says what to install."""


def load(
    source: str | Path,
    split: str = "test",
    *,
    folder: str | Path | None = None,
    limit: int | None = None,
    first: int = 0,
) -> Images:
    """Load a data set by name, or from an npz file.

    Args:
        source: "digits", "mnist", "cifar10", or the path of an npz with either ``images`` and ``labels`` (or ``x`` and
            ``y``) or the four arrays ``train_images``, ``train_labels``, ``test_images``, ``test_labels``. Images are
            uint8 (divided by 255) or floating point in [0, 1], of shape (N, C, H, W), (N, H, W) or (N, F); labels are
            integers of any type.
        split: "test" or "train"; a file without splits gives all it holds.
        folder: where ``mnist.npz`` and ``cifar10_subset.npz`` are; default: the environment variable FASTROBUST_DATA.
        limit, first: only ``limit`` images, from number ``first`` on.

    Raises:
        FileNotFoundError: a file is not there. ValueError: its content is not as above.
        MissingDependency: the digits need scikit-learn.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'test'")
    if limit is not None and limit < 1:
        raise ValueError(f"limit: got {limit}, expected at least 1")
    if first < 0:
        raise ValueError(f"first: got {first}, expected at least 0")
    rows = slice(first, None if limit is None else first + limit)
    name, path = str(source), Path(source)
    known = name.lower() if name.lower() in NAMES else ""
    if known == "digits":
        every = digits(split)
        _check_first(rows, len(every.labels), known)
        return Images(every.images[rows], every.labels[rows], known)
    if known:
        return _archive(_find(known, folder), split, known, rows)
    if not path.suffix and not path.exists():
        raise ValueError(f"data: got {name!r}, expected {', '.join(NAMES)} or the path of an npz file")
    return _archive(path, split, path.name, rows)


def _check_first(rows: slice, count: int, name: str) -> None:
    if rows.start >= count:
        raise ValueError(f"first: got {rows.start}, but {name} holds {count} images")


def digits(split: str = "test") -> Images:
    """scikit-learn's 1797 handwritten digits, (N, 1, 8, 8) in steps of 1/16: 1347 to train, 450 (every fourth) to
    test."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingDependency("the digits data needs scikit-learn: pip install scikit-learn") from None
    raw = load_digits()
    images = torch.from_numpy(np.asarray(raw.images, dtype=np.float32) / 16).unsqueeze(1)
    labels = torch.from_numpy(np.asarray(raw.target, dtype=np.int64))
    test = torch.arange(len(labels)) % _TEST_EVERY == 0
    rows = test if split == "test" else ~test
    return Images(images[rows], labels[rows], "digits")


def find_folder(folder: str | Path | None = None) -> Path | None:
    """The folder given, else FASTROBUST_DATA, else None."""
    chosen = folder if folder is not None else os.environ.get(ENVIRONMENT)
    return Path(chosen) if chosen else None


def _find(name: str, folder: str | Path | None) -> Path:
    file, where = ARCHIVES[name], find_folder(folder)
    if where is None:
        raise FileNotFoundError(f"data: {name} needs the folder of {file}: set {ENVIRONMENT} or pass it")
    if not (where / file).is_file():
        raise FileNotFoundError(f"data: there is no {file} in {where}")
    return where / file


def _archive(path: Path, split: str, name: str, rows: slice) -> Images:
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"data: {path} is not an npz file (of numpy.savez)")
    try:
        with np.load(path, allow_pickle=False) as archive:
            pairs = [(f"{split}_images", f"{split}_labels"), ("x", "y"), ("images", "labels")]
            pair = next((p for p in pairs if p[0] in archive and p[1] in archive), None)
            if pair is None:
                given = [p for p in pairs if p[0] in archive or p[1] in archive] or pairs[-1:]
                missing = [key for key in given[0] if key not in archive]
                held = ", ".join(archive.files) or "nothing"
                raise ValueError(f"it has no {' and no '.join(missing)} (it holds {held})")
            images, labels = archive[pair[0]], archive[pair[1]]
    except Exception as error:  # whatever a damaged archive makes zipfile, zlib or numpy raise
        raise ValueError(f"data: {path} is not a readable npz of images and labels: {error}") from None
    return _checked(images, labels, str(path), name, rows)


def _checked(images: np.ndarray, labels: np.ndarray, path: str, name: str, rows: slice) -> Images:
    shape = tuple(images.shape)
    if images.ndim not in (2, 3, 4) or 0 in shape:
        raise ValueError(f"data: images of {path} have shape {shape}, expected (N, C, H, W), (N, H, W) or (N, F)")
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise ValueError(
            f"data: labels of {path} are {labels.dtype} of shape {tuple(labels.shape)}, expected integers of shape "
            f"({shape[0]},)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > np.iinfo(np.int64).max:
        raise ValueError(f"data: labels of {path} go from {low} to {high}, expected classes >= 0")
    _check_first(rows, len(labels), name)
    images, labels = images[rows], labels[rows]
    if images.dtype == np.uint8:
        scaled = torch.from_numpy(np.ascontiguousarray(images)).float().div_(255)
    elif images.dtype.kind == "f":
        scaled = torch.from_numpy(np.ascontiguousarray(images, dtype=np.float32))
        if not bool(((scaled >= 0) & (scaled <= 1)).all()):
            raise ValueError(
                f"data: images of {path} span [{images.min():g}, {images.max():g}], expected floating-point values in "
                "[0, 1]"
            )
    else:
        raise ValueError(f"data: images of {path} are {images.dtype}, expected uint8 or floating point in [0, 1]")
    if scaled.dim() == 3:
        scaled = scaled.unsqueeze(1)
    return Images(scaled, torch.from_numpy(labels.astype(np.int64)), name)
