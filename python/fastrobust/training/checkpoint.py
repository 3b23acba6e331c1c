"""Checkpoints from which a training goes on with the same bits, whenever it was stopped.

A folder holds ``last.pt`` and ``previous.pt``, everything after the last two epochs, and ``best.pt``, the weights that
did best on held-out images. All are read by ``torch.load(path, weights_only=True)``.
"""

from __future__ import annotations

import hashlib
import os
import random
import tempfile
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
_DIGITS = 64  # of a SHA-256 in hexadecimal


def write(path: Path, content: Any, before: Path | None = None) -> None:
    """Beside the file, onto the disk, and moved over it: whoever is stopped leaves the old file or the new one, and a
    full disk leaves the old one. ``before``: a name for the old file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w+b") as file:
            _save_sealed(content, file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    if os.name == "posix":  # the name itself is on the disk once the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _save_sealed(content: Any, file: IO[bytes]) -> None:
    """``torch.save``, and the SHA-256 of all of it as the archive's comment, which ``torch.load`` passes over. The
    archive's own checksums cover its parts, not its directory: one flipped bit there, and ``torch.load`` made other
    weights of whole parts."""
    torch.save(content, file)
    file.seek(-2, os.SEEK_END)  # the comment's length, the archive's last word
    file.write(_DIGITS.to_bytes(2, "little"))
    file.write(_digest(file, file.tell()))


def _digest(file: IO[bytes], size: int) -> bytes:
    """Of the first ``size`` bytes; the file stands behind them afterwards."""
    found = hashlib.sha256()
    file.seek(0)
    while size and (part := file.read(min(size, 1 << 20))):
        found.update(part)
        size -= len(part)
    return found.hexdigest().encode()


def read(path: Path) -> Any:
    """A file of :func:`write`, whole or not at all: of a damaged one ``torch.load`` makes other weights without a
    word."""
    size = path.stat().st_size - _DIGITS
    with path.open("rb") as file:
        if size < 0 or _digest(file, size) != file.read():
            raise ValueError("it is no checkpoint of a training or is damaged: its checksum is not that of its content")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def save(folder: Path, content: dict[str, Any]) -> None:
    """The last state becomes the previous one; at every moment one of the two is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob("*.pt*.part"):  # of a process that was killed
        left.unlink(missing_ok=True)
    write(folder / "last.pt", {"format": FORMAT, **content}, folder / "previous.pt")


def load(folder: Path) -> dict[str, Any] | None:
    """The newest state that can be read; None where there is none yet.

    Raises:
        ValueError: there are files, and none can be read.
    """
    reasons = []
    for path in (folder / "last.pt", folder / "previous.pt"):
        if not path.exists():
            continue
        try:
            content: Any = read(path)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError("it is no checkpoint of a training, or one of another version")
        except Exception as error:  # whatever torch.load makes of a damaged file
            reasons.append(f"{path.name}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            continue
        if reasons:
            warnings.warn(f"checkpoint: going on from {path}, since {reasons[0]}", UserWarning, stacklevel=2)
        return content
    if reasons:
        raise ValueError(f"checkpoint: got {folder}, whose files cannot be read ({'; '.join(reasons)})")
    return None


def compare(there: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuses a state of other settings: names what differs."""
    other = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if other:
        words = ", ".join(f"{name} {there.get(name)!r} in the checkpoint, {here.get(name)!r} now" for name in other)
        raise ValueError(
            f"checkpoint: got a training with other settings ({words}), expected the same ones, or another folder"
        )


def random_state() -> dict[str, Any]:
    """Of torch on every device, Python and numpy, as tensors and plain values."""
    words = np.random.get_state(legacy=True)  # noqa: NPY002
    kind, keys, *rest = words
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *(float(v) for v in rest)],
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, place, has, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), int(place), int(has), cached))  # noqa: NPY002


def loader_state(loader: Any) -> dict[str, Any]:
    """What the next epoch's batches depend on besides the global random state: a loader that keeps a state of its own,
    or the generators of a DataLoader and its sampler."""
    if hasattr(loader, "state_dict"):
        return {"own": loader.state_dict()}
    return {name: g.get_state() for name, g in _generators(loader).items()}


def set_loader_state(loader: Any, state: dict[str, Any]) -> None:
    if "own" in state:
        loader.load_state_dict(state["own"])
        return
    for name, g in _generators(loader).items():
        if name in state:
            g.set_state(state[name])


def _generators(loader: Any) -> dict[str, torch.Generator]:
    sampler = getattr(loader, "sampler", None)
    found = {"loader": getattr(loader, "generator", None), "sampler": getattr(sampler, "generator", None)}
    return {name: g for name, g in found.items() if isinstance(g, torch.Generator)}


def plain(value: Any) -> Any:
    """Settings as they are compared: numbers, words, sequences; of anything else its text."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return str(value)


__all__ = [
    "compare",
    "load",
    "loader_state",
    "plain",
    "random_state",
    "save",
    "set_loader_state",
    "set_random_state",
    "write",
]
