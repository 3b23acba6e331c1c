"""The largest certified radius of every example (Liu 2022, Algorithm 3.5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.bounds import METHODS, compute_bounds
from fastrobust.bounds.checks import check_options
from fastrobust.certify.envelope import check_method, polyhedral_envelope

STRATEGIES = ("pec", "bisection")


@dataclass
class RadiusSearch:
    """radius: (B,) the certified end of the bracket. midpoint: (B,) Algorithm 3.5's output, not certified itself.

    evaluations: (B,) int64, bound computations that each example took (the T of table 3.9). upper: (B,) the other end.
    """

    radius: Tensor
    evaluations: Tensor
    midpoint: Tensor
    upper: Tensor


def search_radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    low: float = 0.0,
    high: float,
    tol: float,
    norm: float | str = math.inf,
    clip: tuple[float, float] | None = None,
    method: str = "fast-lin",
    strategy: str = "pec",
    rounding: str = "nearest",
    exact_input: bool = False,
    refine: str = "unstable",
    max_memory: int = 1 << 30,
    batch_size: int = 500,
    progress: Callable[[int], None] | None = None,
) -> RadiusSearch:
    """Algorithm 3.5 for a whole batch: every example keeps its own bracket, finished ones leave.

    A try of eps certifies min(eps, d_y) with ``strategy="pec"``: the lower end rises to it even when eps itself fails.
    "bisection" (Fast-Lin, CROWN) learns nothing from a failed try, and takes ceil(log2((high - low) / tol)) tries; it also
    serves method "ibp", which has no linear bounds.

    Args:
        model, x, y, norm, clip, method, rounding, exact_input, refine, max_memory: as for :func:`polyhedral_envelope`.
        low, high: first bracket; ``low`` is taken as certified, so leave it 0 unless you know better.
        tol: stop when the bracket is at most this wide.
        batch_size: examples per call of the bounds.
        progress: called with the number of examples that finished.

    Returns:
        :class:`RadiusSearch`. ``radius`` is certified: the largest one that some evaluation proved (or ``low``).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high):
        raise ValueError(f"low, high: got {low}, {high}, expected 0 <= low <= high, finite")
    if not tol > 0:
        raise ValueError(f"tol: got {tol}, expected a number > 0")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    if strategy == "pec":
        check_method(method)
    elif method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")

    check_options(rounding, refine, exact_input, max_memory)
    options: dict[str, Any] = {
        "norm": norm,
        "clip": clip,
        "method": method,
        "rounding": rounding,
        "exact_input": exact_input,
        "refine": refine,
        "max_memory": max_memory,
    }

    def certify(index: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Certified radius, and whether all of eps is."""
        if strategy == "pec":
            found = polyhedral_envelope(model, x[index], y[index], eps, **options)
            return found.radius, found.radius >= eps
        bounds = compute_bounds(model, x[index], eps, labels=y[index], sides="lower", **options)
        whole = bounds.lower.amin(1) > 0
        return torch.where(whole, eps, torch.zeros_like(eps)), whole

    count, device = x.shape[0], x.device
    bottom = torch.full((count,), low, dtype=torch.float64, device=device)
    top = torch.full((count,), high, dtype=torch.float64, device=device)
    evaluations = torch.zeros(count, dtype=torch.int64, device=device)
    active = (
        torch.arange(count, device=device) if high - low > tol else torch.empty(0, dtype=torch.int64, device=device)
    )
    if progress and not active.numel():
        progress(count)
    with torch.no_grad():
        while active.numel():
            for part in active.split(batch_size):
                eps = (0.5 * (bottom[part] + top[part])).to(x.dtype)
                radius, whole = certify(part, eps)
                bottom[part] = torch.maximum(bottom[part], radius.double())
                top[part] = torch.where(whole, top[part], eps.double())
            evaluations[active] += 1
            remaining = active[top[active] - bottom[active] > tol]
            if progress and remaining.numel() < active.numel():
                progress(active.numel() - remaining.numel())
            active = remaining
    return RadiusSearch(bottom.to(x.dtype), evaluations, (0.5 * (bottom + top)).to(x.dtype), top.to(x.dtype))
