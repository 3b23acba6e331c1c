"""The headline comparisons of robust training, at a size that says only that they run, and the page made of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastrobust.benchmarks import training_page, training_plots, training_speed, training_tables

pytest.importorskip("sklearn", reason="the digits need scikit-learn")
SMALL = ["--set", "digits", "--train", "60", "--test", "8", "--epochs", "2", "--seeds", "2", "--batch", "30"]


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
        "thesis-4.2 constant", "thesis-4.2 cosine", "thesis-4.2 linear",
        "thesis-4.6 ATTA", "thesis-4.6 reweighting", "thesis-4.6 adaptive targets",
        "thesis-4.7 no fine-tuning", "thesis-4.7 vanilla AT", "thesis-4.7 RW", "thesis-4.7 KL", "thesis-4.7 RW + KL",
        "gao 4", "gao 16",
    ]  # fmt: skip
    by_key = {row["key"]: row for row in rows}
    assert by_key["wang-1 dynamic"]["printed"]["CW-inf"] == 91.47
    for row in rows:
        columns = training_tables.TABLES[row["table"]].columns
        assert set(columns) < set(row["ours"]) and len(row["runs"]) == 2
        first = columns[0]
        assert row["ours"][first]["mean"] == pytest.approx(sum(run[first] for run in row["runs"]) / 2)
    assert by_key["thesis-4.6 ATTA"]["printed"] == {"AutoAttack": 44.48}
    passes = {key: row["ours"]["passes"]["mean"] for key, row in by_key.items()}
    near = lambda n: pytest.approx(n, abs=0.1)  # one more image goes through to see how many classes there are
    assert passes["wang-1 unsecured"] == near(2) and passes["wang-1 standard"] == near(22)
    assert passes["wang-1 curriculum"] == near(7)  # of two epochs, at strengths 0 and 5
    assert 4 <= passes["wang-1 dynamic"] <= 22.1
    assert all(passes[f"thesis-4.6 {name}"] == near(4) for name in training_tables.FAST_METHODS)  # as printed
    assert (
        passes["thesis-4.7 RW"] == near(22) and passes["thesis-4.7 KL"] == near(24) and passes["gao 4"] == near(22 - 10)
    )


def test_every_table_has_a_plot(file: Path) -> None:
    pytest.importorskip("matplotlib")
    for table in training_tables.TABLES:
        plot = file.with_name(f"training-{table}.png")
        assert plot.read_bytes().startswith(b"\x89PNG")
        plot.unlink()
    assert training_plots.main([str(file)]) == 0 and len(list(file.parent.glob("*.png"))) == len(training_tables.TABLES)
    assert training_plots.main([]) == 2


def test_the_page_holds_them(file: Path, tmp_path: Path) -> None:
    busy = json.loads(file.read_text())
    for row in busy["rows"]:
        row["run"]["others"] = 1.5 if row["table"] == "wang-1" else 0.0
    file = tmp_path / "busy.json"
    file.write_text(json.dumps(busy))
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- training: begin -->\nold\n<!-- training: end -->\nafter\n")
    assert training_page.main([str(file), "--into", str(page)]) == 0
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| dynamic |" in text and "; 91.47 |" in text and "| 16 |" in text
    wang, other = text.split("Liu 2022, table 4.2")
    assert "not timed" in wang and "seconds" not in wang and "| seconds |" in other and "not timed" not in other
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
        training_tables.main(["--table", "wang-1", "--set", "mnist", "--data", str(tmp_path)])


def test_the_ways_of_an_epoch_do_the_same_work(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    arguments = ["--images", "128", "--rounds", "1", "--data", str(tmp_path), "--out", str(out)]
    assert training_speed.main(arguments) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert row["weights apart"]["lean"] < 1e-4 and row["weights apart"]["papers"] < 1e-4
    assert set(row["ratio"]) == {"ours", "papers", "lean", "dynamic"} and 0 < row["passes of dynamic"] <= 1
