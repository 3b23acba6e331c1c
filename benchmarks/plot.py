"""A picture of a run: how much slower the peers are, and how near the floor ours is."""

from __future__ import annotations

from pathlib import Path

from .case import Unavailable
from .harness import OK, Row, Run


def label(row: Row) -> str:
    return " ".join([row.work, *(str(value) for value in row.axes.values())])


def plot(run: Run, path: Path) -> None:
    """Bars of peer / ours (logarithmic) and of floor / ours, one group a row. Needs matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise Unavailable("--plot needs matplotlib, which is not installed") from None
    rows = [row for row in run.rows if row.ours.seconds is not None]
    if not rows:
        raise Unavailable("--plot has nothing to draw: no row of ours ran")
    names = list(dict.fromkeys(peer.name for row in rows for peer in row.peers if peer.status == OK))
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(13, 1.6 + 0.16 * len(rows) * (len(names) + 1)), width_ratios=(2, 1)
    )
    height = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        at, widths, errors = [], [], ([], [])  # type: ignore[var-annotated]
        for place, row in enumerate(rows):
            for peer in row.peers:
                if peer.name == name and peer.status == OK and peer.ratio:
                    at.append(place + (index - (len(names) - 1) / 2) * height)
                    widths.append(peer.ratio.median)
                    errors[0].append(peer.ratio.median - peer.ratio.low)
                    errors[1].append(peer.ratio.high - peer.ratio.median)
        left.barh(at, widths, height=height, xerr=errors, label=name, error_kw={"lw": 0.7})
    left.axvline(1, color="black", lw=0.8)
    left.set_xscale("log")
    left.set_xlabel("time of the peer / ours")
    left.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
    left.invert_yaxis()
    if names:
        left.legend(fontsize=7)
    with_floor = [(place, row.floor.fraction.median) for place, row in enumerate(rows) if row.floor]
    right.barh([place for place, _ in with_floor], [value for _, value in with_floor], height=0.5, color="grey")
    right.axvline(1, color="black", lw=0.8)
    right.set_xlabel("floor / ours (1: nothing left to gain)")
    about = run.metadata
    figure.suptitle(
        f"fastrobust on {about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}", fontsize=9
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
