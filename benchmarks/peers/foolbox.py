"""foolbox (Rauber et al. 2020): its Linf, L2 and L1 projected gradient descent without random start.

Fastest configuration with the same result: `run` rather than calling the attack, which would add a forward pass to
report success, and a model whose parameters ask for no gradient (foolbox calls backward(), which would compute them).
Its L1 step is the gradient scaled to L1 norm one, not the steepest ascent, so it is not offered here.
"""

from __future__ import annotations

import math

import torch

from ..case import Call, Unavailable
from . import require


def pgd(
    model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, *, norm: float, eps: float, step_size: float, steps: int
) -> Call:
    library = require("foolbox")
    kinds = {
        math.inf: library.attacks.LinfProjectedGradientDescentAttack,
        2.0: library.attacks.L2ProjectedGradientDescentAttack,
    }
    if norm not in kinds:
        raise Unavailable(f"has no steepest-ascent PGD for norm {norm}")
    attack = kinds[norm](abs_stepsize=step_size, steps=steps, random_start=False)
    wrapped = library.PyTorchModel(model, bounds=(0, 1), device=x.device)
    criterion = library.criteria.Misclassification(y)
    return lambda: attack.run(wrapped, x, criterion, epsilon=eps)
