"""The operations of a region on feature maps: convolutions with what follows them, pooling, concatenation.

Values are numbered: node i makes value i, and -1 - i is the i-th input of the region. A value lies in the fast layout
("sparse" nodes) or in a plain channels_last tensor ("dense" nodes, which torch runs), or in both where both are read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.binary import _conv_cost as cost
from ..ops.binary import _feature_maps as fm
from ..ops.binary._activation import NONE, Act
from ..ops.binary._dense_conv import dense_weight
from ..ops.binary._feature_maps import ConvGeometry
from ..reference.binary import PackedWeight

Size = tuple[int, int, int]  # channels, height, width
_WHOLE = ConvGeometry()


@dataclasses.dataclass(eq=False)
class Node:
    name: str
    source: int

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,)

    def out_size(self, sizes: dict[int, Size]) -> Size:
        raise NotImplementedError

    def cost(self, count: int, sizes: dict[int, Size], out: Size, lanes: int) -> cost.Choice:
        """Estimates of a forward and a gradient in both forms: as many passes over what is read and written."""
        floats = count * (sum(math.prod(sizes[v]) for v in self.reads) + math.prod(out))
        return cost.passes(floats, lanes)


@dataclasses.dataclass(eq=False)
class Unit(Node):
    """act(conv(source) scale + shift + residual). kind: "conv" (also of rows as maps of one pixel); "affine", of every
    channel by itself, no convolution; "average", sums over windows of single channels. `weight` is that of a
    convolution without a mask, which torch runs, and `packed` that of all others."""

    packed: PackedWeight | None
    geometry: ConvGeometry
    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: int | None = None
    act: Act = NONE
    kind: str = "conv"
    weight: Tensor | None = None
    masked: bool = True  # one of the model's masked layers

    def __post_init__(self) -> None:
        # Programs hold their addresses and nothing else.
        for what, t in (("scale", self.scale), ("shift", self.shift)):
            if t is not None and (t.dtype != torch.float32 or t.device != self.device):
                raise TypeError(
                    f"model: the {what} of {self.name} is {t.dtype} on {t.device}, expected float32 on "
                    f"{self.device}, as its weight"
                )
        self.scale, self.shift = (None if t is None else t.contiguous() for t in (self.scale, self.shift))

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.packed is None else self.packed.index.device  # type: ignore[union-attr]

    @property
    def reads(self) -> tuple[int, ...]:
        return (self.source,) if self.residual is None else (self.source, self.residual)

    @property
    def then(self) -> str:
        """What is done in the same write, in words."""
        parts = [
            "scale" if self.scale is not None else "", "shift" if self.shift is not None else "",
            "addition" if self.residual is not None else "", self.act.kind if self.act.code[0] else "",
        ]  # fmt: skip
        return ", ".join(p for p in parts if p)

    @functools.cached_property
    def shape(self) -> tuple[int, int, int, int]:
        whole = self.weight if self.packed is None else self.packed
        return fm.conv_shape(tuple(whole.shape))  # type: ignore[union-attr]

    def out_size(self, sizes: dict[int, Size]) -> Size:
        channels, *size = sizes[self.source]
        found = self.geometry.out_size(self.shape, *size)
        if min(found) < 1:
            raise ValueError(f"x: too small for {self.name}, which would see a map of {size[0]} x {size[1]}")
        out = (self.shape[0], *found)
        if self.residual is not None and sizes[self.residual] != out:
            got = sizes[self.residual]
            raise ValueError(f"model: expected what is added after {self.name} to be of size {out}, got {got}")
        return out

    def cost(self, count: int, sizes: dict[int, Size], out: Size, lanes: int) -> cost.Choice:
        size, floats = sizes[self.source][1:], count * math.prod(out)
        kept = 0 if self.packed is None else self.packed.kept
        valued = self.packed is not None and self.packed.values is not None
        found = cost.estimate(count, *size, self.shape, self.geometry, kept, lanes, valued, self.kind == "conv")
        after = 2 * cost.dense_epilogue(floats, self.residual is not None, bool(self.act.code[0]))
        sparse = math.inf if self.packed is None else found.sparse
        return dataclasses.replace(found, sparse=sparse, dense=found.dense + after)

    # ---- by torch ----

    @functools.cached_property
    def full_weight(self) -> Tensor:
        """The weight as torch's convolution takes it, the scale multiplied in."""
        if self.packed is None:
            assert self.weight is not None
            weight = self.weight.reshape(self.shape).contiguous(memory_format=torch.channels_last)
        else:
            weight = dense_weight(self.packed, torch.float32, torch.channels_last)
        return weight if self.scale is None else weight * self.scale.view(-1, 1, 1, 1)

    def linear(self, x: Tensor) -> Tensor:
        """Everything before the addition and the activation, by torch."""
        g = self.geometry
        if self.kind == "conv":
            if x.shape[2:] == (1, 1) and self.shape[2:] == (1, 1) and g == _WHOLE:
                return F.linear(x.flatten(1), self.full_weight.flatten(1), self.shift)[:, :, None, None]
            return F.conv2d(x, self.full_weight, self.shift, g.stride, g.padding, g.dilation, g.groups)
        if self.kind == "average":
            x = F.avg_pool2d(x, self.shape[2:], g.stride, g.padding, divisor_override=1)
        scale, shift = (None if t is None else t.view(1, -1, 1, 1) for t in (self.scale, self.shift))
        if scale is None:
            return x.clone() if shift is None else x + shift
        return x * scale if shift is None else torch.addcmul(shift, x, scale)

    def linear_grad(self, grad: Tensor, size: tuple[int, ...], conv: Callable[..., Tensor]) -> Tensor:
        """Gradient of `linear` with respect to x of `size`; conv: that of torch's convolution."""
        if self.kind == "conv":
            if size[2:] == (1, 1) and self.shape[2:] == (1, 1) and self.geometry == _WHOLE:
                return (grad.flatten(1) @ self.full_weight.flatten(1))[:, :, None, None]
            return conv(grad, self.full_weight, size, self.geometry)
        if self.scale is not None:
            grad = grad * self.scale.view(1, -1, 1, 1)
        if self.kind == "affine":
            return grad
        like = torch.empty(size, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last)
        g = self.geometry
        found: Tensor = torch.ops.aten.avg_pool2d_backward(
            grad, like, self.shape[2:], g.stride, g.padding, False, True, 1
        )
        return found


def identity(channels: int, device: torch.device) -> PackedWeight:
    """The weight of a convolution that copies: 1 x 1, every channel from itself."""
    ptr = torch.div(torch.arange(1, 2 * channels + 2, device=device), 2, rounding_mode="floor").to(torch.int32)
    return PackedWeight((channels, 1, 1, 1), ptr, torch.zeros(channels, dtype=torch.int32, device=device))


def ones(channels: int, kernel: tuple[int, int], device: torch.device) -> PackedWeight:
    """The weight that adds up windows of single channels."""
    size = kernel[0] * kernel[1]
    ptr = torch.div(torch.arange(1, 2 * channels + 2, device=device), 2, rounding_mode="floor").to(torch.int32) * size
    index = torch.arange(size, dtype=torch.int32, device=device).repeat(channels)
    return PackedWeight((channels, 1, *kernel), ptr, index)


@dataclasses.dataclass(eq=False)
class MaxPool(Node):
    """Maxima over windows; `out`: height and width of the result, larger where ceil_mode rounds them up."""

    window: tuple[int, ...]  # kernel, stride, padding, dilation, each down and across
    out: tuple[int, int]
    ceil: bool = False

    def out_size(self, sizes: dict[int, Size]) -> Size:
        return (sizes[self.source][0], *self.out)

    def cost(self, count: int, sizes: dict[int, Size], out: Size, lanes: int) -> cost.Choice:
        found = super().cost(count, sizes, out, lanes)
        # The fast layout keeps which pixel won as a byte.
        large = self.window[0] * self.window[1] > 255
        return dataclasses.replace(found, sparse=math.inf) if large else found

    @property
    def arguments(self) -> tuple[Any, ...]:
        """Kernel, stride, padding, dilation and ceil_mode as torch takes them."""
        w = self.window
        return [w[0], w[1]], [w[2], w[3]], [w[4], w[5]], [w[6], w[7]], self.ceil


@dataclasses.dataclass(eq=False)
class Concat(Node):
    """Channels of several maps one after the other; `source` is the first of `parts`."""

    parts: tuple[int, ...]

    @property
    def reads(self) -> tuple[int, ...]:
        return self.parts

    def out_size(self, sizes: dict[int, Size]) -> Size:
        return (sum(sizes[v][0] for v in self.parts), *sizes[self.source][1:])


@dataclasses.dataclass(eq=False)
class Flatten(Node):
    """Maps (C, H, W) as rows: maps (C H W, 1, 1)."""

    def out_size(self, sizes: dict[int, Size]) -> Size:
        return (math.prod(sizes[self.source]), 1, 1)


@dataclasses.dataclass(eq=False)
class Mean(Node):
    """The mean of every map."""

    device: torch.device

    def out_size(self, sizes: dict[int, Size]) -> Size:
        return (sizes[self.source][0], 1, 1)


@dataclasses.dataclass(eq=False)
class Spread(Node):
    """Maps of one pixel as maps of `out` that are the same everywhere."""

    out: tuple[int, int]
    device: torch.device

    def out_size(self, sizes: dict[int, Size]) -> Size:
        return (sizes[self.source][0], *self.out)


@dataclasses.dataclass(eq=False)
class Torch(Node):
    """An operation of one or several maps to maps of size `out` that torch runs, example by example."""

    parts: tuple[int, ...]
    run: Callable[..., Tensor]
    out: Size

    @property
    def reads(self) -> tuple[int, ...]:
        return self.parts

    def out_size(self, sizes: dict[int, Size]) -> Size:
        return self.out

    def recorded(self, owned: Sequence[bool], *xs: Tensor) -> tuple[Tensor, Any]:
        """The result, and what torch needs for its gradient.

        owned: which of xs lie in the region's memory. Torch takes them for overwritten as soon as anything else in the
        arena is, unless they forget where they lie. The caller's tensors keep its watch.
        """
        with torch.enable_grad():
            leaves = [(x.data if mine else x.detach()).requires_grad_() for mine, x in zip(owned, xs, strict=True)]
            out = self.run(*leaves)
        return out.detach(), (out, leaves)

    @staticmethod
    def gradients(grad: Tensor, graph: tuple[Tensor, list[Tensor]]) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(*graph, grad, retain_graph=True)
        mine = grad.untyped_storage().data_ptr()
        # Never the memory that `grad` lies in, which others will have.
        return tuple(g.clone() if g.untyped_storage().data_ptr() == mine else g for g in found)

    def cost(self, count: int, sizes: dict[int, Size], out: Size, lanes: int) -> cost.Choice:
        return dataclasses.replace(super().cost(count, sizes, out, lanes), sparse=math.inf)
