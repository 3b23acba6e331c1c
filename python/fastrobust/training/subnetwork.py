"""Robust subnetworks of random networks: edge-popup with attacks (thesis, algorithms 5.1 and 5.2)."""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import attacks, ops
from ..nn.freeze import FrozenModel, freeze
from ..nn.masked import masked_layers

Record = dict[str, float]
OnEpoch = Callable[[nn.Module, Record], None]


def score_optimizer(
    model: nn.Module, lr: float = 0.1, momentum: float = 0.9, weight_decay: float = 5e-4
) -> torch.optim.SGD:
    """SGD over whatever is learned, with the thesis' settings: scores, and biases or affine parameters if there are any."""
    learned = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(learned, lr=lr, momentum=momentum, weight_decay=weight_decay)


def edge_popup(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    epochs: int,
    eps: float,
    step_size: float | None = None,
    steps: int = 10,
    norm: float | str = "Linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    optimizer: torch.optim.Optimizer | None = None,
    attack_mode: str = "eval",
    on_epoch: OnEpoch | None = None,
) -> list[Record]:
    """Learn the scores of a masked model on PGD examples (algorithm 5.1).

    For each batch: `steps` PGD steps from a random start of the ball of radius `eps`, then one optimiser step on the
    cross-entropy of the result, with the straight-through gradient in every score. eps = 0 trains on clean images.

    model: from `fastrobust.nn.convert`, changed in place. loader: any iterable of (images, labels), gone through once
    per epoch. step_size: 2.5 eps / steps when None. optimizer: `score_optimizer(model)` with a cosine schedule over the
    epochs when None; your own is stepped as it is.
    attack_mode "eval": attacks the frozen model (running statistics, masks computed once a batch, sparse forward and
    input gradient). "train": attacks the model in train mode on batch statistics, as the authors do, without their side
    effect on the running ones.
    on_epoch(model, record): called after every epoch, for instance to evaluate. A record holds epoch, loss, accuracy on
    the training examples as they were attacked, and seconds. Returns the records.
    """
    _check(model, epochs, attack_mode)
    frozen = freeze(model) if attack_mode == "eval" and eps > 0 else None

    def attacked(x: Tensor, y: Tensor, _: Any) -> Tensor:
        if eps == 0:
            return x
        options: dict[str, Any] = {"eps": eps, "norm": norm, "steps": steps, "step_size": step_size, "clip": clip}
        if frozen is None:
            return attacks.pgd(model, x, y, model_mode="keep", **options)
        frozen.update()
        return attacks.pgd(frozen, x, y, **options)

    return _train(model, loader, epochs, optimizer, attacked, on_epoch)


class Augmentation(Protocol):
    """A random change of images that perturbations can follow forth and back."""

    def sample(self, x: Tensor) -> Any:
        """Draw the change of each image of a batch."""

    def apply(self, x: Tensor, drawn: Any) -> Tensor:
        """Change images or perturbations."""

    def invert(self, x: Tensor, drawn: Any) -> Tensor:
        """Take the change back; what left the image comes back as zero."""


class ShiftFlip:
    """Shifts by up to `shift` pixels, zeros coming in, and mirror images."""

    def __init__(self, shift: int = 4, flip: bool = True) -> None:
        self.shift, self.flip = shift, flip

    def sample(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offsets = torch.randint(-self.shift, self.shift + 1, (x.shape[0], 2))
        return offsets, torch.rand(x.shape[0]) < (0.5 if self.flip else 0.0)

    def apply(self, x: Tensor, drawn: tuple[Tensor, Tensor]) -> Tensor:
        offsets, flips = drawn
        return _shifted(_flipped(x, flips), offsets)

    def invert(self, x: Tensor, drawn: tuple[Tensor, Tensor]) -> Tensor:
        offsets, flips = drawn
        return _flipped(_shifted(x, -offsets), flips)


def _flipped(x: Tensor, flips: Tensor) -> Tensor:
    return torch.where(flips.to(x.device).view(-1, 1, 1, 1), x.flip(3), x)


def _shifted(x: Tensor, offsets: Tensor) -> Tensor:
    height, width = x.shape[2:]
    out = torch.zeros_like(x)
    for image, (dy, dx) in enumerate(offsets.tolist()):
        source = x[image, :, max(0, -dy) : height - max(0, dy), max(0, -dx) : width - max(0, dx)]
        out[image, :, max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)] = source
    return out


class PerturbationStore:
    """Perturbations by example, down-sampled by `factor` in height and width and kept in half precision on the host."""

    def __init__(self, factor: int = 2) -> None:
        if factor < 1:
            raise ValueError(f"factor: expected at least 1, got {factor}")
        self.factor = int(factor)
        self.kept: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.kept.values())

    def load(self, indices: Tensor, missing: Tensor) -> Tensor:
        """The perturbations of examples at full resolution; `missing` where there is none yet."""
        out = missing.clone()
        known = [(at, i) for at, i in enumerate(indices.tolist()) if i in self.kept]
        if known:
            small = torch.stack([self.kept[i] for _, i in known]).to(missing.device, missing.dtype)
            out[[at for at, _ in known]] = F.interpolate(small, missing.shape[2:], mode="bilinear", align_corners=False)
        return out

    def save(self, indices: Tensor, perturbations: Tensor) -> None:
        height, width = (max(1, size // self.factor) for size in perturbations.shape[2:])
        small = F.interpolate(perturbations.detach(), (height, width), mode="area").to("cpu", torch.float16)
        for at, i in enumerate(indices.tolist()):
            self.kept[i] = small[at].clone()


def edge_popup_fast(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    epochs: int,
    eps: float,
    step_size: float | None = None,
    norm: float | str = "Linf",
    clip: tuple[float, float] | None = (0.0, 1.0),
    optimizer: torch.optim.Optimizer | None = None,
    store: PerturbationStore | None = None,
    augmentation: Augmentation | None = None,
    on_epoch: OnEpoch | None = None,
) -> list[Record]:
    """Learn the scores on one-step attacks that start from the last epoch's perturbations (algorithm 5.2).

    loader gives (images, labels, indices), the index telling which example it is. Each batch is augmented; the stored
    perturbation of an example is brought to full resolution and augmented alike (a random point of the ball for a new
    one), moved by one step of `step_size` (1.25 eps when None) and projected; after that it is taken back through the
    augmentation, down-sampled and stored. Other arguments as in `edge_popup`; pass a `store` to keep it between calls.
    """
    _check(model, epochs, "eval")
    store = PerturbationStore() if store is None else store
    frozen = freeze(model)
    length = 1.25 * eps if step_size is None else step_size

    def attacked(x: Tensor, y: Tensor, indices: Tensor) -> Tensor:
        drawn = None if augmentation is None else augmentation.sample(x)
        images = x if augmentation is None else augmentation.apply(x, drawn)
        frozen.update()
        random = ops.random_start(images, eps, norm, clip) - images
        fresh = torch.tensor([i not in store.kept for i in indices.tolist()], device=x.device).view(-1, 1, 1, 1)
        start = store.load(indices, torch.zeros_like(x))
        start = start if augmentation is None else augmentation.apply(start, drawn)
        start = torch.where(fresh, random, start)
        # Interpolation and half precision may have left the ball.
        adversarial = ops.project(images + start, images, eps, norm, clip)
        adversarial = ops.pgd_step(
            adversarial, images, _input_gradient(frozen, adversarial, y), length, eps, norm, clip
        )
        moved = adversarial - images
        store.save(indices, moved if augmentation is None else augmentation.invert(moved, drawn))
        return adversarial

    return _train(model, loader, epochs, optimizer, attacked, on_epoch)


def _input_gradient(frozen: FrozenModel, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        (grad,) = torch.autograd.grad(F.cross_entropy(frozen(x), y, reduction="sum"), x)
    return grad


def _train(
    model: nn.Module, loader: Iterable[Any], epochs: int, optimizer: torch.optim.Optimizer | None,
    attacked: Callable[[Tensor, Tensor, Any], Tensor], on_epoch: OnEpoch | None,
) -> list[Record]:  # fmt: skip
    schedule = None
    if optimizer is None:
        optimizer = score_optimizer(model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs))
    records = []
    for epoch in range(epochs):
        start = time.perf_counter()
        total = right = 0.0
        count = 0
        for x, y, *rest in loader:
            y = y if y.is_floating_point() else y.long()
            adversarial = attacked(x, y, rest[0] if rest else None)
            model.train()
            logits = model(adversarial)
            loss = F.cross_entropy(logits, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            count += x.shape[0]
            total += float(loss.detach()) * x.shape[0]
            right += float((logits.argmax(1) == y).sum())
        if count == 0:
            raise ValueError("loader: expected at least one batch per epoch, got none")
        if schedule is not None:
            schedule.step()
        record = {
            "epoch": float(epoch + 1),
            "loss": total / count,
            "accuracy": right / count,
            "seconds": time.perf_counter() - start,
        }
        records.append(record)
        if on_epoch is not None:
            on_epoch(model, record)
    return records


def _check(model: nn.Module, epochs: int, attack_mode: str) -> None:
    if not masked_layers(model):
        raise ValueError("model: expected masked layers (see fastrobust.nn.convert), got none")
    if isinstance(epochs, bool) or not isinstance(epochs, numbers.Integral) or epochs < 0:
        raise ValueError(f"epochs: expected an int of at least 0, got {epochs!r}")
    if attack_mode not in ("eval", "train"):
        raise ValueError(f"attack_mode: expected 'eval' or 'train', got {attack_mode!r}")
