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
from . import require

NAMES = {math.inf: "Linf", 2.0: "L2", 1.0: "L1"}


class Passes:
    """Images that go through a model forwards and backwards while it is watched."""

    def __init__(self, model: nn.Module) -> None:
        self.forwards = self.backwards = 0
        self.handle = model.register_forward_hook(self._forward)

    def _forward(self, model: nn.Module, given: Any, out: Tensor) -> None:
        self.forwards += len(out)
        if out.requires_grad:
            out.register_hook(self._backward)

    def _backward(self, grad: Tensor) -> None:
        self.backwards += len(grad)


def standard(
    model: nn.Module, x: Tensor, y: Tensor, *, norm: float, eps: float, steps: int | None, queries: int | None
) -> Call:
    """The standard evaluation. The first call counts passes, too, and no later one. ``steps`` and ``queries``, where given,
    are those of every attack and of Square."""
    library = require("autoattack", "git+https://github.com/fra31/auto-attack")
    if norm not in NAMES:
        raise Unavailable(f"has no attack for norm {norm}")
    attack = library.AutoAttack(
        model, norm=NAMES[norm], eps=eps, version="standard", device=x.device, verbose=False, seed=0
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
