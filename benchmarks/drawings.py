"""Pictures of the rendered report, as svg elements of a page: ratios of all rows, and curves of what grows."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from typing import Any

from .case import OURS, Unavailable
from .entries import Entry
from .harness import OK

BEHIND, AHEAD, QUIET, INK = "#b3261e", "#0b5cad", "#8c959f", "#1f2328"
_LINES = ("#0b5cad", "#b3261e", "#1a7f37", "#9a6700", "#8250df", "#59636e")
LEAST_POINTS = 3  # of a curve; two for threads
MOST_ROWS = 60  # of one picture
MOST_CURVES = 12  # of one suite: rows of many axes have hundreds


def new_figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Unavailable("the pictures need matplotlib, which is not installed (pip install matplotlib)") from None
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Any, name: str) -> str:
    """An element without a date; ``name`` makes its ids its own among the pictures of a page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    FigureCanvasSVG(figure)
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    drawn = stream.getvalue()
    drawn = re.sub(r"\s*<metadata>.*?</metadata>", "", drawn[drawn.index("<svg") :], flags=re.DOTALL)
    key = re.sub(r"\W+", "-", name)
    return re.sub(r'id="(figure|axes|patch|text|matplotlib|xtick|ytick|line2d)', rf'id="{key}-\1', drawn)


def groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Rows with a ratio, a suite at a time, the worst first, at most MOST_ROWS in one picture."""
    found = []
    for suite in dict.fromkeys(e.suite for e in entries):
        rows = sorted((e for e in entries if e.suite == suite and e.ratio is not None), key=lambda e: e.ratio or 0)
        found += [rows[i : i + MOST_ROWS] for i in range(0, len(rows), MOST_ROWS)]
    return found


def ratios(rows: Sequence[Entry]) -> str:
    """A bar from 1x to the best peer's ratio for each row, red where ours is slower, and a dot for each other peer."""
    figure = new_figure(10, 1.0 + 0.19 * len(rows))
    axes = figure.add_subplot()
    for place, e in enumerate(rows):
        best = e.best
        assert best is not None and best.ratio is not None
        value, colour = best.ratio.median, BEHIND if best.ratio.median < 1 else AHEAD
        axes.barh(place, value - 1, left=1, height=0.62, color=colour)
        axes.plot([best.ratio.low, best.ratio.high], [place, place], color=INK, linewidth=1)
        dots = [o.ratio.median for o in e.others if o.status == OK and o.ratio is not None and o is not best]
        axes.plot(dots, [place] * len(dots), ".", color=QUIET, markersize=4)
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_xscale("log")
    values = [o.ratio.median for e in rows for o in e.others if o.status == OK and o.ratio]
    axes.set_xlim(min(0.8, 0.8 * min(values)), max(1.25, 1.25 * max(values)))
    _plain_ticks(axes.xaxis, *axes.get_xlim())
    axes.set_yticks(range(len(rows)), [e.title for e in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("time of the peer / ours; bar: the best peer (red: ours is slower), dots: the others", fontsize=8)
    axes.set_title(f"suite {rows[0].suite}", fontsize=10, loc="left")
    _quiet(axes)
    return svg(figure, f"ratios-{rows[0].suite}-{rows[0].run}-{rows[0].title}")


def number(value: Any) -> float | None:
    """The size that an axis' value stands for: itself, or the product of a shape such as 16x1x28x28."""
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value) if value > 0 else None
    if isinstance(value, str) and re.fullmatch(r"\d+(x\d+)+", value):
        return float(math.prod(int(side) for side in value.split("x")))
    return None


Curve = tuple[str, list["Entry"]]  # the axis that varies, and the rows along it


def curves(entries: Sequence[Entry]) -> list[Curve]:
    """Rows of a run that differ in one axis of sizes alone, with LEAST_POINTS values or more of it."""
    found: dict[str, Curve] = {}
    for axis in dict.fromkeys(axis for e in entries for axis in e.axes):
        for e in entries:
            if axis not in e.axes or e.seconds is None or number(e.axes[axis]) is None:
                continue
            rest = {name: value for name, value in e.axes.items() if name != axis}
            key = json.dumps([e.run, e.suite, e.work, axis, rest], default=str)
            found.setdefault(key, (axis, []))[1].append(e)
    chosen: list[Curve] = []
    for axis, rows in found.values():
        values = {number(e.axes[axis]) for e in rows}
        drawn = sum(1 for _, others in chosen if others[0].suite == rows[0].suite)
        if (
            drawn < MOST_CURVES
            and len(values) == len(rows)
            and len(values) >= (2 if axis == "threads" else LEAST_POINTS)
        ):
            chosen.append((axis, sorted(rows, key=lambda e: number(e.axes[axis]) or 0)))
    return chosen


def curve(given: Curve) -> str:
    """Seconds of ours, of each peer and of the floor along one axis, both logarithmic."""
    axis, rows = given
    figure = new_figure(6.2, 3.6)
    axes = figure.add_subplot()
    lines: dict[str, list[tuple[float, float]]] = {OURS: []}
    for e in rows:
        at = number(e.axes[axis])
        assert at is not None and e.seconds is not None
        lines[OURS].append((at, e.seconds.median))
        for other in e.others:
            if other.status == OK and other.seconds is not None:
                lines.setdefault(other.name, []).append((at, other.seconds))
        if e.floor is not None:
            lines.setdefault(f"floor ({e.floor[0].split()[0]})", []).append((at, e.floor[1]))
    for k, (name, points) in enumerate(lines.items()):
        floor = name.startswith("floor")
        style = {"color": QUIET, "linestyle": ":"} if floor else {"color": _LINES[k % len(_LINES)]}
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            marker="o",
            markersize=3,
            linewidth=2.2 if name == OURS else 1.2,
            label=name,
            **{"linestyle": "-", **style},
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([number(e.axes[axis]) or 0 for e in rows], [str(e.axes[axis]) for e in rows], fontsize=7)
    axes.xaxis.set_minor_locator(_none())
    axes.tick_params(axis="x", rotation=30 if any(len(str(e.axes[axis])) > 6 for e in rows) else 0)
    rest = " ".join(str(value) for name, value in rows[0].axes.items() if name != axis)
    axes.set_title(f"{rows[0].suite}: {rows[0].work} {rest}".strip(), fontsize=9, loc="left")
    axes.set_xlabel(axis, fontsize=8)
    axes.set_ylabel("seconds", fontsize=8)
    axes.legend(fontsize=7, frameon=False)
    _quiet(axes)
    return svg(figure, f"curve-{rows[0].run}-{rows[0].suite}-{rows[0].work}-{axis}-{rest}")


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _plain_ticks(axis: Any, low: float, high: float) -> None:
    """0.5x, 1x, 2x, 5x, 10x instead of powers."""
    steps = [base * 10.0**k for k in range(-4, 7) for base in (1, 2, 5)]
    inside = [step for step in steps if low <= step <= high]
    if len(inside) > 10:
        inside = [step for step in inside if math.isclose(math.log10(step), round(math.log10(step)))]
    axis.set_ticks(inside, [f"{step:g}x" for step in inside], fontsize=8)
    axis.set_minor_locator(_none())


def _quiet(axes: Any) -> None:
    axes.grid(color="#d1d9e0", linewidth=0.5)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
