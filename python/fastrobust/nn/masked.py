"""Layers whose weights are fixed and whose mask is learned: signs (thesis, section 5.1), or any numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _record
from ..ops._library import is_recorded, is_transformed
from ..ops.binary import convolution as ops
from ..ops.binary import masks
from ..ops.binary._feature_maps import LINEAR_GEOMETRY, ConvGeometry, pair, whole
from ..ops.binary._scored_conv import (
    KeptLists,
    ranking,
    scored_conv2d,
    scored_input_grad,
    scores_grad,
    straight_through_weight,
)
from ..reference.binary import PackedWeight

INITIALISATIONS = ("binary", "signed_constant")


@dataclasses.dataclass(frozen=True)
class _Weight:
    """What a call took the layer's weight to be; its gradient uses the same."""

    packed: PackedWeight
    scale: Tensor | None
    keep: int
    absolute: bool
    geometry: ConvGeometry


class _MaskedConv(torch.autograd.Function):
    """Convolution with a packed weight; the scores get the straight-through gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scores: Tensor, bias: Tensor | None, signs: Tensor, weight: _Weight) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x, scores, signs)
        shift = bias if bias is None or bias.dtype == x.dtype else bias.to(x.dtype)
        return ops.conv_forward(x, weight.packed, weight.geometry, bias=shift, scale=weight.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scores, signs = ctx.saved_tensors
        weight, grad_x, grad_scores, grad_bias = ctx.weight, None, None, None
        scaled = grad if weight.scale is None else grad * weight.scale.reshape(1, -1, 1, 1)
        if ctx.needs_input_grad[0] and torch.is_grad_enabled():
            # To be differentiated again: the scores are in this gradient too.
            grad_x = scored_input_grad(
                scaled, scores, signs, weight.keep, weight.absolute, weight.geometry, x.shape[2:]
            )
        elif ctx.needs_input_grad[0]:
            grad_x = ops.conv_input_grad(scaled, weight.packed, x.shape[2:], weight.geometry)
        if ctx.needs_input_grad[1]:
            grad_scores = scores_grad(scaled, x, scores, signs, weight.absolute, weight.geometry)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=[0, *range(2, grad.dim())])
        return grad_x, grad_scores, grad_bias, None, None


def seeded_signs(seed: int, count: int) -> Tensor:
    """`count` signs, -1 or +1, as int8: the bits of the Philox stream with this key, lowest first, a set one for -1.

    Raw streams of numpy's bit generators stay the same from release to release, unlike draws through torch.
    """
    words = np.random.Philox(key=seed).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), count=count, bitorder="little")
    return torch.from_numpy(1 - 2 * bits.astype(np.int8))


class MaskedLayer(nn.Module):
    """What the convolution and the linear layer share: scores, signs, keep count, packed cache.

    The weight is magnitude * signs * mask(scores); only the scores (and the bias, if there is one)
    are learned. `signs`, a buffer, are the fixed weights: int8 in {-1, 0, +1}, or, where they are
    given as other numbers (see `fix_weight`), finite ones of the type of the scores, which cost a
    multiplication a term. `keep` is the number of weights kept. `sign_seed` is what the signs were
    drawn from, if they still are those (files then need not hold them).
    """

    signs: Tensor
    magnitude: Tensor
    sign_seed: int | None

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        keep: int | None,
        bias: bool,
        init: str,
        score_range: float,
        absolute: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype: got {dtype}, expected float32 (or float64)")
        self.absolute = absolute
        self.scores = nn.Parameter(torch.empty(weight_shape, device=device, dtype=dtype))
        self.register_buffer("signs", torch.empty(weight_shape, dtype=torch.int8, device=device))
        self.register_buffer("magnitude", torch.ones((), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(weight_shape[0], device=device, dtype=dtype)) if bias else None
        self._keep = 0
        self.keep = self.scores.numel() if keep is None else keep
        self._kept = KeptLists()
        self.reset_parameters(init, score_range)

    @property
    def keep(self) -> int:
        return self._keep

    @keep.setter
    def keep(self, value: int) -> None:
        size = self.scores.numel()
        value = whole("keep", value)
        if not 0 <= value <= size:
            raise ValueError(f"keep: expected 0 to {size}, the weights of the layer, got {value}")
        self._keep = value

    @torch.no_grad()
    def reset_parameters(self, init: str = "binary", score_range: float = 0.01) -> None:
        """Draw signs and scores anew.

        init "binary": signs uniform in {-1, +1}, magnitude 1, scores uniform in [-a, a] with
        a = `score_range` (thesis, section 5.1.3). init "signed_constant": magnitude
        sqrt(2 / (l (1 - r))) with l the fan-in and 1 - r the kept fraction, scores uniform in
        [-1/sqrt(l), 1/sqrt(l)].
        """
        if init not in INITIALISATIONS:
            raise ValueError(f"init: expected one of {INITIALISATIONS}, got {init!r}")
        self.sign_seed = int(torch.randint(0, 2**32, ()))
        self.signs.copy_(seeded_signs(self.sign_seed, self.signs.numel()).reshape(self.signs.shape))
        fan_in = max(1, math.prod(self.scores.shape[1:]))
        if init == "binary":
            self.magnitude.fill_(1.0)
            self.scores.uniform_(-score_range, score_range)
        else:
            fraction = max(self.keep, 1) / max(self.scores.numel(), 1)
            self.magnitude.fill_(math.sqrt(2.0 / (fan_in * fraction)))
            self.scores.uniform_(-1.0 / math.sqrt(fan_in), 1.0 / math.sqrt(fan_in))

    @torch.no_grad()
    def fix_weight(self, weight: Tensor) -> None:
        """Take these as the fixed weights, `signs`: of the layer's shape, integers in {-1, 0, +1} or floating
        numbers."""
        if weight.shape != self.signs.shape:
            raise ValueError(f"weight: expected {tuple(self.signs.shape)}, got {tuple(weight.shape)}")
        if weight.is_floating_point():
            self._hold_numbers()
        self.signs.copy_(weight)
        self.sign_seed = None

    def _hold_numbers(self) -> None:
        """Room for other numbers than signs, in the same tensor: layers may share it."""
        if not self.signs.is_floating_point():
            self.signs.data = self.signs.data.to(self.scores.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        signs = state_dict.get(f"{prefix}signs")
        if isinstance(signs, Tensor) and signs.is_floating_point():
            self._hold_numbers()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def ranking(self) -> Tensor:
        """The values the mask ranks: the scores, or |scores| with absolute=True."""
        return ranking(self.scores, self.absolute)

    def mask(self) -> Tensor:
        """Bool mask of the `keep` highest ranked weights."""
        return masks.topk_mask(self.ranking(), self.keep)

    def packed(self) -> PackedWeight:
        """Index lists of the masked signs (see `ops.pack`), those of the present scores: every entry is compared with
        what the lists were made of, and only what changed is made anew."""
        return self._lists(True)

    def _lists(self, whole: bool) -> PackedWeight:
        """`packed`, or for a forward, which must not take long, those of `KeptLists` without `whole`."""
        found = self._kept.get(self.scores, self.signs, self.keep, self.absolute, whole)
        return self.set_mask(self.mask()) if found is None else found

    def set_mask(self, mask: Tensor) -> PackedWeight:
        """Store the index lists of a mask that was selected together with other layers' masks."""
        return self._kept.put(self.scores, self.signs, self.keep, self.absolute, mask)

    def stale(self) -> bool:
        """Whether the lists are not those of the present scores and signs."""
        return self._kept.get(self.scores, self.signs, self.keep, self.absolute, True) is None

    def refresh(self) -> None:
        """Forget the lists: the next call makes them."""
        self._kept.drop()

    def channel_scale(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """The magnitude as one factor per output channel, None when it is 1."""
        magnitude = float(self.magnitude)
        if magnitude == 1.0:
            return None
        return torch.full((self.scores.shape[0],), magnitude, dtype=dtype, device=self.scores.device)

    def _apply_weight(self, x: Tensor) -> Tensor:
        """The convolution of maps x (N, C, H, W) with the masked weight, and the bias."""
        recorder = _record.current()
        if recorder is not None:  # one step for whoever records the model
            return recorder.leaf(self, x, self._apply_weight)
        g = self.geometry()
        if is_recorded() or is_transformed():
            if not is_recorded():
                # Torch's own operators know every transform.
                weight = straight_through_weight(self.scores, self.signs, self.keep, self.absolute, x.dtype)
                out = ops.dense_by_torch(x, weight * self.magnitude.to(x.dtype), g)
            else:
                out = scored_conv2d(x, self.scores, self.signs, self.keep, self.absolute, g)
                out = out * self.magnitude.to(x.dtype)
            return out if self.bias is None else out + self.bias.to(x.dtype).reshape(1, -1, 1, 1)
        packed = self._lists(False)
        ops.check_operand(x, packed)
        taken = _Weight(packed, self.channel_scale(x.dtype), self.keep, self.absolute, g)
        found: Tensor = _MaskedConv.apply(x, self.scores, self.bias, self.signs, taken)
        return found

    def unmasked_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.signs.to(dtype) * self.magnitude.to(dtype)

    def dense_weight(self) -> Tensor:
        """The masked weight as an ordinary dense tensor."""
        return self.packed().to_dense(self.scores.dtype) * self.magnitude

    def geometry(self) -> ConvGeometry:
        """How the weight is applied; a linear layer is a 1x1 convolution of 1x1 maps."""
        return LINEAR_GEOMETRY

    def get_extra_state(self) -> dict[str, Any]:
        return {"keep": self.keep, "absolute": self.absolute, "sign_seed": self.sign_seed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.keep, self.absolute = int(state["keep"]), bool(state["absolute"])
        self.sign_seed = state.get("sign_seed")


class BinaryMaskedConv2d(MaskedLayer):
    """2-d convolution with weight magnitude * signs * mask(scores).

    Arguments as torch.nn.Conv2d (integer padding), and
    keep: weights kept, an int from 0 to K C kh kw / groups; None keeps all.
    init, score_range: see `reset_parameters`.
    absolute: rank |scores|, as the authors' code does; the default ranks the scores as they are
        (thesis, equation 5.2).

    dtype: of the scores and the bias, float32 or float64; torch's default type.

    x: (N, C, H, W) float32, NCHW or channels_last; returns (N, K, H', W') of the type of x. Under torch.autocast x may
    be float16 or bfloat16 and is taken as float32.
    Differentiable any number of times in x (sparse), scores (straight-through, a dense weight gradient) and bias, also
    by the transforms of torch.func; torch.compile, export and jit.trace record one op that chooses the mask.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        keep: int | None = None,
        init: str = "binary",
        score_range: float = 0.01,
        absolute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        geometry = ConvGeometry.of(stride, padding, dilation, groups)
        in_channels, out_channels, groups = (
            whole("in_channels", in_channels),
            whole("out_channels", out_channels),
            geometry.groups,
        )
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups: expected a divisor of {in_channels} and {out_channels}, got {groups}")
        kernel = pair("kernel_size", kernel_size, 1)
        shape = (out_channels, in_channels // groups, *kernel)
        super().__init__(shape, keep, bias, init, score_range, absolute, device, dtype)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size = kernel
        self._geometry = geometry

    def geometry(self) -> ConvGeometry:
        return self._geometry

    def forward(self, x: Tensor) -> Tensor:
        x = ops.as_operand(x)
        ops.check_conv(x, tuple(self.scores.shape), self._geometry)
        return self._apply_weight(x)

    def extra_repr(self) -> str:
        g = self._geometry
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={g.stride}, padding={g.padding}, dilation={g.dilation}, groups={g.groups}, "
            f"keep={self.keep} of {self.scores.numel()}, absolute={self.absolute}"
        )


class BinaryMaskedLinear(MaskedLayer):
    """Linear layer with weight magnitude * signs * mask(scores); x (..., C) to (..., K).

    Keyword arguments as in BinaryMaskedConv2d.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        keep: int | None = None,
        init: str = "binary",
        score_range: float = 0.01,
        absolute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (out_features, in_features)
        super().__init__(shape, keep, bias, init, score_range, absolute, device, dtype)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        x = ops.as_operand(x)
        ops.check_float("x", x)
        if x.dim() < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"x: expected (..., {self.in_features}), got {tuple(x.shape)}")
        out = self._apply_weight(x.reshape(-1, self.in_features, 1, 1))
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"keep={self.keep} of {self.scores.numel()}, absolute={self.absolute}"
        )


def masked_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The masked layers of a model by name, in the order of definition."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MaskedLayer)}


def update_masks(model: nn.Module) -> None:
    """Recompute the masks of all layers whose scores changed, in one selection call."""
    stale = [layer for layer in masked_layers(model).values() if layer.stale()]
    found = masks.topk_masks([layer.ranking() for layer in stale], [layer.keep for layer in stale])
    for layer, mask in zip(stale, found, strict=True):
        layer.set_mask(mask)
