"""Beside the public AutoAttack with the same settings: no easier on the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attack_helpers as h
from fastrobust.attacks.compat import AutoAttack


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.06), ("L2", 0.4), ("L1", 1.2)])
def test_robust_accuracy(norm: str, eps: float) -> None:
    public = pytest.importorskip("autoattack", reason="the public AutoAttack is not installed")
    x, y = h.digits_batch(60)
    model = h.digits_model()
    attacks: list[Any] = [
        kind(model, norm=norm, eps=eps, seed=0, verbose=False, version="standard", device="cpu")
        for kind in (AutoAttack, public.AutoAttack)
    ]
    held = []
    state = torch.get_rng_state()  # the public one seeds the global generator
    for attack in attacks:
        attack.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t", "square"]
        attack.apgd.n_restarts, attack.fab.n_iter, attack.square.n_queries = 1, 15, 60
        for part in (attack.apgd, attack.apgd_targeted):
            part.n_iter, part.use_largereps = 20, False
        if attack is attacks[1]:  # it reads these when it is made
            for part in (attack.apgd, attack.apgd_targeted):
                part.n_iter_orig = 20
                part.n_iter_2, part.n_iter_min, part.size_decr = 4, 1, 1
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 3
        held.append(model(attack.run_standard_evaluation(x, y, bs=60)).argmax(1) == y)
    torch.set_rng_state(state)
    ours, theirs = (int(flags.sum()) for flags in held)
    assert ours <= theirs + 1 and 5 < theirs < 55  # one example of chance
    assert int((held[0] != held[1]).sum()) <= 4


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.06), ("L2", 0.4), ("L1", 1.2)])
def test_each_attack_alone_over_seeds(norm: str, eps: float, name: str) -> None:
    """One run of either breaks an example more or less by luck; means over seeds must not differ."""
    public = pytest.importorskip("autoattack", reason="the public AutoAttack is not installed")
    x, y = h.digits_batch(200)
    model = h.digits_model()
    held: dict[Any, list[float]] = {AutoAttack: [], public.AutoAttack: []}
    state = torch.get_rng_state()
    for kind, found in held.items():
        for seed in range(4):
            attack: Any = kind(model, norm=norm, eps=eps, seed=seed, verbose=False, version="standard", device="cpu")
            attack.attacks_to_run = [name]
            attack.apgd.n_restarts, attack.square.n_queries = 1, 300
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = 2
            attack.fab.n_iter = 30
            adv = attack.run_standard_evaluation(x, y, bs=200)
            found.append(float((model(adv).argmax(1) == y).double().mean()))
    torch.set_rng_state(state)
    ours, theirs = (sum(found) / len(found) for found in held.values())
    assert ours <= theirs + 0.003 + 0.5 * (max(held[public.AutoAttack]) - min(held[public.AutoAttack]))
