"""torchattacks (Kim 2020): PGD and PGDL2 without random start.

Fastest configuration with the same result: the attack object is made once, the model's mode is left alone, and the
model comes with parameters that ask for no gradient. torchattacks 3.5.1 names torchvision as a requirement but its
attacks do not import it, so nothing needs to stand in for it.
"""

from __future__ import annotations

import math

import torch

from ..case import Call, Unavailable
from . import require


def pgd(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, *, norm: float, eps: float, step_size: float, steps: int
) -> Call:
    library = require("torchattacks")
    if norm == math.inf:
        attack = library.PGD(model, eps=eps, alpha=step_size, steps=steps, random_start=False)
    elif norm == 2:
        attack = library.PGDL2(model, eps=eps, alpha=step_size, steps=steps, random_start=False)
    else:
        raise Unavailable(f"has no PGD for norm {norm}")
    return lambda: attack(x, y)
