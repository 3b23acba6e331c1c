"""What joins a layer in the normal form, as getters: computed from the parameters as they are when somebody reads
them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import graph as G


def _padded(t: Tensor, shape: G.Shape) -> G.Shape:
    return (1,) * (len(shape) - t.dim()) + tuple(t.shape)


def along(get: G.Getter, shape: G.Shape, axis: int) -> bool:
    """Whether a constant of values of ``shape`` is None, one number, or one for each place of one axis."""
    t = get()
    if t is None or t.numel() == 1:
        return True
    own = _padded(t, shape)
    axis %= len(shape)
    return all(n == 1 or d == axis for d, n in enumerate(own))


def reshaped(get: G.Getter, shape: G.Shape, inner: G.Shape) -> G.Getter | None:
    """The constant for the same values in another shape; None where that would take more than a number for each
    channel."""
    t = get()
    if t is None or t.numel() == 1:
        return get
    if not along(get, shape, 0) or shape[0] != inner[0]:
        return None
    tail = (1,) * (len(inner) - 1)
    return lambda: get().reshape(-1, *tail)


def _real(t: Any) -> Any:
    """A mask as numbers."""
    return t if t is None or t.is_floating_point() else t.double()


def composed(first: G.Scale, second: G.Scale) -> tuple[G.Getter, G.Getter]:
    """(factor, shift) of one scale behind another."""
    f, s, g, t = first.get_factor, first.get_shift, second.get_factor, second.get_shift

    def factor() -> Any:
        a, b = _real(f()), _real(g())
        return b if a is None else a if b is None else a * b

    def shift() -> Any:
        a, b, c = _real(s()), _real(g()), _real(t())
        a = a if a is None or b is None else a * b
        return c if a is None else a if c is None else a + c

    return G.Derived(factor), G.Derived(shift)


def behind(layer: Any, scale: G.Scale) -> tuple[G.Getter, G.Getter]:
    """(weight, bias) of the layer and the scale behind it."""
    get_w, get_b, get_f, get_s = layer.get_weight, layer.get_bias, scale.get_factor, scale.get_shift
    turned, groups = isinstance(layer, G.ConvTranspose), getattr(layer, "groups", 1)

    def weight() -> Tensor:
        w: Tensor = get_w()
        f = get_f()
        if f is None:
            return w
        f = f.reshape(-1).to(w)
        if not turned:
            return w * f.view(-1, *(1,) * (w.dim() - 1))
        per = w.unflatten(0, (groups, -1))  # (groups, C / groups, O / groups, kh, kw)
        own = f.expand(w.shape[1] * groups).reshape(groups, 1, -1, 1, 1)
        return (per * own).flatten(0, 1)

    def bias() -> Tensor | None:
        b, f, s = get_b(), get_f(), get_s()
        if b is not None and f is not None:
            b = b * f.reshape(-1).to(b)
        if s is None:
            return cast("Tensor | None", b)
        w = get_w()
        s = s.reshape(-1).to(w)
        outputs = w.shape[1] * groups if turned else w.shape[0]
        return s.expand(outputs).contiguous() if b is None else b + s

    none = get_f() is None
    return (get_w if none else G.Derived(weight)), G.Derived(bias)


def ahead(scale: G.Scale, layer: Any) -> tuple[G.Getter, G.Getter]:
    """(weight, bias) of the scale and the layer that reads it; a shift passes no padding."""
    get_w, get_b, get_f, get_s = layer.get_weight, layer.get_bias, scale.get_factor, scale.get_shift
    groups, inputs = getattr(layer, "groups", 1), scale.shape[0]

    def by_input(w: Tensor, t: Tensor) -> Tensor:
        """w times a number for each input."""
        t = t.reshape(-1).to(w)
        if groups == 1:
            return w * t.view(1, -1, *(1,) * (w.dim() - 2))
        own = t.expand(inputs).reshape(groups, 1, -1, *(1,) * (w.dim() - 2))
        return (w.unflatten(0, (groups, -1)) * own).flatten(0, 1)

    def weight() -> Tensor:
        return by_input(get_w(), get_f())

    def bias() -> Tensor:
        b = get_b()
        s: Tensor = by_input(get_w(), get_s()).flatten(1).sum(1)
        return s if b is None else b + s

    return (
        get_w if get_f() is None else G.Derived(weight),
        get_b if get_s() is None else G.Derived(bias),
    )


def slices(get: G.Getter, axis: int, sizes: list[int]) -> list[G.Getter]:
    """Of the parts along an axis."""
    if get() is None:
        return [get] * len(sizes)

    def part(first: int, n: int) -> G.Getter:
        return G.Derived(lambda: get().narrow(axis, first, n).contiguous())

    return [part(sum(sizes[:k]), n) for k, n in enumerate(sizes)]


def parts(get: G.Getter, shape: G.Shape, dim: int, sizes: list[int]) -> list[G.Getter]:
    """A constant of values of ``shape`` for the parts along ``dim``."""
    t = get()
    if t is None or t.numel() == 1 or _padded(t, shape)[dim] == 1:
        return [get] * len(sizes)
    return slices(get, t.dim() - len(shape) + dim, sizes)


def through(moves: G.Monotone, get: G.Getter, inner: G.Shape) -> G.Getter:
    """The weight of a dense layer of what ``moves`` makes of values of shape ``inner``, as that of a layer of those
    values."""

    def weight() -> Tensor:
        w: Tensor = get()
        return moves.transpose(w.reshape(len(w), *moves.shape), [inner])[0].reshape(len(w), -1).contiguous()

    return G.Derived(weight)


def turned(get: G.Getter, groups: int) -> G.Getter:
    """The weight of the convolution that a transposed one of stride 1 is."""

    def weight() -> Tensor:
        w: Tensor = get().flip(2, 3)  # (C, O / groups, kh, kw)
        return w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    return G.Derived(weight)


def constant(t: Tensor, like: G.Getter) -> G.Getter:
    """t in the type and on the device of what ``like`` gives."""
    made: dict[Any, Tensor] = {}

    def get() -> Tensor:
        w = like()
        key = w.dtype, w.device
        if key not in made:
            with torch.no_grad(), torch.inference_mode(False):
                made[key] = t.to(w)
        return made[key]

    return get


def zeros_around(places: Tensor, inner: G.Shape, shape: G.Shape) -> tuple[int, int, int, int] | None:
    """(top, bottom, left, right) where values of ``shape`` are a map with zeros around; else None."""
    if len(inner) != 3 or len(shape) != 3 or inner[0] != shape[0] or not places.numel():
        return None
    grid = places.view(shape)[0]
    kept = (grid >= 0).nonzero()
    if not len(kept):
        return None
    top, left = (int(v) for v in kept[0])
    bottom, right = shape[1] - inner[1] - top, shape[2] - inner[2] - left
    if min(bottom, right) < 0 or (top, bottom, left, right) == (0, 0, 0, 0):
        return None
    own = torch.arange(1, inner[0] * inner[1] * inner[2] + 1).view(inner)
    return (
        (top, bottom, left, right)
        if torch.equal(F.pad(own, (left, right, top, bottom)) - 1, places.view(shape))
        else None
    )


def moves(source: int, inner: G.Shape, places: Tensor, shape: G.Shape, where: str) -> G.Monotone:
    """The values of a node of shape ``inner`` in the order ``places``, each of them once."""
    back = places.argsort()

    def ordered(t: Tensor) -> Tensor:
        return t.flatten(1).index_select(1, places.to(t.device)).reshape(len(t), *shape)

    def restored(a: Tensor, like: Tensor) -> Tensor:
        return a.flatten(1).index_select(1, back.to(a.device)).reshape(len(a), *inner)

    return G.Monotone((source,), shape, where, function=ordered, adjoint=restored, places=places)
