"""What `fastrobust analyse` runs of the thesis' section 4.3.5 (easy and hard examples weighed) and table 4.4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..attacks._modes import undisturbed
from ..training.registry import make
from . import difficulty as hardness
from ._topics import Arrays, Draw, _drawn
from ._topics_training import _robust, _trained
from .corruptions import CORRUPTIONS, corrupt

_EPS, _STEPS, _EPOCHS, _WARM_UP = 0.1, 5, 40, 5
_BETAS = (0.0, 0.1, 0.5, 1.0)


def weights(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Thesis figures 4.23b and 4.24 to 4.27: robust training and test error over the epochs of ATTA, with reweighting,
    and with adaptive targets by beta; the weights that reweighting gives and the label's share of adaptive targets,
    averaged over the epochs, by the difficulty under PGD training."""
    held = torch.arange(len(images)) % 4 == 0
    x, y, test = images[~held], labels[~held], (images[held], labels[held])
    recorder = hardness.Recorder(make("pgd", eps=_EPS, steps=_STEPS))
    _trained(x, y, recorder, seed, _EPOCHS // 2)
    d = hardness.difficulty(recorder.losses)
    still: dict[str, Any] = {"shift": 0, "flip": False, "resets": ()}  # small digits bear neither crop nor mirror
    settings: dict[str, Any] = {
        "ATTA": make("atta", eps=_EPS, **still),
        "reweighting": make("reweight", eps=_EPS, warm_up=_WARM_UP, **still),
        **{f"beta {b:g}": make("adaptive-targets", eps=_EPS, warm_up=_WARM_UP, beta=b, **still) for b in _BETAS},
    }
    curves, shares = {}, []
    for name, method in settings.items():
        recorder = hardness.Recorder(method)
        rows: list[list[float]] = []

        def look(
            model: nn.Module, record: dict[str, float], rows: list[list[float]] = rows, name: str = name,
            method: Any = method,
        ) -> None:  # fmt: skip
            epoch = int(record["epoch"])
            if name == "beta 0.1" and epoch > _WARM_UP:
                moved = method.state_dict()["targets"]
                shares.append(0.1 + 0.9 * moved.gather(1, y[:, None].to(moved.device))[:, 0].cpu())
            if epoch % (_EPOCHS // 10) == 0:
                rows.append([epoch, 1 - _robust(model, x, y, _EPS), 1 - _robust(model, *test, _EPS)])

        _trained(x, y, recorder, seed, _EPOCHS, callbacks=look)
        curves[name] = rows
        if name == "reweighting":
            # cross-entropy of the label is -log of the probability that is the weight, up to the batch's sum
            probability = (-recorder.losses[_WARM_UP:]).exp()
            weight = (probability / probability.mean(1, keepdim=True)).mean(0).cpu().numpy()
    share = torch.stack(shares).mean(0).numpy()
    table = np.array(list(curves.values()))
    group = hardness.groups(d)
    arrays: Arrays = {
        "settings": np.array(list(settings)), "curves": table,  # (settings, looks, [epoch, train error, test error])
        "last_train_error": table[:, -1, 1], "last_test_error": table[:, -1, 2],
        "best_test_error": table[..., 2].min(1), "difficulty": d, "weight": weight, "label_share": share,
        "weight_by_group": hardness.group_means(weight[None], group)[0],
        "share_by_group": hardness.group_means(share[None], group)[0],
        "weight_correlation": np.corrcoef(d, weight)[0, 1], "share_correlation": np.corrcoef(d, share)[0, 1],
    }  # fmt: skip

    def plot(figure: Any) -> None:
        panels = figure.subplots(1, 4)
        for name, rows, panel in zip(settings, table, [panels[0]] * 2 + [panels[1]] * len(_BETAS), strict=True):
            (line,) = panel.plot(rows[:, 0], rows[:, 2], label=name)
            panel.plot(rows[:, 0], rows[:, 1], "--", color=line.get_color())
        for panel in panels[:2]:
            panel.set(xlabel="epoch", ylabel="robust error, -- training")
            panel.legend(fontsize=7)
        for panel, values, name in ((panels[2], weight, "weight"), (panels[3], share, "label's share of the target")):
            panel.scatter(d, values, s=3, alpha=0.5)
            panel.set(xlabel="difficulty (0: hardest)", ylabel=name)

    return arrays, _drawn(plot, (13, 3.4))


def corruptions(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Thesis table 4.4: D-distances on held-out images between difficulty under plain, FGSM and PGD training, on clean
    and on so perturbed images, and difficulty of eighteen corruptions (``analysis.corruptions``, severity 3) under
    plain training; and between two plain trainings. Two initialisations."""
    held = torch.arange(len(images)) % 4 == 0
    seen, (x, y) = (images[~held], labels[~held]), (images[held], labels[held])
    bad = {name: corrupt(x, name, seed=seed) for name in CORRUPTIONS}
    attack: Callable[[nn.Module, int], Tensor] = lambda m, n: pgd(m, x, y, eps=_EPS, steps=n, seed=seed)
    rows: dict[str, list[Any]] = {}
    for run in range(2):
        for name, method, steps in (
            ("plain", make("plain"), 0),
            ("fgsm", make("pgd", eps=_EPS, steps=1), 1),
            ("pgd", make("pgd", eps=_EPS, steps=_STEPS), _STEPS),
        ):
            losses: dict[str, list[Tensor]] = {}

            def look(
                model: nn.Module, _: Any, name: str = name, steps: int = steps, losses: dict[str, list[Tensor]] = losses
            ) -> None:
                own = {name: attack(model, steps) if steps else x}
                for key, inputs in (own | (bad if name == "plain" else {})).items():
                    with undisturbed(model, "eval"), torch.no_grad():
                        each = nn.functional.cross_entropy(model(inputs), y, reduction="none")
                    losses.setdefault(key, []).append(each)

            _trained(*seen, method, seed + run, _EPOCHS // 2, callbacks=look)
            for key, table in losses.items():
                rows.setdefault(key, []).append(hardness.difficulty(torch.stack(table)))
    names = ("plain", "fgsm", "pgd")
    between = lambda a, b: (hardness.d_distance(a[0], b[1]) + hardness.d_distance(a[1], b[0])) / 2
    arrays: Arrays = {
        "methods": np.array(names), "corruptions": np.array(CORRUPTIONS),
        "d_distance": np.array([[between(rows[m], rows[c]) for c in CORRUPTIONS] for m in names]),
        "between_methods": np.array([[between(rows[a], rows[b]) for b in names] for a in names]),
    }  # fmt: skip

    def plot(figure: Any) -> None:
        panel = figure.subplots()
        for k, (name, line) in enumerate(zip(names, arrays["d_distance"], strict=True)):
            panel.bar(np.arange(len(line)) + 0.27 * (k - 1), line, 0.25, label=name)
        panel.axhline(1 / 3, color="k", linestyle=":", label="independent")
        panel.set_xticks(range(len(CORRUPTIONS)), CORRUPTIONS, rotation=60, ha="right")
        panel.set_ylabel("D-distance")
        panel.legend(fontsize=7)

    return arrays, _drawn(plot, (9, 4))


TOPICS = {"weights": weights, "corruptions": corruptions}
