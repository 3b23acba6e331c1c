"""The largest certified radius of every example (Liu 2022, Algorithm 3.5)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrobust.bounds import METHODS, SlopeSearch, compute_bounds
from fastrobust.bounds.checks import check_inputs, check_labels, check_method, check_options, clip_of, number
from fastrobust.certify.envelope import LINEAR_METHODS, polyhedral_envelope
from fastrobust.reference.bounds import Clip
from fastrobust.reference.polyhedron import round_down

from .._eager import left_to_python

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


@left_to_python
def search_radius(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    low: float = 0.0,
    high: float,
    tol: float,
    norm: float | str = math.inf,
    clip: Clip = None,
    method: str = "fast-lin",
    strategy: str = "pec",
    rounding: str = "nearest",
    exact_input: bool = False,
    refine: str = "unstable",
    max_memory: int = 1 << 30,
    slopes: SlopeSearch | None = None,
    batch_size: int = 500,
    progress: Callable[[int], None] | None = None,
) -> RadiusSearch:
    """Algorithm 3.5 for a whole batch: every example keeps its own bracket, finished ones leave.

    A try of eps certifies min(eps, d_y) with ``strategy="pec"``: the lower end rises to it even when eps itself fails.
    "bisection" (Fast-Lin, CROWN) learns nothing from a failed try, and takes ceil(log2((high - low) / tol)) tries; it
    also serves method "ibp", which has no linear bounds.

    Args:
        model, x, y, norm, clip, method, rounding, exact_input, refine, max_memory, slopes: as for
        :func:`polyhedral_envelope`;
            rows that are proven leave the search for slopes.
        y: labels of any integer type. low, high: first bracket; ``low`` is taken as certified, so leave it 0 unless you
        know better.
        tol: stop when the bracket is at most this wide, or its ends are neighbouring numbers of x's dtype.
        batch_size: examples per call of the bounds.
        progress: called with the number of examples that finished.

    Returns:
        :class:`RadiusSearch`. ``radius`` is certified: the largest one that some evaluation proved (or ``low``).
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {', '.join(STRATEGIES)}")
    low, high, tol = (number(value, name) for value, name in ((low, "low"), (high, "high"), (tol, "tol")))
    if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high):
        raise ValueError(f"low, high: got {low}, {high}, expected 0 <= low <= high, finite")
    if not tol > 0:
        raise ValueError(f"tol: got {tol}, expected a number > 0")
    if batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
    method = check_method(method, LINEAR_METHODS if strategy == "pec" else METHODS)
    check_options(rounding, refine, exact_input, max_memory)
    x, _, norm, clip = check_inputs(x, high, norm, clip)
    y = check_labels(y, x.shape[0], x.device)
    options: dict[str, Any] = {
        "norm": norm,
        "method": method,
        "rounding": rounding,
        "exact_input": exact_input,
        "refine": refine,
        "max_memory": max_memory,
        "slopes": _signs(slopes) if method == "alpha-crown" else slopes,
    }

    def certify(index: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """Certified radius, and whether all of eps is."""
        part, labels, box = x[index], y[index], clip_of(clip, index, x)
        if strategy == "pec":
            found = polyhedral_envelope(model, part, labels, eps, clip=box, **options)
            return found.radius, found.radius >= eps
        bounds = compute_bounds(model, part, eps, labels=labels, sides="lower", clip=box, **options)
        whole = bounds.lower.amin(1) > 0
        return torch.where(whole, eps, torch.zeros_like(eps)), whole

    count, device = x.shape[0], x.device
    bottom = torch.full((count,), low, dtype=torch.float64, device=device)
    top = torch.full((count,), high, dtype=torch.float64, device=device)
    evaluations = torch.zeros(count, dtype=torch.int64, device=device)

    def unfinished(index: Tensor) -> tuple[Tensor, Tensor]:
        """The examples whose brackets are wider than tol and hold a number of x's dtype in between, and that number."""
        least, most = bottom[index], top[index]
        eps = (0.5 * (least + most)).to(x.dtype)
        wide = (most - least > tol) & (eps.double() > least) & (eps.double() < most)
        return index[wide], eps[wide]

    active, middle = unfinished(torch.arange(count, device=device))
    if progress and active.numel() < count:
        progress(count - active.numel())
    with torch.no_grad():
        while active.numel():
            for part, eps in zip(active.split(batch_size), middle.split(batch_size), strict=True):
                radius, whole = certify(part, eps)
                bottom[part] = torch.maximum(bottom[part], radius.double())
                top[part] = torch.where(whole, top[part], eps.double())
            evaluations[active] += 1
            remaining, middle = unfinished(active)
            if progress and remaining.numel() < active.numel():
                progress(active.numel() - remaining.numel())
            active = remaining
    return RadiusSearch(
        round_down(bottom, x.dtype), evaluations, (0.5 * (bottom + top)).to(x.dtype), -round_down(-top, x.dtype)
    )


def _signs(slopes: SlopeSearch | None) -> SlopeSearch:
    """A positive margin needs no better slopes here."""
    slopes = SlopeSearch() if slopes is None else slopes
    return slopes if slopes.stop is not None else dataclasses.replace(slopes, stop=0.0)
