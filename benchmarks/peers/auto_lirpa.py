"""auto_LiRPA (Xu et al. 2020): IBP, CROWN-IBP and CROWN of margins.

Fastest configuration with the same result: the BoundedModule and the specification are made once, no side and no coefficient is
computed that is not asked for. Its requirements pin an old torch; install a checkout with
``pip install --no-deps --no-build-isolation`` and its few pure-Python requirements beside it.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from ..case import Call, Unavailable
from . import require

METHODS = {"ibp": "IBP", "crown-ibp": "CROWN-IBP", "ibp-linear": "CROWN-IBP", "crown": "CROWN", "fast-lin": "CROWN"}


def margins(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    classes: int,
    *,
    eps: float,
    norm: float = math.inf,
    method: str,
    backward: bool = False,
) -> Call:
    """Lower bounds of the margins, without a box: the call returns them, or runs a backward pass through their sum."""
    library = require("auto_LiRPA")
    if method not in METHODS:
        raise Unavailable(f"has no {method}")
    lines = "same-slope" if method in ("ibp-linear", "fast-lin") else "adaptive"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bounded = library.BoundedModule(model, x, bound_opts={"activation_bound_option": lines}, verbose=False)
    eye = torch.eye(classes, device=x.device)
    rows = [torch.stack([eye[k] - eye[j] for j in range(classes) if j != k]) for k in y.tolist()]
    spec = torch.stack(rows)
    point = library.BoundedTensor(x, library.PerturbationLpNorm(norm=norm, eps=eps))

    def call() -> Tensor:
        with torch.set_grad_enabled(backward):
            low, _ = bounded.compute_bounds(x=(point,), C=spec, method=METHODS[method], bound_upper=False)
            if backward:
                for p in model.parameters():
                    p.grad = None
                low.sum().backward()
        return low.detach()

    return call
