"""The Python examples of the README and of docs/ run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastrobust as fr

ROOT = Path(__file__).resolve().parent.parent
TEMPLATES = {"benchmarks.md"}  # skeletons of a suite and of an adapter, to be filled in: they only have to parse


def examples(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


FILES = [path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if examples(path)]


def names() -> dict[str, object]:
    """What the examples take for granted: a model, images and labels, and the state of an attack."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 10)).eval()
    x = torch.rand(6, 3, 8, 8)
    with torch.no_grad():
        y = model(x).argmax(1)
    return {"model": model, "x": x, "y": y, "x0": x.clone(), "grad": torch.randn_like(x), "target_class": (y + 1) % 10}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_examples_run(path: Path) -> None:
    given = names()
    space = dict(given)
    for text in examples(path):
        code = compile(text, str(path), "exec")
        if path.name not in TEMPLATES:
            exec(code, space)
    if "adv" in space:  # the examples' own claim: inside the ball and the box
        adv, x0 = space["adv"], given["x0"]
        assert isinstance(adv, Tensor) and isinstance(x0, Tensor)
        assert ((adv.double() - x0.double()).abs() <= 10 / 255).all() and ((adv >= 0) & (adv <= 1)).all()


def test_every_file_of_the_documentation_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert f"docs/{path.name}" in text, path.name


def test_names_in_the_readme_exist() -> None:
    found = re.findall(r"`fr\.([\w.]+)`", (ROOT / "README.md").read_text())
    assert len(found) > 10
    for name in found:
        value: object = fr
        for part in name.split("."):
            value = getattr(value, part)
