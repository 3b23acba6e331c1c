"""auto_LiRPA (Xu et al. 2020): IBP, CROWN-IBP and CROWN of margins.

Fastest configuration with the same result: the BoundedModule and the specification are made once, no side and no
coefficient is computed that is not asked for. Its requirements pin an old torch; install a checkout with
``pip install --no-deps --no-build-isolation`` and its few pure-Python requirements beside it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

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
    bounds = bounded(model, x, method)
    spec = specification(y, classes)

    def call() -> Tensor:
        with torch.set_grad_enabled(backward):
            low = bounds(x, y, classes, eps, norm, spec)
            if backward:
                for p in model.parameters():
                    p.grad = None
                low.sum().backward()
        return low.detach()

    return call


def specification(y: Tensor, classes: int) -> Tensor:
    """(B, classes - 1, classes): rows e_y - e_j, j ascending without y."""
    eye = torch.eye(classes, device=y.device)
    rows = [torch.stack([eye[k] - eye[j] for j in range(classes) if j != k]) for k in y.tolist()]
    return torch.stack(rows)


def bounded(model: nn.Module, x: Tensor, method: str) -> Callable[..., Tensor]:
    """A function of (x, y, classes, eps, norm, spec) that gives lower bounds of the margins; the model is read once."""
    library = require("auto_LiRPA")
    if method not in METHODS:
        raise Unavailable(f"has no {method}")
    lines = "same-slope" if method in ("ibp-linear", "fast-lin") else "adaptive"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = library.BoundedModule(model, x, bound_opts={"activation_bound_option": lines}, verbose=False)

    def margins_of(
        x: Tensor, y: Tensor, classes: int, eps: float, norm: float = math.inf, spec: Tensor | None = None
    ) -> Tensor:
        point = library.BoundedTensor(x, library.PerturbationLpNorm(norm=norm, eps=eps))
        rows = specification(y, classes) if spec is None else spec
        low, _ = module.compute_bounds(x=(point,), C=rows, method=METHODS[method], bound_upper=False)
        return low

    return margins_of
