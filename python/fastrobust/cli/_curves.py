"""The curves of a training: loss, accuracies and rate over the epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_COLOURS = {"accuracy": "0.6", "eval_clean": "tab:blue", "eval_fgsm": "tab:orange", "eval_pgd": "tab:red"}
_LABELS = {
    "accuracy": "training, as attacked", "eval_clean": "validation, clean", "eval_fgsm": "validation, FGSM",
    "eval_pgd": "validation, PGD",
}  # fmt: skip


def save(history: list[dict[str, float]], result: dict[str, Any], title: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    epochs = [r["epoch"] for r in history]
    left.plot(epochs, [r["loss"] for r in history], color="0.2")
    left.set(xlabel="epoch", ylabel="training loss")
    rate = left.twinx()
    rate.plot(epochs, [r["lr"] for r in history], color="tab:green", linewidth=0.8)
    rate.set_ylabel("rate", color="tab:green")
    for name, colour in _COLOURS.items():
        points = [(r["epoch"], 100 * r[name]) for r in history if name in r]
        if points:
            right.plot(*zip(*points, strict=True), color=colour, label=_LABELS[name])
    for name, marker in (("last", "s"), ("best", "*")):
        for key, value in result.get(name, {}).items():
            if key.startswith("autoattack"):
                right.plot(
                    result[name]["epoch"], 100 * value, marker, color="black", label=f"test, AutoAttack ({name})"
                )
    right.set(xlabel="epoch", ylabel="accuracy, %", ylim=(0, 100))
    right.legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
