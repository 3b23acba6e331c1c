"""The small graph that bounds are propagated over: nodes, each with its shape without the batch dimension.

Parameters are read when a node runs, not when it is built, so a traced graph stays right while its model trains.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.ops.bounds import PoolWindow, product, spread

Shape = tuple[int, ...]
Getter = Callable[[], Any]  # a tensor or None, read when the node runs
Ends = tuple[Tensor, Tensor]
MASKED = 1e30  # in place of infinite numbers, which only masks before a softmax are
F_ = TypeVar("F_", bound=Callable[..., Any])

_VALUES: ContextVar[dict[Any, tuple[bool, Any]] | None] = ContextVar("fastrobust_values", default=None)


def values_once(call: F_) -> F_:
    """Within one call of the function each ``Derived`` value is computed once; nothing is kept after it."""

    @functools.wraps(call)
    def run(*args: Any, **options: Any) -> Any:
        if _VALUES.get() is not None:
            return call(*args, **options)
        token = _VALUES.set({})
        try:
            return call(*args, **options)
        finally:
            _VALUES.reset(token)

    return cast(F_, run)


Pieces = Any  # a node, or (dimension, or places in one value, [(shape, Pieces), ...]) of values put together


class Derived:
    """A getter of a value that is computed from parameters; of one that autograd records, where it records."""

    __slots__ = ("compute",)

    def __init__(self, compute: Getter):
        self.compute = compute

    def __call__(self) -> Any:
        values = _VALUES.get()
        if values is None:
            return self.compute()
        records = torch.is_grad_enabled()
        recorded, value = values.get(self, (False, None))
        if value is None or (records and not recorded):
            value = self.compute()
            values[self] = records, value
        return value


def _nothing(*_: Any) -> Any:
    return None


def pair(v: Any) -> tuple[int, int]:
    return (v, v) if isinstance(v, int) else (tuple(v) if len(v) == 2 else (v[0], v[0]))


@dataclass(eq=False)
class Node:
    inputs: tuple[int, ...]
    shape: Shape
    where: str
    index: int = -1
    consumers: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n


@dataclass(eq=False)
class Input(Node):
    pass


@dataclass(eq=False)
class LinearNode(Node):
    """y = L(x_1, ..., x_m) + bias."""

    def bias(self) -> Tensor | None:
        """Broadcastable to (1, *shape), or None."""
        return None

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        """The adjoint of L on (N, *shape): one tensor (N, *input shape) per input."""
        raise NotImplementedError

    def interval(self, bounds: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(eq=False)
class Dense(LinearNode):
    get_weight: Getter = _nothing
    get_bias: Getter = _nothing

    def bias(self) -> Tensor | None:
        return self.get_bias()

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        return [product(a, self.get_weight()) if a.dim() == 2 else a @ self.get_weight()]


@dataclass(eq=False)
class Conv(LinearNode):
    """Two-dimensional convolution with zero padding."""

    get_weight: Getter = _nothing
    get_bias: Getter = _nothing
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def bias(self) -> Tensor | None:
        b = self.get_bias()
        return None if b is None else b.view(-1, 1, 1)

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        size = (shapes[0][1], shapes[0][2])
        return [spread(a, self.get_weight(), self.stride, self.padding, size, self.dilation, self.groups)]

    def transpose_window(self, a: Tensor) -> Tensor:
        """The adjoint on windows (N, O, ph, pw), without borders."""
        w = self.get_weight()
        height, width = (
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(a.shape[2:], self.stride, w.shape[2:], self.dilation, strict=True)
        )
        return spread(a, w, self.stride, (0, 0), (height, width), self.dilation, self.groups)

    def dense_kernel(self) -> Tensor:
        """The weight over all input channels: (O, C, kh, kw)."""
        w = self.get_weight()
        if self.groups == 1:
            return w
        per = w.shape[0] // self.groups
        parts = [
            F.pad(w[g * per : (g + 1) * per], (0, 0, 0, 0, g * w.shape[1], (self.groups - 1 - g) * w.shape[1]))
            for g in range(self.groups)
        ]
        return torch.cat(parts)


@dataclass(eq=False)
class AveragePool(Conv):
    """A convolution of every channel with equal weights, as torch's pooling computes it."""

    function: Callable[[Tensor], Tensor] = _nothing
    adjoint: Callable[[Tensor, Tensor], Tensor] = _nothing  # of (a, any tensor of the input's shape)

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        zero = torch.zeros((), dtype=a.dtype, device=a.device).expand(a.shape[0], *shapes[0])
        return [self.adjoint(a, zero)]


@dataclass(eq=False)
class ConvTranspose(LinearNode):
    get_weight: Getter = _nothing
    get_bias: Getter = _nothing
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    output_padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def bias(self) -> Tensor | None:
        b = self.get_bias()
        return None if b is None else b.view(-1, 1, 1)

    def _apply(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return F.conv_transpose2d(x, w, b, self.stride, self.padding, self.output_padding, self.groups, self.dilation)

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        out = F.conv2d(a, self.get_weight(), None, self.stride, self.padding, self.dilation, self.groups)
        return [out[..., : shapes[0][1], : shapes[0][2]]]

    def interval(self, bounds: list[Ends]) -> Ends:
        (l, u), w = bounds[0], self.get_weight()
        c = self._apply(0.5 * l + 0.5 * u, w, self.get_bias())  # halves first: the sum could overflow
        r = self._apply(0.5 * u - 0.5 * l, w.abs())
        return c - r, c + r


@dataclass(eq=False)
class Scale(LinearNode):
    """y = x * factor + shift, both constant per example and broadcastable to (1, *shape)."""

    get_factor: Getter = _nothing
    get_shift: Getter = _nothing
    get_shift_size: Getter | None = None  # |a| + |b| + ... of a shift a + b + ... that is itself computed

    def bias(self) -> Tensor | None:
        return self.get_shift()

    def shift_size(self) -> Tensor | None:
        s = self.get_shift() if self.get_shift_size is None else self.get_shift_size()
        return None if s is None else s.abs()

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        f = self.get_factor()
        return [a if f is None else a * f.to(a)]

    def interval(self, bounds: list[Ends]) -> Ends:
        l, u = bounds[0]
        f, s = self.get_factor(), self.get_shift()
        if f is not None:
            f = f.to(l)
            a, b = l * f, u * f
            l, u = torch.minimum(a, b), torch.maximum(a, b)
        return (l, u) if s is None else (l + s.to(l), u + s.to(l))


@dataclass(eq=False)
class Sum(LinearNode):
    """y = sum of signs[i] * x_i, equal shapes."""

    signs: tuple[int, ...] = ()

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        return [a if s > 0 else -a for s in self.signs]

    def interval(self, bounds: list[Ends]) -> Ends:
        ends = [(l, u) if s > 0 else (-u, -l) for s, (l, u) in zip(self.signs, bounds, strict=True)]
        low, up = ends[0]
        for l, u in ends[1:]:
            low, up = low + l, up + u
        return low, up


@dataclass(eq=False)
class Concat(LinearNode):
    dim: int = 0  # without the batch dimension

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        return list(torch.split(a, [s[self.dim] for s in shapes], dim=self.dim + 1))

    def interval(self, bounds: list[Ends]) -> Ends:
        return torch.cat([b[0] for b in bounds], self.dim + 1), torch.cat([b[1] for b in bounds], self.dim + 1)


@dataclass(eq=False)
class Reshape(LinearNode):
    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        return [a.reshape(a.shape[0], *shapes[0])]

    def interval(self, bounds: list[Ends]) -> Ends:
        l, u = bounds[0]
        return l.reshape(l.shape[0], *self.shape), u.reshape(u.shape[0], *self.shape)


@dataclass(eq=False)
class Monotone(LinearNode):
    """A linear function with non-negative coefficients plus a constant: pooling by averages, permutation, slice,
    padding."""

    function: Callable[[Tensor], Tensor] = _nothing
    taps: int = 0  # terms of a sum; 0: values are only moved
    adjoint: Callable[[Tensor, Tensor], Tensor] | None = (
        None  # of (a, any tensor of the input's shape), where it is known
    )
    places: Tensor | None = None  # where values are only moved: the flat place that each comes from, -1 of a zero
    window: tuple[Any, Any, Any, float] | None = None  # kernel, stride, padding and weight of equal windows of maps

    def bias(self) -> Tensor | None:
        return None

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        zero = torch.zeros((), dtype=a.dtype, device=a.device).expand(a.shape[0], *shapes[0])
        if self.adjoint is not None:
            return [self.adjoint(a, zero)]
        return [torch.func.vjp(self.function, zero)[1](a)[0]]

    def interval(self, bounds: list[Ends]) -> Ends:
        return self.function(bounds[0][0]), self.function(bounds[0][1])


@dataclass(eq=False)
class Activation(Node):
    activation: str = "relu"
    params: tuple[float, ...] = ()

    def unstable(self, l: Tensor, u: Tensor) -> Tensor:
        """Where the activation is not linear on [l, u], so that tighter bounds of its input help."""
        match self.activation:
            case "relu" | "leaky_relu":
                return (l < 0) & (u > 0)
            case "hardtanh" | "relu6":
                lo, hi = self.params if self.activation == "hardtanh" else (0.0, 6.0)
                return ~((u <= lo) | (l >= hi) | ((l >= lo) & (u <= hi)))
            case _:
                return u > l


@dataclass(eq=False)
class MaxPool(Node):
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    @property
    def window(self) -> PoolWindow:
        return PoolWindow(self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def interval(self, bounds: list[Ends]) -> Ends:
        return self.pool(bounds[0][0]), self.pool(bounds[0][1])


class Entry:
    """The first thing that a model does, where it only gives its input another shape and order: done to the input
    set."""

    def __init__(self, outer: Shape, inner: Shape, places: Tensor | None):
        self.outer, self.inner, self.places = outer, inner, places  # the place in the input of each number inside
        self.back = None if places is None else places.argsort()

    def __call__(self, t: Tensor) -> Tensor:
        """(N, *outer) as (N, *inner)."""
        t = t if self.places is None else t.flatten(1).index_select(1, self.places.to(t.device))
        return t.reshape(len(t), *self.inner)

    def region(self, x: Tensor, eps: Any, clip: Any) -> tuple[Tensor, Any, Any]:
        """x, eps and clip as ``Region`` takes them."""
        eps = self(eps) if isinstance(eps, Tensor) and eps.dim() > 1 else eps
        if clip is not None and isinstance(clip[0], Tensor):
            clip = tuple(self(torch.as_tensor(c).expand_as(x)) for c in clip)
        return self(x), eps, clip

    def restored(self, t: Tensor) -> Tensor:
        """(..., *inner) as (..., *outer)."""
        lead = t.shape[: t.dim() - len(self.inner)]
        t = t.reshape(*lead, -1)
        t = t if self.back is None else t.index_select(-1, self.back.to(t.device))
        return t.reshape(*lead, *self.outer)


@dataclass(eq=False)
class Graph:
    nodes: list[Node]
    output: int
    result: Shape  # of one example of what the model returns; the output node holds single numbers as (1,)
    # what each nonlinear layer of the model reads: its name, shape, and where it lies
    reads: list[tuple[str, Shape, Pieces]] | None = None
    entry: Entry | None = None
    log_softmax: bool = False  # of the output is what the model returns

    def __post_init__(self) -> None:
        for i, n in enumerate(self.nodes):
            n.index = i
            for j in n.inputs:
                self.nodes[j].consumers.append(i)
        self.chain: Any = False  # of fastrobust.bounds.intervals; False: not looked for yet
        self.staged: Any = False  # of fastrobust.bounds.stage_margins
        if self.reads is None:
            kinds = (Activation, MaxPool)
            found = [self.nodes[n.inputs[0]] for n in self.nodes if isinstance(n, kinds)]
            self.reads = [(b.where, b.shape, b.index) for b in found]
        self.ancestor_size: dict[int, int] = {}
        seen: list[set[int]] = []
        for i, n in enumerate(self.nodes):
            up = set().union(*(seen[j] for j in n.inputs)) | {i} if n.inputs else {i}
            seen.append(up)
            self.ancestor_size[i] = max(self.nodes[j].size for j in up)
        self.ancestors = seen

    def row_size(self, start: int) -> int:
        """Numbers in the largest row on the way from ``start`` to the input."""
        node = self.nodes[start]
        if not isinstance(node, Conv) or node.dilation != (1, 1):
            return self.ancestor_size[start]
        most, h, w = 1, 1, 1  # a window that grows layer by layer
        while node.inputs:
            before = self.nodes[node.inputs[0]]
            if isinstance(node, Conv):
                kh, kw = node.get_weight().shape[2:]
                h, w = (h - 1) * node.stride[0] + kh, (w - 1) * node.stride[1] + kw
            elif not isinstance(node, (Activation, Scale)):
                return self.ancestor_size[start]
            if len(before.shape) != 3 or h * w >= before.shape[1] * before.shape[2]:
                return self.ancestor_size[start]
            most = max(most, before.shape[0] * h * w)
            node = before
        return most

    def input_shapes(self, node: Node) -> list[Shape]:
        return [self.nodes[j].shape for j in node.inputs]
