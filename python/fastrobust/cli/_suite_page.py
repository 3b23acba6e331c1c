"""What an evaluation by several attacks found: its text, its curve, and a page that needs no other file."""

from __future__ import annotations

import dataclasses
import html
import io
from collections.abc import Iterator
from typing import Any

from ..attacks import EvaluationReport
from . import _report as report

_COLOURS = ("#1f6feb", "#c1121f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
_INK, _QUIET = "#1f2328", "#6e7781"


def rows(setting: dict[str, Any], found: dict[str, Any], whole: EvaluationReport) -> list[report.Row]:
    """Attack, model, data, device, accuracies, and whether ball and box hold."""
    names = ", ".join(a.name for a in whole.attacks)
    first = [("attack", f"autoattack ({setting['suite']}: {names}), {setting['norm']}, eps {setting['eps']:.6g}")]
    between = []
    if whole.certified is not None:
        share = 100 * whole.certified / max(whole.examples, 1)
        between = [("", f"proven {share:.2f} %, so the robust accuracy lies between this and the line above")]
    passes = f"{whole.forwards} forwards and {whole.backwards} backwards of an image"
    processes = f" on {setting['processes']} processes" * (setting["processes"] > 1)
    last = [("time", f"{whole.seconds:.2f} s{processes}, {passes}")]
    return [*first, *report.head(setting, found), *between, *report.perturbation(setting, found), *last]


def text(setting: dict[str, Any], found: dict[str, Any], whole: EvaluationReport) -> str:
    """The rows, and the attacks as a table."""
    table = [line for line in str(whole).splitlines()[1:] if not line.startswith("note: ")]
    return "\n".join([report.lines(rows(setting, found, whole)), "", *table])


@dataclasses.dataclass
class Steps:
    """Robust accuracy in per cent from ``seconds[k]`` on, while one attack runs."""

    name: str
    seconds: list[float]
    accuracy: list[float]


def curves(whole: EvaluationReport) -> Iterator[Steps]:
    """One for each attack that had something to attack; each begins where the one before ended."""
    now = whole.seconds - sum(a.seconds for a in whole.attacks)  # the clean pass and the proofs
    accuracy = whole.clean_accuracy
    for attack in whole.attacks:
        if not attack.attacked:
            continue
        seconds, left = [now], [100 * accuracy]
        for when, broken in attack.curve:
            seconds.append(now + when)
            left.append(100 * (accuracy - broken / whole.examples))
        now, accuracy = now + attack.seconds, attack.robust_accuracy
        yield Steps(attack.name, [*seconds, now], [*left, 100 * accuracy])


def draw(whole: EvaluationReport, title: str) -> Any:
    """A matplotlib figure: robust accuracy against seconds, a step curve for each attack (needs matplotlib)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.8), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for k, steps in enumerate(curves(whole)):
        colour = _COLOURS[k % len(_COLOURS)]
        axes.step(steps.seconds, steps.accuracy, where="post", color=colour, linewidth=1.8, label=steps.name)
        axes.plot(steps.seconds[-1:], steps.accuracy[-1:], "o", color=colour, markersize=3.5)
    if whole.certified is not None:
        proven = 100 * whole.certified / max(whole.examples, 1)
        axes.axhline(proven, color=_QUIET, linewidth=1, linestyle="--", label="proven")
    axes.set_ylim(0, max(100 * whole.clean_accuracy * 1.05, 1))
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds", color=_INK)
    axes.set_ylabel("robust accuracy in %", color=_INK)
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    axes.grid(color="#d0d7de", linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)
    return figure


def svg(figure: Any) -> str:
    """The same drawing as an element of a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(stream, format="svg", metadata={"Date": None})
    drawn = stream.getvalue()
    return drawn[drawn.index("<svg") :]


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;color:#1f2328;max-width:50em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;border-bottom:1px solid "
    "#d0d7de;text-align:right}"
    "td:first-child,th:first-child{text-align:left}.setting td{text-align:left;border:0;vertical-align:top}"
    "svg{max-width:100%;height:auto}.note{border-left:4px solid #c1121f;padding:.2em .8em;margin:.5em 0}"
    ".big{font-size:1.5em}"
)


def page(setting: dict[str, Any], found: dict[str, Any], whole: EvaluationReport, drawing: str | None) -> str:
    """HTML with everything in it. ``drawing``: an svg element, None without matplotlib."""
    say = html.escape
    cell = lambda values, tag="td": "".join(f"<{tag}>{say(str(v))}</{tag}>" for v in values)
    line = lambda values, tag="td": f"<tr>{cell(values, tag)}</tr>"
    percent = lambda share: f"{100 * share:.2f} %"
    table = [line(("attack", "attacked", "broken", "robust after it", "seconds", "forwards", "backwards"), "th")]
    table.append(line(("clean", "", "", percent(whole.clean_accuracy), "", "", "")))
    if whole.certified is not None:
        table.append(
            line(("proven", "", whole.certified, percent(whole.certified / max(whole.examples, 1)), "", "", ""))
        )
    for a in whole.attacks:
        values = (a.name, a.attacked, a.broken, percent(a.robust_accuracy), f"{a.seconds:.1f}", a.forwards, a.backwards)
        table.append(line(values))
    table.append(
        line(("all", "", "", percent(whole.robust_accuracy), f"{whole.seconds:.1f}", whole.forwards, whole.backwards))
    )
    settings = [line(row) for row in rows(setting, found, whole)]
    settings.append(line(("seed", setting["seed"])))
    settings.append(line(("fastrobust", f"{setting['version']}, torch {setting['torch']}")))
    title = f"Robust accuracy {percent(whole.robust_accuracy)}"
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{say(title)}</title><style>{_STYLE}</style></head>',
        f"<body><h1>{say(title)}</h1>",
        f'<p class="big">of {whole.examples} images, of which {percent(whole.clean_accuracy)} are classified rightly '
        f"without an attack; {say(setting['norm'])}, eps {setting['eps']:.6g}.</p>",
        *(f'<p class="note">{say(note)}</p>' for note in whole.notes),
        drawing or "<p>(The curve of robust accuracy against seconds needs matplotlib.)</p>",
        f"<table>{''.join(table)}</table>",
        f'<table class="setting">{"".join(settings)}</table>',
        "<p>An attack meets the images that the ones before it left; forwards and backwards count images that went "
        "through "
        "the model. What no attack broke may still be broken by another one: the robust accuracy is an upper "
        "bound.</p>",
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"
