"""Models to certify, from what people have on disk."""

from __future__ import annotations

import importlib
import math
import pathlib
import pickle
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}


def load_model(
    path: str,
    activation: str = "relu",
    shape: tuple[int, ...] = (1, 28, 28),
    factory: str | None = None,
    trust: bool = False,
) -> nn.Module:
    """A model in evaluation mode from ``path``.

    Three kinds of file: a whole module saved by ``torch.save(model)`` (loading it runs any code its author put there,
    so only with ``trust``); a state
    dictionary, loaded into ``factory`` ("package.module:callable", called without arguments); or without a factory a state
    dictionary of a plain chain of convolutions and linear layers, which is rebuilt from the shapes of the weights with
    ``activation`` between them, for inputs of ``shape``. Convolutions of a chain have stride 2 and padding 1 when that fits
    the linear layer behind them, as in the published checkpoints of the thesis.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"model: no file {path}")
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as reason:
        raise ValueError(
            f"model: {path} is a pickled module or no checkpoint; loading a pickle runs whatever code it holds: "
            "trust it (--trust) if you trust its author, or save the state dictionary"
        ) from reason
    except Exception as reason:
        raise ValueError(f"model: {path} cannot be loaded: {type(reason).__name__}: {reason}") from reason
    if isinstance(content, nn.Module):
        return content.eval()
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and key in content and isinstance(content[key], dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"model: {path} holds {type(content).__name__}, expected a module or a state dictionary")
    if factory is not None:
        module, _, name = factory.partition(":")
        if not name:
            raise ValueError(f"factory: got {factory!r}, expected 'package.module:callable'")
        model = getattr(importlib.import_module(module), name)()
        model.load_state_dict(content)
        return model.eval()
    return chain(content, activation, shape).eval()


def chain(state: dict[str, Tensor], activation: str, shape: tuple[int, ...]) -> nn.Sequential:
    """Convolutions, then linear layers, in the order of the dictionary."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    weights = [(name, w) for name, w in state.items() if name.endswith("weight")]
    if any(w.dim() not in (2, 4) for _, w in weights) or len(weights) == 0:
        raise ValueError("model: the state dictionary is no chain of convolutions and linear layers; give a factory")
    convolutions = [item for item in weights if item[1].dim() == 4]
    linear = [item for item in weights if item[1].dim() == 2]
    layers: list[nn.Module] = []
    size = list(shape)
    strides = _strides(convolutions, size, linear[0][1].shape[1] if linear else None)
    for (name, w), (stride, padding) in zip(convolutions, strides, strict=True):
        layer = nn.Conv2d(w.shape[1], w.shape[0], (w.shape[2], w.shape[3]), stride, padding)
        _fill(layer, state, name)
        layers += [layer, ACTIVATIONS[activation]()]
    layers.append(nn.Flatten())
    for i, (name, w) in enumerate(linear):
        dense = nn.Linear(w.shape[1], w.shape[0])
        _fill(dense, state, name)
        layers += [dense] if i == len(linear) - 1 else [dense, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


def _fill(layer: nn.Conv2d | nn.Linear, state: dict[str, Tensor], name: str) -> None:
    bias = state.get(name[: -len("weight")] + "bias")
    with torch.no_grad():
        layer.weight.copy_(state[name])
        if bias is None:
            layer.bias = None
        else:
            assert layer.bias is not None
            layer.bias.copy_(bias)


def _strides(convolutions: list[tuple[str, Tensor]], size: list[int], features: int | None) -> list[tuple[int, int]]:
    """(stride, padding) of every convolution such that the first linear layer fits: (2, 1), else (1, 0)."""
    if not convolutions:
        if features is not None and features != math.prod(size):
            raise ValueError(f"shape: got {tuple(size)}, the first layer expects {features} features")
        return []
    for stride, padding in ((2, 1), (1, 0), (1, 1), (2, 0)):
        height, width = size[1:]
        for _, w in convolutions:
            height = (height + 2 * padding - w.shape[2]) // stride + 1
            width = (width + 2 * padding - w.shape[3]) // stride + 1
        if features is None or height * width * convolutions[-1][1].shape[0] == features:
            return [(stride, padding)] * len(convolutions)
    raise ValueError("model: no stride and padding make the convolutions fit the linear layer; give a factory")
