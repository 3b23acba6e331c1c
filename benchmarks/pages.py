"""Tables of runs in pages of the documentation: the text between two markers, and what the runs ran on."""

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


def put_into(page: Path, name: str, text: str) -> None:
    """Replaces what stands between the markers of ``name``. ValueError where the page has no one pair of them."""
    begin, end = markers(name)
    content = page.read_text()
    if content.count(begin) != 1 or content.count(end) != 1 or content.index(begin) > content.index(end):
        raise ValueError(f"{page}: got no one pair of markers, expected {begin} before {end}")
    before, after = content.split(begin)[0], content.split(end)[1]
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


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
