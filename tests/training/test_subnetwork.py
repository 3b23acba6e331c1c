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


@pytest.mark.parametrize("order", ["upsample-first", "printed"])
def test_fast_training_moves_the_stored_perturbations(order: str) -> None:
    model = masked_net()
    x, y = stripes(64)
    store = training.PerturbationStore(
        64, (1, 8, 8), dtype=torch.float16, downsample=2, augment_first=order == "printed"
    )
    records = training.edge_popup_fast(
        model, batches(x, y), epochs=5, eps=0.1, store=store, augmentation=training.ShiftFlip(1, flip=False)
    )
    assert bool(store.known.all()) and store.nbytes == 64 * 16 * 2
    assert records[-1]["loss"] < records[0]["loss"]
    kept = store.perturbations.float()
    assert kept.abs().max() <= 0.1 + 1e-3 and kept.abs().mean() > 0.01
    assert robust_accuracy(model, *stripes(64)) > 0.9


def test_fast_training_is_the_algorithm_line_by_line() -> None:
    """Algorithm 5.2 without moves: one batch an epoch, the second from what the first has kept."""
    model = masked_net()
    x, y = stripes(32)
    index = torch.arange(32)
    method = training.EdgePopupFast(0.1, shift=0, flip=False, dtype=torch.float32)
    method.begin(model, 32, 2)
    kept = None
    for epoch in range(2):
        adv = method.perturb(model, training.Batch(x, y, index, epoch, 2))
        frozen = fnn.freeze(model)
        if kept is not None:  # the first start is random
            start = nn.functional.interpolate(kept, (8, 8), mode="bilinear", align_corners=False)
            leaf = (x + start.clamp(-0.1, 0.1)).clamp(0, 1).requires_grad_()
            (grad,) = torch.autograd.grad(nn.functional.cross_entropy(frozen(leaf), y, reduction="sum"), leaf)
            want = (x + (leaf.detach() + 0.125 * grad.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
            # a start that rounds otherwise may lie on the other side of a kink, where gradients near zero turn
            assert ((adv - want).abs() > 1e-6).double().mean() < 0.01
        kept = nn.functional.avg_pool2d(adv - x, 2)
        torch.testing.assert_close(method.store.perturbations, kept, rtol=0, atol=1e-6)


def test_clean_training_and_own_optimizer() -> None:
    model = masked_net()
    x, y = stripes(64)
    optimizer = training.score_optimizer(model, lr=0.05)
    before = [p.detach().clone() for p in model.parameters()]
    training.edge_popup(model, [b[:2] for b in batches(x, y)], epochs=1, eps=0.0, optimizer=optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="model: expected masked layers"):
        training.edge_popup(nn.Linear(2, 2), [], epochs=1, eps=0.1)
    with pytest.raises(ValueError, match="epochs: expected an int"):
        training.edge_popup(masked_net(), [], epochs=-1, eps=0.1)
    with pytest.raises(ValueError, match="attack_mode: expected 'eval' or 'train', got 'test'"):
        training.edge_popup(masked_net(), [], epochs=1, eps=0.1, attack_mode="test")
    with pytest.raises(ValueError, match="loader: expected at least one batch"):
        training.edge_popup(masked_net(), [], epochs=1, eps=0.1)
    with pytest.raises(ValueError, match="order: got 'low', expected one of upsample-first, printed"):
        training.EdgePopupFast(order="low")
