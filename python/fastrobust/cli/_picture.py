"""The picture of an attack: originals, perturbations and adversarial examples, one column an example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

COLUMNS = 8
ROWS = 3
_GOOD, _BAD, _INK, _QUIET = "#1a7f37", "#c1121f", "#1f2328", "#6e7781"


def drawable(images: Tensor) -> bool:
    return images.dim() == 4 and images.shape[1] in (1, 3)


def pick(labels: Tensor, before: Tensor, after: Tensor, columns: int = COLUMNS) -> Tensor:
    """Indices to show: examples that fell first, one of each class before a second of any, then the others."""
    rank: dict[tuple[int, bool], int] = {}
    order = []
    for i, (label, fell) in enumerate(
        zip(labels.tolist(), ((before == labels) & (after != labels)).tolist(), strict=True)
    ):
        seen = rank[label, fell] = rank.get((label, fell), -1) + 1
        order.append((not fell, seen, label, i))
    chosen = [key[-1] for key in sorted(order)[:columns]]
    return torch.tensor(sorted(chosen, key=lambda i: (int(labels[i]), i)), dtype=torch.int64)


def draw(images: Tensor, adversarial: Tensor, labels: Tensor, before: Tensor, after: Tensor, title: str) -> Any:
    """A matplotlib figure of 3 rows and one column for each example given (needs matplotlib)."""
    from matplotlib.figure import Figure

    columns = len(images)
    delta = (adversarial - images).double()
    scale = max(float(delta.abs().max()) if delta.numel() else 0.0, 1e-12)
    left, right, top, bottom = 0.95, 1.0, 0.8, 0.15  # inches around the panels: row names, colour bar, titles
    cell, gap = 1.15, 0.33
    width = left + max(columns, 4) * cell + right
    height = top + ROWS * (cell + gap) + bottom
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    figure.text(left / width, 1 - 0.16 / height, title, fontsize=9.5, color=_INK, weight="bold", va="top")
    heads = ("original", "perturbation", "adversarial")
    bar = None
    for column in range(columns):
        true, was, now = int(labels[column]), int(before[column]), int(after[column])
        panels = (
            (images[column], f"true {true}", _INK)
            if was == true
            else (images[column], f"true {true}, says {was}", _BAD),
            (delta[column], f"max {float(delta[column].abs().max()):.3g}", _QUIET),
            (adversarial[column], f"says {now}", _GOOD if now == true else _BAD),
        )
        for row, (panel, caption, colour) in enumerate(panels):
            x = left + column * cell
            y = height - top - (row + 1) * cell - row * gap
            axes = figure.add_axes((x / width, y / height, (cell - 0.1) / width, (cell - 0.1) / height))
            shown = _show(axes, panel, scale if row == 1 else None)
            bar = shown if row == 1 and panel.shape[0] == 1 else bar
            axes.set_title(caption, fontsize=7.5, color=colour, pad=2.5)
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_color(colour if row == 2 else "#d0d7de")
                spine.set_linewidth(1.4 if row == 2 else 0.6)
            if column == 0:
                axes.set_ylabel(heads[row], fontsize=8.5, color=_INK, labelpad=6)
    _legend(figure, bar, scale, (left + columns * cell + 0.05) / width, height, top, cell, gap, width)
    return figure


def _show(axes: Any, panel: Tensor, scale: float | None) -> Any:
    """scale: a perturbation, whose largest magnitude takes the full colour; grey ones in blue (down) and red (up)."""
    if panel.shape[0] == 1:
        lo, hi, colours = (0.0, 1.0, "gray") if scale is None else (-scale, scale, "RdBu_r")
        return axes.imshow(panel[0].numpy(), cmap=colours, vmin=lo, vmax=hi, interpolation="nearest")
    rgb = panel if scale is None else (0.5 + panel / (2 * scale)).clamp(0, 1)
    return axes.imshow(rgb.permute(1, 2, 0).numpy(), interpolation="nearest")


def _legend(
    figure: Any, bar: Any, scale: float, x: float, height: float, top: float, cell: float, gap: float, width: float
) -> None:
    """Right of the perturbations: their colour scale (grey) or their amplification (RGB: mid grey is no change)."""
    y = (height - top - 2 * cell - gap) / height
    if bar is None:
        text = f"x {1 / (2 * scale):.0f} around grey"
        figure.text(x, y + (cell - 0.1) / 2 / height, text, fontsize=7, color=_QUIET, va="center")
        return
    axes = figure.add_axes((x, y, 0.09 / width, (cell - 0.1) / height), label="scale")
    colours = figure.colorbar(bar, cax=axes, ticks=[-scale, 0, scale])
    colours.ax.set_yticklabels([f"-{scale:.3g}", "0", f"+{scale:.3g}"], fontsize=7, color=_QUIET)
    colours.ax.tick_params(length=2, color=_QUIET)
    colours.outline.set_linewidth(0.5)


def save(figure: Any, path: Path) -> None:
    """A PNG, whatever the file is called; drawn by Agg, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, format="png")
