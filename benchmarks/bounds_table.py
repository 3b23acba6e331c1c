"""Markdown of runs of the suite `bounds`: times, memory, what they are of the floor, and every peer.

    python -m benchmarks.bounds_table RUN.json [RUN.json ...] [--into docs/bounds_measured.md]

Rows of a later file take the place of the same rows of an earlier one, so that a run can be made in parts (`fastrobust
bench bounds --full --only REGEX`). With --into the text between the markers of that page is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .bounds import SUITE
from .figures import ratio
from .marked import machine, write_table
from .report import bytes_text, seconds_text

Row = dict[str, Any]
ABSENT = "-"


def read(paths: Sequence[Path]) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows of the suite, a later one in the place of an earlier one, and the metadata of the runs."""
    rows: dict[str, Row] = {}
    about = []
    for path in paths:
        content = json.loads(path.read_text())
        found = [row for row in content["rows"] if row["suite"] == SUITE.name]
        if not found:
            raise ValueError(f"{path}: got no rows of the suite {SUITE.name!r}, expected some")
        for row in found:
            rows[json.dumps([row["work"], row["axes"]], sort_keys=True)] = row
        about.append(content["metadata"])
    return list(rows.values()), about


def floor(row: Row) -> str:
    if row["floor"] is None:
        return ABSENT
    return f"{100 * row['floor']['fraction']['median']:.0f} % ({row['floor']['kind']})"


def against(row: Row, name: str) -> str:
    """The peer's time over ours and its memory, in bold where a bar is missed; * where the results differ."""
    peer = next((p for p in row["peers"] if p["name"] == name), None)
    if peer is None or peer["status"] == "skipped" or row["ours"]["status"] != "ok":
        return ABSENT
    if peer["status"] == "differs" or peer["ratio"] is None:
        return "*" if peer["status"] == "differs" else "failed"
    text = f"{ratio(peer['ratio']['median'])} ({bytes_text(peer['peak_bytes'])})"
    missed = any(t["against"] == name and t["verdict"] == "missed" for t in row["targets"])
    return f"**{text}**" if missed else text


def line(row: Row, peers: Sequence[str]) -> str:
    ours = row["ours"]
    axes = ", ".join(str(value) for value in row["axes"].values())
    if ours["status"] != "ok":
        cells = [row["work"], axes, f"**{ours['status']}**", ABSENT, ABSENT, *[ABSENT] * len(peers)]
    else:
        time, peak = seconds_text(ours["seconds"]["median"]), bytes_text(ours["peak_bytes"])
        cells = [row["work"], axes, time, peak, floor(row), *(against(row, name) for name in peers)]
    return "| " + " | ".join(cells) + " |"


def markdown(rows: Sequence[Row], about: Sequence[dict[str, Any]]) -> str:
    """A table for the rows of each set of axes, in order of first appearance; columns for the peers that any of them
    has."""
    tables: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        tables.setdefault(tuple(row["axes"]), []).append(row)
    lines = [machine(about)]
    for axes, group in tables.items():
        peers = list(dict.fromkeys(peer["name"] for row in group for peer in row["peers"]))
        head = ["work", ", ".join(axes), "ours", "peak", "of floor", *peers]
        lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *(line(row, peers) for row in group)]
    missed = sum(t["verdict"] == "missed" for row in rows for t in row["targets"])
    judged = sum(t["verdict"] != "not judged" for row in rows for t in row["targets"])
    lines += ["", f"{missed} of {judged} bars are missed."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return write_table(argv, "bounds_table", __doc__ or "", SUITE.name, lambda runs: markdown(*read(runs)))


if __name__ == "__main__":
    sys.exit(main())
