"""From ordinary models to masked ones and back."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import UninitializedParameter

from .._places import wave
from .allocate import allocate
from .masked import INITIALISATIONS, BinaryMaskedConv2d, BinaryMaskedLinear, MaskedLayer

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_OWN_FORWARD = "has a forward of its own"
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
    init: str | None = None,
    score_range: float = 0.01,
    absolute: bool | None = None,
    signs: str = "weights",
    own_forward: bool | Callable[[nn.Module], bool] = False,
) -> nn.Module:
    """A copy of `model` whose Conv2d and Linear layers are masked, their weights fixed.

    rate: the pruning rate r, the fraction of all weights that is removed; gamma: the adaptive pruning exponent of
    equation 5.11 (see `allocate`, which also explains `method`).
    first_dense, last_dense: leave the first or the last of these layers, in the order of definition, as it is; r then
    speaks of the others. The authors prune all.
    init "given": the weights are fixed as they are. Scores that a layer holds as a parameter `scores` of the weight's
    shape (edge-popup as hidden-networks and the authors write it) are taken over; other layers get |weight|, so that
    what is kept is what magnitude pruning keeps. "binary", "signed_constant": the weights are fixed to signs, with
    scores drawn anew in `score_range` (see BinaryMaskedConv2d). None, the default: "given" where the rate is 0 (the
    copy then computes what the model does, to rounding), else "binary".
    signs "weights": the signs of the given weights, 0 where a weight is 0; "random": drawn anew from a seed, which
    makes packed files smaller.
    absolute: rank |scores|. None: where scores are taken over, as the codes that hold them do, not elsewhere.
    own_forward: whether layers with a forward of their own are masked layers in the model's place too; or a function
    of the layer that says so. What their forward does beyond the convolution of masked weights is then gone; with
    "given" weights a UserWarning names the layers for which the copy computes something else on an example.

    Subclasses are converted if they do not override forward (but see own_forward). A layer held under several names
    becomes one masked layer, and layers that share a weight share scores and signs (not where each has scores of its
    own that are taken over). Biases stay the ordinary parameters they are; types, devices, train and eval mode,
    requires_grad (the scores have that of the weight, or their own) and hooks of the layers are kept. A model that is
    itself a layer gives a masked layer.
    Other layers with weights stay as they are. The result's `left_out` says which by name, and why; what was not asked
    for by first_dense or last_dense is in a UserWarning too.

    Raises ValueError when there is no layer to convert, for padding that is not zeros or differs by side, or for
    weights and scores to be kept that are not finite; TypeError for weights that are neither float32 nor float64.
    """
    if signs not in ("weights", "random"):
        raise ValueError(f"signs: expected 'weights' or 'random', got {signs!r}")
    if init not in (None, "given", *INITIALISATIONS):
        raise ValueError(f"init: expected one of {('given', *INITIALISATIONS)} or None, got {init!r}")
    if init == "given" and signs == "random":
        raise ValueError("signs: expected 'weights' with init='given', got 'random'")
    if not isinstance(own_forward, bool) and not callable(own_forward):
        raise TypeError(f"own_forward: expected a bool or a function of a layer, got {type(own_forward).__name__}")
    given = init == "given" or init is None and signs == "weights" and rate == 0
    model = copy.deepcopy(model)
    layers, left_out = _sort_out(model, own_forward)
    told = ", ".join(f"{name or type(model).__name__} ({why})" for name, why in left_out.items())
    if any(why.endswith(_OWN_FORWARD) for why in left_out.values()):
        told += "; own_forward=True takes the weights of layers with one"
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
        _check_values(layer, name, given, signs == "weights")
    scores = {layer: _own_scores(layer) for layer in layers.values()}

    def key(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
        return id(layer.weight), id(scores[layer]) if given else 0

    # Of layers that share a weight, the first stands for all.
    owners = {key(layer): layer for layer in reversed(layers.values())}
    owners = dict(reversed(owners.items()))
    keeps = allocate([layer.weight.numel() for layer in owners.values()], rate, gamma, method=method)
    made: dict[tuple[int, int], MaskedLayer] = {}
    new: dict[nn.Module, nn.Module] = {}
    for (which, layer), keep in zip(owners.items(), keeps, strict=True):
        own = scores[layer] if given else None
        ranked = own is not None if absolute is None else absolute
        masked = made[which] = mask_layer(layer, keep, "binary" if given else init or "binary", score_range, ranked)
        if given:
            masked.fix_weight(layer.weight)
            with torch.no_grad():
                masked.scores.copy_(layer.weight.abs() if own is None else own)
        elif signs == "weights":
            masked.fix_weight(layer.weight.sign().to(torch.int8))
    for layer in layers.values():
        first, own = made[key(layer)], scores[layer] if given else None
        masked = new[layer] = (
            first if owners[key(layer)] is layer else mask_layer(layer, first.keep, absolute=first.absolute)
        )
        masked.scores, masked.signs, masked.magnitude = first.scores, first.signs, first.magnitude
        masked.sign_seed = first.sign_seed
        masked.scores.requires_grad_((layer.weight if own is None else own).requires_grad)
    other = [
        name for name, layer in layers.items() if given and _has_own_forward(layer) and _differs(layer, new[layer])
    ]
    model = replace_layers(model, new)
    model.__dict__["left_out"] = left_out
    if told:
        warnings.warn(f"convert: left as they are: {told}", UserWarning, stacklevel=2)
    if other:
        told = ", ".join(name or type(model).__name__ for name in other)
        warnings.warn(
            f"convert: the forwards that {told} had compute something else than the masked layers in their place do: "
            "with another number of weights kept, or more than a mask",
            UserWarning,
            stacklevel=2,
        )
    if init is None and not given and any(own is not None for own in scores.values()):
        warnings.warn(
            "convert: layers hold scores, which init='binary' draws anew; init='given' takes them and the weights over",
            UserWarning,
            stacklevel=2,
        )
    return model


def _has_own_forward(layer: nn.Conv2d | nn.Linear) -> bool:
    base = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    own = type(layer).forward is not base.forward or "forward" in layer.__dict__
    return own or isinstance(layer, nn.Conv2d) and type(layer)._conv_forward is not nn.Conv2d._conv_forward


@torch.no_grad()
def _differs(layer: nn.Conv2d | nn.Linear, masked: nn.Module) -> bool:
    """Whether a layer's own forward is not that of the masked layer, on one example."""
    if isinstance(layer, nn.Linear):
        size: tuple[int, ...] = (2, layer.in_features)
    else:
        reach = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
        size = (2, layer.in_channels, *(n + 4 for n in reach))
    x = wave(layer.weight.new_empty(size))
    try:
        theirs = layer.forward(x)
    except Exception:  # whatever it says to maps of this size
        return True
    ours = masked.forward(x)
    return ours.shape != theirs.shape or not bool(((ours - theirs).abs() <= 1e-4 * theirs.abs().max()).all())


def _own_scores(layer: nn.Module) -> Tensor | None:
    """The scores of a layer of hidden networks."""
    found, weight = layer._parameters.get("scores"), layer._parameters["weight"]
    fits = found is not None and weight is not None and found.shape == weight.shape and found.is_floating_point()
    return found if fits else None


def _check_values(layer: nn.Conv2d | nn.Linear, name: str, given: bool, signed: bool) -> None:
    """ValueError for weights and scores that cannot be taken over."""
    what, weight, scores = name or type(layer).__name__, layer.weight, _own_scores(layer)
    if given and not bool(weight.float().isfinite().all()):
        raise ValueError(f"model: {what} has weights that are not finite in float32, expected ones that are")
    if given and scores is not None and not bool(scores.isfinite().all()):
        raise ValueError(f"model: {what} has scores that are not finite, expected ones that are")
    if signed and bool(weight.isnan().any()):
        raise ValueError(f"model: {what} has NaN weights, expected ones with signs")


def _sort_out(
    model: nn.Module, own_forward: bool | Callable[[nn.Module], bool]
) -> tuple[dict[str, nn.Conv2d | nn.Linear], dict[str, str]]:
    """The layers that can be masked, and why others with weights cannot, both by their first name."""
    layers: dict[str, nn.Conv2d | nn.Linear] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if any(name.startswith(above + ".") for above in (*layers, *left)):
            continue  # part of a layer
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            why = _obstacle(module, own_forward)
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


def _obstacle(layer: nn.Conv2d | nn.Linear, own_forward: bool | Callable[[nn.Module], bool]) -> str | None:
    """Why a layer cannot be masked, None when it can."""
    kind = type(layer).__name__
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return "MultiheadAttention reads its weight itself"
    if isinstance(layer.weight, UninitializedParameter):
        return f"{kind} has no weights yet: run the model once"
    if "weight" not in layer._parameters:
        return "its weight is computed by a parametrisation or hook"
    if _has_own_forward(layer) and not (own_forward if isinstance(own_forward, bool) else own_forward(layer)):
        return f"{kind} {_OWN_FORWARD}"
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
