"""The benchmark of attack steps: what it counts as the model's, and a row beside the public attacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrobust.benchmarks import attack_steps


def test_backward_passes_are_the_models() -> None:
    model = attack_steps.Timed(nn.Linear(200, 200))
    before = torch.autograd.grad
    with attack_steps.timed_autograd(model):
        x = torch.rand(64, 200, requires_grad=True)
        loss = model(x).sum()
        forward = model.seconds
        torch.autograd.grad(loss, x)
    assert model.passes == 1 and 0 < forward < model.seconds
    assert torch.autograd.grad is before


def test_rows_beside_the_public_attacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("autoattack", reason="the public AutoAttack is not importable")
    monkeypatch.setattr(attack_steps, "STEPS", {"apgd": 3, "fab": 2, "square": 3})
    out = tmp_path / "steps.json"
    assert attack_steps.main(["--batch", "4", "--rounds", "1", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 18 and all(r["ours_us"] > 0 and r["public_us"] > 0 for r in rows)
    assert {r["attack"] for r in rows} == {"apgd", "fab", "square"}
