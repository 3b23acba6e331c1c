"""The tables of the bounds suite, from the JSON of its runs into a page."""

import pytest
import torch

from fastrobust.benchmarks import bounds_table, figures, harness, marked, report
from fastrobust.benchmarks.case import Target
from fastrobust.benchmarks.floors import Machine
from fastrobust.benchmarks.timing import Spread

ABOUT = {
    "gpu": None,
    "cpu": "some CPU",
    "cpus": 4,
    "threads": 3,
    "torch": "2.12.0",
    "date": "2026-02-03T00:00:00",
    "level": "quick",
    "others": 0.0,
}


def row(work="crown margins", network="a net", ratio=24.0, status="ok", bar=20.0, **axes):
    made = harness.Row(
        "bounds", work, {"network": network, "batch": 4, **axes}, 0.1, harness.Result("fastrobust", status)
    )
    if status == "ok":
        made.ours.seconds, made.ours.peak_bytes = Spread(2e-3, 2e-3, 2e-3), 3_000_000
        made.floor = harness.FloorResult("forward", "", 1e-3, Spread(0.5, 0.5, 0.5))
        peer = harness.Result(
            "auto_LiRPA", ratio=Spread(ratio, ratio, ratio), seconds=Spread(1, 1, 1), peak_bytes=70_000_000
        )
        made.peers.append(peer)
    made.verdicts = harness.judge(made, [Target("auto_LiRPA", bar)])
    return made


def written(path, rows):
    report.write_json(harness.Run(ABOUT, Machine(torch.device("cpu"), 3, 1e9, 1e9), rows, []), path)
    return path


def cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_each_row_says_time_memory_floor_and_peers(tmp_path, capsys):
    differs = row("ibp margins")
    differs.peers[0].status = "differs"
    rows = [row(), row("crown-ibp margins", ratio=3.0), differs, row("fast-lin margins", status="failed")]
    rows.append(row("lines", status="ok", kind="crown"))
    assert bounds_table.main([str(written(tmp_path / "run.json", rows))]) == 0
    text = capsys.readouterr().out
    assert cells(text, "crown margins") == [
        "crown margins",
        "a net, 4",
        "2 ms",
        "3.0 MB",
        "50 % (forward)",
        "24x (70.0 MB)",
    ]
    assert cells(text, "crown-ibp margins")[-1] == "**3x (70.0 MB)**"  # under its bar
    assert cells(text, "ibp margins")[-1] == "*"
    assert cells(text, "fast-lin margins")[2] == "**failed**"
    assert text.count("| work |") == 2  # rows with other axes have a table of their own
    assert "some CPU, 3 threads, torch 2.12.0, 2026-02-03, level quick" in text
    assert text.splitlines()[-1] == "2 of 5 bars are missed."


def test_later_rows_replace_earlier_ones_and_go_into_the_page(tmp_path, capsys):
    first = written(tmp_path / "first.json", [row(ratio=30.0), row(network="another", ratio=40.0)])
    second = written(tmp_path / "second.json", [row(ratio=50.0)])
    page = tmp_path / "page.md"
    page.write_text("above\n{}\nold\n{}\nbelow\n".format(*marked.markers("bounds")))
    assert bounds_table.main([str(first), str(second), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("above") and text.endswith("below\n") and "old" not in text
    assert "50x" in text and "40x" in text and "30x" not in text
    page.write_text("no markers")
    assert bounds_table.main([str(first), "--into", str(page)]) == 2
    assert "got no one pair of markers" in capsys.readouterr().err


def test_files_without_rows_are_refused(tmp_path, capsys):
    other = row()
    other.suite = "pgd"
    assert bounds_table.main([str(written(tmp_path / "run.json", [other]))]) == 2
    assert "got no rows of the suite 'bounds'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(0.987, "0.99x"), (1.5, "1.50x"), (2.04, "2x"), (9.96, "10x"), (112.4, "112x")]
)
def test_figures_have_two_digits(value, text):
    assert figures.ratio(value) == text
