"""From ordinary models to masked ones and back."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .allocate import allocate
from .masked import BinaryMaskedConv2d, BinaryMaskedLinear, MaskedLayer, masked_layers


def convert(
    model: nn.Module,
    rate: float,
    gamma: float,
    *,
    first_dense: bool = False,
    last_dense: bool = False,
    method: str = "exact",
    init: str = "binary",
    score_range: float = 0.01,
    absolute: bool = False,
    signs: str = "weights",
) -> nn.Module:
    """A copy of `model` whose Conv2d and Linear layers are masked, their weights fixed to signs.

    rate: the pruning rate r, the fraction of all weights that is removed; gamma: the adaptive pruning exponent of
    equation 5.11 (see `allocate`, which also explains `method`).
    first_dense, last_dense: leave the first or the last of these layers, in the order of definition, as it is; r then
    speaks of the others. The authors prune all.
    signs "weights": the signs of the given weights, 0 where a weight is 0; "random": drawn anew from a seed, which makes
    packed files smaller. init, score_range,
    absolute: see BinaryMaskedConv2d. A bias is copied and stays an ordinary parameter.

    Raises ValueError when there is no layer to convert, or for a padding mode or string padding other than zeros.
    """
    if signs not in ("weights", "random"):
        raise ValueError(f"signs: expected 'weights' or 'random', got {signs!r}")
    model = copy.deepcopy(model)
    names = [n for n, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)]
    names = names[int(first_dense) : len(names) - int(last_dense)]
    if not names:
        raise ValueError("model: expected at least one nn.Conv2d or nn.Linear to convert, found none")
    layers: dict[str, nn.Conv2d | nn.Linear] = {name: model.get_submodule(name) for name in names}  # type: ignore[misc]
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
            raise ValueError(
                f"model: {name} has padding {layer.padding!r} ({layer.padding_mode}), expected integer zeros"
            )
    keeps = allocate([layer.weight.numel() for layer in layers.values()], rate, gamma, method=method)
    for (name, layer), keep in zip(layers.items(), keeps, strict=True):
        masked = mask_layer(layer, keep, init, score_range, absolute)
        with torch.no_grad():
            if signs == "weights":
                masked.signs.copy_(layer.weight.sign())
                masked.sign_seed = None
            if layer.bias is not None and masked.bias is not None:
                masked.bias.copy_(layer.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, masked.to(layer.weight.device))
    return model


def mask_layer(
    layer: nn.Module, keep: int, init: str = "binary", score_range: float = 0.01, absolute: bool = False
) -> MaskedLayer:
    """A masked layer of the geometry of a Conv2d or Linear, with fresh signs and scores."""
    if isinstance(layer, nn.Linear):
        return BinaryMaskedLinear(
            layer.in_features, layer.out_features, layer.bias is not None,
            keep=keep, init=init, score_range=score_range, absolute=absolute,
        )  # fmt: skip
    assert isinstance(layer, nn.Conv2d)
    return BinaryMaskedConv2d(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,  # type: ignore[arg-type]
        layer.groups, layer.bias is not None, keep=keep, init=init, score_range=score_range, absolute=absolute,
    )  # fmt: skip


@torch.no_grad()
def dense_copy(model: nn.Module) -> nn.Module:
    """The ordinary model with the masked weights written out: its state_dict loads wherever the dense one does."""
    model = copy.deepcopy(model)
    for name, layer in masked_layers(model).items():
        new: nn.Conv2d | nn.Linear
        if isinstance(layer, BinaryMaskedConv2d):
            g = layer.geometry()
            new = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, g.stride, g.padding, g.dilation, g.groups,
                layer.bias is not None,
            )  # fmt: skip
        else:
            assert isinstance(layer, BinaryMaskedLinear)
            new = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        new = new.to(layer.scores.device, layer.scores.dtype)
        new.weight.copy_(layer.dense_weight())
        if layer.bias is not None and new.bias is not None:
            new.bias.copy_(layer.bias)
        if not name:
            return new
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """state_dict of `dense_copy`: masked layers become `weight` (and `bias`), everything else is kept."""
    return dict(dense_copy(model).state_dict())
