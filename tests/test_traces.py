"""docs/contributing/traces.md: a call of each family passes through every Python file that its table names."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import fastrobust as fr

ROOT = Path(__file__).parent.parent
PACKAGE = Path(fr.__file__).parent


def sections() -> dict[str, list[str]]:
    """The files of the package that each table of the page names, relative to it."""
    text = (ROOT / "docs" / "contributing" / "traces.md").read_text()
    return {
        head: re.findall(r"`python/fastrobust/([\w/]+\.py)`", "\n".join(re.findall(r"^\|.*$", body, re.MULTILINE)))
        for head, body in re.findall(r"^## ([\w ]+?):.*?\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    }


def visited(call: Callable[[], object]) -> set[str]:
    """Files of the package in which a function is entered while the call runs."""
    found: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            found.add(frame.f_code.co_filename)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return {str(Path(f).relative_to(PACKAGE)) for f in found if f.startswith(str(PACKAGE))}


def small() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)
    )
    return model.eval(), torch.rand(4, 1, 8, 8), torch.arange(4)


def attack() -> None:
    model, x, y = small()
    fr.attacks.pgd(model, x, y, eps=0.1, steps=2)


def bound() -> None:
    model, x, y = small()
    with torch.no_grad():
        fr.bounds.compute_bounds(model, x, 0.05, method="crown", labels=y)


def certify() -> None:
    model, x, y = small()
    fr.certify.polyhedral_envelope(model, x, y, 0.05, clip=(0, 1))


def freeze() -> None:
    model, x, _ = small()
    fr.nn.freeze(fr.nn.convert(model, rate=0.5, gamma=1))(x)


def train() -> None:
    model, x, y = small()
    fr.training.train(model, [(x, y)], "trades", epochs=1, checkpoint="run")


CALLS = {"An attack": attack, "Bounds": bound, "A certificate": certify, "A masked network": freeze, "Training": train}


@pytest.mark.parametrize("head", CALLS)
def test_the_files_of_a_trace_are_passed_through(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    named = sections()[head]
    assert len(named) >= 2
    assert not set(named) - visited(CALLS[head])
    assert set(sections()) == set(CALLS)
