"""Networks as their authors and everybody's repositories write them: plain torch modules that know nothing of
fastrobust.

Each keeps its own conventions: what a shortcut adds, in-place activations, functional and module calls, concatenations,
pooling, biases. Depth and width are options, so that the tests can ask for small ones; the defaults are the networks'
own for CIFAR-10 (3, 32, 32) unless `NETWORKS` says otherwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastrobust as fr

Activation = Callable[[], nn.Module]

ACTIVATIONS: dict[str, Activation] = {
    "ReLU": partial(nn.ReLU, inplace=True),
    "LeakyReLU": partial(nn.LeakyReLU, 0.1, inplace=True),
    "ReLU6": partial(nn.ReLU6, inplace=True),
    "SiLU": partial(nn.SiLU, inplace=True),
    "GELU": nn.GELU,
    "Hardswish": partial(nn.Hardswish, inplace=True),
}


class WideBlock(nn.Module):
    """Pre-activation block; where the shapes differ, the shortcut takes the activated maps, else the raw ones."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.relu1 = nn.BatchNorm2d(i), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(o), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.equal = i == o
        self.shortcut = None if self.equal else nn.Conv2d(i, o, 1, stride, 0, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        if not self.equal:
            x = self.relu1(self.bn1(x))
        else:
            out = self.relu1(self.bn1(x))
        out = self.relu2(self.bn2(self.conv1(out if self.equal else x)))
        out = self.conv2(out)
        return torch.add(x if self.shortcut is None else self.shortcut(x), out)


class WideResNet(nn.Module):
    def __init__(self, depth: int = 28, widen: int = 4, base: int = 16) -> None:
        super().__init__()
        channels = [base, base * widen, 2 * base * widen, 4 * base * widen]
        self.conv1 = nn.Conv2d(3, base, 3, 1, 1, bias=False)
        stages = []
        for i, o, stride in zip(channels, channels[1:], (1, 2, 2), strict=False):
            count = (depth - 4) // 6
            stages.append(
                nn.Sequential(*(WideBlock(i if k == 0 else o, o, stride if k == 0 else 1) for k in range(count)))
            )
        self.block1, self.block2, self.block3 = stages
        self.bn1, self.relu = nn.BatchNorm2d(channels[3]), nn.ReLU(inplace=True)
        self.fc = nn.Linear(channels[3], 10)
        self.channels = channels[3]

    def forward(self, x: Tensor) -> Tensor:
        out = self.block3(self.block2(self.block1(self.conv1(x))))
        out = self.relu(self.bn1(out))
        out = F.avg_pool2d(out, out.size(-1))
        return self.fc(out.view(-1, self.channels))


class PreActBlock(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, o, 3, stride, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), nn.Conv2d(o, o, 3, 1, 1, bias=False)
        if stride != 1 or i != o:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class PreActResNet(nn.Module):
    def __init__(self, blocks: Sequence[int] = (2, 2, 2, 2), width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        layers, i = [], width
        for stage, count in enumerate(blocks):
            for k in range(count):
                layers.append(PreActBlock(i, width << stage, 2 if stage and k == 0 else 1))
                i = width << stage
        self.layers, self.bn, self.linear = nn.Sequential(*layers), nn.BatchNorm2d(i), nn.Linear(i, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.layers(self.conv1(x))))
        out = F.avg_pool2d(out, out.shape[2])
        return self.linear(out.view(out.size(0), -1))


class ResidualBlock(nn.Module):
    """The residual block of torchvision, with any activation."""

    def __init__(self, i: int, o: int, stride: int, act: Activation) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.act = act()
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.downsample = None
        if stride != 1 or i != o:
            self.downsample = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.act(out)


class ResNet(nn.Module):
    def __init__(
        self, blocks: Sequence[int] = (2, 2, 2, 2), width: int = 64, act: Activation = ACTIVATIONS["ReLU"]
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), act()
        layers, i = [], width
        for stage, count in enumerate(blocks):
            for k in range(count):
                layers.append(ResidualBlock(i, width << stage, 2 if stage and k == 0 else 1, act))
                i = width << stage
        self.layers, self.avgpool, self.fc = nn.Sequential(*layers), nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(i, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.act(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def vgg(plan: Sequence[int | str] = VGG16, act: Activation = ACTIVATIONS["ReLU"]) -> nn.Sequential:
    """VGG with batch normalisation; its convolutions have biases."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in plan:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(2, 2))
            continue
        layers += [nn.Conv2d(channels, entry, 3, padding=1), nn.BatchNorm2d(entry), act()]
        channels = entry
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class InvertedResidual(nn.Module):
    def __init__(self, i: int, o: int, stride: int, expand: int) -> None:
        super().__init__()
        h = i * expand
        layers: list[nn.Module] = []
        if expand != 1:
            layers += [nn.Conv2d(i, h, 1, bias=False), nn.BatchNorm2d(h), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(h, h, 3, stride, 1, groups=h, bias=False), nn.BatchNorm2d(h), nn.ReLU6(inplace=True)]
        layers += [nn.Conv2d(h, o, 1, bias=False), nn.BatchNorm2d(o)]
        self.conv, self.residual = nn.Sequential(*layers), stride == 1 and i == o

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


# expansion, channels, blocks, stride; stem and second stage keep the resolution, as usual for 32x32 images
MOBILE = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class MobileNetV2(nn.Module):
    def __init__(self, plan: Sequence[tuple[int, int, int, int]] = MOBILE, stem: int = 32, last: int = 1280) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, stem, 3, 1, 1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU6(inplace=True),
        ]
        i = stem
        for expand, o, count, stride in plan:
            for k in range(count):
                layers.append(InvertedResidual(i, o, stride if k == 0 else 1, expand))
                i = o
        layers += [nn.Conv2d(i, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class DenseBottleneck(nn.Module):
    def __init__(self, i: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        out = self.conv2(F.relu(self.bn2(out)))
        return torch.cat([x, out], 1)


class Transition(nn.Module):
    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(i), nn.Conv2d(i, o, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNet(nn.Module):
    """DenseNet-BC: bottlenecks, and half of the channels at each transition."""

    def __init__(self, depth: int = 40, growth: int = 24) -> None:
        super().__init__()
        count, i = (depth - 4) // 6, 2 * growth
        self.conv1 = nn.Conv2d(3, i, 3, padding=1, bias=False)
        layers: list[nn.Module] = []
        for stage in range(3):
            for _ in range(count):
                layers.append(DenseBottleneck(i, growth))
                i += growth
            if stage < 2:
                layers.append(Transition(i, i // 2))
                i //= 2
        self.features, self.bn, self.linear = nn.Sequential(*layers), nn.BatchNorm2d(i), nn.Linear(i, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.features(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def double_conv(i: int, o: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
        nn.Conv2d(o, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Maps of two classes; up-sampling by transposed convolutions, or by nearest neighbours and a 1x1 convolution."""

    def __init__(self, width: int = 32, levels: int = 3, nearest: bool = False) -> None:
        super().__init__()
        channels = [width << k for k in range(levels + 1)]
        pairs = list(zip(channels, channels[1:], strict=False))
        self.inc, self.pool = double_conv(3, width), nn.MaxPool2d(2)
        self.down = nn.ModuleList(double_conv(i, o) for i, o in pairs)
        up: list[nn.Module] = [
            nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(o, i, 1))
            if nearest
            else nn.ConvTranspose2d(o, i, 2, stride=2)
            for i, o in pairs
        ]
        self.up, self.merge = nn.ModuleList(up), nn.ModuleList(double_conv(2 * i, i) for i, _ in pairs)
        self.outc = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        held = [self.inc(x)]
        for stage in self.down:
            held.append(stage(self.pool(held[-1])))
        x = held.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            x = merge(torch.cat([held.pop(), up(x)], dim=1))
        return self.outc(x)


def mlp(hidden: int = 512) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


class LeNet(nn.Module):
    """LeNet-5 as tutorials write it: ReLU and max pooling, three linear layers."""

    def __init__(self, channels: tuple[int, int] = (6, 16)) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, channels[0], 5), nn.Conv2d(channels[0], channels[1], 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(25 * channels[1], 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = torch.flatten(x, 1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Network(NamedTuple):
    """A network, the input it is for, and options and an input with which its tests take milliseconds."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    small: dict[str, Any]
    small_shape: tuple[int, ...]
    activation: str = "ReLU"


CIFAR, SMALL = (3, 32, 32), (3, 8, 8)
SMALL_VGG = (4, 4, "M", 8, "M", 8)
SMALL_MOBILE = ((1, 8, 1, 1), (6, 8, 2, 1), (6, 12, 2, 2))

NETWORKS: dict[str, Network] = {
    "WRN-28-4": Network(WideResNet, CIFAR, {"depth": 16, "widen": 2, "base": 4}, SMALL),
    "PreAct-ResNet-18": Network(PreActResNet, CIFAR, {"blocks": (2, 2), "width": 6}, SMALL),
    "VGG-16-BN": Network(vgg, CIFAR, {"plan": SMALL_VGG}, SMALL),
    "MobileNetV2": Network(MobileNetV2, CIFAR, {"plan": SMALL_MOBILE, "stem": 12, "last": 24}, SMALL, "ReLU6"),
    "DenseNet-BC-40": Network(DenseNet, CIFAR, {"depth": 16, "growth": 4}, SMALL),
    "U-Net": Network(UNet, (3, 64, 64), {"width": 4, "levels": 2}, (3, 12, 8)),
    "U-Net nearest": Network(partial(UNet, nearest=True), (3, 64, 64), {"width": 4, "levels": 2}, (3, 12, 8)),
    "MLP": Network(mlp, (1, 28, 28), {"hidden": 24}, (1, 28, 28)),
    "LeNet-5": Network(LeNet, CIFAR, {}, CIFAR),
    "ResNet-18": Network(ResNet, CIFAR, {"blocks": (2, 1), "width": 6}, SMALL),
}
# With every activation: rows of these are compared with the row of ReLU.
WITH_ACTIVATIONS = ("ResNet-18", "VGG-16-BN")


def variants() -> list[tuple[str, str]]:
    """(network, activation), every one there is; ReLU comes before what is compared with it."""
    found = []
    for name, network in NETWORKS.items():
        found += [(name, act) for act in (ACTIVATIONS if name in WITH_ACTIVATIONS else (network.activation,))]
    return found


def settle(model: nn.Module, shape: Sequence[int], batches: int = 2) -> nn.Module:
    """Random affine batch normalisation and the statistics of a few random batches: what a trained network has.

    Channels that the mask left without input are constant; their variance, which is rounding alone, becomes one. As it
    is, normalisation would multiply rounding by 300 in each layer: float32 outputs of MobileNetV2 at r 0.99 were 7 %
    off float64 in torch itself, and nothing could be compared.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 3.0)  # so that ReLU6 reaches 6
        nn.init.normal_(norm.bias, 0.0, 0.3)
        norm.momentum = None  # a plain average
    model.train()
    with torch.no_grad():
        for _ in range(batches if norms else 0):
            model(torch.rand(16, *shape))
    for norm in norms:
        assert norm.running_var is not None
        norm.running_var[norm.running_var < 1e-4] = 1.0
    return model.eval()


def masked(
    name: str, activation: str, rate: float, gamma: float, *, small: bool = False, seed: int = 0
) -> tuple[nn.Module, tuple[int, ...]]:
    """The converted network in eval mode, and the shape of an image."""
    network = NETWORKS[name]
    options: dict[str, Any] = dict(network.small) if small else {}
    if name in WITH_ACTIVATIONS:
        options["act"] = ACTIVATIONS[activation]
    shape = network.small_shape if small else network.shape
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # Transposed convolutions stay dense, which `convert` says: they are part of the network, frozen or not.
        warnings.filterwarnings("ignore", message="convert: left as they are")
        torch.manual_seed(seed)
        model = fr.nn.convert(network.make(**options), rate, gamma)
        return settle(model, shape), shape
