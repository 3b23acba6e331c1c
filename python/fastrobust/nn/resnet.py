"""Residual networks in the shapes of the thesis and small nets to try the method on.

They are ordinary dense models; `fastrobust.nn.convert` masks them. Convolutions have no bias, batch
normalisation is non-affine unless asked otherwise, and a last batch normalisation after the final
linear layer (LBN, thesis section 5.1.3) is there by default.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut(x)), 3x3 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels, affine=affine)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels, affine=affine)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels, affine=affine),
            )

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network of basic blocks.

    blocks: blocks per stage; stem "cifar" is a 3x3 convolution, "imagenet" a 7x7 stride-2 one with a
    3x3 stride-2 max pool; width: channels of the first stage, doubled in each stage.
    """

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        num_classes: int = 10,
        in_channels: int = 3,
        *,
        stem: str = "cifar",
        width: int = 64,
        affine: bool = False,
        last_batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if stem == "cifar":
            self.conv1 = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
            self.pool: nn.Module = nn.Identity()
        elif stem == "imagenet":
            self.conv1 = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
            self.pool = nn.MaxPool2d(3, 2, 1)
        else:
            raise ValueError(f"stem: expected 'cifar' or 'imagenet', got {stem!r}")
        self.bn1 = nn.BatchNorm2d(width, affine=affine)
        channels = width
        for stage, count in enumerate(blocks):
            layers = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(channels, width << stage, stride, affine))
                channels = width << stage
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, num_classes, bias=False)
        self.last_bn = nn.BatchNorm1d(num_classes, affine=affine) if last_batch_norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.last_bn(self.fc(x.mean(dim=(2, 3))))


def resnet18(num_classes: int = 10, **options: object) -> ResNet:
    """ResNet-18; options as in ResNet."""
    return ResNet((2, 2, 2, 2), num_classes, **options)  # type: ignore[arg-type]


def resnet34(num_classes: int = 10, **options: object) -> ResNet:
    """ResNet-34; for CIFAR-10 it has the 21 265 088 weights of the thesis. Options as in ResNet."""
    return ResNet((3, 4, 6, 3), num_classes, **options)  # type: ignore[arg-type]


def small_cnn(
    num_classes: int = 10,
    in_channels: int = 1,
    *,
    width: int = 32,
    affine: bool = False,
    last_batch_norm: bool = True,
) -> nn.Sequential:
    """Three 3x3 convolutions (strides 1, 2, 2), mean over the map, linear: MNIST and digits."""
    layers: list[nn.Module] = []
    channels = in_channels
    for stage, stride in enumerate((1, 2, 2)):
        out = width << stage
        layers += [
            nn.Conv2d(channels, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out, affine=affine),
            nn.ReLU(),
        ]
        channels = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes, bias=False)]
    if last_batch_norm:
        layers.append(nn.BatchNorm1d(num_classes, affine=affine))
    return nn.Sequential(*layers)
