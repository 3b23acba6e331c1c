"""The binary family: top-k masks, masked convolutions layer by layer, and ResNet-34 against dense torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr

from .case import (
    BEST_PEER,
    OURS,
    Agreement,
    Call,
    Candidate,
    Case,
    Context,
    Floor,
    Suite,
    Target,
    once,
    relative_difference,
)
from .peers import sparseprop
from .timing import clock_for, fastest

CHANNELS_LAST = torch.channels_last


class Layer(NamedTuple):
    """A convolution of ResNet-34 for CIFAR, with its density at r 0.99 and gamma 0.1."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    size: int  # of the input maps
    density: float

    def __str__(self) -> str:
        channels = (
            f"{self.in_channels}"
            if self.in_channels == self.out_channels
            else f"{self.in_channels}-{self.out_channels}"
        )
        return f"{channels} ch {self.kernel}x{self.kernel}{f'/{self.stride}' if self.stride > 1 else ''} on {self.size}x{self.size}"


# Every shape there is; the first four are what nearly all of the time goes to.
LAYERS = (
    Layer(64, 64, 3, 1, 32, 0.131),
    Layer(128, 128, 3, 1, 16, 0.038),
    Layer(256, 256, 3, 1, 8, 0.011),
    Layer(512, 512, 3, 1, 4, 0.0031),
    Layer(3, 64, 3, 1, 32, 1.0),
    Layer(64, 128, 3, 2, 32, 0.070),
    Layer(64, 128, 1, 2, 32, 0.51),
    Layer(128, 256, 3, 2, 16, 0.020),
    Layer(128, 256, 1, 2, 16, 0.146),
    Layer(256, 512, 3, 2, 8, 0.0058),
    Layer(256, 512, 1, 2, 8, 0.042),
)
DENSITIES = (0.5, 0.2, 0.05, 0.01, 0.002)
# Rounding of float32 sums of up to a few thousand terms, relative to one plus their size.
TOLERANCE = 5e-4


def mask_cases(context: Context) -> Iterator[Case]:
    """The scores of the largest layer of ResNet-34; the floor reads them and writes the mask."""
    size = 10_000 if context.level == "smoke" else 2_359_296
    keep = size // 100
    scores = once(lambda: torch.rand(size, generator=context.generator()).to(context.device))

    def by_sort() -> Tensor:
        mask = torch.zeros(size, dtype=torch.bool, device=context.device)
        mask[scores().sort(stable=True).indices[size - keep :]] = True
        return mask

    def by_kthvalue() -> Tensor:
        return scores() >= scores().kthvalue(size - keep + 1).values

    def by_topk() -> Tensor:
        mask = torch.zeros(size, dtype=torch.bool, device=context.device)
        mask[scores().topk(keep, sorted=False).indices] = True
        return mask

    def build(f: Callable[[], Tensor]) -> Callable[[], Call]:
        return lambda: f

    yield Case(
        "topk_mask",
        {"scores": size, "kept": keep},
        Candidate(OURS, lambda: partial(fr.ops.topk_mask, scores(), keep)),
        (
            Candidate("sort", build(by_sort)),
            Candidate("kthvalue", build(by_kthvalue)),
            Candidate("topk", build(by_topk)),
        ),
        Floor(bytes=5 * size),
        0.0,
        # Tied scores may be kept elsewhere; the count is what all agree on.
        lambda ours, theirs, _: relative_difference(ours.sum(), theirs.sum(), 1e-6),
        () if context.level == "smoke" else (Target("sort", 10.0), Target("kthvalue", 2.0)),
    )


def signs(context: Context, shape: tuple[int, ...], density: float) -> Tensor:
    generator = context.generator()
    weight = torch.randint(0, 2, shape, generator=generator).float() * 2 - 1
    return (weight * (torch.rand(shape, generator=generator) < density)).to(context.device)


def layer_case(context: Context, layer: Layer, batch: int, gradient: bool, weight_of_row: float = 1.0) -> Case:
    padding, stride = layer.kernel // 2, layer.stride
    shape = (layer.out_channels, layer.in_channels, layer.kernel, layer.kernel)
    weight = once(lambda: signs(context, shape, layer.density))
    image_shape = (batch, layer.in_channels, layer.size, layer.size)
    x = once(lambda: torch.randn(image_shape, generator=context.generator()).to(context.device))

    def ours_in(memory_format: torch.memory_format) -> Call:
        packed, image = fr.ops.pack(weight()), x().contiguous(memory_format=memory_format)
        if not gradient:
            return torch.no_grad()(lambda: fr.ops.masked_conv2d(image, packed, None, stride, padding))
        image = image.detach().requires_grad_()
        y = fr.ops.masked_conv2d(image, packed, None, stride, padding)
        return lambda: torch.autograd.grad(y, image, y.detach(), retain_graph=True)[0]

    def ours() -> Call:
        """In the memory format that suits us better, as the better of torch's two is what we are compared with."""
        return fastest([ours_in(torch.contiguous_format), ours_in(CHANNELS_LAST)], clock_for(context.device))

    def dense(memory_format: torch.memory_format) -> Callable[[], Call]:
        def build() -> Call:
            w, image = (t().contiguous(memory_format=memory_format) for t in (weight, x))
            if not gradient:
                return torch.no_grad()(lambda: F.conv2d(image.detach(), w, None, stride, padding))
            image = image.detach().requires_grad_()
            y = F.conv2d(image, w, None, stride, padding)
            return lambda: torch.autograd.grad(y, image, y.detach(), retain_graph=True)[0]

        return build

    def others() -> Call:
        return sparseprop.convolution(weight(), x(), stride, padding, gradient)

    return Case(
        "masked conv input gradient" if gradient else "masked conv",
        {"layer": str(layer), "density": layer.density, "batch": batch},
        Candidate(OURS, ours),
        (
            Candidate("dense NCHW", dense(torch.contiguous_format)),
            Candidate("dense NHWC", dense(CHANNELS_LAST)),
            Candidate("sparseprop", others),
        ),
        Floor(bytes=4 * batch * (layer.in_channels + layer.out_channels // stride**2) * layer.size**2),
        TOLERANCE,
        relative_difference,
        () if context.level == "smoke" else (Target(BEST_PEER, 0.95),),
        weight_of_row,
    )


def layer_cases(context: Context) -> Iterator[Case]:
    """Every layer at its own density, then the table of densities and batches, losses included."""
    if context.level == "smoke":
        yield layer_case(context, Layer(8, 8, 3, 1, 8, 0.1), 2, False)
        return
    full = context.at_least("full")
    # A full run has many rows of little time each, a default run few.
    for layer in LAYERS if full else LAYERS[:4]:
        for batch in (1, 16, 128) if full else (16,):
            yield layer_case(context, layer, batch, False, 0.05 if full else 1.0)
        if full or layer in LAYERS[:4]:
            yield layer_case(context, layer, 16, True, 0.05 if full else 1.0)
    if full:
        for layer in LAYERS[:4]:
            for density in DENSITIES:
                for batch in (1, 16, 33):
                    yield layer_case(context, layer._replace(density=density), batch, False, 0.03)


def norm_difference(ours: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
    """The difference's norm relative to that of ours.

    Gradients of deep networks have no closer measure: a sum that is zero up to rounding falls on either side of a ReLU,
    and the gradient of that image then differs by what passes there. Two float32 runs of torch (NCHW and channels_last)
    differ as much; on the same sides of all ReLUs ours is exact to rounding (tests/nn/test_models.py).
    """
    gap = float((ours - theirs).double().norm() / ours.double().norm().clamp_min(1e-300))
    return Agreement(gap, gap <= tolerance, "relative norm")


def network_case(context: Context, gamma: float, batch: int, gradient: bool, rate: float = 0.99) -> Case:
    """A pruned ResNet-34 in eval mode; the dense models have the masked weights written out."""
    smoke = context.level == "smoke"

    def make() -> nn.Module:
        torch.manual_seed(context.seed)
        model = fr.nn.convert(fr.nn.resnet34(width=4 if smoke else 64), rate, gamma)
        # Running statistics equal to those of a batch keep the activations of a random network of order one.
        for m in model.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.momentum = None
        model.train()
        with torch.no_grad():
            model(torch.rand(8, 3, 32, 32))
        return model.eval().to(context.device)

    model = once(make)
    x = once(lambda: torch.rand(batch, 3, 32, 32, generator=context.generator()).to(context.device))

    def call(network: Callable[[Tensor], Tensor], images: Tensor) -> Call:
        if not gradient:
            return torch.no_grad()(lambda: network(images))

        def step() -> Tensor:
            given = images.detach().requires_grad_()
            return torch.autograd.grad(network(given).square().sum(), given)[0]

        return step

    def dense(memory_format: torch.memory_format) -> Callable[[], Call]:
        def build() -> Call:
            network = fr.nn.dense_copy(model()).requires_grad_(False)
            network.to(memory_format=memory_format)  # type: ignore[call-overload]  # missing from torch's stubs
            return call(network, x().contiguous(memory_format=memory_format))

        return build

    wanted = {(0.1, False): 8.0, (1.0, False): 20.0, (0.1, True): 6.0, (1.0, True): 6.0}[gamma, gradient]
    if rate != 0.99:
        wanted = 0.95
    elif batch == 1:
        wanted = 4.0
    return Case(
        "ResNet-34 forward and input gradient" if gradient else "ResNet-34 forward",
        {"r": rate, "gamma": gamma, "batch": batch},
        Candidate(OURS, lambda: call(fr.nn.freeze(model()), x())),
        (Candidate("dense NCHW", dense(torch.contiguous_format)), Candidate("dense NHWC", dense(CHANNELS_LAST))),
        Floor(),
        2e-2 if gradient else TOLERANCE,
        norm_difference if gradient else relative_difference,
        () if smoke else (Target(BEST_PEER, wanted),),
        0.15 if context.at_least("full") else 1.0,
    )


def cases(context: Context) -> Iterator[Case]:
    yield from mask_cases(context)
    yield from layer_cases(context)
    if context.level == "smoke":
        yield network_case(context, 0.1, 2, False)
        return
    rows = [(0.1, 1, False), (0.1, 16, False), (0.1, 16, True), (1.0, 16, False)]
    if context.at_least("full"):
        rows += [(1.0, 1, False), (1.0, 16, True)]
        rows += [(0.1, 128, False), (1.0, 128, False), (0.1, 128, True)]
    for row in rows:
        yield network_case(context, *row)
    if context.at_least("full"):
        for rate in (0.5, 0.8, 0.9, 0.95, 0.995, 0.998):
            yield network_case(context, 0.1, 16, False, rate)


SUITE = Suite("binary", cases, "top-k masks, masked convolutions by layer and density, pruned ResNet-34")
