"""Bound propagation: margins of the certification papers' networks by intervals and by linear bounds, and certified
training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastrobust.bounds import compute_bounds

from . import bounds_certificates, bounds_networks, lines, margins, models
from .bounds_floor import row_flops
from .case import FLOOR, OURS, Call, Candidate, Case, Context, Floor, Suite, Target, once, relative_difference
from .margins import Problem

# Random weights, and the published KW-trained ones with MNIST's test images where the data is given.
PUBLISHED = {"FC1 trained": "mnist_fc1_l1_kw.ckpt", "CNN trained": "mnist_cnn_l1_kw.ckpt"}
MNIST = ("FC1", "CNN", *PUBLISHED)
CIFAR = ("CIFAR 5-conv", "residual")
EPS = {**dict.fromkeys(MNIST, 0.1), "CIFAR 5-conv": 2 / 255, "residual": 2 / 255}
SHAPES = {**dict.fromkeys(MNIST, (1, 28, 28)), "CIFAR 5-conv": (3, 32, 32), "residual": (3, 32, 32)}
TOLERANCE = 1e-4


class Residual(nn.Module):
    """A stem, two residual blocks (the second strided, with a shortcut convolution), average pooling."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.a1, self.a2 = (
            nn.Conv2d(3, width, 3, 2, 1),
            nn.Conv2d(width, width, 3, 1, 1),
            nn.Conv2d(width, width, 3, 1, 1),
        )
        self.b1, self.b2 = nn.Conv2d(width, 2 * width, 3, 2, 1), nn.Conv2d(2 * width, 2 * width, 3, 1, 1)
        self.short, self.out = nn.Conv2d(width, 2 * width, 1, 2, 0), nn.Linear(32 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        h = torch.relu(self.a2(torch.relu(self.a1(h))) + h)
        h = torch.relu(self.b2(torch.relu(self.b1(h))) + self.short(h))
        return self.out(torch.flatten(F.avg_pool2d(h, 2), 1))


def network(name: str) -> nn.Module:
    name = name.removesuffix(" trained")
    if name == "FC1":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))
    if name == "CNN":
        return models.small_cnn()
    if name == "residual":
        return Residual()
    layers: list[nn.Module] = []
    for i, o, stride in ((3, 16, 1), (16, 16, 2), (16, 32, 1), (32, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(i, o, 3, stride, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(2048, 100), nn.ReLU(), nn.Linear(100, 10))


def problem(context: Context, name: str, batch: int, grad: bool) -> Problem:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(context.seed)
        net = network(name).eval().requires_grad_(grad).to(context.device)
    if name in PUBLISHED:
        x, y = published(context, name, net, batch)
    else:
        x = torch.rand(batch, *SHAPES[name], generator=context.generator())
        y = torch.randint(0, 10, (batch,), generator=context.generator())
    return net, x.to(context.device), y.to(context.device)


def published(context: Context, name: str, net: nn.Module, batch: int) -> tuple[Tensor, Tensor]:
    """Loads the network's weights; the first test images and their labels."""
    folder = Path(context.data or "")
    saved = torch.load(folder / "polyenvelope" / "relu_linf" / PUBLISHED[name], map_location="cpu", weights_only=True)
    net.load_state_dict(dict(zip(net.state_dict(), saved.values(), strict=True)))
    with np.load(folder / "mnist.npz") as data:
        images, labels = data["test_images"][:batch], data["test_labels"][:batch]
    return torch.tensor(images).float().view(-1, 1, 28, 28) / 255, torch.tensor(labels).long()


def has_published(context: Context) -> bool:
    folder = Path(context.data or "")
    files = [folder / "polyenvelope" / "relu_linf" / file for file in PUBLISHED.values()]
    return context.data is not None and all(file.exists() for file in (*files, folder / "mnist.npz"))


def two_products(given: Callable[[], Problem], name: str) -> Call:
    """IBP of a sequential network in plain torch: a product with W and one with its absolute value per layer, last
    layer elided."""
    net, x, y = given()
    eps, eye = EPS[name], torch.eye(10, device=x.device)
    C = torch.stack([torch.stack([eye[k] - eye[j] for j in range(10) if j != k]) for k in y.tolist()])
    layers = list(net)  # type: ignore[call-overload]

    def call() -> Tensor:
        c, r = x, torch.full_like(x, eps)
        with torch.no_grad():
            for layer in layers[:-1]:
                if isinstance(layer, nn.Linear):
                    c, r = layer(c), F.linear(r, layer.weight.abs())
                elif isinstance(layer, nn.Conv2d):
                    c, r = layer(c), F.conv2d(r, layer.weight.abs(), None, layer.stride, layer.padding)
                elif isinstance(layer, nn.ReLU):
                    low, up = (c - r).relu(), (c + r).relu()
                    c, r = (low + up) / 2, (up - low) / 2
                else:
                    c, r = layer(c), layer(r)
            W, b = C @ layers[-1].weight, C @ layers[-1].bias
            return torch.einsum("bsn,bn->bs", W, c) + b - torch.einsum("bsn,bn->bs", W.abs(), r)

    return call


def forward_alone(given: Callable[[], Problem]) -> Call:
    net, x, _ = given()

    def call() -> Tensor:
        with torch.no_grad():
            return net(x)

    return call


def forward_and_backward(given: Callable[[], Problem]) -> Call:
    net, x, _ = given()

    def call() -> Tensor:
        for p in net.parameters():
            p.grad = None
        out = net(x)
        out.sum().backward()
        return out.detach()

    return call


def linear_flops(name: str, method: str, batch: int) -> int:
    """Two operations for each multiplication that the rows need: margins to the input, and for methods that bound the
    hidden layers linearly every row of them (all neurons, as few are stable where weights are random), twice after the
    first activation where the two sides have lines of their own."""
    rows = 9 * batch
    if name == "FC1":
        return 2 * rows * (784 * 1024 + 10 * 1024)
    conv2, conv1 = 32 * 49 * 16 * 16, 16 * 196 * 16
    total = rows * (10 * 100 + 100 * 1568 + conv2 + conv1)
    if method in ("crown", "fast-lin"):
        total += (2 if method == "crown" else 1) * batch * (100 * (conv2 + conv1) + 1568 * 16 * 16 * 16)
    return 2 * total


def living_flops(context: Context, name: str, batch: int) -> int:
    """``linear_flops`` of crown-ibp without the products that meet a neuron whose interval is below zero: it has no
    lines."""
    net, x, y = problem(context, name, batch, False)
    known = compute_bounds(net, x, EPS[name], method="crown-ibp", labels=y, sides="lower", return_intermediate=True)
    alive = [(up > 0).float() for _, up in known.intermediate.values()]
    layers = [layer for layer in net if isinstance(layer, (nn.Linear, nn.Conv2d))]  # type: ignore[attr-defined]
    total = alive[-1].sum() * 10
    for layer, below, above in zip(layers, [torch.ones_like(x), *alive], alive, strict=False):
        if isinstance(layer, nn.Conv2d):
            met = F.conv2d(below, torch.ones_like(layer.weight), None, layer.stride, layer.padding) * above
        else:
            met = below.flatten(1).sum(1, keepdim=True) * above
        total = total + met.sum()
    return 2 * 9 * int(total)


def interval_cases(context: Context, names: Iterable[str]) -> Iterator[Case]:
    smoke = context.level == "smoke"
    for name in names:
        for batch in (2,) if smoke else (100,) if name in PUBLISHED else (1, 8, 100):
            given = once(partial(problem, context, name, batch, False))
            yield Case(
                "IBP margins",
                {"model": name, "batch": batch},
                Candidate(OURS, partial(margins.ours, given, EPS[name], "ibp", False)),
                (
                    Candidate("two products in torch", partial(two_products, given, name)),
                    Candidate("auto_LiRPA", partial(margins.peer, given, EPS[name], "ibp", False)),
                ),
                Floor(part=partial(forward_alone, given), part_name="forward"),
                TOLERANCE,
                relative_difference,
                () if smoke else (Target(FLOOR, 1 / 2.5),) if batch == 100 else (Target("two products in torch", 2.0),),
            )


def linear_case(context: Context, name: str, method: str, batch: int) -> Case:
    given = once(partial(problem, context, name, batch, False))
    floor = Floor(part=partial(forward_alone, given), part_name="forward")
    if name in ("FC1", "CNN"):
        floor = Floor(flops=linear_flops(name, method, batch))
    elif name in PUBLISHED and (method == "crown-ibp" or name.startswith("FC1")):
        flops = living_flops(context, name, batch)
        floor = Floor(flops=flops, part=partial(forward_alone, given), part_name="forward")
    elif name in CIFAR and method != "ibp":
        flops = row_flops(margins.ours(given, EPS[name], method, False))
        floor = Floor(flops=flops, part=partial(forward_alone, given), part_name="forward")
    targets = [Target("auto_LiRPA", 20.0 if name in MNIST else 5.0)]
    if name in ("FC1", "CNN"):
        targets.append(Target(FLOOR, 1 / 3))
    return Case(
        f"{method} margins",
        {"model": name, "batch": batch},
        Candidate(OURS, partial(margins.ours, given, EPS[name], method, False)),
        (Candidate("auto_LiRPA", partial(margins.peer, given, EPS[name], method, False)),),
        floor,
        TOLERANCE,
        relative_difference,
        () if context.level == "smoke" else tuple(targets),
    )


def training_case(context: Context, name: str, batch: int, method: str = "crown-ibp") -> Case:
    given = once(partial(problem, context, name, batch, True))
    if name in CIFAR:
        flops = row_flops(margins.ours(once(partial(problem, context, name, batch, False)), EPS[name], method, False))
    else:
        flops = living_flops(context, name, batch) if name in PUBLISHED else linear_flops(name, method, batch)
    floor = Floor(flops=3 * flops)
    if method == "ibp":
        floor = Floor(part=partial(forward_and_backward, given), part_name="forward and backward")
    return Case(
        f"{method} bounds and backward",
        {"model": name, "batch": batch},
        Candidate(OURS, partial(margins.ours, given, EPS[name], method, True)),
        (Candidate("auto_LiRPA", partial(margins.peer, given, EPS[name], method, True)),),
        floor,
        TOLERANCE,
        relative_difference,
        () if context.level == "smoke" else (Target("auto_LiRPA", 5.0),),
    )


def cases(context: Context) -> Iterator[Case]:
    smoke = context.level == "smoke"
    trained = tuple(PUBLISHED) if context.at_least("default") and has_published(context) else ()
    yield from interval_cases(context, ("FC1", "CNN", *trained))
    for name in ("FC1", "CNN", *trained):
        for method in ("crown-ibp", "crown") if name in PUBLISHED else ("crown-ibp", "fast-lin", "crown"):
            yield linear_case(context, name, method, 2 if smoke else 100)
    if context.at_least("default"):
        slow = ("fast-lin", "crown") if context.at_least("full") else ()  # up to a second a call
        for name in CIFAR:
            for method in ("ibp", "crown-ibp", *slow):
                yield linear_case(context, name, method, 8)
    if smoke or context.at_least("default"):
        for name in ("FC1", "CNN", *trained):
            yield training_case(context, name, 2 if smoke else 100)
    if context.at_least("default"):
        for name in CIFAR:
            for method in ("ibp", "crown-ibp"):
                yield training_case(context, name, 8, method)
    yield from bounds_certificates.cases(context, problem, EPS)
    yield from lines.cases(context)
    yield from bounds_networks.cases(context)


SUITE = Suite("bounds", cases, "interval and linear bounds of margins, certified training steps, certificates")
