"""Which combinations of options a test goes through."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

THOROUGH = os.environ.get("HYPOTHESIS_PROFILE") == "thorough"


def combinations(*options: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The product in the thorough profile; by default a part of it in which every value of an option meets every value
    of every other one."""
    lists = [list(values) for values in options]
    if THOROUGH:
        return list(itertools.product(*lists))
    pairs = {
        c: set(itertools.combinations(enumerate(c), 2)) for c in itertools.product(*(range(len(v)) for v in lists))
    }
    left: set[Any] = set().union(*pairs.values())
    chosen = []
    while left:
        best = max(pairs, key=lambda c: len(pairs[c] & left))
        left -= pairs[best]
        chosen.append(tuple(values[i] for values, i in zip(lists, best, strict=True)))
    return chosen
