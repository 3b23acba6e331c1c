"""The Python examples of the README and of docs/ run as a reader has them: page by page from the top, nothing given."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import tokenize
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastrobust as fr

ROOT = Path(__file__).resolve().parent.parent


def examples(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


FILES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if examples(path)]


def run(text: str, space: dict[str, object], name: str) -> int:
    """Execute one block statement by statement; the number of `print(...)  # what it prints` that were compared."""
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    compared = 0
    for statement in ast.parse(text, name).body:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(ast.Module([statement], []), name, "exec"), space)
        said = comments.get(statement.end_lineno or 0)
        if said is not None and text.splitlines()[statement.lineno - 1].startswith("print("):
            assert out.getvalue().strip() == said, (name, said)
            compared += 1
    return compared


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTROBUST_CACHE", str(tmp_path))
    if any("train_digits" in text for text in examples(path)):
        pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    torch.manual_seed(1)  # pages that print figures seed themselves
    space: dict[str, object] = {"__name__": "__main__"}
    for text in examples(path):
        run(text, space, path.name)
    if path.name == "benchmarks.md":  # what it defines: the suite's own claim of equal results, and the peer's one line
        _suite_agrees(space)
    adv, x = space.get("adv"), space.get("x0")
    if isinstance(adv, Tensor) and isinstance(x, Tensor):  # the examples' own claim: inside the ball and the box
        assert ((adv.double() - x.double()).abs() <= 10 / 255).all() and ((adv >= 0) & (adv <= 1)).all()


def _suite_agrees(space: dict[str, object]) -> None:
    from fastrobust.benchmarks.case import Context, Suite, Unavailable

    suite, peer = space["SUITE"], space["pgd"]
    assert isinstance(suite, Suite) and callable(peer)
    (case,) = suite.cases(Context(level="smoke"))
    assert case.compare(case.ours.build()(), case.peers[0].build()(), case.tolerance).agrees
    with pytest.raises(Unavailable, match="pip install pip-name"):
        peer(None, None, None, norm="Linf", eps=0.1, step_size=0.1, steps=1)


def test_printed_figures_are_compared() -> None:
    assert run("print(1 + 1)  # 2\nprint(3)\n", {}, "right") == 1
    with pytest.raises(AssertionError):
        run("x = 4\nprint(x)  # 5\n", {}, "wrong")
    assert sum("print(" in text and "  # " in text for path in FILES for text in examples(path)) > 2


def test_every_file_of_the_documentation_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f"docs/{path.name}" in text, path.name


def test_names_in_the_readme_exist() -> None:
    found = re.findall(r"`fr\.([\w.]+)`", (ROOT / "README.md").read_text())
    assert len(found) > 10
    for name in found:
        value: object = fr
        for part in name.split("."):
            value = getattr(value, part)
