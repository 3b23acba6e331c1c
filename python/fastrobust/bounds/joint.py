"""Nonlinear nodes that the kernels have no stage for: functions of one number, products of two bounded values,
softmax. And the differences and the subtraction of means that softmax and normalisations need.

Each has its interval, and lines or planes: slopes on every input and two intercepts. ``Backward`` asks for what a node
makes of rows; the engine for the rest. Everything is torch, so that gradients are recorded and any device serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.region import Box
from fastrobust.reference import functions

MOST_DIFFERENCES = 1 << 14  # before a softmax, up to which each gets linear bounds of its own


@dataclass(eq=False)
class Joint(G.Node):
    """A nonlinear node; its lines are (slopes, intercepts (2, B, *shape)), the form of slopes being its own."""

    def value(self, given: list[Tensor]) -> Tensor:
        raise NotImplementedError

    def interval(self, bounds: list[G.Ends]) -> G.Ends:
        raise NotImplementedError

    def relax(self, bounds: list[G.Ends], kind: str) -> tuple[Any, Tensor]:
        raise NotImplementedError

    def back(self, slopes: Any, A: Tensor, example: Tensor, sides: int) -> list[Tensor]:
        """Coefficients (k, R, *input shape) of every input."""
        raise NotImplementedError


def split(A: Tensor, sides: int) -> list[tuple[Tensor, Tensor]]:
    """(coefficients that meet the lower line, those that meet the upper one) of each side of rows (1 or 2, R, ...)."""
    found = []
    for side in range(sides):
        a = A[min(side, len(A) - 1)]
        positive, negative = a.clamp(min=0), a.clamp(max=0)
        found.append((negative, positive) if side else (positive, negative))
    return found


def offset(A: Tensor, intercepts: Tensor, example: Tensor, sides: int) -> Tensor:
    """(sides, R): what rows make of the intercepts."""
    below, above = intercepts.flatten(2)[:, example]
    parts = split(A.flatten(2), sides)
    return torch.stack([(p * below).sum(1) + (q * above).sum(1) for p, q in parts])


@dataclass(eq=False)
class Function(Joint):
    """A function of one number, of ``reference.functions``."""

    name: str = ""

    def value(self, given: list[Tensor]) -> Tensor:
        return functions.FUNCTIONS[self.name].value(given[0])

    def interval(self, bounds: list[G.Ends]) -> G.Ends:
        low, up = bounds[0]
        if functions.FUNCTIONS[self.name].starts is not None and bool(functions.outside(low, self.name).any()):
            raise ValueError(
                f"model: {self.name} at {self.where!r} is not bounded on the set: what it reads may be as small as "
                f"{float(low.detach().min()):.3g}, expected more than 0 (a smaller eps, or a tighter method)"
            )
        return functions.interval(low, up, self.name)

    def relax(self, bounds: list[G.Ends], kind: str) -> tuple[Any, Tensor]:
        return functions.relax(*bounds[0], self.name, kind)

    def back(self, slopes: Any, A: Tensor, example: Tensor, sides: int) -> list[Tensor]:
        s = slopes[:, example]
        if len(s) == 1:
            return [A * s]
        return [torch.stack([p * s[0] + q * s[1] for p, q in split(A, sides)])]


@dataclass(eq=False)
class Product(Joint):
    """x * y, or with ``matrices`` x @ y, (b, N, K) times (b, K, M), of two bounded values. Planes: of the two below
    (and above) that touch at corners (McCormick 1976) the mean,

        cy x + cx y - cx cy -+ rx ry,          c, r: centres and radii,

    which leaves the volume that either leaves (Shi et al. 2020 take one of the two) and has the same slopes on both
    sides, so that one matrix serves rows in both directions. ``ranged``: a tighter interval from what x alone tells."""

    matrices: bool = False
    ranged: Callable[[Tensor, Tensor], G.Ends] | None = None

    def value(self, given: list[Tensor]) -> Tensor:
        return given[0] @ given[1] if self.matrices else given[0] * given[1]

    def interval(self, bounds: list[G.Ends]) -> G.Ends:
        (a, b), (c, d) = bounds
        if self.matrices:
            low = up = None
            for k in range(a.shape[-1]):
                one, other = (t[..., k, None] for t in (a, b)), (t[..., k, None, :] for t in (c, d))
                l, u = _corners(*one, *other)
                low, up = (l, u) if low is None or up is None else (low + l, up + u)
            assert low is not None and up is not None
            return low, up
        low, up = _corners(a, b, c, d)
        if self.ranged is None:
            return low, up
        l, u = self.ranged(a, b)
        return torch.maximum(low, l), torch.minimum(up, u)

    def relax(self, bounds: list[G.Ends], kind: str) -> tuple[Any, Tensor]:
        (cx, rx), (cy, ry) = ((0.5 * l + 0.5 * u, 0.5 * u - 0.5 * l) for l, u in bounds)
        f: Callable[[Tensor, Tensor], Tensor] = torch.matmul if self.matrices else torch.mul
        terms = cx.shape[-1] if self.matrices else 1
        eps = torch.finfo(cx.dtype).eps
        # what centres, radii and the products of the plane are rounded by
        pad = (4 * terms + 12) * eps * f(cx.detach().abs() + rx.detach(), cy.detach().abs() + ry.detach())
        pad = pad + torch.finfo(cx.dtype).tiny
        mid, gap = -f(cx, cy), f(rx, ry) + pad
        return (cx, cy), torch.stack([mid - gap, mid + gap])

    def back(self, slopes: Any, A: Tensor, example: Tensor, sides: int) -> list[Tensor]:
        cx, cy = (t[example] for t in slopes)
        return [A @ cy.mT, cx.mT @ A] if self.matrices else [A * cy, A * cx]


def _corners(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> G.Ends:
    ends = torch.stack([a * c, a * d, b * c, b * d])
    return ends.amin(0), ends.amax(0)


@dataclass(eq=False)
class Softmax(Joint):
    """p_i = 1 / g_i, g_i = sum_j exp(d_ij), of the differences d_ij = x_j - x_i (rows, n, n) (Shi et al. 2020,
    Bonaert et al. 2021), so that an interval is exact and no product is bounded. Lines: chords (above) and tangents (below) of
    every exp, then the tangent of 1 / g at the middle of its interval below, the chord above; a constant where that is
    tighter at the centre."""

    def value(self, given: list[Tensor]) -> Tensor:
        return given[0].exp().sum(-1).reciprocal()

    @staticmethod
    def _sums(a: Tensor, b: Tensor) -> G.Ends:
        """The interval of g."""
        eps = torch.finfo(a.dtype).eps
        by = (a.shape[-1] + 8) * eps + eps * torch.maximum(a.abs(), b.abs()).detach().amax(-1).clamp(max=100)
        return a.exp().sum(-1) * (1 - by), b.exp().sum(-1) * (1 + by)

    def interval(self, bounds: list[G.Ends]) -> G.Ends:
        least, most = self._sums(*bounds[0])
        return most.reciprocal().clamp(0, 1), least.reciprocal().clamp(0, 1)

    def relax(self, bounds: list[G.Ends], kind: str) -> tuple[Any, Tensor]:
        a, b = bounds[0]
        least, most = self._sums(a, b)
        flat = torch.stack([most.reciprocal(), least.reciprocal()]).clamp(0, 1)
        fine = (most < 1e15).detach()  # else squares overflow
        a, b = (torch.where(fine.unsqueeze(-1), t, 0.0) for t in (a, b))
        width, low, high = b - a, a.exp(), b.exp()
        middle = a + 0.5 * width
        narrow = width < 1e-2
        chord = torch.where(narrow, middle.exp(), (high - low) / torch.where(narrow, 1.0, width))
        over = torch.maximum(low - chord * a, high - chord * b)
        at = torch.minimum(middle, a + 1)
        touch = at.exp()
        under = touch * (1 - at)
        least, most = torch.where(fine, least, 1.0), torch.where(fine, most, 1.0)
        g = 0.5 * least + 0.5 * most
        first, second = (g * g).reciprocal(), (least * most).reciprocal()
        slopes, ends = [], []
        reach = torch.maximum(a.abs(), b.abs()).detach()
        eps = (2 * a.shape[-1] + 160) * torch.finfo(a.dtype).eps
        sides = ((chord, over, first, 2 / g), (touch, under, second, least.reciprocal() + most.reciprocal()))
        for side, (slope, rest, factor, constant) in enumerate(sides):
            s = -slope * factor.unsqueeze(-1)
            e = constant - factor * rest.sum(-1)
            with torch.no_grad():
                size = factor * (slope * reach + torch.maximum(rest.abs(), high)).sum(-1) + constant
            e = e - eps * size if side == 0 else e + eps * size
            there = ((s * middle).sum(-1) + e).detach()
            better = fine & ((there > flat[0]) if side == 0 else (there < flat[1]))
            slopes.append(torch.where(better.unsqueeze(-1), s, 0.0))
            ends.append(torch.where(better, e, flat[side]))
        return torch.stack(slopes), torch.stack(ends)

    def back(self, slopes: Any, A: Tensor, example: Tensor, sides: int) -> list[Tensor]:
        below, above = slopes[:, example]
        return [torch.stack([p.unsqueeze(-1) * below + q.unsqueeze(-1) * above for p, q in split(A, sides)])]


@dataclass(eq=False)
class Differences(G.LinearNode):
    """d_ij = x_j - x_i of (rows, n), as (rows, n, n)."""

    def function(self, x: Tensor) -> Tensor:
        return x.unsqueeze(-2) - x.unsqueeze(-1)

    def transpose(self, a: Tensor, shapes: list[G.Shape]) -> list[Tensor]:
        return [a.sum(-2) - a.sum(-1)]

    def interval(self, bounds: list[G.Ends]) -> G.Ends:
        l, u = bounds[0]
        low, up = l.unsqueeze(-2) - u.unsqueeze(-1), u.unsqueeze(-2) - l.unsqueeze(-1)
        own = torch.eye(l.shape[-1], dtype=torch.bool, device=l.device)
        return low.masked_fill(own, 0.0), up.masked_fill(own, 0.0)


@dataclass(eq=False)
class Centred(G.LinearNode):
    """x minus its mean over the last dimension, of (groups, n)."""

    def function(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)

    def transpose(self, a: Tensor, shapes: list[G.Shape]) -> list[Tensor]:
        return [self.function(a)]

    def interval(self, bounds: list[G.Ends]) -> G.Ends:
        l, u = bounds[0]
        c, r, n = 0.5 * l + 0.5 * u, 0.5 * u - 0.5 * l, l.shape[-1]
        c, r = self.function(c), (1 - 2 / n) * r + r.mean(-1, keepdim=True)
        return c - r, c + r


def normalised_range(low: Tensor, up: Tensor, eps: float) -> G.Ends:
    """The interval of d_i / sqrt(mean(d^2) + eps) for d within [low, up] (..., n): it grows with d_i, and the
    squares of the others are least or most, by its sign."""
    n = low.shape[-1]
    most = torch.maximum(low * low, up * up)
    least = torch.where((low > 0) | (up < 0), torch.minimum(low * low, up * up), 0.0)
    rest_least = (least.sum(-1, keepdim=True) - least).clamp(min=0)
    rest_most = most.sum(-1, keepdim=True) - most
    room = 1 - (n + 16) * torch.finfo(low.dtype).eps

    def at(d: Tensor, outwards: Tensor) -> Tensor:  # outwards: away from 0, where the others are least
        outer = d * torch.rsqrt((d * d + rest_least * room) / n + eps) / room
        return torch.where(outwards, outer, d * torch.rsqrt((d * d + rest_most / room) / n + eps) * room)

    return at(low, low < 0), at(up, up > 0)


def tighten_inputs(engine: Any, node: Joint) -> None:
    """Linear bounds for what ``node`` reads; of many differences, for the numbers that are subtracted."""
    for j in dict.fromkeys(node.inputs):
        before = engine.graph.nodes[j]
        i = before.inputs[0] if isinstance(before, Differences) and before.size > MOST_DIFFERENCES else j
        if engine.exact[i] or not _has_rows(engine.graph, i):
            continue
        engine.tighten_node(i)
        if i != j:
            engine.boxes[j] = Box(before.interval([engine.boxes[i].ends]))


def _has_rows(graph: G.Graph, j: int) -> bool:
    """Whether linear bounds can be tighter than the interval of node j: not where it holds the values of a function of
    one number, or of a softmax, alone."""
    node: Any = graph.nodes[j]
    while isinstance(node, G.Reshape) or (isinstance(node, G.Monotone) and node.places is not None):
        node = graph.nodes[node.inputs[0]]
    return isinstance(node, (G.LinearNode, Product))


__all__ = [
    "Centred",
    "Differences",
    "Function",
    "Joint",
    "Product",
    "Softmax",
    "normalised_range",
    "offset",
    "split",
    "tighten_inputs",
]
