"""What rows of ``benchmarks.attack_agreement`` say over their seeds, and as Markdown. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .page_tables import table


def means(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Over the seeds of each network and norm; what two runs of one attack differ in by luck, too."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(r["problem"] for r in rows):
        part = [r for r in rows if r["problem"] == name]
        mean = lambda field, part=part: sum(r[field] for r in part) / len(part)
        pairs = [(a, b) for k, a in enumerate(part) for b in part[:k]]
        luck = lambda who, pairs=pairs: max(
            (len(set(a["held"][who]) ^ set(b["held"][who])) for a, b in pairs), default=0
        )
        found[name] = {
            "seeds": len(part), "points": part[0]["points"], "clean": part[0]["clean"], "ours": mean("ours"),
            "public": mean("public"), "apart": mean("ours") - mean("public"),
            "verdicts apart": max(r["points"] - r["alike"] for r in part),
            "verdicts of seeds apart": {"ours": luck("ours"), "public": luck("public")},
        }  # fmt: skip
    return found


def markdown(files: Sequence[Path]) -> str:
    rows = [row for file in files for row in json.loads(file.read_text())["rows"]]
    lines = []
    for name, m in means(rows).items():
        luck = m["verdicts of seeds apart"]
        lines.append(
            [
                name, str(m["seeds"]), f"{m['clean']:.1f} %", f"{m['ours']:.2f} %", f"{m['public']:.2f} %",
                f"{m['apart']:+.2f}", f"{m['verdicts apart']}",
                "" if m["seeds"] < 2 else f"{luck['ours']}; {luck['public']}",
            ]
        )  # fmt: skip
    head = [
        "network, norm, points", "seeds", "clean", "ours", "the public one", "points apart", "verdicts apart, at most",
        "of two seeds: ours; the public one",
    ]  # fmt: skip
    return table(head, lines)
