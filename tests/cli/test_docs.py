"""Every example of the pages prints what the page says; figures of the trained model may move with the machine."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path

import pytest

from cli_helpers import Run
from fastrobust import cli

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "cli.md"
_BLOCK = re.compile(r"(<!-- output depends[^\n]*\n)?```console\n(.*?)```", re.DOTALL)
_NUMBER = re.compile(r"-?\d[\d.]*(?:e[+-]?\d+)?")


def examples() -> list[tuple[str, str]]:
    """(command, output) of each `$ ` line in the console blocks that hold on every machine."""
    found = []
    for block in _BLOCK.finditer(PAGE.read_text()):
        for part in re.split(r"^\$ ", block.group(2), flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            if not block.group(1):
                found.append((command, output))
    return found


def comparable(text: str) -> str:
    """Without what names the device and without times."""
    text = re.sub(r"^(device|time) .*$", r"\1", text.strip(), flags=re.MULTILINE)
    return re.sub(r"[ \n]+", " ", text)


def figures_agree(shown: str, printed: str) -> bool:
    """Within a tenth; shares and counts of a few hundred images, and losses, within somewhat more."""
    for a_line, b_line in zip(shown.strip().splitlines(), printed.strip().splitlines(), strict=True):
        if a_line.startswith(("device", "time")):
            continue
        slack = 12.0 if "%" in a_line else 0.3 if a_line.startswith("loss") else 1e-9
        for a, b in zip(_NUMBER.findall(a_line), _NUMBER.findall(b_line), strict=True):
            if not math.isclose(float(a), float(b), rel_tol=0.1, abs_tol=slack):
                return False
    return True


@pytest.mark.parametrize(("command", "output"), examples())
def test_example(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, output: str) -> None:
    for needed in ("sklearn", "matplotlib"):
        pytest.importorskip(needed, reason=f"the examples need {needed}")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), {"__name__": "__main__"})  # the files that commands read
    assert output.strip()
    name, *argv = shlex.split(command)
    _, out, err = run(*argv)
    assert name == "fastrobust"
    assert _NUMBER.sub("#", comparable(out + err)) == _NUMBER.sub("#", comparable(output))
    assert figures_agree(output, out + err), out + err


def indented() -> list[str]:
    """Commands that are shown without their output."""
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"]
    text = "\n".join(page.read_text() for page in pages)
    return re.findall(r"^    (fastrobust .*|torchrun .*fastrobust\.cli\.(?:attack|certify) .*)$", text, re.MULTILINE)


@pytest.mark.parametrize("command", indented())
def test_options_of_commands_without_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(command, comments=True)
    if words[0] == "torchrun":
        at = words.index("-m")
        argv = [words[at + 1].rpartition(".")[2], *words[at + 2 :]]
    else:
        argv = words[1:]
    assert callable(cli._parser(argv).parse_args(argv).run)
