"""The public AutoAttack's interface, and its silent faults, which are not ours."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import attack_helpers as h
from fastrobust.attacks.compat import AutoAttack


def _short(**options: Any) -> AutoAttack:
    attack = AutoAttack(h.digits_model(), norm="Linf", eps=0.08, seed=0, verbose=False, **options)
    attack.apgd.n_iter = attack.apgd_targeted.n_iter = attack.fab.n_iter = 4
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 2
    attack.square.n_queries = 15
    return attack


def test_evaluations() -> None:
    x, y = h.digits_batch(24)
    attack = _short()
    adv, labels = attack.run_standard_evaluation(x, y, bs=10, return_labels=True)
    h.assert_inside(adv, x, 0.08, h.INF)
    model = h.digits_model()
    assert torch.equal(labels, model(adv).argmax(1))
    held = labels == y
    assert torch.equal(adv[held], x[held])
    assert attack.report is not None and attack.report.robust_accuracy == pytest.approx(held.double().mean().item())
    assert attack.clean_accuracy(x, y) == pytest.approx(h.accuracy(model, x, y) / 100)


def test_individual_evaluations_leave_the_object_alone() -> None:
    x, y = h.digits_batch(16)
    attack = _short()
    settings = lambda: copy.deepcopy(
        (attack.attacks_to_run, attack.verbose, attack.apgd, attack.apgd_targeted, attack.fab, attack.square)
    )
    before = settings()
    found = attack.run_standard_evaluation_individual(x, y)
    assert settings() == before and list(found) == attack.attacks_to_run
    assert all(not torch.equal(adv, x) for adv in found.values())


def test_plus_twice_is_the_same() -> None:
    x, y = h.digits_batch(12)
    attack = _short(version="plus")
    attack.apgd.n_restarts = attack.fab.n_restarts = 2
    attack.attacks_to_run = ["fab-t", "fab"]
    first = attack.run_standard_evaluation(x, y)
    assert torch.equal(attack.run_standard_evaluation(x, y), first) and attack.fab.n_restarts == 2


def test_settings_reach_the_attacks() -> None:
    x, y = h.digits_batch(8)
    watch = h.Watch(h.digits_model())
    attack = AutoAttack(watch, eps=0.001, version="custom", attacks_to_run=["square"], seed=0, verbose=False)
    attack.square.n_queries = 7
    attack.run_standard_evaluation(x, y)
    few = len(watch.sizes)
    attack.square.n_queries = 11
    attack.run_standard_evaluation(x, y)
    assert len(watch.sizes) - few == few + 4


def test_state_resumes(tmp_path: Path) -> None:
    x, y = h.digits_batch(16)
    file = tmp_path / "state"
    first = _short().run_standard_evaluation(x, y, state_path=file)
    watch = h.Watch(h.digits_model())
    attack = _short()
    attack.model = watch.eval()
    with pytest.raises(
        ValueError, match="model differ"
    ):  # another module: its weights have other names, not other values
        changed = copy.deepcopy(watch)
        changed.model[-1].bias.data += 1
        attack.model = changed
        attack.run_standard_evaluation(x, y, state_path=file)
    assert torch.equal(_short().run_standard_evaluation(x, y, state_path=file), first)


def test_logs_and_tracing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """check_dynamic of the public one ends with sys.settrace(None), which kills debuggers and coverage."""
    x, y = h.digits_batch(6)
    attack = _short(log_path=tmp_path / "log.txt")
    attack.verbose = True
    before = sys.gettrace()
    attack.run_standard_evaluation(x, y)
    assert sys.gettrace() is before
    assert "apgd-t" in capsys.readouterr().out and "apgd-t" in (tmp_path / "log.txt").read_text()


def test_what_is_not_covered_says_so() -> None:
    for bad, name in (
        ({"is_tf_model": True}, "is_tf_model"),
        ({"version": "best"}, "version"),
        ({"norm": "L3"}, "norm"),
    ):
        with pytest.raises(ValueError, match=f"{name}: got"):
            AutoAttack(h.digits_model(), **bad)  # type: ignore[arg-type]
    attack = AutoAttack(h.digits_model(), version="custom", attacks_to_run=["pgd"], verbose=False)
    with pytest.raises(ValueError, match="attacks_to_run: got 'pgd'"):
        attack.run_standard_evaluation(*h.digits_batch(2))
