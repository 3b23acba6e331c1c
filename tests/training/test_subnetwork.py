"""Edge-popup with attacks (thesis, algorithms 5.1 and 5.2) on a task small enough for a test."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import nn as fnn
from fastrobust import training


def stripes(count: int) -> tuple[Tensor, Tensor]:
    """Which half of the image is bright: learnable under a perturbation of 0.1."""
    y = torch.arange(count) % 2
    x = 0.3 * torch.rand(count, 1, 8, 8)
    x[y == 0, :, :4] += 0.6
    x[y == 1, :, 4:] += 0.6
    return x, y


def masked_net(rate: float = 0.8) -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16, affine=False), nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16, affine=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(256, 2, bias=False), nn.BatchNorm1d(2, affine=False),
    )  # fmt: skip
    return fnn.convert(net, rate, 0.3)


def batches(x: Tensor, y: Tensor, size: int = 32) -> list[tuple[Tensor, Tensor, Tensor]]:
    index = torch.arange(len(x))
    return list(zip(x.split(size), y.split(size), index.split(size), strict=True))


def robust_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    frozen = fnn.freeze(model)
    adversarial = fr.attacks.pgd(frozen, x, y, eps=0.1, steps=5, seed=0)
    return float((frozen(adversarial).argmax(1) == y).double().mean())


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_scores_learn_robustness_while_weights_stay(mode: str) -> None:
    model = masked_net()
    signs = {n: layer.signs.clone() for n, layer in fnn.masked_layers(model).items()}
    x, y = stripes(128)
    seen = []
    records = training.edge_popup(
        model, [b[:2] for b in batches(x, y)], epochs=6, eps=0.1, steps=2, attack_mode=mode,
        on_epoch=lambda m, record: seen.append(record["epoch"]),
    )  # fmt: skip
    assert seen == [1, 2, 3, 4, 5, 6] and len(records) == 6
    assert records[-1]["loss"] < records[0]["loss"]
    assert robust_accuracy(model, *stripes(64)) > 0.9
    for name, layer in fnn.masked_layers(model).items():
        assert torch.equal(layer.signs, signs[name])
        assert int(layer.mask().sum()) == layer.keep


def test_fast_training_moves_the_stored_perturbations() -> None:
    model = masked_net()
    x, y = stripes(64)
    store = training.PerturbationStore(factor=2)
    records = training.edge_popup_fast(
        model, batches(x, y), epochs=5, eps=0.1, store=store, augmentation=training.ShiftFlip(1, flip=False)
    )
    assert len(store) == 64 and store.nbytes == 64 * 16 * 2
    assert records[-1]["loss"] < records[0]["loss"]
    kept = torch.stack(list(store.kept.values())).float()
    assert kept.abs().max() <= 0.1 + 1e-3 and kept.abs().mean() > 0.01
    assert robust_accuracy(model, *stripes(64)) > 0.9


def test_clean_training_and_own_optimizer() -> None:
    model = masked_net()
    x, y = stripes(64)
    optimizer = training.score_optimizer(model, lr=0.05)
    before = [p.detach().clone() for p in model.parameters()]
    training.edge_popup(model, [b[:2] for b in batches(x, y)], epochs=1, eps=0.0, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_augmentation_goes_forth_and_back() -> None:
    x = torch.rand(20, 2, 9, 7) + 1
    change = training.ShiftFlip(2)
    drawn = change.sample(x)
    moved = change.apply(x, drawn)
    back = change.invert(moved, drawn)
    inside = back != 0
    assert torch.equal(back[inside], x[inside])
    assert torch.equal(back[:, :, 2:-2, 2:-2], x[:, :, 2:-2, 2:-2])
    for i, ((dy, dx), flip) in enumerate(zip(drawn[0].tolist(), drawn[1].tolist(), strict=True)):
        source = x[i].flip(2) if flip else x[i]
        want = nn.functional.pad(source, (2, 2, 2, 2))[:, 2 - dy : 11 - dy, 2 - dx : 9 - dx]
        assert torch.equal(moved[i], want)


def test_store_resamples_to_what_it_was_given() -> None:
    store = training.PerturbationStore(factor=2)
    constant = torch.tensor([0.25, -0.5]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    store.save(torch.tensor([7, 3]), constant)
    missing = torch.full((3, 3, 8, 8), 9.0)
    got = store.load(torch.tensor([3, 5, 7]), missing)
    assert torch.equal(got[0], constant[1]) and torch.equal(got[1], missing[1]) and torch.equal(got[2], constant[0])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="model: expected masked layers"):
        training.edge_popup(nn.Linear(2, 2), [], epochs=1, eps=0.1)
    with pytest.raises(ValueError, match="epochs: expected an int"):
        training.edge_popup(masked_net(), [], epochs=-1, eps=0.1)
    with pytest.raises(ValueError, match="attack_mode: expected 'eval' or 'train', got 'test'"):
        training.edge_popup(masked_net(), [], epochs=1, eps=0.1, attack_mode="test")
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        training.edge_popup(masked_net(), [], epochs=1, eps=0.1)
    with pytest.raises(ValueError, match="factor: expected at least 1, got 0"):
        training.PerturbationStore(0)
