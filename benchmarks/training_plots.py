"""Plots of the tables of benchmarks.training_tables: bars with their spread over seeds and the printed figures; over
the width where the rows are widths.

python -m benchmarks.training_plots FILE.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def save(rows: Sequence[Row], table: str, out: Path) -> str:
    """FILE-TABLE.png of the rows of one table; what was written, or why nothing was."""
    try:
        import matplotlib
    except ImportError:
        return "no plot: it needs matplotlib"
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    own = [row for row in rows if row.get("table") == table]
    columns = [c for c in own[0]["ours"] if c not in ("seconds", "passes")]
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    if all(row["row"].isdigit() for row in own):
        _lines(axes, own, columns)
    else:
        _bars(axes, own, columns)
    axes.set_title(own[0]["about"].split(";")[0].split(":")[0], fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    path = out.with_name(f"{out.stem}-{table}.png")
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return str(path)


def _bars(axes: Any, rows: Sequence[Row], columns: Sequence[str]) -> None:
    width = 0.8 / len(rows)
    for k, row in enumerate(rows):
        places = [i + (k - (len(rows) - 1) / 2) * width for i in range(len(columns))]
        means = [row["ours"][c]["mean"] for c in columns]
        spread = [row["ours"][c]["deviation"] or 0.0 for c in columns]
        axes.bar(places, means, 0.9 * width, yerr=spread, capsize=2, label=row["row"])
        told = [(x, row["printed"][c]) for x, c in zip(places, columns, strict=True) if c in (row["printed"] or {})]
        if told:
            axes.plot(*zip(*told, strict=True), "k_", markersize=7, label="printed" if k == len(rows) - 1 else None)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("%")


def _lines(axes: Any, rows: Sequence[Row], columns: Sequence[str]) -> None:
    widths = [int(row["row"]) for row in rows]
    for column in columns:
        cells = [row["ours"][column] for row in rows]
        axes.errorbar(
            widths, [c["mean"] for c in cells], [c["deviation"] or 0.0 for c in cells], capsize=2, label=column
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("width")


def main(argv: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if argv is None else argv)
    if len(given) != 1 or given[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    rows = json.loads(Path(given[0]).read_text())["rows"]
    for table in dict.fromkeys(row["table"] for row in rows):
        print(save(rows, table, Path(given[0])))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
