"""The options of `fastrobust bench`, its exit codes and files."""

import argparse
import json

import pytest
import torch

from fastrobust.benchmarks import cli, harness
from fastrobust.benchmarks.case import OURS, Candidate, Case, Suite, Target


def stand_in(name, *, target=None, value=0.0, default=True):
    """A suite of one row whose only peer does the same work twice."""

    def once():
        return torch.ones(200, 200).mm(torch.ones(200, 200))

    def cases(context):
        yield Case(
            "product",
            {"level": context.level, "seed": context.seed, "data": str(context.data)},
            Candidate(OURS, lambda: lambda: once()),
            (Candidate("twice", lambda: lambda: [once(), once()][0] + value),),
            targets=(Target("twice", target),) if target is not None else (),
        )

    return Suite(name, cases, f"summary of {name}", default)


@pytest.fixture
def suites(monkeypatch, tmp_path):
    """Replaces the suites; runs happen in an empty folder."""
    chosen = {}
    monkeypatch.setattr(cli, "suites", lambda: chosen)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTROBUST_DATA", raising=False)
    return chosen


def bench(*argv):
    return cli.run_from_argv([*argv, "--no-progress", "--device", "cpu"])


def test_the_package_finds_its_suites():
    found = cli.suites()
    assert "pgd" in found
    assert all(suite.name == name and suite.summary for name, suite in found.items())


def test_a_run_prints_the_table_and_writes_one_file(suites, tmp_path, capsys):
    suites["a"] = stand_in("a")
    assert bench("--smoke", "--seed", "3", "--data", "somewhere") == 0
    text = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("run-all-smoke-") and path.suffix == ".json"
    assert f"written: {path.name}" in text and "product" in text
    (row,) = json.loads(path.read_text())["rows"]
    assert row["axes"] == {"level": "smoke", "seed": 3, "data": "somewhere"}
    assert row["peers"][0]["status"] == harness.OK


def test_only_takes_the_rows_in_whose_title_it_is_found(suites, tmp_path, capsys):
    def cases(context):
        for size in (8, 16):
            yield Case("product", {"size": size}, Candidate(OURS, lambda n=size: lambda: torch.ones(n, n).sum()))

    suites["a"] = Suite("a", cases, "")
    out = tmp_path / "out.json"
    for text, sizes in (("product 1", [16]), ("8$", [8]), ("^product", [8, 16])):
        assert bench("--smoke", "--only", text, "--out", str(out)) == 0
        assert [row["axes"]["size"] for row in json.loads(out.read_text())["rows"]] == sizes
    assert bench("--smoke", "--only", "difference") == 1
    assert "nothing ran" in capsys.readouterr().err


def test_a_suite_reviews_its_own_rows(suites, tmp_path):
    seen = []
    given = [stand_in(name) for name in "ab"]
    suites["a"] = Suite("a", given[0].cases, "", review=lambda rows: seen.append([row.suite for row in rows]))
    suites["b"] = given[1]
    assert bench("--smoke", "--out", str(tmp_path / "out.json")) == 0
    assert seen == [["a"]]


def test_in_a_checkout_results_go_to_the_results_folder(suites, tmp_path):
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    suites["a"] = stand_in("a")
    assert bench("a", "--smoke") == 0
    (path,) = (tmp_path / "benchmarks" / "results").iterdir()
    assert path.name.startswith("run-a-smoke-")


def test_suites_that_are_not_default_run_when_named(suites, tmp_path):
    suites["a"], suites["slow"] = stand_in("a"), stand_in("slow", default=False)
    out = tmp_path / "out.json"
    assert bench("--smoke", "--out", str(out)) == 0
    assert [row["suite"] for row in json.loads(out.read_text())["rows"]] == ["a"]
    assert bench("slow", "--smoke", "--out", str(out)) == 0
    assert [row["suite"] for row in json.loads(out.read_text())["rows"]] == ["slow"]


def test_check_passes_and_fails_on_ratios(suites, capsys):
    suites["a"] = stand_in("a", target=0.001)
    assert bench("--smoke", "--check") == 0
    assert "check: all targets met" in capsys.readouterr().out
    suites["a"] = stand_in("a", target=1000.0)
    assert bench("--smoke") == 0  # only a checked run judges
    assert bench("--smoke", "--check") == 1
    assert "against twice, target 1000" in capsys.readouterr().out


def test_check_fails_when_a_result_differs(suites, capsys):
    suites["a"] = stand_in("a", value=1.0)
    assert bench("--smoke", "--check") == 1
    assert "twice differs by 1" in capsys.readouterr().out


def test_a_failing_row_fails_the_run(suites):
    def fails():
        raise ValueError("bad")

    suites["a"] = Suite("a", lambda context: [Case("w", {}, Candidate(OURS, fails))], "")
    assert bench("--smoke") == 1


def test_nothing_to_run_fails(suites, capsys):
    assert bench("--smoke") == 1
    assert "nothing ran" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nothing"], "no suite 'nothing'; expected some of a"),
        (["--only", "("], "--only is '('; expected a regular expression"),
        (["--threads", "0"], "--threads is 0; expected 1 or more"),
        (["--device", "abacus"], "--device is 'abacus'; expected cpu, cuda, cuda:N or auto"),
        (["--device", "meta"], "--device is 'meta'; expected cpu, cuda, cuda:N or auto"),
    ],
)
def test_bad_arguments_name_what_is_wrong(suites, capsys, argv, said):
    suites["a"] = stand_in("a")
    assert cli.run_from_argv([*argv, "--smoke", "--no-progress"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_asking_for_an_absent_gpu_says_so(suites, capsys):
    suites["a"] = stand_in("a")
    assert cli.run_from_argv(["--device", "cuda", "--no-progress"]) == 2
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_threads_hold_for_the_run_only(suites, tmp_path):
    suites["a"] = stand_in("a")
    before = torch.get_num_threads()
    out = tmp_path / "out.json"
    assert bench("--smoke", "--threads", "1", "--out", str(out)) == 0
    assert json.loads(out.read_text())["metadata"]["threads"] == 1
    assert torch.get_num_threads() == before


def test_list_names_the_suites(suites, capsys):
    suites["a"], suites["b"] = stand_in("a"), stand_in("b", default=False)
    assert cli.run_from_argv(["--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "a            summary of a",
        "b            summary of b (only when named)",
    ]


def test_a_picture_is_drawn_beside_the_file(suites, tmp_path):
    pytest.importorskip("matplotlib")
    suites["a"] = stand_in("a")
    assert bench("--smoke", "--out", str(tmp_path / "out.json"), "--plot") == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert bench("--smoke", "--out", str(tmp_path / "out.json"), "--plot", str(tmp_path / "own.png")) == 0
    assert (tmp_path / "own.png").exists()


def test_the_arguments_fit_into_another_parser():
    parser = argparse.ArgumentParser()
    bench_parser = parser.add_subparsers().add_parser("bench")
    cli.add_arguments(bench_parser)
    args = parser.parse_args(["bench", "pgd", "--quick", "--threads", "2"])
    assert (args.suites, args.level, args.threads) == (["pgd"], "quick", 2)
    assert parser.parse_args(["bench"]).level == "default"
