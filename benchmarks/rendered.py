"""Runs as pages: Markdown, and one HTML file with its pictures inside. What is slower than a peer comes first.

fastrobust bench --report RUN.json [RUN.json ...] [--html OUT.html] [--markdown OUT.md]
"""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .case import OURS, Unavailable
from .compare import Content, read
from .entries import Entry, Other
from .harness import DIFFERS, FAILED, OK, OTHERS_ALLOWED, SKIPPED
from .marked import machine
from .report import bytes_text, seconds_text
from .timing import Spread


@dataclass
class Report:
    entries: list[Entry] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)  # their metadata
    names: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def behind(self) -> list[Entry]:
        """Rows under 1x of the best peer, the worst first."""
        return sorted((e for e in self.entries if e.ratio is not None and e.ratio < 1), key=lambda e: e.ratio or 0)

    @property
    def ahead(self) -> list[Entry]:
        """Rows of 1x and more, the least first: what is nearest to a loss."""
        return sorted((e for e in self.entries if e.ratio is not None and e.ratio >= 1), key=lambda e: e.ratio or 0)

    @property
    def unjudged(self) -> list[Entry]:
        """Rows that failed, or that no peer did with the same result."""
        return [e for e in self.entries if e.ratio is None]


def _spread(value: Any) -> Spread | None:
    return None if not value else Spread(*(float(value[name]) for name in ("median", "p20", "p80")))


def _passes(result: Content) -> str:
    found = result.get("passes")
    return "" if not found else f"{found['forwards']}/{found['backwards']}"


def _entry(run: int, row: Content) -> Entry:
    others = tuple(
        Other(
            p["name"], p["status"], p["reason"] or _difference(p), _spread(p["ratio"]),
            None if not p["seconds"] else float(p["seconds"]["median"]), _passes(p),
        )
        for p in row["peers"]
    )  # fmt: skip
    ours, floor = row["ours"], row["floor"]
    bound = None
    if floor:
        bound = f"{floor['kind']} {floor['where']}".strip(), floor["seconds"], float(floor["fraction"]["median"])
    missed = tuple(f"{t['at_least']:g}x {t['against']}" for t in row["targets"] if t["verdict"] == "missed")
    return Entry(
        run, row["suite"], row["work"], row["axes"], ours["status"], ours["reason"], _spread(ours["seconds"]),
        ours["peak_bytes"], _passes(ours), bound, others, missed,
    )  # fmt: skip


def _difference(result: Content) -> str:
    if result["status"] != DIFFERS:
        return ""
    return f"differs from ours by {float(result['difference']):.3g} ({result['measure']})"


def collect(paths: Sequence[Path]) -> Report:
    """The runs' rows. A JSON file that holds no run of the command is left out with a note; ValueError where none
    does."""
    found = Report()
    for path in paths:
        try:
            content = read(path)
        except ValueError as error:
            found.notes.append(f"left out: {error}")
            continue
        add(found, path.name, content)
    if not found.runs:
        raise ValueError("; ".join(found.notes) or "no file was given; expected runs of fastrobust bench")
    return found


def add(found: Report, name: str, content: Content) -> None:
    found.runs.append(content["metadata"])
    found.names.append(name)
    number = len(found.runs)
    found.entries += [_entry(number, row) for row in content["rows"]]
    busy = content["metadata"].get("others") or 0.0
    if busy > OTHERS_ALLOWED:
        found.notes.append(f"{name}: other processes used {busy:.1f} CPUs: its figures are not to be relied on")
    skipped = [line for line in content["notes"] if " skipped: " in line]
    found.notes += [f"{name}: {line}" for line in skipped]


def of_content(name: str, content: Content) -> Report:
    """A run that was just made."""
    found = Report()
    add(found, name, json.loads(json.dumps(content, default=str)))
    return found


# ---- words ----
def ratio_text(value: float) -> str:
    """Three digits around 1, so that a loss does not read as level."""
    return f"{value:.0f}x" if value >= 99.5 else f"{value:.3g}x" if value >= 1.995 else f"{value:.3f}x"


def summary(found: Report) -> str:
    ratios = [e.ratio for e in found.entries if e.ratio is not None and e.ratio > 0]
    noisy = sum(1 for e in found.behind if e.best and e.best.ratio and e.best.ratio.high >= 1)
    mean = f"; geometric mean {statistics.geometric_mean(ratios):.2f}x" if ratios else ""
    return (
        f"{len(found.entries)} rows: {len(found.behind)} slower than the best peer with the same result ({noisy} of "
        "them within "
        f"the noise), {len(found.ahead)} as fast or faster, {len(found.unjudged)} without such a peer{mean}. "
        f"{sum(1 for e in found.entries if e.missed)} miss a target."
    )


Cells = list[list[str]]


def compared(entries: Sequence[Entry], runs: int) -> tuple[list[str], Cells]:
    """Best peer and ratio of each row."""
    head = ["suite", "row", "ours", "best peer", "its time", "ratio", "noise", "missed targets"]
    lines = []
    for e in entries:
        best = e.best
        assert best is not None and best.ratio is not None and e.seconds is not None
        lines.append([
            e.suite, e.title, seconds_text(e.seconds.median), best.name,
            "" if best.seconds is None else seconds_text(best.seconds), ratio_text(best.ratio.median),
            f"±{100 * best.ratio.noise:.0f}%", "; ".join(e.missed),
        ])  # fmt: skip
    return _numbered(head, lines, entries, runs)


def unjudged(entries: Sequence[Entry], runs: int) -> tuple[list[str], Cells]:
    head = ["suite", "row", "ours", "why"]
    lines = []
    for e in entries:
        why = (
            [e.reason]
            if e.status != OK
            else [f"{o.name}: {o.reason or o.status}" for o in e.others if o.status != SKIPPED]
        )
        absent = [o.name for o in e.others if o.status == SKIPPED]
        why += [f"not there: {', '.join(absent)}"] if absent else []
        lines.append([
            e.suite, e.title, e.status if e.seconds is None else seconds_text(e.seconds.median),
            "; ".join(why) or "no peer",
        ])  # fmt: skip
    return _numbered(head, lines, entries, runs)


def whole(entries: Sequence[Entry], runs: int) -> tuple[list[str], Cells]:
    """Every figure of a suite's rows: each peer by name."""
    peers = list(dict.fromkeys(other.name for e in entries for other in e.others))
    counted = any(e.passes for e in entries)
    head = ["row", "ours", "of floor", "bound by", "memory", *(["passes"] if counted else []), *peers]
    lines = []
    for e in entries:
        line = [
            e.title,
            e.status if e.seconds is None else f"{seconds_text(e.seconds.median)} ±{100 * e.seconds.noise:.0f}%",
        ]
        line += ["", ""] if e.floor is None else [f"{100 * e.floor[2]:.0f}%", e.floor[0]]
        line += [bytes_text(e.peak), *([e.passes] if counted else [])]
        by_name = {other.name: other for other in e.others}
        lines.append([*line, *(_cell(by_name.get(name)) for name in peers)])
    return _numbered(head, lines, entries, runs)


def _cell(other: Other | None) -> str:
    if other is None or other.status == SKIPPED:
        return "-"
    if other.status == FAILED or other.ratio is None:
        return "failed"
    passes = f" ({other.passes})" if other.passes else ""
    return f"{ratio_text(other.ratio.median)}{' differs' if other.status == DIFFERS else ''}{passes}"


def _numbered(head: list[str], lines: Cells, entries: Sequence[Entry], runs: int) -> tuple[list[str], Cells]:
    if runs == 1:
        return head, lines
    return ["run", *head], [[str(e.run), *line] for e, line in zip(entries, lines, strict=True)]


EXPLAINED = (
    "A ratio is a peer's time over ours in the same rounds of one run: above 1x ours is faster. The best peer is the "
    "fastest "
    "whose result equals ours. Noise: half the distance of the 20th and 80th percentiles. Of floor: the least time "
    "that the "
    "work can take on that machine over ours. Passes: images forwards / backwards through the model in one call."
)


def sections(found: Report) -> list[tuple[str, str, tuple[list[str], Cells]]]:
    """(title, a sentence, table) of each part, losses first."""
    runs = len(found.runs)
    parts = [
        ("Slower than the best peer", "Every row under 1x, the worst first.", compared(found.behind, runs)),
        ("As fast or faster", "The least first.", compared(found.ahead, runs)),
    ]
    if found.unjudged:
        parts.append(("Without a peer that did the same", "", unjudged(found.unjudged, runs)))
    for suite in dict.fromkeys(e.suite for e in found.entries):
        parts.append((f"Suite {suite}", "", whole([e for e in found.entries if e.suite == suite], runs)))
    return parts


def about(found: Report) -> list[str]:
    return [
        f"{i}. {name}: {machine([run])}" for i, (name, run) in enumerate(zip(found.names, found.runs, strict=True), 1)
    ]


def markdown(found: Report) -> str:
    lines = ["# Benchmarks of fastrobust", "", summary(found), "", *about(found), "", EXPLAINED]
    for title, sentence, (head, cells) in sections(found):
        lines += ["", f"## {title}", "", *([sentence, ""] if sentence else [])]
        if not cells:
            lines.append("None.")
            continue
        clean = [[cell.replace("|", "\\|") for cell in line] for line in cells]
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(f"| {' | '.join(line)} |" for line in clean)]
    if found.notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in found.notes)]
    return "\n".join(lines) + "\n"


_STYLE = """
:root{--ink:#1f2328;--quiet:#59636e;--line:#d1d9e0;--back:#fff;--bad:#b3261e;--badback:#fdeceb;--good:#0b5cad}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back);max-width:78em;margin:2em auto;padding:0 1em}
h1{font-size:1.7em}h2{font-size:1.25em;margin-top:2em;border-bottom:1px solid var(--line)}
.big{font-size:1.15em}.quiet{color:var(--quiet)}.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.86em}td,th{padding:.15em .7em;border-bottom:1px solid var(--line);text-align:right;
white-space:nowrap}td.left,th.left{text-align:left;white-space:normal}
tr.behind td{background:var(--badback)}tr.behind td.ratio{color:var(--bad);font-weight:700}td.ratio{color:var(--good);font-weight:600}
svg{max-width:100%;height:auto}.note{border-left:4px solid var(--bad);padding:.1em .8em;margin:.4em 0}
"""
_LEFT = {"suite", "row", "best peer", "why", "bound by", "missed targets"}


def _table(head: list[str], cells: Cells) -> str:
    if not cells:
        return "<p>None.</p>"
    say = html.escape
    kind = lambda name: ' class="left"' if name in _LEFT else ' class="ratio"' if name == "ratio" else ""
    top = "".join(f"<th{kind(name)}>{say(name)}</th>" for name in head)
    place = head.index("ratio") if "ratio" in head else None
    rows = []
    for line in cells:
        behind = place is not None and float(line[place].rstrip("x")) < 1
        body = "".join(f"<td{kind(name)}>{say(cell)}</td>" for name, cell in zip(head, line, strict=True))
        start = '<tr class="behind">' if behind else "<tr>"
        rows.append(f"{start}{body}</tr>")
    return f'<div class="scroll"><table><tr>{top}</tr>{"".join(rows)}</table></div>'


def page(found: Report) -> str:
    """HTML with everything in it; without matplotlib a line stands in the pictures' place."""
    from . import drawings

    say = html.escape
    try:
        ratios = [drawings.ratios(group) for group in drawings.groups(found.entries)]
        curves = [drawings.curve(group) for group in drawings.curves(found.entries)]
        missing = ""
    except Unavailable as error:
        ratios, curves, missing = [], [], f'<p class="note">{say(str(error))}</p>'
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Benchmarks of fastrobust</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f'<h1>Benchmarks of fastrobust</h1><p class="big">{say(summary(found))}</p>',
        *(f"<p>{say(line)}</p>" for line in about(found)),
        *(f'<p class="note">{say(note)}</p>' for note in found.notes if " skipped: " not in note),
        f'<p class="quiet">{say(EXPLAINED)}</p>', missing,
    ]  # fmt: skip
    tables = sections(found)
    for number, (title, sentence, (head, cells)) in enumerate(tables):
        parts.append(f"<h2>{say(title)}</h2>" + (f"<p>{say(sentence)}</p>" if sentence else ""))
        parts.append(_table(head, cells))
        if number == 1:
            parts += ["<h2>Every row beside its peers</h2>", *ratios] if ratios else []
            parts += ["<h2>How times grow</h2>", *curves] if curves else []
    skipped = [note for note in found.notes if " skipped: " in note]
    if skipped:
        parts.append("<h2>What was not there</h2><ul>" + "".join(f"<li>{say(n)}</li>" for n in skipped) + "</ul>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


__all__ = ["OURS", "Entry", "Report", "collect", "markdown", "of_content", "page", "summary"]
