"""Batches that tell the numbers of their examples, and the checks of what a loader gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import ShiftFlip
from .distributed import rank_and_world

Augment = ShiftFlip | Callable[[Tensor, torch.Generator], Tensor]


class Loader:
    """Shuffled batches (images, labels, numbers) of tensors in memory; no Python per example.

    The order of an epoch depends on ``seed`` and the epoch's number alone, so a training that resumes sees the same
    batches: there is nothing to save.

    images: (N, ...) floating point; labels: (N,) integers. augment: crops and mirror images (:class:`ShiftFlip`), or a
    callable (images, generator) -> images on each batch, whose random numbers come from the generator.
    Under torchrun each process gets its share: shares "batch" cuts every batch, so that any number of processes trains
    on the same ones; "examples" gives a process the same examples in every epoch, as methods need that keep something
    for each. A last batch too small to be shared is left out.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int = 128,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        augment: Augment | None = None,
        shares: Literal["batch", "examples"] = "batch",
    ) -> None:
        if not isinstance(images, Tensor) or not images.is_floating_point():
            raise TypeError(f"images: got {_kind(images)}, expected a floating-point tensor")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.shape != images.shape[:1]:
            raise ValueError(f"labels: got {_kind(labels)}, expected integers of shape ({len(images)},)")
        if not len(images):
            raise ValueError("images: got none, expected at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if shares not in ("batch", "examples"):
            raise ValueError(f"shares: got {shares!r}, expected 'batch' or 'examples'")
        self.images, self.labels, self.batch_size, self.seed = images, labels.long(), int(batch_size), int(seed)
        self.shuffle, self.drop_last, self.augment, self.shares = shuffle, drop_last, augment, shares
        self.epoch = 0

    @property
    def examples(self) -> int:
        return len(self.images)

    def set_epoch(self, epoch: int) -> None:
        """The next pass is that of this epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._parts(torch.arange(self.examples)))

    def _parts(self, order: Tensor) -> list[Tensor]:
        rank, world = rank_and_world()
        size, n = self.batch_size, len(order)
        if world == 1 or self.shares == "batch":
            parts = [part[rank::world] for part in order.split(size) if len(part) >= world]
            return parts[: n // size] if self.drop_last else parts
        own = order[order % world == rank]
        # as many batches on every process, whoever has an example more
        return list(own.tensor_split(max(1, -(-(n // world) // max(1, size // world)))))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        epoch, self.epoch = self.epoch, self.epoch + 1
        n = self.examples
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        for rows in self._parts(order):
            index = rows.to(self.images.device)
            x = self.images[index]
            if isinstance(self.augment, ShiftFlip):
                x = self.augment.moves(rows, epoch).apply(x)
            elif self.augment is not None:
                x = self.augment(x, generator)
            yield x, self.labels[rows.to(self.labels.device)], index


class Indexed(Dataset[tuple[Any, ...]]):
    """A data set whose items end with their number: what a method that keeps something for each example needs."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, i: int) -> tuple[Any, ...]:
        return (*self.dataset[i], i)


def indexed(dataset: Dataset[Any]) -> Indexed:
    """``DataLoader(indexed(dataset), ...)`` gives (images, labels, numbers)."""
    return Indexed(dataset)


def loader(images: Tensor, labels: Tensor, batch_size: int = 128, **options: Any) -> Loader:
    """A :class:`Loader` of tensors in memory; options as there."""
    return Loader(images, labels, batch_size, **options)


def examples_of(given: Any) -> int | None:
    """How many examples a loader goes through, where it tells."""
    if isinstance(getattr(given, "examples", None), int):
        return int(given.examples)
    dataset = getattr(given, "dataset", None)
    return len(dataset) if isinstance(dataset, Sized) else None


def unpack(item: Any, step: int, needs_index: bool, classes: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, y, index) of what a loader gives, checked where it lies (labels of a loader are on the host)."""
    where = f"batch {step + 1}"
    if not isinstance(item, tuple | list) or len(item) < 2 or not all(isinstance(t, Tensor) for t in item[:2]):
        raise TypeError(f"loader: got {_kind(item)} as {where}, expected (images, labels) or (images, labels, numbers)")
    x, y = item[:2]
    index = item[2] if len(item) > 2 else None
    if not x.is_floating_point():
        raise TypeError(f"loader: got {x.dtype} images in {where}, expected floating point")
    if not len(x) or len(y) != len(x):
        raise ValueError(
            f"loader: got {len(x)} images and {len(y)} labels in {where}, expected as many, and at least one"
        )
    if not y.is_floating_point():
        y = y.long()
        if classes is not None and y.dim() == 1:
            low, high = (int(v) for v in torch.aminmax(y))
            if low < 0 or high >= classes:
                raise ValueError(
                    f"loader: got labels from {low} to {high} in {where}, expected 0 to {classes - 1} (the model has "
                    f"{classes} outputs)"
                )
    if index is not None:
        index = torch.as_tensor(index)
        if index.shape != (len(x),) or index.is_floating_point():
            raise ValueError(f"loader: got numbers {_kind(index)} in {where}, expected integers of shape ({len(x)},)")
        index = index.long()
    elif needs_index:
        raise ValueError(
            "loader: got (images, labels), expected (images, labels, numbers): the method keeps something for each "
            "example; use fr.training.loader(images, labels), or indexed(dataset) in your DataLoader"
        )
    return x, y, index


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"({', '.join(_kind(v) for v in value)})"
    return type(value).__name__


__all__ = ["Indexed", "Loader", "examples_of", "indexed", "loader", "unpack"]
