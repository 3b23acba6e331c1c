"""The same suites with another installation of the library, in turns with this one: two builds side by side.

Each installation runs twice, in the order other, this, this, other, so that a machine that grows slower does so for
both; of its two readings of a row the faster one counts. The suites are this checkout's for both: rows that the other
library cannot run fail there, and are on one side only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fastrobust

from .case import Unavailable

# The suites under the name that they have where they are installed, whatever the library on the path is.
_START = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastrobust.benchmarks", {folder!r} + "/__init__.py",
                                              submodule_search_locations=[{folder!r}])
sys.modules["fastrobust.benchmarks"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from fastrobust.benchmarks import cli
sys.exit(cli.run_from_argv(sys.argv[1:]))
"""


def library(path: Path) -> Path:
    """The folder that holds the package: ``path`` itself, or its ``python`` (a checkout)."""
    for folder in (path, path / "python"):
        if (folder / "fastrobust" / "__init__.py").is_file():
            return folder.resolve()
    raise ValueError(f"--against is {str(path)!r}; expected a folder with a built package fastrobust in it")


def run_with(folder: Path, argv: Sequence[str]) -> dict[str, Any]:
    """A run of these suites in a process of its own, with the library of ``folder``."""
    start = _START.format(folder=str(Path(__file__).resolve().parent))
    path = os.pathsep.join(p for p in (str(folder), os.environ.get("PYTHONPATH", "")) if p)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run.json"
        done = subprocess.run(
            [sys.executable, "-c", start, *argv, "--out", str(out), "--no-progress"],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        if not out.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise Unavailable(f"the library in {folder} did not run: {last}")
        return dict(json.loads(out.read_text()))


def faster(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The first run with the rows of the second in place of its own where those took less."""
    name = lambda row: json.dumps([row["suite"], row["work"], row["axes"]], sort_keys=True)  # noqa: E731
    median = lambda row: (row["ours"]["seconds"] or {}).get("median", float("inf"))  # noqa: E731
    others = {name(row): row for row in second["rows"]}
    rows = [min(row, others.get(name(row), row), key=median) for row in first["rows"]]
    return {**first, "rows": rows}


def side_by_side(other: Path, argv: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(other, this): the runs of either library, the faster reading of each row."""
    this = Path(fastrobust.__file__).resolve().parents[1]
    order = [run_with(folder, argv) for folder in (other, this, this, other)]
    return faster(order[0], order[3]), faster(order[1], order[2])
