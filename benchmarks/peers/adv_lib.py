"""adv-lib (Rony et al., https://github.com/jeromerony/adversarial-library): APGD with a given number of steps.

Fastest configuration with the same result: one restart, no search for the largest loss. Its FAB is of another kind
(every class, no radius), and it has no Square. Its package imports torchvision and visdom, for a distance and for
pictures that no attack used here needs: where they are missing, empty modules stand in for them while it is imported.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..case import Call, Unavailable
from . import require

NORMS = {"Linf": float("inf"), "L2": 2, "L1": 1}


def library() -> ModuleType:
    missing = []
    for name in ("torchvision", "visdom"):
        if name not in sys.modules:
            try:
                __import__(name)
            except ImportError:
                stand_in = ModuleType(name)
                stand_in.models = None  # type: ignore[attr-defined]
                sys.modules[name] = stand_in
                missing.append(name)
    try:
        return require("adv_lib.attacks.auto_pgd", "--no-deps adv-lib")
    finally:
        for name in missing:
            del sys.modules[name]


def steps(attack: str, model: Any, x: Tensor, y: Tensor, *, norm: str, eps: float, steps: int) -> Call:
    if attack != "apgd":
        raise Unavailable("has no such attack with a radius")
    apgd = library().apgd

    def call() -> Tensor:
        with torch.random.fork_rng(devices=[]):  # it draws from the global generator
            return apgd(model, x, y, eps, NORMS[norm], n_iter=steps, loss_function="ce")

    return call
