"""Markdown of the files of benchmarks.training_tables: ours, its spread over seeds, and the printed figure.

python -m benchmarks.training_page FILE.json [FILE.json ...] [--into docs/training_methods.md]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .marked import write_table

BUSY = 0.3  # CPUs that other programs used, above which seconds say nothing


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        found = [row for row in json.loads(path.read_text())["rows"] if "ours" in row and "sizes" in row]
        if not found:
            raise ValueError(f"{path}: got no rows of training_tables, expected some")
        rows |= {row["key"]: row for row in found}
    return list(rows.values())


def cell(row: dict[str, Any], column: str) -> str:
    """Mean (deviation); printed."""
    ours, printed = row["ours"][column], row["printed"]
    digits = 2 if printed or column in ("seconds", "passes") else 3
    spread = "" if ours["deviation"] is None else f" ({ours['deviation']:.{digits}f})"
    beside = f"; {printed[column]:.2f}" if printed and column in printed else ""
    return f"{ours['mean']:.{digits}f}{spread}{beside}"


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        tables.setdefault(row["table"], []).append(row)
    lines = []
    for group in tables.values():
        first = group[0]
        quiet = all((row["run"].get("others") or 0.0) <= BUSY for row in group)
        columns = [c for c in first["ours"] if quiet or c != "seconds"]
        run, sizes = first["run"], first["sizes"]
        epochs = round(1.9 * sizes["epochs"]) if first["table"] == "thesis-4.6" else sizes["epochs"]
        size = "" if not first["printed"] else f" {sizes['train']} images of {sizes['source']}, {epochs} epochs;"
        size += f" eps {sizes['eps']:g} (printed: .3), rate {sizes['rate']:g};" if first["table"] == "wang-1" else ""
        size += "" if quiet else " not timed: the machine was busy;"
        lines += [
            f"{first['about']}.{size} {sizes['seeds']} seeds;{' printed behind;' if first['printed'] else ''} "
            f"{run['cpu']}, {run['threads']} threads, {run['date'][:10]}.",
            "",
            f"| | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
            *(f"| {row['row']} | {' | '.join(cell(row, c) for c in columns)} |" for row in group),
            "",
        ]
    return "\n".join(lines).strip()


def main(argv: Sequence[str] | None = None) -> int:
    return write_table(argv, "training_page", __doc__ or "", "training", lambda runs: markdown(read(runs)))


if __name__ == "__main__":
    sys.exit(main())
