"""Summaries of certified radii as Liu's thesis defines them (Towards Verifiable, Generalizable and Efficient Robust
Deep Neural Networks, EPFL, 2022, section 3.3.4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def _radii(radius: Tensor) -> Tensor:
    if not isinstance(radius, Tensor) or radius.dim() != 1:
        raise ValueError(f"radius: got {getattr(radius, 'shape', type(radius).__name__)}, expected a tensor (B,)")
    if radius.numel() == 0:
        raise ValueError("radius: got no examples, expected at least one")
    # NaN is no certificate
    return torch.where(radius.isnan(), 0.0, radius.double()).clamp_min(0.0)


def certified_robust_error(radius: Tensor, eps: float) -> float:
    """Certified robust error (CRE): the share of examples whose certified radius is smaller than eps, in percent."""
    below = (
        eps
        if radius.dtype == torch.float64
        else float(torch.nextafter(torch.tensor(eps, dtype=radius.dtype), torch.zeros((), dtype=radius.dtype)))
    )
    return 100.0 * (_radii(radius) < min(eps, below)).double().mean().item()


def average_certified_bound(radius: Tensor) -> float:
    """Average certified bound (ACB): the mean certified radius; examples without a certificate count as 0."""
    return _radii(radius).mean().item()


@dataclass
class CertifiedCurve:
    """share[i]: the share of examples whose certified radius is at least eps[i]."""

    eps: Tensor
    share: Tensor


def certified_curve(radius: Tensor, eps: Tensor | None = None) -> CertifiedCurve:
    """Certified accuracy against the size of the budget; by default at every radius that occurs."""
    values = _radii(radius).sort().values
    if eps is None:
        eps = torch.cat([values.new_zeros(1), values.unique()])
    eps = torch.as_tensor(eps, dtype=torch.float64)
    below = torch.searchsorted(values, eps, right=False)
    return CertifiedCurve(eps, 1.0 - below.double() / values.numel())
