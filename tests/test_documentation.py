"""The pages: their examples run as a reader has them (page by page from the top, nothing given), their links lead
somewhere, and what they list of the code is what the code has."""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import runpy
import tokenize
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastrobust as fr

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
_BLOCK = re.compile(r"(<!-- no-run: \S[^\n]*-->\n)?^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WORDS = 1500
LONGER = {"bounds_measured.md", "gallery.md"}  # reference, as docs/api is: what was measured


def examples(path: Path) -> list[str]:
    """The python blocks of a page; `<!-- no-run: why -->` on the line above leaves one out."""
    return [text for skipped, text in _BLOCK.findall(path.read_text()) if not skipped]


def prose(path: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def words(path: Path) -> int:
    """Of a page's text: rows of tables are looked up, not read."""
    return len(re.sub(r"^\|.*$", "", prose(path), flags=re.MULTILINE).split())


def name_of(path: Path) -> str:
    return str(path.relative_to(DOCS if DOCS in path.parents else ROOT))


# the site's first page has the README's first block, which runs there
FILES = [path for path in PAGES if examples(path) and path != DOCS / "index.md"]


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


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the built-in model of the digits is kept, once for all pages and examples."""
    return tmp_path_factory.getbasetemp() / "cache"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_examples_run(path: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTROBUST_CACHE", str(cache))
    if any("digits" in text for text in examples(path)):
        pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    torch.manual_seed(1)  # pages that print figures seed themselves
    space: dict[str, object] = {"__name__": "__main__"}
    for text in examples(path):
        run(text, space, path.name)
    if path.name == "benchmarks.md":  # what it defines: the suite's own claim of equal results, and the peer's one line
        _suite_agrees(space)
    if path.name in ("README.md", "tutorial.md"):
        said, found = _percentages(path, space)
        assert said == pytest.approx(found, abs=6.0)  # of a hundred images or two, trained on another machine
    adv, x = space.get("adv"), space.get("x0")
    if isinstance(adv, Tensor) and isinstance(x, Tensor):  # the examples' own claim: inside the ball and the box
        assert ((adv.double() - x.double()).abs() <= 10 / 255).all() and ((adv >= 0) & (adv <= 1)).all()


def _percentages(path: Path, space: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(the accuracies that a page says its blocks print, those that they computed)."""
    if path.name == "README.md":
        shown = re.search(r"`clean ([\d.]+)%, robust at most ([\d.]+)%, proven ([\d.]+)%`", path.read_text())
        assert shown is not None and shown[0] in (DOCS / "index.md").read_text()
        rows = [(space["clean"], space["robust"], space["proof"].certified.float().mean())]
        said = list(shown.groups())
    else:
        rows = list(space["table"].values())
        said = re.findall(r"^\S+ +clean (\d+)%, robust between (\d+)% and (\d+)%$", path.read_text(), re.MULTILINE)
        said = [number for row in said for number in row]
    return [float(number) for number in said], [100 * float(number) for row in rows for number in row]


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


def test_the_site_begins_with_the_block_of_the_readme() -> None:
    assert examples(DOCS / "index.md") == examples(ROOT / "README.md")[:1]


def test_a_block_is_left_out_with_a_reason_alone() -> None:
    text = "<!-- no-run: needs a GPU -->\n```python\n1 / 0\n```\n\n<!-- no-run: -->\n```python\nx = 1\n```\n"
    assert [bool(skipped) for skipped, _ in _BLOCK.findall(text)] == [True, False]
    for path in PAGES:  # every spelling of Python is one that is collected
        fences = re.findall(r"^ *```+ *(\S.*)$", path.read_text(), re.MULTILINE)
        assert not [f for f in fences if f.startswith("py") and f != "python"], path.name


@pytest.mark.parametrize("path", [p for p in PAGES if p.parent != DOCS / "api" and p.name not in LONGER], ids=name_of)
def test_pages_are_short(path: Path) -> None:
    assert words(path) <= WORDS


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs both make them of these letters."""
    titles = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.DOTALL | re.MULTILINE), re.M
    )
    return {re.sub(r"[ -]+", "-", re.sub(r"[^\w\- ]", "", title.lower()).strip()) for title in titles}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), target
        if DOCS in path.parents:  # a site of docs/ alone
            assert there == DOCS or DOCS in there.parents, target
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), target


def nav() -> list[str]:
    """The pages that mkdocs.yml lists, in order."""
    return re.findall(r"(\S+\.md)$", (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2], re.MULTILINE)


def test_every_page_is_in_the_navigation_once() -> None:
    assert sorted(nav()) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
    assert "](docs/index.md)" in (ROOT / "README.md").read_text()


def test_names_in_the_pages_exist() -> None:
    found = {name for path in PAGES for name in re.findall(r"`fr\.([\w.]+?)\.?(?:\(|`)", path.read_text())}
    assert len(found) > 30
    for name in sorted(found):
        value: object = fr
        for part in name.split("."):
            if not hasattr(value, part):
                assert isinstance(value, types.ModuleType), name
                importlib.import_module(f"{value.__name__}.{part}")
            value = getattr(value, part)
    code = "\n".join(text for path in PAGES for text in examples(path))
    assert {name.partition(".")[0] for name in found} | set(re.findall(r"\bfr\.(\w+)", code)) <= set(fr.__all__)


def public() -> Iterator[tuple[str, object]]:
    """(module or dotted name, object) of all that `__all__` of the package and of its public modules names."""
    waiting = [fr]
    while waiting:
        module = waiting.pop()
        yield module.__name__, module
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            if isinstance(value, types.ModuleType):
                waiting.append(value)
            else:
                yield f"{module.__name__}.{name}", value


def test_every_public_module_is_in_the_reference() -> None:
    """`::: module.*` stands for its public submodules, too (docs/_mkdocs/hooks.py); what the source says is what Python
    sees."""
    shown = set(re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in (DOCS / "api").glob("*.md")), re.MULTILINE))
    of_source = runpy.run_path(str(DOCS / "_mkdocs" / "whole.py"))["modules"]
    whole = {m for name in shown if name.endswith(".*") for m in of_source(name.removesuffix(".*"))}
    for name in shown | whole:
        importlib.import_module(name.removesuffix(".*"))
    wanted = {name for name, value in public() if isinstance(value, types.ModuleType)}
    assert wanted == set(of_source("fastrobust"))
    missing = wanted - shown - whole - {"fastrobust.reference"}  # nothing but modules, each on the page
    assert not missing, f"docs/api: no `::: {sorted(missing)}`"


def test_documented_arguments_exist() -> None:
    """`x, y: ...` under Args names arguments of the function (the options of attacks are typed dictionaries)."""
    looked = 0
    for name, value in public():
        if not (inspect.isfunction(value) or inspect.isclass(value)) or not value.__doc__:
            continue
        section = re.search(r"^Args:\n((?: {4}.*\n|\n)*)", inspect.cleandoc(value.__doc__) + "\n", re.MULTILINE)
        if section is None:
            continue
        function = value.__init__ if inspect.isclass(value) else value
        arguments = inspect.signature(function).parameters
        if any(p.kind is p.VAR_KEYWORD for p in arguments.values()):
            continue
        for entry in re.findall(r"^ {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*):", section[1], re.MULTILINE):
            for argument in entry.split(", "):
                assert argument.strip("*") in arguments, (name, argument)
                looked += 1
    assert looked > 100


_READ = re.compile(
    r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["']([A-Z]\w*)["']|["']([A-Z]\w*)["'] (?:not )?in os\.environ"""
)
_OF_OTHERS = {"PATH", "PYTHONPATH", "OMP_NUM_THREADS", "MYPYPATH"}


def variables() -> tuple[set[str], set[str]]:
    """(environment variables that the code reads, names of ours that occur in it at all)."""
    read, ours = set(), set()
    for folder in ("python", "benchmarks", "tests", "csrc", ".ci", "CMakeLists.txt"):
        place = ROOT / folder
        for path in [place] if place.is_file() else place.rglob("*"):
            if not path.is_file() or path.suffix in {".so", ".json", ".pyc", ".png"} or path == Path(__file__):
                continue
            text = path.read_text(errors="ignore")
            read |= {a or b for a, b in _READ.findall(text)}
            read |= set(re.findall(r"\$\{?(FASTROBUST_\w+|PYTHON)(?:-|:-|\})", text)) if folder == ".ci" else set()
            read |= set(re.findall(r"ENV\{(\w+)\}", text))
            ours |= set(re.findall(r"\bFASTROBUST_[A-Z_]+\b", text))
    return read - _OF_OTHERS, ours


def test_the_table_of_environment_variables_is_whole() -> None:
    read, ours = variables()
    runs, _, options = (DOCS / "environment.md").read_text().partition("Options of the build")
    options, _, tests = options.partition("## When it is tested")
    names = {n for row in re.findall(r"^\| (`.*?) \|", runs + tests, re.MULTILINE) for n in re.findall(r"`(\w+)`", row)}
    chosen = set(re.findall(r"^\| `(\w+)` \|", options, re.MULTILINE))
    assert {"FASTROBUST_CPU", "FASTROBUST_BINARY", "CUDAARCHS"} <= read  # the search finds what there is
    assert read <= names | chosen, f"docs/environment.md lacks {sorted(read - names - chosen)}"
    assert {n for n in names | chosen if n.startswith("FASTROBUST")} <= ours
    declared = re.findall(
        r"^(?:option|set)\((FASTROBUST_\w+) .*(?:CACHE|OFF\))", (ROOT / "CMakeLists.txt").read_text(), re.M
    )
    assert set(declared) == chosen


def test_the_support_matrix_is_what_the_ops_do() -> None:
    support = runpy.run_path(str(DOCS / "_mkdocs" / "support.py"))
    assert set(support["OPS"]) == {n for n in fr.ops.__all__ if inspect.isfunction(getattr(fr.ops, n))}
    assert support["matrix"]() in (DOCS / "support.md").read_text(), "python docs/_mkdocs/support.py --write"


def test_every_op_has_its_section() -> None:
    """A heading of its name, its five rows, and a block that calls it; the index leads there."""
    sections: dict[str, str] = {}
    for path in (DOCS / "ops").glob("*.md"):
        for name, text in re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", path.read_text(), re.DOTALL | re.MULTILINE):
            if name in fr.ops.__all__:
                assert name not in sections, name
                sections[name] = text
                assert f"[`{name}`](ops/{path.name}#{name})" in (DOCS / "ops.md").read_text()
    assert set(sections) == {n for n in fr.ops.__all__ if inspect.isfunction(getattr(fr.ops, n))}
    for name, text in sections.items():
        rows = re.findall(r"^\| (\w+) \| \S.* \|$", text, re.MULTILINE)
        assert [*rows[-5:]] == ["formula", "shapes", "dtypes", "cost", "source"], name
        assert any(f"fr.ops.{name}(" in block for _, block in _BLOCK.findall(text)), name


def test_files_that_the_pages_name_exist() -> None:
    """Of the repository; `*`, `<family>` and names in capitals stand for several."""
    found = set()
    for path in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        found |= {
            name.rstrip(".")
            for name in re.findall(
                r"`((?:csrc|python|tests|benchmarks|docs|examples|\.ci)/[\w./-]+)`", path.read_text()
            )
        }
    assert len(found) > 60
    missing = [n for n in sorted(found) if not (ROOT / n).exists() and not n.startswith("benchmarks/results/")]
    assert not missing


def test_drawings_are_what_their_script_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = runpy.run_path(str(DOCS / "_mkdocs" / "diagrams.py"))
    monkeypatch.setitem(space["Drawing"].write.__globals__, "FOLDER", tmp_path)
    for name in ("step", "one_formula", "bounds", "masked", "distance"):
        space[name]()
        assert (tmp_path / f"{name}.svg").read_text() == (DOCS / "diagrams" / f"{name}.svg").read_text()
        assert f"](diagrams/{name}.svg)" in (DOCS / "kernels.md").read_text()
