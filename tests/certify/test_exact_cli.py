"""fastrobust certify --exact, and benchmarks.exact_tables."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch
from torch import nn

import fastrobust as fr
from benchmarks import exact_tables
from fastrobust.cli import main


def trained() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 20), nn.ReLU(), nn.Linear(20, 5)).eval()
    x = torch.randint(0, 256, (24, 6, 6), dtype=torch.uint8)
    y = model(x[:, None].float() / 255).argmax(1)
    y[3] = (y[3] + 1) % 5
    return model, x, y


def test_the_command_writes_verdicts(tmp_path, capsys):
    model, x, y = trained()
    np.savez(tmp_path / "data.npz", test_images=x.numpy(), test_labels=y.numpy())
    torch.save(
        {"a.weight": model[1].weight, "a.bias": model[1].bias, "b.weight": model[3].weight, "b.bias": model[3].bias},
        tmp_path / "state.pt",
    )
    base = ["certify", "--model", str(tmp_path / "state.pt"), "--layout", "dense", "--data", str(tmp_path / "data.npz")]
    out = tmp_path / "r.csv"
    assert main([*base, "--exact", "--eps", "0.015", "--no-progress", "--batch-size", "10", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    want = fr.certify.verify(model, x[:, None].float() / 255, y, 0.015)
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["status"] for r in rows] == want.status and [r["stage"] for r in rows][3] == "clean"
    assert all(float(r["distance"]) <= 0.015 for r in rows)
    wrong = 100 * want.count("falsified") / 24
    assert f"{wrong:.2f} %" in next(line for line in text.splitlines() if "exact error" in line)
    assert 0 < wrong < 100
    for more, words in (
        (["--high", "0.1"], "--exact: needs --eps"),
        (["--eps", "0.1", "--refine", "all"], "--refine"),
        (["--eps", "0.1", "--timeout", "0"], "--timeout"),
    ):
        assert main([*base, "--exact", *more]) == 2
        assert words in capsys.readouterr().err


def test_figures_of_the_table_are_in_order():
    model, x, y = trained()
    images = x[:, None].float() / 255
    found = exact_tables.decide(model, images, y, 0.03, timeout=20, budget=60)
    got = exact_tables.figures(found)
    assert got["CTE"] == pytest.approx(100 / 24)
    assert got["CTE"] <= got["attacked"] <= got["exact"] <= got["exact"] + got["undecided"] <= got["CRE"]
    assert found.status == fr.certify.verify(model, images, y, 0.03).status
    late = exact_tables.decide(model, images, y, 0.03, timeout=20, budget=0)
    assert late.count("unknown") >= found.count("unknown") and len(late.status) == 24


@pytest.mark.data
def test_a_row_of_table_3_6(data_dir, monkeypatch, capsys, tmp_path):
    out = tmp_path / "t.json"
    argv = ["exact_tables", "--data", str(data_dir), "--rows", "fc1_l1_kw", "--images", "40", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    exact_tables.main()
    assert "mnist fc1 relu Linf kw" in capsys.readouterr().out and '"undecided": []' in out.read_text()
