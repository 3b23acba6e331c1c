"""One run against an earlier one, row by row: what became slower by more than the noise of both.

    python -m benchmarks.compare THEN.json NOW.json [--fail-under RATIO]

`fastrobust bench --compare THEN.json` does the same with the run that it just made.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .harness import FAILED, OTHERS_ALLOWED, SKIPPED
from .report import SCHEMA, align, seconds_text
from .timing import Spread

SLOWER, UNSURE, FAILS, KEPT = "SLOWER", "under, within the noise", "FAILS NOW", ""
WORDS = {  # what two runs should have in common
    "device": "device", "cpu": "CPU", "cpus": "usable CPUs", "gpu": "GPU", "threads": "threads", "torch": "torch",
    "python": "Python", "level": "level", "peers": "peers run beside",
}  # fmt: skip

Content = Mapping[str, Any]  # of a JSON file of a run
Key = tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """A row in both runs. ratio: its time then over its time now, so that less than 1 is slower; noise: relative, of
    the ratio (half the distance of the percentiles of either run's samples, as independent errors add). peers: the same
    ratio of the peers, the median of them: what the machine did meanwhile."""

    title: str
    then: Spread
    now: Spread
    peers: float | None = None

    @property
    def ratio(self) -> float:
        return self.then.median / self.now.median if self.now.median else math.inf

    @property
    def noise(self) -> float:
        return math.hypot(self.then.noise, self.now.noise)

    def verdict(self, least: float | None) -> str:
        """Under ``least`` by more than the noise, under it within the noise, or neither."""
        if least is None or self.ratio >= least:
            return KEPT
        return SLOWER if self.ratio * (1 + self.noise) < least else UNSURE


@dataclass
class Comparison:
    pairs: list[Pair]
    only_then: list[str]
    only_now: list[str]
    failing: list[str]  # ran then, fail now
    warnings: list[str]

    def problems(self, least: float) -> list[str]:
        """What keeps the run from passing at ``least``."""
        found = [f"{title}: {FAILS.lower()}, and ran then" for title in self.failing]
        for pair in self.pairs:
            if pair.verdict(least) == SLOWER:
                found.append(f"{pair.title}: {pair.ratio:.2f}x of the earlier run, expected {least:g}x")
        if not self.pairs and not found:
            found.append("no row is in both runs")
        return found


def read(path: Path) -> Content:
    """A run's JSON. OSError or ValueError, naming the file, where it is none."""
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: got no JSON ({error}), expected a run of fastrobust bench") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA or not all(name in content for name in ("rows", "metadata")):
        raise ValueError(f"{path}: got schema {schema!r}, expected a run of fastrobust bench (schema {SCHEMA})")
    return dict(content)


def _key(content: Content, row: Content) -> Key:
    """Suite, work, parameters and threads; a suite's rows may come in another order."""
    axes = [f"{name}={value}" for name, value in sorted(row["axes"].items())]
    return (row["suite"], row["work"], *axes, f"threads={content['metadata'].get('threads')}")


def _title(row: Content) -> str:
    return " ".join([f"{row['suite']}: {row['work']}", *(str(value) for value in row["axes"].values())])


def _spread(result: Content) -> Spread | None:
    """The samples of a candidate that ran."""
    seconds = result.get("seconds")
    if result["status"] in (FAILED, SKIPPED) or not seconds:
        return None
    return Spread(*(float(seconds[name]) for name in ("median", "p20", "p80")))


def _drift(then: Content, now: Content) -> float | None:
    """The peers' time then over now, the median of those in both."""
    before = {peer["name"]: _spread(peer) for peer in then["peers"]}
    ratios = []
    for peer in now["peers"]:
        old, new = before.get(peer["name"]), _spread(peer)
        if old is not None and new is not None and new.median:
            ratios.append(old.median / new.median)
    return statistics.median(ratios) if ratios else None


def _warnings(then: Content, now: Content) -> list[str]:
    a, b = then["metadata"], now["metadata"]
    found = [
        f"{word}: {a.get(name)} then, {b.get(name)} now"
        for name, word in WORDS.items()
        if a.get(name, True if name == "peers" else None) != b.get(name, True if name == "peers" else None)
    ]
    kinds = [run.get("build", {}).get("cpu_variant") for run in (a, b)]
    if kinds[0] != kinds[1]:
        found.append(f"instructions: {kinds[0]} then, {kinds[1]} now")
    for run, when in ((a, "then"), (b, "now")):
        if (run.get("others") or 0.0) > OTHERS_ALLOWED:
            found.append(f"other processes used {run['others']:.1f} CPUs {when}")
    return found


def compare(then: Content, now: Content) -> Comparison:
    """The rows of the later run beside those of the earlier one."""
    earlier = {_key(then, row): row for row in then["rows"]}
    later = {_key(now, row): row for row in now["rows"]}
    found = Comparison([], [], [], [], _warnings(then, now))
    for key, row in later.items():
        old = earlier.get(key)
        before, after = None if old is None else _spread(old["ours"]), _spread(row["ours"])
        if after is None and before is not None:
            found.failing.append(_title(row))
        elif old is None or before is None or after is None:
            found.only_now.append(_title(row))
        else:
            found.pairs.append(Pair(_title(row), before, after, _drift(old, row)))
    found.only_then = [_title(row) for key, row in earlier.items() if key not in later]
    return found


def table(found: Comparison, least: float | None = None) -> str:
    """The comparison as text: rows, what is on one side only, and what differs between the machines."""
    header = ["row", "then", "now", "then/now", "noise", "peers", "verdict"]
    cells = []
    for pair in found.pairs:
        peers = "-" if pair.peers is None else f"{pair.peers:.2f}x"
        cells.append([
            pair.title, seconds_text(pair.then.median), seconds_text(pair.now.median), f"{pair.ratio:.2f}x",
            f"±{100 * pair.noise:.0f}%", peers, pair.verdict(least),
        ])  # fmt: skip
    lines = align(header, cells, left=1)
    if found.pairs:
        mean = statistics.geometric_mean(pair.ratio for pair in found.pairs)
        lines.append(f"{len(found.pairs)} rows in both, geometric mean {mean:.2f}x (under 1x: slower than then)")
    for label, titles in (
        ("failing now", found.failing), ("only then", found.only_then), ("only now", found.only_now)
    ):  # fmt: skip
        lines += [f"{label}: {title}" for title in titles]
    lines += [f"warning: {text}" for text in found.warnings]
    return "\n".join(lines)


def report(then: Content, now: Content, least: float | None) -> int:
    """Prints the comparison; 1 where a row falls under ``least``, fails, or none could be compared."""
    found = compare(then, now)
    print(table(found, least))
    if least is None:
        return 0
    problems = found.problems(least)
    print(f"compare: no row under {least:g}x" if not problems else "compare: " + "\ncompare: ".join(problems))
    return 1 if problems else 0


def check_ratio(least: float | None) -> None:
    if least is not None and not 0 < least < math.inf:
        raise ValueError(f"--fail-under is {least:g}; expected a ratio above 0, such as 0.9")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("then", type=Path, metavar="THEN.json")
    parser.add_argument("now", type=Path, metavar="NOW.json")
    parser.add_argument("--fail-under", type=float, default=None, metavar="RATIO", help="exit 1 when a row falls under")
    args = parser.parse_args(argv)
    try:
        check_ratio(args.fail_under)
        return report(read(args.then), read(args.now), args.fail_under)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
