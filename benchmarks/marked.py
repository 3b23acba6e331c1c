"""Tables of runs between the markers of a page, and the commands of the modules that make them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def machine(about: Sequence[dict[str, Any]]) -> str:
    """What the runs ran on, each thing once."""
    parts = []
    for run in about:
        others = run.get("others")
        busy = "" if others is None else f", others used {others:.1f} CPUs"
        parts.append(
            f"{run['gpu'] or run['cpu']}, {run['threads']} threads, torch {run['torch']}, {run['date'][:10]}, "
            f"level {run['level']}{busy}"
        )
    return "; ".join(dict.fromkeys(parts)) + "."


def markers(name: str) -> tuple[str, str]:
    """The lines around the table ``name`` of a page."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def between(text: str, name: str, made: str) -> str:
    """The text with ``made`` between the markers of ``name``."""
    begin, end = markers(name)
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"got no one pair of markers, expected {begin} before {end}")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def put_into(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers of ``name``. ValueError where the page has no one pair of them."""
    try:
        page.write_text(between(page.read_text(), name, text))
    except ValueError as error:
        raise ValueError(f"{page}: {error}") from None


def write_table(
    argv: Sequence[str] | None, module: str, about: str, name: str, table: Callable[[Sequence[Path]], str]
) -> int:
    """The command of a module that makes the table ``name`` of JSON files; ``about`` is its docstring."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=about.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--into", type=Path, default=None, metavar="PAGE.md", help="replace the table in this page")
    args = parser.parse_args(argv)
    try:
        text = table(args.runs)
        if args.into is None:
            print(text)
        else:
            put_into(args.into, name, text)
    except (OSError, ValueError) as error:
        print(f"{module}: {error}", file=sys.stderr)
        return 2
    return 0
