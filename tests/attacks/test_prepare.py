"""Prepared victims: what the model says and its gradients, whatever the network; never stale; verdicts are the
model's."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastrobust as fr
from fastrobust.attacks import _making, prepare
from fastrobust.benchmarks import models_of_others
from prepared_networks import (
    LAST,
    NETWORKS,
    WAYS,
    Normalised,
    Residual,
    apart,
    head,
    network,
    outputs_and_gradient,
    settled,
    taken_whatever_the_speed,
)

module = importlib.import_module("fastrobust.attacks.prepare")

pytestmark = pytest.mark.usefixtures(taken_whatever_the_speed.__name__)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_of_every_way(name: str) -> None:
    """Whatever batch comes, not only one of the example's size; in float64 too."""
    model, x = network(name), torch.rand(6, 3, 8, 8)
    victim = prepare(model, x)
    report = victim.report
    assert report.prepared and len(report.folded) == NETWORKS[name][1], report
    if name == "branching":
        assert "torch.fx cannot read it" in report.why
    for batch in (1, 4, 9):
        assert apart(victim, model, torch.rand(batch, 3, 8, 8)) < 1e-4
    if name not in ("shared layer", "written through a view"):  # whose views do not take the layout
        assert apart(victim, model, x.contiguous(memory_format=LAST)) < 1e-4
    exactly = 0
    double, wide = copy.deepcopy(model).double(), torch.rand(3, 3, 8, 8).double()
    if isinstance(double, Normalised):
        double.std = double.std.double()
    for level, layout in WAYS:
        recipe = _making.Recipe(level, layout)
        if recipe.title in report.ratios:
            run, _ = _making.made(model, x, recipe)
            assert apart(run, model, torch.rand(5, 3, 8, 8)) < 1e-4, recipe.title
            assert apart(_making.made(double, wide, recipe)[0], double, wide) < 1e-12, recipe.title
            exactly += 1
    assert exactly >= (1 if name == "written through a view" else 2)


@pytest.mark.parametrize("name", models_of_others.NETWORKS)
def test_networks_of_others(name: str) -> None:
    of = models_of_others.NETWORKS[name]
    torch.manual_seed(2)
    model, x = models_of_others.settle(of.make(**of.small), of.small_shape), torch.rand(5, *of.small_shape)
    victim = prepare(model, x)
    assert victim.report.prepared and not victim.report.dropped, victim.report
    assert apart(victim, model, torch.rand(7, *of.small_shape)) < 1e-3


@st.composite
def random_networks(draw: Any) -> tuple[nn.Module, Tensor]:
    """A few layers with normalisation before, behind or nowhere, activations, and sums over them."""

    class Block(nn.Module):
        def __init__(self, layers: nn.Sequential, adds: bool, act: nn.Module) -> None:
            super().__init__()
            self.layers, self.adds, self.act = layers, adds, act

        def forward(self, x: Tensor) -> Tensor:
            y = self.layers(x)
            out: Tensor = self.act(y + x if self.adds else y)
            return out

    torch.manual_seed(draw(st.integers(0, 2**31)))
    blocks: list[nn.Module] = []
    channels = 4
    for _ in range(draw(st.integers(1, 4))):
        kernel, groups = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 4]))
        out = draw(st.sampled_from([4, 8]))
        stride, padding, bias = draw(st.integers(1, 2)), draw(st.integers(0, 1)), draw(st.booleans())
        layer: nn.Module = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=bias)
        same = out == channels and stride == 1 and kernel == 2 * padding + 1
        before, behind, inplace = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
        parts = [nn.BatchNorm2d(channels)] * before + [layer] + [nn.BatchNorm2d(out)] * behind
        act = draw(
            st.sampled_from([nn.ReLU(inplace), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5, inplace), nn.ELU(), nn.Identity()])
        )
        block = Block(nn.Sequential(*parts), same and draw(st.booleans()), act)
        blocks.append(block)
        channels = out
    model = settled(nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, 3)))
    return model, torch.rand(draw(st.integers(1, 5)), 4, 9, 7)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(random_networks(), st.integers(1, 6))
def test_random_networks(drawn: tuple[nn.Module, Tensor], batch: int) -> None:
    model, x = drawn
    victim = prepare(model, x)
    assert victim.report.prepared, victim.report
    assert apart(victim, model, torch.rand(batch, 4, 9, 7)) < 1e-3


def test_masked_layers_are_frozen() -> None:
    model, shape = models_of_others.masked("ResNet-18", "ReLU", 0.9, 0.1, small=True)
    x = torch.rand(4, *shape)
    victim = prepare(model, x)
    assert any(title.startswith("frozen") for title in victim.report.ratios)
    assert apart(victim, model, x) < 1e-4
    assert "frozen already" in prepare(fr.nn.freeze(model), x).report.why


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = network("residual").to(dtype), torch.rand(4, 3, 8, 8).to(dtype)
    victim = prepare(model, x)
    assert victim.report.prepared, victim.report
    assert victim(x).dtype == dtype
    got, want = outputs_and_gradient(victim, x), outputs_and_gradient(model, x)
    room = 16 * torch.finfo(dtype).eps
    assert float((got[0] - want[0]).double().norm()) <= room * float(want[0].double().norm())


# ---- where the model itself is run ----


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.l((x + 0.1 * torch.randn_like(x)).flatten(1))


class Gateless(Residual):
    """A part has no gradient, which a graph of the other values does not show."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.i(x)
        with torch.no_grad():
            gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
        return self.l((y * gate).relu().mean((2, 3)))


class Counting(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(x)


def hooked() -> nn.Module:
    model = Residual()
    model.i.register_forward_hook(lambda m, given, out: 2 * out)
    return model


FALLBACKS: dict[str, tuple[Callable[[], Any], str]] = {
    "noise": (Noisy, "gives other outputs for the same images"),
    "no gradient": (Gateless, "differs by"),
    "counter in a buffer": (Counting, "writes its own parameters or buffers"),
    "hook": (hooked, "hooks"),
    "function": (lambda: torch.nn.Flatten().forward, "not an nn.Module"),
    "fails": (lambda: head(features=7), "fails on the example"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_the_model_itself_with_one_line(name: str) -> None:
    make, why = FALLBACKS[name]
    model, x = make(), torch.rand(4, 3, 8, 8)
    model = model.eval() if isinstance(model, nn.Module) else model
    victim = prepare(model, x)
    text = str(victim.report)
    assert not victim.report.prepared and why in text and "\n" not in text
    assert victim.report.ratio == 1.0
    if name not in ("noise", "fails"):
        assert torch.equal(victim(x), model(x))


def test_what_does_not_pay_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_making, "PAYS", 1e9)
    model, x = network("residual"), torch.rand(4, 3, 8, 8)
    victim = prepare(model, x)
    assert victim.report.why.startswith("it does not pay") and torch.equal(victim(x), model(x))


def test_other_images_go_to_the_model() -> None:
    model, x = network("residual"), torch.rand(4, 3, 8, 8)
    victim = prepare(model, x)
    calls: list[Any] = []
    victim.built.run = calls.append
    for other in (torch.rand(2, 3, 10, 8), x[:0]):
        assert torch.equal(victim(other), model(other))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(victim(x), model(x))
    assert not calls
    victim(x)
    assert len(calls) == 1


def test_bad_input() -> None:
    model = network("plain")
    for given_model, example, error, text in (
        (3, torch.rand(2, 3, 8, 8), TypeError, "model: got"),
        (nn.ReLU, torch.rand(2, 3, 8, 8), TypeError, "model: got"),
        (model, [1.0], TypeError, "example: got"),
        (model, torch.ones(2, 3, 8, 8).long(), TypeError, "example: got"),
        (model, torch.rand(0, 3, 8, 8), ValueError, "example: got"),
        (model, torch.rand(3), ValueError, "example: got"),
    ):
        with pytest.raises(error, match=text):
            prepare(given_model, example)  # type: ignore[arg-type]
