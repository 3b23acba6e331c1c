"""What the programs of one state of a model share: its masked layers, constants, and regions."""

from __future__ import annotations

import collections
import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from .._places import Constant, Place, Read
from .._record import Step
from ..ops.binary import convolution as ops
from ..reference.binary import PackedWeight
from ._nodes import Node
from ._region import Region
from .masked import MaskedLayer

# Where an operation has its flag for batch statistics; None where it has none and uses running ones.
_NORMS = {
    "native_batch_norm": 5, "cudnn_batch_norm": 5, "miopen_batch_norm": 5,
    "_native_batch_norm_legit_no_training": None, "_batch_norm_no_update": None,
}  # fmt: skip


class Cut(Read):
    """A read through which no gradient passes: of a detached tensor, or under no_grad."""

    __slots__ = ()


@dataclasses.dataclass(eq=False)
class Layer:
    """A masked layer as it was at the last update."""

    name: str
    packed: PackedWeight
    geometry: Any
    scale: Tensor | None
    shift: Tensor | None

    @staticmethod
    def of(name: str, layer: MaskedLayer) -> Layer:
        shift = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)
        return Layer(name, layer.packed(), layer.geometry(), layer.channel_scale(), shift)

    def __call__(self, x: Tensor) -> Tensor:
        """The layer on maps x (N, C, H, W), for whoever may look on or differentiate in any way."""
        g = self.geometry
        scale, shift = (None if t is None else t.to(x.dtype) for t in (self.scale, self.shift))
        if len(self.packed.shape) == 2:
            return ops.masked_linear(x.flatten(1), self.packed, None, scale=scale, shift=shift)[:, :, None, None]
        return ops.masked_conv2d(
            x, self.packed, None, g.stride, g.padding, g.dilation, g.groups, scale=scale, shift=shift
        )


@dataclasses.dataclass(eq=False)
class Norm:
    """Batch normalisation with fixed statistics, x alpha + beta per channel."""

    source: Any
    tensors: tuple[Any, ...]  # weight, bias, mean, variance as recorded
    eps: float

    @staticmethod
    def of(step: Step, uses: collections.Counter[int]) -> Norm | None:
        if step.name not in _NORMS or step.kwargs or any(v is not None and uses[v.index] for v in step.results[1:]):
            return None
        flag, (source, *tensors) = _NORMS[step.name], step.args[:5]
        if flag is not None and step.args[flag]:
            return None
        fixed = all(t is None or isinstance(t, Constant) for t in tensors) and None not in tensors[2:]
        return Norm(source, tuple(tensors), float(step.args[-1])) if fixed else None

    def affine(self, pool: Pool) -> tuple[Tensor, Tensor]:
        weight, bias, mean, var = (None if t is None else pool.constant(t) for t in self.tensors)
        assert mean is not None and var is not None
        return affine(weight, bias, mean, var, self.eps)

    def key(self, pool: Pool) -> tuple[Any, ...]:
        return (*(None if t is None else id(pool.known(t)) for t in self.tensors), self.eps)


def affine(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Batch normalisation with these statistics as x alpha + beta."""
    alpha = torch.rsqrt(var + eps)
    if weight is not None:
        alpha = alpha * weight
    beta = -mean * alpha
    if bias is not None:
        beta = beta + bias
    return alpha.detach(), beta.detach()


class Pool:
    def __init__(self, layers: dict[int, Layer], owned: set[int]) -> None:
        self.layers = layers  # by the id of the module
        self.kept: list[MaskedLayer] = []  # whose ids must not be another's
        self.owned = owned  # storages that nobody but the programs knows
        self.constants: dict[Any, Tensor] = {}
        # They live as long as a program that has them: so do the constants by whose addresses they are known.
        self.regions: weakref.WeakValueDictionary[Any, Region] = weakref.WeakValueDictionary()

    @property
    def device(self) -> torch.device:
        """That of the masked layers."""
        return next(iter(self.layers.values())).packed.index.device

    def layer(self, module: MaskedLayer) -> Layer:
        """The layer of a module; one that is none of the model's own, as inside another frozen model, as it is now."""
        if id(module) not in self.layers:
            self.layers[id(module)] = Layer.of(f"masked layer {len(self.layers)}", module)
            self.kept.append(module)
        return self.layers[id(module)]

    def constant(self, c: Constant) -> Tensor:
        """The tensor, such that nobody else can write into it, and the same one at every request."""
        t = c.tensor
        if c.base is None:
            return t.detach() if t.requires_grad else t
        key = (t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride())
        if key not in self.constants:
            own = t.detach() if key[0] in self.owned else t.detach().clone(memory_format=torch.preserve_format)
            own.frozen_from = t  # type: ignore[attr-defined]  # its storage must not be given to another
            self.constants[key] = own
        return self.constants[key]

    def known(self, c: Constant) -> Tensor:
        """What tells a constant from all others of the programs that there are."""
        return c.tensor if c.base is None else self.constant(c)

    def region(self, key: Any, make: Any, inputs: int, outputs: list[int]) -> Region:
        """The region of these nodes (`make` returns them), one for all programs that have the same."""
        key = (key, inputs, tuple(outputs))
        region = self.regions.get(key)
        if region is None:
            nodes: list[Node] = make()
            region = self.regions[key] = Region(nodes, inputs, outputs)
        return region


def as_maps(read: Any) -> bool:
    """Whether a read shows a whole value as the maps that it is: (N, C, H, W), or rows (N, C) as maps of one pixel."""
    if not isinstance(read, Read) or isinstance(read, Cut):
        return False
    seen, whole = _maps(read.place), _maps(read.value.place)
    return seen is not None and seen == whole and read.place.offset == read.value.place.offset


def _maps(place: Place) -> Any:
    """Sizes as (N, C, H, W), and the strides of the dimensions in which there is more than one."""
    if len(place.size) not in (2, 4):
        return None
    size, stride = (*place.size, 1, 1)[:4], (*place.stride, 1, 1)[:4]
    return size, tuple(s if n > 1 else 0 for n, s in zip(size, stride, strict=True))


def map_size(place: Place) -> tuple[int, int, int] | None:
    """(C, H, W) of maps or rows."""
    return tuple((*place.size, 1, 1)[1:4]) if len(place.size) in (2, 4) else None  # type: ignore[return-value]


def is_flat(read: Any) -> bool:
    """Whether a read shows whole maps as rows, channel by channel and line by line."""
    if not isinstance(read, Read) or isinstance(read, Cut):
        return False
    place, whole = read.place, read.value.place
    rows = len(place.size) == 2 or (len(place.size) == 4 and place.size[2:] == (1, 1))
    return (
        rows and len(whole.size) == 4 and place.size[0] == whole.size[0] and place.numel == whole.numel
        and place.offset == whole.offset and place.row_major() and whole.row_major()
    )  # fmt: skip


def reshaped(read: Read) -> bool:
    """Whether a read shows a whole value in another shape, in the order of its elements."""
    place, whole = read.place, read.value.place
    same = place.numel == whole.numel and place.offset == whole.offset and place.size != whole.size
    return same and not isinstance(read, Cut) and place.row_major() and whole.row_major()
