"""``fastrobust attack`` on the built-in model and on saved ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cli_helpers import Run
from fastrobust import data

pytest.importorskip("sklearn", reason="the digits need scikit-learn")
FEW = ("--limit", "60", "--batch-size", "40")
ORDER = {"Linf": np.inf, "L2": 2, "L1": 1}


def report_of(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON")))


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_built_in_model(run: Run, digits_model: nn.Module, tmp_path: Path, norm: str) -> None:
    out, report = tmp_path / "adv.npz", tmp_path / "report.json"
    status, text, _ = run("attack", "--norm", norm, "--out", out, "--report", report)
    assert status == 0 and "robust accuracy" in text and str(out) in text
    found = report_of(report)
    clean, robust = found["result"]["clean_accuracy"], found["result"]["robust_accuracy"]
    assert clean > 0.95 and robust < clean - 0.2
    assert f"{100 * clean:.2f} %" in text and f"{100 * robust:.2f} %" in text
    saved = np.load(out)
    x, adv, labels = saved["images"], saved["adversarial"], saved["labels"]
    assert adv.dtype == np.float32 and adv.shape == (450, 1, 8, 8) and adv.min() >= 0 and adv.max() <= 1
    size = np.linalg.norm((adv.astype(np.float64) - x).reshape(len(x), -1), ord=ORDER[norm], axis=1)
    assert (size <= found["setting"]["eps"]).all() and size.max() > 0.5 * found["setting"]["eps"]
    # the figures again, from the file and the model alone
    with torch.no_grad():
        before, after = (digits_model(torch.from_numpy(t)).argmax(1).numpy() for t in (x, adv))
    assert np.array_equal(before, saved["prediction_clean"]) and np.array_equal(after, saved["prediction_adversarial"])
    assert clean == pytest.approx((before == labels).mean())
    assert robust == pytest.approx(((before == labels) & (after == labels)).mean())
    with torch.no_grad():
        loss = nn.functional.cross_entropy(
            digits_model(torch.from_numpy(adv)), torch.from_numpy(labels), reduction="none"
        )
    assert found["result"]["loss"]["mean"] == pytest.approx(loss.mean().item(), rel=1e-4)
    # and the saved file is data for the next run
    status, text, _ = run("attack", "--data", out, "--model", _scripted(digits_model, tmp_path), "--eps", "0", *FEW)
    assert status == 0 and "adv.npz, 60 images of 1x8x8" in text


def _scripted(model: nn.Module, folder: Path) -> Path:
    torch.jit.save(torch.jit.trace(model, torch.zeros(2, 1, 8, 8)), str(folder / "model.ts"))
    return folder / "model.ts"


def test_one_seed_one_result(run: Run, digits_model: nn.Module, tmp_path: Path) -> None:
    def examples(seed: str) -> np.ndarray:
        model = _scripted(digits_model, tmp_path)
        assert (
            run("attack", "--model", model, "--seed", seed, "--steps", "1", "--out", tmp_path / "a.npz", *FEW)[0] == 0
        )
        return np.asarray(np.load(tmp_path / "a.npz")["adversarial"])

    assert np.array_equal(examples("7"), examples("7"))
    assert not np.array_equal(examples("7"), examples("8"))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (["--attack", "fgsm"], "fgsm, Linf, eps 0.1, loss ce"),
        (["--attack", "ifgsm", "--steps", "4"], "ifgsm, Linf, eps 0.1, 4 steps of 0.025"),
        (["--eps", "8/255", "--step-size", "2/255"], "eps 0.0313725, 10 steps of 0.007843"),
        (["--restarts", "2", "--loss", "margin", "--keep", "best"], "2 restarts, loss margin"),
        (["--early-stop"], "early stop"),
        (["--targets", "2", "--loss", "dlr"], "loss dlr, targets: 2"),
        (["--targets", "all"], "targets: all"),
        (["--loss", "kl"], "loss kl"),
        (["--normalize", "0.3/0.35"], "pgd"),
        (["--progress"], "pgd"),
    ],
)
def test_options(run: Run, options: list[str], shown: str) -> None:
    status, text, err = run("attack", *FEW, *options)
    assert status == 0 and shown in text and "is broken" not in text.lower()
    assert ("robust" in err) == ("--progress" in options)


def test_eps_fraction_is_exact(run: Run, tmp_path: Path) -> None:
    run("attack", "--eps", "8/255", "--report", tmp_path / "r.json", *FEW)
    assert report_of(tmp_path / "r.json")["setting"]["eps"] == 8 / 255


def test_eps_zero_changes_nothing(run: Run, tmp_path: Path) -> None:
    status, _, _ = run("attack", "--eps", "0", "--out", tmp_path / "a.npz", *FEW)
    saved = np.load(tmp_path / "a.npz")
    assert status == 0 and np.array_equal(saved["images"], saved["adversarial"])


def test_targeted(run: Run, tmp_path: Path) -> None:
    status, text, _ = run("attack", "--targeted", "3", "--eps", "0.3", "--steps", "20", "--report", tmp_path / "r.json")
    result = report_of(tmp_path / "r.json")["result"]
    expected = int((data.load("digits").labels != 3).sum())
    assert status == 0 and result["examples"] == expected and "says 3" in text
    assert result["reached_target"] > 0.5 and result["loss"]["median"] < 0.7 and result["robust_accuracy"] < 0.3


@pytest.mark.parametrize("kind", ["script", "trace", "frozen", "export"])
def test_saved_models(run: Run, tiny: nn.Module, tmp_path: Path, kind: str) -> None:
    """Each file gives what the module in memory gives."""
    x, path = torch.rand(4, 1, 8, 8), tmp_path / "model"
    if kind == "export":
        path = tmp_path / "model.pt2"
        torch.export.save(torch.export.export(tiny, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)), path)
    else:
        made = torch.jit.trace(tiny, x) if kind == "trace" else torch.jit.script(tiny)
        torch.jit.save(torch.jit.freeze(made) if kind == "frozen" else made, str(path))
    torch.save(tiny, tmp_path / "whole.pt")
    options = ("--steps", "3", *FEW, "--early-stop", "--out")
    status, text, err = run("attack", "--model", path, *options, tmp_path / "a.npz")
    assert status == 0, err
    assert ("exported program" if kind == "export" else "TorchScript") in text
    status, _, _ = run("attack", "--model", tmp_path / "whole.pt", "--trust", *options, tmp_path / "b.npz")
    a, b = np.load(tmp_path / "a.npz"), np.load(tmp_path / "b.npz")
    assert status == 0 and np.mean(np.abs(a["adversarial"] - b["adversarial"]) > 1e-4) < 0.01


class _Planted:
    """A pickle that would write a file as it loads."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


def test_a_pickle_runs_no_code_without_trust(run: Run, tmp_path: Path) -> None:
    torch.save(_Planted(tmp_path / "ran"), tmp_path / "model.pt")
    status, _, err = run("attack", "--model", tmp_path / "model.pt")
    assert status == 2 and "--trust" in err and not (tmp_path / "ran").exists()


def test_unusable_models(run: Run, tiny: nn.Module, tmp_path: Path) -> None:
    torch.save(tiny.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("not a model")
    torch.export.save(torch.export.export(tiny, (torch.rand(4, 1, 8, 8),)), tmp_path / "static.pt2")
    _scripted(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), tmp_path)
    cases = {
        "none.pt": "there is no file",
        "weights.pt": "--factory",
        "text.pt": "no file of torch.save",
        "static.pt2": "dynamic batch",
        "model.ts": "the model has 3 classes",
    }
    for file, said in cases.items():
        status, out, err = run("attack", "--model", tmp_path / file, *FEW)
        assert status == 2 and out == "" and len(err.splitlines()) == 1 and said in err, (file, err)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--eps", "-1"], "--eps"),
        (["--eps", "8/0"], "--eps"),
        (["--eps", "nan"], "--eps"),
        (["--norm", "L3"], "--norm"),
        (["--steps", "-2"], "--steps"),
        (["--steps", "5", "--attack", "fgsm"], "--steps"),
        (["--step-size", "big"], "--step-size"),
        (["--attack", "cw"], "--attack"),
        (["--loss", "hinge"], "--loss"),
        (["--restarts", "0"], "--restarts"),
        (["--limit", "0"], "--limit"),
        (["--batch-size", "1.5"], "--batch-size"),
        (["--device", "tpu"], "--device"),
        (["--targeted", "10"], "--targeted"),
        (["--targeted", "1", "--targets", "2"], "--targets"),
        (["--targeted", "1", "--loss", "kl"], "loss"),
        (["--normalize", "0.5"], "--normalize"),
        (["--normalize", "0.5/0"], "--normalize"),
        (["--normalize", "0.5,0.5/1,1"], "normalize"),
        (["--data", "imagenet"], "imagenet"),
        (["--data", "none.npz"], "none.npz"),
        (["--data", "mnist", "--data-dir", "no-such-folder"], "mnist.npz"),
        (["--out", "no-such-folder/a.npz"], "--out"),
        (["--picture", "no-such-folder/a.png"], "--picture"),
    ],
)
def test_bad_input(run: Run, digits_model: nn.Module, options: list[str], named: str) -> None:
    status, out, err = run("attack", *FEW, *options)
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and named in err


def test_data_of_your_own_needs_model_and_eps(run: Run, tmp_path: Path, tiny: nn.Module) -> None:
    np.savez(tmp_path / "own.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.arange(3))
    status, _, err = run("attack", "--data", tmp_path / "own.npz", "--eps", "0.1")
    assert status == 2 and "--model" in err
    model = _scripted(tiny, tmp_path)
    status, _, err = run("attack", "--data", tmp_path / "own.npz", "--model", model)
    assert status == 2 and "--eps" in err
    assert run("attack", "--data", tmp_path / "own.npz", "--model", model, "--eps", "0.1")[0] == 0


def test_without_scikit_learn(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    status, out, err = run("attack")
    assert status == 2 and out == "" and len(err.splitlines()) == 1 and "pip install scikit-learn" in err


def test_without_matplotlib(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = run("attack", "--picture", tmp_path / "a.png", *FEW)
    assert status == 0 and "robust accuracy" in out and not (tmp_path / "a.png").exists()
    assert len(err.splitlines()) == 1 and "pip install matplotlib" in err


@pytest.mark.data
def test_mnist(run: Run, data_dir: Path, tmp_path: Path) -> None:
    from fastrobust.models import mnist_cnn

    torch.jit.save(torch.jit.trace(mnist_cnn().eval(), torch.zeros(2, 1, 28, 28)), str(tmp_path / "m.ts"))
    status, out, _ = run("attack", "--data", "mnist", "--data-dir", data_dir, "--model", tmp_path / "m.ts", *FEW)
    assert status == 0 and "mnist, 60 images of 1x28x28" in out and "the ball of 0.1 holds" in out
    status, _, err = run("attack", "--data", "mnist", "--data-dir", data_dir)
    assert status == 2 and "--model" in err


@pytest.mark.cuda
def test_on_a_gpu(run: Run, digits_model: nn.Module) -> None:
    status, out, _ = run("attack", "--device", "cuda")
    assert status == 0 and "cuda" in out and "the ball of 0.1 holds" in out


def test_randomised_model_with_several_outputs(run: Run, tmp_path: Path) -> None:
    """The remedies that the errors and warnings name exist in the command."""
    (tmp_path / "noisy.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Noisy(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(64, 10)\n\n"
        "    def forward(self, x):\n"
        "        return x, self.layer((x + 0.1 * torch.randn_like(x)).flatten(1))\n"
    )
    layer = nn.Linear(64, 10)
    torch.save({"layer.weight": layer.weight.detach(), "layer.bias": layer.bias.detach()}, tmp_path / "noisy.pt")
    model = ("--model", tmp_path / "noisy.pt", "--factory", f"{tmp_path / 'noisy.py'}:Noisy")
    given = (*model, "--attack", "ifgsm", "--steps", "2", "--eps", "0.1", *FEW)
    status, _, err = run("attack", *given)
    assert status == 2 and "output=0" in err
    status, text, err = run("attack", *given, "--output", "1")
    assert status == 0 and "robust accuracy" in text and "eot_samples" in err
    status, text, err = run("attack", *given, "--output", "1", "--eot-samples", "3", "--report", tmp_path / "r.json")
    assert status == 0 and "eot_samples" not in err
    assert report_of(tmp_path / "r.json")["setting"]["eot_samples"] == 3
