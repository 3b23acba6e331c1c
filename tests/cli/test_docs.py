"""Every example of docs/cli.md prints what the page says, up to the figures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cli_helpers import Run

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
_BLOCK = re.compile(r"(<!-- output depends[^\n]*\n)?```console\n(.*?)```", re.DOTALL)


def examples() -> list[tuple[str, str]]:
    """(command, output) of each `$ ` line in the console blocks that hold on every machine."""
    found = []
    for block in _BLOCK.finditer(PAGE.read_text()):
        for part in re.split(r"^\$ ", block.group(2), flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if not block.group(1):
                found.append((command, output))
    return found


def shape_of(text: str) -> str:
    """Without figures, spacing and what names the device."""
    text = re.sub(r"^device .*$", "device", text.strip(), flags=re.MULTILINE)
    text = re.sub(r"-?\d[\d.]*(e[+-]?\d+)?", "#", text)
    return re.sub(r"[ \n]+", " ", text)


@pytest.mark.parametrize(("command", "output"), examples())
def test_example(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, output: str) -> None:
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed, reason=f"the examples need {needed}")
    monkeypatch.chdir(tmp_path)
    assert output.strip()
    name, *argv = shlex.split(command)
    _, out, err = run(*argv)
    assert name == "fastrobust" and shape_of(out + err) == shape_of(output)
