"""Accuracy on held-out images while a training runs: clean, FGSM and PGD, and whether the last two part."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .. import attacks
from ..attacks._modes import undisturbed
from . import distributed


class OverfittingWarning(UserWarning):
    """Catastrophic overfitting: a model resists the one step that it is trained on, and nothing else."""


class Evaluation:
    """Accuracy of a model on held-out images: clean, after one FGSM step, and after PGD.

    ``evaluation(model)`` returns ``{"clean": ., "fgsm": ., "pgd": .}``, shares of all images; an image counts as robust
    where it is right clean and attacked. The random starts go by an image's number: neither the batches nor the number
    of processes changes a result, and the model and the global random state are left as they were.

    images: (N, ...) and labels: (N,), not those that are trained on. eps, norm, clip, steps, step_size: as in
    :func:`fastrobust.attacks.pgd`. every: evaluate after each so many epochs (and after the last).
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        eps: float,
        norm: float | str = math.inf,
        steps: int = 10,
        step_size: float | None = None,
        clip: tuple[float, float] | None = (0.0, 1.0),
        batch_size: int = 500,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        if len(images) != len(labels) or not len(images):
            raise ValueError(
                f"evaluate: got {len(images)} images and {len(labels)} labels, expected as many, at least one"
            )
        if every < 1:
            raise ValueError(f"every: got {every}, expected at least 1")
        self.images, self.labels, self.every, self.batch_size = images, labels.long(), every, batch_size
        self.one: dict[str, Any] = {"eps": eps, "norm": norm, "clip": clip, "seed": seed}
        self.many: dict[str, Any] = {**self.one, "steps": steps, "step_size": step_size}

    def __call__(self, model: nn.Module) -> dict[str, float]:
        device = next(iter(model.parameters()), self.images).device
        rank, world = distributed.rank_and_world()
        right = {"clean": 0.0, "fgsm": 0.0, "pgd": 0.0}
        for rows in torch.arange(rank, len(self.images), world).split(self.batch_size):
            x, y = self.images[rows].to(device), self.labels[rows].to(device)
            with undisturbed(model, "eval"), torch.no_grad():
                clean = model(x).argmax(1) == y
                right["clean"] += float(clean.sum())
                x, y, rows = x[clean], y[clean], rows.to(device)[clean]
                if len(x):
                    one = attacks.fgsm(model, x, y, first_example=rows, check=False, **self.one)
                    many = attacks.pgd(model, x, y, first_example=rows, check=False, **self.many)
                    right["fgsm"] += float((model(one).argmax(1) == y).sum())
                    right["pgd"] += float((model(many).argmax(1) == y).sum())
        return {name: value / len(self.images) for name, value in distributed.total(right, device).items()}

    def share_of(self, images: Tensor) -> float:
        """How many of the evaluation's images are among these, as a share (exact copies)."""
        if images.shape[1:] != self.images.shape[1:]:
            return 0.0
        generator = torch.Generator().manual_seed(7)
        key = torch.rand(images[0].numel(), dtype=torch.float64, generator=generator)
        # the same row times the same key in blocks of one size gives the same bits
        marks = [
            torch.cat([(b.cpu().double().flatten(1) * key).sum(1) for b in t.split(4096)])
            for t in (self.images, images)
        ]
        return float(torch.isin(*marks).double().mean())


def evaluation(given: Any, method: Any) -> Any:
    """An :class:`Evaluation` of (images, labels) against the method's own eps; any callable is taken as it is."""
    if given is None or callable(given):
        return given
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(f"evaluate: got {type(given).__name__}, expected (images, labels), an Evaluation or a callable")
    eps = getattr(method, "eps", None)
    if isinstance(eps, bool) or not isinstance(eps, int | float):
        raise ValueError(
            f"evaluate: got images, but {method.name} has no single eps; give Evaluation(images, labels, eps=)"
        )
    options = {name: getattr(method, name) for name in ("norm", "clip") if hasattr(method, name)}
    return Evaluation(*given, eps=float(eps), **options)


def score(record: dict[str, float]) -> float | None:
    """What the best epoch is chosen by: robust accuracy on the held-out images, else the clean one."""
    return record.get("eval_pgd", record.get("eval_clean"))


def parted(record: dict[str, float]) -> bool:
    """Whether accuracy under one step and under many have parted."""
    fgsm, pgd = record.get("eval_fgsm"), record.get("eval_pgd")
    return fgsm is not None and pgd is not None and fgsm - pgd > 0.15 and pgd < 0.5 * fgsm


def warn_parted(record: dict[str, float]) -> None:
    warnings.warn(
        f"catastrophic overfitting: after epoch {record['epoch']:.0f} the model is right on {record['eval_fgsm']:.1%} "
        "of the "
        f"held-out images under FGSM and on {record['eval_pgd']:.1%} under PGD: it resists one step and nothing else",
        OverfittingWarning,
        stacklevel=3,
    )


__all__ = ["Evaluation", "OverfittingWarning", "evaluation", "parted", "score", "warn_parted"]
