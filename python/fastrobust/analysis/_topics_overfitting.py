"""What `fastrobust analyse overfitting` runs: thesis figures 4.16 to 4.22."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks import pgd
from ..training.method import Method
from ..training.registry import make
from . import difficulty as hardness
from ._topics import Arrays, Draw, _drawn
from ._topics_training import _robust, _shape, _trained

_EPS, _STEPS, _EPOCHS, _SHOWN = 0.1, 5, 15, 3
_L2 = 0.6  # the l2 budget of figure 4.19: eps 0.1 in l-inf has a norm of 0.8 at most


def overfitting(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Thesis figures 4.16 to 4.22: the easiest and hardest images; learning curves of training on the hardest, random
    and easiest third by method and budget; on growing shares, easiest first; norms of the penultimate layer by group of
    difficulty, and Lipschitz bounds, over the epochs."""
    held = torch.arange(len(images)) % 4 == 0
    x, y, test = images[~held], labels[~held], (images[held], labels[held])
    method = make("pgd", eps=_EPS, steps=_STEPS)
    recorder = hardness.Recorder(method)
    norms: list[Tensor] = []
    whole = _trained(
        x, y, recorder, seed, _EPOCHS,
        callbacks=lambda m, _: norms.append(hardness.feature_norms(m, pgd(m, x, y, eps=_EPS, steps=_STEPS, seed=seed))),
    )  # fmt: skip
    d = hardness.difficulty(recorder.losses)
    group = hardness.groups(d)
    activations = hardness.group_means(torch.stack(norms), group)
    settings: dict[str, tuple[Method, float, float | str]] = {
        "plain": (make("plain"), 0.0, "Linf"),
        "fgsm": (make("pgd", eps=_EPS, steps=1), _EPS, "Linf"),
        f"pgd {_EPS / 4:g}": (make("pgd", eps=_EPS / 4, steps=_STEPS), _EPS / 4, "Linf"),
        f"pgd {_EPS:g}": (method, _EPS, "Linf"),
        f"pgd l2 {_L2:g}": (make("pgd", eps=_L2, steps=_STEPS, norm=2), _L2, "L2"),
    }
    errors, bounds = [], []
    for name, (how, eps, norm) in settings.items():
        order = d
        if name != f"pgd {_EPS:g}":
            recorder = hardness.Recorder(how)
            _trained(x, y, recorder, seed, _EPOCHS // 2)
            order = hardness.difficulty(recorder.losses)
        curves = []
        for which in hardness.SUBSETS:
            rows = torch.from_numpy(hardness.subset(order, y, len(x) // 3, which, seed=seed))
            curve, lipschitz = _curve(x[rows], y[rows], test, how, (eps, norm), seed, 2 * _EPOCHS)
            curves.append(curve)
            if name == f"pgd {_EPS:g}":
                bounds.append(lipschitz)
        errors.append(curves)
    shares, growing = (0.25, 0.5, 0.75, 1.0), []
    for share in shares:
        rows = torch.from_numpy(np.sort(np.argsort(-d, kind="stable")[: round(share * len(x))]))
        growing.append(_curve(x[rows], y[rows], test, method, (_EPS, "Linf"), seed, _EPOCHS)[0])
    chosen = np.concatenate([_extreme(d, y.numpy(), label) for label in np.unique(y.numpy())[:2]])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        attacked = pgd(whole, x[chosen], y[chosen], eps=_EPS, steps=_STEPS)
    whole.eval()
    with torch.no_grad():
        predicted = whole(attacked).argmax(1)
    arrays: Arrays = {
        "settings": np.array(list(settings)), "subsets": np.array(hardness.SUBSETS),
        "curves": np.array(errors),  # (settings, subsets, looks, [epoch, train error, test error])
        "last_train_error": np.array(errors)[:, :, -1, 1], "last_test_error": np.array(errors)[:, :, -1, 2],
        "best_test_error": np.array(errors)[:, :, :, 2].min(-1),
        "shares": np.array(shares), "growing_last_test_error": np.array([c[-1][2] for c in growing]),
        "growing_best_test_error": np.array([min(row[2] for row in c) for c in growing]),
        "lipschitz_epochs": np.array([row[0] for row in errors[-2][0]]), "lipschitz": np.array(bounds),
        "group_activations": activations, "activations_first": activations[0], "activations_last": activations[-1],
        "shown": x[chosen].numpy(), "shown_attacked": attacked.numpy(), "shown_difficulty": d[chosen],
        "shown_label": y[chosen].numpy(), "shown_predicted": predicted.numpy(),
    }  # fmt: skip
    return arrays, _drawn(lambda figure: _plot(figure, arrays), (12, 6))


def _extreme(d: Any, labels: Any, label: Any) -> Any:
    """Numbers of the easiest and the hardest examples of a class."""
    members = np.flatnonzero(labels == label)
    members = members[np.argsort(-d[members], kind="stable")]
    return np.concatenate([members[:_SHOWN], members[::-1][:_SHOWN]])


def _curve(
    x: Tensor, y: Tensor, test: tuple[Tensor, Tensor], method: Method, attack: tuple[float, float | str], seed: int,
    epochs: int,
) -> tuple[list[list[float]], list[float]]:  # fmt: skip
    """[epoch, robust training error, robust test error] at about six epochs, and Lipschitz bounds there."""
    rows: list[list[float]] = []
    bounds: list[float] = []
    looks = {max(1, round(epochs * k / 8)) for k in range(1, 9)}

    def look(model: nn.Module, record: dict[str, float]) -> None:
        epoch = int(record["epoch"])
        if epoch in looks:
            rows.append([epoch, 1 - _robust(model, x, y, *attack), 1 - _robust(model, *test, *attack)])
            bounds.append(hardness.lipschitz_bound(model, _shape(x), iterations=100, tolerance=1e-4).bound)

    _trained(x, y, method, seed, epochs, callbacks=look)
    return rows, bounds


def _plot(figure: Any, arrays: Arrays) -> None:
    left, right = figure.subfigures(1, 2, width_ratios=(3, 1))
    panels = left.subplots(2, 4).flatten()
    colours = ("tab:red", "tab:grey", "tab:green")
    for panel, name, curves in zip(panels, arrays["settings"], arrays["curves"], strict=False):
        for which, colour, curve in zip(arrays["subsets"], colours, curves, strict=True):
            panel.plot(curve[:, 0], curve[:, 1], "--", color=colour)
            panel.plot(curve[:, 0], curve[:, 2], color=colour, label=which)
        panel.set(title=name, xlabel="epoch", ylim=(0, 1))
    panels[0].legend(fontsize=7)
    panels[0].set_ylabel("error, -- training")
    panels[5].plot(arrays["shares"], arrays["growing_last_test_error"], "o-", label="last")
    panels[5].plot(arrays["shares"], arrays["growing_best_test_error"], "o-", label="best")
    panels[5].set(title="growing share", xlabel="easiest first")
    panels[5].legend(fontsize=7)
    for i in (0, 3, 6, 9):
        panels[6].plot(arrays["group_activations"][:, i], label=f"G{i}")
    panels[6].set(title="feature norm", xlabel="epoch")
    panels[6].legend(fontsize=7)
    for which, colour, row in zip(arrays["subsets"], colours, arrays["lipschitz"], strict=True):
        panels[7].semilogy(arrays["lipschitz_epochs"], row, color=colour, label=which)
    panels[7].set(title="Lipschitz bound", xlabel="epoch")
    shown = arrays["shown"]
    places = right.subplots(4, _SHOWN).flatten()
    for i, (place, image) in enumerate(zip(places, shown, strict=False)):
        place.imshow(image.transpose(1, 2, 0).squeeze(), cmap="gray_r")
        place.set_title(f"d {arrays['shown_difficulty'][i]:.2f}, {arrays['shown_label'][i]}", fontsize=7)
    for place in places:
        place.axis("off")


TOPICS = {"overfitting": overfitting}
