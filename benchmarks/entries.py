"""Rows of runs as the rendered report reads them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .harness import OK
from .timing import Spread


@dataclass(frozen=True)
class Other:
    """A peer in a row; `ratio` is its time over ours."""

    name: str
    status: str
    reason: str
    ratio: Spread | None
    seconds: float | None
    passes: str


@dataclass(frozen=True)
class Entry:
    """A row of a run."""

    run: int  # which of the files, from 1
    suite: str
    work: str
    axes: dict[str, Any]
    status: str
    reason: str
    seconds: Spread | None
    peak: int | None
    passes: str
    floor: tuple[str, float, float] | None  # what bounds it, seconds, floor over ours
    others: tuple[Other, ...]
    missed: tuple[str, ...]

    @property
    def title(self) -> str:
        return " ".join([self.work, *(str(value) for value in self.axes.values())])

    @property
    def best(self) -> Other | None:
        """The fastest peer with the same result."""
        equal = [other for other in self.others if other.status == OK and other.ratio is not None]
        return min(equal, key=lambda other: other.ratio.median if other.ratio else math.inf, default=None)

    @property
    def ratio(self) -> float | None:
        """Of that peer's time over ours; None where nobody did the same."""
        best = self.best
        return best.ratio.median if best is not None and best.ratio is not None and self.status == OK else None
