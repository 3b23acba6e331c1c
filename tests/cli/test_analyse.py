"""``fastrobust analyse``: files and numbers of a study, refusals, the global random state."""

import json

import numpy as np
import pytest
import torch

from benchmarks import gallery_claims
from cli_helpers import Run
from fastrobust.cli import analyse


def _study(images, labels, seed):
    """A small study."""
    noise = torch.rand(3)  # as training draws
    return {"mean": images.mean(), "noise": noise, "many": np.arange(101)}, lambda path: path.write_bytes(b"png")


def test_writes_what_the_study_returns(run: Run, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    monkeypatch.setattr(analyse, "topics", lambda: {"small": _study})
    before = torch.get_rng_state()
    status, out, _ = run("analyse", "small", "--limit", "5", "--seed", "3", "--out", tmp_path / "new")
    assert status == 0 and "mean" in out and "5 images" in out
    assert torch.equal(before, torch.get_rng_state())
    with np.load(tmp_path / "new/small.npz") as found:
        assert found["many"].tolist() == list(range(101))
        noise = found["noise"].tolist()
    written = json.loads((tmp_path / "new/small.json").read_text())
    assert (
        written["seed"] == 3 and written["arrays"]["noise"] == pytest.approx(noise) and "many" not in written["arrays"]
    )
    assert noise == pytest.approx(torch.rand(3, generator=torch.Generator().manual_seed(3)).tolist())
    assert "small" in run("analyse", "--list")[1]


def test_refuses(run: Run, tmp_path):
    status, _, err = run("analyse", "no-such-study")
    assert status == 2 and "no-such-study" in err and "trajectory" in err
    (tmp_path / "file").write_text("")
    status, _, err = run("analyse", "trajectory", "--out", tmp_path / "file")
    assert status == 2 and "--out" in err


@pytest.mark.thorough
@pytest.mark.parametrize("name", list(analyse.topics()))
def test_every_study_runs(run: Run, tmp_path, name):
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    assert run("analyse", name, "--limit", "64", "--out", tmp_path)[0] == 0
    with np.load(tmp_path / f"{name}.npz") as found:
        assert found.files
    assert (tmp_path / f"{name}.png").stat().st_size > 5000
    arrays = json.loads((tmp_path / f"{name}.json").read_text())["arrays"]
    for claim in gallery_claims.STUDIES[name].claims:
        assert claim.check({key: np.array(value) for key, value in arrays.items()})[1]
