"""Runs cases: equality first, then memory, then interleaved timing of ours, the peers and the floor."""

from __future__ import annotations

import contextlib
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from . import floors, memory, metadata, passes, timing
from .case import BEST_PEER, FLOOR, Agreement, Call, Candidate, Case, Context, Notes, Suite, Target, Unavailable, keep
from .passes import Counts
from .timing import Spread

OK, DIFFERS, SKIPPED, FAILED = "ok", "differs", "skipped", "failed"
OTHERS_ALLOWED = 0.1  # CPUs that other processes may use
MET, MISSED, NOT_JUDGED = "met", "missed", "not judged"


@dataclass
class Result:
    """One candidate of one row. `ratio` is its time over ours; None for ours itself and whatever did not run."""

    name: str
    status: str = OK
    reason: str = ""
    seconds: Spread | None = None
    samples: int = 0
    ratio: Spread | None = None
    agreement: Agreement | None = None
    peak_bytes: int | None = None
    passes: Counts | None = None


@dataclass
class FloorResult:
    """`kind` says what bounds the work ("copy", "matrix", or the name of a necessary part), `where` the memory that
    the working set fits in. `fraction` is floor / ours: 1 means that nothing is left to gain."""

    kind: str
    where: str
    seconds: float
    fraction: Spread


@dataclass
class Verdict:
    target: Target
    got: float | None
    verdict: str


@dataclass
class Row:
    suite: str
    work: str
    axes: dict[str, Any]
    tolerance: float
    ours: Result
    peers: list[Result] = field(default_factory=list)
    floor: FloorResult | None = None
    verdicts: list[Verdict] = field(default_factory=list)

    @property
    def best_peer(self) -> Result | None:
        """The fastest peer that computed the same thing."""
        equal = [peer for peer in self.peers if peer.status == OK and peer.ratio is not None]
        return min(equal, key=lambda peer: peer.ratio.median if peer.ratio else math.inf, default=None)


@dataclass
class Run:
    metadata: dict[str, Any]
    machine: floors.Machine
    rows: list[Row]
    notes: list[str]


class Progress(Protocol):
    """The part of tqdm that is used; one unit is one row."""

    def set_description_str(self, desc: str) -> object: ...
    def update(self, n: int = 1) -> object: ...
    def close(self) -> object: ...


class Silent:
    def set_description_str(self, desc: str) -> None:
        pass

    def update(self, n: int = 1) -> None:
        pass

    def close(self) -> None:
        pass


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def start(candidate: Candidate, result: Result) -> tuple[Call | None, Any]:
    """Builds a candidate and calls it once; on failure marks the result and returns (None, None)."""
    try:
        call = candidate.build()
        return call, call()
    except Unavailable as missing:
        result.status, result.reason = SKIPPED, str(missing)
    except Exception as error:  # a broken peer must not take the run with it
        result.status, result.reason = FAILED, one_line(error)
    return None, None


def floor_calls(case: Case, context: Context) -> dict[str, Call]:
    """What is timed beside the candidates to know the floor, by "kind: detail"."""
    calls: dict[str, Call] = {}
    if case.floor.bytes:
        for name, call in floors.copy_calls(case.floor.bytes, context.device).items():
            calls[f"copy: {name}"] = call
    if case.floor.part is not None:
        calls[f"{case.floor.part_name}: "] = case.floor.part()
    return calls


def floor_result(
    case: Case, context: Context, machine: floors.Machine, ours: list[float], samples: dict[str, list[float]]
) -> FloorResult | None:
    """The largest of the bounds; for bytes, the fastest of the copies."""
    bounds: list[tuple[float, str, Spread]] = []
    copies = [(timing.spread(s).median, s) for name, s in samples.items() if name.startswith("copy: ")]
    if copies:
        seconds, taken = min(copies, key=lambda item: item[0])
        bounds.append((seconds, "copy", timing.ratio(taken, ours)))
    for name, taken in samples.items():
        if not name.startswith("copy: "):
            bounds.append((timing.spread(taken).median, name.split(":")[0], timing.ratio(taken, ours)))
    if case.floor.flops:
        seconds = case.floor.flops / machine.matrix_rate
        bounds.append((seconds, "matrix", timing.spread([seconds / sample for sample in ours])))
    if not bounds:
        return None
    seconds, kind, fraction = max(bounds, key=lambda bound: bound[0])
    where = ""
    if kind == "copy":
        where = floors.memory_level(case.floor.bytes, context.device, machine.threads)
    return FloorResult(kind, where, seconds, fraction)


def judge(row: Row, targets: Iterable[Target]) -> list[Verdict]:
    """A target is not judged where what it compares with is missing, and missed where ours did not run."""
    verdicts = []
    for target in targets:
        got: float | None = None
        if target.against == FLOOR:
            got = row.floor.fraction.median if row.floor else None
        elif target.against == BEST_PEER:
            best = row.best_peer
            got = best.ratio.median if best and best.ratio else None
        else:
            for peer in row.peers:
                if peer.name == target.against and peer.status == OK and peer.ratio:
                    got = peer.ratio.median
        if row.ours.status == FAILED:
            verdict = MISSED
        elif got is None:
            verdict = NOT_JUDGED
        else:
            verdict = MET if got >= target.at_least else MISSED
        verdicts.append(Verdict(target, got, verdict))
    return verdicts


def run_case(suite: str, case: Case, context: Context, machine: floors.Machine, effort: timing.Effort) -> Row:
    """One row, from equality to verdicts."""
    row = Row(suite, case.work, dict(case.axes), case.tolerance, Result(case.ours.name))
    call, value = start(case.ours, row.ours)
    if call is None:
        row.verdicts = judge(row, case.targets) if row.ours.status == FAILED else []
        return row
    ours_value = keep(value)
    row.ours.passes = passes.said(value)
    calls: dict[str, Call] = {case.ours.name: call}
    by_name: dict[str, Result] = {case.ours.name: row.ours}
    for candidate in case.peers:
        result = Result(candidate.name)
        row.peers.append(result)
        peer_call, value = start(candidate, result)
        if peer_call is None:
            continue
        result.agreement = case.compare(ours_value, value, case.tolerance)
        result.status = OK if result.agreement.agrees else DIFFERS
        result.passes = passes.said(value)
        calls[candidate.name] = peer_call
        by_name[candidate.name] = result
        del value
    del ours_value
    models = {candidate.name: candidate.model for candidate in (case.ours, *case.peers)}
    for name, result in by_name.items():
        model = models[name]
        with passes.watching(None if model is None else model()) as watch:
            result.peak_bytes = memory.peak_bytes(calls[name], context.device)
            if watch is not None and not watch.forwards:
                calls[name]()  # where memory cannot be told, nothing was called
        result.passes = result.passes if watch is None else watch.counts
    bounds = floor_calls(case, context)
    effort = replace(effort, seconds=effort.seconds * case.weight)
    samples = timing.interleave({**calls, **bounds}, timing.clock_for(context.device), effort)
    ours = samples[case.ours.name]
    for name, result in by_name.items():
        result.seconds, result.samples = timing.spread(samples[name]), len(samples[name])
        if result is not row.ours:
            result.ratio = timing.ratio(samples[name], ours)
    row.floor = floor_result(case, context, machine, ours, {name: samples[name] for name in bounds})
    row.verdicts = judge(row, case.targets)
    return row


@contextlib.contextmanager
def threads_of(case: Case) -> Iterator[None]:
    """The row's own number of CPU threads, while it runs."""
    before = torch.get_num_threads()
    if case.threads is not None:
        torch.set_num_threads(case.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def remarks(row: Row, notes: Notes) -> None:
    """Why something is missing or differs, one line each; a missing peer is named once a suite."""
    title = " ".join([row.work, *(str(value) for value in row.axes.values())])
    if row.ours.status != OK:
        notes.add(f"{row.suite}: {title}: {row.ours.status}: {row.ours.reason}")
    for peer in row.peers:
        if peer.status == SKIPPED:
            notes.add(f"{row.suite}: {peer.name} skipped: {peer.reason}")
        elif peer.status == FAILED:
            notes.add(f"{row.suite}: {title}: {peer.name} failed: {peer.reason}")
        elif peer.status == DIFFERS and peer.agreement:
            notes.add(
                f"{row.suite}: {title}: {peer.name} differs from ours by {peer.agreement.difference:.3g} "
                f"({peer.agreement.measure}; tolerance {row.tolerance:.3g}); its ratio does not count"
            )


def run(
    suites: Iterable[Suite],
    context: Context,
    progress: Callable[[int], Progress] = lambda rows: Silent(),
    only: re.Pattern[str] | None = None,
    peers: bool = True,
) -> Run:
    """Runs the cases of the suites, with `only` those in whose title it is found; `progress` makes the bar from the
    number of rows. Without `peers` ours and the floor alone are timed."""
    notes = Notes()
    queue: deque[tuple[str, Case]] = deque()
    suites = list(suites)
    for suite in suites:
        try:
            queue.extend((suite.name, case) for case in suite.cases(context) if only is None or only.search(case.title))
        except Unavailable as missing:
            notes.add(f"{suite.name}: skipped: {missing}")
    about = metadata.collect(context.device, context.level)
    about["peers"] = peers
    bar = progress(len(queue))
    neighbours = metadata.Neighbours()
    scale = 1 / 32 if context.level == "smoke" else 1.0
    machine = floors.Machine.measure(context.device, torch.get_num_threads(), scale=scale)
    effort = timing.EFFORT[context.level]
    rows = []
    try:
        while queue:
            name, case = queue.popleft()  # lets a row's inputs go before the next row makes its own
            bar.set_description_str(f"{name}: {case.title}"[:48].ljust(48))
            with threads_of(case):
                row = run_case(name, case if peers else replace(case, peers=()), context, machine, effort)
            del case
            remarks(row, notes)
            rows.append(row)
            bar.update(1)
    finally:
        bar.close()
    for suite in suites:
        if suite.review is not None:
            suite.review([row for row in rows if row.suite == suite.name])
    about["others"] = neighbours.cpus()
    if (about["others"] or 0.0) > OTHERS_ALLOWED:
        notes.add(
            f"other processes used {about['others']:.1f} CPUs during the run: the figures are not to be relied on"
        )
    return Run(about, machine, rows, notes.lines)


def problems(run: Run) -> list[str]:
    """What makes a checked run fail: missed targets, peers that differ, and rows of ours that did not run."""
    found = []
    for row in run.rows:
        title = " ".join([row.suite + ":", row.work, *(str(value) for value in row.axes.values())])
        if row.ours.status == FAILED:
            found.append(f"{title}: {row.ours.reason}")
            continue
        for peer in row.peers:
            if peer.status == DIFFERS and peer.agreement:
                found.append(f"{title}: {peer.name} differs by {peer.agreement.difference:.3g}")
        for verdict in row.verdicts:
            if verdict.verdict == MISSED:
                got = "no figure" if verdict.got is None else f"{verdict.got:.2f}"
                found.append(f"{title}: {got} against {verdict.target.against}, target {verdict.target.at_least:g}")
    return found
