"""The suite of other people's networks at its smallest sizes, how shares of ReLU's gain are judged, and the table of
its runs."""

import json

import pytest
import torch

from fastrobust.benchmarks import harness, marked, models_of_others, network_table, networks, report
from fastrobust.benchmarks.case import Context, Target
from fastrobust.benchmarks.floors import Machine
from fastrobust.benchmarks.timing import Spread

ABOUT = {
    "gpu": None,
    "cpu": "some CPU",
    "cpus": 2,
    "threads": 2,
    "torch": "2.13.0",
    "date": "2026-01-02T03:04:05",
    "level": "full",
    "others": 0.0,
}


def row(
    network="ResNet-18", activation="ReLU", r=0.9, batch=16, work=networks.FORWARD, nchw=2.0, nhwc=3.0, status="ok"
):
    """A row in which torch's two layouts take `nchw` and `nhwc` times as long as ours."""
    made = harness.Row(
        "networks",
        work,
        {"network": network, "activation": activation, "r": r, "batch": batch},
        0.1,
        harness.Result("fastrobust", status, "" if status == "ok" else "KeyError: -2"),
    )
    if status == "ok":
        made.ours.seconds = Spread(1.0, 1.0, 1.0)
        for name, ratio in (("dense NCHW", nchw), ("dense NHWC", nhwc)):
            spread = Spread(ratio, ratio * 0.9, ratio * 1.1)
            made.peers.append(harness.Result(name, seconds=spread, ratio=spread))
    made.verdicts = harness.judge(made, [Target("best peer", 0.95)])
    return made


def written(path, rows):
    report.write_json(harness.Run(ABOUT, Machine(torch.device("cpu"), 2, 1e9, 1e9), rows, []), path)
    return path


def test_the_suite_runs_and_agrees_with_dense_torch():
    done = harness.run([networks.SUITE], Context(level="smoke"))
    assert {made.axes["network"] for made in done.rows} == set(models_of_others.NETWORKS)
    assert {made.work for made in done.rows} == set(networks.PASSES)
    for made in done.rows:
        assert made.ours.status == harness.OK, (made.axes, made.ours.reason)
        for peer in made.peers:
            assert peer.status == harness.OK, (made.axes, peer.name, peer.reason, peer.agreement)
    shares = [verdict for made in done.rows for verdict in made.verdicts]
    assert [verdict.target.against for verdict in shares] == [networks.RELU]
    assert shares[0].got is not None and shares[0].got > 0


def test_levels_grow_and_the_full_one_has_every_combination():
    sizes = [len(networks.chosen(Context(level=level))) for level in ("quick", "default", "full")]
    assert sizes == sorted(sizes) and sizes[1] <= 10
    full = networks.chosen(Context(level="full"))
    count = len(models_of_others.variants()) * len(networks.BATCHES) * len(networks.RATES) * len(networks.PASSES)
    assert len(set(full)) == len(full) == count
    assert set(networks.DEFAULT_ROWS) <= set(full)
    assert {row[3] for row in full} == {1, 8, 16, 17, 100}


def test_shares_are_of_the_same_row_with_relu():
    rows = [
        row(nchw=4.0, nhwc=5.0), row(activation="SiLU", nchw=3.3, nhwc=9.0), row(activation="GELU", nchw=3.0),
        row(activation="SiLU", batch=8), row(activation="ReLU6", status="failed"), row("MLP", nchw=1.0),
    ]  # fmt: skip
    networks.review(rows)
    verdicts = [[(v.got, v.verdict) for v in made.verdicts[1:]] for made in rows]
    assert verdicts[0] == verdicts[5] == []
    assert verdicts[1] == [(pytest.approx(3.3 / 4), harness.MET)]
    assert verdicts[2] == [(pytest.approx(3.0 / 4), harness.MISSED)]
    assert verdicts[3] == [(None, harness.NOT_JUDGED)]  # no row of ReLU at this batch
    assert verdicts[4] == [(None, harness.MISSED)]


def test_the_table_shows_the_better_layout_and_every_loss(tmp_path, capsys):
    rows = [
        row(nchw=4.0, nhwc=5.0), row(activation="SiLU", nchw=3.0, nhwc=9.0), row(activation="GELU", nchw=3.9, nhwc=3.9),
        row("MLP", nchw=0.5, nhwc=0.6), row("MLP", batch=1, nchw=0.96), row("U-Net", status="failed"),
    ]  # fmt: skip
    path = written(tmp_path / "run.json", rows)
    assert network_table.main([str(path)]) == 0
    text = capsys.readouterr().out
    assert "| network | r | fwd 1 | fwd 16 | grad 1 | grad 16 |" in text
    assert "| ResNet-18 | 0.9 | - | 4.0x | - | - |" in text
    assert "| MLP | 0.9 | 0.96x | **0.50x** | - | - |" in text
    assert "| U-Net | 0.9 | - | **failed** | - | - |" in text
    assert "| ResNet-18 | SiLU | 0.9 | - | **3.0x (0.75)** | - | - |" in text
    assert "3 of 6 rows are under their bar" in text
    assert "MLP ReLU, r 0.9, batch 16, forward: 0.50x (0.45x to 0.55x)" in text
    assert "U-Net ReLU, r 0.9, batch 16, forward: KeyError: -2" in text
    assert text.startswith("some CPU, 2 threads, torch 2.13.0, 2026-01-02, level full")


def test_peers_that_computed_something_else_do_not_count(tmp_path):
    made = row(nchw=1.0, nhwc=3.0)
    made.peers[0].status = harness.DIFFERS
    rows, _ = network_table.read([written(tmp_path / "run.json", [made])])
    (found,) = rows.values()
    assert network_table.cell(found) == "3.0x"


def test_a_later_run_takes_the_place_of_the_same_rows(tmp_path):
    first = written(tmp_path / "1.json", [row(nchw=1.0), row("MLP", nchw=1.5)])
    second = written(tmp_path / "2.json", [row(nchw=2.5)])
    rows, about = network_table.read([first, second])
    assert {key.network: network_table.gain(found) for key, found in rows.items()} == {"ResNet-18": 2.5, "MLP": 1.5}
    assert marked.machine(about).count("some CPU") == 1


def test_the_table_goes_between_the_markers_of_a_page(tmp_path, capsys):
    path = written(tmp_path / "run.json", [row()])
    page = tmp_path / "page.md"
    page.write_text("before\n{}\nold\n{}\nafter\n".format(*marked.markers("networks")))
    for _ in range(2):
        assert network_table.main([str(path), "--into", str(page)]) == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert text.count("| ResNet-18 |") == 1 and text.count(marked.markers("networks")[0]) == 1
    page.write_text("no markers\n")
    assert network_table.main([str(path), "--into", str(page)]) == 2
    assert page.read_text() == "no markers\n"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"rows": [], "metadata": ABOUT}))
    assert network_table.main([str(other)]) == 2
    assert "got no rows of the suite 'networks'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(0.944, "0.94x"), (0.949, "0.949x"), (1.949, "1.95x"), (3.04, "3.0x"), (12.4, "12x")]
)
def test_figures(value, text):
    assert network_table.figure(value) == text
