"""The binary family: top-k masks, masked convolutions layer by layer, and ResNet-34 against dense torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

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

CHANNELS_LAST = torch.channels_last
# The 3x3 convolutions of ResNet-34 for CIFAR: channels, map size, density at r 0.99 with gamma 0.1.
LAYERS = ((64, 32, 0.131), (128, 16, 0.038), (256, 8, 0.011), (512, 4, 0.0031))
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.01, 0.002)
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


def layer_case(context: Context, channels: int, size: int, density: float, batch: int, gradient: bool) -> Case:
    weight = once(lambda: signs(context, (channels, channels, 3, 3), density))
    x = once(lambda: torch.randn(batch, channels, size, size, generator=context.generator()).to(context.device))

    def ours() -> Call:
        packed, image = fr.ops.pack(weight()), x()
        if not gradient:
            return torch.no_grad()(lambda: fr.ops.masked_conv2d(image, packed, padding=1))
        y = fr.ops.masked_conv2d(image.requires_grad_(), packed, padding=1)
        return lambda: torch.autograd.grad(y, image, y.detach(), retain_graph=True)[0]

    def dense(memory_format: torch.memory_format) -> Callable[[], Call]:
        def build() -> Call:
            w, image = (t().contiguous(memory_format=memory_format) for t in (weight, x))
            if not gradient:
                return torch.no_grad()(lambda: F.conv2d(image.detach(), w, padding=1))
            image = image.detach().requires_grad_()
            y = F.conv2d(image, w, padding=1)
            return lambda: torch.autograd.grad(y, image, y.detach(), retain_graph=True)[0]

        return build

    return Case(
        "masked conv input gradient" if gradient else "masked conv",
        {"layer": f"{channels}ch {size}x{size}", "density": density, "batch": batch},
        Candidate(OURS, ours),
        (Candidate("dense NCHW", dense(torch.contiguous_format)), Candidate("dense NHWC", dense(CHANNELS_LAST))),
        Floor(bytes=8 * batch * channels * size * size),
        TOLERANCE,
        relative_difference,
        () if context.level == "smoke" else (Target(BEST_PEER, 0.95),),
    )


def layer_cases(context: Context) -> Iterator[Case]:
    """Every layer at its own density, then the table of densities and batches, losses included."""
    if context.level == "smoke":
        yield layer_case(context, 8, 8, 0.1, 2, False)
        return
    batches = (1, 16, 128) if context.at_least("full") else (16,)
    for channels, size, density in LAYERS:
        for batch in batches:
            yield layer_case(context, channels, size, density, batch, False)
        yield layer_case(context, channels, size, density, 16, True)
    if context.at_least("full"):
        for channels, size, _ in LAYERS:
            for density in DENSITIES:
                for batch in (1, 4, 7, 16, 33):
                    yield layer_case(context, channels, size, density, batch, False)


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
        rows += [(gamma, 128, gradient) for gamma in (0.1, 1.0) for gradient in (False, True)]
    for row in rows:
        yield network_case(context, *row)
    if context.at_least("full"):
        for rate in (0.5, 0.8, 0.9, 0.95, 0.995, 0.998):
            yield network_case(context, 0.1, 16, False, rate)


SUITE = Suite("binary", cases, "top-k masks, masked convolutions by layer and density, pruned ResNet-34")
