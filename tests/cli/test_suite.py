"""``fastrobust attack --attack autoattack``: reports, pages, curves, states, and shares of several processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastrobust as fr
from cli_helpers import Run
from fastrobust import data
from fastrobust.attacks import EvaluationReport
from fastrobust.attacks._report import AttackReport
from fastrobust.cli import _suite_page as page
from fastrobust.cli import _suite_run as suite
from fastrobust.cli._workers import Workers

pytest.importorskip("sklearn", reason="the digits need scikit-learn")
COMMAND = ("attack", "--attack", "autoattack", "--limit", "60", "--batch-size", "25")
SHORT = (*COMMAND, "--version", "apgd-ce,apgd-malt", "--eps", "0.08")


def evaluation(path: Path) -> EvaluationReport:
    text = json.dumps(json.loads(path.read_text())["result"]["evaluation"])
    return EvaluationReport.from_json(text)


def test_figures_are_those_of_the_function(run: Run, digits_model: nn.Module, tmp_path: Path) -> None:
    out, report = tmp_path / "a.npz", tmp_path / "r.json"
    status, text, err = run(*SHORT, "--seed", "5", "--no-cache", "--out", out, "--report", report)
    assert status == 0 and err == ""
    images = data.load("digits", limit=60)
    model = fr.models.train_digits(5)
    wanted = fr.attacks.autoattack(
        model, images.images, images.labels, eps=0.08, version=["apgd-ce", "apgd-malt"], seed=5, return_details=True
    )
    found, saved = evaluation(report), np.load(out)
    fooled = saved["prediction_adversarial"] != saved["labels"]
    assert np.array_equal(fooled, wanted.fooled.numpy())
    assert [(a.name, a.attacked, a.broken) for a in found.attacks] == [
        (a.name, a.attacked, a.broken) for a in wanted.report.attacks
    ]
    assert 0 < found.robust_accuracy == pytest.approx(1 - fooled.mean()) and found.examples == 60
    assert f"{100 * found.robust_accuracy:.2f} %  ({int((~fooled).sum())} of 60)" in text
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["apgd-ce"][1] == str(found.attacks[0].attacked) and rows["all"][1] == rows["apgd-malt"][3]
    assert "own list: apgd-ce, apgd-malt" in text and "ball of 0.08 holds, the box [0, 1] holds" in text


def test_shares_of_processes_make_the_whole(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, one after the other; the second has what the first made."""
    assert run(*SHORT, "--out", tmp_path / "one.npz", "--report", tmp_path / "one.json")[0] == 0
    shares: list[dict[int, Any]] = []

    def gather(team: Workers, mine: dict[int, Any]) -> dict[int, Any]:
        shares.append(mine)
        return mine if len(shares) < 2 else {**shares[0], **shares[1]}

    evaluate = suite.evaluate_all

    def both(args: Any, model: Any, images: Any, setting: Any, team: Workers) -> list[suite.Part]:
        with monkeypatch.context() as patch:
            patch.setattr(Workers, "gather", gather)
            with contextlib.suppress(KeyError):  # it is not the one that has all
                evaluate(args, model, images, setting, team._replace(rank=1, world=2))
            return evaluate(args, model, images, setting, team._replace(rank=0, world=2))

    monkeypatch.setattr(suite, "evaluate_all", both)
    assert run(*SHORT, "--out", tmp_path / "two.npz", "--report", tmp_path / "two.json")[0] == 0
    assert [sorted(share) for share in shares] == [[1], [0, 2]]
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    for name in one.files:
        assert np.array_equal(one[name], two[name]), name
    for ours, theirs in zip(
        evaluation(tmp_path / "one.json").attacks, evaluation(tmp_path / "two.json").attacks, strict=True
    ):
        assert (ours.forwards, ours.backwards, ours.broken) == (theirs.forwards, theirs.backwards, theirs.broken)


@pytest.mark.thorough
def test_torchrun(run: Run, tmp_path: Path) -> None:
    assert run(*SHORT, "--out", tmp_path / "one.npz")[0] == 0
    argv = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29617"]
    done = subprocess.run(
        [*argv, "-m", "fastrobust.cli.attack", *SHORT[1:], "--out", str(tmp_path / "two.npz"), "--threads", "1"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("robust accuracy") == 1 and "on 2 processes" in done.stdout
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert all(np.array_equal(one[name], two[name]) for name in one.files)


def test_a_stopped_run_goes_on(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches that are done are not attacked again."""
    argv = (*SHORT, "--state", tmp_path / "state")
    real, calls = suite.autoattack, []

    def stops(*args: Any, **options: Any) -> Any:
        calls.append(options["first_example"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(suite, "autoattack", stops)
    assert run(*argv)[0] == 130 and calls == [0, 25, 50]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.0", "state.25"]
    before = [(tmp_path / name).read_bytes() for name in ("state.0", "state.25")]
    status, _, err = run(*argv, "--out", tmp_path / "a.npz")
    assert status == 0, err
    assert before == [(tmp_path / name).read_bytes() for name in ("state.0", "state.25")]
    assert run(*SHORT, "--out", tmp_path / "b.npz")[0] == 0
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert all(np.array_equal(a[name], b[name]) for name in a.files)
    status, _, err = run(*argv, "--seed", "1", "--no-cache")
    assert status == 2 and "the state of another evaluation" in err


def test_proven_images_are_between(run: Run, tmp_path: Path) -> None:
    argv = (*COMMAND, "--version", "apgd-ce", "--eps", "0.005")
    status, text, _ = run(*argv, "--certify-first", "--report", tmp_path / "r.json")
    found = evaluation(tmp_path / "r.json")
    assert status == 0 and found.certified and found.attacks[0].attacked < 60 - found.certified + 1
    assert f"proven {100 * found.certified / 60:.2f} %, so the robust accuracy lies between" in text
    status, _, err = run(*argv, "--certify-first", "guess")
    assert "guess" in err


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]
        if tag not in ("meta", "path", "use", "rect", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, text: str) -> None:
        self.words.append(text)


@pytest.mark.parametrize("drawn", [True, False])
def test_page_and_curve(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: bool) -> None:
    if drawn:
        pytest.importorskip("matplotlib", reason="curves need matplotlib")
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    options = ("--page", tmp_path / "p.html", "--curve", tmp_path / "c.png", "--report", tmp_path / "r.json")
    status, out, err = run(*SHORT, *options)
    text, found = (tmp_path / "p.html").read_text(), evaluation(tmp_path / "r.json")
    assert status == 0 and str(tmp_path / "p.html") in out
    reader = _Text()
    reader.feed(text)
    assert not reader.open and not reader.links  # every tag closed, nothing outside asked for
    said = " ".join(reader.words)
    for entry in found.attacks:
        assert re.search(
            rf"{entry.name}\s+{entry.attacked}\s+{entry.broken}\s+{100 * entry.robust_accuracy:.2f} %", said
        )
    assert f"Robust accuracy {100 * found.robust_accuracy:.2f} %" in said
    assert ("<svg" in text) == drawn == (tmp_path / "c.png").exists()
    assert drawn or "needs matplotlib" in err


def test_curves_start_where_the_last_one_ended() -> None:
    pytest.importorskip("matplotlib", reason="curves need matplotlib")
    report = EvaluationReport("standard", "Linf", 0.1, 10, 0, 0.9, 2, 0.5, seconds=7.0)
    report.attacks = [
        AttackReport("apgd-ce", 2.0, 5, 5, 7, 3, 0.6, curve=[(0.5, 1), (1.5, 3)]),
        AttackReport("square", 4.0, 5, 0, 4, 1, 0.5, curve=[(3.0, 1)]), AttackReport("fab-t", robust_accuracy=0.5),
    ]  # fmt: skip
    first, second = page.curves(report)
    assert first.seconds == [1.0, 1.5, 2.5, 3.0] and first.accuracy == pytest.approx([90, 80, 60, 60])
    assert second.seconds == [3.0, 6.0, 7.0] and second.accuracy == pytest.approx([60, 50, 50])
    lines = page.draw(report, "title").axes[0].get_lines()
    steps = [line for line in lines if line.get_drawstyle() == "steps-post"]
    assert [line.get_label() for line in steps] == ["apgd-ce", "square"]
    assert any(line.get_label() == "proven" and line.get_ydata()[0] == 20 for line in lines)


def test_notes_are_on_the_page_and_nothing_is_markup() -> None:
    report = EvaluationReport("standard", "Linf", 0.1, 10, 0, notes=["gradients <b>mislead</b> & more"])
    setting = {"suite": "standard", "norm": "Linf", "eps": 0.1, "model": "m", "built": "", "data": "d", "device": "cpu",
               "processes": 1, "clip": None, "seed": 0, "version": "1", "torch": "2"}  # fmt: skip
    perturbation = {"largest": 0.1, "eps": 0.1, "ball_holds": True, "box_holds": True, "mean": {"Linf": 0.1}}
    found = {"examples": 10, "clean_accuracy": 1.0, "robust_accuracy": 0.5, "perturbation": perturbation}
    text = page.page(setting, found, report, None)
    assert "gradients &lt;b&gt;mislead&lt;/b&gt; &amp; more" in text and "<b>" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--attack", "autoattack", "--steps", "5"], "--steps: is not for autoattack"),
        (["--attack", "autoattack", "--targets", "all"], "--targets: is not for autoattack"),
        (["--attack", "autoattack", "--version", "best"], "expected standard, plus, rand, fast"),
        (["--attack", "autoattack", "--version", "apgd-ce,pgd"], "got attack 'pgd'"),
        (["--version", "fast"], "--version: needs --attack autoattack"),
        (["--certify-first"], "--certify-first: needs --attack autoattack"),
        (["--attack", "autoattack", "--page", "no/where.html"], "--page"),
    ],
)
def test_bad_input_is_one_line(run: Run, options: list[str], said: str) -> None:
    status, out, err = run("attack", *options)
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and said in err


def test_randomised_models_are_told_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("noisy_nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Noisy(nn.Linear):\n"
        "    def forward(self, x): return super().forward((x + 0.3 * torch.rand_like(x)).flatten(1))\n"
        "def make(): return Noisy(64, 10)\n"
    )
    torch.save(nn.Linear(64, 10).state_dict(), "noisy.pt")
    options = (
        "--model",
        "noisy.pt",
        "--factory",
        "noisy_nets:make",
        "--version",
        "square",
        "--limit",
        "30",
        "--eps",
        "0",
    )
    status, _, err = run(*COMMAND, *options, "--page", "p.html")
    assert status == 0 and err.count("it is randomised") == 1 and "it is randomised" in Path("p.html").read_text()
