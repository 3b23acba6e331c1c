"""Lines whose slopes are free: those of one nonlinear node for many rows of linear bounds, and how they move
(alpha-CROWN, Xu et al. 2021). The search itself is in ``slope_search``.

Lower lines of unstable ReLUs go through 0 with any slope in [0, 1], those of curved activations are tangents of any
slope, on both sides.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.backward import Lines
from fastrobust.ops import bounds as ops
from fastrobust.reference import relaxations

_NARROW = 1e-2  # width below which a curved activation keeps its lines
# Adam's, with little memory: bounds are concave in the slopes of one layer, and have kinks, on which a long mean overshoots
_MOMENTS = 0.5, 0.8
_CURVED = 0.02  # of a step, for curved activations: their best slopes lie near CROWN's


@dataclasses.dataclass(frozen=True)
class SlopeSearch:
    """How method "alpha-crown" looks for slopes: Adam on slopes scaled to [0, 1], the best of each row kept.

    iterations: bounds computed, the first with CROWN's slopes. hidden: the same for hidden neurons, None: half as many,
    0: they keep CROWN's intervals, which is much faster in deep networks. lr, decay: length of the first step, and its
    factor an iteration (None: so that it falls to a twentieth).
    stop: rows whose lower bound is above this (upper bounds: below minus this) are left alone, None: none. 0 is enough
    for margins of which the sign counts.
    """

    iterations: int = 20
    lr: float = 0.4
    decay: float | None = None
    stop: float | None = None
    hidden: int | None = None

    def length(self, count: int) -> float:
        """Of step ``count``, from 1."""
        decay = 0.05 ** (1 / self.iterations) if self.decay is None else self.decay
        return self.lr * decay ** (count - 1)

    def __post_init__(self) -> None:
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations: got {self.iterations!r}, expected an integer >= 1")
        if self.hidden is not None and (not isinstance(self.hidden, int) or self.hidden < 0):
            raise ValueError(f"hidden: got {self.hidden!r}, expected an integer >= 0 or None")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr: got {self.lr!r}, expected a finite number > 0")
        if self.decay is not None and not 0 < self.decay <= 1:
            raise ValueError(f"decay: got {self.decay!r}, expected a number in (0, 1]")


class Slopes:
    """The lines of one nonlinear node for R rows: what is fixed, and the slopes that are free, scaled to [0, 1].

    Of ReLUs, which are most, the free slopes are moved where the lines are kept, and fixed ones are held by their
    limits: no masks, and no copy on the way to the kernels, which want images with their channels last.
    """

    def __init__(
        self, node: Any, ends: tuple[Tensor, Tensor], example: Tensor, inside: Tensor | None = None,
        remembers: bool = True,
    ):  # fmt: skip
        """inside: where the row's window lies in the image; outside are the zeros of the padding. remembers: keeps the
        best slopes."""
        self.node = node
        self.curved = False
        self.sides: tuple[int, ...] = ()  # whose slopes are free: 0 below, 1 above
        self.free: Any = None
        l, u = (t.detach() for t in ends)
        if isinstance(node, G.MaxPool):
            slopes, intercepts, source = ops.relax_max_pool(l, u, node.window, "crown")
            self.source: Any = source[example]
        else:
            slopes, intercepts = ops.relax(l, u, node.activation, "crown", node.params)
            self.source = None
        slopes, intercepts = slopes.expand(2, *slopes.shape[1:])[:, example], intercepts[:, example]
        if inside is not None:
            slopes, intercepts = slopes * inside, intercepts * inside
        self.slopes, self.intercepts = _channels_last(slopes), _channels_last(intercepts)
        if self.source is not None:
            return
        name = node.activation
        self.relu = name == "relu"
        if name in ("relu", "leaky_relu"):
            self.sides, self.free = (0,), _channels_last(node.unstable(l, u)[example])
            self.least: Any = node.params[0] if name == "leaky_relu" else 0.0
            self.span: Any = 1.0 - self.least
        else:
            self.curved, self.l, self.u = True, l[example], u[example]
            low, high = relaxations.derivative_range(l, u, name, node.params)
            self.free = (node.unstable(l, u) & (high > low) & (u - l > _NARROW) & (u - l).isfinite())[example]
            self.least, self.span = low[example], (high - low)[example]
            self.sides = (0,) if name == "softplus" or (name == "elu" and node.params[0] <= 1) else (0, 1)
        if not self.curved and self.span == 0:  # a leaky ReLU that is the identity
            self.sides = ()
            return
        if self.relu:
            self.at = self.slopes[:1]  # where the lines are
            self.low, self.high = self.at.clone().masked_fill_(self.free, 0), self.at.clone().masked_fill_(self.free, 1)
        else:
            safe = torch.where(self.free, self.span, 1.0) if self.curved else self.span
            start = [((self.slopes[side] - self.least) / safe).clamp(0, 1) for side in self.sides]
            self.at = torch.stack(start)  # (sides, R, *shape)
            self.low, self.high = torch.zeros(()).to(self.at), torch.ones(()).to(self.at)
        self.best: Any = self.at.clone() if remembers else None
        self.mean, self.square = torch.zeros_like(self.at), torch.zeros_like(self.at)
        self.points: Any = None

    def lines(self, at: Tensor | None = None) -> Lines:
        """The lines now, or with other slopes; remembers where the curved ones touch."""
        if not self.sides or (self.relu and at is None):
            return Lines(self.slopes, self.intercepts, source=self.source)
        at = self.at if at is None else at
        slopes, intercepts = self.slopes.clone(), self.intercepts.clone()
        points = []
        for k, side in enumerate(self.sides):
            chosen = self.least + at[k] * self.span
            slopes[side] = torch.where(self.free, chosen, slopes[side])
            if self.curved:
                value, point = ops.support(
                    slopes[side], self.l, self.u, self.node.activation, self.node.params, side == 1
                )
                intercepts[side] = torch.where(self.free, value, intercepts[side])
                points.append(point)
        self.points = points
        return Lines(slopes, intercepts)

    def follow(self, lines: Lines, a: Tensor, z: Tensor) -> Tensor:
        """The node's output where each row takes the lower line for coefficients a >= 0, the upper one for others."""
        if lines.source is not None:
            z = z.flatten(2).gather(2, lines.source).view(a.shape)
        (low, up), (below, above) = lines.slopes, lines.intercepts
        if self.sides and self.relu:  # lower lines go through 0
            other = torch.lt(a, 0, out=torch.empty_like(a))
            return torch.lerp(low, up, other).mul_(z).addcmul_(other, above)
        lower = a >= 0
        return torch.where(lower, low, up) * z + torch.where(lower, below, above)

    def gradient(self, a: Tensor, z: Tensor) -> Tensor:
        """Of every row's bound by ``at``: coefficients and values (R, *shape) at the node's output and input. That of
        slopes that are not free is left as it comes: ``low`` and ``high`` hold them."""
        if self.relu:
            return a.clamp(min=0).mul_(z).unsqueeze(0)
        found = []
        for k, side in enumerate(self.sides):
            reach = z - self.points[k] if self.curved else z
            used = self.free & ((a >= 0) if side == 0 else (a < 0))
            found.append(torch.where(used, a * reach * self.span, 0.0))
        return torch.stack(found)

    def move(self, gradient: Tensor, length: float, count: int) -> None:
        """One step of Adam upwards, ``count`` from 1."""
        old, older = _MOMENTS
        self.mean.lerp_(gradient, 1 - old)
        self.square.mul_(older).addcmul_(gradient, gradient, value=1 - older)
        # both corrections of the averages' start in the length of the step
        unit = math.sqrt(1 - older**count)
        size = torch.sqrt(self.square, out=gradient).add_(1e-8 * unit)
        length *= (_CURVED if self.curved else 1.0) * unit / (1 - old**count)
        self.at.addcdiv_(self.mean, size, value=length).clamp_(self.low, self.high)

    def remember(self, better: Tensor) -> None:
        if self.best is not None and bool(better.any()):
            rows = better.nonzero().flatten()
            self.best[:, rows] = self.at[:, rows]

    def keep(self, rows: Tensor) -> None:
        """Goes on with some of the rows."""
        self.slopes, self.intercepts = self.slopes[:, rows], self.intercepts[:, rows]
        if self.sides:
            names = (
                "at",
                "mean",
                "square",
                *(("low", "high") if self.relu else ()),
                *(() if self.best is None else ("best",)),
            )
            for name in names:
                setattr(self, name, getattr(self, name)[:, rows])
        if self.sides and self.relu:
            self.at = self.slopes[:1]
        for name in ("source", "free", *(("l", "u", "least", "span") if self.curved else ())):
            t = getattr(self, name)
            setattr(self, name, None if t is None else t[rows])


def _channels_last(t: Tensor) -> Tensor:
    """(..., C, H, W) with the channels last in memory, and others, contiguous."""
    return t.movedim(-3, -1).contiguous().movedim(-1, -3) if t.dim() >= 4 else t.contiguous()


__all__ = ["SlopeSearch", "Slopes"]
