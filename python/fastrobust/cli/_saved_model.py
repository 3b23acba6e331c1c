"""Models from files: TorchScript, exported programs and, when trusted, pickled modules."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._common import BadArguments


def load_model(path: Path, device: torch.device, trust: bool = False) -> tuple[nn.Module, str]:
    """The model on its device, and what kind of file it came from.

    TorchScript and exported programs (.pt2) hold their own graph. A pickled module runs any Python code its author put
    there as it loads, so it is read with ``trust`` alone.
    """
    if not path.is_file():
        raise BadArguments(f"--model: there is no file {path}")
    kind = _kind(path)
    try:
        if kind == "TorchScript":
            return torch.jit.load(str(path), map_location=device), kind
        if kind == "exported program":
            module: Any = torch.export.load(path).module()
            return module.to(device), kind
    except Exception as error:
        raise BadArguments(f"--model: {path} is not a readable {kind}: {error}") from error
    return _pickled(path, device, trust), "pickled module"


def _kind(path: Path) -> str:
    """From the archive's members, not from the file's name."""
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


def _pickled(path: Path, device: torch.device, trust: bool) -> nn.Module:
    try:
        held: Any = torch.load(path, map_location=device, weights_only=not trust)
    except pickle.UnpicklingError:
        if trust:
            raise BadArguments(
                f"--model: {path} is not a TorchScript file, exported program or pickled module"
            ) from None
        raise BadArguments(
            f"--model: {path} is a pickle, or no model at all; loading a pickle runs whatever code it holds: "
            "give --trust if you trust its author, or save the model as TorchScript or with torch.export"
        ) from None
    except Exception as error:
        raise BadArguments(f"--model: {path} cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(held, nn.Module):
        what = "weights without a model (a state_dict)" if isinstance(held, dict) else f"a {type(held).__name__}"
        raise BadArguments(
            f"--model: {path} holds {what}, expected a whole model: TorchScript, torch.export or nn.Module"
        )
    return held.to(device)
