"""Polyhedral envelope regularisation (Liu 2022, section 3.3.3)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.bounds.checks import check_inputs, check_labels, check_method
from fastrobust.certify.envelope import LINEAR_METHODS, envelope_faces
from fastrobust.reference.bounds import Clip

# Where the box makes a violated row unreachable, or nearly so, its distance without the box takes over, times _FARTHER;
# beyond _FAR alphas a violated row has no gradient left.
_FARTHER, _FAR = 2.0, 10.0


def envelope_hinge(
    distances: Tensor, margins: Tensor, rows: Tensor, alpha: float, norm: float, count: int = 4
) -> Tensor:
    r"""The regulariser (3.20) per example without its factor beta: (B,).

    .. math:: \sum_{i=1}^C \max(0, 1 - \hat d_i / \alpha)

    over the C smallest of the signed distances. A row that the whole box violates has the signed distance -inf, and one
    that barely fits in grows without bound, which would poison the sum and its gradient. So a violated row enters with

    .. math:: \hat d = \max(d_{box}, \; 2 \, (U x + p) / \lVert U \rVert_q, \; -10 \alpha)

    which is the distance inside the box unless the box makes it more than twice what it is without one; every term lies
    in [0, 11], and a row that is violated by more than 10 alpha, or satisfied by more than alpha, has no gradient.

    Args:
        distances: (B, K - 1) signed, of :func:`fastrobust.certify.polyhedral_envelope`. margins: (B, K - 1), U x + p.
        rows: (B, K - 1, n), U. alpha: the distance that is enough. norm: p of the distances. count: C, at most K - 1
        are there.
    """
    dual = 1.0 if norm == math.inf else math.inf if norm == 1 else norm / (norm - 1)
    violated = margins < 0
    size = rows.norm(dual, dim=2)
    free = _FARTHER * margins / torch.where(size > 0, size, 1.0)
    unreachable = torch.where(size > 0, free, -_FAR * alpha)  # an all-zero row is violated everywhere
    inside = torch.where(distances > -math.inf, distances, -_FAR * alpha)
    far = torch.maximum(torch.maximum(inside, unreachable), torch.full_like(free, -_FAR * alpha))
    signed = torch.where(violated, far, distances)
    nearest = signed.topk(min(count, signed.shape[1]), dim=1, largest=False).values
    return (1 - nearest / alpha).clamp(min=0).sum(1)


def envelope_loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float | Tensor,
    *,
    alpha: float,
    norm: float | str = math.inf,
    clip: Clip = (0.0, 1.0),
    at: Tensor | None = None,
    method: str = "fast-lin",
    count: int = 4,
    **options: Any,
) -> Tensor:
    """:func:`envelope_hinge` of a batch (B,): the rows from the ball around x, the distances from ``at`` (None: x).

    eps: a number or (B,). method: "fast-lin" (L-PER), "ibp-linear" (I-PER) or any other linear method. Other options as
    for :func:`fastrobust.bounds.compute_bounds`. Differentiable with respect to the parameters, x, at and eps.
    """
    if not alpha > 0:
        raise ValueError(f"alpha: got {alpha}, expected a number > 0")
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    x, eps, p, clip = check_inputs(x, eps, norm, clip)
    y = check_labels(y, x.shape[0], x.device)
    method = check_method(method, LINEAR_METHODS)
    if x.shape[0] == 0:
        return x.new_zeros(0)
    faces = envelope_faces(model, x, y, eps, p, clip, method, x if at is None else at, True, **options)
    return envelope_hinge(faces.distances, faces.margins, faces.rows, alpha, p, count)


__all__ = ["envelope_hinge", "envelope_loss"]
