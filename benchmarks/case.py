"""What one row of a benchmark is: a piece of work, who does it, what bounds it, what it must reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

LEVELS = ("smoke", "quick", "default", "full")
OURS = "fastrobust"
FLOOR = "floor"
BEST_PEER = "best peer"

Call = Callable[[], Any]


class Unavailable(Exception):
    """A candidate or a suite cannot run here; the text says why in one line."""


@dataclass(frozen=True)
class Agreement:
    """How far a result is from ours: `difference` in the unit named by `measure`."""

    difference: float
    agrees: bool
    measure: str = "max abs"


Compare = Callable[[Any, Any, float], Agreement]


@dataclass(frozen=True)
class Candidate:
    """Someone who can do the work.

    build: makes everything that is not part of the timed work and returns the timed call; the call returns
        the result that is compared. Raises `Unavailable` where the candidate is missing.
    model: after `build`, the network whose passes are counted during one call that is not timed. Without it passes are
        known where the result is a mapping with "forwards" and "backwards".
    """

    name: str
    build: Callable[[], Call]
    model: Callable[[], torch.nn.Module] | None = None


@dataclass(frozen=True)
class Floor:
    """The least time the work can take; the largest of the given bounds is used.

    bytes: bytes that must be read plus bytes that must be written (bound: a plain copy that moves as many).
    flops: floating point operations that cannot be avoided (bound: the measured matrix rate).
    part: a call that any implementation must contain, such as the model's own forward and backward passes
        (bound: its time, measured in the rounds of the row); `part_name` names it.
    """

    bytes: int = 0
    flops: int = 0
    part: Callable[[], Call] | None = None
    part_name: str = "necessary part"


@dataclass(frozen=True)
class Target:
    """`against` / ours must be at least `at_least`; against a peer's name, BEST_PEER or FLOOR."""

    against: str
    at_least: float


def difference(ours: Any, theirs: Any) -> float:
    """Largest absolute difference of two (nested) results, in float64; inf where they cannot be compared."""
    if isinstance(ours, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if ours.shape != theirs.shape:
            return math.inf
        if ours.numel() == 0:
            return 0.0
        a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
        gap = (a - b).abs()
        # equal infinities, and NaN in the same place, are the same result
        gap = torch.where((a == b) | (a.isnan() & b.isnan()), torch.zeros_like(gap), gap)
        return float(torch.where(gap.isnan(), torch.full_like(gap, math.inf), gap).max())
    if isinstance(ours, (bool, int, float)) and isinstance(theirs, (bool, int, float)):
        return difference(torch.tensor(float(ours)), torch.tensor(float(theirs)))
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if ours.keys() != theirs.keys():
            return math.inf
        return max((difference(ours[key], theirs[key]) for key in ours), default=0.0)
    if isinstance(ours, Sequence) and isinstance(theirs, Sequence) and not isinstance(ours, str):
        if len(ours) != len(theirs):
            return math.inf
        return max((difference(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    return math.inf


def relative_difference(ours: Any, theirs: Any, tolerance: float) -> Agreement:
    """Every number within `tolerance` of ours, relative to one plus its size: for results of any magnitude."""
    mine, others = list(tensors(ours)), list(tensors(theirs))
    if len(mine) != len(others) or any(a.shape != b.shape for a, b in zip(mine, others, strict=True)):
        return Agreement(math.inf, False, "max relative")
    gap = 0.0
    for a, b in zip(mine, others, strict=True):
        x, y = a.detach().double().cpu(), b.detach().double().cpu()
        scale = torch.where(x.isfinite(), 1 + x.abs(), torch.ones_like(x))
        gap = max(gap, difference(x / scale, y / scale))
    return Agreement(gap, gap <= tolerance, "max relative")


def max_abs_difference(ours: Any, theirs: Any, tolerance: float) -> Agreement:
    """The default comparison: every number within `tolerance`."""
    gap = difference(ours, theirs)
    return Agreement(gap, gap <= tolerance)


@dataclass(frozen=True)
class Case:
    """One row. `axes` name what varies (size, norm, dtype); `work` names what is done.

    compare(ours, theirs, tolerance) decides whether a peer computed the same thing. `weight` multiplies the time the
    row is sampled for: more where the ratios are near one. `threads`: of the CPU, for this row alone (None: the run's).
    """

    work: str
    axes: Mapping[str, str | int | float]
    ours: Candidate
    peers: tuple[Candidate, ...] = ()
    floor: Floor = Floor()
    tolerance: float = 0.0
    compare: Compare = max_abs_difference
    targets: tuple[Target, ...] = ()
    weight: float = 1.0
    threads: int | None = None

    @property
    def title(self) -> str:
        return " ".join([self.work, *(str(value) for value in self.axes.values())])


@dataclass(frozen=True)
class Context:
    """What a suite may depend on. `data` is the folder of the optional data sets, None where there is none."""

    device: torch.device = torch.device("cpu")
    level: str = "default"
    data: str | None = None
    seed: int = 0

    def at_least(self, level: str) -> bool:
        """Whether the run is as thorough as `level` ("smoke" < "quick" < "default" < "full")."""
        return LEVELS.index(self.level) >= LEVELS.index(level)

    def generator(self) -> torch.Generator:
        return torch.Generator(device="cpu").manual_seed(self.seed)


@dataclass(frozen=True)
class Suite:
    """A family's rows. `default` says whether a run that names no suite includes it; `review` sees all of its rows when
    they are done (`harness.Row`) and adds verdicts on rows beside one another."""

    name: str
    cases: Callable[[Context], Iterable[Case]]
    summary: str
    default: bool = True
    review: Callable[[Sequence[Any]], None] | None = None


def once(make: Callable[[], Any]) -> Callable[[], Any]:
    """A getter that makes its value at the first call: inputs shared by a row's candidates, made when needed."""
    box: list[Any] = []

    def get() -> Any:
        if not box:
            box.append(make())
        return box[0]

    return get


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor inside a nested result."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            yield from tensors(item)


def keep(value: Any) -> Any:
    """A copy of a result that a later call, which may write into the same `out=`, cannot change."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: keep(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [keep(item) for item in value]
    return value


@dataclass
class Notes:
    """One-line remarks collected during a run, each kept once, in order."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str) -> None:
        if line not in self.lines:
            self.lines.append(line)
