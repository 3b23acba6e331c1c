"""What elementwise operations, sums and choices become in a graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrobust._places import Constant
from fastrobust.bounds import graph as G
from fastrobust.bounds import products as P
from fastrobust.bounds.builder import Ref, Tracked, per_example

if TYPE_CHECKING:
    from fastrobust.bounds.lowering import Lowering

Args = dict[str, Any]


def operand(b: Lowering, v: Any, size: tuple[int, ...]) -> Any:
    """A Ref of ``size``, a number, or a getter."""
    if isinstance(v, Tracked):
        return b.expanded(v, size)
    return b.per_example_constant(v, size)


def scaled(b: Lowering, v: Any, k: float) -> Any:
    if k == 1:
        return v
    if isinstance(v, Ref):
        return b.affine(v, float(k))
    return (lambda: v() * k) if callable(v) else v * k


def without_infinities(v: Any) -> Any:
    """A constant as it is, or with +-1e30 in place of infinite numbers: masks of attention, which a softmax turns into
    0 either way. Anything else that reads them is told from the model by the comparison with it."""
    if callable(v):
        return G.Derived(lambda: v().clamp(-G.MASKED, G.MASKED)) if bool(torch.isinf(v()).any()) else v
    return v if isinstance(v, Ref) else min(max(v, -G.MASKED), G.MASKED)


def add(sign: int, swapped: bool = False) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        x, y = (a["other"], a["self"]) if swapped else (a["self"], a["other"])
        first, second = operand(b, x, b.size), operand(b, y, b.size)
        alpha = float(a.get("alpha", 1))
        second = scaled(b, second, alpha)
        first, second = without_infinities(first), without_infinities(second)
        if isinstance(first, Ref) and isinstance(second, Ref):
            return b.add(G.Sum((first.index, second.index), b.shape(first), b.where, signs=(1, sign)))
        if isinstance(first, Ref):
            return b.affine(first, None, scaled(b, second, sign))
        return b.affine(second, None if sign > 0 else -1.0, first)

    return handle


def multiply(b: Lowering, a: Args) -> Ref:
    x, y = operand(b, a["self"], b.size), operand(b, a["other"], b.size)
    if isinstance(x, Ref) and isinstance(y, Ref):
        return P.times(b, x, y)
    return b.affine(x, y) if isinstance(x, Ref) else b.affine(y, x)


def divide(b: Lowering, a: Args) -> Ref:
    if a.get("rounding_mode") is not None:
        raise b.fail("a division with rounding")
    x, y = operand(b, a["self"], b.size), operand(b, a["other"], b.size)
    if isinstance(y, Ref):
        below = P.applied(b, y, "reciprocal")
        return P.times(b, x, below) if isinstance(x, Ref) else b.affine(below, x)
    return b.affine(x, (lambda: y().double().reciprocal()) if callable(y) else 1.0 / float(y))


def activation(name: str, *parameters: str) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        return b.activation(a["self"].ref, name, tuple(float(a[p]) for p in parameters))

    return handle


def elu(b: Lowering, a: Args) -> Ref:
    alpha, scale, inner = (float(a.get(k, 1)) for k in ("alpha", "scale", "input_scale"))
    x = a["self"].ref if inner == 1 else b.affine(a["self"].ref, inner)
    y = b.activation(x, "elu", (alpha,))
    return y if scale == 1 else b.affine(y, scale)


def celu(b: Lowering, a: Args) -> Ref:
    alpha = float(a["alpha"])
    if not alpha > 0:
        raise b.fail("celu", f" (alpha must be positive, got {alpha})")
    return b.affine(b.activation(b.affine(a["self"].ref, 1 / alpha), "elu", (1.0,)), alpha)


def hardsigmoid(b: Lowering, a: Args) -> Ref:
    return b.affine(b.activation(b.affine(a["self"].ref, None, 3.0), "relu6"), 1.0 / 6.0)


def rectified(b: Lowering, x: Ref, low: Any, sign: int = 1) -> Ref:
    """max(x, low), or min(x, low) with sign -1, of a number, a getter or a Ref: low + sign relu(sign (x - low))."""
    if isinstance(low, Ref):
        inner: Ref = b.add(G.Sum((x.index, low.index), b.shape(x), b.where, signs=(sign, -sign)))
    else:
        still = not callable(low) and float(low) == 0.0
        if still and sign > 0:
            return b.activation(x, "relu")
        inner = b.affine(x, None if sign > 0 else -1.0, scaled(b, low, -sign))
    y = b.activation(inner, "relu")
    if isinstance(low, Ref):
        return b.add(G.Sum((low.index, y.index), b.shape(x), b.where, signs=(1, sign)))
    return b.affine(y, None if sign > 0 else -1.0, low)


def clamp(b: Lowering, a: Args) -> Ref:
    low, high = a.get("min"), a.get("max")
    numbers = all(not isinstance(v, (Tracked, Constant)) for v in (low, high))
    x = b.expanded(a["self"], b.size)
    if low is not None and high is not None and numbers:
        return b.activation(x, "hardtanh", (float(low), float(high)))
    if low is not None:
        x = rectified(b, x, operand(b, low, b.size))
    return x if high is None else rectified(b, x, operand(b, high, b.size), -1)


def extreme(sign: int) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        x, y = operand(b, a["self"], b.size), operand(b, a["other"], b.size)
        return rectified(b, x, y, sign) if isinstance(x, Ref) else rectified(b, y, x, sign)

    return handle


def absolute(b: Lowering, a: Args) -> Ref:
    x = a["self"].ref
    parts = (b.activation(x, "relu").index, b.activation(b.affine(x, -1.0), "relu").index)
    return b.add(G.Sum(parts, b.shape(x), b.where, signs=(1, 1)))


def prelu(b: Lowering, a: Args) -> Ref:
    x = b.expanded(a["self"], b.size)
    slope = operand(b, a["weight"], b.size)
    if isinstance(slope, Ref):
        raise b.fail("a slope that depends on the input")
    below = b.affine(b.activation(b.affine(x, -1.0), "relu"), slope)
    return b.add(G.Sum((b.activation(x, "relu").index, below.index), b.shape(x), b.where, signs=(1, -1)))


def threshold(b: Lowering, a: Args) -> Ref:
    if float(a["threshold"]) != 0 or float(a["value"]) != 0:
        raise b.fail("threshold", f" (which jumps from {a['value']} to {a['threshold']})")
    return b.activation(a["self"].ref, "relu")


def rrelu(b: Lowering, a: Args) -> Ref:
    return b.activation(a["self"].ref, "leaky_relu", ((float(a["lower"]) + float(a["upper"])) / 2,))


def same(b: Lowering, a: Args) -> Ref:
    dtype = a.get("dtype")
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        raise b.fail(f"a conversion to {dtype}")
    return b.to_shape(a["self"].ref, per_example(b.size))


def copy(b: Lowering, a: Args) -> Ref:
    if isinstance(a["src"], Tracked):
        return b.expanded(a["src"], b.size)
    return fixed(b, b.per_example_constant(a["src"], b.size))


def fixed(b: Lowering, value: Any) -> Ref:
    """A node that does not depend on the input: no coefficient, all shift."""
    shape = per_example(b.size)
    none = b.pick(Ref(0), torch.full((math.prod(shape),), -1), shape)
    return b.affine(none, None, value)


def fill(b: Lowering, a: Args) -> Ref:
    if isinstance(a.get("value"), Tracked):
        return b.expanded(a["value"], b.size)
    return fixed(b, b.per_example_constant(a.get("value", 0.0), b.size))


def choose(b: Lowering, a: Args) -> Ref:
    if isinstance(a["condition"], Tracked):
        raise b.fail("a choice that depends on the input (torch.where)")
    mask = b.per_example_constant(a["condition"], b.size)
    parts = []
    for v, get in ((a["self"], mask), (a["other"], lambda: ~mask())):
        t = operand(b, v, b.size)
        t = t if isinstance(t, Ref) else fixed(b, without_infinities(t))
        parts.append(b.affine(t, get).index)
    return b.add(G.Sum(tuple(parts), per_example(b.size), b.where, signs=(1, 1)))


def masked_fill(b: Lowering, a: Args) -> Ref:
    if isinstance(a["mask"], Tracked):
        raise b.fail("a mask that depends on the input")
    mask, value = b.per_example_constant(a["mask"], b.size), a["value"]
    x = b.affine(b.expanded(a["self"], b.size), lambda: ~mask())
    if isinstance(value, Tracked):
        filled = b.affine(b.expanded(value, b.size), mask)
        return b.add(G.Sum((x.index, filled.index), b.shape(x), b.where, signs=(1, 1)))
    get = without_infinities(b.constant(value))
    return b.affine(x, None, lambda: mask() * (get() if callable(get) else float(get)))


def reduced(mean: bool) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        x = a["self"]
        same_kind(b, a)
        dims = a.get("dim")
        dims = (
            list(range(len(x.size))) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        )
        dims = sorted(d % len(x.size) + 1 for d in dims)
        size, out = x.size, per_example(b.size)
        kept = tuple(1 if d + 1 in dims else n for d, n in enumerate(size))
        k = math.prod(size[d - 1] for d in dims)
        inner = b.shape(x.ref)

        def function(t: Tensor) -> Tensor:
            t = t.reshape(len(t), *size)
            return (t.mean(dims) if mean else t.sum(dims)).reshape(len(t), *out)

        def adjoint(g: Tensor, like: Tensor) -> Tensor:
            g = g.reshape(len(g), *kept)
            return (g / k if mean else g).expand(len(g), *size).reshape(len(g), *inner)

        return b.linear(x.ref, function, out, k, adjoint)

    return handle


def same_kind(b: Lowering, a: Args) -> None:
    if a.get("dtype") not in (None, torch.float32, torch.float64):
        raise b.fail(f"a conversion to {a['dtype']}")
