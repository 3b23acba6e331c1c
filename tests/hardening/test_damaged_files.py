"""Files as disks and networks leave them: bytes flipped, cut off, zeroed, appended. What is read is what was written,
or it is refused by name; nothing else happens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastrobust as fr
from combinations import THOROUGH
from fastrobust.attacks import _state
from fastrobust.training import checkpoint


@dataclass
class File:
    path: Path
    read: Callable[[], Any]  # what the file says
    refused: str  # how the error begins


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def packed(folder: Path) -> File:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))

    path = folder / "model"
    fr.nn.save_packed(fr.nn.convert(model(), 0.5, 0.5, init="binary"), path)
    return File(path, lambda: fr.nn.load_packed(path, model()).state_dict(), "path: expected a packed model, got")


def evaluation(folder: Path) -> File:
    path, x = folder / "state.npz", torch.rand(4, 1, 4, 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    fr.attacks.autoattack(model, x, torch.tensor([0, 1, 2, 0]), eps=0.3, version=["apgd-ce"], state=path)
    with np.load(path) as file:
        marks = json.loads(file["words"].tobytes())["marks"]

    def read() -> Any:
        found = _state.load(path, marks, x)
        assert found is not None
        return [found.adv, found.robust, found.proven, found.alive, found.report.to_json(), found.attack, found.batch]

    return File(path, read, "state: got")


def training(folder: Path) -> File:
    model = nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.Linear(12, 3))
    checkpoint.save(folder, {"epoch": 3, "model": model.state_dict(), "random": checkpoint.random_state()})
    return File(folder / "last.pt", lambda: checkpoint.load(folder), "checkpoint: got")


def damaged(body: bytes, draw: random.Random) -> bytes:
    kind = draw.choice(["flip", "flip", "flip", "end", "cut", "zero", "append", "twice"])
    # the directory of an archive is at its end
    at = draw.randrange(len(body)) if kind != "end" else len(body) - 1 - draw.randrange(min(len(body), 600))
    if kind in ("flip", "end"):
        return body[:at] + bytes([body[at] ^ draw.randrange(1, 256)]) + body[at + 1 :]
    if kind == "cut":
        return body[:at]
    if kind == "zero":
        count = min(draw.randrange(1, 64), len(body) - at)
        return body[:at] + bytes(count) + body[at + count :]
    return body + (draw.randbytes(draw.randrange(1, 40)) if kind == "append" else body)


@pytest.mark.parametrize("kind", [packed, evaluation, training])
def test_what_is_read_is_what_was_written(kind: Callable[[Path], File], tmp_path: Path) -> None:
    file = kind(tmp_path)
    body, want, draw = file.path.read_bytes(), file.read(), random.Random(1)
    assert same(file.read(), want)
    refused = 0
    for _ in range(5000 if THOROUGH else 150):
        changed = damaged(body, draw)
        file.path.write_bytes(changed)
        try:
            found = file.read()
        except ValueError as error:
            assert str(error).startswith(file.refused), error
            refused += 1
        else:
            assert same(found, want)  # bytes that say nothing, such as dates in an archive
    assert refused > 75


@pytest.mark.parametrize("where", ["weight", "directory"])
def test_a_training_goes_on_from_the_whole_one_of_two_checkpoints(where: str, tmp_path: Path) -> None:
    """One flipped bit that torch.load does not see: in a weight, or in the archive's directory, where it makes a part
    a folder, which is read as nothing."""
    for epoch in (1, 2):
        checkpoint.save(tmp_path, {"epoch": epoch, "weight": torch.full((100,), float(epoch))})
    body = bytearray((tmp_path / "last.pt").read_bytes())
    if where == "weight":
        body[body.index(torch.full((3,), 2.0).numpy().tobytes()) + 2] ^= 1
    else:
        body[body.index(b"PK\x01\x02", body.rindex(b"/data/0") - 60) + 38] ^= 16  # external attributes
    (tmp_path / "last.pt").write_bytes(body)
    assert torch.load(tmp_path / "last.pt")["epoch"] == 2  # of the weight: another one, or what the memory held before
    with pytest.warns(UserWarning, match=r"going on from .*previous\.pt, since last\.pt: .* is damaged"):
        found = checkpoint.load(tmp_path)
    assert found is not None and found["epoch"] == 1 and found["weight"].eq(1).all()


def test_a_state_whose_directory_calls_a_part_empty(tmp_path: Path) -> None:
    """Nothing has the checksum 0, so that zipfile finds nothing wrong."""
    file = evaluation(tmp_path)
    body = bytearray(file.path.read_bytes())
    at = body.index(b"PK\x01\x02", body.rindex(b"robust.npy") - 60) + 16
    body[at : at + 12] = bytes(12)  # checksum and sizes
    file.path.write_bytes(body)
    with pytest.raises(ValueError, match="which is no state of an evaluation"):
        file.read()
