"""From ordinary models to masked ones and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from .allocate import allocate
from .masked import BinaryMaskedConv2d, BinaryMaskedLinear, MaskedLayer

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_MODULE_STATE = frozenset(nn.Module().__dict__)
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook",
)  # fmt: skip


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
    signs "weights": the signs of the given weights, 0 where a weight is 0; "random": drawn anew from a seed, which
    makes packed files smaller. init, score_range, absolute: see BinaryMaskedConv2d.

    Subclasses are converted if they do not override forward. A layer held under several names becomes one masked layer,
    and layers that share a weight share scores and signs. Biases stay the ordinary parameters they are; types,
    devices, train and eval mode, requires_grad (the scores have that of the weight) and hooks of the layers are kept. A
    model that is itself a layer gives a masked layer.
    Other layers with weights stay as they are. The result's `left_out` says which by name, and why; what was not asked
    for by first_dense or last_dense is in a UserWarning too.

    Raises ValueError when there is no layer to convert, or for padding that is not zeros or differs by side; TypeError
    for weights that are neither float32 nor float64.
    """
    if signs not in ("weights", "random"):
        raise ValueError(f"signs: expected 'weights' or 'random', got {signs!r}")
    model = copy.deepcopy(model)
    layers, left_out = _sort_out(model)
    told = ", ".join(f"{name or type(model).__name__} ({why})" for name, why in left_out.items())
    names = list(layers)
    ends = {"first_dense": names[: int(first_dense)], "last_dense": names[len(names) - int(last_dense) :]}
    for option, kept in ends.items():
        for name in kept:
            layers.pop(name, None)
            left_out[name] = option
    if not layers:
        raise ValueError(
            "model: expected at least one nn.Conv2d or nn.Linear to convert, found none"
            + (f"; left: {told}" if told else "")
        )
    for name, layer in layers.items():
        _check_layer(layer, name)
        if signs == "weights" and bool(layer.weight.isnan().any()):
            raise ValueError(f"model: {name or type(layer).__name__} has NaN weights, expected ones with signs")
    # Of layers that share a weight, the first stands for all.
    owners = {id(layer.weight): layer for layer in reversed(layers.values())}
    owners = dict(reversed(owners.items()))
    keeps = allocate([layer.weight.numel() for layer in owners.values()], rate, gamma, method=method)
    made: dict[int, MaskedLayer] = {}
    new: dict[nn.Module, nn.Module] = {}
    for (weight, layer), keep in zip(owners.items(), keeps, strict=True):
        made[weight] = mask_layer(layer, keep, init, score_range, absolute)
        if signs == "weights":
            with torch.no_grad():
                made[weight].signs.copy_(layer.weight.sign())
            made[weight].sign_seed = None
    for layer in layers.values():
        first = made[id(layer.weight)]
        masked = new[layer] = (
            first if owners[id(layer.weight)] is layer else mask_layer(layer, first.keep, absolute=absolute)
        )
        masked.scores, masked.signs, masked.magnitude = first.scores, first.signs, first.magnitude
        masked.sign_seed = first.sign_seed
        masked.scores.requires_grad_(layer.weight.requires_grad)
    model = replace_layers(model, new)
    model.__dict__["left_out"] = left_out
    if told:
        warnings.warn(f"convert: left as they are: {told}", UserWarning, stacklevel=2)
    return model


def _sort_out(model: nn.Module) -> tuple[dict[str, nn.Conv2d | nn.Linear], dict[str, str]]:
    """The layers that can be masked, and why others with weights cannot, both by their first name."""
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(above + ".") for above in (*layers, *left)):
            continue  # part of a layer
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            why = _obstacle(module)
            if why is None:
                layers[name] = module
            else:
                left[name] = why
        elif isinstance(module, MaskedLayer):
            left[name] = "masked already"
        elif not isinstance(module, _NORMS) and any(p is not None and p.dim() > 1 for p in module._parameters.values()):
            left[name] = f"{type(module).__name__} is neither Conv2d nor Linear"
    users: dict[int, set[str]] = {}
    for name, module in model.named_modules():
        for p in module._parameters.values():
            users.setdefault(id(p), set()).add(name)
    for name in list(layers):
        others = users[id(layers[name].weight)] - layers.keys()
        if others:
            del layers[name]
            left[name] = f"shares its weight with {', '.join(sorted(others))}"
    return layers, left


def _obstacle(layer: nn.Conv2d | nn.Linear) -> str | None:
    """Why a layer cannot be masked, None when it can."""
    kind = type(layer).__name__
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads its weight itself"
    if isinstance(layer.weight, UninitializedParameter):
        return f"{kind} has no weights yet: run the model once"
    if "weight" not in layer._parameters:
        return "its weight is computed by a parametrisation or hook"
    base = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    own = type(layer).forward is not base.forward or "forward" in layer.__dict__
    if own or isinstance(layer, nn.Conv2d) and type(layer)._conv_forward is not nn.Conv2d._conv_forward:
        return f"{kind} has a forward of its own"
    return None


def _check_layer(layer: nn.Module, name: str) -> tuple[int, ...]:
    """The padding of a convolution as integers, () for a linear layer; an error when it cannot be masked."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    what = name or type(layer).__name__
    if layer.weight.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"model: {what} has {layer.weight.dtype} weights, expected float32 (or float64)")
    if isinstance(layer, nn.Linear):
        return ()
    padding: Any = layer.padding
    if padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        around = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        padding = "same" if any(n % 2 for n in around) else tuple(n // 2 for n in around)
    if layer.padding_mode != "zeros" or isinstance(padding, str):
        raise ValueError(
            f"model: {what} has padding {padding!r} ({layer.padding_mode}), expected zeros, as many on both sides"
        )
    return tuple(padding)


def mask_layer(
    layer: nn.Module, keep: int, init: str = "binary", score_range: float = 0.01, absolute: bool = False, name: str = ""
) -> MaskedLayer:
    """A masked layer of the geometry of a Conv2d or Linear, with its bias, type, device, mode and hooks, and new signs
    and scores. Raises as `convert`, naming the layer `name`."""
    padding = _check_layer(layer, name)
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    options: dict[str, Any] = {
        "keep": keep, "init": init, "score_range": score_range, "absolute": absolute,
        "device": layer.weight.device, "dtype": layer.weight.dtype,
    }  # fmt: skip
    masked: MaskedLayer
    if isinstance(layer, nn.Linear):
        masked = BinaryMaskedLinear(layer.in_features, layer.out_features, False, **options)
    else:
        masked = BinaryMaskedConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, padding,  # type: ignore[arg-type]
            layer.dilation, layer.groups, False, **options,  # type: ignore[arg-type]
        )  # fmt: skip
    masked.bias = cast("nn.Parameter | None", layer.bias)
    return _adopt(masked, layer)


def _adopt(new: Any, old: nn.Module) -> Any:
    """`new` with the mode and the hooks of the layer in whose place it comes."""
    new.train(old.training)
    new.__dict__.update({name: old.__dict__[name] for name in _HOOKS if name in old.__dict__})
    return new


def replace_layers(model: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`model`, changed in place, with other modules wherever it holds these: under every name, and in the plain lists
    and dicts of its modules."""

    seen: set[int] = set()

    def replaced(value: Any) -> Any:
        if isinstance(value, nn.Module):
            return new.get(value, value)
        if type(value) not in (list, tuple, dict) or id(value) in seen:
            return value
        seen.add(id(value))
        if type(value) is tuple:
            return tuple(map(replaced, value))
        for key, held in list(enumerate(value) if type(value) is list else value.items()):
            value[key] = replaced(held)
        return value

    if model in new:
        return new[model]
    for module in list(model.modules()):
        module._modules.update(
            {name: new[child] for name, child in module._modules.items() if child is not None and child in new}
        )
        own = {name: value for name, value in module.__dict__.items() if name not in _MODULE_STATE}
        module.__dict__.update({name: replaced(value) for name, value in own.items()})
    return model


@torch.no_grad()
def dense_copy(model: nn.Module) -> nn.Module:
    """The ordinary model with the masked weights written out: its state_dict loads wherever the dense one does.

    A masked layer under several names becomes one dense layer; those that share scores and signs share the weight.
    Biases, types, devices, modes, requires_grad and hooks are kept.
    """
    model = copy.deepcopy(model)
    weights: dict[Any, nn.Parameter] = {}
    new: dict[nn.Module, nn.Module] = {}
    for layer in model.modules():
        if not isinstance(layer, MaskedLayer):
            continue
        options: dict[str, Any] = {"bias": False, "device": layer.scores.device, "dtype": layer.scores.dtype}
        made: nn.Conv2d | nn.Linear
        if isinstance(layer, BinaryMaskedConv2d):
            g = layer.geometry()
            made = nn.Conv2d(
                layer.in_channels, layer.out_channels, layer.kernel_size, g.stride, g.padding, g.dilation, g.groups,
                **options,
            )  # fmt: skip
        else:
            assert isinstance(layer, BinaryMaskedLinear)
            made = nn.Linear(layer.in_features, layer.out_features, **options)
        key = id(layer.scores), id(layer.signs), id(layer.magnitude), layer.keep, layer.absolute
        if key not in weights:
            weights[key] = nn.Parameter(layer.dense_weight(), requires_grad=layer.scores.requires_grad)
        made.weight, made.bias = weights[key], layer.bias
        new[layer] = _adopt(made, layer)
    return replace_layers(model, new)


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """state_dict of `dense_copy`: masked layers become `weight` (and `bias`), everything else is kept."""
    return dict(dense_copy(model).state_dict())
