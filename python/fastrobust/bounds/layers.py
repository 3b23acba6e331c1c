"""Which layers, functions and methods are supported, and what each becomes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from fastrobust.bounds import graph as G
from fastrobust.bounds.builder import PROBE, Builder, Ref


# -- modules, by the forward function they run, so that a subclass with its own forward is traced through -------------------
def _dropout(b: Builder, m: Any, x: Ref) -> Ref:
    if m.training and m.p > 0:
        raise ValueError(f"model: {type(m).__name__} at '{b.where}' is in training mode; call model.eval() first")
    return x


def _conv_module(one: bool) -> Callable[..., Any]:
    return lambda b, m, x: b.conv(
        x, lambda: m.weight, lambda: m.bias, m.stride, m.padding, m.dilation, m.groups, m.padding_mode, one
    )


def _conv_transpose_module(one: bool) -> Callable[..., Any]:
    def handle(b: Builder, m: Any, x: Ref) -> Ref:
        return b.conv_transpose(
            x, lambda: m.weight, lambda: m.bias, m.stride, m.padding, m.output_padding, m.groups, m.dilation, one
        )

    return handle


def _upsample(b: Builder, m: Any, x: Ref) -> Ref:
    if m.mode not in ("nearest", "bilinear", "linear", "nearest-exact"):
        raise b.fail(f"Upsample with mode {m.mode}")
    scale = m.scale_factor
    return b.monotone(x, lambda t: F.interpolate(t, m.size, scale, m.mode, m.align_corners), "Upsample", True)


MODULES: dict[Any, Callable[..., Any]] = {
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
        x,
        (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override),
        "AvgPool2d",
        F.avg_pool2d,
    ),
    nn.AdaptiveAvgPool1d.forward: lambda b, m, x: b.avg_pool(
        x, (m.output_size,), "AdaptiveAvgPool1d", F.adaptive_avg_pool1d
    ),
    nn.AdaptiveAvgPool2d.forward: lambda b, m, x: b.avg_pool(
        x, (m.output_size,), "AdaptiveAvgPool2d", F.adaptive_avg_pool2d
    ),
    nn.MaxPool1d.forward: lambda b, m, x: b.max_pool(
        x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, True
    ),
    nn.MaxPool2d.forward: lambda b, m, x: b.max_pool(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode),
    nn.Upsample.forward: _upsample,
}
_PAD_MODES: dict[Any, str] = {nn.ReflectionPad1d: "reflect", nn.ReflectionPad2d: "reflect", nn.ReplicationPad1d: "replicate", nn.ReplicationPad2d: "replicate", nn.CircularPad1d: "circular", nn.CircularPad2d: "circular"}  # fmt: skip


def _pad_module(b: Builder, m: Any, x: Ref) -> Ref:
    for kind, mode in _PAD_MODES.items():
        if isinstance(m, kind):
            return b.pad(x, list(m.padding), mode)
    return b.pad(x, list(m.padding), "constant", float(getattr(m, "value", 0.0)))


_PADS: tuple[Any, ...] = (*_PAD_MODES, nn.ConstantPad1d, nn.ConstantPad2d, nn.ZeroPad2d, nn.ZeroPad1d)
for _pad in _PADS:
    MODULES[_pad.forward] = _pad_module


# -- functions and methods ---------------------------------------------------------------------------------------------------
def _functional_dropout(b: Builder, x: Ref, p: float = 0.5, training: bool = True, inplace: bool = False) -> Ref:
    if training and p > 0:
        raise ValueError(
            f"model: dropout at '{b.where}' runs with training=True; pass training=self.training and call model.eval()"
        )
    return x


def _cat(b: Builder, tensors: Any, dim: int = 0) -> Ref:
    refs = list(tensors)
    if not all(isinstance(t, Ref) for t in refs):
        raise b.fail("cat with a constant tensor")
    n = len(b.shape(refs[0])) + 1
    dim = dim % n
    if dim == 0:
        raise b.fail("cat over the batch dimension")
    shape = torch.cat([b.meta(t) for t in refs], dim).shape[1:]
    return b.add(G.Concat(tuple(t.index for t in refs), tuple(shape), b.where, dim=dim - 1))


def _getitem(b: Builder, x: Any, index: Any) -> Any:
    if not isinstance(x, Ref):
        return operator.getitem(x, index)
    index = index if isinstance(index, tuple) else (index,)
    if index and index[0] is Ellipsis:
        index = (slice(None),) * (len(b.shape(x)) + 2 - len(index)) + index[1:]
    if not index or index[0] != slice(None):
        raise b.fail("a slice of the batch dimension")
    return b.monotone(x, lambda t: t[index], "a slice")


def _positive_only(name: str, f: Callable[..., Any], sums: bool = False) -> Callable[..., Any]:
    return lambda b, x, *a, **k: b.monotone(x, lambda t: f(t, *a, **k), name, sums)


def _reshape(b: Builder, x: Ref, *shape: Any) -> Ref:
    shape = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list, torch.Size)) else shape
    return b.reshape(x, lambda t: t.reshape(shape), "reshape")


def _size(b: Builder, x: Ref, dim: int | None = None) -> Any:
    shape = torch.Size((PROBE, *b.shape(x)))
    return shape if dim is None else shape[dim]


def _getattr(b: Builder, x: Any, name: str) -> Any:
    if name == "shape":
        return _size(b, x)
    if name == "ndim":
        return len(b.shape(x)) + 1
    if name in ("dtype", "device"):
        p = next(b.model.parameters(), None)
        return getattr(p, name) if p is not None else (torch.float32 if name == "dtype" else torch.device("cpu"))
    raise b.fail(f"attribute {name}")


def _batch_norm(b: Builder, x: Ref, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Ref:  # fmt: skip
    if training:
        raise ValueError(f"model: batch_norm at '{b.where}' runs with training=True; call model.eval() first")
    tail = (1,) * (len(b.shape(x)) - 1)
    f = lambda: torch.rsqrt(var + eps) * (1.0 if weight is None else weight)  # noqa: E731
    s = lambda: -mean * f() + (0.0 if bias is None else bias)  # noqa: E731
    size = lambda: ((mean * f()).abs() + (0.0 if bias is None else bias.abs())).view(-1, *tail)  # noqa: E731
    return b.affine(x, lambda: f().view(-1, *tail), lambda: s().view(-1, *tail), size)


def _conv2d(b: Builder, x: Ref, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1, one: bool = False) -> Ref:  # fmt: skip
    return b.conv(x, lambda: weight, lambda: bias, stride, padding, dilation, groups, "zeros", one)


def _max_pool2d(b: Builder, x: Ref, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False, return_indices: bool = False, one: bool = False) -> Ref:  # fmt: skip
    return b.max_pool(x, kernel_size, stride, padding, dilation, ceil_mode, one)


def _avg_pool2d(b: Builder, x: Ref, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None) -> Ref:  # fmt: skip
    return b.avg_pool(
        x, (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override), "avg_pool2d", F.avg_pool2d
    )


def _softplus(b: Builder, x: Ref, beta: float = 1.0, threshold: float = 20.0) -> Ref:
    return b.activation(x, "softplus", (beta, threshold))


def _gelu(b: Builder, x: Ref, approximate: str = "none") -> Ref:
    return b.activation(x, "gelu_tanh" if approximate == "tanh" else "gelu")


def _clamp(b: Builder, x: Ref, min: Any = None, max: Any = None) -> Ref:
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
_ADD = lambda b, a, c, alpha=1: b.add_sub(a, c, 1) if alpha == 1 else b.add_sub(a, b.multiply(c, alpha) if isinstance(c, Ref) else c * alpha, 1)  # noqa: E731, E501  # fmt: skip
_SUB = lambda b, a, c, alpha=1: b.add_sub(a, c, -1) if alpha == 1 else b.add_sub(a, b.multiply(c, alpha) if isinstance(c, Ref) else c * alpha, -1)  # noqa: E731, E501  # fmt: skip
_MUL = lambda b, a, c: b.multiply(a, c)  # noqa: E731
_DIV = lambda b, a, c: b.divide(a, c)  # noqa: E731
_NEG = lambda b, a: b.affine(a, -1.0)  # noqa: E731
_FLATTEN = lambda b, x, start_dim=0, end_dim=-1: b.reshape(x, lambda t: t.flatten(start_dim, end_dim), "flatten")  # noqa: E731
_SAME = lambda b, x, *a, **k: x  # noqa: E731

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    operator.add: _ADD, operator.iadd: _ADD, torch.add: _ADD, operator.sub: _SUB, operator.isub: _SUB, torch.sub: _SUB,
    operator.mul: _MUL, operator.imul: _MUL, torch.mul: _MUL, operator.truediv: _DIV, torch.div: _DIV, operator.neg: _NEG,
    operator.getitem: _getitem, getattr: _getattr,
    torch.cat: _cat, torch.concat: _cat, torch.flatten: _FLATTEN, torch.reshape: _reshape,
    torch.permute: lambda b, x, dims: b.monotone(x, lambda t: t.permute(dims), "permute"),
    torch.transpose: _positive_only("transpose", torch.transpose),
    torch.squeeze: lambda b, x, *a: b.reshape(x, lambda t: torch.squeeze(t, *a), "squeeze"),
    torch.unsqueeze: lambda b, x, dim: b.reshape(x, lambda t: torch.unsqueeze(t, dim), "unsqueeze"),
    torch.mean: _positive_only("mean", torch.mean, True), torch.sum: _positive_only("sum", torch.sum, True),
    torch.relu: _RELU, F.relu: _RELU, torch.sigmoid: _SIGMOID, F.sigmoid: _SIGMOID, torch.tanh: _TANH, F.tanh: _TANH,
    torch.atan: _ATAN, torch.arctan: _ATAN, F.softplus: _softplus, F.gelu: _gelu, torch.clamp: _clamp,
    F.leaky_relu: lambda b, x, negative_slope=0.01, inplace=False: b.activation(x, "leaky_relu", (negative_slope,)),
    F.relu6: lambda b, x, inplace=False: b.activation(x, "relu6"),
    F.hardtanh: lambda b, x, min_val=-1.0, max_val=1.0, inplace=False: b.activation(x, "hardtanh", (min_val, max_val)),
    F.elu: lambda b, x, alpha=1.0, inplace=False: b.activation(x, "elu", (alpha,)),
    F.silu: lambda b, x, inplace=False: b.activation(x, "silu"),
    F.linear: lambda b, x, w, bias=None: b.dense(x, lambda: w, lambda: bias),
    F.conv2d: _conv2d, torch.conv2d: _conv2d,
    F.conv1d: lambda b, *a, **k: _conv2d(b, *a, **{**k, "one": True}),
    F.batch_norm: _batch_norm, F.dropout: _functional_dropout,
    F.max_pool2d: _max_pool2d, torch.max_pool2d: _max_pool2d, F.max_pool1d: lambda b, *a, **k: _max_pool2d(b, *a, **{**k, "one": True}),
    F.avg_pool2d: _avg_pool2d, F.avg_pool1d: _positive_only("avg_pool1d", F.avg_pool1d, True),
    F.adaptive_avg_pool2d: lambda b, x, size: b.avg_pool(x, (size,), "adaptive_avg_pool2d", F.adaptive_avg_pool2d),
    F.pad: lambda b, x, pad, mode="constant", value=None: b.pad(x, list(pad), mode, float(value or 0.0)),
}  # fmt: skip
METHODS: dict[str, Callable[..., Any]] = {
    "add": _ADD, "add_": _ADD, "sub": _SUB, "mul": _MUL, "div": _DIV, "neg": _NEG, "relu": _RELU, "sigmoid": _SIGMOID, "tanh": _TANH,
    "relu_": _RELU, "atan": _ATAN, "arctan": _ATAN, "clamp": _clamp, "view": _reshape, "reshape": _reshape, "flatten": _FLATTEN,
    "size": _size, "dim": lambda b, x: len(b.shape(x)) + 1, "contiguous": _SAME, "float": _SAME, "clone": _SAME, "to": _SAME, "type_as": _SAME,
    "permute": lambda b, x, *d: b.monotone(x, lambda t: t.permute(*d), "permute"),
    "transpose": _positive_only("transpose", torch.transpose),
    "squeeze": lambda b, x, *a: b.reshape(x, lambda t: t.squeeze(*a), "squeeze"),
    "unsqueeze": lambda b, x, d: b.reshape(x, lambda t: t.unsqueeze(d), "unsqueeze"),
    "mean": _positive_only("mean", torch.mean, True), "sum": _positive_only("sum", torch.sum, True),
}  # fmt: skip
