"""From an ordinary nn.Module to a Graph, by torch.fx."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor, fx

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


def _unsupported(what: str, where: str, why: str = "") -> UnsupportedLayerError:
    return UnsupportedLayerError(f"model: {what} at '{where}' is not supported{why}; supported: {SUPPORTED}")


class _Ref:
    __slots__ = ("index",)

    def __init__(self, index: int):
        self.index = index


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualified_name: str) -> bool:
        if type(m).forward in _MODULES:
            return True
        return type(m).__module__.startswith("torch.nn.modules") and not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


class _Builder:
    def __init__(self, model: nn.Module, shape: tuple[int, ...]):
        self.model = model
        self.nodes: list[G.Node] = [G.Input((), shape, "input")]
        self.env: dict[fx.Node, Any] = {}
        self.where = ""

    # -- helpers -------------------------------------------------------------------------------------------------------
    def add(self, node: G.Node) -> _Ref:
        self.nodes.append(node)
        return _Ref(len(self.nodes) - 1)

    def shape(self, ref: _Ref) -> tuple[int, ...]:
        return self.nodes[ref.index].shape

    def meta(self, ref: _Ref) -> Tensor:
        return torch.empty(PROBE, *self.shape(ref), device="meta")

    def fail(self, what: str, why: str = "") -> UnsupportedLayerError:
        return _unsupported(what, self.where, why)

    def per_example(self, out: Tensor, what: str) -> tuple[int, ...]:
        if out.dim() < 1 or out.shape[0] != PROBE:
            raise self.fail(what, " because it mixes the examples of a batch")
        return tuple(out.shape[1:])

    def monotone(self, x: _Ref, f: Callable[[Tensor], Tensor], what: str) -> _Ref:
        return self.add(G.Monotone((x.index,), self.per_example(f(self.meta(x)), what), self.where, function=f))

    def reshape(self, x: _Ref, f: Callable[[Tensor], Tensor], what: str) -> _Ref:
        return self.add(G.Reshape((x.index,), self.per_example(f(self.meta(x)), what), self.where))

    def to_shape(self, x: _Ref, shape: tuple[int, ...]) -> _Ref:
        return x if self.shape(x) == shape else self.add(G.Reshape((x.index,), shape, self.where))

    def activation(self, x: _Ref, name: str, params: tuple[float, ...] = ()) -> _Ref:
        try:
            params = parameters_of(name, params)
        except ValueError as error:
            raise self.fail(name, f" ({error})") from None
        return self.add(G.Activation((x.index,), self.shape(x), self.where, activation=name, params=params))

    def affine(self, x: _Ref, factor: Any = None, shift: Any = None) -> _Ref:
        """x * factor + shift; factor and shift are numbers, tensors or getters."""

        def getter(v):
            if v is None or callable(v) and not isinstance(v, Tensor):
                return v or (lambda: None)
            if isinstance(v, Tensor):
                return lambda: v
            return lambda: torch.tensor(float(v), dtype=torch.float64)  # cast to what it meets

        get_f, get_s = getter(factor), getter(shift)
        shape = (PROBE, *self.shape(x))
        for get in (get_f, get_s):
            t = get()
            if t is None:
                continue
            if t.dim() == len(shape) and t.shape[0] not in (1,):
                raise self.fail("a constant with a batch dimension")
            if torch.broadcast_shapes(shape, tuple(t.shape)) != torch.Size(shape):
                raise self.fail(f"a constant of shape {tuple(t.shape)} that enlarges a tensor of shape {shape[1:]}")
        return self.add(G.Scale((x.index,), self.shape(x), self.where, get_factor=get_f, get_shift=get_s))

    # -- layers with weights -------------------------------------------------------------------------------------------
    def dense(self, x: _Ref, weight: G.Getter, bias: G.Getter) -> _Ref:
        w = weight()
        shape = self.shape(x)
        if shape[-1:] != w.shape[1:]:
            raise ValueError(f"model: Linear at '{self.where}' expects {w.shape[1]} features, its input has shape {shape}")
        return self.add(G.Dense((x.index,), (*shape[:-1], w.shape[0]), self.where, get_weight=weight, get_bias=bias))

    def pad(self, x: _Ref, pad: list[int], mode: str, value: float = 0.0) -> _Ref:
        if not any(pad):
            return x
        if mode == "constant" and value:
            zero = self.pad(x, pad, mode)
            shape = self.shape(x)
            border = F.pad(torch.zeros(1, *shape), pad, value=value)
            return self.affine(zero, None, border)
        return self.monotone(x, lambda t: F.pad(t, pad, mode=mode), "padding")

    def conv(self, x: _Ref, weight: G.Getter, bias: G.Getter, stride, padding, dilation, groups: int, mode: str = "zeros", one: bool = False) -> _Ref:  # fmt: skip
        shape = self.shape(x)
        if len(shape) != (2 if one else 3):
            raise ValueError(f"model: the convolution at '{self.where}' has an input of shape {shape} per example")
        k = weight().shape[2:]
        n = len(k)
        stride, dilation = ((v,) * n if isinstance(v, int) else tuple(v) for v in (stride, dilation))
        if isinstance(padding, str):
            total = [d * (s - 1) if padding == "same" else 0 for d, s in zip(dilation, k)]
        else:
            padding = (padding,) * n if isinstance(padding, int) else tuple(padding)
            total = [2 * p for p in padding]
        sides = [v for t in reversed(total) for v in (t // 2, t - t // 2)]
        if mode != "zeros" or any(a != b for a, b in zip(sides[::2], sides[1::2])):
            x = self.pad(x, sides, "constant" if mode == "zeros" else mode)
            total = [0] * n
        half = [t // 2 for t in total]
        if one:
            x = self.to_shape(x, (self.shape(x)[0], 1, self.shape(x)[1]))
            stride, dilation, half = (1, *stride), (1, *dilation), [0, *half]
            inner = weight
            weight = lambda: inner().unsqueeze(2)  # noqa: E731
        w = weight()
        out = F.conv2d(self.meta(x)[:1], torch.empty(w.shape, device="meta"), None, stride, half, dilation, groups).shape[1:]
        node = G.Conv((x.index,), tuple(out), self.where, get_weight=weight, get_bias=bias, stride=tuple(stride), padding=tuple(half), dilation=tuple(dilation), groups=groups)  # fmt: skip
        y = self.add(node)
        return self.to_shape(y, (out[0], out[2])) if one else y

    def conv_transpose(self, x: _Ref, weight: G.Getter, bias: G.Getter, stride, padding, extra, groups: int, dilation, one: bool = False) -> _Ref:  # fmt: skip
        values = [(v,) * (1 if one else 2) if isinstance(v, int) else tuple(v) for v in (stride, padding, extra, dilation)]
        if one:
            x = self.to_shape(x, (self.shape(x)[0], 1, self.shape(x)[1]))
            values = [(d, *v) for d, v in zip((1, 0, 0, 1), values)]
            inner = weight
            weight = lambda: inner().unsqueeze(2)  # noqa: E731
        stride, padding, extra, dilation = values
        w = weight()
        out = F.conv_transpose2d(self.meta(x)[:1], torch.empty(w.shape, device="meta"), None, stride, padding, extra, groups, dilation).shape[1:]  # fmt: skip
        node = G.ConvTranspose((x.index,), tuple(out), self.where, get_weight=weight, get_bias=bias, stride=stride, padding=padding, output_padding=extra, dilation=dilation, groups=groups)  # fmt: skip
        y = self.add(node)
        return self.to_shape(y, (out[0], out[2])) if one else y

    def batch_norm(self, x: _Ref, m: nn.Module) -> _Ref:
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
        if isinstance(source, (G.Conv, G.Dense)) and len(source.shape) != 2 and x.index in self.single:
            get_w, get_b = source.get_weight, source.get_bias

            def weight() -> Tensor:
                w = get_w()
                return w * factor().view(-1, *[1] * (w.dim() - 1))

            def bias() -> Tensor:
                b = get_b()
                return shift() if b is None else shift() + factor() * b

            source.get_weight, source.get_bias = weight, bias
            return x
        return self.affine(x, lambda: factor().view(-1, *tail), lambda: shift().view(-1, *tail))

    def avg_pool(self, x: _Ref, m_or_args: tuple, what: str, f: Callable) -> _Ref:
        return self.monotone(x, lambda t: f(t, *m_or_args), what)

    def max_pool(self, x: _Ref, kernel, stride, padding, dilation, ceil_mode: bool, one: bool = False) -> _Ref:
        shape = self.shape(x)
        stride = kernel if stride is None or stride == [] else stride
        values = [v if isinstance(v, int) else tuple(v) for v in (kernel, stride, padding, dilation)]
        if one:
            x = self.to_shape(x, (shape[0], 1, shape[1]))
            values = [(d, v if isinstance(v, int) else v[0]) for d, v in zip((1, 1, 0, 1), values)]
        kernel, stride, padding, dilation = (G.pair(v) for v in values)
        if len(self.shape(x)) != 3:
            raise self.fail("max pooling", f" on an input of shape {shape}")
        node = G.MaxPool((x.index,), (), self.where, kernel=kernel, stride=stride, padding=padding, dilation=dilation, ceil_mode=bool(ceil_mode))  # fmt: skip
        node.shape = tuple(node.pool(self.meta(x)[:1]).shape[1:])
        y = self.add(node)
        return self.to_shape(y, (node.shape[0], node.shape[2])) if one else y

    def add_sub(self, a: Any, b: Any, sign: int) -> _Ref:
        if isinstance(a, _Ref) and isinstance(b, _Ref):
            if self.shape(a) != self.shape(b):
                raise self.fail(f"a sum of shapes {self.shape(a)} and {self.shape(b)}")
            return self.add(G.Sum((a.index, b.index), self.shape(a), self.where, signs=(1, sign)))
        if isinstance(a, _Ref):
            return self.affine(a, None, b if sign > 0 else (-b if isinstance(b, Tensor) else -float(b)))
        return self.affine(b, None if sign > 0 else -1.0, a)

    def multiply(self, a: Any, b: Any) -> _Ref:
        if isinstance(a, _Ref) and isinstance(b, _Ref):
            raise self.fail("a product of two tensors that depend on the input")
        return self.affine(a, b) if isinstance(a, _Ref) else self.affine(b, a)

    def divide(self, a: Any, b: Any) -> _Ref:
        if isinstance(b, _Ref):
            raise self.fail("a division by a tensor that depends on the input")
        return self.affine(a, (lambda: b.double().reciprocal()) if isinstance(b, Tensor) else 1.0 / float(b))

    # -- the walk ------------------------------------------------------------------------------------------------------
    def build(self) -> G.Graph:
        try:
            traced = _Tracer().trace(self.model)
        except UnsupportedLayerError:
            raise
        except Exception as error:
            raise ValueError(f"model: torch.fx cannot trace {type(self.model).__name__} ({error}); its forward must not branch on values") from error  # fmt: skip
        modules = dict(self.model.named_modules(remove_duplicate=False))
        self.single: set[int] = set()  # nodes that one fx node alone reads
        placeholders = [n for n in traced.nodes if n.op == "placeholder"]
        required = [n for n in placeholders if not n.args]
        if len(required) > 1:
            raise ValueError(f"model: forward takes {len(required)} inputs, expected one")
        for n in traced.nodes:
            self.where = n.name
            if n.op == "placeholder":
                self.env[n] = _Ref(0) if n is placeholders[0] else n.args[0]
                continue
            get = lambda v: self.env[v]  # noqa: E731
            args, kwargs = fx.map_arg(n.args, get), fx.map_arg(n.kwargs, get)
            if n.op == "output":
                out = args[0]
                if not isinstance(out, _Ref):
                    raise ValueError(f"model: forward returns {type(out).__name__}, expected one tensor that depends on the input")
                return G.Graph(self.nodes, out.index)
            before = len(self.nodes)
            self.env[n] = self._node(n, args, kwargs, modules)
            value = self.env[n]
            if isinstance(value, _Ref):
                if len(n.users) != 1:
                    self.single.discard(value.index)
                elif len(self.nodes) == before + 1:
                    self.single.add(before)
        raise ValueError("model: no output")

    def _node(self, n: fx.Node, args, kwargs, modules) -> Any:
        if n.op == "get_attr":
            value = self.model
            for part in n.target.split("."):
                value = getattr(value, part)
            return value
        touched = any(isinstance(v, _Ref) for v in _flat((args, tuple(kwargs.values()))))
        if n.op == "call_module":
            m = modules[n.target]
            self.where = n.target
            if m._forward_hooks or m._forward_pre_hooks:
                raise self.fail(type(m).__name__ + " with forward hooks", "; remove them, or use torch.nn.utils.parametrizations")
            if not touched:
                return m(*args, **kwargs)
            handler = _MODULES.get(type(m).forward)
            if handler is None:
                raise self.fail(type(m).__name__)
            return handler(self, m, args[0] if args else next(iter(kwargs.values())))
        if not touched:
            if n.op == "call_method":
                return getattr(args[0], n.target)(*args[1:], **kwargs)
            return n.target(*args, **kwargs)
        handler = (_METHODS if n.op == "call_method" else _FUNCTIONS).get(n.target)
        if handler is None:
            name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", str(n.target))
            raise self.fail(f"{'method' if n.op == 'call_method' else 'function'} {name}")
        return handler(self, *args, **kwargs)


def _flat(v: Any):
    if isinstance(v, (tuple, list)):
        for i in v:
            yield from _flat(i)
    elif isinstance(v, slice):
        yield from (v.start, v.stop, v.step)
    else:
        yield v


# -- modules, by the forward function they run, so that a subclass with its own forward is traced through -------------------
def _dropout(b: _Builder, m: nn.Module, x: _Ref) -> _Ref:
    if m.training and m.p > 0:
        raise ValueError(f"model: {type(m).__name__} at '{b.where}' is in training mode; call model.eval() first")
    return x


def _conv_module(one: bool):
    return lambda b, m, x: b.conv(x, lambda: m.weight, lambda: m.bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode, one)


def _conv_transpose_module(one: bool):
    def handle(b: _Builder, m: nn.Module, x: _Ref) -> _Ref:
        return b.conv_transpose(x, lambda: m.weight, lambda: m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation, one)

    return handle


def _upsample(b: _Builder, m: nn.Upsample, x: _Ref) -> _Ref:
    if m.mode not in ("nearest", "bilinear", "linear", "nearest-exact"):
        raise b.fail(f"Upsample with mode {m.mode}")
    scale = m.scale_factor
    return b.monotone(x, lambda t: F.interpolate(t, m.size, scale, m.mode, m.align_corners), "Upsample")


_MODULES: dict[Any, Callable] = {
    nn.Linear.forward: lambda b, m, x: b.dense(x, lambda: m.weight, lambda: m.bias),
    nn.Conv1d.forward: _conv_module(True),
    nn.Conv2d.forward: _conv_module(False),
    nn.ConvTranspose1d.forward: _conv_transpose_module(True),
    nn.ConvTranspose2d.forward: _conv_transpose_module(False),
    nn.BatchNorm2d.forward: lambda b, m, x: b.batch_norm(x, m),
    nn.Identity.forward: lambda b, m, x: x,
    nn.Dropout.forward: _dropout,
    nn.Dropout1d.forward: _dropout,
    nn.Dropout2d.forward: _dropout,
    nn.AlphaDropout.forward: _dropout,
    nn.Flatten.forward: lambda b, m, x: b.reshape(x, lambda t: t.flatten(m.start_dim, m.end_dim), "Flatten"),
    nn.Unflatten.forward: lambda b, m, x: b.reshape(x, lambda t: t.unflatten(m.dim, m.unflattened_size), "Unflatten"),
    nn.ReLU.forward: lambda b, m, x: b.activation(x, "relu"),
    nn.LeakyReLU.forward: lambda b, m, x: b.activation(x, "leaky_relu", (m.negative_slope,)),
    nn.Hardtanh.forward: lambda b, m, x: b.activation(x, "hardtanh", (m.min_val, m.max_val)),  # ReLU6 is a Hardtanh
    nn.Sigmoid.forward: lambda b, m, x: b.activation(x, "sigmoid"),
    nn.Tanh.forward: lambda b, m, x: b.activation(x, "tanh"),
    nn.Softplus.forward: lambda b, m, x: b.activation(x, "softplus", (m.beta, m.threshold)),
    nn.ELU.forward: lambda b, m, x: b.activation(x, "elu", (m.alpha,)),
    nn.SiLU.forward: lambda b, m, x: b.activation(x, "silu"),
    nn.GELU.forward: lambda b, m, x: b.activation(x, "gelu_tanh" if m.approximate == "tanh" else "gelu"),
    nn.AvgPool1d.forward: lambda b, m, x: b.avg_pool(
        x, (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad), "AvgPool1d", F.avg_pool1d
    ),
    nn.AvgPool2d.forward: lambda b, m, x: b.avg_pool(
        x, (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override), "AvgPool2d", F.avg_pool2d
    ),
    nn.AdaptiveAvgPool1d.forward: lambda b, m, x: b.avg_pool(x, (m.output_size,), "AdaptiveAvgPool1d", F.adaptive_avg_pool1d),
    nn.AdaptiveAvgPool2d.forward: lambda b, m, x: b.avg_pool(x, (m.output_size,), "AdaptiveAvgPool2d", F.adaptive_avg_pool2d),
    nn.MaxPool1d.forward: lambda b, m, x: b.max_pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, True),
    nn.MaxPool2d.forward: lambda b, m, x: b.max_pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode),
    nn.Upsample.forward: _upsample,
}
_PAD_MODES = {nn.ReflectionPad1d: "reflect", nn.ReflectionPad2d: "reflect", nn.ReplicationPad1d: "replicate", nn.ReplicationPad2d: "replicate", nn.CircularPad1d: "circular", nn.CircularPad2d: "circular"}  # fmt: skip


def _pad_module(b: _Builder, m: nn.Module, x: _Ref) -> _Ref:
    for kind, mode in _PAD_MODES.items():
        if isinstance(m, kind):
            return b.pad(x, list(m.padding), mode)
    return b.pad(x, list(m.padding), "constant", float(getattr(m, "value", 0.0)))


for _m in (*_PAD_MODES, nn.ConstantPad1d, nn.ConstantPad2d, nn.ZeroPad2d, nn.ZeroPad1d):
    _MODULES[_m.forward] = _pad_module


# -- functions and methods ---------------------------------------------------------------------------------------------------
def _functional_dropout(b: _Builder, x: _Ref, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Ref:
    if training and p > 0:
        raise ValueError(f"model: dropout at '{b.where}' runs with training=True; pass training=self.training and call model.eval()")
    return x


def _cat(b: _Builder, tensors, dim: int = 0) -> _Ref:
    refs = list(tensors)
    if not all(isinstance(t, _Ref) for t in refs):
        raise b.fail("cat with a constant tensor")
    n = len(b.shape(refs[0])) + 1
    dim = dim % n
    if dim == 0:
        raise b.fail("cat over the batch dimension")
    shape = torch.cat([b.meta(t) for t in refs], dim).shape[1:]
    return b.add(G.Concat(tuple(t.index for t in refs), tuple(shape), b.where, dim=dim - 1))


def _getitem(b: _Builder, x: Any, index: Any) -> Any:
    if not isinstance(x, _Ref):
        return operator.getitem(x, index)
    index = index if isinstance(index, tuple) else (index,)
    if index and index[0] is Ellipsis:
        index = (slice(None),) * (len(b.shape(x)) + 2 - len(index)) + index[1:]
    if not index or index[0] != slice(None):
        raise b.fail("a slice of the batch dimension")
    return b.monotone(x, lambda t: t[index], "a slice")


def _positive_only(name: str, f: Callable) -> Callable:
    return lambda b, x, *a, **k: b.monotone(x, lambda t: f(t, *a, **k), name)


def _reshape(b: _Builder, x: _Ref, *shape) -> _Ref:
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    return b.reshape(x, lambda t: t.reshape(shape), "reshape")


def _size(b: _Builder, x: _Ref, dim: int | None = None):
    shape = torch.Size((PROBE, *b.shape(x)))
    return shape if dim is None else shape[dim]


def _getattr(b: _Builder, x: Any, name: str):
    if name == "shape":
        return _size(b, x)
    if name == "ndim":
        return len(b.shape(x)) + 1
    if name in ("dtype", "device"):
        p = next(b.model.parameters(), None)
        return getattr(p, name) if p is not None else (torch.float32 if name == "dtype" else torch.device("cpu"))
    raise b.fail(f"attribute {name}")


def _batch_norm(b, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training:
        raise ValueError(f"model: batch_norm at '{b.where}' runs with training=True; call model.eval() first")
    tail = (1,) * (len(b.shape(x)) - 1)
    f = lambda: torch.rsqrt(var + eps) * (1.0 if weight is None else weight)  # noqa: E731
    s = lambda: -mean * f() + (0.0 if bias is None else bias)  # noqa: E731
    return b.affine(x, lambda: f().view(-1, *tail), lambda: s().view(-1, *tail))


def _conv2d(b, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, one=False):
    return b.conv(x, lambda: weight, lambda: bias, stride, padding, dilation, groups, "zeros", one)


def _max_pool2d(b, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False, one=False):
    return b.max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, one)


def _softplus(b, x, beta=1.0, threshold=20.0):
    return b.activation(x, "softplus", (beta, threshold))


def _gelu(b, x, approximate="none"):
    return b.activation(x, "gelu_tanh" if approximate == "tanh" else "gelu")


def _clamp(b, x, min=None, max=None):
    if min is None or isinstance(min, Tensor) or isinstance(max, Tensor):
        raise b.fail("clamp without a constant min")
    if max is None:
        moved = b.affine(x, None, -float(min)) if min else x
        y = b.activation(moved, "relu")
        return b.affine(y, None, float(min)) if min else y
    return b.activation(x, "hardtanh", (min, max))


_RELU = lambda b, x, inplace=False: b.activation(x, "relu")  # noqa: E731
_SIGMOID = lambda b, x: b.activation(x, "sigmoid")  # noqa: E731
_TANH = lambda b, x: b.activation(x, "tanh")  # noqa: E731
_ATAN = lambda b, x: b.activation(x, "arctan")  # noqa: E731
_ADD = lambda b, a, c, alpha=1: b.add_sub(a, c, 1) if alpha == 1 else b.add_sub(a, b.multiply(c, alpha) if isinstance(c, _Ref) else c * alpha, 1)  # noqa: E731, E501  # fmt: skip
_SUB = lambda b, a, c, alpha=1: b.add_sub(a, c, -1) if alpha == 1 else b.add_sub(a, b.multiply(c, alpha) if isinstance(c, _Ref) else c * alpha, -1)  # noqa: E731, E501  # fmt: skip
_MUL = lambda b, a, c: b.multiply(a, c)  # noqa: E731
_DIV = lambda b, a, c: b.divide(a, c)  # noqa: E731
_NEG = lambda b, a: b.affine(a, -1.0)  # noqa: E731
_FLATTEN = lambda b, x, start_dim=0, end_dim=-1: b.reshape(x, lambda t: t.flatten(start_dim, end_dim), "flatten")  # noqa: E731
_SAME = lambda b, x, *a, **k: x  # noqa: E731

_FUNCTIONS: dict[Any, Callable] = {
    operator.add: _ADD, operator.iadd: _ADD, torch.add: _ADD, operator.sub: _SUB, operator.isub: _SUB, torch.sub: _SUB,
    operator.mul: _MUL, operator.imul: _MUL, torch.mul: _MUL, operator.truediv: _DIV, torch.div: _DIV, operator.neg: _NEG,
    operator.getitem: _getitem, getattr: _getattr,
    torch.cat: _cat, torch.concat: _cat, torch.flatten: _FLATTEN, torch.reshape: _reshape,
    torch.permute: lambda b, x, dims: b.monotone(x, lambda t: t.permute(dims), "permute"),
    torch.transpose: _positive_only("transpose", torch.transpose),
    torch.squeeze: lambda b, x, *a: b.reshape(x, lambda t: torch.squeeze(t, *a), "squeeze"),
    torch.unsqueeze: lambda b, x, dim: b.reshape(x, lambda t: torch.unsqueeze(t, dim), "unsqueeze"),
    torch.mean: _positive_only("mean", torch.mean), torch.sum: _positive_only("sum", torch.sum),
    torch.relu: _RELU, F.relu: _RELU, torch.sigmoid: _SIGMOID, F.sigmoid: _SIGMOID, torch.tanh: _TANH, F.tanh: _TANH,
    torch.atan: _ATAN, torch.arctan: _ATAN, F.softplus: _softplus, F.gelu: _gelu, torch.clamp: _clamp,
    F.leaky_relu: lambda b, x, negative_slope=0.01, inplace=False: b.activation(x, "leaky_relu", (negative_slope,)),
    F.relu6: lambda b, x, inplace=False: b.activation(x, "relu6"),
    F.hardtanh: lambda b, x, min_val=-1.0, max_val=1.0, inplace=False: b.activation(x, "hardtanh", (min_val, max_val)),
    F.elu: lambda b, x, alpha=1.0, inplace=False: b.activation(x, "elu", (alpha,)),
    F.silu: lambda b, x, inplace=False: b.activation(x, "silu"),
    F.linear: lambda b, x, w, bias=None: b.dense(x, lambda: w, lambda: bias),
    F.conv2d: _conv2d, torch.conv2d: _conv2d,
    F.conv1d: lambda b, *a, **k: _conv2d(b, *a, **k, one=True),
    F.batch_norm: _batch_norm, F.dropout: _functional_dropout,
    F.max_pool2d: _max_pool2d, torch.max_pool2d: _max_pool2d, F.max_pool1d: lambda b, *a, **k: _max_pool2d(b, *a, **k, one=True),
    F.avg_pool2d: _positive_only("avg_pool2d", F.avg_pool2d), F.avg_pool1d: _positive_only("avg_pool1d", F.avg_pool1d),
    F.adaptive_avg_pool2d: _positive_only("adaptive_avg_pool2d", F.adaptive_avg_pool2d),
    F.pad: lambda b, x, pad, mode="constant", value=None: b.pad(x, list(pad), mode, float(value or 0.0)),
}  # fmt: skip
_METHODS: dict[str, Callable] = {
    "add": _ADD, "add_": _ADD, "sub": _SUB, "mul": _MUL, "div": _DIV, "neg": _NEG, "relu": _RELU, "sigmoid": _SIGMOID, "tanh": _TANH,
    "relu_": _RELU, "atan": _ATAN, "arctan": _ATAN, "clamp": _clamp, "view": _reshape, "reshape": _reshape, "flatten": _FLATTEN,
    "size": _size, "dim": lambda b, x: len(b.shape(x)) + 1, "contiguous": _SAME, "float": _SAME, "clone": _SAME,
    "permute": lambda b, x, *d: b.monotone(x, lambda t: t.permute(*d), "permute"),
    "transpose": _positive_only("transpose", torch.transpose),
    "squeeze": lambda b, x, *a: b.reshape(x, lambda t: t.squeeze(*a), "squeeze"),
    "unsqueeze": lambda b, x, d: b.reshape(x, lambda t: t.unsqueeze(d), "unsqueeze"),
    "mean": _positive_only("mean", torch.mean), "sum": _positive_only("sum", torch.sum),
}  # fmt: skip

_CACHE: weakref.WeakKeyDictionary[nn.Module, tuple[Any, G.Graph]] = weakref.WeakKeyDictionary()
_PLAIN = (int, float, str, bool, tuple, type(None))


def _fingerprint(model: nn.Module) -> tuple:
    """Changes whenever a traced graph could: modules replaced, modes switched, plain attributes or hooks changed."""
    out: list[Any] = []
    for m in model.modules():
        out.append(id(m))
        for k, v in m.__dict__.items():
            if isinstance(v, _PLAIN):
                out.append((k, v))
            elif isinstance(v, Tensor):
                out.append(id(v))
        out.append((len(m._forward_hooks), len(m._forward_pre_hooks)))
        for held in (m._modules, m._parameters, m._buffers):
            out.extend(map(id, held.values()))
    return tuple(out)


def trace(model: nn.Module, shape: tuple[int, ...]) -> G.Graph:
    """The graph of ``model`` for inputs of shape (B, *shape)."""
    key = (shape, _fingerprint(model))
    hit = _CACHE.get(model)
    if hit is not None and hit[0] == key:
        return hit[1]
    if model._forward_hooks or model._forward_pre_hooks:
        raise _unsupported(type(model).__name__ + " with forward hooks", "model")
    built = _Builder(model, shape).build()
    _CACHE[model] = (key, built)
    return built


__all__ = ["SUPPORTED", "UnsupportedLayerError", "trace"]
