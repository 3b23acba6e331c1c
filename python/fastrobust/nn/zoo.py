"""The networks of the papers as plain modules, at any width, for images in [0, 1] of any number of channels.

Nothing is masked and nothing normalises its input; parameters are torch's defaults unless a paper says otherwise.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import models

Shape = tuple[int, ...]


def fc1(num_classes: int = 10, shape: Shape = (1, 28, 28), *, width: int = 1024) -> nn.Sequential:
    """FC1 of thesis chapter 3: one hidden layer (784-1024-10 on MNIST)."""
    features = _size(shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(features, width), nn.ReLU(), nn.Linear(width, num_classes))


def thesis_cnn(num_classes: int = 10, shape: Shape = (1, 28, 28), *, width: int = 16) -> nn.Sequential:
    """CNN of thesis chapter 3: convolutions of w and 2w channels (4x4, stride 2, padding 1), then 100 units (w =
    16)."""
    channels, height, breadth = _images(shape, 4)
    return nn.Sequential(
        nn.Conv2d(channels, width, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * width * (height // 2 // 2) * (breadth // 2 // 2), 100), nn.ReLU(),
        nn.Linear(100, num_classes),
    )  # fmt: skip


def cnn4(num_classes: int = 10, shape: Shape = (1, 28, 28), *, width: int = 32) -> nn.Sequential:
    """CNN-4 of Wang et al. 2019: two convolutions, batch normalisation and max pooling after each, then two dense
    layers. The paper prints no widths; here w and 2w channels, and 4w units."""
    channels, height, breadth = _images(shape, 4)
    return nn.Sequential(
        *_unit(channels, width), nn.MaxPool2d(2),
        *_unit(width, 2 * width), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(2 * width * (height // 4) * (breadth // 4), 4 * width), nn.ReLU(),
        nn.Linear(4 * width, num_classes),
    )  # fmt: skip


def cnn8(num_classes: int = 10, shape: Shape = (3, 32, 32), *, width: int = 64) -> nn.Sequential:
    """CNN-8 of Wang et al. 2019: three blocks of two convolutions, batch normalisation after each and max pooling after
    each block, then two dense layers. The paper prints no widths; here w, 2w and 3w channels, and 4w units."""
    channels, height, breadth = _images(shape, 8)
    layers: list[nn.Module] = []
    for block in (1, 2, 3):
        layers += [*_unit(channels, block * width), *_unit(block * width, block * width), nn.MaxPool2d(2)]
        channels = block * width
    layers += [nn.Flatten(), nn.Linear(channels * (height // 8) * (breadth // 8), 4 * width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(4 * width, num_classes))


def lenet(num_classes: int = 10, shape: Shape = (1, 28, 28), *, width: int = 16) -> nn.Sequential:
    """LeNet of thesis table 4.1: Conv(2w), Conv(4w), FC(196w, 64w), FC(64w, 10) on MNIST, w = 16. 196w inputs are 4w
    maps of
    7x7: each convolution (5x5, padding 2) is followed by ReLU and 2x2 max pooling."""
    channels, height, breadth = _images(shape, 4)
    return nn.Sequential(
        nn.Conv2d(channels, 2 * width, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(2 * width, 4 * width, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(4 * width * (height // 4) * (breadth // 4), 64 * width), nn.ReLU(),
        nn.Linear(64 * width, num_classes),
    )  # fmt: skip


# of thesis table 4.1, in units of w; "M" is 2x2 max pooling
_VGG = (4, 4, "M", 8, 8, "M", 16, 16, 16, "M", 32, 32, 32, "M", 32, 32, 32, "M")


def vgg(num_classes: int = 10, shape: Shape = (3, 32, 32), *, width: int = 8) -> nn.Sequential:
    """VGG of thesis table 4.1: 3x3 convolutions of 4w (2), 8w (2), 16w (3), 32w (3) and 32w (3) channels, 2x2 max
    pooling after each group, FC(32w, 10); w = 8. The average pooling that it prints before the last layer finds maps of
    1x1 at 32x32. Batch normalisation after each convolution is not printed, but needed to train it."""
    channels = _images(shape, 32)[0]
    layers: list[nn.Module] = []
    for entry in _VGG:
        if entry == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            out = int(entry) * width
            layers += _unit(channels, out)
            channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class PreActBlock(nn.Module):
    """conv2(relu(bn2(conv1(o)))) + shortcut with o = relu(bn1(x)) (He et al. 2016b); the shortcut is a 1x1 convolution
    of o where the shape changes, else x."""

    def __init__(self, channels: int, out: int, stride: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        changes = stride != 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        o = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(o)
        found: Tensor = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(o))))) + kept
        return found


class PreActResNet(nn.Module):
    """A 3x3 convolution, stages of :class:`PreActBlock`, the mean of the maps and a linear layer.

    stem: channels of the first convolution; stages: (channels, blocks, stride) of each. last: batch normalisation and
    ReLU before the mean. He et al. and Zagoruyko & Komodakis have them; the PreAct ResNet-18 that the robustness
    literature trains (11.17 M parameters) has as well, in the form of Wong et al. 2020, whose parameters they are.
    """

    def __init__(
        self, stem: int, stages: list[tuple[int, int, int]], num_classes: int, in_channels: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, stem, 3, 1, 1, bias=False)
        blocks: list[nn.Module] = []
        channels = stem
        for out, count, stride in stages:
            for number in range(count):
                blocks.append(PreActBlock(channels, out, stride if number == 0 else 1, dropout))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.blocks(self.conv1(x))))
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


def preact_resnet18(num_classes: int = 10, shape: Shape = (3, 32, 32), *, width: int = 64) -> PreActResNet:
    """PreAct ResNet-18 (He et al. 2016b) for CIFAR: four stages of two blocks, w to 8w channels."""
    stages = [(width << stage, 2, 1 if stage == 0 else 2) for stage in range(4)]
    return PreActResNet(width, stages, num_classes, _images(shape, 8)[0])


def wrn(
    depth: int = 34, widen: int = 10, num_classes: int = 10, shape: Shape = (3, 32, 32), *, width: int = 16,
    dropout: float = 0.0,
) -> PreActResNet:  # fmt: skip
    """WRN-depth-widen (Zagoruyko & Komodakis 2016): three stages of (depth - 4) / 6 blocks; depth 6n + 4. ``width``: of
    the stem, 16 in the paper."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth: got {depth}, expected 10, 16, 22, 28, 34, ... (6n + 4)")
    if widen < 1:
        raise ValueError(f"widen: got {widen}, expected at least 1")
    count = (depth - 4) // 6
    stages = [((width * widen) << stage, count, 1 if stage == 0 else 2) for stage in range(3)]
    return PreActResNet(width, stages, num_classes, _images(shape, 4)[0], dropout)


def _fixed(make: Callable[[], nn.Sequential], wanted: Shape) -> Callable[..., nn.Module]:
    def build(num_classes: int = 10, shape: Shape = wanted) -> nn.Module:
        if shape != wanted or num_classes != 10:
            raise ValueError(
                f"model: {make.__name__} takes images {wanted} and 10 classes, got {shape} and {num_classes}"
            )
        return make()

    return build


MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": _fixed(models.digits_cnn, (1, 8, 8)),
    "mnist-cnn": _fixed(models.mnist_cnn, (1, 28, 28)),
    "fc1": fc1, "cnn": thesis_cnn, "cnn-4": cnn4, "cnn-8": cnn8, "lenet": lenet, "vgg": vgg,
    "preact-resnet-18": preact_resnet18,
}  # fmt: skip


def build(name: str, num_classes: int, shape: Shape, *, width: int | None = None) -> nn.Module:
    """A model by name: one of :data:`MODELS`, or "wrn-28-4" for any depth and widening factor; ``width`` None: the
    paper's.

    Raises:
        ValueError: no such name, or the model does not take images of that shape.
    """
    found = re.fullmatch(r"wrn-(\d+)-(\d+)", name)
    options: dict[str, Any] = {} if width is None else {"width": width}
    if width is not None and width < 1:
        raise ValueError(f"width: got {width}, expected at least 1")
    if found:
        return wrn(int(found[1]), int(found[2]), num_classes, tuple(shape), **options)
    if name not in MODELS:
        raise ValueError(f"model: got {name!r}, expected one of {', '.join(MODELS)}, wrn-DEPTH-WIDEN")
    if width is not None and "width" not in inspect.signature(MODELS[name]).parameters:
        raise ValueError(f"width: got {width}, but {name} has one width only")
    return MODELS[name](num_classes, tuple(shape), **options)


def _unit(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]


def _size(shape: Shape) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _images(shape: Shape, least: int) -> tuple[int, int, int]:
    if len(shape) != 3 or min(shape[1:]) < least:
        raise ValueError(
            f"shape: got images {tuple(shape)}, expected (channels, height, width) of at least {least}x{least}"
        )
    return shape[0], shape[1], shape[2]


__all__ = [
    "MODELS",
    "PreActBlock",
    "PreActResNet",
    "build",
    "cnn4",
    "cnn8",
    "fc1",
    "lenet",
    "preact_resnet18",
    "thesis_cnn",
    "vgg",
    "wrn",
]
