"""How many weights each layer keeps: adaptive pruning (thesis, section 5.1.2, equation 5.11)."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ..reference.binary import kept_by_rate


def allocate(sizes: Sequence[int], rate: float, gamma: float, *, method: str = "exact") -> list[int]:
    """Numbers m_i of weights kept in layers of n_i weights at the pruning rate r = `rate`.

    Solves sum m_i = (1 - r) sum n_i with m_i / n_i^gamma the same in every layer that is not full
    (5.11). gamma = 1 is the fixed pruning rate, gamma = 0 the fixed number of parameters.

    method "exact" (default): the solution with caps m_i <= n_i, rounded by largest remainders, so
    that the sum is floor((1 - r) sum n_i) exactly. (1 - r) is taken as the decimal number that was
    written, 1 - 0.9 is 1/10.
    method "sequential": the rounding of the authors' code, layer by layer in ascending size; its sum
    can differ from the target by some weights per layer.
    method "layerwise": every layer by itself, n - int(r n), as the hidden networks of Ramanujan et al.
    and magnitude pruning keep them; for gamma = 1.

    Raises ValueError for a rate or gamma outside [0, 1], a negative size or an unknown method.
    """
    sizes = [int(n) for n in sizes]
    if not (isinstance(rate, numbers.Real) and 0 <= rate <= 1):
        raise ValueError(f"rate: expected a pruning rate in [0, 1], got {rate!r}")
    if not (isinstance(gamma, numbers.Real) and 0 <= gamma <= 1):
        raise ValueError(f"gamma: expected a number in [0, 1], got {gamma!r}")
    gamma = float(gamma)
    if any(n < 0 for n in sizes):
        raise ValueError(f"sizes: expected counts of weights >= 0, got {sizes}")
    if method == "exact":
        return _exact(sizes, rate, gamma)
    if method == "sequential":
        return _sequential(sizes, float(_keep_rate(rate)), gamma)
    if method == "layerwise":
        if gamma != 1:
            raise ValueError(f"gamma: expected 1 with method 'layerwise', got {gamma!r}")
        return [kept_by_rate(n, float(_keep_rate(rate))) for n in sizes]
    raise ValueError(f"method: expected 'exact', 'sequential' or 'layerwise', got {method!r}")


def _keep_rate(rate: float) -> Fraction:
    # The shortest decimal of its type is what the caller wrote; 1 - 0.99 in doubles is not 0.01.
    return 1 - Fraction(str(+rate))


def _exact(sizes: list[int], rate: float, gamma: float) -> list[int]:
    target = math.floor(_keep_rate(rate) * sum(sizes))
    kept = [0] * len(sizes)
    free = [i for i, n in enumerate(sizes) if n > 0]
    budget = target
    while free:
        # n^gamma as a rational of its double: the shares below are then exact.
        weight = {i: Fraction(sizes[i] ** gamma) for i in free}
        total = sum(weight.values())
        share = {i: budget * weight[i] / total for i in free}
        full = [i for i in free if share[i] >= sizes[i]]
        if full:
            for i in full:
                kept[i] = sizes[i]
                budget -= sizes[i]
            free = [i for i in free if i not in full]
            continue
        for i in free:
            kept[i] = math.floor(share[i])
        # share < size, so a floor has room for one more and the caps hold.
        by_remainder = sorted(free, key=lambda i: (kept[i] - share[i], i))
        for i in by_remainder[: budget - sum(kept[i] for i in free)]:
            kept[i] += 1
        break
    return kept


def _sequential(sizes: list[int], keep_rate: float, gamma: float) -> list[int]:
    # The constant of the first layer comes from the untruncated budget, the later ones from the
    # integer that is left, as in the authors' code: 1 - r of the total is met by the truncated
    # counts, while the masks keep n - int((1 - k) n), up to one more per layer.
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    powers = np.array([float(sizes[i]) for i in order]) ** gamma
    total = keep_rate * sum(sizes)
    remaining = int(total)
    kept = [0] * len(sizes)
    constant = total / powers.sum() if powers.size else 0.0
    for position, i in enumerate(order):
        n = sizes[i]
        layer_rate = min(1.0, float(constant * np.power(float(n), gamma - 1.0))) if n else 0.0
        remaining -= int(layer_rate * n)
        kept[i] = kept_by_rate(n, layer_rate) if n else 0
        if position + 1 < len(order):
            constant = remaining / powers[position + 1 :].sum()
    return kept
