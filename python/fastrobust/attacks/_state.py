"""The state of an evaluation in a file, so that it can be stopped at any moment and taken up again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._modes import owner
from ._report import EvaluationReport

_FLAGS = ("robust", "proven", "alive")


@dataclasses.dataclass
class Progress:
    """Where an evaluation stands: ``robust`` (B,) as known now, ``adv`` where broken; ``attack`` and ``batch`` are
    next, over the examples of ``alive``, those that were robust when the attack began."""

    adv: Tensor
    robust: Tensor
    proven: Tensor
    alive: Tensor
    report: EvaluationReport
    attack: int = -1  # -1: the clean pass
    batch: int = 0


def fingerprint(model: Any, x: Tensor, y: Tensor, settings: dict[str, Any]) -> dict[str, str]:
    """What must be the same for a state to be taken up."""
    module, marks = owner(model), {"x": _digest([x]), "y": _digest([y])}
    if isinstance(module, torch.nn.Module):
        marks["model"] = _digest([t for t in module.state_dict().values() if isinstance(t, Tensor)])
    for name, value in settings.items():
        marks[name] = _digest([value]) if isinstance(value, Tensor) else repr(value)
    return marks


def _bytes(t: Tensor) -> np.ndarray[Any, Any]:
    flat: np.ndarray[Any, Any] = t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat


def _digest(tensors: list[Tensor]) -> str:
    found = hashlib.sha256()
    for t in tensors:
        found.update(f"{t.dtype}{tuple(t.shape)}".encode())
        found.update(_bytes(t).tobytes())
    return found.hexdigest()


def save(path: Path, marks: dict[str, str], progress: Progress) -> None:
    """Written beside the file and moved over it: whoever is stopped leaves the old state or the new one."""
    rows = (~progress.robust).nonzero()[:, 0]
    words = {"marks": marks, "report": progress.report.to_json(), "attack": progress.attack, "batch": progress.batch}
    arrays = {
        "words": np.frombuffer(json.dumps(words).encode(), np.uint8),
        "robust": progress.robust.cpu().numpy(),
        "proven": progress.proven.cpu().numpy(),
        "alive": progress.alive.cpu().numpy(),
        "adv": _bytes(progress.adv[rows]),
    }
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load(path: Path, marks: dict[str, str], x: Tensor) -> Progress | None:
    """The progress of this very evaluation; None where there is no file yet."""
    if not path.exists():
        return None
    try:
        with np.load(path) as file:
            arrays = {name: file[name] for name in ("words", *_FLAGS, "adv")}
        words = json.loads(arrays["words"].tobytes())
        there = words["marks"]
        flags = {name: torch.from_numpy(arrays[name]) for name in _FLAGS}  # what lacks its head comes as bytes
    except Exception as error:  # whatever numpy, zipfile and json make of a damaged file
        raise ValueError(f"state: got {path}, which is no state of an evaluation, expected one or no file") from error
    other = sorted(name for name in {*there, *marks} if there.get(name) != marks.get(name))
    if other:
        raise ValueError(
            f"state: got {path}, the state of another evaluation ({', '.join(other)} differ), expected one of this "
            "evaluation; remove the file or give another path"
        )
    flags = {name: flag.to(x.device) for name, flag in flags.items()}
    adv, rows = x.clone(), (~flags["robust"]).nonzero()[:, 0]
    if len(rows):
        stored = torch.from_numpy(arrays["adv"].copy()).view(x.dtype).reshape(len(rows), *x.shape[1:])
        adv[rows] = stored.to(x.device)
    report = EvaluationReport.from_json(words["report"])
    return Progress(adv, **flags, report=report, attack=words["attack"], batch=words["batch"])
