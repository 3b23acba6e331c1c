"""The headline comparisons of robust training, at a size that says only that they run, and the page made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrobust.benchmarks import training_page, training_speed, training_tables

pytest.importorskip("sklearn", reason="the digits need scikit-learn")
SMALL = ["--set", "digits", "--train", "60", "--test", "20", "--epochs", "2", "--seeds", "2", "--batch", "30"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tables") / "training.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_tables, "GAO_STEPS", 5)
        patch.setitem(training_tables.TABLES, "gao", _narrow(training_tables.TABLES["gao"]))
        assert training_tables.main([*SMALL, "--out", str(path)]) == 0
    return path


def _narrow(table: training_tables.Table) -> training_tables.Table:
    from dataclasses import replace

    return replace(table, rows=("4", "16"))


def test_every_row_has_its_figures(file: Path) -> None:
    rows = json.loads(file.read_text())["rows"]
    assert [row["key"] for row in rows] == [
        "wang-1 unsecured", "wang-1 standard", "wang-1 curriculum", "wang-1 dynamic",
        "thesis-4.2 constant", "thesis-4.2 cosine", "thesis-4.2 linear", "gao 4", "gao 16",
    ]  # fmt: skip
    by_key = {row["key"]: row for row in rows}
    assert by_key["wang-1 dynamic"]["printed"]["CW-inf"] == 91.47
    for row in rows:
        columns = training_tables.TABLES[row["table"]].columns
        assert set(columns) < set(row["ours"]) and len(row["runs"]) == 2
        first = columns[0]
        assert row["ours"][first]["mean"] == pytest.approx(sum(run[first] for run in row["runs"]) / 2)
    steps = {name: by_key[f"wang-1 {name}"]["ours"]["attack steps"]["mean"] for name in training_tables.WANG_METHODS}
    assert steps["unsecured"] == 0 and steps["standard"] == 10 and 1 <= steps["dynamic"] <= 10
    assert steps["curriculum"] == 2.5  # of two epochs, at strengths 0 and 5


def test_the_page_holds_them(file: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- training: begin -->\nold\n<!-- training: end -->\nafter\n")
    assert training_page.main([str(file), "--into", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| dynamic |" in text and "; 91.47 |" in text and "| 16 |" in text
    root = Path(training_tables.__file__).resolve().parent.parent
    committed = root / "docs" / "training_methods.md"
    if committed.is_file():
        assert committed.read_text().count("<!-- training: begin -->") == 1


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": [{"key": "x"}]}))
    assert training_page.main([str(path)]) == 2
    assert "expected some" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        training_tables.main(["--table", "wang-1", "--data", str(tmp_path)])


def test_the_ways_of_an_epoch_do_the_same_work(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    arguments = ["--images", "128", "--rounds", "1", "--data", str(tmp_path), "--out", str(out)]
    assert training_speed.main(arguments) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["weights apart"]["lean"] < 1e-4 and row["weights apart"]["papers"] < 1e-4
    assert set(row["ratio"]) == {"ours", "papers", "lean", "dynamic"} and 0 < row["passes of dynamic"] <= 1
