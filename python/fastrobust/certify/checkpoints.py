"""Models from what people have on disk: whole modules, and weights together with the model that they belong to.

A state dictionary does not say strides, paddings, pooling, activations or the order of its layers. It is loaded into
the model that ``factory`` builds, or into a ``layout`` that is named; nothing is concluded from the shapes of weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import pathlib
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
# the names that the thesis' published checkpoints give the layers of a Sequential
_PUBLISHED = {
    "fc1": {"main_block.layer_0.layer": "1", "output.layer": "3"},
    "cnn": {
        "conv_block.conv_layer_0.layer": "0",
        "conv_block.conv_layer_1.layer": "2",
        "fc_block.fc_layer_0.layer": "5",
        "output.layer": "7",
    },
}
LAYOUTS = {
    "fc1": "FC1 of the thesis: flatten, 784-1024-10",
    "cnn": "CNN of the thesis: convolutions of 16 and 32 channels, kernel 4, stride 2, padding 1, then 100-10",
    "dense": "flatten, then the file's linear layers in their order",
}
_HELD_BY = ("state_dict", "model_state_dict", "model", "net")  # keys under which training scripts keep the weights
_PREFIXES = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
_OTHER_FILES = {
    ".onnx": "an ONNX network: convert it with onnx2torch and save its weights, or the module",
    ".safetensors": "a safetensors file: torch.save(safetensors.torch.load_file(path), 'w.pt') makes a state dictionary",
    ".h5": "a Keras or HDF5 file: convert the model to torch",
    ".npz": "an archive of numpy arrays: build the model, and torch.save it or its state dictionary",
}


class Loaded(NamedTuple):
    """A model in evaluation mode, the kind of its file, and what was built for weights ("" for a module)."""

    model: nn.Module
    kind: str
    built: str


def load_model(
    path: str | pathlib.Path,
    *,
    factory: str | None = None,
    layout: str | None = None,
    activation: str | None = None,
    shape: tuple[int, ...] | None = None,
    trust: bool = False,
) -> nn.Module:
    """A model in evaluation mode, on the CPU, from a file of ``torch.save``; :func:`load` also says what was made.

    Args:
        path: a state dictionary, alone or inside what training scripts save around it (``{"state_dict": ...}``, a list
            of one, names behind ``module.``), or a whole module.
        factory: "package.module:callable" or "file.py:callable", called without arguments; the state dictionary is
            loaded into its model strictly: every tensor by name and shape, none left over.
        layout: instead of a factory the name of a layout: "fc1" and "cnn" are the published networks of Liu's thesis
            (2022), "dense" is a chain of linear layers.
        activation: "relu" (default), "sigmoid" or "tanh": what stands between the layers of a layout.
        shape: of one image, for a layout; default: MNIST's for one channel, CIFAR-10's for three.
        trust: read pickles of classes too, which runs any code that their author put there.

    Raises:
        ValueError: naming the argument, what came and what to give instead.
    """
    return load(path, factory=factory, layout=layout, activation=activation, shape=shape, trust=trust).model


def load(
    path: str | pathlib.Path,
    *,
    factory: str | None = None,
    layout: str | None = None,
    activation: str | None = None,
    shape: tuple[int, ...] | None = None,
    trust: bool = False,
) -> Loaded:
    """As :func:`load_model`, with a description."""
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if factory is not None and (layout is not None or activation is not None):
        raise ValueError("factory: builds the whole model, and cannot be combined with layout or activation")
    content, notes = read(path, trust)
    how = "".join(f", {note}" for note in notes)
    if isinstance(content, nn.Module):
        if factory or layout or activation:
            raise ValueError(f"model: {path} holds a whole module, which needs no factory, layout or activation")
        return Loaded(content.eval(), f"pickled {type(content).__name__}{how}", "")
    if factory is not None:
        model = made_by(factory)
        _fill(model, content, f"{path} does not fit the model of {factory}")
        built = f"{type(model).__name__} of {factory}, {_count(content)} loaded strictly"
    else:
        layout = layout or _chain_of(path, content, activation)
        model = _laid_out(path, content, layout, activation or "relu", shape)
        built = f"layout {layout}: {_text(model)}"
    if any(t.dtype == torch.float64 for t in content.values()) and not any(
        t.dtype == torch.float64 for t in model.state_dict().values()
    ):
        how += ", rounded from float64"
    return Loaded(model.eval(), f"state dictionary{how}", built)


def _count(state: dict[str, Tensor]) -> str:
    return f"{len(state)} tensors of {sum(t.numel() for t in state.values())} numbers"


def file_kind(path: pathlib.Path) -> str:
    """ "TorchScript", "exported program" or "pickle", from an archive's members and not from the file's name."""
    if not zipfile.is_zipfile(path):
        return "pickle"
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return "TorchScript"
    # torch >= 2.8 writes models/model.json in a folder, earlier ones serialized_exported_program.json at the top
    if "models/model.json" in inner or "serialized_exported_program.json" in {*names, *inner}:
        return "exported program"
    return "pickle"


def read(path: str | pathlib.Path, trust: bool = False) -> tuple[nn.Module | dict[str, Tensor], list[str]]:
    """A module, or a state dictionary taken out of what is around it, and what was taken off on the way."""
    file = pathlib.Path(path)
    if not file.is_file():
        raise ValueError(f"model: there is no file {path}")
    kind = file_kind(file)
    if kind != "pickle":
        raise ValueError(
            f"model: {path} is {'an' if kind[0] == 'e' else 'a'} {kind}, whose layers cannot be told apart; give the "
            "module itself (torch.save(model), with --trust), or its weights (torch.save(model.state_dict())) with "
            "--factory"
        )
    if trust:
        _look_here()
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=not trust)
    except Exception as reason:
        raise ValueError(_unreadable(file, trust, reason)) from reason
    content, notes = _unwrapped(path, content)
    if isinstance(content, nn.Module):
        return content, notes
    if not content:
        raise ValueError(f"model: {path} holds an empty state dictionary, expected weights")
    return content, notes


def _unreadable(file: pathlib.Path, trust: bool, reason: Exception) -> str:
    if file.suffix in _OTHER_FILES:
        return f"model: {file} is {_OTHER_FILES[file.suffix]}"
    found = re.search(r"GLOBAL ([\w.]+)", str(reason)) if isinstance(reason, pickle.UnpicklingError) else None
    if found and not trust:
        return (
            f"model: {file} is a pickle of {found.group(1)}; loading a pickle runs whatever code it holds: trust it "
            "(--trust) if you trust its author, or save the state dictionary alone"
        )
    if trust and isinstance(reason, AttributeError | ImportError):
        return (
            f"model: {file} is a pickle of classes that cannot be imported here ({reason}); run it beside the file "
            "that defines them, or save the state dictionary and give --factory"
        )
    if file.stat().st_size == 0:
        return f"model: {file} is empty"
    return f"model: {file} is no file of torch.save, or is damaged ({type(reason).__name__})"


def _is_state(content: Any) -> bool:
    return isinstance(content, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    )


def _unwrapped(path: Any, content: Any) -> tuple[Any, list[str]]:
    notes = []
    while not isinstance(content, nn.Module) and not _is_state(content):
        if isinstance(content, list | tuple):
            if len(content) != 1:
                raise ValueError(f"model: {path} holds a list of {len(content)} entries, expected one state dictionary")
            content = content[0]
            notes.append("from a list of one")
            continue
        inside = content if isinstance(content, Mapping) else {}
        key = next((k for k in _HELD_BY if isinstance(inside.get(k), Mapping | nn.Module | list | tuple)), None)
        if key is None:
            held = f"a dictionary of {', '.join(map(repr, inside))}" if inside else f"a {type(content).__name__}"
            raise ValueError(f"model: {path} holds {held}, expected a module or a state dictionary")
        content = content[key]
        notes.append(f"taken from {key!r}")
    if isinstance(content, nn.Module):
        return content, notes
    state = dict(content)
    for prefix, owner in _PREFIXES.items():
        if state and all(name.startswith(prefix) for name in state):
            state = {name[len(prefix) :]: value for name, value in state.items()}
            notes.append(f"names without {prefix!r} ({owner})")
    return state, notes


def made_by(factory: str) -> nn.Module:
    """The module that ``factory`` ("package.module:callable" or "file.py:callable") returns."""
    source, colon, name = factory.rpartition(":")
    if not (colon and source and name.isidentifier()):
        raise ValueError(f"factory: got {factory!r}, expected 'package.module:callable' or 'file.py:callable'")
    try:
        module = _file_module(pathlib.Path(source)) if source.endswith(".py") else _module(source)
    except Exception as reason:
        raise ValueError(f"factory: {source} cannot be imported: {type(reason).__name__}: {reason}") from reason
    build: Callable[[], Any] | None = getattr(module, name, None)
    if not callable(build):
        there = "is not callable" if build is not None else "is not there"
        raise ValueError(f"factory: {name} {there} in {source}, expected a function or class that builds the model")
    try:
        model = build()
    except Exception as reason:
        raise ValueError(f"factory: {factory} failed: {type(reason).__name__}: {reason}") from reason
    if not isinstance(model, nn.Module):
        raise ValueError(f"factory: {factory} returned {type(model).__name__}, expected an nn.Module")
    return model


def _module(name: str) -> Any:
    _look_here()
    return importlib.import_module(name)


def _look_here(folder: pathlib.Path = pathlib.Path()) -> None:
    """Imports find the current folder, as they do for python -m and not for an installed command."""
    here = str(folder.resolve())
    if here not in sys.path:
        sys.path.insert(0, here)


def _file_module(file: pathlib.Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    _look_here(file.parent)  # for its own imports
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)  # pickles and dataclasses look their module up by name
    spec.loader.exec_module(module)
    return module


def _fill(model: nn.Module, state: dict[str, Tensor], what: str) -> None:
    if any(t.is_meta for t in model.state_dict().values()):  # loading into these does nothing
        raise ValueError(f"model: {what}: its parameters are on the meta device and hold no values")
    try:
        model.load_state_dict(state, strict=True)
    except Exception as reason:
        told = " ".join(str(reason).split()).partition(": ")[2] or str(reason)
        raise ValueError(f"model: {what}: {told}") from reason


def _chain_of(path: Any, state: dict[str, Tensor], activation: str | None) -> str:
    """Weights without a model are refused, but for those of a Sequential that alternates linear layers and one other
    module: there only the activation is open, and what is assumed is said."""
    places = [int(name[: -len(".weight")]) for name in state if re.fullmatch(r"\d+\.weight", name)]
    dims = {"weight": 2, "bias": 1}
    linear = all(re.fullmatch(r"\d+\.(weight|bias)", k) and t.dim() == dims[k.split(".")[1]] for k, t in state.items())
    if not linear or places != list(range(min(places, default=2), 2 * len(places) + 1, 2)) or min(places) > 1:
        raise ValueError(
            f"model: {path} holds weights alone, which do not say strides, padding, pooling, activations or the order "
            "of layers: give --factory module:function, which builds the model, or --layout if it is one of "
            f"{', '.join(LAYOUTS)}"
        )
    if activation is None and len(places) > 1:
        warnings.warn(
            f"{path} holds weights alone: taken as a chain of linear layers with ReLU between them; if it is another "
            "network, give --factory; if not, --layout dense --activation relu says so",
            stacklevel=4,
        )
    return "dense"


def _laid_out(
    path: Any, state: dict[str, Tensor], layout: str, activation: str, shape: tuple[int, ...] | None
) -> nn.Sequential:
    between = ACTIVATIONS[activation]
    if layout == "dense":
        return _dense(path, state, between, shape)
    names = _PUBLISHED[layout]
    if {name.rpartition(".")[0] for name in state} == set(names):
        state = {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": t for name, t in state.items()}
    first = state.get("0.weight")
    channels = first.shape[1] if first is not None and first.dim() == 4 else 1
    channels, *size = shape or ((3, 32, 32) if channels == 3 else (1, 28, 28))
    if layout == "fc1":
        features = channels * math.prod(size)
        model = nn.Sequential(nn.Flatten(), nn.Linear(features, 1024), between(), nn.Linear(1024, 10))
    elif len(size) == 2:
        model = nn.Sequential(
            nn.Conv2d(channels, 16, 4, 2, 1), between(),
            nn.Conv2d(16, 32, 4, 2, 1), between(),
            nn.Flatten(),
            nn.Linear(32 * (size[0] // 4) * (size[1] // 4), 100), between(),
            nn.Linear(100, 10),
        )  # fmt: skip
    else:
        raise ValueError(f"layout: cnn reads images (channels, height, width), got shape {(channels, *size)}")
    _fill(model, state, f"{path} is not of layout {layout} for images of shape {(channels, *size)}")
    return model


def _dense(
    path: Any, state: dict[str, Tensor], between: type[nn.Module], shape: tuple[int, ...] | None
) -> nn.Sequential:
    weights = [name[: -len("weight")] for name in state if name.endswith("weight")]
    layers: list[nn.Module] = [nn.Flatten()]
    inner: dict[str, Tensor] = {}
    width = math.prod(shape) if shape else None
    for owner in weights:
        weight, bias = state[f"{owner}weight"], state.get(f"{owner}bias")
        if weight.dim() != 2 or width not in (None, weight.shape[1]):
            expected = "(outputs, inputs)" if width is None else f"(outputs, {width})"
            raise ValueError(
                f"model: {path} is no chain of linear layers for images of shape {shape}: {owner}weight has shape "
                f"{tuple(weight.shape)}, expected {expected}; give --factory"
            )
        width = weight.shape[0]
        inner |= {f"{len(layers)}.weight": weight} | ({f"{len(layers)}.bias": bias} if bias is not None else {})
        layers += [nn.Linear(weight.shape[1], width, bias is not None), between()]
    rest = [name for name in state if not name.endswith(("weight", "bias"))]
    if not weights or rest or len(inner) != len(state):
        raise ValueError(
            f"model: {path} is no chain of linear layers: it holds {', '.join(list(state)[:8])}; give --factory"
        )
    model = nn.Sequential(*layers[:-1])
    _fill(model, inner, f"{path} is no chain of linear layers")
    return model


def _text(model: nn.Sequential) -> str:
    """Every layer with what decides its function."""
    parts = []
    for layer in model:
        if isinstance(layer, nn.Conv2d):
            sizes = f"{layer.in_channels}, {layer.out_channels}, {layer.kernel_size[0]}"
            parts.append(f"Conv2d({sizes}, stride {layer.stride[0]}, padding {layer.padding[0]})")
        elif isinstance(layer, nn.Linear):
            parts.append(f"Linear({layer.in_features}, {layer.out_features})")
        else:
            parts.append(type(layer).__name__)
    return " - ".join(parts)
