"""The table of Wang et al. 2019 on the digits: what it trains, attacks and keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
from fastrobust.benchmarks import attack_table


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "table.json"
    command = ["--dataset", "digits", "--images", "100", "--train-images", "600", "--epochs", "6", "--out", str(file)]
    assert attack_table.main(command) == 0
    rows = {row["key"]: row for row in json.loads(file.read_text())["rows"]}
    assert list(rows) == ["digits plain", "digits pgd"]
    for row in rows.values():
        ours = row["ours"]
        assert list(ours) == list(attack_table.COLUMNS) and row["images"] == 100 and row["train_images"] == 600
        assert row["losses"][-1] < row["losses"][0] and row["printed"] is None and row["run"]["threads"] >= 1
        assert all(0 <= v <= 100 for v in ours.values()) and ours["PGD-20"] <= ours["PGD-10"] + 3 <= ours["Clean"] + 3
        error = row["standard_error"]["Clean"]
        assert error == pytest.approx((ours["Clean"] * (100 - ours["Clean"]) / 100) ** 0.5)
    plain, robust = rows["digits plain"]["ours"], rows["digits pgd"]["ours"]
    assert plain["Clean"] > 80 and plain["PGD-20"] < 10 and robust["PGD-20"] > plain["PGD-20"]
    assert "printed" not in capsys.readouterr().out  # those are of MNIST
    assert attack_table.main([*command, "--models", "plain"]) == 0
    again = json.loads(file.read_text())["rows"]
    assert len(again) == 2 and again[0]["ours"] == plain  # a row takes the place of the same row


def test_printed_figures() -> None:
    """White-box accuracies of the paper's table 1, MNIST."""
    assert attack_table.PRINTED["plain"] == ("Unsecured", (99.20, 14.04, 0.0, 0.0, 0.0))
    assert attack_table.PRINTED["pgd"] == ("Standard", (97.61, 94.71, 91.21, 90.62, 91.03))
    assert attack_table.network(torch.Size((1, 28, 28)))(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_bad_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attack_table.main(["--images", "0"])
    assert "--images: got 0, expected at least 1" in capsys.readouterr().err
