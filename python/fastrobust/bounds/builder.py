"""What an operation of a model becomes: one method per kind of layer, each adding nodes to the graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.reference.relaxations import parameters_of

SUPPORTED = (
    "linear layers and products with constant matrices, convolutions and transposed ones, batch normalisation "
    "(eval), dropout (eval), "
    "ReLU, LeakyReLU, PReLU, ReLU6, Hardtanh, Hardsigmoid, Sigmoid, Tanh, Softplus, ELU, SELU, CELU, SiLU, GELU, "
    "Hardswish, Mish, arctan, exp, log, sqrt, rsqrt, reciprocal, squares, abs, clamp, "
    "maximum, minimum; average and maximum pooling, max and min over dimensions; +, -, * and / with constants and of "
    "bounded values, products of matrices, softmax, attention, LayerNorm, GroupNorm, InstanceNorm, RMSNorm, sums "
    "of branches, mean, sum, var, std, 2-norms, "
    "cat, stack, views, permutations, slices, index by constants, pad, interpolation, in-place forms of all of these; "
    "log_softmax at the end (margins)"
)


class UnsupportedLayerError(ValueError):
    """A layer or operation that bounds are not defined for."""


def unsupported(what: str, where: str, why: str = "") -> UnsupportedLayerError:
    return UnsupportedLayerError(f"model: {what} at '{where}' is not supported{why}; supported: {SUPPORTED}")


class Ref:
    __slots__ = ("index",)

    def __init__(self, index: int):
        self.index = index


class Tracked:
    """A tensor that depends on the input: a node, and the tensor's size for a batch of one."""

    __slots__ = ("ref", "size")

    def __init__(self, ref: Ref, size: tuple[int, ...]):
        self.ref, self.size = ref, size


def per_example(size: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of one example of a tensor of ``size`` that a batch of one gave: without the dimension of the batch,
    or all of it where the model has done away with that; (1,) of single numbers."""
    return tuple(size[1:] if size and size[0] == 1 else size) or (1,)


def _on_device(t: Tensor) -> Callable[[torch.device], Tensor]:
    """t, copied to each device once."""

    @functools.cache
    def on(device: torch.device) -> Tensor:
        with torch.inference_mode(False):
            return t.to(device)

    return on


class Builder:
    def __init__(self, shape: tuple[int, ...]):
        self.nodes: list[G.Node] = [G.Input((), shape, "input")]
        self.where, self.line = "", ""
        self.size: tuple[int, ...] = ()  # of the result of the operation that is lowered

    # -- helpers -------------------------------------------------------------------------------------------------------
    def add(self, node: G.Node) -> Ref:
        self.nodes.append(node)
        return Ref(len(self.nodes) - 1)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.nodes[ref.index].shape

    def meta(self, ref: Ref) -> Tensor:
        return torch.empty(1, *self.shape(ref), device="meta")

    def fail(self, what: str, why: str = "") -> UnsupportedLayerError:
        return unsupported(what, self.where, (f" ({self.line})" if self.line else "") + why)

    def linear(
        self,
        x: Ref,
        f: Callable[[Tensor], Tensor],
        shape: tuple[int, ...],
        taps: int,
        adjoint: Any = None,
        **known: Any,
    ) -> Ref:
        """f takes (N, *shape of x), with coefficients that are not negative."""
        node = G.Monotone((x.index,), shape, self.where, function=f, taps=taps, adjoint=adjoint, **known)
        return self.add(node)

    def to_shape(self, x: Ref, shape: tuple[int, ...]) -> Ref:
        return x if self.shape(x) == shape else self.add(G.Reshape((x.index,), shape, self.where))

    def pick(self, x: Ref, places: Tensor, shape: tuple[int, ...], permutation: Any = None) -> Ref:
        """The numbers of x at flat ``places`` (-1: zero), as ``shape``. permutation: (sizes, dims) where the places
        are those of x viewed as sizes and permuted."""
        inner, n = self.shape(x), self.nodes[x.index].size
        if len(places) == n and bool((places == torch.arange(n)).all()):
            return self.to_shape(x, shape)
        if permutation is not None:
            sizes, dims = permutation
            order, turned = [0, *(d + 1 for d in dims)], [sizes[d] for d in dims]
            back = [0, *(dims.index(d) + 1 for d in range(len(dims)))]

            def permuted(t: Tensor) -> Tensor:
                return t.reshape(len(t), *sizes).permute(order).reshape(len(t), *shape)

            def restored(a: Tensor, like: Tensor) -> Tensor:
                return a.reshape(len(a), *turned).permute(back).reshape(len(a), *inner)

            return self.linear(x, permuted, shape, 0, restored, places=places)
        first = int(places[0]) if len(places) else 0
        if first >= 0 and bool((places == torch.arange(first, first + len(places))).all()):
            last = n - first - len(places)
            return self.linear(
                x,
                lambda t: t.flatten(1)[:, first : n - last].reshape(len(t), *shape),
                shape,
                0,
                lambda a, like: F.pad(a.flatten(1), (first, last)).reshape(len(a), *inner),
                places=places,
            )
        kept = places >= 0
        blank = bool((~kept).any())
        most = int(torch.bincount(places[kept]).max()) if len(places[kept]) else 0
        at, into = _on_device(places[kept]), _on_device(torch.nonzero(kept).flatten())

        def gathered(t: Tensor) -> Tensor:
            got = t.flatten(1).index_select(1, at(t.device))
            if blank:
                got = got.new_zeros(len(t), len(places)).index_copy(1, into(t.device), got)
            return got.reshape(len(t), *shape)

        def spread(a: Tensor, like: Tensor) -> Tensor:
            a = a.flatten(1)
            a = a.index_select(1, into(a.device)) if blank else a
            return a.new_zeros(len(a), n).index_add(1, at(a.device), a).reshape(len(a), *inner)

        return self.linear(x, gathered, shape, most if most > 1 else 0, spread, places=places)

    def activation(self, x: Ref, name: str, params: tuple[float, ...] = ()) -> Ref:
        try:
            params = parameters_of(name, params)
        except ValueError as error:
            raise self.fail(name, f" ({error})") from None
        return self.add(G.Activation((x.index,), self.shape(x), self.where, activation=name, params=params))

    def affine(self, x: Ref, factor: Any = None, shift: Any = None, shift_size: G.Getter | None = None) -> Ref:
        """x * factor + shift; factor and shift are numbers, or getters of tensors that broadcast to one example."""
        shape = self.shape(x)

        def getter(v: Any) -> G.Getter:
            if v is None:
                return lambda: None
            if callable(v):
                t = v()
                if torch.broadcast_shapes(shape, tuple(t.shape)) != torch.Size(shape):
                    raise self.fail(f"a constant of shape {tuple(t.shape)} that enlarges a tensor of shape {shape}")
                return v
            number = torch.tensor(float(v), dtype=torch.float64)  # cast to what it meets
            return lambda: number

        return self.add(
            G.Scale((x.index,), shape, self.where, get_factor=getter(factor), get_shift=getter(shift),
            get_shift_size=shift_size)
        )  # fmt: skip

    # -- layers with weights -------------------------------------------------------------------------------------------
    def dense(self, x: Ref, weight: G.Getter, bias: G.Getter) -> Ref:
        w = weight()
        shape = self.shape(x)
        return self.add(G.Dense((x.index,), (*shape[:-1], w.shape[0]), self.where, get_weight=weight, get_bias=bias))

    def _flat_kernel(self, x: Ref, weight: G.Getter, one: bool) -> tuple[Ref, G.Getter]:
        """A one-dimensional convolution as one over maps of height 1."""
        shape = self.shape(x)
        if not one:
            return x, weight
        return self.to_shape(x, (shape[0], 1, shape[1])), lambda: weight().unsqueeze(2)

    def conv(
        self, x: Ref, weight: G.Getter, bias: G.Getter, stride: Any, padding: Any, dilation: Any, groups: int, one: bool
    ) -> Ref:
        if one:
            stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
        x, weight = self._flat_kernel(x, weight, one)
        w = torch.empty(weight().shape, device="meta")
        out = F.conv2d(self.meta(x), w, None, stride, padding, dilation, groups).shape[1:]
        node = G.Conv(
            (x.index,),
            tuple(out),
            self.where,
            get_weight=weight,
            get_bias=bias,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        y = self.add(node)
        return self.to_shape(y, (out[0], out[2])) if one else y

    def conv_transpose(
        self,
        x: Ref,
        weight: G.Getter,
        bias: G.Getter,
        stride: Any,
        padding: Any,
        extra: Any,
        groups: int,
        dilation: Any,
        one: bool,
    ) -> Ref:
        if one:
            stride, padding, extra, dilation = (1, *stride), (0, *padding), (0, *extra), (1, *dilation)
        x, weight = self._flat_kernel(x, weight, one)
        w = torch.empty(weight().shape, device="meta")
        out = F.conv_transpose2d(self.meta(x), w, None, stride, padding, extra, groups, dilation).shape[1:]
        node = G.ConvTranspose(
            (x.index,),
            tuple(out),
            self.where,
            get_weight=weight,
            get_bias=bias,
            stride=stride,
            padding=padding,
            output_padding=extra,
            dilation=dilation,
            groups=groups,
        )
        y = self.add(node)
        return self.to_shape(y, (out[0], out[2])) if one else y

    def batch_norm(self, x: Ref, m: Any, eps: float, dims: int) -> Ref:
        """m: getters mean, var, weight and bias (or None) of the running statistics; ``dims`` follow the channels."""
        tail = (1,) * dims

        @G.Derived
        def factor() -> Tensor:
            f = torch.rsqrt(m.var() + eps)
            return (f if m.weight is None else f * m.weight()).view(-1, *tail)

        @G.Derived
        def shift() -> Tensor:
            s = -m.mean().view(-1, *tail) * factor()
            return s if m.bias is None else s + m.bias().view(-1, *tail)

        def size() -> Tensor:
            s = (m.mean().view(-1, *tail) * factor()).abs()
            return s if m.bias is None else s + m.bias().view(-1, *tail).abs()

        return self.affine(x, factor, shift, size)

    # -- pooling of maps (C, H, W) -------------------------------------------------------------------------------------
    def avg_pool(self, x: Ref, args: tuple[Any, ...], f: Callable[..., Tensor]) -> Ref:
        if len(args) == 6 and args[5] is not None and args[5] < 0:
            raise self.fail("average pooling", f" with divisor_override {args[5]}, which turns its bounds around")
        shape = tuple(f(self.meta(x), *args).shape[1:])
        taps, window = self.nodes[x.index].size, _window_of_pool(f, self.shape(x), shape, *args)
        return self.linear(x, lambda t: f(t, *args), shape, taps, _adjoint_of_pool(f, *args), window=window)

    def max_pool(self, x: Ref, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool) -> Ref:
        kernel, stride, padding, dilation = (G.pair(v) for v in (kernel, stride, padding, dilation))
        node = G.MaxPool(
            (x.index,),
            (),
            self.where,
            kernel=kernel,
            stride=stride,
            padding=padding,
            dilation=dilation,
            ceil_mode=bool(ceil_mode),
        )
        node.shape = tuple(node.pool(self.meta(x)).shape[1:])
        return self.add(node)


def _window_of_pool(
    f: Callable[..., Tensor],
    shape: G.Shape,
    out: G.Shape,
    size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> tuple[Any, Any, Any, float] | None:
    """(kernel, stride, padding, weight) of pooling whose windows are all alike: a convolution of every channel."""
    if f is F.adaptive_avg_pool2d:
        if any(n % m for n, m in zip(shape[1:], out[1:], strict=True)):
            return None
        kernel = shape[1] // out[1], shape[2] // out[2]
        return kernel, kernel, (0, 0), 1 / (kernel[0] * kernel[1])
    kernel, steps, pads = G.pair(size), G.pair(size if stride is None or stride == [] else stride), G.pair(padding)
    whole = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip(shape[1:], pads, kernel, steps, strict=True)]
    if tuple(out[1:]) != tuple(whole) or (pads != (0, 0) and not count_include_pad and not divisor_override):
        return None
    return kernel, steps, pads, 1 / (divisor_override or kernel[0] * kernel[1])


def _adjoint_of_pool(
    f: Callable[..., Tensor],
    size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: Any = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's gradient of average pooling, which is differentiable itself: torch.func.vjp costs more than the
    pooling."""
    if f is F.adaptive_avg_pool2d:
        return lambda a, like: torch.ops.aten._adaptive_avg_pool2d_backward(a, like)
    kernel, steps, pads = G.pair(size), G.pair(size if stride is None or stride == [] else stride), G.pair(padding)

    def adjoint(a: Tensor, like: Tensor) -> Tensor:
        (h, w), (rows, columns) = kernel, a.shape[2:]
        if steps == kernel and pads == (0, 0) and like.shape[2:] == (h * rows, w * columns):  # windows side by side
            one = (a / (divisor_override or h * w)).permute(0, 2, 3, 1)[:, :, None, :, None]
            spread = one.expand(len(a), rows, h, columns, w, a.shape[1])
            return spread.reshape(len(a), h * rows, w * columns, a.shape[1]).permute(0, 3, 1, 2)
        out: Tensor = torch.ops.aten.avg_pool2d_backward(
            a, like, kernel, steps, pads, ceil_mode, count_include_pad, divisor_override
        )
        return out

    return adjoint
