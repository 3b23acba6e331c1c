"""What attack and certify share: models, images, box, outputs, and one line for whatever is wrong."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fastrobust as fr
from cli_helpers import Run
from fastrobust import cli
from fastrobust.cli import _attack_run

COMMANDS = {"attack": ["attack", "--steps", "2"], "certify": ["certify"]}
both = pytest.mark.parametrize("command", list(COMMANDS))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights, the function that builds their model, and images."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(
        "from torch import nn\n"
        "def small(): return nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4))\n"
    )
    torch.save({"state_dict": small().state_dict(), "epoch": 9}, "net.pt")
    images = np.random.default_rng(0).integers(0, 256, (9, 5, 6), dtype=np.uint8)
    x = torch.from_numpy(images)[:, None].float() / 255
    np.savez("own.npz", images=images, labels=small()(x).argmax(1).numpy().astype(np.uint16))
    return tmp_path


def small() -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)).eval()


OWN = ["--model", "net.pt", "--factory", "my_nets:small", "--data", "own.npz", "--eps", "1/255"]


def failed(run: Run, *argv: str | Path) -> str:
    status, out, err = run(*argv)
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and "Traceback" not in err, err
    return err


@both
def test_own_weights_and_images(run: Run, mine: Path, command: str) -> None:
    status, out, err = run(*COMMANDS[command], *OWN, "--out", "a.npz")
    assert status == 0 and err == ""
    assert "net.pt (state dictionary, taken from 'state_dict')" in out
    assert "Sequential of my_nets:small, 4 tensors of 142 numbers loaded strictly" in out
    assert "own.npz, 9 images of 1x5x6" in out
    assert ("100.00 %  (9 of 9)" if command == "attack" else "(CTE)") in out


def test_certificates_are_those_of_the_model(run: Run, mine: Path) -> None:
    own = np.load("own.npz")
    x, y = torch.from_numpy(own["images"])[:, None].float() / 255, torch.from_numpy(own["labels"].astype(np.int64))
    for options, clip in (([], (0, 1)), (["--no-clip"], None), (["--clip", "-0.5", "1.5"], (-0.5, 1.5))):
        assert run("certify", *OWN, "--norm", "L3", *options, "--out", "a.npz")[0] == 0
        want = fr.certify.polyhedral_envelope(small(), x, y, 1 / 255, norm=3, clip=clip)
        np.testing.assert_allclose(np.load("a.npz")["radius"], want.radius.detach(), rtol=1e-4)
    status, out, _ = run("certify", *OWN, "--normalize", "0.2/0.5", "--no-clip", "--out", "a.npz")
    scaled = fr.certify.polyhedral_envelope(small(), (x - 0.2) / 0.5, y, 2 / 255)
    assert status == 0 and "normalised input" in out
    np.testing.assert_allclose(np.load("a.npz")["radius"], scaled.radius.detach() / 2, rtol=1e-3, atol=1e-7)


@both
def test_built_in_model_part_of_the_digits_and_threads(run: Run, command: str) -> None:
    threads = torch.get_num_threads()
    try:
        argv = [
            "--eps",
            "0.01",
            "--first",
            "5",
            "--limit",
            "7",
            "--threads",
            "1",
            "--data",
            "DIGITS",
            "--split",
            "train",
        ]
        status, out, _ = run(*COMMANDS[command], *argv)
        assert status == 0 and "digits, 7 images of 1x8x8" in out and torch.get_num_threads() == 1
        assert "built-in digits CNN (seed 0)" in out
    finally:
        torch.set_num_threads(threads)


def test_a_part_gets_the_random_starts_of_the_whole(run: Run, mine: Path) -> None:
    run("attack", *OWN, "--steps", "1", "--out", "whole.npz")
    run("attack", *OWN, "--steps", "1", "--first", "4", "--limit", "3", "--out", "part.npz")
    assert np.array_equal(np.load("whole.npz")["adversarial"][4:7], np.load("part.npz")["adversarial"])


def test_attack_without_and_with_another_box(run: Run, mine: Path) -> None:
    status, out, _ = run("attack", *OWN[:-1], "0.4", "--no-clip", "--out", "a.npz", "--report", "r.json")
    adv = np.load("a.npz")["adversarial"]
    assert status == 0 and "no box" in out and adv.min() < 0 and adv.max() > 1
    assert json.loads(Path("r.json").read_text())["setting"]["clip"] is None
    status, out, _ = run("attack", *OWN[:-1], "0.4", "--clip", "-0.1", "1.1", "--out", "a.npz")
    adv = np.load("a.npz")["adversarial"]
    assert status == 0 and "the box [-0.1, 1.1] holds" in out and -0.1 <= adv.min() < 0 and 1 < adv.max() <= 1.1


@pytest.mark.parametrize(
    "options",
    [
        ["attack", "--attack", "IFGSM", "--norm", "linf", "--loss", "DLR", "--keep", "Best"],
        ["attack", "--norm", "l2", "--targets", "ALL"],
        ["certify", "--method", "CROWN", "--norm", "LINF", "--refine", "All"],
        ["certify", "--norm", "l2", "--rounding", "Outward", "--strategy", "PEC"],
    ],
)
def test_names_in_any_case(run: Run, mine: Path, options: list[str]) -> None:
    assert run(*options, *OWN)[0] == 0


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint32, np.uint64, ">i4"])
@both
def test_labels_of_any_integer_type(run: Run, mine: Path, command: str, kind: object) -> None:
    own = np.load("own.npz")
    np.savez("typed.npz", images=own["images"].astype(np.float16) / 256, labels=own["labels"].astype(kind))
    assert run(*COMMANDS[command], *OWN, "--data", "typed.npz")[0] == 0


@both
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--factory", "my_nets:large"], "large is not there"),
        (["--factory", "nobody:small"], "nobody cannot be imported"),
        (["--factory", "small"], "package.module:callable"),
        (["--layout", "cnn"], "cannot be combined"),
        (["--layout", "vgg"], "--layout"),
        (["--model", "gone.pt"], "no file gone.pt"),
        (["--model", "own.npz"], "archive of numpy arrays"),
        (["--data", "gone.npz"], "no file gone.npz"),
        (["--data", "empty.npz"], "not an npz file"),
        (["--data", "cut.npz"], "cut.npz"),
        (["--data", "names.npz"], "holds pictures, labels"),
        (["--data", "flat.npz"], "fails on images of shape"),
        (["--data", "last.npz"], "channels come last"),
        (["--data", "floats.npz"], "float64 of shape (9,), expected integers"),
        (["--data", "columns.npz"], "shape (9, 1), expected integers of shape (9,)"),
        (["--data", "classes.npz"], "reach class 4, but the model has 4 classes"),
        (["--data", "huge.npz"], "expected classes >= 0"),
        (["--first", "9"], "first"),
        (["--split", "validation"], "--split"),
        (["--norm", "0.5"], "--norm"),
        (["--norm", "Lmax"], "--norm"),
        (["--clip", "1", "0"], "--clip"),
        (["--clip", "0", "0.001"], "clip"),
        (["--threads", "0"], "--threads"),
        (["--device", "cuda:99"], "--device"),
        (["--normalize", "0.1,0.2/1,1"], "normalize"),
        (["--normalize", "nan/1"], "--normalize"),
        (["--out", "no/where.npz"], "--out"),
        (["--out", "own.npz"], "would be overwritten"),
        (["--out", "net.pt.npz"], ""),
    ],
)
def test_bad_input_is_one_line(run: Run, mine: Path, command: str, options: list[str], said: str) -> None:
    own = dict(np.load("own.npz"))
    Path("empty.npz").touch()
    Path("cut.npz").write_bytes(Path("own.npz").read_bytes()[:300])
    np.savez("names.npz", pictures=own["images"], labels=own["labels"])
    np.savez("flat.npz", images=own["images"].reshape(9, 30), labels=own["labels"])
    np.savez("last.npz", images=own["images"][..., None], labels=own["labels"])
    np.savez("floats.npz", images=own["images"], labels=own["labels"].astype(float))
    np.savez("columns.npz", images=own["images"], labels=own["labels"][:, None])
    np.savez("classes.npz", images=own["images"], labels=np.full(9, 4))
    np.savez("huge.npz", images=own["images"], labels=np.full(9, 2**63, np.uint64))
    if not said:
        assert run(*COMMANDS[command], *OWN, *options)[0] == 0
        return
    assert said in failed(run, *COMMANDS[command], *OWN, *options)


def test_graphs_are_attacked_and_cannot_be_certified(run: Run, mine: Path) -> None:
    x = torch.rand(3, 1, 5, 6)
    torch.jit.save(torch.jit.trace(small(), x), "net.ts")
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(small(), (x,), dynamic_shapes=({0: batch},)), "net.pt2")
    for file, kind in (("net.ts", "TorchScript"), ("net.pt2", "exported program")):
        argv = ["--model", file, "--data", "own.npz", "--eps", "0.01"]
        assert f"{file} ({kind})" in run("attack", "--steps", "2", *argv)[1]
        said = failed(run, "certify", *argv)
        assert kind in said and "--factory" in said and "--trust" in said
        assert f"is of kind {kind}" in failed(run, "attack", *argv, "--layout", "cnn")


@both
def test_a_model_needs_its_data_and_a_factory_its_weights(run: Run, mine: Path, command: str) -> None:
    assert "--model: is needed" in failed(run, *COMMANDS[command], "--data", "own.npz", "--eps", "0.1")
    assert "--factory: needs" in failed(run, *COMMANDS[command], "--factory", "my_nets:small", "--eps", "0.1")


@both
def test_models_that_do_not_return_logits(run: Run, mine: Path, command: str) -> None:
    (mine / "odd_nets.py").write_text("from torch import nn\ndef odd(): return nn.Conv2d(1, 3, 3)\n")
    torch.save(nn.Conv2d(1, 3, 3).state_dict(), "odd.pt")
    assert "logits" in failed(run, *COMMANDS[command], *OWN, "--model", "odd.pt", "--factory", "odd_nets:odd")


@both
def test_warnings_are_plain_lines_said_once(
    run: Run, mine: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    owner = _attack_run if command == "attack" else cli._arguments
    real, batch = owner.check_classes, iter(range(3, 9))

    def loud(*given: object) -> None:
        warnings.warn(f"the gradient of {next(batch)} images\n is zero", stacklevel=1)
        warnings.warn("a model of chance", RuntimeWarning, stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        real(*given)

    monkeypatch.setattr(owner, "check_classes", loud)
    status, _, err = run(*COMMANDS[command], *OWN, "--batch-size", "3")
    assert status == 0 and err.splitlines() == [
        "fastrobust: warning: the gradient of 3 images is zero",
        "fastrobust: warning: a model of chance",
        "fastrobust: warning: came 2 more times with other figures: the gradient of 3 images is zero...",
    ]


def test_plain_warnings_of_weak_attacks(run: Run, mine: Path) -> None:
    """A model whose logits are not finite: the attack's own warning, once for all batches."""
    (mine / "nan_nets.py").write_text(
        "from torch import nn\n"
        "class Nan(nn.Linear):\n"
        "    def forward(self, x): return super().forward(x.flatten(1)) * float('nan')\n"
        "def make(): return Nan(30, 4)\n"
    )
    torch.save(nn.Linear(30, 4).state_dict(), "nan.pt")
    status, _, err = run("attack", *OWN, "--model", "nan.pt", "--factory", "nan_nets:make", "--batch-size", "4")
    lines = err.splitlines()
    assert status == 0 and 1 <= len(lines) == len(set(lines)) and "not finite" in err
    assert all(line.startswith("fastrobust: warning: ") for line in lines) and "UserWarning" not in err


@both
def test_the_rule_of_the_box_is_in_the_help(run: Run, capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit):
        run(command, "--help")
    assert "errs to the safe side" in " ".join(capsys.readouterr().out.split())
