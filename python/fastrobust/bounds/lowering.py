"""From a Recording to a Graph: what each operation of torch becomes. Handlers get the operation's arguments by the names of its
schema, inputs that depend on x as ``Tracked`` and the others as ``Constant``."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust._record import Constant, Place, Read, Recording, Step, Value, inside, place_of, replaced
from fastrobust.bounds import graph as G
from fastrobust.bounds.builder import Builder, Ref, per_example

Args = dict[str, Any]


class Tracked:
    """A tensor that depends on the input: a node, and the tensor's size for a batch of one."""

    __slots__ = ("ref", "size")

    def __init__(self, ref: Ref, size: tuple[int, ...]):
        self.ref, self.size = ref, size


class Lowering(Builder):
    """``baked``: the graph holds values that this call computed, so that the next call needs a graph of its own."""

    def __init__(self, recording: Recording, shape: tuple[int, ...], fold: bool):
        super().__init__(shape, fold)
        self.recording, self.baked = recording, False
        self.refs: dict[Value, Ref] = {recording.input: Ref(0)}
        self.views: dict[tuple[Value, Place], Ref] = {}

    def build(self) -> G.Graph:
        out = self.recording.output
        if not isinstance(out, Read):
            kind = "a tensor that does not depend on the input" if isinstance(out, Constant) else type(self.recording.result).__name__  # fmt: skip
            raise ValueError(f"model: forward returns {kind}, expected one tensor that depends on the input")
        wanted, reads = {out.value}, {out.value: 1}
        needed: list[Step] = []
        for step in reversed(self.recording.steps):
            if any(v in wanted for v in step.results if v is not None):
                needed.append(step)
                sources = {r.value for r in inside((step.args, step.kwargs)) if isinstance(r, Read)}
                wanted |= sources
                for v in sources:
                    reads[v] = reads.get(v, 0) + 1
        self.reads = reads
        for step in reversed(needed):
            self.where, self.line = step.where, step.line
            self._lower(step)
        self.where = "output"
        return G.Graph(self.nodes, self.read(out).ref.index)

    def _lower(self, step: Step) -> None:
        if step.name == "overlay":
            result = step.results[0]
            assert result is not None
            self.refs[result] = self._overlay(*step.args)
            return
        if step.name == "leaf":
            raise self.fail(type(step.func).__name__)
        handler = HANDLERS.get(step.name)
        if handler is None:
            own = step.module is not None and type(step.module).__module__.startswith("torch.nn.")
            raise self.fail(type(step.module).__name__ if own else f"operation {step.name}")
        names = [a.name for a in step.func._schema.arguments]
        given = {a.name: a.default_value for a in step.func._schema.arguments}
        given.update(zip(names, step.args, strict=False))
        given.update(step.kwargs)
        args = {k: replaced(v, lambda t: self.read(t) if isinstance(t, Read) else t) for k, v in given.items()}
        args["step"] = step
        first = step.results[0]
        assert first is not None
        self.size = first.place.size
        out = handler(self, args)
        if self.shape(out) != per_example(self.size):
            raise self.fail(f"operation {step.name}", f" from shape to shape {self.size}")
        self.refs[first] = out
        if self.reads.get(first, 0) == 1:
            self.single.add(out.index)

    # -- where tensors lie ---------------------------------------------------------------------------------------------
    def read(self, r: Read) -> Tracked:
        v, place = r
        if v not in self.refs:
            raise self.fail("a second result of an operation (the places of a maximum, saved statistics)")
        base = self.refs[v]
        if place == v.place:
            return Tracked(base, place.size)
        if r not in self.views:
            span = max(1, int(v.place.positions().max()) + 1 if v.place.numel else 1)
            logical = torch.full((span,), -1)
            logical[v.place.positions().flatten()] = torch.arange(v.place.numel)
            wanted = place.positions().flatten()
            if place.numel and (wanted.max() >= span or wanted.min() < 0 or (logical[wanted] < 0).any()):
                raise self.fail("a view that reaches beyond what an operation wrote")
            self.views[r] = self.pick(base, logical[wanted], per_example(place.size), _permutation(v.place, place))
        return Tracked(self.views[r], place.size)

    def _overlay(self, old: Read | Constant, new: Read, known: Place) -> Ref:
        span = int(known.positions().max()) + 1
        at = torch.full((span,), -1)
        at[known.positions().flatten()] = torch.arange(known.numel)
        where = at[new.place.positions().flatten()]
        patch = self.read(Read(new.value, new.value.place))
        source, shape = torch.full((known.numel,), -1), per_example(known.size)
        if isinstance(old, Read):
            base = self.read(Read(old.value, old.value.place))
            order = torch.arange(known.numel)
            order[where] = known.numel + torch.arange(len(where))
            both = self.add(
                G.Concat(
                    (self.flat(base.ref).index, self.flat(patch.ref).index), (known.numel + len(where),), self.where
                )
            )
            return self.pick(both, order, shape)
        source[where] = torch.arange(len(where))
        out = self.pick(patch.ref, source, shape)
        rest = old.tensor.clone()
        rest[where] = 0
        return self.affine(out, None, self.constant(Constant(rest.view(shape), None)))

    def flat(self, x: Ref) -> Ref:
        return self.to_shape(x, (self.nodes[x.index].size,))

    def full(self, x: Tracked) -> Ref:
        """With the dimension of the batch, where it has one, as a dimension of the example."""
        return self.to_shape(x.ref, x.size)

    def moved(self, x: Tracked, f: Callable[[Tensor], Tensor]) -> Tracked:
        """What f, which only moves numbers and fills in zeros, makes of x; f takes tensors of x's size."""
        n = math.prod(x.size)
        out = f(torch.arange(1, n + 1, dtype=torch.float64).view(x.size))
        return Tracked(self.pick(x.ref, out.flatten().long() - 1, per_example(tuple(out.shape))), tuple(out.shape))

    def expanded(self, x: Tracked, size: tuple[int, ...]) -> Ref:
        return x.ref if x.size == size else self.moved(x, lambda t: t.expand(size)).ref if math.prod(x.size) != math.prod(size) else self.to_shape(x.ref, per_example(size))  # noqa: E501  # fmt: skip

    # -- constants -----------------------------------------------------------------------------------------------------
    def constant(self, c: Any) -> Any:
        """A getter of the tensor, read anew from the module at every call; a number stays one."""
        if not isinstance(c, Constant):
            return c
        t, base = c
        if base is None:
            self.baked = True
            return lambda: t
        if base is t or tuple(base.shape) == tuple(t.shape) and place_of(base) == place_of(t):
            return lambda: base
        size = tuple(t.shape)
        if base.dim() == 2 and place_of(base.t()) == place_of(t):
            return lambda: base.t()
        if t.is_contiguous() and base.is_contiguous() and t.numel() == base.numel():
            return lambda: base.reshape(size)
        self.baked = True
        return lambda: t

    def matrix(self, c: Constant, transposed: bool) -> G.Getter:
        """A (K, M) matrix, or its transpose; the parameter itself where it is that."""
        get = self.constant(c)
        if not transposed:
            return get
        base = c.base
        if base is not None and base.dim() == 2 and place_of(base.t()) == place_of(c.tensor):
            return lambda: base
        return lambda: get().t()

    def per_example_constant(self, c: Any, size: tuple[int, ...]) -> Any:
        """A constant that meets a tensor of ``size``, broadcastable to one example of it."""
        if not isinstance(c, Constant):
            return c
        if c.tensor.is_complex():
            raise self.fail("a complex constant")
        get = self.constant(c)
        t = c.tensor
        if size and size[0] == 1 and t.dim() == len(size) and t.dim() > 0:
            return lambda: get().squeeze(0)
        return get


def _permutation(a: Place, b: Place) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """(sizes, dims): b is a's elements, viewed as sizes and permuted; None where it is not that."""
    if a.offset != b.offset or a.numel != b.numel or not (a.dense() and b.dense()):
        return None
    if a.order() != sorted(a.order()):  # a itself lies in another order: only its own dimensions moved
        if sorted(zip(a.stride, a.size, strict=True)) != sorted(zip(b.stride, b.size, strict=True)):
            return None
        own = [d for d in range(len(a.size)) if a.size[d] > 1]
        strides = {a.stride[d]: i for i, d in enumerate(own)}
        return tuple(a.size[d] for d in own), tuple(strides[s] for s, n in zip(b.stride, b.size, strict=True) if n > 1)
    order = b.order()
    place = {d: i for i, d in enumerate(order)}
    return tuple(b.size[d] for d in order), tuple(place[d] for d in range(len(b.size)) if b.size[d] > 1)


# -- handlers ----------------------------------------------------------------------------------------------------------------
def _operand(b: Lowering, v: Any, size: tuple[int, ...]) -> Any:
    """A Ref of ``size``, a number, or a getter."""
    if isinstance(v, Tracked):
        return b.expanded(v, size)
    return b.per_example_constant(v, size)


def _scaled(b: Lowering, v: Any, k: float) -> Any:
    if k == 1:
        return v
    if isinstance(v, Ref):
        return b.affine(v, float(k))
    return (lambda: v() * k) if callable(v) else v * k


def _sum(sign: int, swapped: bool = False) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        x, y = (a["other"], a["self"]) if swapped else (a["self"], a["other"])
        first, second = _operand(b, x, b.size), _operand(b, y, b.size)
        alpha = float(a.get("alpha", 1))
        second = _scaled(b, second, alpha)
        if isinstance(first, Ref) and isinstance(second, Ref):
            return b.add(G.Sum((first.index, second.index), b.shape(first), b.where, signs=(1, sign)))
        if isinstance(first, Ref):
            return b.affine(first, None, _scaled(b, second, sign))
        return b.affine(second, None if sign > 0 else -1.0, first)

    return handle


def _mul(b: Lowering, a: Args) -> Ref:
    x, y = _operand(b, a["self"], b.size), _operand(b, a["other"], b.size)
    if isinstance(x, Ref) and isinstance(y, Ref):
        raise b.fail("a product of two tensors that depend on the input")
    return b.affine(x, y) if isinstance(x, Ref) else b.affine(y, x)


def _div(b: Lowering, a: Args) -> Ref:
    if a.get("rounding_mode") is not None:
        raise b.fail("a division with rounding")
    x, y = _operand(b, a["self"], b.size), _operand(b, a["other"], b.size)
    if isinstance(y, Ref):
        raise b.fail("a division by a tensor that depends on the input")
    return b.affine(x, (lambda: y().double().reciprocal()) if callable(y) else 1.0 / float(y))


def _activation(name: str, *parameters: str) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        return b.activation(a["self"].ref, name, tuple(float(a[p]) for p in parameters))

    return handle


def _elu(b: Lowering, a: Args) -> Ref:
    alpha, scale, inner = (float(a.get(k, 1)) for k in ("alpha", "scale", "input_scale"))
    x = a["self"].ref if inner == 1 else b.affine(a["self"].ref, inner)
    y = b.activation(x, "elu", (alpha,))
    return y if scale == 1 else b.affine(y, scale)


def _celu(b: Lowering, a: Args) -> Ref:
    alpha = float(a["alpha"])
    if not alpha > 0:
        raise b.fail("celu", f" (alpha must be positive, got {alpha})")
    return b.affine(b.activation(b.affine(a["self"].ref, 1 / alpha), "elu", (1.0,)), alpha)


def _hardsigmoid(b: Lowering, a: Args) -> Ref:
    return b.affine(b.activation(b.affine(a["self"].ref, None, 3.0), "relu6"), 1.0 / 6.0)


def _rectified(b: Lowering, x: Ref, low: Any, sign: int = 1) -> Ref:
    """max(x, low), or min(x, low) with sign -1, of a number, a getter or a Ref: low + sign relu(sign (x - low))."""
    if isinstance(low, Ref):
        inner: Ref = b.add(G.Sum((x.index, low.index), b.shape(x), b.where, signs=(sign, -sign)))
    else:
        still = not callable(low) and float(low) == 0.0
        if still and sign > 0:
            return b.activation(x, "relu")
        inner = b.affine(x, None if sign > 0 else -1.0, _scaled(b, low, -sign))
    y = b.activation(inner, "relu")
    if isinstance(low, Ref):
        return b.add(G.Sum((low.index, y.index), b.shape(x), b.where, signs=(1, sign)))
    return b.affine(y, None if sign > 0 else -1.0, low)


def _clamp(b: Lowering, a: Args) -> Ref:
    low, high = a.get("min"), a.get("max")
    numbers = all(not isinstance(v, (Tracked, Constant)) for v in (low, high))
    x = b.expanded(a["self"], b.size)
    if low is not None and high is not None and numbers:
        return b.activation(x, "hardtanh", (float(low), float(high)))
    if low is not None:
        x = _rectified(b, x, _operand(b, low, b.size))
    return x if high is None else _rectified(b, x, _operand(b, high, b.size), -1)


def _extreme(sign: int) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        x, y = _operand(b, a["self"], b.size), _operand(b, a["other"], b.size)
        return _rectified(b, x, y, sign) if isinstance(x, Ref) else _rectified(b, y, x, sign)

    return handle


def _abs(b: Lowering, a: Args) -> Ref:
    x = a["self"].ref
    parts = (b.activation(x, "relu").index, b.activation(b.affine(x, -1.0), "relu").index)
    return b.add(G.Sum(parts, b.shape(x), b.where, signs=(1, 1)))


def _prelu(b: Lowering, a: Args) -> Ref:
    x = b.expanded(a["self"], b.size)
    slope = _operand(b, a["weight"], b.size)
    if isinstance(slope, Ref):
        raise b.fail("a slope that depends on the input")
    below = b.affine(b.activation(b.affine(x, -1.0), "relu"), slope)
    return b.add(G.Sum((b.activation(x, "relu").index, below.index), b.shape(x), b.where, signs=(1, -1)))


def _threshold(b: Lowering, a: Args) -> Ref:
    if float(a["threshold"]) != 0 or float(a["value"]) != 0:
        raise b.fail("threshold", f" (which jumps from {a['value']} to {a['threshold']})")
    return b.activation(a["self"].ref, "relu")


def _rrelu(b: Lowering, a: Args) -> Ref:
    return b.activation(a["self"].ref, "leaky_relu", ((float(a["lower"]) + float(a["upper"])) / 2,))


def _same(b: Lowering, a: Args) -> Ref:
    dtype = a.get("dtype")
    if dtype is not None and dtype not in (torch.float32, torch.float64):
        raise b.fail(f"a conversion to {dtype}")
    return b.to_shape(a["self"].ref, per_example(b.size))


def _copy(b: Lowering, a: Args) -> Ref:
    if isinstance(a["src"], Tracked):
        return b.expanded(a["src"], b.size)
    return _fixed(b, b.per_example_constant(a["src"], b.size))


def _fixed(b: Lowering, value: Any) -> Ref:
    """A node that does not depend on the input: no coefficient, all shift."""
    shape = per_example(b.size)
    none = b.pick(Ref(0), torch.full((math.prod(shape),), -1), shape)
    return b.affine(none, None, value)


def _fill(b: Lowering, a: Args) -> Ref:
    if isinstance(a.get("value"), Tracked):
        return b.expanded(a["value"], b.size)
    return _fixed(b, b.per_example_constant(a.get("value", 0.0), b.size))


def _where(b: Lowering, a: Args) -> Ref:
    if isinstance(a["condition"], Tracked):
        raise b.fail("a choice that depends on the input (torch.where)")
    mask = b.per_example_constant(a["condition"], b.size)
    parts = []
    for v, get in ((a["self"], mask), (a["other"], lambda: ~mask())):
        t = _operand(b, v, b.size)
        t = t if isinstance(t, Ref) else _fixed(b, t)
        parts.append(b.affine(t, get).index)
    return b.add(G.Sum(tuple(parts), per_example(b.size), b.where, signs=(1, 1)))


def _masked_fill(b: Lowering, a: Args) -> Ref:
    if isinstance(a["mask"], Tracked):
        raise b.fail("a mask that depends on the input")
    mask, value = b.per_example_constant(a["mask"], b.size), a["value"]
    x = b.affine(b.expanded(a["self"], b.size), lambda: ~mask())
    if isinstance(value, Tracked):
        filled = b.affine(b.expanded(value, b.size), mask)
        return b.add(G.Sum((x.index, filled.index), b.shape(x), b.where, signs=(1, 1)))
    get = b.constant(value)
    return b.affine(x, None, lambda: mask() * (get() if callable(get) else float(get)))


def _reduced(mean: bool) -> Callable[[Lowering, Args], Ref]:
    def handle(b: Lowering, a: Args) -> Ref:
        x = a["self"]
        _same_kind(b, a)
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


def _same_kind(b: Lowering, a: Args) -> None:
    if a.get("dtype") not in (None, torch.float32, torch.float64):
        raise b.fail(f"a conversion to {a['dtype']}")


def _matmul(b: Lowering, x: Any, y: Any, size: tuple[int, ...]) -> Ref:
    """The product of two matrices, one of which is constant."""
    if isinstance(x, Tracked) and isinstance(y, Tracked):
        raise b.fail("a product of two tensors that depend on the input")
    if isinstance(x, Tracked):
        n, k = x.size
        return b.dense(b.to_shape(x.ref, (k,) if n == 1 else (n, k)), b.matrix(y, True), lambda: None)
    turned = b.moved(y, lambda t: t.t())
    out = Tracked(
        _matmul(b, turned, Constant(x.tensor.t(), None) if x.base is None else _turned(x), size[::-1]), size[::-1]
    )
    return b.moved(out, lambda t: t.t()).ref


def _turned(c: Constant) -> Constant:
    return Constant(c.tensor.t(), c.base)


def _with_bias(b: Lowering, y: Ref, a: Args, key: str = "self") -> Ref:
    """alpha y + beta bias."""
    alpha, beta = float(a.get("alpha", 1)), float(a.get("beta", 1))
    y = y if alpha == 1 else b.affine(y, alpha)
    bias = a[key]
    if isinstance(bias, Tracked):
        other = _scaled(b, b.expanded(bias, b.size), beta)
        return b.add(G.Sum((y.index, other.index), b.shape(y), b.where, signs=(1, 1)))
    get = b.constant(bias)
    node = b.nodes[y.index]
    if (
        isinstance(node, G.Dense)
        and alpha == 1
        and beta == 1
        and bias.tensor.dim() == 1
        and y.index == len(b.nodes) - 1
    ):
        node.get_bias = get
        return y
    return b.affine(y, None, _scaled(b, b.per_example_constant(bias, b.size), beta))


def _addmm(b: Lowering, a: Args) -> Ref:
    return _with_bias(b, b.to_shape(_matmul(b, a["mat1"], a["mat2"], b.size), per_example(b.size)), a)


def _mv(b: Lowering, a: Args) -> Ref:
    x, y = a.get("self"), a.get("vec", a.get("tensor"))
    if "mat" in a:
        x = a["mat"]
    column = lambda v, shape: Tracked(b.to_shape(v.ref, shape if shape[0] != 1 else shape[1:]), shape) if isinstance(v, Tracked) else Constant(v.tensor.view(shape), v.base)  # noqa: E731, E501  # fmt: skip
    k = (y.size if isinstance(y, Tracked) else tuple(y.tensor.shape))[0]
    first = x.size if isinstance(x, Tracked) else tuple(x.tensor.shape)
    left = column(x, (1, k)) if len(first) == 1 else x
    rows = 1 if len(first) == 1 else first[0]
    out = b.to_shape(_matmul(b, left, column(y, (k, 1)), (rows, 1)), per_example(b.size))
    return _with_bias(b, out, a) if "mat" in a else out


def _bmm(b: Lowering, a: Args) -> Ref:
    x, y = a.get("batch1", a.get("self")), a.get("batch2", a.get("mat2"))
    if isinstance(x, Tracked) and isinstance(y, Tracked):
        raise b.fail("a product of two tensors that depend on the input")
    c = y if isinstance(x, Tracked) else x
    count, size = c.tensor.shape[0], b.size
    if isinstance(x, Tracked) and (count == 1 or c.tensor.stride(0) == 0):
        rows = (x.size[0] * x.size[1], x.size[2])
        flat = Tracked(b.to_shape(x.ref, rows if rows[0] != 1 else rows[1:]), rows)
        shared = Constant(c.tensor[0], c.base)
        out = b.to_shape(_matmul(b, flat, shared, (rows[0], size[2])), per_example(size))
    elif count > 256:
        raise b.fail(f"a product with {count} different matrices")
    else:
        parts = []
        for i in range(count):
            one = [b.moved(v, lambda t, i=i: t[i]) if isinstance(v, Tracked) else Constant(v.tensor[i], v.base) for v in (x, y)]  # fmt: skip
            parts.append(b.flat(_matmul(b, one[0], one[1], size[1:])).index)
        n = size[1] * size[2]
        joined = b.add(G.Concat(tuple(parts), (n * count,), b.where)) if count > 1 else Ref(parts[0])
        out = b.to_shape(joined, per_example(size))
    return _with_bias(b, out, a) if "batch1" in a else out


def _linear(b: Lowering, a: Args) -> Ref:
    if isinstance(a["weight"], Tracked):
        raise b.fail("a product of two tensors that depend on the input")
    bias = a.get("bias")
    return b.dense(a["input"].ref, b.constant(a["weight"]), lambda: None if bias is None else b.constant(bias)())


def _convolution(b: Lowering, a: Args) -> Ref:
    x, w, bias = a["input"], a["weight"], a.get("bias")
    if any(isinstance(v, Tracked) for v in (w, bias)) or not isinstance(x, Tracked):
        raise b.fail("a convolution whose weight depends on the input")
    spatial = len(x.size) - 2
    if spatial > 2:
        return _by_matrix(b, a)
    n, groups = x.size[0], a["groups"]
    get_w, get_b = b.constant(w), b.constant(bias) if bias is not None else (lambda: None)
    ref = x.ref
    if n > 1:  # a batch within the example: one group of channels each
        ref, inner, inner_b = b.to_shape(x.ref, (n * x.size[1], *x.size[2:])), get_w, get_b
        get_w = lambda: inner().repeat(n, *[1] * (spatial + 1))  # noqa: E731
        get_b = lambda: None if inner_b() is None else inner_b().repeat(n)  # noqa: E731
        groups *= n
    if a["transposed"]:
        out = b.conv_transpose(ref, get_w, get_b, tuple(a["stride"]), tuple(a["padding"]), tuple(a["output_padding"]), groups, tuple(a["dilation"]), spatial == 1)  # noqa: E501  # fmt: skip
    else:
        out = b.conv(
            ref, get_w, get_b, tuple(a["stride"]), tuple(a["padding"]), tuple(a["dilation"]), groups, spatial == 1
        )
    return b.to_shape(out, per_example(b.size))


def _batch_norm(b: Lowering, a: Args) -> Ref:
    if a.get("training") or a.get("running_mean") is None:
        raise ValueError(f"model: BatchNorm at '{b.where}' is in training mode or has no running statistics; call model.eval() first")  # fmt: skip
    get = lambda key: None if a.get(key) is None else b.constant(a[key])  # noqa: E731
    parts = SimpleNamespace(mean=get("running_mean"), var=get("running_var"), weight=get("weight"), bias=get("bias"))
    return b.batch_norm(a["input"].ref, parts, float(a.get("eps", a.get("epsilon", 1e-5))), len(a["input"].size) - 2)


def _maps(b: Lowering, x: Tracked, dims: int = 2) -> Ref:
    """As (channels, *map), whatever comes before the map as channels."""
    return b.to_shape(x.ref, (math.prod(x.size[:-dims]), *x.size[-dims:]))


def _avg_pool2d(b: Lowering, a: Args) -> Ref:
    args = tuple(
        a[k] for k in ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
    )
    args = (args[0], args[1] or None, *args[2:])
    return b.to_shape(b.avg_pool(_maps(b, a["self"]), args, F.avg_pool2d), per_example(b.size))


def _adaptive_avg_pool2d(b: Lowering, a: Args) -> Ref:
    return b.to_shape(b.avg_pool(_maps(b, a["self"]), (tuple(a["output_size"]),), F.adaptive_avg_pool2d), per_example(b.size))  # fmt: skip


def _max_pool2d(b: Lowering, a: Args) -> Ref:
    keys = ("kernel_size", "stride", "padding", "dilation")
    kernel, stride, padding, dilation = (tuple(a[k]) if a[k] else None for k in keys)
    return b.to_shape(b.max_pool(_maps(b, a["self"]), kernel, stride or kernel, padding or (0, 0), dilation or (1, 1), a["ceil_mode"]), per_example(b.size))  # noqa: E501  # fmt: skip


def _adaptive_max_pool2d(b: Lowering, a: Args) -> Ref:
    x, out = a["self"], tuple(a["output_size"])
    if any(n % m for n, m in zip(x.size[-2:], out, strict=True)):
        raise b.fail("adaptive max pooling", f" of maps {x.size[-2:]} to {out}: windows of different sizes")
    kernel = tuple(n // m for n, m in zip(x.size[-2:], out, strict=True))
    return b.to_shape(b.max_pool(_maps(b, x), kernel, kernel, (0, 0), (1, 1), False), per_example(b.size))


def _extreme_of(sign: int) -> Callable[[Lowering, Args], Ref]:
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


def _cat(b: Lowering, a: Args) -> Ref:
    tensors, dim = list(a["tensors"]), a.get("dim", 0)
    stacked = a["step"].name == "stack"
    n = len(b.size)
    dim %= n
    parts: list[Ref] = []
    lead = dim > 0 and b.size[0] == 1
    for t in tensors:
        size = t.size if isinstance(t, Tracked) else tuple(t.tensor.shape)
        if stacked:
            size = (*size[:dim], 1, *size[dim:])
        if 0 in size:
            continue
        if isinstance(t, Tracked):
            parts.append(b.to_shape(t.ref, size[1:] if lead else size))
            continue
        inner, b.size = b.size, size
        get, own = b.constant(t), per_example(size)
        parts.append(b.to_shape(_fixed(b, lambda g=get, s=own: g().reshape(s)), size[1:] if lead else size))
        b.size = inner
    shape = b.size[1:] if lead else b.size
    if len(parts) == 1:
        return b.to_shape(parts[0], per_example(b.size))
    joined = b.add(G.Concat(tuple(p.index for p in parts), shape, b.where, dim=dim - 1 if lead else dim))
    return b.to_shape(joined, per_example(b.size))


def _moved(b: Lowering, a: Args) -> Ref:
    """Operations that move numbers, and fill in a constant: run once on the positions themselves."""
    step: Step = a["step"]
    tracked = [v for v in a.values() if isinstance(v, Tracked)]
    if len(tracked) != 1 or not isinstance(a.get("self", a.get("input")), Tracked):
        raise b.fail(f"operation {step.name}", " with places that depend on the input")
    x = tracked[0]
    if any(isinstance(v, Constant) for v in inside((step.args, step.kwargs))):
        b.baked = True  # the places are numbers of this call

    def run(t: Tensor) -> Tensor:
        put = lambda v: v.tensor.cpu() if isinstance(v, Constant) else t  # noqa: E731
        out: Tensor = step.func(*replaced(step.args, put), **replaced(step.kwargs, put))
        return out

    zero = run(torch.zeros(x.size, dtype=torch.float64))
    out = b.moved(x, lambda t: run(t) - zero)
    if not zero.any():
        return out.ref
    shift = zero.reshape(per_example(b.size)).float()
    return b.affine(out.ref, None, lambda: shift)


def _interpolated(b: Lowering, a: Args) -> Ref:
    """Interpolations with weights that are not negative, map by map."""
    step: Step = a["step"]
    dims = 1 if "1d" in step.name else 2
    x = _maps(b, a["self"], dims)
    out = per_example(b.size)

    def function(t: Tensor) -> Tensor:
        return step.func(t, *step.args[1:], **step.kwargs)  # type: ignore[no-any-return]

    shape = tuple(function(torch.empty(1, *b.shape(x), device="meta")).shape[1:])
    return b.to_shape(b.linear(x, function, shape, b.nodes[x.index].size), out)


def _by_matrix(b: Lowering, a: Args) -> Ref:
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

    def matrix() -> Tensor:
        unit = torch.eye(n, dtype=like().dtype, device=like().device).view(n, *x.size[1:])
        return (run(unit) - run(torch.zeros_like(unit[:1]))).t()

    bias = lambda: run(torch.zeros(1, *x.size[1:], dtype=like().dtype, device=like().device))[0]  # noqa: E731
    return b.to_shape(b.dense(b.flat(x.ref), matrix, bias), per_example(b.size))


_MOVING = (
    "flip", "roll", "rot90", "repeat", "index_select", "gather", "take", "index", "_unsafe_index", "constant_pad_nd", "reflection_pad1d",
    "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d", "replication_pad3d", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "upsample_nearest1d", "upsample_nearest2d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "im2col", "tril", "triu", "repeat_interleave", "diag_embed", "unfold_copy",
    "permute_copy", "slice_copy", "expand_copy", "view_copy", "narrow_copy", "select_copy", "t_copy", "transpose_copy", "squeeze_copy",
    "unsqueeze_copy", "as_strided_copy", "alias_copy", "detach_copy", "diagonal_copy",
)  # fmt: skip
HANDLERS: dict[str, Callable[[Lowering, Args], Ref]] = {
    "add": _sum(1), "sub": _sum(-1), "subtract": _sum(-1), "rsub": _sum(-1, swapped=True), "mul": _mul, "multiply": _mul,
    "div": _div, "divide": _div, "true_divide": _div, "neg": lambda b, a: b.affine(a["self"].ref, -1.0),
    "relu": _activation("relu"), "leaky_relu": _activation("leaky_relu", "negative_slope"),
    "hardtanh": _activation("hardtanh", "min_val", "max_val"), "relu6": _activation("relu6"), "sigmoid": _activation("sigmoid"),
    "tanh": _activation("tanh"), "atan": _activation("arctan"), "arctan": _activation("arctan"),
    "softplus": _activation("softplus", "beta", "threshold"), "silu": _activation("silu"), "elu": _elu, "celu": _celu,
    "gelu": lambda b, a: b.activation(a["self"].ref, "gelu_tanh" if a["approximate"] == "tanh" else "gelu"),
    "hardsigmoid": _hardsigmoid, "_prelu_kernel": _prelu, "prelu": _prelu, "threshold": _threshold, "rrelu_with_noise": _rrelu,
    "clamp": _clamp, "clip": _clamp, "clamp_min": _clamp, "clamp_max": _clamp, "maximum": _extreme(1), "minimum": _extreme(-1),
    "abs": _abs, "absolute": _abs, "where": _where, "masked_fill": _masked_fill,
    "clone": _same, "contiguous": _same, "_unsafe_view": _same, "_to_copy": _same, "alias": _same, "detach": _same, "to": _same,
    "lift_fresh": _same, "view": _same, "reshape": _same, "_reshape_copy": _same, "positive": _same, "native_dropout": lambda b, a: a["input"].ref,
    "copy": _copy, "fill": _fill, "zero": _fill, "mean": _reduced(True), "sum": _reduced(False),
    "mm": lambda b, a: b.to_shape(_matmul(b, a["self"], a["mat2"], b.size), per_example(b.size)), "addmm": _addmm, "bmm": _bmm,
    "baddbmm": _bmm, "mv": _mv, "addmv": _mv, "dot": _mv, "linear": _linear, "convolution": _convolution,
    "native_batch_norm": _batch_norm, "_native_batch_norm_legit_no_training": _batch_norm, "_native_batch_norm_legit": _batch_norm,
    "cudnn_batch_norm": _batch_norm, "miopen_batch_norm": _batch_norm, "_batch_norm_no_update": _batch_norm,
    "avg_pool2d": _avg_pool2d, "_adaptive_avg_pool2d": _adaptive_avg_pool2d, "max_pool2d_with_indices": _max_pool2d,
    "max_pool2d": _max_pool2d, "adaptive_max_pool2d": _adaptive_max_pool2d, "amax": _extreme_of(1), "amin": _extreme_of(-1),
    "max": lambda b, a: (_extreme(1) if "other" in a else _extreme_of(1))(b, a),
    "min": lambda b, a: (_extreme(-1) if "other" in a else _extreme_of(-1))(b, a),
    "cat": _cat, "stack": _cat, "upsample_linear1d": _interpolated, "upsample_bilinear2d": _interpolated,
    **dict.fromkeys(_MOVING, _moved),
    **dict.fromkeys(("cumsum", "upsample_bicubic2d", "upsample_trilinear3d", "avg_pool3d", "_adaptive_avg_pool3d", "col2im"), _by_matrix),
}  # fmt: skip
