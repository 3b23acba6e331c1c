"""The benchmark of attack steps: what it counts as the model's, and a row beside the public attacks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from fastrobust.benchmarks import attack_steps, harness
from fastrobust.benchmarks.case import Context, Suite


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


def test_rows_of_the_suite_agree_and_count_passes() -> None:
    done = harness.run([Suite("steps", attack_steps.cases, "")], Context(level="smoke"))
    assert {(row.work.split()[0], row.axes["norm"]) for row in done.rows} == {
        (attack, norm) for attack in attack_steps.STEPS for norm in attack_steps.NORMS
    }
    for row in done.rows:
        assert row.ours.status == harness.OK, row.ours.reason
        assert row.floor is not None and row.floor.kind == "passes"
        for result in (row.ours, *row.peers):
            assert result.status in (harness.OK, harness.SKIPPED), (row.work, row.axes, result)
            if result.status == harness.OK:
                assert result.passes is not None and result.passes.forwards >= 2 * attack_steps.FEW
                assert (result.passes.backwards > 0) == (not row.work.startswith("square"))


def test_what_counts_as_the_same() -> None:
    x, y = torch.full((2, 2), 0.5), torch.tensor([0, 1])
    x[0, 0] = x[1, 1] = 0.6
    compare = attack_steps.same_verdicts(lambda: (nn.Identity(), x, y), float("inf"), 0.2)
    fooled = x.clone()
    fooled[0, 0] = 0.45
    assert compare(x, x, 0.0).agrees and compare(fooled, fooled, 0.0).agrees
    assert compare(x, fooled, 0.0).difference == 1
    assert compare(x, x + 0.21, 9.0).measure == "ball" and compare(x, x[:1], 9.0).measure == "shape and box"
