"""What `fastrobust analyse` runs of the thesis' tables 5.3 and 5.4, and of bounds and theorems in small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..training import loader
from ..training.registry import make
from . import convergence as games
from . import overparametrized as wide
from . import subnetwork as nets
from ._topics import Arrays, Draw, _drawn
from ._topics_training import _base, _robust, _shape

_EPS, _STEPS, _EPOCHS, _BATCH, _RATE = 0.1, 5, 6, 64, 0.97
_RANGES, _GAMMAS, _INITS = (0.001, 0.01, 0.1, 1.0), (0.1, 1.0), ("signed_constant", "binary")
_WIDTHS, _DESCENT, _GAME_STEPS = (16, 64, 256), 100, (250, 1000, 4000)


def initialisation(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Thesis tables 5.3 to 5.5, figure 5.1: robust accuracy of subnetworks (97 % pruned) with and without the last
    batch norm, by the range of the scores, and by how weights are initialised and gamma; learning curves; and the
    accuracy of plainly trained ones."""
    held = torch.arange(len(images)) % 4 == 0
    batches = loader(images[~held], labels[~held], _BATCH, seed=seed)
    method = make("edge-popup", eps=_EPS, steps=_STEPS)
    judge = lambda m: _robust(m, images[held], labels[held], _EPS)
    ranges = [{"rate": _RATE, "gamma": 0.1, "init": "binary", "score_range": a} for a in _RANGES]
    inits = [{"rate": _RATE, "gamma": g, "init": i} for i in _INITS for g in _GAMMAS if (i, g) != ("binary", 0.1)]
    clean = lambda m: _robust(m, images[held], labels[held], 0.0)
    plain = [{"rate": _RATE, "gamma": g, "init": i} for i in _INITS for g in _GAMMAS]
    by_range, by_init, curves, plainly = [], [], [], []
    for last in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            base = _base(int(labels.max()) + 1, _shape(images), 16)
        if not last:
            base = nn.Sequential(*list(base.children())[:-1])
        curve: list[float] = []
        found = nets.study(
            base, batches, [*ranges, *inits], judge, epochs=_EPOCHS, method=method, seed=seed,
            callbacks=lambda m, _, curve=curve: curve.append(judge(m)),
        )  # fmt: skip
        vanilla = make("edge-popup", eps=0.0, steps=1)
        found_plain = nets.study(base, batches, plain, clean, epochs=_EPOCHS, method=vanilla, seed=seed)
        plainly.append(found_plain.reshape(len(_INITS), len(_GAMMAS)))
        by_range.append(found[: len(ranges)])
        table = np.append(found[len(ranges) :], np.nan)
        table[-2:] = found[1], table[-2]  # binary, gamma 0.1 is the range 0.01 of before
        by_init.append(table.reshape(len(_INITS), len(_GAMMAS)))
        curves.append(np.array(curve).reshape(-1, _EPOCHS)[: len(ranges)])
    arrays: Arrays = {
        "score_ranges": np.array(_RANGES), "last_norm": np.array([False, True]), "by_range": np.stack(by_range),
        "inits": np.array(_INITS), "gammas": np.array(_GAMMAS), "by_init": np.stack(by_init),
        "curves": np.stack(curves), "plain_by_init": np.stack(plainly),
    }  # fmt: skip

    def plot(figure: Any) -> None:
        left, middle, right = figure.subplots(1, 3, sharey=True)
        for name, row, lines, style in zip(("no LBN", "LBN"), by_range, curves, ("--", "-"), strict=True):
            left.semilogx(_RANGES, row, f"o{style}", label=name)
            for a, line in zip(_RANGES, lines, strict=True):
                right.plot(np.arange(1, _EPOCHS + 1), line, style, label=f"{name}, a = {a:g}")
        left.set(xlabel="range of the scores", ylabel="robust accuracy")
        left.legend()
        for i, init in enumerate(_INITS):
            for j, gamma in enumerate(_GAMMAS):
                middle.bar(
                    [4 * i + 2 * j, 4 * i + 2 * j + 0.8],
                    arrays["by_init"][:, i, j],
                    0.75,
                    color=["tab:grey", "tab:blue"],
                )
                middle.text(4 * i + 2 * j, 0.02, f"{init.split('_')[0]}\n{gamma:g}", fontsize=7)
        middle.set(title="by initialisation and gamma (blue: LBN)", xticks=[])
        right.set(xlabel="epoch")
        right.legend(fontsize=6)

    return arrays, _drawn(plot, (11, 3.6))


def convergence(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Thesis theorems 5.3 and 5.4 (ATAS, ATTA) and Wang et al., theorem 1: regret and gradient norms on a
    convex-concave game beside the bounds, over the steps. The images play no part."""
    steps, rows = _GAME_STEPS, ("all", "one")
    game = games.game(50, seed=seed)
    left, right, derived = (np.zeros((2, 2, len(steps))) for _ in range(3))
    for i, run in enumerate((games.theorem_5_4, games.theorem_5_3)):
        for j, moved in enumerate(rows):
            for k, count in enumerate(steps):
                found = run(game, steps=count, rows=moved, runs=2, seed=seed)
                left[i, j, k], right[i, j, k] = found.printed.left[0], found.printed.right[0]
                derived[i, j, k] = found.derived.right[0]
    deltas = (0.1, 0.01, 0.001)
    norms = [[games.theorem_1_wang(game, d, steps=t, batch=4, seed=seed) for t in (100, 1000)] for d in deltas]
    arrays: Arrays = {
        "theorems": np.array(["5.4", "5.3"]), "rows": np.array(rows), "steps": np.array(steps), "regret": left,
        "bound": right, "derived_bound": derived, "deltas": np.array(deltas), "wang_steps": np.array([100, 1000]),
        "wang_left": np.array([[s.left[0] for _, s in row] for row in norms]),
        "wang_right": np.array([[s.right[0] for _, s in row] for row in norms]),
    }  # fmt: skip

    return arrays, _drawn(lambda figure: _plot_convergence(figure, arrays), (11, 3.6))


def _plot_convergence(figure: Any, arrays: Arrays) -> None:
    panels, steps = figure.subplots(1, 3), arrays["steps"].tolist()
    for panel, name, i in ((panels[0], "5.4, SGDBCA", 0), (panels[1], "5.3, ASGDBCA", 1)):
        for j, moved in enumerate(arrays["rows"].tolist()):
            panel.loglog(steps, arrays["regret"][i, j], "o-", label=f"{moved} row{'s' * (moved == 'all')} a step")
        panel.loglog(steps, arrays["bound"][i, 0], "k--", label="bound as printed")
        panel.loglog(steps, arrays["derived_bound"][i, 1], "k:", label="bound for one row a step")
        panel.set(title=f"Regret, theorem {name}", xlabel="steps")
        _only(panel, steps)
    panels[1].legend(fontsize=7)
    panels[2].loglog(arrays["deltas"], arrays["wang_left"][:, 1], "o-", label="mean squared gradient")
    panels[2].loglog(arrays["deltas"], arrays["wang_right"][:, 1], "k--", label="bound")
    panels[2].set(title="Wang et al., theorem 1", xlabel="FOSC allowed")
    panels[2].legend(fontsize=7)


def overparametrized(images: Tensor, labels: Tensor, seed: int) -> tuple[Arrays, Draw]:
    """Gao et al., theorems 4.1, 5.1, 5.2 and 6.1 in small, on the corners +-e_i of four dimensions: loss, distance
    from the start and from the linearisation by width; plain beside robust training. The images play no part."""
    d, reach = 4, 0.2
    eye = torch.eye(d, dtype=torch.float64)
    x, y = torch.cat([eye, -eye]), torch.where(torch.arange(2 * d) % d < d // 2, 1.0, -1.0).double()
    rows: dict[str, list[float]] = {}
    for width in _WIDTHS:
        options: dict[str, Any] = {"reach": reach, "steps": _DESCENT, "step": 4.0, "seed": seed}
        deep, _ = wide.theorem_4_1(x, y, width, **options)
        robust, _ = wide.theorem_5_1(x, y, width, **(options | {"step": 10.0}))
        plain, _ = wide.theorem_5_1(x, y, width, **(options | {"step": 10.0, "reach": 0.0}))
        _, there = wide.theorem_5_2(x, y, width, reach=reach, seed=seed)
        strong = wide.attack(reach, steps=20, restarts=3, seed=seed + 1)
        with torch.no_grad():
            left = float(wide.loss(robust.model(strong(robust.model, x, y)), y).mean())
        for key, value in {
            "deep_loss": deep.losses.min(), "deep_distance": deep.distance, "loss": robust.losses.min(),
            "plain_loss": plain.losses.min(), "distance": robust.distance, "strong_loss": left,
            "linearisation_gap": wide.linearisation_gap(wide.Paired(d, width, seed), robust.model, x),
            "exists_loss": there.left[0], "exists_distance": there.left[1],
        }.items():  # fmt: skip
            rows.setdefault(key, []).append(float(value))
    shattered = [
        (n, k, len(wide.theorem_6_1(n, k)[0]), wide.theorem_6_1(n, k)[1].margin) for n in (2, 8) for k in (3, 8)
    ]
    arrays: Arrays = {"widths": np.array(_WIDTHS), "shattered": np.array(shattered)}
    arrays |= {key: np.array(row) for key, row in rows.items()}

    def plot(figure: Any) -> None:
        panels = figure.subplots(1, 3)
        for key in ("deep_loss", "loss", "plain_loss", "strong_loss", "exists_loss"):
            panels[0].loglog(_WIDTHS, rows[key], "o-", label=key.replace("_", " "))
        for key in ("deep_distance", "distance", "exists_distance"):
            panels[1].loglog(_WIDTHS, rows[key], "o-", label=key.replace("_", " "))
        panels[2].loglog(_WIDTHS, rows["linearisation_gap"], "o-", label="linearisation gap")
        for panel in panels:
            panel.set_xlabel("width")
            _only(panel, _WIDTHS)
            panel.legend(fontsize=7)

    return arrays, _drawn(plot, (11, 3.6))


def _only(panel: Any, values: Sequence[int]) -> None:
    """These ticks, and none between them."""
    panel.set_xticks(values, [str(v) for v in values])
    panel.set_xticks([], minor=True)


TOPICS = {"initialisation": initialisation, "convergence": convergence, "overparametrized": overparametrized}
