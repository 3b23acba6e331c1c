"""Faces of the box for each channel, pixel or example."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import attack_helpers as h
import fastrobust as fr

EPS = {h.INF: 0.1, 2: 0.7, 1: 2.3}


def _pgd(x: torch.Tensor, y: torch.Tensor, **options: Any) -> torch.Tensor:
    return fr.attacks.pgd(h.small_model(), x, y, **{"steps": 4, "seed": 0, **options})


BOXES: dict[str, tuple[Any, Any]] = {
    "channels": (torch.tensor([0.0, 0.2]).view(2, 1, 1), torch.tensor([0.7, 1.0]).view(2, 1, 1)),
    "numpy, float64": (np.array([0.1, 0.3]).reshape(2, 1, 1), np.array([0.7, 0.9]).reshape(2, 1, 1)),
    "pixels": (torch.linspace(0, 0.4, 60).view(2, 6, 5), torch.linspace(0.5, 1, 60).view(2, 6, 5)),
    "examples": (torch.linspace(0, 0.4, 7).view(7, 1, 1, 1), torch.ones(7, 1, 1, 1)),
    "one side": (0.25, torch.tensor([0.7, 1.0]).view(2, 1, 1)),
    "one tensor": (torch.tensor(0.25), torch.tensor(0.75)),
}


@pytest.mark.parametrize("kind", list(BOXES))
@pytest.mark.parametrize("norm", h.NORMS)
@pytest.mark.parametrize(
    "run", [{}, {"restarts": 3}, {"early_stop": True}, {"loss": "kl", "random_start": False}], ids=str
)
def test_boxes_that_broadcast(kind: str, norm: float, run: dict[str, Any]) -> None:
    x, y = h.small_batch()
    lo, hi = (torch.as_tensor(side, dtype=torch.float64) for side in BOXES[kind])
    x = torch.maximum(torch.minimum(x.double(), hi - 1e-3), lo + 1e-3).float()
    adv = _pgd(x, y, eps=EPS[norm], norm=norm, clip=BOXES[kind], **run)
    h.assert_inside(adv, x, EPS[norm], norm, None)
    assert bool(((adv.double() >= lo) & (adv.double() <= hi)).all())
    assert bool((adv != x).any()) and (
        norm != h.INF or not torch.equal(adv, _pgd(x, y, eps=EPS[norm], clip=None, **run))
    )


def test_a_box_of_tensors_is_the_box_of_its_numbers() -> None:
    x, y = h.small_batch()
    full = (torch.zeros_like(x[:1]), torch.ones_like(x[:1]))
    for norm in (h.INF, 2):
        assert torch.equal(_pgd(x, y, eps=EPS[norm], norm=norm, clip=full), _pgd(x, y, eps=EPS[norm], norm=norm))
