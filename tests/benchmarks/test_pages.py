"""Figures and tables of README.md and the pages are those of the committed results; what the mechanism takes and
refuses."""

import json
import re
from pathlib import Path

import pytest

from fastrobust.benchmarks import figures, marked, page_tables, pages

ROOT = Path(__file__).resolve().parents[2]


def test_every_figure_and_table_is_that_of_its_file():
    """`python -m benchmarks.pages --write` writes them anew."""
    assert pages.differences(ROOT) == []


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in pages.every_page(ROOT)])
def test_every_ratio_of_a_page_has_a_file_or_the_command_that_measures_it(page):
    assert pages.unaccounted((ROOT / page).read_text()) == []


def test_templates_hold_no_figure_of_their_own():
    for name, template in page_tables.TEMPLATES.items():
        assert not pages.RATIO.search(pages.PLACE.sub("", template)), name
        assert re.fullmatch(r"\w+", name)


def test_whole_evaluations_leave_out_what_no_run_holds(tmp_path):
    assert page_tables.autoattack(tmp_path).count("\n") == 1
    spread = lambda v: {"median": v, "p20": v, "p80": v}

    def row(work, norm, model, peer, ratio, status="ok"):
        return {
            "work": work, "axes": {"norm": norm, "model": model}, "ours": {"status": "ok", "seconds": spread(1.0)},
            "peers": [{"name": peer, "status": status, "ratio": spread(ratio)}], "floor": None,
        }  # fmt: skip

    rows = [row("standard", norm, "PGD-trained", "AutoAttack", 1.5) for norm in ("Linf", "L2", "L1")]
    rows += [row("standard", norm, "plain", "AutoAttack", 20) for norm in ("Linf", "L2")]
    rows += [row("fast", norm, "plain", "standard", 3, "differs") for norm in ("Linf", "L2", "L1")]
    rows += [row("certify first", "Linf", "provably trained", "AutoAttack", 11)]
    (tmp_path / "attacks-cpu-2020-01-01.json").write_text(json.dumps({"rows": rows}))
    lines = pages.filled(page_tables.autoattack(tmp_path), tmp_path).splitlines()[2:]
    assert [line.split(" | ")[-1] for line in lines] == ["1.50x; 1.50x; 1.50x |", "11x |"]
    assert "PGD-trained CNN, MNIST" in lines[0] and "certify_first" in lines[1]


@pytest.fixture
def results(tmp_path):
    def row(work, size, ours, **peers):
        spread = lambda v: {"median": v, "p20": v, "p80": v}
        found = [{"name": n.replace("_", " "), "status": s, "ratio": spread(v)} for n, (v, s) in peers.items()]
        floor = {"fraction": spread(0.876)}
        return {
            "work": work, "axes": {"size": size}, "ours": {"status": "ok", "seconds": spread(ours)}, "peers": found,
            "floor": floor,
        }  # fmt: skip

    old, new = ([row("step", 1, t, a=(2.04, "ok"), b_c=(1.5, "ok"), d=(0.2, "differs"))] for t in (1.0, 4.4e-6))
    new += [row("step", 2, 99.6e-6, a=(0.944, "ok")), row("other", 2, 1.0)]
    for name, rows in (("run-2020-01-01", old), ("run-2020-02-01", new), ("run-2020-01-01-more", [])):
        (tmp_path / f"{name}.json").write_text(json.dumps({"metadata": {}, "rows": rows}))
    table = {"rows": [{"key": "some key", "ratio": {"of it": 12.34}, "share": 0.125, "us": 310.0}], "top": 0.5}
    (tmp_path / "table.json").write_text(json.dumps(table))
    return tmp_path


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("run / step 1 / ours", "4.4 us"),
        ("run-2020-01-01 / step 1 / ours", "1.0 s"),
        ("run / step 2 / ours", "100 us"),
        ("run / step 1 / a", "2x"),
        ("run / step 1 / b c", "1.50x"),
        ("run / step 1 / best", "1.50x"),
        ("run / step 1 / a or d", "2x"),
        ("run / step 1 / floor", "88 %"),
        ("run / ~^step / a", "0.94 to 2x"),
        ("table / some key / ratio of it x", "12x"),
        ("table / some key / share 1/x", "8x"),
        ("table / some key / us us", "310 us"),
        ("table / some key / share %", "12 %"),
        ("table / - / top .2f", "0.50"),
    ],
)
def test_a_figure(results, reference, text):
    assert figures.value(reference, results) == text


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("run / step 1", "got 2 parts, expected FILE / ROW / FIELD"),
        ("absent / step 1 / ours", "got no file absent.json or absent-DATE.json"),
        ("run / step 3 / ours", "got 0 rows of that name, expected one"),
        ("run / ~nothing / ours", "no row has it"),
        ("run / step 1 / d", "got no equal 'd', expected ours, floor, best or one of a, b c"),
        ("table / some key / nothing x", "got no 'nothing'"),
        ("table / some key / share m", "got unit 'm'"),
    ],
)
def test_what_the_results_do_not_hold_is_named(results, reference, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        figures.value(reference, results)


def test_a_page_is_rewritten_and_what_differs_is_named(results, tmp_path):
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    (root / "benchmarks").mkdir()
    (root / "benchmarks" / "results").symlink_to(results)
    page = root / "docs" / "page.md"
    mark = "<!-- figure: run / step 1 / a -->{}<!-- /figure -->"
    page.write_text(f"It is {mark.format('7x')}.\n")
    (root / "README.md").write_text("Nothing.\n")
    (line,) = pages.differences(root)
    assert line.startswith("docs/page.md: differs from benchmarks/results") and "7x" in line
    assert pages.differences(root, write=True) and pages.differences(root) == []
    assert page.read_text() == f"It is {mark.format('2x')}.\n"
    page.write_text("It is " + mark.replace("step 1", "step 9").format("7x"))
    (line,) = pages.differences(root, write=True)
    assert "docs/page.md: 'run / step 9 / a'" in line and "7x" in page.read_text()
    page.write_text(f"It is\n{mark.format('2x')}, and `{mark.format('9x')}` in code.\n")
    (line,) = pages.differences(root)
    assert "a figure begins a line" in line


def test_a_template_is_filled(results):
    assert pages.filled("| {{ run / step 1 / a }} | {{run / step 2 / ours}} |", results) == "| 2x | 100 us |"


def test_ratios_without_a_source_are_found():
    figure = "<!-- figure: run / step 1 / a -->2x<!-- /figure -->"
    text = f"# Page\n\nIt is {figure}, not 3x, nor 16x1x28x28 nor `4x`.\n\n```sh\nrun 5x\n```\n\n6.5x <!-- measured by: that -->\nand 7x\n"
    assert pages.unaccounted(text) == ["3x"]
    assert pages.unaccounted("## Head\n\n<!-- measured by: this -->\n| 8x |\n\nand 9x\n\n## Next\n\n10x\n") == ["10x"]
    begin, end = marked.markers("figures_steps")
    assert pages.unaccounted(f"{begin}\n\n11x\n\n{end}\n\n12x\n") == ["12x"]
