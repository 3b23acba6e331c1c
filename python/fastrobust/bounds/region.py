"""The input set, and boxes of intermediate values."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrobust._input_sets import Clip, dual_exponent, eps_like, input_box
from fastrobust.ops import bounds as ops

Pair = tuple[Tensor, Tensor]


class Box:
    """An interval per neuron, by its ends or by centre and radius, whichever came first; the other form on demand."""

    __slots__ = ("_ends", "_middle")

    def __init__(self, ends: Pair | None = None, middle: Pair | None = None):
        self._ends: Any = ends
        self._middle: Any = middle

    @property
    def ends(self) -> Pair:
        if self._ends is None:
            self._ends = ops.from_center(*self._middle)
        return self._ends

    @property
    def middle(self) -> Pair:
        if self._middle is None:
            self._middle = ops.to_center(*self._ends)
        return self._middle

    def relu(self) -> Box:
        if self._ends is None:
            return Box(middle=ops.relu_center(*self._middle))
        return Box((self._ends[0].relu(), self._ends[1].relu()))

    def reshape(self, *shape: int) -> Box:
        """(B, *shape) of the same numbers."""
        if self._ends is None:
            return Box(middle=(self._middle[0].reshape(-1, *shape), self._middle[1].reshape(-1, *shape)))
        return Box((self._ends[0].reshape(-1, *shape), self._ends[1].reshape(-1, *shape)))


class Region:
    """x (B, *shape), eps (a number, (B,) or x's shape), norm, clip.

    ``widen``: relative enlargement of the box and the ball. ``box`` takes part for the l-infinity norm or with
    ``clip``; ``ball``: (x, eps), for p < inf.
    """

    def __init__(self, x: Tensor, eps: float | Tensor, norm: float, clip: Clip, widen: float = 0.0):
        self.x, self.eps, self.norm, self.clip = x, eps, norm, clip
        self.q = dual_exponent(norm)
        self.cut = Box(middle=ops.box_center(x, eps, clip))
        if widen:  # outward rounding: the errors of centre, radius and of sums over them
            if norm != math.inf:
                self.eps = eps = eps * (1 + widen)
            c, r = self.cut.middle
            self.cut = Box(middle=(c, r + widen * (c.abs() + r)))
        self.box: Pair | None = self.cut.middle if clip is not None or norm == math.inf else None
        self.ball: Pair | None = None if norm == math.inf else (x, eps_like(eps, x).expand_as(x))
        self.has_kernel = self.ball is None or self.q in (1.0, 2.0, math.inf)  # other norms run by the definition
        self._flat: dict[bool, tuple[Pair | None, Pair | None]] = {}

    @property
    def ends(self) -> Pair:
        """The ends of the box as they are, not rounded through centre and radius."""
        return input_box(self.x, self.eps, self.clip)

    def rows(self, index: Tensor) -> Region:
        """The same set for examples picked, with repetitions, by ``index``."""
        return self.mapped(lambda t: t.expand(len(self.x), *t.shape[1:])[index])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Region:
        """The set whose points are what ``change``, which moves numbers of (B, *shape) alone, makes of these; to walk
        rows to."""
        some = copy.copy(self)
        some.x, some.clip, some._flat = change(self.x), None, {}
        some.cut = Box(middle=(change(self.cut.middle[0]), change(self.cut.middle[1])))
        some.box = None if self.box is None else (change(self.box[0]), change(self.box[1]))
        some.ball = None if self.ball is None else (change(self.ball[0]), change(self.ball[1]))
        return some

    def eps_for(self, x: Tensor) -> float | Tensor:
        """eps for the same examples in another shape."""
        if isinstance(self.eps, Tensor) and self.eps.dim() == self.x.dim() and self.eps.shape == self.x.shape:
            return self.eps.reshape(x.shape)
        return self.eps

    def clip_for(self, x: Tensor) -> Clip:
        """clip for the same examples in another shape."""
        if self.clip is None or not isinstance(self.clip[0], Tensor):
            return self.clip
        low, high = (torch.as_tensor(c).expand_as(self.x).reshape(x.shape) for c in self.clip)
        return low, high

    def flattened(self, image: bool) -> tuple[Pair | None, Pair | None]:
        """(box, ball) as (B, n), in channels-last order for images."""
        if image not in self._flat:
            self._flat[image] = (_flat_pair(self.box, image), _flat_pair(self.ball, image))
        return self._flat[image]


def _flat_pair(p: Pair | None, image: bool) -> Pair | None:
    return None if p is None else (flat(p[0], image), flat(p[1], image))


def flat(t: Tensor, image: bool) -> Tensor:
    """(B, *shape) as (B, n), channels last for images."""
    return (
        (t.movedim(1, -1) if image else t)
        .reshape(len(t), t[0].numel() if len(t) else math.prod(t.shape[1:]))
        .contiguous()
    )
