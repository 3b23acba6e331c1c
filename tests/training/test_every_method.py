"""What holds for every registered method: it trains by its name, and resumes with the bits of a training never
stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.training import loader, make, methods, train

EPOCHS = 4


def problem() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20, 1, 6, 6, generator=g)
    return x, x.flatten(1)[:, ::9].argmax(1)


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 4)
    )
    return fr.nn.convert(model, rate=0.5, gamma=1.0) if name.startswith("edge-popup") else model


def run(name: str, folder: Path | None, stop: int = 0) -> tuple[nn.Module, list[dict[str, float]]]:
    model = network(name)

    def callback(_: nn.Module, record: dict[str, float]) -> None:
        if record["epoch"] == stop:
            raise KeyboardInterrupt

    torch.manual_seed(2)
    history = train(
        model, loader(*problem(), 8, seed=3), make(name), epochs=EPOCHS, scheduler=[0.05, 0.04, 0.03, 0.02],
        checkpoint=folder, resume=True, callbacks=callback,
    )  # fmt: skip
    return model, history


# of regression: its own tests train it
@pytest.mark.parametrize("name", sorted(set(methods()) - {"projected"}))
def test_resumes_with_the_same_bits(name: str, tmp_path: Path) -> None:
    model, history = run(name, None)
    assert all(math.isfinite(r["loss"]) and 0 <= r["accuracy"] <= 1 for r in history)
    before = network(name).state_dict()
    assert any(not torch.equal(before[k], t) for k, t in model.state_dict().items() if isinstance(t, Tensor))
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run(name, tmp_path, stop)
        torch.manual_seed(99)
    again, records = run(name, tmp_path)
    for (key, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, key
    strip = lambda record: {k: v for k, v in record.items() if k != "seconds"}
    assert list(map(strip, history)) == list(map(strip, records))


@pytest.mark.parametrize("name", sorted(methods()))
def test_settings_are_plain_values(name: str) -> None:
    made: Any = make(name)
    assert all(isinstance(v, int | float | str | tuple | list) or v is None for v in made.settings().values())
