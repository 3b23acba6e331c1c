"""A run against an earlier one: which rows count as slower, what is on one side only, and the exit status."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

import fastrobust
from fastrobust.benchmarks import against, cli, compare, harness, report
from fastrobust.benchmarks.case import OURS, Candidate, Case, Suite
from fastrobust.benchmarks.floors import Machine
from fastrobust.benchmarks.timing import Spread

ABOUT = {
    "gpu": None, "cpu": "some CPU", "cpus": 4, "threads": 2, "torch": "2.11.0", "device": "cpu", "python": "3.12",
    "level": "default", "others": 0.0, "build": {"cpu_variant": "v3"},
}  # fmt: skip


def row(seconds, size=3, noise=0.02, peer=None, status=harness.OK, work="step"):
    made = harness.Row("some", work, {"size": size, "norm": "L2"}, 0.0, harness.Result(OURS, status))
    spread = lambda t: Spread(t, t * (1 - noise), t * (1 + noise))  # noqa: E731
    if status == harness.OK:
        made.ours.seconds = spread(seconds)
    if peer is not None:
        made.peers.append(harness.Result("peer", seconds=spread(peer), ratio=spread(peer / seconds)))
    return made


def run(*rows, **about):
    content = report.as_dict(harness.Run({**ABOUT, **about}, Machine(torch.device("cpu"), 2, 1e9, 1e9), list(rows), []))
    return json.loads(json.dumps(content))


@pytest.mark.parametrize(
    ("now", "noise", "verdict"),
    [
        (1.0, 0.0, compare.KEPT), (0.4, 0.3, compare.KEPT), (1.1, 0.0, compare.KEPT), (1.12, 0.0, compare.SLOWER),
        (1.12, 0.05, compare.UNSURE), (1.5, 0.05, compare.SLOWER), (1.5, 0.5, compare.UNSURE),
    ],
)  # fmt: skip
def test_a_row_is_slower_where_the_noise_does_not_explain_it(now, noise, verdict):
    found = compare.compare(run(row(1.0, noise=noise)), run(row(now, noise=noise)))
    (pair,) = found.pairs
    assert pair.ratio == pytest.approx(1 / now) and pair.noise == pytest.approx(noise * math.sqrt(2))
    assert pair.verdict(0.9) == verdict and pair.verdict(None) == compare.KEPT
    assert bool(found.problems(0.9)) == (verdict == compare.SLOWER)


def test_rows_are_matched_by_suite_work_parameters_and_threads():
    then = run(row(1.0, 3), row(2.0, 4), row(9.0, 3, work="walk"))
    now = run(row(2.0, 4), row(1.0, 3), row(1.0, 5))
    now["rows"][0]["axes"] = dict(reversed(now["rows"][0]["axes"].items()))  # the order of parameters says nothing
    found = compare.compare(then, now)
    assert sorted(pair.ratio for pair in found.pairs) == [1.0, 1.0]
    assert (found.only_then, found.only_now) == (["some: walk 3 L2"], ["some: step 5 L2"])
    other = copy.deepcopy(then)
    other["metadata"]["threads"] = 1
    apart = compare.compare(other, then)
    assert not apart.pairs and apart.warnings == ["threads: 1 then, 2 now"]
    assert apart.problems(0.9) == ["no row is in both runs"]  # what compares nothing does not pass


def test_a_row_that_ran_and_fails_now_is_a_problem_and_the_reverse_is_none():
    good, bad = run(row(1.0)), run(row(1.0, status=harness.FAILED))
    assert compare.compare(good, bad).problems(0.5) == ["some: step 3 L2: fails now, and ran then"]
    found = compare.compare(bad, good)
    assert (found.pairs, found.only_now, found.failing) == ([], ["some: step 3 L2"], [])


def test_peers_tell_what_the_machine_did():
    found = compare.compare(run(row(1.0, peer=10.0)), run(row(2.0, peer=20.0)))
    assert found.pairs[0].ratio == found.pairs[0].peers == 0.5


def test_differences_of_the_machines_are_named():
    then, now = run(row(1.0)), run(row(1.0), cpu="other CPU", torch="2.12.0", build={"cpu_variant": "v4"}, others=1.25)
    assert compare.compare(then, now).warnings == [
        "CPU: some CPU then, other CPU now", "torch: 2.11.0 then, 2.12.0 now", "instructions: v3 then, v4 now",
        "other processes used 1.2 CPUs now",
    ]  # fmt: skip
    assert compare.compare(then, copy.deepcopy(then)).warnings == []


def test_the_table_and_the_exit_status_of_two_files(tmp_path, capsys):
    paths = []
    for name, seconds in (("then", 1.0), ("now", 1.25)):
        paths.append(str(tmp_path / f"{name}.json"))
        Path(paths[-1]).write_text(json.dumps(run(row(seconds, noise=0.01), row(1.0, 7))))
    assert compare.main(paths) == 0
    text = capsys.readouterr().out
    line = next(line for line in text.splitlines() if line.startswith("some: step 3 L2"))
    assert line.split()[4:] == ["1", "s", "1.25", "s", "0.80x", "±1%", "-"]
    assert "2 rows in both, geometric mean 0.89x" in text
    assert compare.main([*paths, "--fail-under", "0.7"]) == 0
    assert "no row under 0.7x" in capsys.readouterr().out
    assert compare.main([*paths, "--fail-under", "0.9"]) == 1
    assert "some: step 3 L2: 0.80x of the earlier run, expected 0.9x" in capsys.readouterr().out


def test_what_is_no_run_is_said(tmp_path, capsys):
    path = tmp_path / "bad.json"
    for text, said in (("{", "got no JSON"), ("[]", "got schema None"), ('{"schema": 99}', "got schema 99")):
        path.write_text(text)
        assert compare.main([str(path), str(path)]) == 2
        assert said in capsys.readouterr().err
    assert compare.main([str(tmp_path / "none.json"), str(path)]) == 2
    assert compare.main([str(path), str(path), "--fail-under", "-1"]) == 2
    assert "--fail-under is -1; expected a ratio above 0" in capsys.readouterr().err


@pytest.fixture
def one_row(monkeypatch, tmp_path):
    """One suite of one row with one peer."""
    product = lambda: lambda: torch.ones(64, 64) @ torch.ones(64, 64)  # noqa: E731
    case = Case("product", {"size": 64}, Candidate(OURS, product), (Candidate("same", product),))
    monkeypatch.setattr(cli, "suites", lambda: {"a": Suite("a", lambda context: [case], "")})
    monkeypatch.chdir(tmp_path)
    return lambda *argv: cli.run_from_argv(["--smoke", "--no-progress", "--device", "cpu", *argv])


def test_a_run_compares_itself_with_a_file(one_row, tmp_path, capsys):
    out = tmp_path / "first.json"
    assert one_row("--out", str(out)) == 0
    content = json.loads(out.read_text())
    assert content["metadata"]["peers"] is True and content["rows"][0]["peers"]
    ours = content["rows"][0]["ours"]["seconds"]
    for factor, status in ((1000.0, 0), (0.001, 1)):  # a thousand times slower or faster then
        changed = copy.deepcopy(content)
        changed["rows"][0]["ours"]["seconds"] = {k: factor * v for k, v in ours.items()}
        out.write_text(json.dumps(changed))
        # whatever else runs here: a thousand is above its noise at 1e-1
        code = one_row("--compare", str(out), "--fail-under", "0.1", "--out", str(tmp_path / "second.json"))
        assert code == status, capsys.readouterr().out
    assert "a: product 64" in capsys.readouterr().out


def test_without_peers_ours_alone_is_timed(one_row, tmp_path):
    out = tmp_path / "out.json"
    assert one_row("--no-peers", "--out", str(out)) == 0
    content = json.loads(out.read_text())
    assert content["rows"][0]["peers"] == [] and content["metadata"]["peers"] is False


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--fail-under", "0.9"], "--fail-under is given alone; expected --compare FILE or --against FOLDER"),
        (["--compare", "missing.json"], "missing.json"),
        (["--against", "nowhere"], "--against is 'nowhere'; expected a folder with a built package"),
        (["--compare", "a", "--against", "b"], "expected one of them"),
    ],
)
def test_bad_arguments_are_said_before_anything_runs(one_row, tmp_path, capsys, argv, said):
    assert one_row(*argv) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_library_runs_beside_this_one(tmp_path, monkeypatch, capsys):
    """The other one is this one again under another name of its folder: what is compared is the same code."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "fastrobust").symlink_to(Path(fastrobust.__file__).resolve().parent)
    ran = []
    real = against.run_with
    monkeypatch.setattr(against, "run_with", lambda folder, argv: ran.append(folder) or real(folder, argv))
    argv = ["polyhedron", "--smoke", "--only", "polyhedral_distance", "--device", "cpu", "--threads", "1"]
    assert cli.run_from_argv([*argv, "--against", str(tmp_path / "other")]) == 0, capsys.readouterr()
    here = Path(fastrobust.__file__).resolve().parents[1]
    assert ran == [tmp_path / "other", here, here, tmp_path / "other"]
    assert "rows in both" in capsys.readouterr().out


def test_the_faster_reading_of_each_row_counts():
    first, second = run(row(1.0, 3), row(4.0, 4), row(1.0, 6)), run(row(3.0, 4), row(2.0, 3))
    found = against.faster(first, second)
    assert [(r["axes"]["size"], r["ours"]["seconds"]["median"]) for r in found["rows"]] == [
        (3, 1.0),
        (4, 3.0),
        (6, 1.0),
    ]
