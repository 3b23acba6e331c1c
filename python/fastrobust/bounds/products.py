"""What products of bounded values, functions of one number, softmax and normalisations become in a graph."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastrobust.bounds import graph as G
from fastrobust.bounds import joint as J
from fastrobust.bounds.builder import Ref, Tracked, per_example

if TYPE_CHECKING:
    from fastrobust.bounds.lowering import Lowering

Args = dict[str, Any]
_POWERS = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}


def applied(b: Lowering, x: Ref, name: str) -> Ref:
    return b.add(J.Function((x.index,), b.shape(x), b.where, name=name))


def function(name: str) -> Callable[[Lowering, Args], Ref]:
    return lambda b, a: applied(b, a["self"].ref, name)


def times(b: Lowering, x: Ref, y: Ref) -> Ref:
    """x * y of one shape."""
    if x.index == y.index:
        return applied(b, x, "square")
    return b.add(J.Product((x.index, y.index), b.shape(x), b.where))


def power(b: Lowering, a: Args) -> Ref:
    exponent = a["exponent"]
    if isinstance(exponent, (Tracked, Tensor)) or not isinstance(a["self"], Tracked):
        raise b.fail("a power whose exponent is no number")
    if not isinstance(exponent, (int, float)) or (exponent != 1 and float(exponent) not in _POWERS):
        raise b.fail(f"a power of {exponent}", f" (of {', '.join(map(str, (1, *_POWERS)))})")
    return a["self"].ref if exponent == 1 else applied(b, a["self"].ref, _POWERS[float(exponent)])


def matrices(b: Lowering, x: Tracked, y: Tracked) -> Ref:
    """(..., N, K) times (..., K, M), the leading sizes being equal."""
    (n, k), m, lead = x.size[-2:], y.size[-1], math.prod(x.size[:-2])
    first, second = b.to_shape(x.ref, (lead, n, k)), b.to_shape(y.ref, (lead, k, m))
    out = b.add(J.Product((first.index, second.index), (lead, n, m), b.where, matrices=True))
    return b.to_shape(out, per_example((*x.size[:-1], m)))


def _last(b: Lowering, x: Tracked, dims: list[int]) -> tuple[Ref, Callable[[Ref], Ref]]:
    """x as (rows, n) with dims last, and the way back."""
    n = len(x.size)
    dims = sorted(d % n for d in dims)
    rest = [d for d in range(n) if d not in dims]
    order = rest + dims
    moved = x if order == list(range(n)) else b.moved(x, lambda t: t.permute(order))
    count = math.prod(x.size[d] for d in dims)
    back = [order.index(d) for d in range(n)]

    def restored(y: Ref) -> Ref:
        own = Tracked(b.to_shape(y, per_example(moved.size)), moved.size)
        return (own if order == list(range(n)) else b.moved(own, lambda t: t.permute(back))).ref

    return b.to_shape(moved.ref, (math.prod(x.size) // count, count)), restored


def softmax(b: Lowering, a: Args) -> Ref:
    x = a["self"] if "self" in a else a["input"]
    if a.get("half_to_float") or a.get("dtype") not in (None, torch.float32, torch.float64):
        raise b.fail("a softmax in another precision")
    rows, restored = _last(b, x, [a["dim"]])
    count, n = b.shape(rows)
    apart = b.add(J.Differences((rows.index,), (count, n, n), b.where))
    return restored(b.add(J.Softmax((apart.index,), (count, n), b.where)))


def _moments(b: Lowering, rows: Ref, divisor: float) -> tuple[Ref, Ref]:
    """(values minus their mean, the sum of their squares / divisor (rows, 1)) of (rows, n)."""
    centred = b.add(J.Centred((rows.index,), b.shape(rows), b.where))
    return centred, _summed(b, applied(b, centred, "square"), divisor)


def _summed(b: Lowering, rows: Ref, divisor: float) -> Ref:
    count, n = b.shape(rows)

    def function(t: Tensor) -> Tensor:
        return t.sum(-1, keepdim=True) / divisor

    def adjoint(g: Tensor, like: Tensor) -> Tensor:
        return (g / divisor).expand(len(g), count, n)

    return b.linear(rows, function, (count, 1), n, adjoint)


def normalised(b: Lowering, rows: Ref, eps: float) -> Ref:
    """(x - mean) / sqrt(var + eps) of every row of (rows, n)."""
    count, n = b.shape(rows)
    if n == 1:
        return b.add(J.Centred((rows.index,), (count, 1), b.where))
    centred, variance = _moments(b, rows, n)
    scale = applied(b, b.affine(variance, None, eps), "rsqrt")
    spread = b.pick(scale, torch.arange(count).repeat_interleave(n), (count, n))

    def ranged(low: Tensor, up: Tensor) -> G.Ends:
        return J.normalised_range(low, up, eps)

    return b.add(J.Product((centred.index, spread.index), (count, n), b.where, ranged=ranged))


def _per_channel(get: G.Getter, tail: tuple[int, ...]) -> Tensor:
    t: Tensor = get()
    return t.view(-1, *tail)


def _with_affine(b: Lowering, y: Ref, a: Args, tail: tuple[int, ...] | None) -> Ref:
    """y * weight + bias; tail: of the shape that one number per channel gets."""
    found = []
    for key in ("weight", "bias"):
        get = None if a.get(key) is None else b.constant(a[key])
        if get is not None and tail is not None:
            get = G.Derived(functools.partial(_per_channel, get, tail))
        found.append(get)
    return y if found == [None, None] else b.affine(y, *found)


def layer_norm(b: Lowering, a: Args) -> Ref:
    x, k = a["input"], len(a["normalized_shape"])
    rows, restored = _last(b, x, list(range(len(x.size) - k, len(x.size))))
    return _with_affine(b, restored(normalised(b, rows, float(a["eps"]))), a, None)


def group_norm(b: Lowering, a: Args) -> Ref:
    x = a["input"]
    rows = b.to_shape(x.ref, (x.size[0] * a["group"], math.prod(x.size) // (x.size[0] * a["group"])))
    y = b.to_shape(normalised(b, rows, float(a["eps"])), per_example(x.size))
    return _with_affine(b, y, a, (1,) * (len(x.size) - 2))


def instance_norm(b: Lowering, a: Args) -> Ref | None:
    """Instance normalisation without running statistics, which torch runs as batch normalisation of (1, B C, ...): of a
    batch of one it looks like that of a batch, so that the module has to say which."""
    kinds = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    if not isinstance(a["step"].module, kinds) or a["input"].size[0] != 1:
        return None
    x = a["input"]
    rows = b.to_shape(x.ref, (x.size[1], math.prod(x.size[2:])))
    y = b.to_shape(normalised(b, rows, float(a["eps"] if "eps" in a else a["epsilon"])), per_example(x.size))
    return _with_affine(b, y, a, (1,) * (len(x.size) - 2))


def gated(b: Lowering, a: Args) -> Ref:
    """The first half along ``dim`` times the sigmoid of the second."""
    x = a["self"]
    half = x.size[a["dim"]] // 2
    one = b.moved(x, lambda t: t.narrow(a["dim"], 0, half)).ref
    gate = b.moved(x, lambda t: t.narrow(a["dim"], half, half)).ref
    return times(b, one, b.activation(gate, "sigmoid"))


def variance(root: bool) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        x, dims = a["self"], a.get("dim")
        dims = list(range(len(x.size))) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
        correction = a.get("correction", 1 if a.get("unbiased", True) else 0)
        rows, _ = _last(b, x, dims)
        divisor = b.shape(rows)[1] - float(1 if correction is None else correction)
        if divisor <= 0:
            raise b.fail("a variance of too few numbers")
        y = _moments(b, rows, divisor)[1]
        return b.to_shape(applied(b, y, "sqrt") if root else y, per_example(b.size))

    return handle


def vector_norm(b: Lowering, a: Args) -> Ref:
    x, dims = a["self"], a.get("dim")
    if float(a.get("ord") or 0) != 2 or a.get("dtype") not in (None, torch.float32, torch.float64):
        raise b.fail("a norm", " (of another kind than 2)")
    dims = list(range(len(x.size))) if dims in (None, []) else [dims] if isinstance(dims, int) else list(dims)
    rows, _ = _last(b, x, dims)
    return b.to_shape(applied(b, _summed(b, applied(b, rows, "square"), 1.0), "sqrt"), per_example(b.size))
