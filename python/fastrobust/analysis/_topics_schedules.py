"""What `fastrobust analyse` runs of the thesis' section 4.2.4 (warm-up of eps) and of Wang et al.'s figures 2a and 2b
(robustness by the training's attack)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn import zoo
from ..training import loader, make
from ..training.loop import train
from ..training.schedules import WarmUp
from . import fosc as criteria
from ._topics import Arrays, Draw, _drawn
from ._topics_training import _robust, _shape

_EPS, _EPOCHS, _STEPS, _BATCH = 0.2, 20, 5, 32
_RATES, _KINDS, _WIDTHS, _WIDTH, _RATE = (1e-3, 3e-3, 1e-2), ("constant", "cosine", "linear"), (2, 4, 8), 4, 3e-3
_WANG_EPS, _WANG_EPOCHS, _OVER, _COUNTS = 0.1, 12, (1, 2, 4, 6, 8), (5, 10, 20, 40)


def schedules(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Thesis figures 4.2, 4.9, 4.10, 4.13 and 4.14: a sketch of a landscape for two eps; errors of LeNets on held-out
    images by Adam's rate, with a constant eps, cosine and linear warm-up of eps, and warm-up of the rate instead; and
    by the width."""
    held = torch.arange(len(images)) % 4 == 0
    seen, test = (images[~held], labels[~held]), (images[held], labels[held])

    def error(kind: str, rate: float, width: int = _WIDTH, warm: bool = False) -> float:
        eps: Any = _EPS if kind == "constant" else WarmUp(_EPS, kind)
        net = _net(*seen, width, seed)
        rates = [rate * min(1.0, 2 * (e + 1) / _EPOCHS) if warm else rate for e in range(_EPOCHS)]
        train(
            net, loader(*seen, _BATCH, seed=seed), make("pgd", eps=eps, steps=_STEPS), epochs=_EPOCHS,
            optimizer=torch.optim.Adam(net.parameters(), rate), scheduler=rates,
        )  # fmt: skip
        return 1 - _robust(net, *test, _EPS)

    progress = np.linspace(0, 1, 51)
    by_rate = [[error(k, r) for r in _RATES] for k in _KINDS]
    middle = [row[_RATES.index(_RATE)] for row in by_rate]
    by_width = [
        [m if w == _WIDTH else error(k, _RATE, w) for w in _WIDTHS] for k, m in zip(_KINDS, middle, strict=True)
    ]
    arrays: Arrays = {
        "kinds": np.array(_KINDS), "rates": np.array(_RATES), "widths": np.array(_WIDTHS),
        "error_by_rate": np.array(by_rate),
        "error_rate_warm_up": np.array([error("constant", r, warm=True) for r in _RATES]),
        "error_by_width": np.array(by_width),
        "progress": progress, "eps_by_progress": np.array([[WarmUp(_EPS, k)(t) for t in progress] for k in _KINDS[1:]]),
        **_sketch((0.6, 1.2)),
    }  # fmt: skip

    def plot(figure: Any) -> None:
        panels = figure.subplots(1, 4)
        for eps, row in zip(arrays["sketch_eps"], arrays["sketch_loss"], strict=True):
            panels[0].plot(arrays["sketch_theta"], row, label=f"eps {eps:g}")
        panels[0].set(title="a landscape", xlabel="theta")
        for kind, row in zip(_KINDS[1:], arrays["eps_by_progress"], strict=True):
            panels[1].plot(progress, row, label=kind)
        panels[1].set(title="eps", xlabel="progress")
        for kind, row, wide in zip(_KINDS, arrays["error_by_rate"], arrays["error_by_width"], strict=True):
            panels[2].semilogx(_RATES, row, "o-", label=kind)
            panels[3].plot(_WIDTHS, wide, "o-", label=kind)
        panels[2].semilogx(_RATES, arrays["error_rate_warm_up"], "o--", label="rate warmed up")
        panels[2].set(title="robust error", xlabel="rate of Adam", ylim=(0, 1))
        panels[3].set(title="robust error", xlabel="width", ylim=(0, 1))
        for panel in panels:
            panel.legend(fontsize=7)

    return arrays, _drawn(plot, (13, 3.4))


def _sketch(budgets: tuple[float, ...], x: float = 1.0) -> Arrays:
    """max over |d| <= eps of log(1 + exp(theta (x + d))), whose slope jumps by eps at theta = 0: the worst d changes
    its sign there."""
    theta = np.linspace(-2, 2, 81)
    loss = lambda t, e: np.logaddexp(0, t * x + e * np.abs(t))
    step = 1e-6
    jump = [(loss(step, e) - 2 * loss(0.0, e) + loss(-step, e)) / step for e in budgets]
    return {
        "sketch_theta": theta, "sketch_eps": np.array(budgets), "sketch_jump": np.array(jump),
        "sketch_loss": np.stack([loss(theta, e) for e in budgets]),
    }  # fmt: skip


def steps(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Wang et al., figures 2a and 2b: accuracy on held-out images under FGSM, PGD-20 and PGD-20 on the margin of nets
    that were trained with 20 steps of eps to eps/8, and with 5 to 40 steps of eps/6; and the median FOSC there."""
    held = torch.arange(len(images)) % 4 == 0
    seen, (x, y) = (images[~held], labels[~held]), (images[held], labels[held])
    eps, rows = _WANG_EPS, []
    for count, over in [(20, k) for k in _OVER] + [(n, 6) for n in _COUNTS]:
        net = _net(*seen, _WIDTH, seed)
        method = make("pgd", eps=eps, steps=count, step_size=eps / over)
        adam = torch.optim.Adam(net.parameters(), 2e-3)
        train(net, loader(*seen, 64, seed=seed), method, epochs=_WANG_EPOCHS, optimizer=adam)
        found = [
            criteria.by_attack(net, x, y, eps, [how], seed=seed, loss=loss)
            for how, loss in (((1, eps), "ce"), ((20, eps / 8), "ce"), ((20, eps / 8), "margin"))
        ]
        own = criteria.by_attack(net, x, y, eps, [(count, eps / over)], seed=seed, clip=None)
        rows.append([*(1 - float(f.fooled.float().mean()) for f in found), float(own.fosc.median())])
    table, n = np.array(rows), len(_OVER)
    arrays: Arrays = {
        "attacks": np.array(["FGSM", "PGD-20", "PGD-20, margin"]), "step_eps_over": np.array(_OVER),
        "steps": np.array(_COUNTS), "accuracy_by_step": table[:n, :3], "accuracy_by_steps": table[n:, :3],
        "median_fosc_by_step": table[:n, 3], "median_fosc_by_steps": table[n:, 3],
    }  # fmt: skip

    def plot(figure: Any) -> None:
        for panel, over, name, title in zip(
            figure.subplots(1, 2, sharey=True), (_OVER, _COUNTS), ("step", "steps"),
            ("20 steps of eps over", "steps of eps/6"), strict=True,
        ):  # fmt: skip
            for attack, line in zip(arrays["attacks"], arrays[f"accuracy_by_{name}"].T, strict=True):
                panel.plot(over, line, "o-", label=attack)
            panel.set(xlabel=title, ylabel="accuracy under")
            panel.legend(fontsize=7)

    return arrays, _drawn(plot, (8, 3.6))


def _net(images: Tensor, labels: Tensor, width: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return zoo.lenet(int(labels.max()) + 1, _shape(images), width=width)


TOPICS = {"schedules": schedules, "steps": steps}
