"""The public AutoAttack (Croce & Hein 2020; https://github.com/fra31/auto-attack), importable as `autoattack`.

Fastest configuration with the same result: one batch of all examples, no output, a model whose parameters ask for no
gradient (its FAB would compute theirs).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..case import Call, Unavailable
from ..passes import Passes
from . import require

NAMES = {math.inf: "Linf", 2.0: "L2", 1.0: "L1"}


def standard(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    norm: float,
    eps: float,
    steps: int | None,
    queries: int | None,
    seed: int = 0,
) -> Call:
    """The standard evaluation. The first call counts passes, too, and no later one. ``steps`` and ``queries``, where
    given, are those of every attack and of Square."""
    library = require("autoattack", "git+https://github.com/fra31/auto-attack")
    if norm not in NAMES:
        raise Unavailable(f"has no attack for norm {norm}")
    attack = library.AutoAttack(
        model, norm=NAMES[norm], eps=eps, version="standard", device=x.device, verbose=False, seed=seed
    )
    if steps is not None:
        for part in (attack.apgd, attack.apgd_targeted):
            part.n_iter = part.n_iter_orig = steps
        attack.fab.n_iter = steps
    if queries is not None:
        attack.square.n_queries = queries
    watch: list[Passes] = [Passes(model)]
    counts: dict[str, int] = {}

    def call() -> dict[str, Any]:
        state = torch.get_rng_state()  # it seeds the global generator
        try:
            adv = attack.run_standard_evaluation(x, y, bs=len(x))
        finally:
            torch.set_rng_state(state)
        for passes in watch:
            passes.handle.remove()
            counts.update(forwards=passes.forwards, backwards=passes.backwards)
        watch.clear()
        return {"adv": adv, **counts}

    return call


def steps(attack: str, model: Any, x: Tensor, y: Tensor, *, norm: str, eps: float, steps: int) -> Call:
    """So many steps of "apgd" (cross-entropy), "fab" (one target) or "square", from its own random numbers."""
    part = lambda name: require(f"autoattack.{name}", "git+https://github.com/fra31/auto-attack")
    if attack == "apgd":
        whole = part("autopgd_base").APGDAttack(
            model,
            n_iter=steps,
            norm=norm,
            n_restarts=1,
            eps=eps,
            seed=0,
            loss="ce",
            eot_iter=1,
            rho=0.75,
            device=x.device,
        )
    elif attack == "fab":
        whole = part("fab_pt").FABAttack_PT(
            model,
            n_restarts=1,
            n_iter=steps,
            eps=eps,
            seed=0,
            norm=norm,
            verbose=False,
            device=x.device,
            targeted=True,
            n_target_classes=1,
        )
    else:
        whole = part("square").SquareAttack(
            model,
            p_init=0.8,
            n_queries=steps,
            eps=eps,
            norm=norm,
            n_restarts=1,
            seed=0,
            verbose=False,
            device=x.device,
            resc_schedule=False,
        )
    return lambda: whole.perturb(x, y)
