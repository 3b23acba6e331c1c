"""Markdown of the runs of the suite `networks`: one table of networks, one of activations, then every loss by name.

    python -m benchmarks.network_table RUN.json [RUN.json ...] [--into docs/binary_networks.md]

Rows of a later file take the place of the same rows of an earlier one, so that a run can be made in parts (`fastrobust
bench networks --full --only REGEX`). With --into the text between the markers of that page is replaced.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .marked import machine, write_table
from .models_of_others import WITH_ACTIVATIONS, variants
from .networks import AT_LEAST, FORWARD, GRADIENT, PASSES, SHARE, SUITE

FAILED, ABSENT = "failed", "-"


class Key(NamedTuple):
    network: str
    activation: str
    r: float
    batch: int
    work: str


Rows = dict[Key, dict[str, Any]]


def read(paths: Sequence[Path]) -> tuple[Rows, list[dict[str, Any]]]:
    """Rows of the suite by key, and the metadata of the runs."""
    rows: Rows = {}
    about = []
    for path in paths:
        content = json.loads(path.read_text())
        found = [row for row in content["rows"] if row["suite"] == SUITE.name]
        if not found:
            raise ValueError(f"{path}: got no rows of the suite {SUITE.name!r}, expected some")
        for row in found:
            axes = row["axes"]
            rows[Key(axes["network"], axes["activation"], axes["r"], axes["batch"], row["work"])] = row
        about.append(content["metadata"])
    return rows, about


def gain(row: dict[str, Any] | None) -> float | None:
    """Time of torch's better layout over ours; peers that computed something else do not count."""
    if row is None or row["ours"]["status"] != "ok":
        return None
    ratios = [peer["ratio"]["median"] for peer in row["peers"] if peer["status"] == "ok" and peer["ratio"]]
    return min(ratios, default=None)


def figure(value: float) -> str:
    """Two digits; three where two would show a missed bar as met."""
    if value >= 1.95:
        return f"{value:.0f}x" if value >= 9.95 else f"{value:.1f}x"
    return f"{value:.2f}x" if value >= AT_LEAST or value < AT_LEAST - 0.005 else f"{value:.3f}x"


def cell(row: dict[str, Any] | None, relu: float | None = None) -> str:
    """The ratio, and behind it the share of ReLU's; what is under its bar in bold."""
    if row is None:
        return ABSENT
    value = gain(row)
    if value is None:
        return f"**{FAILED}**" if row["ours"]["status"] != "ok" else "**differs**"
    text = figure(value)
    if relu is not None:
        text += f" ({value / relu:.2f})"
    return f"**{text}**" if value < AT_LEAST or (relu is not None and value / relu < SHARE) else text


def of_relu(rows: Rows, key: Key) -> float | None:
    if key.network not in WITH_ACTIVATIONS or key.activation == "ReLU":
        return None
    return gain(rows.get(key._replace(activation="ReLU")))


def grid(rows: Rows, chosen: Sequence[tuple[str, str]], with_activation: bool) -> list[str]:
    """One line a network, activation and rate; a column a pass and batch."""
    rates = sorted({key.r for key in rows})
    columns = [(work, batch) for work in PASSES for batch in sorted({key.batch for key in rows})]
    names = {FORWARD: "fwd", GRADIENT: "grad"}
    head = ["network", *(["activation"] if with_activation else []), "r", *(f"{names[w]} {b}" for w, b in columns)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for network, activation in chosen:
        for rate in rates:
            keys = [Key(network, activation, rate, batch, work) for work, batch in columns]
            if not any(key in rows for key in keys):
                continue
            first = [network, *([activation] if with_activation else []), f"{rate:g}"]
            lines.append("| " + " | ".join(first + [cell(rows.get(k), of_relu(rows, k)) for k in keys]) + " |")
    return lines


def losses(rows: Rows) -> list[str]:
    """Every row under a bar, the worst first, with both readings' spread."""
    found: list[tuple[float, str]] = []
    for key, row in rows.items():
        name = f"{key.network} {key.activation}, r {key.r:g}, batch {key.batch}, {key.work}"
        value, relu = gain(row), of_relu(rows, key)
        if value is None:
            differing = [f"{p['name']}: {p['status']} {p['reason']}".strip() for p in row["peers"]]
            found.append((0.0, f"{name}: {row['ours']['reason'] or '; '.join(differing)}"))
        elif value < AT_LEAST:
            best = min((p["ratio"] for p in row["peers"] if p["status"] == "ok"), key=lambda r: r["median"])
            found.append((value, f"{name}: {figure(value)} ({best['p20']:.2f}x to {best['p80']:.2f}x)"))
        elif relu is not None and value / relu < SHARE:
            found.append((value / relu, f"{name}: {value:.2f}x, {value / relu:.2f} of ReLU's {relu:.2f}x"))
    return [text for _, text in sorted(found)]


def markdown(rows: Rows, about: Sequence[dict[str, Any]]) -> str:
    under = losses(rows)
    lines = [
        machine(about),
        "",
        *grid(rows, [v for v in variants() if v[1] == "ReLU" or v[0] not in WITH_ACTIVATIONS], False),
    ]
    others = [v for v in variants() if v[0] in WITH_ACTIVATIONS]
    if any(key.activation != "ReLU" for key in rows if key.network in WITH_ACTIVATIONS):
        lines += [
            "",
            "Other activations; in brackets the share of ReLU's ratio in the same run:",
            "",
            *grid(rows, others, True),
        ]
    lines += ["", f"{len(under)} of {len(rows)} rows are under their bar ({AT_LEAST}x; {SHARE} of ReLU's ratio)."]
    if under:
        lines += ["", *(f"- {text}" for text in under)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    return write_table(argv, "network_table", __doc__ or "", SUITE.name, lambda runs: markdown(*read(runs)))


if __name__ == "__main__":
    sys.exit(main())
