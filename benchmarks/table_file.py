"""Rows of published tables beside ours in one JSON file, which a later run of some of the rows updates in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .metadata import Neighbours, collect
from .report import finite


class TableFile:
    """`add` replaces the row of the same `key` or appends one, and writes the file at once; no path: nothing is
    kept."""

    def __init__(self, path: Path | None, about: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"schema": 1, "about": about, "rows": []}
        if path is not None and path.is_file():
            self.content = json.loads(path.read_text())
        self.neighbours = Neighbours()

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Every row says what it ran on: rows of one file may come from several runs."""
        if self.path is None:
            return
        about = collect(torch.device("cpu"), "table")
        run = {name: about[name] for name in ("date", "cpu", "cpus", "threads", "torch")}
        run |= {"version": about["build"].get("version"), "cpu_variant": about["build"].get("cpu_variant")}
        run |= {"others": self.neighbours.cpus()}
        entry = {"key": key, **row, "run": run}
        rows = self.content["rows"]
        place = next((i for i, old in enumerate(rows) if old["key"] == key), None)
        if place is None:
            rows.append(entry)
        else:
            rows[place] = entry
        self.path.write_text(json.dumps(finite(self.content), indent=1, allow_nan=False) + "\n")
        self.neighbours = Neighbours()
