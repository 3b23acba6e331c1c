"""What products, convolutions, normalisations and pooling become in a graph."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust._places import Constant, Read, inside, replaced
from fastrobust._record import Step
from fastrobust.bounds import graph as G
from fastrobust.bounds import products as P
from fastrobust.bounds.builder import Ref, Tracked, per_example
from fastrobust.bounds.elementwise import scaled

if TYPE_CHECKING:
    from fastrobust.bounds.lowering import Lowering

Args = dict[str, Any]


def matmul(b: Lowering, x: Any, y: Any, size: tuple[int, ...]) -> Ref:
    """The product of two matrices."""
    if isinstance(x, Tracked) and isinstance(y, Tracked):
        return P.matrices(b, x, y)
    if isinstance(x, Tracked):
        n, k = x.size
        return b.dense(b.to_shape(x.ref, (k,) if n == 1 else (n, k)), b.matrix(y, True), lambda: None)
    across = matmul(b, b.moved(y, lambda t: t.t()), Constant(x.tensor.t(), x.base), size[::-1])
    return b.moved(Tracked(across, size[::-1]), lambda t: t.t()).ref


def with_bias(b: Lowering, y: Ref, a: Args, key: str = "self") -> Ref:
    """alpha y + beta bias."""
    alpha, beta = float(a.get("alpha", 1)), float(a.get("beta", 1))
    y = y if alpha == 1 else b.affine(y, alpha)
    bias = a[key]
    if isinstance(bias, Tracked):
        other = scaled(b, b.expanded(bias, b.size), beta)
        return b.add(G.Sum((y.index, other.index), b.shape(y), b.where, signs=(1, 1)))
    get = b.constant(bias)
    node = b.nodes[y.index]
    last = y.index == len(b.nodes) - 1  # the product itself, which nothing else reads yet
    if isinstance(node, G.Dense) and last and alpha == beta == 1 and bias.tensor.dim() == 1:
        node.get_bias = get
        return y
    return b.affine(y, None, scaled(b, b.per_example_constant(bias, b.size), beta))


def addmm(b: Lowering, a: Args) -> Ref:
    return with_bias(b, b.to_shape(matmul(b, a["mat1"], a["mat2"], b.size), per_example(b.size)), a)


def mv(b: Lowering, a: Args) -> Ref:
    """A matrix or a row times a column: mv(self, vec), addmv(self, mat, vec), dot(self, tensor)."""
    x: Any = a["mat"] if "mat" in a else a["self"]
    y: Any = a["vec"] if "vec" in a else a["tensor"]

    def column(v: Any, shape: tuple[int, int]) -> Any:
        if isinstance(v, Tracked):
            return Tracked(b.to_shape(v.ref, per_example(shape)), shape)
        return Constant(v.tensor.view(shape), v.base)

    k = (y.size if isinstance(y, Tracked) else tuple(y.tensor.shape))[0]
    first = x.size if isinstance(x, Tracked) else tuple(x.tensor.shape)
    left = column(x, (1, k)) if len(first) == 1 else x
    rows = 1 if len(first) == 1 else first[0]
    out = b.to_shape(matmul(b, left, column(y, (k, 1)), (rows, 1)), per_example(b.size))
    return with_bias(b, out, a) if "mat" in a else out


def bmm(b: Lowering, a: Args) -> Ref:
    x: Any = a["batch1"] if "batch1" in a else a["self"]
    y: Any = a["batch2"] if "batch2" in a else a["mat2"]
    if isinstance(x, Tracked) and isinstance(y, Tracked):
        out = P.matrices(b, x, y)
        return with_bias(b, out, a) if "batch1" in a else out
    c = y if isinstance(x, Tracked) else x
    count, size = c.tensor.shape[0], b.size
    if isinstance(x, Tracked) and (count == 1 or c.tensor.stride(0) == 0):
        rows = (x.size[0] * x.size[1], x.size[2])
        flat = Tracked(b.to_shape(x.ref, per_example(rows)), rows)
        shared = Constant(c.tensor[0], c.base)
        out = b.to_shape(matmul(b, flat, shared, (rows[0], size[2])), per_example(size))
    elif count > 256:
        raise b.fail(f"a product with {count} different matrices")
    else:
        at = lambda v, i: (
            b.moved(v, operator.itemgetter(i)) if isinstance(v, Tracked) else Constant(v.tensor[i], v.base)
        )  # noqa: E731, E501
        parts = [b.flat(matmul(b, at(x, i), at(y, i), size[1:])).index for i in range(count)]
        n = size[1] * size[2]
        joined = b.add(G.Concat(tuple(parts), (n * count,), b.where)) if count > 1 else Ref(parts[0])
        out = b.to_shape(joined, per_example(size))
    return with_bias(b, out, a) if "batch1" in a else out


def linear(b: Lowering, a: Args) -> Ref:
    if isinstance(a["weight"], Tracked):
        raise b.fail("a linear layer whose weight depends on the input")
    bias = (lambda: None) if a.get("bias") is None else b.constant(a["bias"])
    return b.dense(a["input"].ref, b.constant(a["weight"]), bias)


def convolution(b: Lowering, a: Args) -> Ref:
    x, w, bias = a["input"], a["weight"], a.get("bias")
    if any(isinstance(v, Tracked) for v in (w, bias)) or not isinstance(x, Tracked):
        raise b.fail("a convolution whose weight depends on the input")
    spatial = len(x.size) - 2
    if spatial > 2:
        return by_matrix(b, a)
    n, groups = x.size[0], a["groups"]
    get_w, get_b = b.constant(w), None if bias is None else b.constant(bias)
    ref = x.ref
    if n > 1:  # a batch within the example: one group of channels each
        ref, groups = b.to_shape(x.ref, (n * x.size[1], *x.size[2:])), n * groups
        get_w, get_b = (None if g is None else _repeated(g, n) for g in (get_w, get_b))
    get_b = get_b or (lambda: None)
    each = lambda key: tuple(a[key]) * (spatial if len(a[key]) == 1 else 1)  # noqa: E731 -- one number stands for all
    stride, padding, dilation = each("stride"), each("padding"), each("dilation")
    if a["transposed"]:
        more = each("output_padding"), groups, dilation, spatial == 1
        out = b.conv_transpose(ref, get_w, get_b, stride, padding, *more)
    else:
        out = b.conv(ref, get_w, get_b, stride, padding, dilation, groups, spatial == 1)
    return b.to_shape(out, per_example(b.size))


def _repeated(get: G.Getter, n: int) -> G.Getter:
    """A parameter n times along its first dimension."""

    def repeated() -> Tensor:
        t: Tensor = get()
        return t.repeat(n, *[1] * (t.dim() - 1))

    return G.Derived(repeated)


def batch_norm(b: Lowering, a: Args) -> Ref:
    if a.get("running_mean") is None and (found := P.instance_norm(b, a)) is not None:
        return found
    if a.get("training") or a.get("running_mean") is None:
        raise ValueError(
            f"model: a normalisation at '{b.where}' is in training mode or has no running statistics; call "
            "model.eval() first"
        )
    get = lambda key: None if a.get(key) is None else b.constant(a[key])  # noqa: E731
    parts = SimpleNamespace(mean=get("running_mean"), var=get("running_var"), weight=get("weight"), bias=get("bias"))
    return b.batch_norm(
        a["input"].ref, parts, float(a["eps"] if "eps" in a else a["epsilon"]), len(a["input"].size) - 2
    )


def as_maps(b: Lowering, x: Tracked, dims: int = 2) -> Ref:
    """As (channels, *map), whatever comes before the map as channels."""
    return b.to_shape(x.ref, (math.prod(x.size[:-dims]), *x.size[-dims:]))


def avg_pool2d(b: Lowering, a: Args) -> Ref:
    args = tuple(
        a[k] for k in ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    )
    args = (args[0], args[1] or None, *args[2:])
    return b.to_shape(b.avg_pool(as_maps(b, a["self"]), args, F.avg_pool2d), per_example(b.size))


def adaptive_avg_pool2d(b: Lowering, a: Args) -> Ref:
    return b.to_shape(
        b.avg_pool(as_maps(b, a["self"]), (tuple(a["output_size"]),), F.adaptive_avg_pool2d), per_example(b.size)
    )


def max_pool2d(b: Lowering, a: Args) -> Ref:
    keys = ("kernel_size", "stride", "padding", "dilation")
    kernel, stride, padding, dilation = (tuple(a[k]) if a[k] else None for k in keys)
    return b.to_shape(
        b.max_pool(
            as_maps(b, a["self"]), kernel, stride or kernel, padding or (0, 0), dilation or (1, 1), a["ceil_mode"]
        ),
        per_example(b.size),
    )


def adaptive_max_pool2d(b: Lowering, a: Args) -> Ref:
    x, out = a["self"], tuple(a["output_size"])
    if any(n % m for n, m in zip(x.size[-2:], out, strict=True)):
        raise b.fail("adaptive max pooling", f" of maps {x.size[-2:]} to {out}: windows of different sizes")
    kernel = tuple(n // m for n, m in zip(x.size[-2:], out, strict=True))
    return b.to_shape(b.max_pool(as_maps(b, x), kernel, kernel, (0, 0), (1, 1), False), per_example(b.size))


def extreme_of(sign: int) -> Callable[[Lowering, Args], Ref]:
    """The largest (sign 1) or smallest over dimensions."""

    def handle(b: Lowering, a: Args) -> Ref:
        x, dims = a["self"], a.get("dim")
        n = len(x.size)
        dims = list(range(n)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else list(dims)
        dims = [d % n for d in dims]
        rest = [d for d in range(n) if d not in dims]
        k = math.prod(x.size[d] for d in dims)
        last = b.moved(x, lambda t: t.permute(*rest, *dims)) if rest + dims != list(range(n)) else x
        rows = b.to_shape(last.ref, (math.prod(x.size) // k, 1, k))
        y = b.max_pool(rows if sign > 0 else b.affine(rows, -1.0), (1, k), (1, k), (0, 0), (1, 1), False)
        return b.to_shape(y if sign > 0 else b.affine(y, -1.0), per_example(b.size))

    return handle


def by_matrix(b: Lowering, a: Args) -> Ref:
    """A linear operation that has no node of its own: its matrix, written out."""
    step: Step = a["step"]
    x = next(v for v in a.values() if isinstance(v, Tracked))
    n, m = math.prod(x.size), math.prod(b.size)
    if not isinstance(step.args[0], Read) or x.size[0] != 1 or n * m > 1 << 24:
        raise b.fail(f"operation {step.name}", f" on {n} numbers, as the matrix of {n} x {m} that it would be here")
    getters = {id(c): b.constant(c) for c in inside((step.args, step.kwargs)) if isinstance(c, Constant)}

    def run(t: Tensor) -> Tensor:
        put = lambda v: getters[id(v)]() if isinstance(v, Constant) else t  # noqa: E731
        given = replaced(step.args, put), replaced(step.kwargs, put)
        out: Tensor = step.func(*given[0], **given[1])
        return out.flatten(1)

    constants = [c for c in inside((step.args, step.kwargs)) if isinstance(c, Constant)]
    kind = constants[0].tensor if constants else torch.empty(0, dtype=step.args[0].value.dtype)

    def like() -> Tensor:
        return getters[id(constants[0])]() if constants else kind

    @G.Derived
    def matrix() -> Tensor:
        unit = torch.eye(n, dtype=like().dtype, device=like().device).view(n, *x.size[1:])
        return (run(unit) - run(torch.zeros_like(unit[:1]))).t()

    bias = lambda: run(torch.zeros(1, *x.size[1:], dtype=like().dtype, device=like().device))[0]  # noqa: E731
    return b.to_shape(b.dense(b.flat(x.ref), matrix, bias), per_example(b.size))
