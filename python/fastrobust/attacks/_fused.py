"""Layers of a prepared victim: only the input has a gradient, and what follows a convolution happens in its write."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .._places import wave

Clamp = tuple[float, float]  # ReLU is (0, inf), ReLU6 (0, 6)
Kernel = Callable[..., Tensor]
Maker = Callable[[], Kernel]

RELU: Clamp = (0.0, math.inf)
_ROUNDS = 3
_HOPELESS = 1.3  # that many times the fastest: not timed again
_NEAR = 1e-3  # of the largest value: float32 sums in another order are nearer


def clamped_(x: Tensor, clamp: Clamp) -> Tensor:
    """In place."""
    return torch.relu_(x) if clamp == RELU else F.hardtanh_(x, *clamp)


def clamp_gradient(grad: Tensor, out: Tensor, clamp: Clamp, own: bool) -> Tensor:
    """The gradient before the clamp, from its output. ``own``: nobody else reads grad, which is written over."""
    own = own and grad.stride() == out.stride()
    if clamp == RELU:
        if own:
            return torch.ops.aten.threshold_backward.grad_input(grad, out, 0, grad_input=grad)
        return torch.ops.aten.threshold_backward(grad, out, 0)
    if own:
        return torch.ops.aten.hardtanh_backward.grad_input(grad, out, *clamp, grad_input=grad)
    return torch.ops.aten.hardtanh_backward(grad, out, *clamp)


class _Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Affine) -> Tensor:
        out = layer.compute(x)
        ctx.layer = layer
        if layer.clamp is not None:
            ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        layer: Affine = ctx.layer
        scale, _ = layer.sides(grad)
        if layer.clamp is None:
            return grad * scale, None
        grad = clamp_gradient(grad, ctx.saved_tensors[0], layer.clamp, layer.owns_gradient)
        return grad.mul_(scale), None


class Affine(nn.Module):
    """``scale x + shift`` for each channel (batch normalisation in eval mode) and a clamp behind it."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.clamp: Clamp | None = None
        self.owns_gradient = False

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *(1,) * (x.dim() - 2))
        return self.scale.view(shape), self.shift.view(shape)

    def compute(self, x: Tensor) -> Tensor:
        scale, shift = self.sides(x)
        out = torch.addcmul(shift, x, scale)
        return out if self.clamp is None else clamped_(out, self.clamp)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            found: Tensor = _Affine.apply(x, self)
            return found
        return self.compute(x)


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, other: Tensor | None, layer: FusedConv) -> Tensor:
        out = layer.compute(x, other)
        ctx.layer, ctx.shape = layer, x.shape
        if layer.clamp is not None:
            ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        layer: FusedConv = ctx.layer
        if layer.clamp is not None:
            grad = clamp_gradient(grad, ctx.saved_tensors[0], layer.clamp, layer.owns_gradient)
        before = layer.gradient(grad, ctx.shape) if ctx.needs_input_grad[0] else None
        return before, grad if ctx.needs_input_grad[1] else None, None


class FusedConv(nn.Module):
    """``clamp(conv(x) + other)``. The kernels of both directions are those that were fastest on maps of the sizes that
    ``choose`` was given: torch's own, oneDNN's with weights that were put in order once, and for the gradient a turned
    convolution (stride 1) or a matrix product (1x1)."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, conv: nn.Conv2d, clamp: Clamp | None) -> None:
        super().__init__()
        weight = conv.weight.detach().contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self.stride, self.dilation, self.groups = conv.stride, conv.dilation, conv.groups
        self.padding: Any = conv.padding
        self.clamp = clamp
        self.owns_gradient = False
        self.kernels = {"forward": "aten", "gradient": "aten"}
        self.run: Kernel = self._aten
        self.gradient: Kernel = self._aten_gradient

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or (other is not None and other.requires_grad)):
            found: Tensor = _Conv.apply(x, other, self)
            return found
        return self.compute(x, other)

    def compute(self, x: Tensor, other: Tensor | None) -> Tensor:
        return self.run(x, other)

    # ---- kernels ----

    def _finish(self, out: Tensor, other: Tensor | None) -> Tensor:
        if other is not None:
            out += other
        return out if self.clamp is None else clamped_(out, self.clamp)

    def _aten(self, x: Tensor, other: Tensor | None) -> Tensor:
        out = torch.convolution(
            x, self.weight, self.bias, self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        )
        return self._finish(out, other)

    def _aten_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        like = grad.new_empty(()).expand(shape)  # its values do not matter
        found: Tensor = torch.ops.aten.convolution_backward(
            grad, like, self.weight, None, self.stride, self.padding, self.dilation, False, (0, 0), self.groups,
            (True, False, False),
        )[0]  # fmt: skip
        return found

    def _product_gradient(self, grad: Tensor, shape: torch.Size) -> Tensor:
        rows = grad.permute(0, 2, 3, 1).reshape(-1, grad.shape[1])
        return (rows @ self.weight.flatten(1)).view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)

    def _packed(self, shape: torch.Size) -> Kernel:
        ops = torch.ops.mkldnn
        weight = ops._reorder_convolution_weight(
            self.weight, self.padding, self.stride, self.dilation, self.groups, list(shape)
        )
        geometry = self.padding, self.stride, self.dilation, self.groups
        name, numbers = _named(self.clamp)

        def run(x: Tensor, other: Tensor | None) -> Tensor:
            if other is None:
                found: Tensor = ops._convolution_pointwise(x, weight, self.bias, *geometry, name, numbers, "")
                return found
            if self.clamp in (None, RELU):
                unary = None if self.clamp is None else "relu"
                summed: Tensor = ops._convolution_pointwise.binary(
                    x, other, weight, self.bias, *geometry, "add", 1.0, unary, [], None
                )
                return summed
            return self._finish(ops._convolution_pointwise(x, weight, self.bias, *geometry, "none", [], ""), other)

        return run

    def _turned(self, shape: torch.Size) -> Kernel:
        """The gradient of a convolution of stride 1 is a convolution with the kernel turned around."""
        padding = [d * (k - 1) - p for d, k, p in zip(self.dilation, self.weight.shape[2:], self.padding, strict=True)]
        turned = self.weight.flip(2, 3).unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)
        turned = turned.contiguous(memory_format=torch.channels_last)
        ops, geometry = torch.ops.mkldnn, (padding, self.stride, self.dilation, self.groups)
        weight = ops._reorder_convolution_weight(turned, *geometry, list(shape))

        def run(grad: Tensor, _: torch.Size) -> Tensor:
            found: Tensor = ops._convolution_pointwise(grad, weight, None, *geometry, "none", [], "")
            return found

        return run

    def _transposed(self, shape: torch.Size, inputs: torch.Size) -> Kernel:
        sizes = zip(inputs[2:], self.padding, self.dilation, self.weight.shape[2:], self.stride, strict=True)
        rest = [(n + 2 * p - d * (k - 1) - 1) % s for n, p, d, k, s in sizes]
        ops, geometry = torch.ops.mkldnn, (self.padding, rest, self.stride, self.dilation, self.groups)
        weight = ops._reorder_convolution_transpose_weight(self.weight, *geometry, list(shape))

        def run(grad: Tensor, inputs: torch.Size) -> Tensor:
            found: Tensor = ops._convolution_transpose_pointwise(grad, weight, None, *geometry, "none", [], "")
            return found

        return run

    def _planes(self) -> Kernel:
        """Torch's own convolution in its first layout, which is faster where maps are small and channels many."""
        weight = self.weight.contiguous()

        def run(x: Tensor, other: Tensor | None) -> Tensor:
            out = torch.convolution(
                x.contiguous(), weight, self.bias, self.stride, self.padding, self.dilation, False, (0, 0), self.groups
            )
            return self._finish(out.contiguous(memory_format=torch.channels_last), other)

        return run

    def _planes_gradient(self) -> Kernel:
        weight = self.weight.contiguous()

        def run(grad: Tensor, shape: torch.Size) -> Tensor:
            found: Tensor = torch.ops.aten.convolution_backward(
                grad.contiguous(), grad.new_empty(shape), weight, None, self.stride, self.padding, self.dilation, False,
                (0, 0), self.groups, (True, False, False),
            )[0]  # fmt: skip
            return found.contiguous(memory_format=torch.channels_last)

        return run

    def _makers(self, shape: torch.Size, out: torch.Size) -> tuple[dict[str, Maker], dict[str, Maker]]:
        """The other kernels there are for this layer, for outputs and for gradients."""
        kernel = self.weight.shape[2:]
        forwards: dict[str, Maker] = {"packed": lambda: self._packed(shape), "planes": self._planes}
        backwards: dict[str, Maker] = {
            "transposed": lambda: self._transposed(out, shape),
            "planes": self._planes_gradient,
        }
        if tuple(self.stride) == (1, 1):
            if all(p <= d * (k - 1) for p, d, k in zip(self.padding, self.dilation, kernel, strict=True)):
                backwards["turned"] = lambda: self._turned(out)
            if tuple(kernel) == (1, 1) and self.groups == 1 and not any(self.padding):
                backwards["product"] = lambda: self._product_gradient
        return forwards, backwards

    @torch.no_grad()
    def choose(self, shape: torch.Size, other: bool, names: dict[str, str] | None = None) -> None:
        """Takes the fastest kernels for inputs of that shape (those that compute something else are left out), or those
        of ``names``."""
        if not packs(self.weight):
            return
        x = wave(self.weight.new_empty(shape)).contiguous(memory_format=torch.channels_last)
        out = self._aten(x, None)
        makers = self._makers(shape, out.shape)
        if names is not None:
            for key, own, makes in (("forward", self._aten, makers[0]), ("gradient", self._aten_gradient, makers[1])):
                kernel = makes[names[key]]() if names[key] != "aten" else own
                setattr(self, "run" if key == "forward" else "gradient", kernel)
            self.kernels = dict(names)
            return
        second = x.new_zeros(()).expand(out.shape).clone(memory_format=torch.channels_last) if other else None
        grad = wave(out).contiguous(memory_format=torch.channels_last)
        self.kernels["forward"], self.run = _fastest(self._aten, makers[0], (x, second))
        self.kernels["gradient"], self.gradient = _fastest(self._aten_gradient, makers[1], (grad, x.shape))


def packs(weight: Tensor) -> bool:
    """Whether oneDNN's convolutions with reordered weights are there for it."""
    ready = weight.is_cpu and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    names = ("_reorder_convolution_weight", "_reorder_convolution_transpose_weight", "_convolution_pointwise",
             "_convolution_transpose_pointwise")  # fmt: skip
    return ready and bool(torch.backends.mkldnn.enabled) and all(hasattr(torch.ops.mkldnn, name) for name in names)


def _named(clamp: Clamp | None) -> tuple[str, list[float]]:
    if clamp is None:
        return "none", []
    return ("relu", []) if clamp == RELU else ("hardtanh", list(clamp))


def _fastest(own: Kernel, makes: dict[str, Maker], given: tuple[Any, ...]) -> tuple[str, Kernel]:
    want = own(*given)
    room = _NEAR * float(want.abs().amax()) if want.numel() else 0.0
    kernels = {"aten": own}
    for name, make in makes.items():
        try:
            kernel = make()
            got = kernel(*given)
        except RuntimeError:  # a shape that oneDNN does not take
            continue
        if got.shape == want.shape and float((got - want).abs().amax()) <= room:
            kernels[name] = kernel
    took = dict.fromkeys(kernels, math.inf)
    for k in range(_ROUNDS):
        least = min(took.values())
        for name, kernel in kernels.items():
            if k > 1 and took[name] > _HOPELESS * least:  # the first run is also the warm-up
                continue
            start = time.perf_counter()
            kernel(*given)
            took[name] = min(took[name], time.perf_counter() - start)
    best = min(took, key=took.__getitem__)
    return best, kernels[best]
