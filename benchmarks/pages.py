"""Tables and figures of committed runs in README.md and the pages: they are written there from benchmarks/results.

    python -m benchmarks.pages            which of them differ from their files; 1 where one does
    python -m benchmarks.pages --write    writes them anew

A figure stands between ``<!-- figure: FILE / ROW / FIELD -->`` and ``<!-- /figure -->`` (what the three are:
benchmarks/figures.py), a table between ``<!-- NAME: begin -->`` and ``<!-- NAME: end -->`` (what makes it: `tables`
here). What no file holds says how it was measured: ``<!-- measured by: COMMAND -->`` stands in its paragraph, alone
before it or before its table, or alone under its heading (``<!-- set by: FILE -->`` where it is a bar and no figure).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from . import figures
from .marked import between, markers


class Table(NamedTuple):
    """A table between markers: the files that it is made of (`figures.source` knows them), and what makes it."""

    files: tuple[str, ...]
    make: Callable[[Sequence[Path]], str]


def tables(results: Path = figures.SHIPPED) -> dict[str, Table]:
    """Every table that is made of committed files, by the name in its markers."""
    from . import agreement_table, bounds_table, network_table, page_tables

    made = {
        "networks": Table(("networks-cpu",), lambda runs: network_table.markdown(*network_table.read(runs))),
        "bounds": Table(
            ("bounds-cpu-2026-11-21", "bounds-full-cpu", "bounds-networks-cpu"),
            lambda runs: bounds_table.markdown(*bounds_table.read(runs)),
        ),
    }
    made["attack_agreement"] = Table(("attack-agreement-cpu",), agreement_table.markdown)
    for name, template in page_tables.TEMPLATES.items():
        made[name] = Table((), lambda _, template=template: filled(template.strip(), results))  # type: ignore[misc]
    return made


FIGURE = re.compile(r"(?<!`)<!-- figure: ([^>]*?) -->(.*?)<!-- /figure -->", re.DOTALL)
PLACE = re.compile(r"\{\{(.*?)\}\}")


def filled(template: str, results: Path = figures.SHIPPED) -> str:
    """The template with the figure in the place of each ``{{ FILE / ROW / FIELD }}``."""
    return PLACE.sub(lambda found: figures.value(found[1].strip(), results), template)


def rewritten(text: str, results: Path = figures.SHIPPED) -> str:
    """A page with all its figures and tables as the files have them. ValueError where a file does not hold one."""
    text = FIGURE.sub(
        lambda found: f"<!-- figure: {found[1]} -->{figures.value(found[1].strip(), results)}<!-- /figure -->", text
    )
    known = tables(results)
    for name in re.findall(r"<!-- (\w+): begin -->", text):
        if name in known:
            table = known[name]
            made = table.make([figures.source(file, results) for file in table.files])
            text = between(text, name, made)
    return text


def every_page(root: Path) -> Iterator[Path]:
    yield root / "README.md"
    yield from sorted((root / "docs").rglob("*.md"))


def differences(root: Path, write: bool = False) -> list[str]:
    """A line for each page whose figures or tables are not those of the files; with ``write`` it is corrected."""
    found, results = [], root / "benchmarks" / "results"
    for page in every_page(root):
        before = page.read_text()
        name = page.relative_to(root)
        found += [f"{name}: a figure begins a line, which makes the line a block of its own: {line[:60]!r}"
                  for line in before.splitlines() if line.lstrip().startswith("<!-- figure: ")]  # fmt: skip
        try:
            after = rewritten(before, results)
        except ValueError as error:
            found.append(f"{name}: {error}")
            continue
        if after != before:
            old, new = before.splitlines(), after.splitlines()
            changed = [f"{b.strip()[:100]!r}" for b in old if b not in set(new)][:3]
            found.append(f"{name}: differs from benchmarks/results{': ' if changed else ''}{', '.join(changed)}")
            if write:
                page.write_text(after)
    return found


RATIO = re.compile(r"(?<![\w.])\d+(?:\.\d+)?x(?![\w])")
LEVEL = "1x"  # "above 1x ours is faster": no figure
MEASURED_BY = ("<!-- measured by: ", "<!-- set by: ")


def unaccounted(text: str) -> list[str]:
    """Ratios of a page that are neither a figure or a table from a file, nor in a paragraph (or under a heading whose
    first line is the comment) that says what measured them. Code does not count."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    for name in set(re.findall(r"<!-- (\w+): begin -->", text)) & set(tables()):
        begin, end = markers(name)
        text = between(text, name, "") if begin in text and end in text else text
    text = FIGURE.sub("", text)
    found = []
    for section in re.split(r"^(?=#+ )", text, flags=re.MULTILINE):
        heading, _, body = section.partition("\n")
        if body.lstrip().startswith(MEASURED_BY):
            continue
        covered = False
        for paragraph in re.split(r"\n\s*\n", section):
            before, covered = covered, paragraph.strip().startswith(MEASURED_BY) and paragraph.strip().endswith("-->")
            if not before and not any(said in paragraph for said in MEASURED_BY):
                found += [r for r in RATIO.findall(re.sub(r"`[^`]*`", "", paragraph)) if r != LEVEL]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write", action="store_true", help="correct the pages instead of naming what differs")
    args = parser.parse_args(argv)
    found = differences(Path(__file__).resolve().parents[1], args.write)
    print("\n".join(found) if found else "every figure and table is that of its file")
    # what was corrected differs no more; what no file holds still does
    return 1 if (differences(Path(__file__).resolve().parents[1]) if args.write else found) else 0


if __name__ == "__main__":
    sys.exit(main())
