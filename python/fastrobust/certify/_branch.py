"""Branch and bound on the signs of ReLUs: subproblems of many examples in one batch, bounded with multipliers for the
chosen signs (beta-CROWN: Wang et al. 2021), branched by the relaxation's error (as BaBSR, Bunel et al. 2020) filtered
by trial bounds (FSB, De Palma et al. 2021)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrobust.certify._subproblems import Bound, Lines, Part, Problems

_DECAY = 0.9  # of the step length
_MOMENTS = 0.8, 0.95  # of Adam
_DESCENT = 3  # steps from the minimum of a bound to a counterexample
_REFRESHED = 48  # rows of hidden bounds that a subproblem may cost
_PATIENCE = 1000  # subproblems of an example before small ones go to the mixed-integer solver
_SMALL = 50  # open neurons of such a one


@dataclass(frozen=True)
class Options:
    """``rows``: subproblems a batch; ``steps``: of the multipliers; ``trials``: neurons whose children are tried."""

    rows: int = 512
    steps: int = 8
    first_steps: int = 20
    trials: int = 8
    rate: float = 0.25
    most: int = 100_000
    timeout: float = 60.0
    outward: bool = False


class Entry(NamedTuple):
    """A subproblem: a margin and chosen signs, with what its parent found."""

    target: int
    split: Tensor  # (U,) int8
    alpha: Tensor  # (U,)
    beta: Tensor  # (U,)
    low: Tensor  # (U,)
    up: Tensor
    value: float


@dataclass
class Case:
    """One example: its open subproblems and what is known."""

    at: int  # among the problems
    stack: list[Entry]
    status: str = ""
    worst: float = math.inf
    count: int = 0
    seconds: float = 0.0
    point: Tensor | None = None
    patience: int = _PATIENCE
    stuck: list[Entry] = field(default_factory=list)  # all neurons fixed, and not proven by the multipliers


def _within(split: Tensor, low: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Intervals under the chosen signs."""
    return torch.where(split > 0, low.clamp(min=0), low), torch.where(split < 0, up.clamp(max=0), up)


class Branching:
    """Branch and bound over the examples of some problems.

    ``confirm(example, points)``: the number of a point in the set of the example that the model itself predicts
    otherwise, or None. ``leaf(example, entry)``: a lower bound of a subproblem by another way, and a point, or None.
    """

    def __init__(
        self,
        problems: Problems,
        options: Options,
        confirm: Callable[[int, Tensor], Tensor | None],
        leaf: Any = None,
        whole: bool = False,
    ):
        self.p, self.o, self.confirm, self.leaf, self.whole = problems, options, confirm, leaf, whole
        self.enough = problems.enough(options.outward)  # (E, T)

    def run(self, tick: Callable[[int], None]) -> list[Case]:
        """All examples. ``tick(n)``: n more of them are decided."""
        p = self.p
        cases = []
        zero = torch.zeros(p.size, dtype=torch.int8, device=p.low.device)
        self._tighten()
        start = p.start() - self.enough
        for i, margins in enumerate(start.tolist()):
            alpha = (p.up[i] > -p.low[i]).float()
            first = Entry(0, zero, alpha, torch.zeros_like(alpha), p.low[i], p.up[i], -math.inf)
            entries = [first._replace(target=t) for t, v in enumerate(margins) if not v > 0]
            cases.append(Case(i, entries, worst=min((v for v in margins if v > 0), default=math.inf)))
            if not entries:
                cases[-1].status = "verified"
        tick(sum(bool(c.status) for c in cases))
        if self.whole:
            return self._as_they_are(cases, tick)
        open_ = [c for c in cases if not c.status]
        while open_:
            begun = time.monotonic()
            share = max(1, self.o.rows // len(open_))
            batch = [(c, c.stack[-share:]) for c in open_]
            for c, part in batch:
                del c.stack[-len(part) :]
            self._step(batch)
            spent = time.monotonic() - begun
            rows = sum(len(part) for _, part in batch)
            for c, part in batch:
                c.seconds += spent * len(part) / rows
                c.count += len(part)
                if not c.status and c.count >= c.patience and self.leaf is not None:
                    self._small(c)
                if c.status:
                    continue
                if not c.stack:
                    c.status = "unknown" if c.stuck else "verified"
                elif c.count >= self.o.most or c.seconds > self.o.timeout:
                    c.status = "unknown"
            still = [c for c in open_ if not c.status]
            tick(len(open_) - len(still))
            open_ = still
        return cases

    def _tighten(self) -> None:
        """The bounds of hidden neurons with slopes chosen for each, level by level."""
        p = self.p
        for n, k in enumerate(p.levels):
            if not n:
                continue
            for at in torch.arange(len(p.low), device=p.low.device).split(
                max(1, self.o.rows // (2 * (k.stop - k.start)))
            ):
                exact, fast = p.of(at, torch.float64), p.of(at, torch.float32)
                sides = exact.rows_of(n).expand(len(at), -1, -1)
                wide = lambda t: t.unsqueeze(1).expand(-1, sides.shape[1], -1)  # noqa: B023, E731
                lines = Lines.of(wide(p.low[at]), wide(p.up[at]))
                quick, rows = lines.to(torch.float32), sides.float()

                def value(alpha: Tensor, _: Tensor) -> tuple[Bound, Tensor]:
                    bound = fast.of_rows(rows, quick, alpha)  # noqa: B023
                    return bound, fast.followed(bound.point, quick, alpha, bound.seen)  # noqa: B023

                alpha = wide((p.up[at] > -p.low[at]).float())
                none = torch.zeros_like(alpha)
                alpha = self._ascent(value, quick, none, alpha, none, self.o.first_steps, 0.0)[1]
                low, up = exact.of_rows(sides, lines, alpha.double()).value.chunk(2, 1)
                p.low[at, k] = torch.maximum(p.low[at, k], low - p.error[at, k])
                p.up[at, k] = torch.minimum(p.up[at, k], p.error[at, k] - up)

    def _as_they_are(self, cases: list[Case], tick: Callable[[int], None]) -> list[Case]:
        """Every margin as one problem of ``leaf``."""
        for c in cases:
            begun = time.monotonic()
            while c.stack and not c.status:
                c.count += 1
                self._settle(c, c.stack.pop())
            if not c.status:
                c.status = "unknown" if c.stuck else "verified"
                tick(1)
            c.seconds = time.monotonic() - begun
        return cases

    # -- one batch -----------------------------------------------------------------------------------------------------
    def _step(self, batch: list[tuple[Case, list[Entry]]]) -> None:
        p = self.p
        which = torch.tensor([c.at for c, _ in batch], device=p.low.device)
        width = max(len(part) for _, part in batch)
        full = [part + [part[-1]] * (width - len(part)) for _, part in batch]  # what fills up repeats the last

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(e, name) for part in full for e in part]).view(len(batch), width, -1)

        target = torch.tensor([[e.target for e in part] for part in full], device=p.low.device)
        split, alpha, beta, low, up = (stacked(n) for n in ("split", "alpha", "beta", "low", "up"))
        real = torch.tensor([[k < len(part) for k in range(width)] for _, part in batch], device=p.low.device)
        low, up = _within(split, low, up)
        if p.deep:
            low, up = self._refreshed(which, low, up)
        empty = (low > up).any(2)
        first = all(e.value == -math.inf for _, part in batch for e in part)
        lines = Lines.of(low, up)
        whole = len(which) == len(p.low)
        of = p.of(None if whole else which, torch.float32)
        found = self._optimised(of, which, target, lines.to(torch.float32), split, alpha, beta, first)
        value, alpha, beta, bound, z = found
        enough = self.enough[which].gather(1, target)
        likely = (value.double() > enough) & real & ~empty
        proven, exact = self._proven(which, target, lines, split, alpha, beta, enough, likely)
        done = proven | empty
        self._candidates(batch, of, target, bound.point, real & ~done)
        children = self._chosen(of, which, target, low, up, lines, split, alpha, beta, bound.seen, z, real & ~done)
        order = value.argsort(1, descending=True)
        for n, (c, part) in enumerate(batch):
            if c.status:
                continue
            for k in order[n].tolist():  # the worst comes last, to be taken next
                if k >= len(part):
                    continue
                if bool(done[n, k]):
                    if not bool(empty[n, k]):
                        c.worst = min(c.worst, float(exact[n, k] - enough[n, k]))
                    continue
                j = int(children[n, k])
                entry = Entry(
                    part[k].target, split[n, k], alpha[n, k], beta[n, k], low[n, k], up[n, k], float(value[n, k])
                )
                if j < 0:
                    self._settle(c, entry)
                    continue
                for side in (1, -1):
                    s = entry.split.clone()
                    s[j] = side
                    c.stack.append(entry._replace(split=s))

    def _small(self, c: Case) -> None:
        """What is left of an example that does not end, by the mixed-integer solver, while that succeeds."""
        begun = time.monotonic()
        tried = 0
        while c.stack and not c.status and c.seconds + time.monotonic() - begun < self.o.timeout:
            entry = c.stack[-1]
            low, up = _within(entry.split, entry.low, entry.up)
            if int(((low < 0) & (up > 0)).sum()) > _SMALL:
                break
            tried += 1
            before = len(c.stuck)
            self._settle(c, c.stack.pop()._replace(low=low, up=up))
            if len(c.stuck) > before:  # too hard: its children may not be
                c.stack.append(entry)
                c.stuck.pop()
                break
        c.count += tried
        c.patience = 2 * c.count
        c.seconds += time.monotonic() - begun

    def _settle(self, c: Case, entry: Entry) -> None:
        """All neurons are fixed and the multipliers did not prove it."""
        found = None if self.leaf is None else self.leaf(c.at, entry)
        if found is not None:
            value, point = found
            if value > 0:
                c.worst = min(c.worst, value)
                return
            if point is not None:
                shown = self.confirm(c.at, point[None])
                if shown is not None:
                    c.status, c.point = "falsified", shown
                    return
        c.stuck.append(entry)

    def _optimised(
        self,
        of: Part,
        which: Tensor,
        target: Tensor,
        lines: Lines,
        split: Tensor,
        alpha: Tensor,
        beta: Tensor,
        first: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Bound, Tensor]:
        """The best bounds of margins, what gave them, and the last walk."""
        sign = split.float()

        def value(alpha: Tensor, beta: Tensor) -> tuple[Bound, Tensor]:
            bound = of.lower(target, lines, alpha, beta * sign)
            return bound, of.followed(bound.point, lines, alpha, bound.seen)

        steps = self.o.first_steps if first else self.o.steps
        return self._ascent(value, lines, sign, alpha, beta, steps, self.enough[which].gather(1, target).float())

    def _ascent(
        self,
        value: Callable[[Tensor, Tensor], tuple[Bound, Tensor]],
        lines: Lines,
        sign: Tensor,
        alpha: Tensor,
        beta: Tensor,
        steps: int,
        enough: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Bound, Tensor]:
        """Ascent in float32 on the lower slopes and multipliers until all exceed ``enough``."""
        best: Any = -math.inf
        kept = alpha, beta
        chosen = sign != 0
        moments: list[Any] = [0.0, 0.0, 0.0, 0.0]
        b1, b2 = _MOMENTS
        for step in range(steps):
            bound, z = value(alpha, beta)
            better = bound.value > best
            best = torch.where(better, bound.value, best)
            take = better.unsqueeze(2)
            kept = torch.where(take, alpha, kept[0]), torch.where(take, beta, kept[1])
            if step + 1 == steps or bool((best > enough).all()):
                break
            grads = torch.where(lines.crossing, bound.seen.clamp(min=0) * z, 0.0), torch.where(chosen, -sign * z, 0.0)
            size = bound.seen.abs().amax(2, keepdim=True) if beta.shape[2] else 1.0
            rate = self.o.rate * _DECAY**step
            moved = []
            for k, (v, g) in enumerate(zip((alpha, beta), grads, strict=True)):
                moments[2 * k] = b1 * moments[2 * k] + (1 - b1) * g
                moments[2 * k + 1] = b2 * moments[2 * k + 1] + (1 - b2) * g * g
                m, s = moments[2 * k] / (1 - b1 ** (step + 1)), moments[2 * k + 1] / (1 - b2 ** (step + 1))
                moved.append(v + rate * (1.0 if k == 0 else size) * m / (s.sqrt() + 1e-12))
            alpha, beta = moved[0].clamp(0, 1), moved[1].clamp(min=0)
        return best, *kept, bound, z

    def _proven(
        self,
        which: Tensor,
        target: Tensor,
        lines: Lines,
        split: Tensor,
        alpha: Tensor,
        beta: Tensor,
        enough: Tensor,
        likely: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """In float64 with what rounding can add: which subproblems are proven, and their bounds."""
        value = torch.full(target.shape, -math.inf, dtype=torch.float64, device=target.device)
        if not bool(likely.any()):
            return likely, value
        some = likely.any(1).nonzero()[:, 0]
        lines = Lines(*(t[some] for t in lines))
        push = (beta * split)[some].double()
        w = which[some]
        bound = self.p.of(w, torch.float64).lower(target[some], lines, alpha[some].double(), push)
        value[some] = bound.value - (push.abs() * self.p.error[w].unsqueeze(1)).sum(2)
        return likely & (value > enough), value

    def _candidates(
        self, batch: list[tuple[Case, list[Entry]]], of: Part, target: Tensor, points: Tensor, wanted: Tensor
    ) -> None:
        """Descends from the points where the linear bounds are least, and shows the model what may be
        counterexamples."""
        value, points = of.descended(target, points, _DESCENT)
        near = wanted & (value <= 1e-4 * (1 + value.abs()))  # float32; the model decides
        for n in near.any(1).nonzero()[:, 0].tolist():
            c = batch[n][0]
            shown = self.confirm(c.at, points[n][near[n]])
            if shown is not None:
                c.status, c.point = "falsified", shown

    # -- branching -----------------------------------------------------------------------------------------------------
    def _chosen(
        self,
        of: Part,
        which: Tensor,
        target: Tensor,
        low: Tensor,
        up: Tensor,
        lines: Lines,
        split: Tensor,
        alpha: Tensor,
        beta: Tensor,
        seen: Tensor,
        z: Tensor,
        wanted: Tensor,
    ) -> Tensor:
        """The neuron to split of each subproblem (E, P); -1 where all are fixed."""
        over = -seen.clamp(max=0) * (lines.upper.float() * z + lines.shift.float() - z.clamp(min=0))
        under = seen.clamp(min=0) * (z.clamp(min=0) - alpha * z)
        # the gap at the relaxation's minimum, and a little of what it is at most
        most = seen.abs() * torch.minimum(-low, up).float()
        score = torch.where(lines.crossing, (over + under).clamp(min=0) + 0.05 * most.clamp(min=0) + 1e-30, -1.0)
        top, places = score.topk(min(self.o.trials, score.shape[2]) or 1, 2) if score.shape[2] else (score, None)
        if places is None:
            return torch.full(target.shape, -1, device=target.device)
        best = places[..., 0]
        if self.o.trials > 1 and bool(wanted.any()):
            rows = wanted.any(1).nonzero()[:, 0]
            best = best.clone()
            best[rows] = self._tried(
                self.p.of(which[rows], torch.float32) if len(rows) < len(which) else of,
                which[rows],
                target[rows],
                *(t[rows] for t in (low, up, split, alpha, beta, places, top > 0)),
            )
        return torch.where(top[..., 0] > 0, best, -1)

    def _tried(
        self,
        of: Part,
        which: Tensor,
        target: Tensor,
        low: Tensor,
        up: Tensor,
        split: Tensor,
        alpha: Tensor,
        beta: Tensor,
        places: Tensor,
        able: Tensor,
    ) -> Tensor:
        """Of candidates (E, P, k) the one whose children's bounds are best together."""
        e, n, k = places.shape
        grow = lambda t: t.unsqueeze(2).expand(-1, -1, k, -1).reshape(e, n * k, -1)  # noqa: E731
        at = places.reshape(e, n * k, 1)
        low, up, alpha = grow(low).clone(), grow(up).clone(), grow(alpha)
        push = grow(beta * split)
        goal = target.unsqueeze(2).expand(-1, -1, k).reshape(e, n * k)
        values = []
        for side in (1, -1):
            a, b = low.clone(), up.clone()
            (a if side > 0 else b).scatter_(2, at, 0.0)
            lines = Lines.of(a, b).to(torch.float32)
            values.append(of.lower(goal, lines, alpha, push).value)
        enough = self.enough[which].gather(1, target).float().unsqueeze(2)
        v1, v2 = (torch.minimum(v.view(e, n, k), enough) for v in values)
        gain = v1 + v2 + torch.minimum(v1, v2)
        pick = torch.where(able, gain, -math.inf).argmax(2, keepdim=True)
        return places.gather(2, pick).squeeze(2)

    # -- hidden bounds -------------------------------------------------------------------------------------------------
    def _refreshed(self, which: Tensor, low: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds of the neurons behind the first level under the chosen signs: intervals, and linear bounds where they
        cost little."""
        p = self.p
        of, error = p.of(which, torch.float64), p.error[which].unsqueeze(1)
        low, up = of.intervals(low, up, p.error[which])
        wanted = [n for n, k in enumerate(p.levels) if n and 2 * (k.stop - k.start) <= _REFRESHED]
        for n in wanted:
            k = p.levels[n]
            if not bool(((low[..., k] < 0) & (up[..., k] > 0)).any()):
                continue
            a, b = of.neurons(n, Lines.of(low, up), (up > -low).double())
            low[..., k] = torch.maximum(low[..., k], a - error[..., k])
            up[..., k] = torch.minimum(up[..., k], b + error[..., k])
        return low, up
