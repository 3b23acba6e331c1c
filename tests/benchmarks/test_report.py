"""The table, the JSON file and the picture of a run."""

import json
import math

import pytest
import torch

from fastrobust.benchmarks import floors, harness, plot, report
from fastrobust.benchmarks.case import FLOOR, OURS, Agreement, Target, Unavailable
from fastrobust.benchmarks.timing import Spread


def spread(value):
    return Spread(value, 0.9 * value, 1.1 * value)


def result(name, status=harness.OK, seconds=1e-3, ratio=None, gap=0.0):
    if status == harness.SKIPPED:
        return harness.Result(name, status, "not installed")
    made = harness.Result(name, status, "", spread(seconds), 5, spread(ratio) if ratio else None, None, 2_000_000)
    if ratio:
        made.agreement = Agreement(gap, status == harness.OK)
    return made


def make_run():
    first = harness.Row(
        "pgd",
        "pgd_step",
        {"norm": "Linf", "shape": "128x3x32x32"},
        1e-6,
        result(OURS),
        [result("eager", ratio=5.25), result("foolbox", harness.SKIPPED)],
        harness.FloorResult("copy", "L2", 8e-4, spread(0.8)),
        [
            harness.Verdict(Target("eager", 5.0), 5.25, harness.MET),
            harness.Verdict(Target(FLOOR, 0.9), 0.8, harness.MISSED),
        ],
    )
    second = harness.Row(
        "pgd",
        "pgd_step",
        {"norm": "L2", "shape": "1x1"},
        1e-6,
        result(OURS, seconds=2.5e-6),
        [result("eager", harness.DIFFERS, ratio=123.4, gap=math.inf), result("foolbox", ratio=12.34)],
    )
    third = harness.Row("other", "bound", {"net": "FC1"}, 0.0, harness.Result(OURS, harness.FAILED, "ValueError: bad"))
    machine = floors.Machine(torch.device("cpu"), 2, 4e10, 1e11)
    about = {
        "cpu": "some CPU",
        "gpu": None,
        "cpus": 2,
        "threads": 2,
        "load": 0.1,
        "torch": "2.13.0",
        "python": "3.11",
        "date": "2020-01-01",
        "level": "default",
        "build": {"version": "1.2.3"},
    }
    return harness.Run(about, machine, [first, second, third], ["pgd: foolbox skipped: not installed"])


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.0123, "12.3 ms"), (4.56e-6, "4.56 us"), (1e-3, "1 ms"), (7e-9, "7 ns")]
)
def test_seconds_text(seconds, text):
    assert report.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(None, "-"), (4096, "<0.1 MB"), (1_540_000, "1.5 MB"), (154_000_000, "154 MB")]
)
def test_bytes_text(count, text):
    assert report.bytes_text(count) == text


def test_table_has_one_table_a_group_with_aligned_columns():
    text = report.table(make_run())
    lines = text.splitlines()
    header = next(line for line in lines if line.startswith("work"))
    row = next(line for line in lines if line.startswith("pgd_step  Linf"))
    for title, cell in (("ours", "1 ms"), ("of floor", "80%"), ("eager", "5.25x ±10%"), ("foolbox", "-")):
        assert header.index(title) + len(title) == row.index(cell, header.index(title) - 10) + len(cell), title
    assert "copy L2" in row and "2.0 MB" in row
    assert row.endswith("5x eager met; 90% of floor MISSED")
    assert "123x ±10% !" in text  # marked, and not the best peer
    assert "12x ±10%" in text
    assert "bound  FC1  failed" in text
    assert "copy 40.0 GB/s" in text and "some CPU" in text and "fastrobust 1.2.3" in text
    assert lines[-1] == "pgd: foolbox skipped: not installed"


def test_json_holds_the_run(tmp_path):
    path = tmp_path / "new" / "run.json"
    report.write_json(make_run(), path)
    saved = json.loads(path.read_text())
    assert saved["schema"] == report.SCHEMA
    assert set(saved) == {"schema", "metadata", "machine", "rows", "notes"}
    assert saved["metadata"]["cpu"] == "some CPU"
    assert saved["machine"] == {"copy_bandwidth": 4e10, "matrix_rate": 1e11}
    first, second, third = saved["rows"]
    assert first["ours"]["seconds"] == pytest.approx({"median": 1e-3, "p20": 0.9e-3, "p80": 1.1e-3})
    assert first["floor"]["kind"] == "copy" and first["floor"]["where"] == "L2"
    assert first["floor"]["fraction"]["median"] == 0.8
    assert first["peers"][1] == {
        "name": "foolbox",
        "status": "skipped",
        "reason": "not installed",
        "seconds": None,
        "samples": 0,
        "ratio": None,
        "difference": None,
        "measure": None,
        "peak_bytes": None,
        "passes": None,
    }
    assert first["targets"] == [
        {"against": "eager", "at_least": 5.0, "got": 5.25, "verdict": "met"},
        {"against": "floor", "at_least": 0.9, "got": 0.8, "verdict": "missed"},
    ]
    assert second["peers"][0]["status"] == "differs"
    assert second["peers"][0]["difference"] == "inf"  # JSON has no infinity
    assert third["ours"]["reason"] == "ValueError: bad"


def test_a_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.png"
    plot.plot(make_run(), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw_is_said(tmp_path):
    pytest.importorskip("matplotlib")
    run = make_run()
    run.rows = run.rows[2:]
    with pytest.raises(Unavailable, match="no row of ours ran"):
        plot.plot(run, tmp_path / "run.png")
