"""What steps of a record become nodes of a region: masked layers with what follows them, and what lies between."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._places import Constant, Read, Value, inside, replaced
from .._record import Step
from ..ops.binary._activation import NONE, Act
from ..ops.binary._feature_maps import ConvGeometry
from ._functional import functional
from ._layers import Layer, Norm, Pool, as_maps, map_size
from ._nodes import Concat, MaxPool, Mean, Node, Torch, Unit, identity, ones

Number = Callable[[Read], int]  # of a value that a node reads


@dataclasses.dataclass(eq=False)
class Affine:
    """x alpha + beta per channel, of an operation with constants."""

    source: Read
    key: tuple[Any, ...]
    pair: Callable[[Pool], tuple[Any, Any]]  # tensors (C,), numbers, or None for 1 and 0

    @staticmethod
    def of(step: Step, uses: collections.Counter[int]) -> Affine | None:
        norm = Norm.of(step, uses)
        if norm is not None:
            return Affine(norm.source, ("norm", norm), norm.affine) if isinstance(norm.source, Read) else None
        if step.name not in ("add", "sub", "rsub", "mul", "div") or len(step.args) < 2 or step.kwargs:
            return None
        if len(step.args) > 2 and step.args[2] != 1 or step.results[0] is None:
            return None
        first, second = step.args[:2]
        read, other = (first, second) if isinstance(first, Read) else (second, first)
        size = step.results[0].place.size
        if not isinstance(read, Read) or read.shape != size or not _per_channel(other, size):
            return None
        swapped = read is second
        if step.name == "rsub":
            swapped = not swapped
        if step.name == "div" and (swapped or isinstance(other, (int, float)) and other == 0):
            return None
        name, channels = step.name.removeprefix("r"), size[1]

        def pair(pool: Pool) -> tuple[Any, Any]:
            c: Any = other if isinstance(other, (int, float)) else pool.constant(other).detach()
            if isinstance(c, Tensor):
                c = c.to(pool.device, torch.float32).reshape(-1).expand(channels) if c.numel() == 1 else c.reshape(-1)
            if name == "mul":
                return c, None
            if name == "div":
                return 1.0 / c, None
            if name == "add":
                return None, c
            return (-1.0, c) if swapped else (None, -c)

        return Affine(read, (name, swapped, other), pair)

    def identified(self, pool: Pool) -> tuple[Any, ...]:
        def named(v: Any) -> Any:
            if isinstance(v, Norm):
                return v.key(pool)
            return id(pool.known(v)) if isinstance(v, Constant) else v

        return tuple(map(named, self.key))


def _per_channel(v: Any, size: Sequence[int]) -> bool:
    """Whether a constant has one number for each channel of maps of this size, or one for all."""
    if isinstance(v, (int, float)) and not isinstance(v, bool):
        return True
    if not isinstance(v, Constant) or len(size) not in (2, 4):
        return False
    t = v.tensor
    if t.numel() == 1 and t.dim() <= len(size):
        return not t.is_complex() and (t.dim() == 0 or t.dtype == torch.float32)
    per = [1] * len(size)
    per[1] = size[1]
    return t.dtype == torch.float32 and t.dim() <= len(size) and list(t.shape) == per[len(size) - t.dim() :]


def activation(step: Step) -> Act | None:
    """The activation of a step, None for what is none or has parameters that are no numbers."""
    rest, kwargs = step.args[1:], step.kwargs
    if step.name == "gelu":
        how = kwargs.get("approximate", rest[0] if rest else "none")
        return Act("gelu_tanh" if how == "tanh" else "gelu")
    if kwargs or not all(isinstance(v, (int, float)) for v in rest):
        return None
    if step.name in ("relu", "silu", "hardswish", "tanh", "sigmoid", "hardsigmoid", "mish"):
        return Act(step.name)
    if step.name == "leaky_relu":
        return Act("leaky_relu", *(rest or (0.01,)))
    if step.name == "hardtanh":
        low, high = (rest[i] if len(rest) > i else (-1.0, 1.0)[i] for i in range(2))
        return Act("hardtanh", low, high) if low < high else None
    if step.name == "elu":
        return Act("elu", *(rest or (1.0,))[:1]) if all(v == 1 for v in rest[1:]) else None
    if step.name == "softplus":
        beta, threshold = (rest[i] if len(rest) > i else (1.0, 20.0)[i] for i in range(2))
        return Act("softplus", beta, threshold) if beta > 0 else None
    return None


class Spec:
    """Steps that one node stands for."""

    masked = False
    kind = ""

    def __init__(self, at: int, step: Step, reads: list[Read]) -> None:
        out = step.results[0]
        assert out is not None
        self.steps, self.out, self.reads = [at], out, reads

    def extend(self, step: Step, uses: collections.Counter[int]) -> bool:
        """Whether the step, the only reader of the value, is part of the node from now on."""
        return False

    def key(self, pool: Pool) -> tuple[Any, ...]:
        raise NotImplementedError

    def node(self, pool: Pool, numbers: list[int]) -> Node:
        """The node, which reads the values of these numbers."""
        raise NotImplementedError


class CopySpec(Spec):
    """A copy of a value, which nobody writes into: the value itself."""


class UnitSpec(Spec):
    """A convolution or a linear layer, or no more than an operation on every channel by itself, and what follows."""

    def __init__(self, at: int, step: Step, read: Read, kind: str, of: Any) -> None:
        super().__init__(at, step, [read])
        self.kind, self.of = kind, of  # a Layer; ConvGeometry and kernel of an average; weight and bias and geometry
        self.masked = isinstance(of, Layer)
        self.affines: list[Affine] = []
        self.residual: Read | None = None
        self.act = NONE

    def extend(self, step: Step, uses: collections.Counter[int]) -> bool:
        if (
            self.act is not NONE
            or not step.results
            or step.results[0] is None
            or step.results[0].dtype != torch.float32
        ):
            return False
        mine = lambda read: as_maps(read) and read.value is self.out  # noqa: E731
        affine = Affine.of(step, uses)
        act = activation(step)
        if affine is not None:
            if self.residual is not None or not mine(affine.source):
                return False
            self.affines.append(affine)
        elif step.name == "add" and len(step.args) == 2 and step.kwargs.get("alpha", 1) == 1:
            own = [mine(a) for a in step.args]
            other = step.args[1] if own[0] else step.args[0]
            if self.residual is not None or not any(own) or not isinstance(other, Read):
                return False
            if other.value.dtype != torch.float32 or step.results[0].place.size[:2] != self.out.place.size[:2]:
                return False
            if map_size(step.results[0].place) != map_size(self.out.place) or not _adds(other, step.results[0]):
                return False
            self.residual = other
            self.reads.append(other)
        elif act is not None and mine(step.args[0]):
            self.act = act
        else:
            return False
        self.out = step.results[0]
        return True

    def key(self, pool: Pool) -> tuple[Any, ...]:
        of = self.of.name if isinstance(self.of, Layer) else self.of
        if self.kind == "plain":
            of = (*(None if t is None else id(pool.known(t)) for t in self.of[:2]), self.of[2])
        affines = tuple(a.identified(pool) for a in self.affines)
        return (self.kind, of, affines, self.act, self.out.place.size[1])

    def node(self, pool: Pool, numbers: list[int]) -> Node:
        channels = self.out.place.size[1]
        residual = numbers[1] if self.residual is not None else None
        scale: Any = None
        shift: Any = None
        packed = weight = None
        kind, geometry = self.kind, ConvGeometry(groups=channels)
        if isinstance(self.of, Layer):
            layer = self.of
            name, packed, geometry, scale, shift = layer.name, layer.packed, layer.geometry, layer.scale, layer.shift
            device = packed.index.device
        elif kind == "plain":
            weight, shift = (None if t is None else pool.constant(t) for t in self.of[:2])
            assert weight is not None
            name, kind, geometry, device = "a convolution without a mask", "conv", self.of[2], weight.device
        elif kind == "average":
            kernel, geometry = self.of
            device = pool.device
            name, packed, scale = "average pooling", ones(channels, kernel, device), 1.0 / (kernel[0] * kernel[1])
        else:
            device = pool.device
            name, packed = "an operation of single channels", identity(channels, device)
        for affine in self.affines:
            alpha, beta = affine.pair(pool)
            if alpha is not None:
                scale = alpha if scale is None else scale * alpha
                shift = None if shift is None else shift * alpha
            if beta is not None:
                shift = beta if shift is None else shift + beta
        scale, shift = (_vector(v, channels, device) for v in (scale, shift))
        return Unit(
            name, numbers[0], packed, geometry, scale, shift, residual, self.act, kind, weight, self.masked,
        )  # fmt: skip


def _vector(v: Any, channels: int, device: torch.device) -> Tensor | None:
    if v is None:
        return None
    return (
        v
        if isinstance(v, Tensor) and v.dim() == 1
        else torch.full((channels,), float(v), dtype=torch.float32, device=device)
    )


def _adds(other: Read, out: Value) -> bool:
    """Whether a read is of the size of the maps `out`, or has one pixel that is added to all of a map."""
    size = map_size(out.place)
    seen = map_size(other.place)
    if size is None or seen is None or other.place.size[0] != out.place.size[0]:
        return False
    same = seen == size and len(other.place.size) == len(out.place.size)
    return same or (len(other.place.size) == len(out.place.size) == 4 and seen == (size[0], 1, 1))


class OtherSpec(Spec):
    """A node without anything that follows it."""

    def __init__(self, at: int, step: Step, reads: list[Read], key: tuple[Any, ...], make: Callable[..., Node]) -> None:
        super().__init__(at, step, reads)
        self._key, self._make, self.kind = key, make, key[0]

    def key(self, pool: Pool) -> tuple[Any, ...]:
        return self._key

    def node(self, pool: Pool, numbers: list[int]) -> Node:
        return self._make(pool, numbers)


class TorchSpec(OtherSpec):
    """An operation that torch runs."""

    def __init__(self, *args: Any) -> None:
        *first, self._named = args
        super().__init__(*first)

    def key(self, pool: Pool) -> tuple[Any, ...]:
        return ("torch", self._named(pool))


def _pair(v: Any) -> tuple[int, int]:
    return (int(v[0]), int(v[-1])) if isinstance(v, (list, tuple)) else (int(v), int(v))


def spec_of(at: int, step: Step, layer: Layer | None, uses: collections.Counter[int]) -> Spec | None:
    """The node that begins with a step, None where a region ends. layer: that of a masked layer's step."""
    if not step.results or step.results[0] is None or step.results[0].dtype != torch.float32:
        return None
    out = step.results[0].place
    if layer is not None:
        return UnitSpec(at, step, step.args[0], "conv", layer)
    if map_size(out) is None or any(v is not None and uses[v.index] for v in step.results[1:]):
        return None
    reads = [v for v in step.args if isinstance(v, Read)]
    if any(r.value.dtype != torch.float32 or map_size(r.place) is None or r.shape[0] != out.size[0] for r in reads):
        return None
    if step.name == "clone" and as_maps(step.args[0]):
        return CopySpec(at, step, reads)
    affine = Affine.of(step, uses)
    if affine is not None:
        unit = UnitSpec(at, step, affine.source, "affine", None)
        unit.affines.append(affine)
        return unit
    act = activation(step)
    if act is not None and len(reads) == 1:
        unit = UnitSpec(at, step, reads[0], "affine", None)
        unit.act = act
        return unit
    if step.name == "add" and len(reads) == 2 and len(step.args) == 2 and step.kwargs.get("alpha", 1) == 1:
        first, second = reads if map_size(reads[0].place) == map_size(out) else reads[::-1]
        if (
            map_size(first.place) == map_size(out)
            and len(first.shape) == len(out.size)
            and _adds(second, step.results[0])
        ):
            unit = UnitSpec(at, step, first, "affine", None)
            unit.residual = second
            unit.reads.append(second)
            return unit
    if len(out.size) == 4 and len(reads) == 1 and len(reads[0].shape) == 4 and reads[0] is step.args[0]:
        found = _of_maps(at, step, reads[0], out.size)
        if found is not None:
            return found
    if step.name == "mean" and len(reads) == 1:
        return _mean(at, step, reads[0])
    if step.name == "cat" and not step.kwargs:
        found = _cat(at, step, out.size)
        if found is not None:
            return found
    return _by_torch(at, step, reads, out.size) if step.name in _EACH_EXAMPLE else None


# Operations on maps that treat every example by itself, given that no constant has a batch dimension
# (weights of `convolution` have none).
_EACH_EXAMPLE = frozenset((
    "mul", "sub", "div", "add", "clamp", "clamp_min", "clamp_max", "abs", "neg", "exp", "sqrt", "pow", "_prelu_kernel",
    "celu", "selu", "log_sigmoid", "rsub", "maximum", "minimum", "convolution", "avg_pool2d", "_adaptive_avg_pool2d",
    "upsample_nearest2d", "_upsample_nearest_exact2d", "upsample_bilinear2d", "upsample_bicubic2d", "pixel_shuffle",
    "pixel_unshuffle", "constant_pad_nd", "reflection_pad2d", "replication_pad2d",
))  # fmt: skip


def _by_torch(at: int, step: Step, reads: list[Read], out: tuple[int, ...]) -> Spec | None:
    everything = list(inside((step.args, step.kwargs)))
    fixed = [v for v in everything if isinstance(v, Constant)]
    if len(out) != 4 or not reads or any(len(r.shape) != 4 for r in reads):
        return None
    if any(isinstance(v, Read) and not any(v is r for r in reads) for v in everything):
        return None
    if step.name == "convolution":
        if len(reads) > 1 or reads[0] is not step.args[0]:  # filters that are computed from the input
            return None
    elif any(c.tensor.dim() >= 4 and c.tensor.shape[0] != 1 for c in fixed):
        return None
    if step.name == "constant_pad_nd" and any(step.args[1][6:]):  # other examples in the place of these
        return None
    size = (out[1], out[2], out[3])

    def make(pool: Pool, numbers: list[int]) -> Node:
        function = functional(step)
        at = {id(r): i for i, r in enumerate(reads)}
        known = lambda v: pool.constant(v) if isinstance(v, Constant) else v  # noqa: E731
        args, kwargs = replaced(step.args, known), replaced(step.kwargs, known)

        def run(*xs: Tensor) -> Tensor:
            put = lambda v: xs[at[id(v)]] if isinstance(v, Read) else v  # noqa: E731
            return function(*replaced(args, put), **replaced(kwargs, put))

        return Torch(step.name, numbers[0], tuple(numbers), run, size)

    def named(pool: Pool) -> Any:
        def name(v: Any) -> Any:
            if isinstance(v, Read):
                return "read"
            return f"constant {id(pool.known(v))}" if isinstance(v, Constant) else v

        return str((step.func, replaced(step.args, name), replaced(step.kwargs, name), size))

    return TorchSpec(at, step, reads, (step.name,), make, named)


def _of_maps(at: int, step: Step, read: Read, out: tuple[int, ...]) -> Spec | None:
    rest = list(step.args[1:])
    if step.name == "max_pool2d_with_indices" and not step.kwargs:
        kernel = _pair(rest[0])
        stride = _pair(rest[1]) if len(rest) > 1 and rest[1] else kernel
        padding, dilation = (_pair(rest[i]) if len(rest) > i else (i - 2, i - 2) for i in (2, 3))
        ceil, size = bool(rest[4]) if len(rest) > 4 else False, (out[2], out[3])
        window = (*kernel, *stride, *padding, *dilation)
        make = lambda pool, numbers: MaxPool("max pooling", numbers[0], window, size, ceil)  # noqa: E731
        return OtherSpec(at, step, [read], ("max pooling", window, ceil, size), make)
    if step.name == "avg_pool2d" and not step.kwargs:
        kernel = _pair(rest[0])
        stride = _pair(rest[1]) if len(rest) > 1 and rest[1] else kernel
        padding = _pair(rest[2]) if len(rest) > 2 else (0, 0)
        plain = not (len(rest) > 3 and rest[3]) and (len(rest) < 5 or rest[4] or padding == (0, 0))
        if plain and (len(rest) < 6 or rest[5] is None):
            return _average(at, step, read, kernel, stride, padding)
    if step.name == "_adaptive_avg_pool2d" and not step.kwargs:
        given, target = read.shape[2:], out[2:]
        if target == (1, 1):
            return _mean_of(at, step, read)
        if all(m and n % m == 0 for n, m in zip(given, target, strict=True)):
            kernel = (given[0] // target[0], given[1] // target[1])
            return _average(at, step, read, kernel, kernel, (0, 0))
    if step.name == "convolution" and not step.kwargs:
        weight, bias, stride, padding, dilation, transposed, _, groups = rest
        fixed = isinstance(weight, Constant) and (bias is None or isinstance(bias, Constant))
        if fixed and not transposed and weight.tensor.dim() == 4 and weight.tensor.dtype == torch.float32:
            g = ConvGeometry(_pair(stride), _pair(padding), _pair(dilation), groups)
            return UnitSpec(at, step, read, "plain", (weight, bias, g))
    return None


def _average(
    at: int, step: Step, read: Read, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Spec:
    g = ConvGeometry(stride, padding, (1, 1), read.shape[1])
    return UnitSpec(at, step, read, "average", (kernel, g))


def _mean(at: int, step: Step, read: Read) -> Spec | None:
    dims = step.args[1] if len(step.args) > 1 else None
    if len(read.shape) != 4 or not isinstance(dims, (list, tuple)) or sorted(d % 4 for d in dims) != [2, 3]:
        return None
    if step.kwargs.get("dtype") not in (None, torch.float32) or set(step.kwargs) - {"dtype"}:
        return None
    return _mean_of(at, step, read)


def _mean_of(at: int, step: Step, read: Read) -> Spec:
    return OtherSpec(at, step, [read], ("mean",), lambda pool, numbers: Mean("mean of maps", numbers[0], pool.device))


def _cat(at: int, step: Step, out: tuple[int, ...]) -> Spec | None:
    parts = step.args[0]
    dim = step.args[1] if len(step.args) > 1 else 0
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, Read) for p in parts) or dim % len(out) != 1:
        return None
    if any(len(p.shape) != len(out) or p.shape[0] != out[0] or p.value.dtype != torch.float32 for p in parts):
        return None
    make = lambda pool, numbers: Concat("concatenation", numbers[0], tuple(numbers))  # noqa: E731
    return OtherSpec(at, step, list(parts), ("concatenation", len(parts)), make)
