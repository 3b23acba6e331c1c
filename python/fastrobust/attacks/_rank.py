"""The order in which target classes are tried."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._model import Victim
from ._objective import NO_GRADIENT

_MOST = 100  # candidates


def malt_targets(victim: Victim, x: Tensor, y: Tensor, count: int, norm: float) -> tuple[Tensor, int]:
    """(B, count) classes in the order of MALT (arXiv 2407.02240): the gap z_y - z_c over the dual norm of the gradient of
    z_c - z_y, smallest first, among the likeliest wrong classes; and the number of backward passes."""
    leaf, z = victim.differentiable(x)
    if not z.requires_grad:
        raise ValueError(NO_GRADIENT)
    true = z.gather(1, y[:, None])
    candidates = z.detach().scatter(1, y[:, None], -math.inf).topk(min(_MOST, z.shape[1] - 1), 1).indices
    gaps = z.gather(1, candidates) - true
    dual = {math.inf: 1.0, 2.0: 2.0, 1.0: math.inf}[norm]
    far = []
    for c in range(candidates.shape[1]):
        (grad,) = torch.autograd.grad(gaps[:, c].sum(), leaf, retain_graph=c + 1 < candidates.shape[1])
        size = torch.linalg.vector_norm(grad.nan_to_num().flatten(1), dual, 1)
        far.append(gaps[:, c].detach().abs() / size.clamp_min(1e-12))
    order = torch.stack(far, 1).argsort(dim=1, stable=True)[:, :count]
    return candidates.gather(1, order), candidates.shape[1]
