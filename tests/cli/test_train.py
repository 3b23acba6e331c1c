"""``fastrobust train``: what it writes holds, resumes and is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastrobust as fr
from cli_helpers import Run
from fastrobust import data, models
from fastrobust.training import Batch, Method
from fastrobust.training.registry import METHODS

pytest.importorskip("sklearn", reason="the digits need scikit-learn")
NAME = "one-step-of-this-test"


@pytest.fixture(autouse=True)
def one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class OneStep(Method):
        """FGSM from a random start."""

        def __init__(self, eps: float = 8 / 255, *, scale: float = 1.0, norm: float = np.inf) -> None:
            self.eps, self.scale, self.norm = eps, scale, norm

        def perturb(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
            return fr.attacks.pgd(
                model, batch.x, batch.y, eps=self.eps, norm=self.norm, steps=1, step_size=self.scale * self.eps
            )

    monkeypatch.setitem(METHODS, NAME, OneStep)
    OneStep.name = NAME


def train(run: Run, out: Path, *argv: str, method: str = NAME) -> tuple[int, str, str]:
    few = ("--limit", "400", "--test-limit", "90", "--epochs", "3", "--lr", "0.05", "--schedule", "cosine")
    return run("train", "--method", method, "--out", str(out), *few, *argv)


def log_of(out: Path) -> dict[str, Any]:
    return dict(
        json.loads((out / "log.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    )


def test_everything_that_is_written_holds(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    status, text, err = train(
        run, out, "--set", "scale=1.25", "--eps", "20/255", "--average", "ema", "--batch-size", "16"
    )
    assert status == 0 and err == ""
    names = {"best.pt", "last.pt", "log.json", "model.pt", "previous.pt"}
    if importlib.util.find_spec("matplotlib"):
        names.add("curves.png")
        assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {p.name for p in out.iterdir()} == names
    log = log_of(out)
    setting, history, result = log["setting"], log["history"], log["result"]
    assert setting["options"] == {"eps": 20 / 255, "scale": 1.25, "norm": None}  # inf is no JSON
    assert (setting["epochs"], setting["lr"], setting["model"], setting["average"]) == (3, 0.05, "digits-cnn", "ema")
    assert [r["epoch"] for r in history] == [1, 2, 3] and history[-1]["eval_clean"] > history[0]["accuracy"]
    # the figures again, from the files alone
    test = data.load("digits", "test", limit=90)
    for name, file in (("last", "model.pt"), ("best", "best.pt")):
        model = models.digits_cnn()
        model.load_state_dict(torch.load(out / file, weights_only=True)["model"])
        clean = (model.eval()(test.images).argmax(1) == test.labels).double().mean().item()
        assert result[name]["clean"] == pytest.approx(clean)
        assert f"{100 * clean:.2f} %" in text
        adv = fr.attacks.autoattack(model, test.images, test.labels, eps=20 / 255, version="fast")
        robust = (model(adv).argmax(1) == test.labels).double().mean().item()
        assert result[name]["autoattack_fast"] == pytest.approx(robust) and robust <= result[name]["pgd"] <= clean
    scores = [r["eval_pgd"] for r in history]
    assert result["best"]["epoch"] == scores.index(max(scores)) + 1
    # what was trained is a model for the other commands
    status, text, _ = run(
        "attack", "--model", out / "best.pt", "--factory", "fastrobust.models:digits_cnn", "--limit", "90"
    )
    assert status == 0 and f"{100 * result['best']['clean']:.2f} %" in text


def test_resumed_has_the_same_bits(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = ("--final", "pgd", "--steps", "3")
    assert train(run, tmp_path / "whole", *final)[0] == 0
    real, calls = fr.training.Evaluation.__call__, []

    def stopped(self: Any, model: torch.nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, model)

    monkeypatch.setattr(fr.training.Evaluation, "__call__", stopped)
    status, _, err = train(run, tmp_path / "parts", *final)
    assert status == 130 and err == "fastrobust: interrupted\n"
    assert len(log_of(tmp_path / "parts")["history"]) == 2
    status, _, err = train(run, tmp_path / "parts", *final)
    assert status == 2 and "holds a training already; go on with --resume" in err
    status, _, err = train(run, tmp_path / "parts", *final, "--resume", "--eps", "0.2")
    assert status == 2 and "method.eps 0.1 in the checkpoint, 0.2 now" in err
    assert train(run, tmp_path / "parts", *final, "--resume")[0] == 0
    a, b = (torch.load(tmp_path / name / "model.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    strip = lambda log: [{k: v for k, v in r.items() if k != "seconds"} for r in log["history"]]
    assert strip(log_of(tmp_path / "whole")) == strip(log_of(tmp_path / "parts"))


def test_images_to_choose_by_and_to_judge_on_are_not_trained_on(tmp_path: Path) -> None:
    import argparse

    from fastrobust.cli import _train_run as runs

    images = np.random.default_rng(0).random((50, 1, 8, 8), dtype=np.float32)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(50) % 10)
    for source in ("digits", str(tmp_path / "own.npz")):
        for limit in (None, 20):
            args = argparse.Namespace(data=source, data_dir=None, test_limit=None, validation=None, limit=limit)
            sets = runs.split(args)
            rows = [{bytes(x.numpy().tobytes()) for x in one.images} for one in sets]
            assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]
            assert limit is None or len(sets.train.labels) == limit
    assert [len(one.labels) for one in sets] == [20, 4, 10]


def test_data_and_models_of_the_users(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", images=rng.random((60, 3, 8, 8), dtype=np.float32), labels=np.arange(60) % 4)
    (tmp_path / "net.py").write_text(
        "from fastrobust.nn import zoo\ndef make():\n    return zoo.cnn4(4, (3, 8, 8), width=2)\n"
    )
    common = (
        "--data",
        str(tmp_path / "own.npz"),
        "--eps",
        "0.1",
        "--final",
        "pgd",
        "--batch-size",
        "16",
        "--norm",
        "L2",
    )
    status, text, err = run(
        "train",
        "--method",
        NAME,
        "--model",
        f"{tmp_path / 'net.py'}:make",
        "--out",
        tmp_path / "a",
        *common,
        "--epochs",
        "1",
        "--augment",
        "--autocast",
        "bfloat16",
    )
    assert (status, err) == (0, "") and "own.npz, 44 images of 3x8x8" in text
    status, text, err = run(
        "train",
        "--method",
        "plain",
        "--model",
        "cnn-4",
        "--width",
        "2",
        "--out",
        tmp_path / "b",
        *common,
        "--epochs",
        "1",
        "--weights",
        tmp_path / "a" / "model.pt",
    )
    assert (status, err) == (0, "") and "cnn-4" in text


def test_pas_resets_the_rate_and_is_judged_as_an_ensemble(run: Run, tmp_path: Path) -> None:
    argv = (
        "--limit",
        "60",
        "--test-limit",
        "20",
        "--epochs",
        "4",
        "--final",
        "pgd",
        "--steps",
        "1",
        "--batch-size",
        "30",
        "--model",
        "cnn-4",
        "--width",
        "2",
        "--set",
        "steps=1",
        "--set",
        "resets=(0.5,)",
        "--schedule",
        "cosine",
    )
    status, text, err = run("train", "--method", "pas", "--out", tmp_path / "out", *argv)
    log = log_of(tmp_path / "out")
    assert (status, err) == (0, "") and "the ensemble of the ends of the periods" in text
    assert set(log["result"]) == {"last", "best", "ensemble"} and log["setting"]["resets"] == [0.5]
    rates = [record["lr"] for record in log["history"]]  # of the last of two batches
    assert rates[0] == pytest.approx(rates[2]) and rates[1] == pytest.approx(rates[3]) and rates[0] > rates[1]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (("--method", "pdg"), "method: got 'pdg', expected one of"),
        (
            ("--method", NAME, "--set", "step=3"),
            f"{NAME}: got option 'step', expected one of its own (eps, scale, norm)",
        ),
        (("--method", NAME, "--set", "scale"), "expected KEY=VALUE"),
        (("--method", NAME, "--set", "eps=0.1", "--eps", "0.2"), "eps is given twice"),
        (("--method", "plain", "--model", "resnet"), "model: got 'resnet'"),
        (("--method", "plain", "--model", "lenet", "--width", "0"), "expected at least 1"),
        (("--method", "plain", "--model", "fastrobust.models:mnist_cnn"), "fails on images of shape (2, 1, 8, 8)"),
        (("--method", "plain", "--epochs", "0"), "expected at least 1"),
        (("--method", "plain", "--validation", "2000"), "--validation: got 2000"),
    ],
)
def test_bad_input_writes_nothing(run: Run, tmp_path: Path, argv: tuple[str, ...], text: str) -> None:
    status, out, err = run("train", "--out", tmp_path / "out", *argv)
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and text in err
    assert not (tmp_path / "out").exists()


def test_out_is_needed_and_a_list_is_not_trained(run: Run) -> None:
    assert "argument --out: is needed" in run("train", "--method", "plain")[2]
    status, text, err = run("train", "--list")
    assert status == 0 and err == ""
    for name in fr.training.methods():
        assert f"\n{name}\n" in f"\n{text}"
    assert "FGSM from a random start." in text and "options: eps=0.031373, scale=1, norm=inf" in text


def test_values_of_options() -> None:
    from fastrobust.cli.train import _pair

    cases = {
        "a=3": 3,
        "a=8/255": 8 / 255,
        "a=word": "word",
        "a=None": None,
        "a=(1, 2)": (1, 2),
        "a=1e-3": 1e-3,
        "a=x=y": "x=y",
    }
    assert {text: _pair(text)[1] for text in cases} == cases


@pytest.mark.thorough
@pytest.mark.parametrize("name", sorted(set(fr.training.methods()) - {"projected"}))  # that one is of regression
def test_every_method_by_its_name(run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / "masked.py").write_text(
        "import fastrobust as fr\ndef make():\n    return fr.nn.convert(fr.nn.small_cnn(10, 1, width=4), rate=0.5, "
        "gamma=1.0)\n"
    )
    model = ("--model", f"{tmp_path / 'masked.py'}:make") if name.startswith("edge-popup") else ()
    argv = (
        "--limit",
        "60",
        "--test-limit",
        "20",
        "--epochs",
        "4",
        "--final",
        "pgd",
        "--steps",
        "2",
        "--batch-size",
        "20",
    )
    status, text, err = run("train", "--method", name, "--out", tmp_path / "out", *argv, *model)
    assert status == 0, err
    assert f"method           {name}" in text and len(log_of(tmp_path / "out")["history"]) == 4


@pytest.mark.thorough
def test_two_processes(tmp_path: Path) -> None:
    argv = [
        "-m",
        "fastrobust.cli.train",
        "--method",
        "plain",
        "--epochs",
        "2",
        "--final",
        "pgd",
        "--out",
        str(tmp_path / "out"),
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *argv]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("clean accuracy") == 1 and len(log_of(tmp_path / "out")["history"]) == 2
