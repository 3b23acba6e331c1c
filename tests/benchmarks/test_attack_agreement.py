"""Whole evaluations over several seeds beside the public AutoAttack: what is kept, and that a run goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastrobust.benchmarks import agreement_table, attack_agreement


def _row(seed: int, ours: list[int], public: list[int]) -> dict[str, object]:
    return {
        "problem": "some", "points": 10, "seed": seed, "clean": 100.0, "ours": 10.0 * len(ours),
        "public": 10.0 * len(public), "alike": 10 - len(set(ours) ^ set(public)), "held": {"ours": ours, "public": public},
    }  # fmt: skip


def test_means_over_seeds() -> None:
    found = agreement_table.means([_row(0, [1, 2, 3], [1, 2]), _row(1, [1, 2], [1, 2, 4]), _row(2, [1, 2], [1, 2])])
    assert list(found) == ["some"]
    some = found["some"]
    assert some["ours"] == pytest.approx(70 / 3) and some["public"] == pytest.approx(70 / 3)
    assert some["apart"] == 0 and some["verdicts apart"] == 1 and some["seeds"] == 3
    assert some["verdicts of seeds apart"] == {"ours": 1, "public": 1}


def test_the_table(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"rows": [_row(0, [1, 2, 3], [1, 2])]}))
    (line,) = agreement_table.markdown([file]).splitlines()[2:]
    assert line == "| some | 1 | 100.0 % | 30.00 % | 20.00 % | +10.00 | 1 | |"


def test_a_run_goes_on_where_its_file_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("autoattack", reason="the public AutoAttack is not installed")
    file = tmp_path / "rows.json"
    command = ["--short", "--points", "4", "--datasets", "mnist", "--models", "plain", "--norms", "Linf"]
    state = torch.get_rng_state()
    assert attack_agreement.main([*command, "--seeds", "1", "--out", str(file)]) == 0
    (first,) = json.loads(file.read_text())["rows"]
    assert first["points"] == 4 and set(first["held"]["ours"]) <= set(range(4))
    assert attack_agreement.main([*command, "--seeds", "2", "--out", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert rows[0] == first and [row["seed"] for row in rows] == [0, 1]
    assert "4 points                    2   " in capsys.readouterr().out and torch.equal(torch.get_rng_state(), state)


def test_numbers_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        attack_agreement.main(["--points", "0"])
    assert "--points: got 0, expected at least 1" in capsys.readouterr().err
