"""Networks as other people write them, frozen: outputs and input gradients are those of the dense network in float64.

Gradients jump where a sum crosses a kink (ReLU at 0, ReLU6 at 6, Hardswish at 3, the winner of a max pooling). Float32
and float64 take the same side only where the sum is further away than rounding, so each network gets the images of a
draw that stay away from all of its kinks (`clear_images`). On those, both gradients are sums of the same terms, and
what is left is
rounding: 2^-24 a step, grown by the few hundred steps from a pixel to an output and by normalisations that divide by
small deviations. Float32 torch shows up to 3e-6 of the largest entry on these networks; a wrong slope, sign, channel or
border shows 5e-4 and more; the bar of 1e-4 lies between.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastrobust as fr
from fastrobust.benchmarks import models_of_others as others

TOLERANCE = 1e-4
# Distance of every sum from its kinks, relative to the size of the map it is in: above what rounding moves it.
CLEARANCE = 1e-5
RATES = (0.5, 0.95)
aten = torch.ops.aten
KINKS: dict[Any, tuple[float, ...]] = {
    aten.relu: (0.0,), aten.relu_: (0.0,), aten.leaky_relu: (0.0,), aten.leaky_relu_: (0.0,),
    aten.hardtanh: (0.0, 6.0), aten.hardtanh_: (0.0, 6.0), aten.hardswish: (-3.0, 3.0), aten.hardswish_: (-3.0, 3.0),
}  # fmt: skip


class Clearance(TorchDispatchMode):
    """The smallest distance of any sum of each example from a kink, relative to the map it is in."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.of_example = torch.full((batch,), float("inf"), dtype=torch.float64)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kinks = KINKS.get(func.overloadpacket)
        if kinks is not None:
            x = args[0].flatten(1)
            for kink in kinks:
                self._see((x - kink).abs(), x)
        elif func.overloadpacket is aten.max_pool2d_with_indices:
            x, size = args[0], args[1]
            windows = F.unfold(x.flatten(0, 1)[:, None], size, stride=args[2])
            first, second = windows.topk(2, dim=1).values.unbind(1)
            # Equal values have equal gradients where they are the flat part of the activation below, and are no kink.
            gap = torch.where(first == second, float("inf"), first - second)
            self._see(gap.reshape(x.shape[0], -1), x.flatten(1))
        return func(*args, **(kwargs or {}))

    def _see(self, distance: Tensor, x: Tensor) -> None:
        size = x.abs().amax(1, keepdim=True).clamp_min(1e-30)
        # A channel without weights is exactly zero in any precision, and so is its gradient.
        far = torch.where(distance == 0, float("inf"), distance / size)
        self.of_example = torch.minimum(self.of_example, far.amin(1))


@functools.cache
def given(name: str, activation: str, rate: float) -> tuple[nn.Module, nn.Module, Tensor]:
    """The masked network, its dense copy in float64, and three images away from its kinks.

    Of small networks some draws keep no path from the images to the outputs: their gradient is zero, which says
    nothing.
    """
    for seed in range(20):
        model, shape = others.masked(name, activation, rate, 0.1, small=True, seed=seed)
        exact = fr.nn.dense_copy(model).double().requires_grad_(False)
        images = clear_images(exact, shape, 3)
        if bool((outputs_and_gradient(exact, images.double())[1].flatten(1) != 0).any(1).all()):
            return model, exact, images
    raise AssertionError("no network with a gradient")


def clear_images(exact: nn.Module, shape: tuple[int, ...], count: int, drawn: int = 128) -> Tensor:
    images = torch.rand(drawn, *shape, generator=torch.Generator().manual_seed(1))
    clearance = Clearance(drawn)
    with torch.no_grad(), clearance:
        exact(images.double())
    best = clearance.of_example.topk(count)
    assert best.values[-1] > CLEARANCE, best.values
    return images[best.indices]


def outputs_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    # Of mixed signs and sizes: a gradient of equal entries would hide exchanged channels.
    weight = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return y.detach(), torch.autograd.grad((weight * y).sum(), x)[0]


def difference(got: Tensor, want: Tensor) -> float:
    assert got.dtype == torch.float32 and got.shape == want.shape
    return float((got.double() - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("path", ["sparse", "dense", "auto"])
@pytest.mark.parametrize(("name", "activation"), others.variants())
def test_frozen_network_is_the_dense_network(
    name: str, activation: str, path: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTROBUST_BINARY", path)
    model, exact, images = given(name, activation, rate)
    frozen = fr.nn.freeze(model)
    for batch in (1, 3):
        want_y, want_grad = outputs_and_gradient(exact, images[:batch].double())
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = images[:batch].contiguous(memory_format=memory_format)
            y, grad = outputs_and_gradient(frozen, x)
            assert difference(y, want_y) < TOLERANCE, (batch, memory_format)
            assert difference(grad, want_grad) < TOLERANCE, (batch, memory_format)
            with torch.no_grad():
                assert difference(frozen(x), want_y) < TOLERANCE, (batch, memory_format)


@pytest.mark.parametrize(("name", "activation"), [("PreAct-ResNet-18", "ReLU"), ("MobileNetV2", "ReLU6")])
def test_the_gradient_keeps_the_layout_of_the_input(name: str, activation: str) -> None:
    model, _, images = given(name, activation, 0.95)
    frozen = fr.nn.freeze(model)
    _, grad = outputs_and_gradient(frozen, images.contiguous(memory_format=torch.channels_last))
    assert grad.is_contiguous(memory_format=torch.channels_last)
    _, grad = outputs_and_gradient(frozen, images)
    assert grad.is_contiguous()


def test_every_network_is_its_own() -> None:
    """The full-size networks have the layers and weights their papers give them (batch normalisation not counted)."""
    weights = {
        "WRN-28-4": 5.8e6, "PreAct-ResNet-18": 11.2e6, "VGG-16-BN": 14.7e6, "MobileNetV2": 2.2e6, "MLP": 0.67e6,
        "LeNet-5": 0.062e6, "ResNet-18": 11.2e6,
    }  # fmt: skip
    for name, count in weights.items():
        with torch.device("meta"):
            found = sum(p.numel() for p in others.NETWORKS[name].make().parameters() if p.dim() > 1)
        assert abs(found - count) < 0.02 * count, (name, found)
