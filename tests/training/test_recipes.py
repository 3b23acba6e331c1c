"""Rates over a training, random crops, and every registered method through the loop."""

from __future__ import annotations

import pytest
import torch

from fastrobust import training
from fastrobust.training.recipes import RECIPES, Recipe, recipe


def test_rates_of_the_papers_by_epoch() -> None:
    wang = [round(recipe("dynamic").rate(epoch / 120), 8) for epoch in range(120)]
    assert wang == [0.01] * 60 + [0.001] * 40 + [0.0001] * 20
    atta = [round(recipe("atta").rate(epoch / 38), 8) for epoch in range(38)]
    assert atta == [0.1] * 30 + [0.01] * 6 + [0.001] * 2
    atas = [round(recipe("atas").rate(epoch / 30), 8) for epoch in range(30)]
    assert atas == [0.1] * 24 + [0.01] * 4 + [0.001] * 2
    pas = [round(recipe("pas").rate(epoch / 200), 8) for epoch in range(200)]  # anew at 100 and 150
    assert pas[:100] == [0.1] * 50 + [0.01] * 25 + [0.001] * 25
    assert pas[100:150] == pas[150:] == [0.1] * 25 + [0.01] * 13 + [0.001] * 12
    assert "anew at 100, 150" in recipe("pas").text()
    fast = recipe("fgsm-rs")
    assert fast.rate(0) == 0 and fast.rate(0.5) == 0.2 and fast.rate(0.25) == fast.rate(0.75) == pytest.approx(0.1)
    cosine = Recipe(lr=0.4, schedule="cosine")
    assert [cosine.rate(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.0])
    assert Recipe(lr=0.3, schedule="constant").rate(0.99) == 0.3


def test_recipes_with_changes() -> None:
    assert recipe("atta", epochs=3, lr=None) == Recipe(3, 64, 0.1, 2e-4, drops=(30 / 38, 36 / 38))
    assert recipe("a method of yours") == Recipe()
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    for name, one in RECIPES.items():
        made = one.make_optimizer(model)
        assert [len(g["params"]) for g in made.param_groups] == [1], name
        assert made.param_groups[0]["lr"] == one.lr and str(one.epochs) in one.text()


def test_loaders_move_images_as_crops_and_mirror_images() -> None:
    x = torch.rand(40, 2, 5, 7)
    loader = training.loader(x, torch.zeros(40, dtype=torch.int64), 16, augment=training.ShiftFlip(2, seed=4))
    batches = list(loader)
    assert [len(b[0]) for b in batches] == [16, 16, 8]
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for images, _, numbers in batches:
        for image, source in zip(images, padded[numbers], strict=True):
            found = [
                (dy, dx, flip) for dy in range(5) for dx in range(5) for flip in (False, True)
                for whole in [source.flip(2) if flip else source]
                if torch.equal(image, whole[:, dy : dy + 5, dx : dx + 7])
            ]  # fmt: skip
            assert found
            seen.add(found[0])
    assert len(seen) > 20 and {flip for *_, flip in seen} == {False, True}
    again = list(loader)  # another epoch
    assert any(not torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
    loader.set_epoch(0)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, loader, strict=True))
