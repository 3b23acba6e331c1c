"""What a traced module becomes: one method per kind of layer, each adding nodes to the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.reference.relaxations import parameters_of

PROBE = 7919  # the batch size during tracing: large and prime, so that it is recognised in shapes

SUPPORTED = (
    "Linear, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d, BatchNorm1d and BatchNorm2d (eval), Identity, Dropout (eval), Flatten, "
    "Unflatten, ReLU, LeakyReLU, ReLU6, Hardtanh, Sigmoid, Tanh, Softplus, ELU, SiLU, GELU, arctan, AvgPool1d/2d, "
    "AdaptiveAvgPool1d/2d, MaxPool1d/2d, ZeroPad and other Pad layers, Upsample (nearest, bilinear); +, -, * and / with constants, sums of "
    "branches, cat, flatten, reshape, view, permute, transpose, squeeze, unsqueeze, slices, mean, sum, pad"
)


class UnsupportedLayerError(ValueError):
    """A layer or operation that bounds are not defined for."""


def unsupported(what: str, where: str, why: str = "") -> UnsupportedLayerError:
    return UnsupportedLayerError(f"model: {what} at '{where}' is not supported{why}; supported: {SUPPORTED}")


class Ref:
    __slots__ = ("index",)

    def __init__(self, index: int):
        self.index = index


class Builder:
    def __init__(self, model: nn.Module, shape: tuple[int, ...], fold: bool):
        self.model, self.fold = model, fold
        self.nodes: list[G.Node] = [G.Input((), shape, "input")]
        self.single: set[int] = set()  # nodes that one step of the trace alone reads
        self.where = ""

    # -- helpers -------------------------------------------------------------------------------------------------------
    def add(self, node: G.Node) -> Ref:
        self.nodes.append(node)
        return Ref(len(self.nodes) - 1)

    def shape(self, ref: Ref) -> tuple[int, ...]:
        return self.nodes[ref.index].shape

    def meta(self, ref: Ref) -> Tensor:
        return torch.empty(PROBE, *self.shape(ref), device="meta")

    def fail(self, what: str, why: str = "") -> UnsupportedLayerError:
        return unsupported(what, self.where, why)

    def per_example(self, out: Tensor, what: str) -> tuple[int, ...]:
        if out.dim() < 1 or out.shape[0] != PROBE:
            raise self.fail(what, " because it mixes the examples of a batch")
        return tuple(out.shape[1:])

    def monotone(
        self, x: Ref, f: Callable[[Tensor], Tensor], what: str, sums: bool = False, adjoint: Any = None
    ) -> Ref:
        shape = self.per_example(f(self.meta(x)), what)
        taps = self.nodes[x.index].size if sums else 0
        return self.add(G.Monotone((x.index,), shape, self.where, function=f, taps=taps, adjoint=adjoint))

    def reshape(self, x: Ref, f: Callable[[Tensor], Tensor], what: str) -> Ref:
        return self.add(G.Reshape((x.index,), self.per_example(f(self.meta(x)), what), self.where))

    def to_shape(self, x: Ref, shape: tuple[int, ...]) -> Ref:
        return x if self.shape(x) == shape else self.add(G.Reshape((x.index,), shape, self.where))

    def activation(self, x: Ref, name: str, params: tuple[float, ...] = ()) -> Ref:
        try:
            params = parameters_of(name, params)
        except ValueError as error:
            raise self.fail(name, f" ({error})") from None
        return self.add(G.Activation((x.index,), self.shape(x), self.where, activation=name, params=params))

    def affine(self, x: Ref, factor: Any = None, shift: Any = None, shift_size: G.Getter | None = None) -> Ref:
        """x * factor + shift; factor and shift are numbers, tensors or getters."""

        def getter(v: Any) -> G.Getter:
            if v is None or callable(v) and not isinstance(v, Tensor):
                return v or (lambda: None)
            if isinstance(v, Tensor):
                return lambda: v
            return lambda: torch.tensor(float(v), dtype=torch.float64)  # cast to what it meets

        shape = (PROBE, *self.shape(x))

        def without_batch(get: G.Getter) -> G.Getter:
            t = get()
            if t is None:
                return get
            if t.dim() == len(shape) and t.shape[0] not in (1,):
                raise self.fail("a constant with a batch dimension")
            if torch.broadcast_shapes(shape, tuple(t.shape)) != torch.Size(shape):
                raise self.fail(f"a constant of shape {tuple(t.shape)} that enlarges a tensor of shape {shape[1:]}")
            return (lambda: get().squeeze(0)) if t.dim() == len(shape) else get

        get_f, get_s = without_batch(getter(factor)), without_batch(getter(shift))
        return self.add(
            G.Scale((x.index,), self.shape(x), self.where, get_factor=get_f, get_shift=get_s, get_shift_size=shift_size)
        )

    # -- layers with weights -------------------------------------------------------------------------------------------
    def dense(self, x: Ref, weight: G.Getter, bias: G.Getter) -> Ref:
        w = weight()
        shape = self.shape(x)
        if shape[-1:] != w.shape[1:]:
            raise ValueError(
                f"model: Linear at '{self.where}' expects {w.shape[1]} features, its input has shape {shape}"
            )
        return self.add(G.Dense((x.index,), (*shape[:-1], w.shape[0]), self.where, get_weight=weight, get_bias=bias))

    def pad(self, x: Ref, pad: list[int], mode: str, value: float = 0.0) -> Ref:
        if not any(pad):
            return x
        if mode == "constant" and value:
            zero = self.pad(x, pad, mode)
            shape = self.shape(x)
            border = F.pad(torch.zeros(1, *shape), pad, value=value)
            return self.affine(zero, None, border)
        return self.monotone(x, lambda t: F.pad(t, pad, mode=mode), "padding")

    def conv(self, x: Ref, weight: G.Getter, bias: G.Getter, stride: Any, padding: Any, dilation: Any, groups: int, mode: str = "zeros", one: bool = False) -> Ref:  # fmt: skip
        shape = self.shape(x)
        if len(shape) != (2 if one else 3):
            raise ValueError(f"model: the convolution at '{self.where}' has an input of shape {shape} per example")
        k = weight().shape[2:]
        n = len(k)
        stride, dilation = ((v,) * n if isinstance(v, int) else tuple(v) for v in (stride, dilation))
        if isinstance(padding, str):
            total = [d * (s - 1) if padding == "same" else 0 for d, s in zip(dilation, k, strict=False)]
        else:
            padding = (padding,) * n if isinstance(padding, int) else tuple(padding)
            total = [2 * p for p in padding]
        sides = [v for t in reversed(total) for v in (t // 2, t - t // 2)]
        if mode != "zeros" or any(a != b for a, b in zip(sides[::2], sides[1::2], strict=False)):
            x = self.pad(x, sides, "constant" if mode == "zeros" else mode)
            total = [0] * n
        half: Any = [t // 2 for t in total]
        if one:
            x = self.to_shape(x, (self.shape(x)[0], 1, self.shape(x)[1]))
            stride, dilation, half = (1, *stride), (1, *dilation), [0, *half]
            inner = weight
            weight = lambda: inner().unsqueeze(2)  # noqa: E731
        w = weight()
        out = F.conv2d(
            self.meta(x)[:1], torch.empty(w.shape, device="meta"), None, stride, half, dilation, groups
        ).shape[1:]
        node = G.Conv((x.index,), tuple(out), self.where, get_weight=weight, get_bias=bias, stride=tuple(stride), padding=tuple(half), dilation=tuple(dilation), groups=groups)  # fmt: skip
        y = self.add(node)
        return self.to_shape(y, (out[0], out[2])) if one else y

    def conv_transpose(self, x: Ref, weight: G.Getter, bias: G.Getter, stride: Any, padding: Any, extra: Any, groups: int, dilation: Any, one: bool = False) -> Ref:  # fmt: skip
        values = [
            (v,) * (1 if one else 2) if isinstance(v, int) else tuple(v) for v in (stride, padding, extra, dilation)
        ]
        if one:
            x = self.to_shape(x, (self.shape(x)[0], 1, self.shape(x)[1]))
            values = [(d, *v) for d, v in zip((1, 0, 0, 1), values, strict=False)]
            inner = weight
            weight = lambda: inner().unsqueeze(2)  # noqa: E731
        stride, padding, extra, dilation = values
        w = weight()
        out = F.conv_transpose2d(self.meta(x)[:1], torch.empty(w.shape, device="meta"), None, stride, padding, extra, groups, dilation).shape[1:]  # fmt: skip
        node = G.ConvTranspose((x.index,), tuple(out), self.where, get_weight=weight, get_bias=bias, stride=stride, padding=padding, output_padding=extra, dilation=dilation, groups=groups)  # fmt: skip
        y = self.add(node)
        return self.to_shape(y, (out[0], out[2])) if one else y

    def batch_norm(self, x: Ref, m: Any) -> Ref:
        if m.training:
            raise ValueError(f"model: BatchNorm at '{self.where}' is in training mode; call model.eval() first")
        if m.running_mean is None:
            raise self.fail(type(m).__name__ + " without running statistics")
        tail = (1,) * (len(self.shape(x)) - 1)

        def factor() -> Tensor:
            f = torch.rsqrt(m.running_var + m.eps)
            return f if m.weight is None else f * m.weight

        def shift() -> Tensor:
            s = -m.running_mean * factor()
            return s if m.bias is None else s + m.bias

        source = self.nodes[x.index]
        if self.fold and isinstance(source, (G.Conv, G.Dense)) and len(source.shape) != 2 and x.index in self.single:
            get_w, get_b = source.get_weight, source.get_bias

            def weight() -> Tensor:
                w = get_w()
                return w * factor().view(-1, *[1] * (w.dim() - 1))

            def bias() -> Tensor:
                b = get_b()
                return shift() if b is None else shift() + factor() * b

            source.get_weight, source.get_bias = weight, bias
            return x

        def size() -> Tensor:
            s = (m.running_mean * factor()).abs()
            return (s if m.bias is None else s + m.bias.abs()).view(-1, *tail)

        return self.affine(x, lambda: factor().view(-1, *tail), lambda: shift().view(-1, *tail), size)

    def avg_pool(self, x: Ref, args: tuple[Any, ...], what: str, f: Callable[..., Tensor]) -> Ref:
        adjoint = None
        if f in (F.avg_pool2d, F.adaptive_avg_pool2d) and len(self.shape(x)) == 3:
            adjoint = _adjoint_of_pool(f, *args)
        return self.monotone(x, lambda t: f(t, *args), what, True, adjoint)

    def max_pool(
        self, x: Ref, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: bool, one: bool = False
    ) -> Ref:
        shape = self.shape(x)
        stride = kernel if stride is None or stride == [] else stride
        values = [v if isinstance(v, int) else tuple(v) for v in (kernel, stride, padding, dilation)]
        if one:
            x = self.to_shape(x, (shape[0], 1, shape[1]))
            values = [(d, v if isinstance(v, int) else v[0]) for d, v in zip((1, 1, 0, 1), values, strict=False)]
        kernel, stride, padding, dilation = (G.pair(v) for v in values)
        if len(self.shape(x)) != 3:
            raise self.fail("max pooling", f" on an input of shape {shape}")
        node = G.MaxPool((x.index,), (), self.where, kernel=kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=bool(ceil_mode))  # fmt: skip
        node.shape = tuple(node.pool(self.meta(x)[:1]).shape[1:])
        y = self.add(node)
        return self.to_shape(y, (node.shape[0], node.shape[2])) if one else y

    def add_sub(self, a: Any, b: Any, sign: int) -> Ref:
        if isinstance(a, Ref) and isinstance(b, Ref):
            if self.shape(a) != self.shape(b):
                raise self.fail(f"a sum of shapes {self.shape(a)} and {self.shape(b)}")
            return self.add(G.Sum((a.index, b.index), self.shape(a), self.where, signs=(1, sign)))
        if isinstance(a, Ref):
            minus = (lambda: -b) if isinstance(b, Tensor) else -float(b)  # read when the node runs
            return self.affine(a, None, b if sign > 0 else minus)
        return self.affine(b, None if sign > 0 else -1.0, a)

    def multiply(self, a: Any, b: Any) -> Ref:
        if isinstance(a, Ref) and isinstance(b, Ref):
            raise self.fail("a product of two tensors that depend on the input")
        return self.affine(a, b) if isinstance(a, Ref) else self.affine(b, a)

    def divide(self, a: Any, b: Any) -> Ref:
        if isinstance(b, Ref):
            raise self.fail("a division by a tensor that depends on the input")
        return self.affine(a, (lambda: b.double().reciprocal()) if isinstance(b, Tensor) else 1.0 / float(b))


def _adjoint_of_pool(f: Callable[..., Tensor], size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None) -> Callable[[Tensor, Tensor], Tensor]:  # fmt: skip
    """torch's gradient of average pooling, which is differentiable itself: torch.func.vjp costs more than the pooling."""
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
