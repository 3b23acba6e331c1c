"""Markdown of the files of benchmarks.certified_training: ours over the printed figure.

python -m benchmarks.certified_page FILE.json [FILE.json ...] [--into docs/training_certified.md]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import thesis_tables as thesis
from .marked import write_table

HEADS = {"fc1": "FC1", "cnn": "CNN"}


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        found = [row for row in json.loads(path.read_text())["rows"] if "train_images" in row and "ours" in row]
        if not found:
            raise ValueError(f"{path}: got no rows of certified_training, expected some")
        rows |= {row["key"]: row for row in found}
    return list(rows.values())


def cell(row: dict[str, Any], column: str) -> str:
    """Ours / printed."""
    digits = 4 if column.startswith("ACB") else 2
    ours, printed = row["ours"].get(column), row["printed"].get(column)
    return " / ".join("" if v is None else f"{v:.{digits}f}" for v in (ours, printed)).removesuffix(" / ")


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    columns = [c for c in thesis.COLUMNS if any(row["ours"].get(c) is not None for row in rows)]
    about = dict.fromkeys(
        f"{row['run']['cpu']}, {row['run']['threads']} threads, {row['run']['date'][:10]}, others used "
        f"{max(r['run'].get('others') or 0 for r in rows):.1f} CPUs" for row in rows
    )  # fmt: skip
    images = sorted({(row["train_images"], row["test_images"]) for row in rows})
    lines = [
        f"Ours / printed; {', '.join(f'{a} images of MNIST for training, {b} for the errors' for a, b in images)}; "
        f"{'; '.join(about)}. The printed figures are of 100 epochs.",
        "",
        f"| | epochs | {' | '.join(columns)} | s/epoch |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for row in rows:
        name = f"{HEADS[row['network']]} {row['method']}, {'l-inf' if row['norm'] == 'Linf' else 'l2'} {row['eps']:g}"
        cells = " | ".join(cell(row, c) for c in columns)
        lines.append(f"| {name} | {row['epochs']} | {cells} | {row['seconds'] / row['epochs']:.0f} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return write_table(argv, "certified_page", __doc__ or "", "certified", lambda runs: markdown(read(runs)))


if __name__ == "__main__":
    sys.exit(main())
