"""Bounds of networks as people write them, beside auto_LiRPA: pooling, batch normalisation, concatenation, groups,
tokens, other activations, one dimension, transposed convolutions, group and layer normalisation, attention.

The first four have bars; of the others none may be slower than auto_LiRPA. CROWN and Fast-Lin take the peer seconds to
minutes a call and come with --full only. Weights are random, batch statistics and factors are not trivial.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import margins
from .case import OURS, Agreement, Candidate, Case, Context, Target, once
from .models_of_others import DenseBottleneck, ResNet

PEER = "auto_LiRPA"
LOOSER = 5e-5  # of the largest bound: rounding of float32
METHODS = ("ibp", "crown-ibp", "fast-lin", "crown")
Bars = dict[str, float]
BARS: Bars = {"ibp": 3.0, "crown-ibp": 4.0, "fast-lin": 20.0, "crown": 20.0}


class Block(nn.Module):
    """Two convolutions with batch normalisation beside a projected shortcut, ReLU behind the sum."""

    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(h)) + self.short(x))


def pooled(activation: Callable[[], nn.Module], pool: type[nn.Module], width: int = 16, hidden: int = 128) -> nn.Module:
    """Two convolutions, an activation and a pooling behind each, two dense layers."""
    return nn.Sequential(
        nn.Conv2d(1, width, 3, 1, 1),
        activation(),
        pool(2),
        nn.Conv2d(width, 2 * width, 3, 1, 1),
        activation(),
        pool(2),
        nn.Flatten(),
        nn.Linear(98 * width, hidden),
        activation(),
        nn.Linear(hidden, 10),
    )


def tanh(width: int = 16, hidden: int = 100) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1),
        nn.Tanh(),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(98 * width, hidden),
        nn.Tanh(),
        nn.Linear(hidden, 10),
    )


def residual(width: int = 16, hidden: int = 100) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        Block(width, width, 2), Block(width, 2 * width, 2), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(32 * width, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip


def mlp(hidden: int = 1024, depth: int = 4) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for k in range(depth):
        layers += [nn.Linear(hidden if k else 784, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, 10))


def dense_block(growth: int = 8, blocks: int = 3) -> nn.Module:
    """A strided stem, bottlenecks that each add maps to those before, global average pooling (DenseNet-BC)."""
    width = 2 * growth
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        *(DenseBottleneck(width + k * growth, growth) for k in range(blocks)),
        nn.BatchNorm2d(width + blocks * growth), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width + blocks * growth, 10),
    )  # fmt: skip


def depthwise(width: int = 16) -> nn.Module:
    """MobileNet: a depthwise and a pointwise convolution in turn, batch normalisation behind each."""

    def normed(conv: nn.Conv2d) -> tuple[nn.Module, ...]:
        return conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU()

    layers = [*normed(nn.Conv2d(3, width, 3, 2, 1, bias=False))]
    for i, o, stride in ((width, 2 * width, 1), (2 * width, 2 * width, 2), (2 * width, 4 * width, 1)):
        layers += [
            *normed(nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False)),
            *normed(nn.Conv2d(i, o, 1, bias=False)),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def signals(width: int = 16, hidden: int = 64) -> nn.Module:
    """Convolutions of one dimension, as for audio and sensors."""
    return nn.Sequential(
        nn.Conv1d(2, width, 9, 4, 4), nn.ReLU(), nn.Conv1d(width, 2 * width, 5, 2, 2), nn.ReLU(),
        nn.Conv1d(2 * width, 2 * width, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * width, hidden), nn.ReLU(),
        nn.Linear(hidden, 10),
    )  # fmt: skip


def tokens(features: int = 48, hidden: int = 64) -> nn.Module:
    """Linear layers that every token of (tokens, features) goes through."""
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10),
    )  # fmt: skip


class Mixer(nn.Module):
    """Patches, one block that mixes tokens and then channels, the mean of the tokens. With ReLU: the peer has no
    GELU."""

    def __init__(self, hidden: int = 32, patch: int = 8) -> None:
        super().__init__()
        count = (32 // patch) ** 2
        self.embed = nn.Conv2d(3, hidden, patch, patch)
        self.tokens1, self.tokens2 = nn.Linear(count, 2 * count), nn.Linear(2 * count, count)
        self.channels1, self.channels2 = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2)  # (B, hidden, tokens)
        h = h + self.tokens2(F.relu(self.tokens1(h)))
        h = h.transpose(1, 2)
        h = h + self.channels2(F.relu(self.channels1(h)))
        return self.head(h.mean(1))


def group_norm(width: int = 16) -> nn.Module:
    """Two strided convolutions with group normalisation, a dense layer."""
    return nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1), nn.GroupNorm(2, width), nn.ReLU(), nn.Conv2d(width, 2 * width, 3, 2, 1),
        nn.GroupNorm(2, 2 * width), nn.ReLU(), nn.Flatten(), nn.Linear(128 * width, 10),
    )  # fmt: skip


class NormedMixer(Mixer):
    """The mixer with a layer norm ahead of each of its two parts."""

    def __init__(self, hidden: int = 32, patch: int = 8) -> None:
        super().__init__(hidden, patch)
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)  # (B, tokens, hidden)
        h = h + self.tokens2(F.relu(self.tokens1(self.norm1(h).transpose(1, 2)))).transpose(1, 2)
        h = h + self.channels2(F.relu(self.channels1(self.norm2(h))))
        return self.head(h.mean(1))


class Transformer(nn.Module):
    """Patches, one block of attention and a perceptron with a layer norm ahead of each, the mean of the tokens."""

    def __init__(self, hidden: int = 32, patch: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.embed, self.heads = nn.Conv2d(3, hidden, patch, patch), heads
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.q, self.k, self.v, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.up, self.down, self.head = (
            nn.Linear(hidden, 2 * hidden),
            nn.Linear(2 * hidden, hidden),
            nn.Linear(hidden, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2)
        n, count, size = self.norm1(h), h.shape[1], h.shape[2] // self.heads
        q, k, v = (f(n).reshape(-1, count, self.heads, size).transpose(1, 2) for f in (self.q, self.k, self.v))
        p = torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / size**0.5, dim=-1)
        h = h + self.out(torch.matmul(p, v).transpose(1, 2).reshape(-1, count, self.heads * size))
        h = h + self.down(F.relu(self.up(self.norm2(h))))
        return self.head(h.mean(1))


class WrittenOut(nn.Module):
    """A group or layer normalisation in single operations, which is what the peer takes."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: nn.GroupNorm | nn.LayerNorm) -> None:
        super().__init__()
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else None
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.groups is None else x.reshape(x.shape[0], self.groups, -1)
        d = h - h.mean(-1, keepdim=True)
        y = d / torch.sqrt((d * d).mean(-1, keepdim=True) + self.eps)
        tail = () if self.groups is None else (1,) * (x.dim() - 2)
        weight, bias = self.weight, self.bias
        return y.reshape(x.shape) * weight.view(-1, *tail) + bias.view(-1, *tail)


def for_peer(problem: margins.Problem) -> margins.Problem:
    model, x, y = problem
    kinds = (nn.GroupNorm, nn.LayerNorm)
    if not any(isinstance(m, kinds) for m in model.modules()):
        return problem
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kinds):
                setattr(parent, name, WrittenOut(child))
    return model, x, y


def transposed(width: int = 8) -> nn.Module:
    """Down by strided convolutions, up by transposed ones, a dense layer."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1), nn.ReLU(), nn.Conv2d(width, 2 * width, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(width, 1, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(784, 10),
    )  # fmt: skip


@dataclass(frozen=True)
class Net:
    """A network, its inputs and its bars; ``small``: options with which a test takes milliseconds. first: methods whose
    rows use one example, since the peer would take minutes. The peer gets group and layer normalisations written
    out."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    batch: int
    eps: float
    small: dict[str, Any]
    bars: Bars = field(default_factory=lambda: dict.fromkeys(METHODS, 1.0))
    relu: bool = True  # its lines are the same as the peer's in every method
    first: tuple[str, ...] = ()
    products: bool = False  # of bounded values: planes and softmax are bounded in other ways, either may be tighter
    fails: tuple[str, ...] = ()  # methods in which the peer raises an error: no row


MNIST, CIFAR = (1, 28, 28), (3, 32, 32)
NETS: dict[str, Net] = {
    "max pooling": Net(
        partial(pooled, nn.ReLU, nn.MaxPool2d), MNIST, 16, 0.02, {"width": 2, "hidden": 8}, BARS, relu=False
    ),
    "leaky, average pooling": Net(
        partial(pooled, partial(nn.LeakyReLU, 0.1), nn.AvgPool2d), MNIST, 16, 0.02, {"width": 2, "hidden": 8}, BARS
    ),
    "tanh": Net(tanh, MNIST, 32, 0.02, {"width": 2, "hidden": 8}, BARS, relu=False),
    "batch norm residual": Net(residual, CIFAR, 8, 2 / 255, {"width": 2, "hidden": 8}, BARS),
    "ResNet-18 width 16": Net(
        partial(ResNet, width=16), CIFAR, 4, 1 / 255, {"blocks": (1, 1), "width": 2}, first=("fast-lin", "crown")
    ),
    "dense block": Net(dense_block, CIFAR, 8, 2 / 255, {"growth": 2, "blocks": 2}),
    "depthwise": Net(depthwise, CIFAR, 8, 2 / 255, {"width": 2}),
    "MLP 4x1024": Net(mlp, MNIST, 16, 0.005, {"hidden": 16}, {**dict.fromkeys(METHODS, 1.0), "ibp": 2.0, "crown": 2.0}),
    "1-D convolutions": Net(signals, (2, 256), 16, 0.01, {"width": 2, "hidden": 8}),
    "token-wise linear": Net(tokens, (16, 48), 16, 0.01, {"hidden": 8}),
    "mixer block": Net(Mixer, CIFAR, 8, 1 / 255, {"hidden": 4}),
    "transposed convolutions": Net(transposed, MNIST, 8, 0.02, {"width": 2}),
    "group norm": Net(group_norm, CIFAR, 8, 1 / 255, {"width": 2}, products=True, fails=("fast-lin", "crown")),
    "mixer block, layer norm": Net(NormedMixer, CIFAR, 8, 1 / 255, {"hidden": 4}, products=True),
    "transformer block": Net(Transformer, CIFAR, 8, 1 / 255, {"hidden": 4}, products=True, first=("fast-lin", "crown")),
}


def settled(net: nn.Module) -> nn.Module:
    """Statistics and factors of batch normalisation that are not trivial."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, 0.0, 0.1)  # type: ignore[arg-type]
            nn.init.uniform_(m.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.0, 0.1)
    return net.eval()


def problem(context: Context, name: str, batch: int, grad: bool = False) -> margins.Problem:
    net = NETS[name]
    options = net.small if context.level == "smoke" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        model = settled(net.make(**options)).requires_grad_(grad).to(context.device)
    x = torch.rand(batch, *net.shape, generator=context.generator())
    y = torch.randint(0, 10, (batch,), generator=context.generator())
    return model, x.to(context.device), y.to(context.device)


def never_looser(ours: Tensor, theirs: Tensor, tolerance: float) -> Agreement:
    """Ours may be tighter; by how much the worst row is looser, of the largest bound."""
    gap = float((theirs - ours).double().amax() / theirs.abs().amax().clamp_min(1e-12))
    return Agreement(gap, gap <= tolerance, "looser by, of the largest bound")


def case(context: Context, name: str, method: str, backward: bool = False) -> Case:
    net = NETS[name]
    batch = 2 if context.level == "smoke" else 1 if method in net.first else net.batch
    given = once(partial(problem, context, name, batch, backward))
    theirs = once(lambda: for_peer(given()))
    bar = 1.0 if backward else net.bars[method]
    return Case(
        f"{method} bounds and backward" if backward else f"{method} margins",
        {"network": name, "batch": batch},
        Candidate(OURS, partial(margins.ours, given, net.eps, method, backward)),
        (Candidate(PEER, partial(margins.peer, theirs, net.eps, method, backward)),),
        # parallel lines of what is no ReLU are ours alone: the peer has adaptive ones, which may be tighter
        tolerance=LOOSER if (net.relu or method != "fast-lin") and not net.products else float("inf"),
        compare=never_looser,
        targets=() if context.level == "smoke" else (Target(PEER, bar),),
    )


def cases(context: Context) -> Iterator[Case]:
    smoke = context.level == "smoke"
    if not smoke and not context.at_least("default"):
        return
    for name, net in NETS.items():
        barred = net.bars is BARS
        quick = ("ibp", "crown-ibp")
        for method in METHODS if context.at_least("full") or (smoke and barred) else quick:
            if method not in net.fails:
                yield case(context, name, method)
        if context.at_least("full") and barred:
            for method in quick:
                yield case(context, name, method, backward=True)
