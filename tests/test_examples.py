"""The programs of examples/, at small settings: what they return hangs together, and each fits one screen."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn", reason="the examples need scikit-learn's digits")
    monkeypatch.chdir(tmp_path_factory.getbasetemp())
    monkeypatch.setenv("FASTROBUST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def run(name: str, *argv: str) -> dict[str, float]:
    found: dict[str, float] = runpy.run_path(str(FOLDER / f"{name}.py"))["main"](argv)
    return found


def test_evaluate_your_model(capsys: pytest.CaptureFixture[str]) -> None:
    found = run("evaluate_your_model", "--images", "20", "--eps", "0.1")
    assert found["proven"] <= found["robust"] < found["clean"]
    assert "apgd-ce" in capsys.readouterr().out


def test_train_and_certify() -> None:
    found = run("train_and_certify", "--epochs", "3", "--images", "50", "--method", "ibp", "--eps", "0.02")
    assert found["clean"] > 0.5  # of ten classes
    assert 100 * (1 - found["clean"]) <= found["error"] + 1e-4
    assert 0 < found["radius"] <= 0.06


def test_prune_pack_attack() -> None:
    found = run("prune_pack_attack", "--epochs", "1", "--rate", "0.5")
    assert found["same"] == 1.0
    assert found["robust"] <= found["clean"]
    assert 4 * 20000 < found["bytes"] < 4 * 41866 * 0.6  # half of the weights, and their mask


def test_each_is_named_in_the_readme_and_fits_one_screen() -> None:
    files = sorted(FOLDER.glob("*.py"))
    assert len(files) == 3 and "(examples)" in (FOLDER.parent / "README.md").read_text()
    assert all(len(path.read_text().splitlines()) <= 55 for path in files)
