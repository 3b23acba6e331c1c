"""The table at the end of a run, its JSON, and the progress bar."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .case import FLOOR
from .harness import DIFFERS, FAILED, MISSED, SKIPPED, Progress, Result, Row, Run, Silent
from .timing import Spread

SCHEMA = 1


def seconds_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def bytes_text(count: int | None) -> str:
    if count is None:
        return "-"
    if count < 1e5:
        return "<0.1 MB"
    return f"{count / 1e6:.1f} MB" if count < 1e8 else f"{count / 1e6:.0f} MB"


def passes_text(result: Result) -> str:
    """Images forwards / backwards through the model in one call."""
    return "-" if result.passes is None else f"{result.passes.forwards}/{result.passes.backwards}"


def ratio_text(result: Result) -> str:
    """ "5.3x ±2%"; "!" marks a result that differs from ours, "-" a peer that did not run."""
    if result.status == SKIPPED:
        return "-"
    if result.status == FAILED or result.ratio is None:
        return "failed"
    value = result.ratio.median
    text = f"{value:.0f}x" if value >= 99.5 else f"{value:.2g}x" if value >= 9.95 else f"{value:.2f}x"
    return f"{text} ±{100 * result.ratio.noise:.0f}%" + (" !" if result.status == DIFFERS else "")


def verdict_text(row: Row) -> str:
    parts = []
    for verdict in row.verdicts:
        goal, against = verdict.target.at_least, verdict.target.against
        wanted = f"{100 * goal:.0f}% of floor" if against == FLOOR else f"{goal:g}x {against}"
        parts.append(f"{wanted} {verdict.verdict if verdict.verdict != MISSED else 'MISSED'}")
    return "; ".join(parts)


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one table; the rows have the same axes and peers."""
    axes = list(rows[0].axes)
    peers = [peer.name for peer in rows[0].peers]
    counted = any(row.ours.passes for row in rows)
    passes = ["passes", "peers'"] if counted else []
    header = [
        "work", *axes, "ours", "noise", "floor", "bound by", "of floor", "peak", "peer's", *passes, *peers, "targets"
    ]  # fmt: skip
    cells = []
    for row in rows:
        ours = row.ours
        best = row.best_peer
        line = [row.work, *(str(row.axes[axis]) for axis in axes)]
        if ours.seconds is None:
            line += [ours.status, *[""] * (6 + len(passes))]
        else:
            line += [seconds_text(ours.seconds.median), f"±{100 * ours.seconds.noise:.0f}%"]
            if row.floor:
                bound = f"{row.floor.kind} {row.floor.where}".strip()
                line += [seconds_text(row.floor.seconds), bound, f"{100 * row.floor.fraction.median:.0f}%"]
            else:
                line += ["-", "-", "-"]
            line += [bytes_text(ours.peak_bytes), bytes_text(best.peak_bytes if best else None)]
            line += [passes_text(ours), "; ".join(passes_text(p) for p in row.peers)] if counted else []
        line += [ratio_text(peer) if ours.seconds else "" for peer in row.peers]
        cells.append([*line, verdict_text(row)])
    if not any(line[-1] for line in cells):
        header, cells = header[:-1], [line[:-1] for line in cells]
    return header, cells


def align(header: Sequence[str], cells: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a plain-text table: the first `left` columns and the last flush left, figures flush right."""
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    lines = []
    for line in [header, ["-" * width for width in widths], *cells]:
        parts = [
            text.ljust(width) if i < left or header[i] in ("targets", "bound by") else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(parts).rstrip())
    return lines


def groups(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one suite that share axes and peers make one table, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = (row.suite, tuple(row.axes), tuple(peer.name for peer in row.peers))
        found.setdefault(key, []).append(row)
    return list(found.values())


LEGEND = """\
ratios: peer / ours in the same rounds (above 1x ours is faster), ± half the span of the 20th and 80th percentiles;
"!" the peer's result differs from ours, "-" the peer is missing; noise: the same span of ours; floor: the least time
the work can take, measured in the same rounds; peak: memory of one call beyond its inputs, ours and the best peer's;
passes: images forwards / backwards through the model in one call, ours and each peer's in their order"""


def head(run: Run) -> list[str]:
    about = run.metadata
    build = about["build"]
    version = f"fastrobust {build['version']}, " if "version" in build else ""
    copy, matrix = run.machine.copy_bandwidth / 1e9, run.machine.matrix_rate / 1e9
    return [
        f"{about['gpu'] or about['cpu']}, {about['threads']} of {about['cpus']} CPUs, load {about['load']}",
        f"{version}torch {about['torch']}, Python {about['python']}, {about['date']}, level {about['level']}",
        f"measured here: copy {copy:.1f} GB/s (read plus written), matrix product {matrix:.0f} GFLOP/s",
        LEGEND,
    ]


def table(run: Run) -> str:
    """The whole report as text."""
    lines = head(run)
    for rows in groups(run.rows):
        header, cells = columns(rows)
        lines += ["", rows[0].suite, *align(header, cells, left=1 + len(rows[0].axes))]
    if run.notes:
        lines += ["", *run.notes]
    return "\n".join(lines)


def _spread(value: Spread | None) -> dict[str, float] | None:
    return None if value is None else {"median": value.median, "p20": value.low, "p80": value.high}


def _result(result: Result) -> dict[str, Any]:
    agreement = result.agreement
    return {
        "name": result.name,
        "status": result.status,
        "reason": result.reason,
        "seconds": _spread(result.seconds),
        "samples": result.samples,
        "ratio": _spread(result.ratio),
        "difference": None if agreement is None else agreement.difference,
        "measure": None if agreement is None else agreement.measure,
        "peak_bytes": result.peak_bytes,
        "passes": None if result.passes is None else dataclasses.asdict(result.passes),
    }


def as_dict(run: Run) -> dict[str, Any]:
    """The run as plain data; times in seconds, ratios peer / ours, fraction floor / ours."""
    return {
        "schema": SCHEMA,
        "metadata": run.metadata,
        "machine": {"copy_bandwidth": run.machine.copy_bandwidth, "matrix_rate": run.machine.matrix_rate},
        "rows": [
            {
                "suite": row.suite,
                "work": row.work,
                "axes": row.axes,
                "tolerance": row.tolerance,
                "ours": _result(row.ours),
                "peers": [_result(peer) for peer in row.peers],
                "floor": None
                if row.floor is None
                else {
                    "kind": row.floor.kind,
                    "where": row.floor.where,
                    "seconds": row.floor.seconds,
                    "fraction": _spread(row.floor.fraction),
                },
                "targets": [
                    {"against": v.target.against, "at_least": v.target.at_least, "got": v.got, "verdict": v.verdict}
                    for v in row.verdicts
                ],
            }
            for row in run.rows
        ],
        "notes": run.notes,
    }


def finite(value: Any) -> Any:
    """JSON has no inf and NaN: they become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def write_json(run: Run, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(finite(as_dict(run)), indent=1, allow_nan=False, default=str)
    path.write_text(text + "\n")


def no_bar(rows: int) -> Progress:
    return Silent()


def progress_bar(rows: int) -> Progress:
    """tqdm where it is installed, on stderr so that the table alone goes to stdout."""
    try:
        from tqdm import tqdm
    except ImportError:
        return Silent()
    bar: Progress = tqdm(total=rows, unit="row", file=sys.stderr, dynamic_ncols=True, leave=False)
    return bar
