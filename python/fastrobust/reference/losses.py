"""Attack losses in plain torch, differentiable by autograd; (B, K) logits give (B,) values. An attack ascends them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``log sum_j exp(z_j) - z_y``."""
    return F.cross_entropy(logits, labels, reduction="none")


def _rival(logits: Tensor, labels: Tensor) -> Tensor:
    """(B, 1) class of the largest logit apart from the label's; the lowest index at ties."""
    order = logits.argsort(dim=1, descending=True, stable=True)
    return torch.where(order[:, :1] == labels[:, None], order[:, 1:2], order[:, :1])


def _sorted(logits: Tensor) -> Tensor:
    return logits.sort(dim=1, descending=True, stable=True).values


def margin_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """``max_{j != y} z_j - z_y`` (Carlini and Wagner 2017)."""
    return (logits.gather(1, _rival(logits, labels)) - logits.gather(1, labels[:, None]))[:, 0]


def dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """``-(z_y - max_{j != y} z_j) / (z_(1) - z_(3) + 1e-12)`` (Croce and Hein 2020)."""
    top = _sorted(logits)
    return margin_loss(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted_loss(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """``-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12)``."""
    top = _sorted(logits)
    gap = logits.gather(1, labels[:, None]) - logits.gather(1, targets[:, None])
    return -gap[:, 0] / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


def gradient(loss: str, logits: Tensor, first: Tensor, second: Tensor | None = None) -> Tensor:
    """d value / d logits of the loss of that name, in closed form, itself differentiable in logits and first.

    Among equal logits the lower index counts as larger. A row with a NaN logit has no gradient: NaN.
    """
    if loss == "kl_divergence":
        return logits.softmax(1) - first.softmax(1)
    label = first[:, None]
    if loss == "cross_entropy":
        return logits.softmax(1).scatter_add(1, label, -torch.ones_like(logits[:, :1]))
    rival = _rival(logits, first)
    grad = torch.zeros_like(logits).masked_fill(logits.isnan().any(1, keepdim=True), torch.nan)
    one = torch.ones_like(logits[:, :1])
    if loss == "margin_loss":
        return grad.scatter_add(1, rival, one).scatter_add(1, label, -one)
    # value = -gap / width
    top, order = logits.sort(dim=1, descending=True, stable=True)
    if second is None:
        value, low, places = dlr_loss(logits, first), top[:, 2], order[:, 2:3]
    else:
        value, low, places = dlr_targeted_loss(logits, first, second), 0.5 * (top[:, 2] + top[:, 3]), order[:, 2:4]
        rival = second[:, None]
    width = (top[:, 0] - low + 1e-12)[:, None]
    slope = -value[:, None] / width
    grad = grad.scatter_add(1, label, -1 / width).scatter_add(1, rival, 1 / width).scatter_add(1, order[:, :1], slope)
    return grad.scatter_add(1, places, (-slope / places.shape[1]).expand_as(places))


def kl_divergence(logits: Tensor, reference: Tensor) -> Tensor:
    """``KL(softmax(reference) || softmax(logits))``, the inner objective of TRADES."""
    log_q, log_p = F.log_softmax(logits, 1), F.log_softmax(reference, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)
