"""The rendered report: losses first and marked, curves of what grows, one file that asks for no other."""

import json
import re
import sys

import pytest

from fastrobust.benchmarks import cli, drawings, harness, rendered
from fastrobust.benchmarks.case import Context, Unavailable


def spread(value):
    return {"median": value, "p20": 0.9 * value, "p80": 1.1 * value}


def result(name, seconds, ratio=None, status="ok", **more):
    return {
        "name": name,
        "status": status,
        "reason": "",
        "samples": 3,
        "difference": 0.0,
        "measure": "max abs",
        "peak_bytes": 10**6,
        "seconds": None if seconds is None else spread(seconds),
        "ratio": None if ratio is None else spread(ratio),
        **more,
    }


def row(work, axes, seconds, peers, **more):
    return {
        "suite": "s",
        "work": work,
        "axes": axes,
        "tolerance": 0.0,
        "ours": result("fastrobust", seconds),
        "peers": peers,
        "floor": None,
        "targets": [],
        **more,
    }


def run_of(rows, others=0.0):
    about = {
        "cpu": "some <CPU>",
        "gpu": None,
        "threads": 2,
        "torch": "2.13.0",
        "date": "2020-01-01T00:00",
        "level": "default",
        "others": others,
    }
    return {"schema": 1, "metadata": about, "rows": rows, "notes": ["s: absent skipped: not installed"]}


def some():
    slow, fast = result("slow peer", 2e-3, 2.0), result("fast peer", 0.5e-3, 0.5)
    counted = result("counted", 3e-3, 3.0, passes={"forwards": 20, "backwards": 10})
    target = [{"against": "fast peer", "at_least": 1.0, "got": 0.5, "verdict": "missed"}]
    return run_of([
        row("won", {"size": 1}, 1e-3, [counted]), row("lost", {"size": 1}, 1e-3, [slow, fast], targets=target),
        row("level", {"size": 1}, 1e-3, [result("slow peer", 1e-3, 1.0)]),
        row("wrong|peer", {"size": 1}, 1e-3, [result("liar", 1e-4, 0.1, "differs", difference=2.0)]),
        row("alone", {"size": 1}, 1e-3, [result("absent", None, status="skipped")]),
    ])  # fmt: skip


def found(content):
    return rendered.of_content("run.json", content)


def test_losses_come_first_and_only_equal_peers_count():
    report = found(some())
    assert [e.work for e in report.behind] == ["lost"] and [e.work for e in report.ahead] == ["level", "won"]
    assert [e.work for e in report.unjudged] == ["wrong|peer", "alone"]
    assert report.behind[0].best.name == "fast peer"
    text = rendered.markdown(report)
    assert "5 rows: 1 slower than the best peer with the same result (0 of them within the noise), 2 as fast" in text
    assert text.index("| s | lost 1 |") < text.index("| s | level 1 |") < text.index("| s | won 1 |")
    assert "| 0.500x | ±10% | 1x fast peer |" in text
    assert "wrong\\|peer 1" in text and "liar: differs from ours by 2 (max abs)" in text
    assert "3x (20/10)" in text and "absent skipped: not installed" in text


def test_a_ratio_just_under_one_does_not_read_as_one():
    assert rendered.ratio_text(0.9996) == "1.000x" and rendered.ratio_text(0.994) == "0.994x"
    assert rendered.ratio_text(2.0) == "2x" and rendered.ratio_text(123.4) == "123x"


def test_busy_neighbours_and_files_that_are_no_runs_are_said(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json", "table.json")]
    for path, content in zip(paths, (some(), run_of([], 0.7), {"schema": 1, "rows": []}), strict=True):
        path.write_text(json.dumps(content))
    report = rendered.collect(paths)
    assert [e.run for e in report.entries] == [1] * 5 and len(report.runs) == 2
    assert any("others" not in n and "other processes used 0.7 CPUs" in n for n in report.notes)
    assert any("table.json: got schema 1" in n for n in report.notes)
    assert "| run | suite |" in rendered.markdown(report)
    with pytest.raises(ValueError, match="table.json"):
        rendered.collect(paths[2:])


def test_the_page_is_one_file_with_its_pictures(monkeypatch):
    pytest.importorskip("matplotlib")
    sizes = [row("grows", {"shape": f"{n}x4"}, n * 1e-3, [result("p", n * 2e-3, 2.0)]) for n in (1, 2, 3)]
    content = some()
    content["rows"] += sizes
    page = rendered.page(found(content))
    assert page.count("<svg") == page.count("</svg>") == 2  # all ratios, one curve
    assert not re.search(r"(src|href)=\"(?!#)", page) and "<script" not in page and "@import" not in page
    assert '<tr class="behind">' in page and "some &lt;CPU&gt;" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert drawings.BEHIND in page and drawings.AHEAD in page
    assert page == rendered.page(found(content))  # nothing of the moment is in it
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in rendered.page(found(content))


def test_curves_are_of_one_axis_of_sizes():
    rows = [row("w", {"batch": b, "norm": n}, 1e-3, []) for b in (4, 1, 16) for n in ("L1", "L2")]
    rows += [row("t", {"threads": t}, 1e-3, []) for t in (2, 1)] + [row("u", {"batch": b}, 1e-3, []) for b in (1, 2)]
    chosen = drawings.curves(found(run_of(rows)).entries)
    assert [(axis, [e.axes[axis] for e in along]) for axis, along in chosen] == [
        ("batch", [1, 4, 16]), ("batch", [1, 4, 16]), ("threads", [1, 2])
    ]  # fmt: skip
    assert drawings.number("16x3x2") == 96 and drawings.number("ReLU") is None and drawings.number(True) is None


def test_the_command_writes_pages_of_files(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(some()))
    assert cli.run_from_argv(["--report", str(path)]) == 0
    assert capsys.readouterr().out.startswith("# Benchmarks of fastrobust\n\n5 rows: 1 slower")
    pages = [tmp_path / "new" / name for name in ("out.html", "out.md")]
    assert cli.run_from_argv(["--report", str(path), "--html", str(pages[0]), "--markdown", str(pages[1])]) == 0
    assert pages[0].read_text().startswith("<!doctype html>") and pages[1].read_text().startswith("# ")
    path.write_text("no JSON")
    assert cli.run_from_argv(["--report", str(path)]) == 2
    assert "run.json: got no JSON" in capsys.readouterr().err


def test_scaling_rows_make_curves_of_every_kind(monkeypatch):
    from fastrobust.benchmarks import margins, metadata, report, scaling

    def absent(*_):
        raise Unavailable("not here")

    monkeypatch.setattr(margins, "peer", absent)  # its rows are tested with the bounds
    monkeypatch.setattr(metadata, "usable_cpus", lambda: 2)
    done = harness.run([scaling.SUITE], Context(level="smoke"))
    assert all(r.ours.status == harness.OK for r in done.rows), [r.ours.reason for r in done.rows]
    chosen = drawings.curves(found(report.finite(report.as_dict(done))).entries)
    assert [axis for axis, _ in chosen] == [
        "batch", "side", "depth", "density", "threads", "threads"
    ]  # fmt: skip
    assert scaling.thread_counts(Context()) == [1, 2]
    monkeypatch.setattr(metadata, "usable_cpus", lambda: 12)
    assert scaling.thread_counts(Context()) == [1, 2, 4, 8, 12]
