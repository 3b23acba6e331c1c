"""The input set: an lp ball around each example, cut by a box."""

from __future__ import annotations

import math

from torch import Tensor

from fastrobust.reference.bounds import center_radius, dual_exponent, eps_like, input_box

Pair = tuple[Tensor, Tensor]


class Region:
    """x (B, *shape), eps (scalar, (B,) or x's shape), norm, clip.

    ``box``: centre and radius of the bounding box, where it takes part (l-infinity, or clipped); ``ball``: (x, eps), for p < inf.
    """

    def __init__(self, x: Tensor, eps: float | Tensor, norm: float, clip: tuple[float, float] | None):
        self.x, self.eps, self.norm, self.clip = x, eps, norm, clip
        self.q = dual_exponent(norm)
        self.lower, self.upper = input_box(x, eps, clip)
        self.box: Pair | None = center_radius(self.lower, self.upper) if clip is not None or norm == math.inf else None
        self.ball: Pair | None = None if norm == math.inf else (x, eps_like(eps, x).expand_as(x))
        self._flat: dict[bool, tuple[Pair | None, Pair | None]] = {}

    def eps_for(self, x: Tensor) -> float | Tensor:
        """eps for the same examples in another shape."""
        if isinstance(self.eps, Tensor) and self.eps.dim() == self.x.dim() and self.eps.shape == self.x.shape:
            return self.eps.reshape(x.shape)
        return self.eps

    def flattened(self, image: bool) -> tuple[Pair | None, Pair | None]:
        """(box, ball) as (B, n), in channels-last order for images."""
        if image not in self._flat:
            order = (lambda t: t.movedim(1, -1).flatten(1)) if image else (lambda t: t.flatten(1))
            self._flat[image] = tuple(None if p is None else (order(p[0]), order(p[1])) for p in (self.box, self.ball))
        return self._flat[image]
