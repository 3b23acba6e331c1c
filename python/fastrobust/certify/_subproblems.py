"""Networks reduced to their undecided ReLUs, a batch of examples side by side, and linear bounds of many subproblems of
each.

With the stable ReLUs of an example folded into the affine maps, what is left of the network are U neurons z = A x + B r
+ c, r = max(z, 0), and margins a x + b r + d: small dense matrices, whatever the layers were. B is strictly triangular
in the levels.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrobust.certify._relu_network import Network, Root, Sets


class Maps(NamedTuple):
    """z = A x + B r + c and margins a x + b r + d of E examples."""

    A: Tensor  # (E, U, D)
    B: Tensor  # (E, U, U)
    c: Tensor  # (E, U)
    a: Tensor  # (E, T, D)
    b: Tensor  # (E, T, U)
    d: Tensor  # (E, T)

    def to(self, dtype: torch.dtype) -> Maps:
        return Maps(*(t.to(dtype) for t in self))

    def rows(self, index: Any) -> Maps:
        return Maps(*(t[index] for t in self))


class Lines(NamedTuple):
    """The relaxation of every neuron: value <= upper z + shift, >= alpha z where it is crossing and >= upper z
    elsewhere."""

    crossing: Tensor
    upper: Tensor
    shift: Tensor

    @classmethod
    def of(cls, low: Tensor, up: Tensor) -> Lines:
        crossing = (low < 0) & (up > 0)
        width = torch.where(crossing, up - low, 1.0)
        upper = torch.where(crossing, up / width, (low >= 0).to(low))
        return cls(crossing, upper, torch.where(crossing, -low * upper, 0.0))

    def to(self, dtype: torch.dtype) -> Lines:
        return Lines(self.crossing, self.upper.to(dtype), self.shift.to(dtype))


class Bound(NamedTuple):
    value: Tensor  # (E, P) lower bounds
    point: Tensor  # (E, P, D) where the linear bound is least
    seen: Tensor  # (E, P, U) coefficients of the neurons' values


class Problems:
    """The reduced networks of E examples."""

    def __init__(self, net: Network, sets: Sets, root: Root, labels: Tensor):
        open_ = (root.low < 0) & (root.up > 0)
        count = [open_[:, r.part].sum(1) for r in net.relus]
        widths = [int(c.max()) for c in count]
        kept = [k for k, w in enumerate(widths) if w]
        self.levels: list[slice] = []
        total = 0
        for k in kept:
            self.levels.append(slice(total, total + widths[k]))
            total += widths[k]
        e, dim = len(labels), sets.low[0].numel()
        new = lambda *shape: sets.low.new_zeros(e, *shape)  # noqa: E731
        classes = net.classes
        maps = Maps(
            new(total, dim),
            new(total, total),
            new(total),
            new(classes - 1, dim),
            new(classes - 1, total),
            new(classes - 1),
        )
        self.low, self.up = new(total) - 1, new(total) - 1  # of what only fills a level: inactive, and it reads nothing
        self.error = new(total)
        maps.c.fill_(-1.0)
        for i in range(e):
            neurons = open_[i].nonzero()[:, 0]
            active = root.low[i] >= 0
            place = torch.cat([
                torch.arange(self.levels[n].start, self.levels[n].start + int(count[k][i]), device=neurons.device)
                for n, k in enumerate(kept)
            ]) if kept else neurons  # fmt: skip
            self.low[i, place], self.up[i, place] = root.low[i, neurons], root.up[i, neurons]
            self.error[i, place] = root.neuron_error[i, neurons]
            for n, k in enumerate(kept):
                relu = net.relus[k]
                here = neurons[(neurons >= relu.part.start) & (neurons < relu.part.stop)]
                at = slice(self.levels[n].start, self.levels[n].start + len(here))
                before = net.nodes[torch.float64][relu.before]
                for j in range(0, len(here), 256):
                    part, to = here[j : j + 256], slice(at.start + j, min(at.stop, at.start + j + 256))
                    rows = new(before.size)[0].new_zeros(len(part), before.size)
                    rows[torch.arange(len(part)), part - relu.part.start] = 1
                    A, B, c = net.composed(rows.view(-1, *before.shape), relu.before, active, open_[i])
                    maps.A[i, to], maps.c[i, to] = A, c
                    maps.B[i, to].index_copy_(1, place, B[:, neurons])
            y = int(labels[i])
            spec = torch.zeros(classes, classes, dtype=torch.float64, device=neurons.device)
            spec[:, y] = 1
            spec -= torch.eye(classes, dtype=torch.float64, device=neurons.device)
            spec = torch.cat([spec[:y], spec[y + 1 :]])
            out = net.nodes[torch.float64][net.output]
            a, b, d = net.composed(spec.view(-1, *out.shape), net.output, active, open_[i])
            maps.a[i], maps.d[i] = a, d
            maps.b[i].index_copy_(1, place, b[:, neurons])
        # what rounding can add to each margin
        self.slack = _others(root.output_error + root.output_error.gather(1, labels[:, None]), labels)
        self.float32 = _others(root.float32_error + root.float32_error.gather(1, labels[:, None]), labels)
        self.sets = {d: sets.to(d) for d in (torch.float64, torch.float32)}
        self.maps = {d: maps.to(d) for d in (torch.float64, torch.float32)}
        self.size, self.deep = total, len(kept) > 1

    def enough(self, outward: bool) -> Tensor:
        """(E, T) what a bound in float64 must exceed: its own rounding, and ``outward`` that of the model in
        float32."""
        return self.slack + self.float32 if outward else self.slack

    def start(self) -> Tensor:
        """(E, T) bounds of all margins without a split (CROWN's lines)."""
        e, t = self.slack.shape
        wide = lambda v: v.unsqueeze(1).expand(-1, t, -1)  # noqa: E731
        lines = Lines.of(wide(self.low), wide(self.up))
        alpha = wide((self.up > -self.low).double())
        target = torch.arange(t, device=self.low.device).expand(e, -1)
        return self.of(None, torch.float64).lower(target, lines, alpha, None).value

    def of(self, which: Any, dtype: torch.dtype) -> Part:
        """The maps and sets of some examples; all of them (None) are not copied."""
        m, sets = self.maps[dtype], self.sets[dtype]
        return Part(m, sets, self) if which is None else Part(m.rows(which), sets.rows(which), self)


class Part(NamedTuple):
    """Some examples of problems, in one dtype."""

    maps: Maps
    sets: Sets
    whole: Problems

    def lower(self, target: Tensor, lines: Lines, alpha: Tensor, push: Tensor | None) -> Bound:
        """Lower bounds of margins ``target`` (E, P)."""
        m = self.maps
        pick = lambda t: t.gather(1, target.unsqueeze(2).expand(-1, -1, t.shape[2]))  # noqa: E731
        return self._down(pick(m.b), None, m.d.gather(1, target), pick(m.a), lines, alpha, push)

    def descended(self, target: Tensor, point: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """The least margins (E, P) met, and where: from points (E, P, D) to where the margin as it is linear there is
        least, and so on (the vertices between which Frank and Wolfe's method moves)."""
        m, p = self.maps, self.whole
        pick = lambda t: t.gather(1, target.unsqueeze(2).expand(-1, -1, t.shape[2]))  # noqa: E731
        a, b, d = pick(m.a), pick(m.b), m.d.gather(1, target)
        best, where = torch.full_like(d, math.inf), point
        for step in range(steps + 1):
            z = torch.baddbmm(m.c.unsqueeze(1), point, m.A.transpose(1, 2))
            for k in p.levels:
                if k.start:
                    z[..., k] += z[..., : k.start].clamp(min=0) @ m.B[:, k, : k.start].transpose(1, 2)
            value = (a * point).sum(2) + (b * z.clamp(min=0)).sum(2) + d
            better = value < best
            best, where = torch.where(better, value, best), torch.where(better.unsqueeze(2), point, where)
            if step < steps:
                slope = (z > 0).to(z)
                lines = Lines(torch.zeros_like(z, dtype=torch.bool), slope, torch.zeros_like(z))
                point = self._down(b.clone(), None, d, a, lines, slope, None).point
        return best, where

    def rows_of(self, level: int) -> Tensor:
        """(2 u, U): what the u neurons of a level read, and minus it."""
        here, like = self.whole.levels[level], self.maps.c
        n = here.stop - here.start
        sides = like.new_zeros(2 * n, self.whole.size)
        sides[:n, here] = torch.eye(n, dtype=like.dtype, device=like.device)
        sides[n:, here] = -sides[:n, here]
        return sides

    def of_rows(self, start: Tensor, lines: Lines, alpha: Tensor) -> Bound:
        """Lower bounds of rows ``start`` (E, R, U) of what neurons read."""
        return self._down(torch.zeros_like(start), start, start.new_zeros(start.shape[:2]), None, lines, alpha, None)

    def neurons(self, level: int, lines: Lines, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """Bounds (E, P, u) of what the neurons of a level read, from the lines (E, P, U) of those before it."""
        sides = self.rows_of(level)
        e, p, u = lines.upper.shape
        grow = lambda t: t.unsqueeze(2).expand(-1, -1, len(sides), -1).reshape(e, p * len(sides), u)  # noqa: E731
        start = sides.expand(e, p, -1, -1).reshape(e, -1, u)
        value = self.of_rows(start, Lines(*map(grow, lines)), grow(alpha)).value.view(e, p, 2, -1)
        return value[:, :, 0], -value[:, :, 1]

    def intervals(self, low: Tensor, up: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals (E, P, U) of what neurons read, from those of the levels before by interval arithmetic, where
        they are tighter than the given ones. ``error`` (E, U): what rounding can add."""
        m = self.maps
        center, radius = (self.sets.low + self.sets.up).flatten(1) / 2, (self.sets.up - self.sets.low).flatten(1) / 2
        middle = torch.baddbmm(m.c.unsqueeze(2), m.A, center.unsqueeze(2)).squeeze(2)
        reach = torch.bmm(m.A.abs(), radius.unsqueeze(2)).squeeze(2) + error
        low, up = low.clone(), up.clone()
        for k in self.whole.levels:
            if k.start:
                a, b = low[..., : k.start].clamp(min=0), up[..., : k.start].clamp(min=0)
                B = m.B[:, k, : k.start].transpose(1, 2)
                mid, half = torch.baddbmm(middle[:, None, k], (a + b) / 2, B), (b - a) / 2 @ B.abs() + reach[:, None, k]
                low[..., k] = torch.maximum(low[..., k], mid - half)
                up[..., k] = torch.minimum(up[..., k], mid + half)
        return low, up

    def _down(
        self,
        rho: Tensor,
        start: Tensor | None,
        const: Tensor,
        a: Tensor | None,
        lines: Lines,
        alpha: Tensor,
        push: Tensor | None,
    ) -> Bound:
        """Rows a x + rho r + start z + const (E, P) taken down to the input."""
        m, p = self.maps, self.whole
        under = torch.where(lines.crossing, alpha, lines.upper)
        if not p.deep:
            zeta = rho.clamp(max=0) * lines.upper + rho.clamp(min=0) * under
            if push is not None:
                zeta = zeta - push
        else:
            zeta = torch.zeros_like(rho) if start is None else start.clone()
            for k in reversed(p.levels):
                r = rho[..., k]
                zeta[..., k] += r.clamp(max=0) * lines.upper[..., k] + r.clamp(min=0) * under[..., k]
                if push is not None:
                    zeta[..., k] -= push[..., k]
                if k.start:
                    rho[..., : k.start] += zeta[..., k] @ m.B[:, k, : k.start]
        const = const + (rho.clamp(max=0) * lines.shift).sum(2) + (zeta @ m.c.unsqueeze(2)).squeeze(2)
        a = zeta @ m.A if a is None else torch.baddbmm(a, zeta, m.A)
        least, point = self.sets.least(a)
        return Bound(const + least, point, rho)

    def followed(self, point: Tensor, lines: Lines, alpha: Tensor, seen: Tensor) -> Tensor:
        """z (E, P, U) from points where every neuron follows the line that its coefficient took."""
        m, p = self.maps, self.whole
        z = torch.baddbmm(m.c.unsqueeze(1), point, m.A.transpose(1, 2))
        if not p.deep:
            return z
        under = torch.where(lines.crossing, alpha, lines.upper)
        r = torch.zeros_like(z)
        for k in p.levels:
            if k.start:
                z[..., k] += r[..., : k.start] @ m.B[:, k, : k.start].transpose(1, 2)
            low = seen[..., k] < 0
            r[..., k] = torch.where(
                low, lines.upper[..., k] * z[..., k] + lines.shift[..., k], under[..., k] * z[..., k]
            )
        return z


def _others(t: Tensor, labels: Tensor) -> Tensor:
    """(E, K - 1) of (E, K): all but the label's."""
    keep = torch.ones_like(t, dtype=torch.bool)
    keep[torch.arange(len(t)), labels] = False
    return t[keep].view(len(t), -1)
