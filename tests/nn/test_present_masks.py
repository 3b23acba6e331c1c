"""Masks follow the scores however those are changed: what runs is compared with a mask computed afresh."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import nn as fnn
from fastrobust.nn.masked import MaskedLayer
from fastrobust.ops.binary import _scored_conv as kept
from fastrobust.reference import binary as reference

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.5),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
}


def fresh(layer: MaskedLayer) -> Tensor:
    """The masked weight from the present scores, signs and magnitude, by the reference alone."""
    scores = layer.scores.detach().clone()
    mask = reference.topk_mask(scores.abs() if layer.absolute else scores, layer.keep)
    return (layer.signs * mask).to(scores.dtype) * layer.magnitude


def check(layer: MaskedLayer, x: Tensor, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        y = layer(x)
    torch.testing.assert_close(
        y.detach(), F.conv2d(x, fresh(layer), layer.bias, padding=1).detach(), rtol=1e-4, atol=1e-4
    )


def optimiser_step(layer: MaskedLayer, x: Tensor, name: str) -> None:
    optimiser = OPTIMISERS[name](layer.parameters())
    layer(x).square().sum().backward()
    optimiser.step()
    optimiser.zero_grad()


@torch.no_grad()
def change(layer: MaskedLayer, what: str, at: int) -> None:
    scores, flat = layer.scores, layer.scores.data.view(-1)
    one = at % scores.numel()
    if what == "data, all":
        scores.data.neg_()
    elif what == "data, one":
        flat[one] = flat.max() + 1 if flat[one] < flat.max() else flat.min() - 1
    elif what == "numpy":
        array = scores.detach().numpy()
        array[:] = array[::-1].copy()
    elif what == "other memory":
        scores.data = torch.roll(scores.data, 1)
    elif what == "counted":
        scores.mul_(-1)
    elif what == "signs":
        layer.signs.data.view(-1)[one] *= -1
    elif what == "magnitude":
        layer.magnitude.data.mul_(1.5)
    elif what == "keep":
        layer.keep = one
    elif what == "absolute":
        layer.absolute = not layer.absolute
    else:
        layer.load_state_dict(copy.deepcopy(layer).state_dict() | {"scores": scores.flip(0)})


CHANGES = (
    "data, all", "data, one", "numpy", "other memory", "counted", "signs", "magnitude", "keep", "absolute", "state",
    *OPTIMISERS,
)  # fmt: skip


@given(
    steps=st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 10_000), st.booleans()), min_size=1, max_size=8),
    seed=st.integers(0, 99),
)
def test_random_changes_are_seen_by_what_runs(steps: list[tuple[str, int, bool]], seed: int) -> None:
    torch.manual_seed(seed)
    layer = fnn.BinaryMaskedConv2d(4, 6, 3, padding=1, bias=True, keep=50)
    x = torch.randn(2, 4, 5, 5)
    check(layer, x, False)
    for what, at, grad in steps:
        if what in OPTIMISERS:
            optimiser_step(layer, x, what)
        else:
            change(layer, what, at)
        check(layer, x, grad)
        assert torch.equal(layer.dense_weight(), fresh(layer))


@given(
    changes=st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 10**6)), min_size=1, max_size=4),
    updates=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_update_takes_over_every_change(changes: list[tuple[str, int]], updates: list[bool]) -> None:
    """Layers too large to be compared whole in a forward; update() and packed() compare every entry."""
    torch.manual_seed(len(changes))
    model = nn.Sequential(fnn.BinaryMaskedConv2d(64, 80, 3, padding=1, keep=2000, bias=True)).eval()
    assert model[0].scores.numel() * 4 > 2 * kept.COMPARED_BYTES
    frozen = fnn.freeze(model)
    x = torch.randn(2, 64, 4, 4)
    want = frozen(x)
    for (what, at), update in zip(changes, updates, strict=False):
        if what in OPTIMISERS:
            optimiser_step(model[0], x, what)
        else:
            change(model[0], what, at)
        assert torch.equal(frozen(x), want)
        if update:
            frozen.update()
            want = frozen(x)
            torch.testing.assert_close(
                want, F.conv2d(x, fresh(model[0]), model[0].bias.detach(), padding=1), rtol=1e-3, atol=1e-3
            )
    assert torch.equal(model[0].dense_weight(), fresh(model[0]))


@pytest.mark.parametrize("name", OPTIMISERS)
def test_a_step_that_moves_a_single_score_of_a_large_layer_is_seen(name: str) -> None:
    layer = fnn.BinaryMaskedLinear(500, 300, keep=4000)
    x = torch.randn(3, 500)
    with torch.no_grad():
        layer(x)
        layer.scores.data.view(-1)[:] = torch.linspace(-1, 1, 150_000)[torch.randperm(150_000)]
    layer.refresh()
    before = layer.packed()
    optimiser = OPTIMISERS[name](layer.parameters())
    layer.scores.grad = torch.zeros_like(layer.scores)
    layer.scores.grad.view(-1)[int(layer.scores.argmin())] = -1e4
    for _ in range(200 if "adam" in name else 1):
        optimiser.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, fresh(layer)), rtol=1e-4, atol=1e-3)
    assert not torch.equal(before.to_dense(), layer.packed().to_dense())


def test_steps_of_other_models_keep_the_lists() -> None:
    layer, other = fnn.BinaryMaskedLinear(8, 8, keep=9), nn.Linear(3, 3)
    packed = layer.packed()
    optimiser = torch.optim.SGD(other.parameters(), lr=1.0)
    other(torch.ones(3)).sum().backward()
    optimiser.step()
    assert layer.packed() is packed and not layer.stale()


def test_layers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = fnn.BinaryMaskedConv2d(4, 6, 3, padding=1, keep=50)
        x = torch.randn(2, 4, 5, 5)
        check(layer, x, False)
        layer.scores.neg_()
        check(layer, x, False)
    check(layer, torch.randn(2, 4, 5, 5), False)


def test_copies_and_pickles_make_their_own_lists() -> None:
    layer = fnn.BinaryMaskedConv2d(4, 6, 3, padding=1, keep=50)
    x = torch.randn(2, 4, 5, 5)
    want = layer(x)
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again(x), want)
        again.scores.data.neg_()
        check(again, x, False)
    check(layer, x, False)


@pytest.mark.parametrize("change_signs", [False, True])
def test_the_gradient_is_that_of_the_forward(change_signs: bool) -> None:
    """Magnitudes are read at the forward; scores and signs that changed in between are refused, as torch does."""
    layer = fnn.BinaryMaskedConv2d(4, 6, 3, padding=1, keep=50, init="signed_constant")
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    want = torch.autograd.grad(layer(x).sum(), [x, layer.scores])
    y = layer(x)
    with torch.no_grad():
        layer.magnitude.mul_(3)
        if change_signs:
            layer.signs.neg_()
    if change_signs:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    else:
        assert all(map(torch.equal, torch.autograd.grad(y.sum(), [x, layer.scores]), want))


def test_the_gradient_of_a_frozen_model_survives_updates() -> None:
    model = fnn.convert(
        nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, 2)), 0.7, 0.5
    )
    model.eval()
    frozen = fnn.freeze(model)
    x = torch.randn(5, 2, 12, 12, requires_grad=True)
    (want,) = torch.autograd.grad(frozen(x).square().sum(), x)
    y = frozen(x)
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p.neg_()
            model[1].running_mean.add_(1)
        frozen.update()
        frozen(x).sum().backward()
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], want)


def test_edge_popup_with_a_fused_optimiser_moves_what_runs() -> None:
    model = fnn.convert(fnn.small_cnn(width=4), 0.7, 1.0)
    before = {n: layer.packed().to_dense() for n, layer in fnn.masked_layers(model).items()}
    x, y = torch.rand(32, 1, 14, 14), torch.arange(32, dtype=torch.int32) % 10
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    fr.training.edge_popup(model, [(x, y)], epochs=2, eps=0.05, steps=1, optimizer=optimiser)
    for name, layer in fnn.masked_layers(model).items():
        assert torch.equal(layer.packed().to_dense() * layer.magnitude, fresh(layer))
        assert not torch.equal(layer.packed().to_dense(), before[name])
