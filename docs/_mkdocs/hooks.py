"""MkDocs: `::: module.*` on a page of the reference stands for a module and all of its public submodules; of each first
the functions that have a file of their own name, which griffe takes for the file."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

_space = runpy.run_path(str(Path(__file__).with_name("whole.py")))


def _entry(name: str, heading: bool) -> str:
    shown = str(heading).lower()
    return f"::: {name}\n    options:\n      show_root_heading: {shown}\n      show_root_toc_entry: {shown}\n"


def _shown(match: re.Match[str]) -> str:
    parts = []
    for module in _space["modules"](match[1]):
        names, below = _space["contents"](module)
        if names or not below:  # more than a list of modules
            own = [_entry(place, True) for place in names.values() if place.count(".") > module.count(".") + 1]
            parts += [f"## {module}\n", *own, _entry(module, False)]
    return "\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"^::: ([\w.]+)\.\*$", _shown, markdown, flags=re.MULTILINE)
