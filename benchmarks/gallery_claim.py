"""A claim of a paper beside a study's numbers, and how numbers are written: for benchmarks.gallery_claims."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Arrays = dict[str, Array]
Check = Callable[[Arrays], tuple[bool | None, str]]  # None: the numbers do not tell
_HELD = 337  # the quarter of the digits that studies of training hold out


class Claim(NamedTuple):
    """``said``, of the figure or table ``where``; ``check`` answers whether it came out, and the numbers."""

    where: str
    said: str
    check: Check


class Study(NamedTuple):
    """``seeds``: how many are run; more than one where a run is cheap. ``images``: whether the data play a part."""

    about: str
    claims: tuple[Claim, ...]
    seeds: int = 1
    images: bool = True


def listed(values: Any, form: str = ".3g") -> str:
    return ", ".join(format(float(v), form if abs(v) < 1000 else ".0f") for v in np.ravel(values))


def above(difference: float, share: float = 0.7) -> bool | None:
    """Whether a difference of accuracies on the held-out images is above 0; None within two standard errors."""
    return None if abs(difference) < 2 * float(np.sqrt(2 * share * (1 - share) / _HELD)) else difference > 0


def percent(values: Any) -> str:
    return f"{listed(100 * np.asarray(values), '.1f')} %"
