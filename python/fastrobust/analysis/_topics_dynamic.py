"""What `fastrobust analyse dynamic` runs: Wang et al., figures 3b to 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..training import loader, make
from ..training.loop import train
from . import fosc as criteria
from ._topics import Arrays, Draw, _drawn, _lenet

_EPS, _EPOCHS, _STEPS = 0.1, 12, 10
_BUDGETS = (0.025, 0.05, 0.075, 0.1)
_METHODS = ("pgd", "curriculum", "dynamic", "fgsm-pgd")


def dynamic(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Wang et al., figures 3b to 5: standard, curriculum and dynamic training, and PGD after FGSM epochs: FOSC of
    PGD-10 by epoch (without a box), robust accuracy on held-out images by the attack's eps, and by that of the
    training."""
    held = torch.arange(len(images)) % 4 == 0
    seen, test = (images[~held], labels[~held]), (images[held], labels[held])
    looks = sorted({max(1, _EPOCHS // 6), max(1, _EPOCHS // 2), _EPOCHS})
    densities: dict[str, list[Tensor]] = {}
    by_attack, clean = [], []
    for name in _METHODS:
        kept: list[Tensor] = []

        def look(model: nn.Module, record: dict[str, float], kept: list[Tensor] = kept) -> None:
            if int(record["epoch"]) in looks:
                kept.append(_measured(model, seen[0][:1000], seen[1][:1000], _EPS, seed, None).fosc)

        model = _trained(name, seen, _EPS, seed, look)
        densities[name] = kept
        by_attack.append([1 - float(_measured(model, *test, e, seed).fooled.float().mean()) for e in _BUDGETS])
        model.eval()
        with torch.no_grad():
            clean.append(float((model(test[0]).argmax(1) == test[1]).float().mean()))
    by_training = [
        [
            1 - float(_measured(_trained(name, seen, e, seed), *test, e, seed).fooled.float().mean())
            for e in _BUDGETS[:-1]
        ]
        for name in _METHODS[:3]
    ]
    whole = torch.stack([torch.stack(rows) for rows in densities.values()])
    arrays: Arrays = {
        "methods": np.array(_METHODS), "epochs": np.array(looks), "fosc": whole.numpy(),
        "median_fosc": whole.median(-1).values.numpy(), "mean_fosc": whole.mean(-1).numpy(),
        "share_below_0.1": (whole < 0.1).double().mean(-1).numpy(), "budgets": np.array(_BUDGETS),
        "clean_accuracy": np.array(clean), "robust_accuracy": np.array(by_attack),
        "robust_accuracy_trained_at": np.array([[*row, by_attack[i][-1]] for i, row in enumerate(by_training)]),
    }  # fmt: skip

    def plot(figure: Any) -> None:
        panels = figure.subplots(2, 3).flatten()
        for panel, (name, rows) in zip(panels, densities.items(), strict=False):
            for epoch, row in zip(looks, rows, strict=True):
                panel.hist(row.clamp(max=0.5).numpy(), 25, range=(0, 0.5), histtype="step", label=f"epoch {epoch}")
            panel.set(title=name, xlabel="FOSC")
        panels[0].legend(fontsize=7)
        for panel, title, table in (
            (panels[4], "attacked with", by_attack),
            (panels[5], "trained and attacked with", arrays["robust_accuracy_trained_at"]),
        ):
            for name, row in zip(_METHODS, table, strict=False):
                panel.plot(_BUDGETS, row, "o-", label=name, markersize=3)
            panel.set(title=title, xlabel="eps")
            panel.legend(fontsize=7)

    return arrays, _drawn(plot, (10, 5.5))


def _trained(
    name: str, seen: tuple[Tensor, Tensor], eps: float, seed: int, look: Callable[..., None] | tuple[()] = ()
) -> nn.Module:
    """By a method's name; "fgsm-pgd": one step of eps in the first sixth of the epochs (20 of 120), then PGD."""
    model = _lenet(*seen, seed)
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    batches = loader(*seen, 64, seed=seed)
    pgd = {"steps": _STEPS, "step_size": eps / 4}
    if name != "fgsm-pgd":
        train(model, batches, make(name, eps=eps, **pgd), epochs=_EPOCHS, optimizer=adam, callbacks=look)
        return model
    first = max(1, _EPOCHS // 6)
    shifted = lambda m, record: look(m, {**record, "epoch": record["epoch"] + first}) if callable(look) else None
    train(model, batches, make("pgd", eps=eps, steps=1, step_size=eps), epochs=first, optimizer=adam, callbacks=look)
    train(model, batches, make("pgd", eps=eps, **pgd), epochs=_EPOCHS - first, optimizer=adam, callbacks=shifted)
    return model


def _measured(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, seed: int, clip: tuple[float, float] | None = (0.0, 1.0)
) -> criteria.Measured:
    found = criteria.by_attack(model, x, y, eps, [(_STEPS, eps / 4)], seed=seed, clip=clip)
    return criteria.Measured(*(row[0] for row in found))


TOPICS = {"dynamic": dynamic}
