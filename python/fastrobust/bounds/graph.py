"""The small graph that bounds are propagated over: nodes, each with its shape without the batch dimension.

Parameters are read when a node runs, not when it is built, so a traced graph stays right while its model trains.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.ops.bounds import product, spread

Shape = tuple[int, ...]
Getter = Callable[[], Any]  # a tensor or None, read when the node runs
Ends = tuple[Tensor, Tensor]


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

    def _extra(self, size_in: int, size_out: int, axis: int, kernel: int) -> int:
        return size_in - (
            (size_out - 1) * self.stride[axis] - 2 * self.padding[axis] + self.dilation[axis] * (kernel - 1) + 1
        )

    def transpose(self, a: Tensor, shapes: list[Shape]) -> list[Tensor]:
        w = self.get_weight()
        (_, h, width), (_, ho, wo) = shapes[0], self.shape
        if self.groups == 1 and self.dilation == (1, 1):
            return [spread(a, w, self.stride, self.padding, (h, width))]
        extra = (self._extra(h, ho, 0, w.shape[2]), self._extra(width, wo, 1, w.shape[3]))
        return [F.conv_transpose2d(a, w, None, self.stride, self.padding, extra, self.groups, self.dilation)]

    def transpose_window(self, a: Tensor) -> Tensor:
        """The adjoint on windows (N, O, ph, pw), without borders."""
        w = self.get_weight()
        if self.groups == 1 and self.dilation == (1, 1):
            size = [(n - 1) * s + k for n, s, k in zip(a.shape[2:], self.stride, w.shape[2:], strict=False)]
            return spread(a, w, self.stride, (0, 0), (size[0], size[1]))
        return F.conv_transpose2d(a, w, None, self.stride, 0, 0, self.groups, self.dilation)

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
        c = self._apply(0.5 * (l + u), w, self.get_bias())
        r = self._apply(0.5 * (u - l), w.abs())
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
    """A linear function with non-negative coefficients plus a constant: pooling by averages, permutation, slice, padding."""

    function: Callable[[Tensor], Tensor] = _nothing
    taps: int = 0  # terms of a sum; 0: values are only moved
    adjoint: Callable[[Tensor, Tensor], Tensor] | None = (
        None  # of (a, any tensor of the input's shape), where it is known
    )

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

    def pool(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)

    def interval(self, bounds: list[Ends]) -> Ends:
        return self.pool(bounds[0][0]), self.pool(bounds[0][1])


@dataclass(eq=False)
class Graph:
    nodes: list[Node]
    output: int
    result: Shape  # of one example of what the model returns; the output node holds single numbers as (1,)

    def __post_init__(self) -> None:
        for i, n in enumerate(self.nodes):
            n.index = i
            for j in n.inputs:
                self.nodes[j].consumers.append(i)
        self.chain: Any = False  # of fastrobust.bounds.intervals; False: not looked for yet
        self.plan: Any = False  # of fastrobust.bounds.margins
        self.staged: Any = False  # of fastrobust.bounds.stage_margins
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
