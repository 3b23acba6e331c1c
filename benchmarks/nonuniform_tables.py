"""Liu 2022, tables 3.2 and 3.3: volumes of certified regions with one bound per pixel against uniform ones, and how
much the regions of different images resemble each other. Not a timing suite.

    fastrobust tables --table 3.2 3.3 --data FOLDER [--units N ...] [--images N] [--networks FOLDER] [--out FILE.json]

The networks are trained here: three hidden layers of N units, pixels in [-1, 1], plainly or on PGD examples of size
0.1. Every region is certified again in float64 by `fast_lin_margins` below, which shares no code with the library, and
the corner of it that the gradient points to is tried.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrobust as fr

from .image_files import images_of
from .table_file import TableFile

# data, units, kind: uniform and non-uniform eps_avg and their ratio (3.2), mean and smallest cosine (3.3), as printed
PRINTED = {
    ("mnist", 100, "plain"): (0.0295, 0.0349, 1.183, 0.9548, 0.2304),
    ("mnist", 100, "robust"): (0.0692, 0.1678, 2.425, 0.9957, 0.9155),
    ("mnist", 300, "plain"): (0.0309, 0.0350, 1.133, 0.9774, 0.5038),
    ("mnist", 300, "robust"): (0.0507, 0.1404, 2.769, 0.9964, 0.9104),
    ("mnist", 500, "plain"): (0.0319, 0.0360, 1.129, 0.9874, 0.6367),
    ("mnist", 500, "robust"): (0.0436, 0.1167, 2.677, 0.9941, 0.8920),
    ("fashion", 1024, "plain"): (0.0134, 0.0141, 1.052, 0.9805, 0.5652),
    ("fashion", 1024, "robust"): (0.0208, 0.0306, 1.468, 0.9752, 0.7166),
    ("svhn", 1024, "plain"): (0.0022, 0.0072, 3.273, 0.9836, 0.7129),
    ("svhn", 1024, "robust"): (0.0054, 0.0281, 5.204, 0.9952, 0.9339),
}
COLUMNS = ("uniform", "nonuniform", "ratio", "cosine_mean", "cosine_min")
EPOCHS = {"plain": 20, "robust": 30}


def layers_of(units: int, pixels: int = 784) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(3):
        layers += [nn.Linear(pixels if i == 0 else units, units), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(units, 10))


def train(
    x: Tensor, y: Tensor, units: int, kind: str, epochs: int, keep: Callable[[int, nn.Module], None] | None = None
) -> nn.Sequential:
    """Adam; robust networks see PGD-5 examples in a ball that grows to 0.1 over the first two epochs.

    ``keep`` is called with the number of epochs done: a network of fewer epochs is the beginning of one of more.
    """
    torch.manual_seed(0)
    model = layers_of(units, x[0].numel())
    optimiser = torch.optim.Adam(model.parameters(), 2e-3 if kind == "robust" else 1e-3)
    for epoch in tqdm(range(epochs), leave=False, disable=None, desc="training"):
        eps = 0.1 * min(1.0, (epoch + 1) / 2)
        for batch in torch.randperm(len(y)).split(200):
            images, labels = x[batch], y[batch]
            if kind == "robust":
                images = fr.attacks.pgd(
                    model, images, labels, eps=eps, steps=5, step_size=eps / 2.5, clip=(-1.0, 1.0), model_mode="keep"
                )
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
        if keep is not None:
            keep(epoch + 1, model)
    return model.eval()


def fast_lin_margins(model: nn.Sequential, x: Tensor, y: int, eps: Tensor) -> Tensor:
    """Algorithm 3.1 written out for one image and a box: float64 lower bounds of z_y - z_j, j != y."""
    layers = [(m.weight.double(), m.bias.double()) for m in model if isinstance(m, nn.Linear)]
    x, eps = x.flatten().double(), eps.flatten().double()
    slopes: list[Tensor] = []  # of the hidden layers so far, with the height of the upper line at 0
    heights: list[Tensor] = []

    def lower(a: Tensor, offset: Tensor, depth: int) -> Tensor:
        """The smallest a.s(z_depth) + offset over the box, s(z_depth) the output of hidden layer ``depth``."""
        for k in reversed(range(depth)):
            offset = offset + a.clamp(max=0) @ heights[k]
            a = a * slopes[k]
            w, b = layers[k]
            a, offset = a @ w, offset + a @ b
        return a @ x + offset - a.abs() @ eps

    for depth, (w, b) in enumerate(layers[:-1]):
        low, high = lower(w, b, depth), -lower(-w, -b, depth)
        unstable = (low < 0) & (high > 0)
        chord = torch.where(unstable, high / torch.where(unstable, high - low, 1.0), (low >= 0).double())
        slopes.append(chord)
        heights.append(torch.where(unstable, -low * chord, 0.0))
    w, b = layers[-1]
    others = torch.arange(len(b)) != y
    return lower(w[y] - w[others], b[y] - b[others], len(layers) - 1)


def corner_keeps_the_label(model: nn.Sequential, x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
    """Whether the prediction at the corner of the region that the loss's gradient points to is still y."""
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    return model(x + eps * grad.sign()).argmax(1) == y


def measure(model: nn.Sequential, x: Tensor, y: Tensor, chunk: int) -> dict[str, Any]:
    """Regions of all images; those that no uniform eps certifies (misclassified ones) do not count."""
    start = time.perf_counter()
    parts = [
        fr.certify.nonuniform_radius(model, part, labels)
        for part, labels in tqdm(
            list(zip(x.split(chunk), y.split(chunk), strict=True)), leave=False, disable=None, desc="regions"
        )
    ]
    seconds = time.perf_counter() - start
    uniform, volume, eps = (torch.cat([getattr(p, name) for p in parts]) for name in ("uniform", "volume", "eps"))
    keep = uniform > 0
    x, y, uniform, volume, eps = x[keep], y[keep], uniform[keep], volume[keep], eps[keep]
    with torch.no_grad():
        worst = min(fast_lin_margins(model, a, int(b), c).min().item() for a, b, c in zip(x, y, eps, strict=True))
    if not worst > 0:
        raise RuntimeError(f"a region is not certified in float64: margin {worst}")
    if not bool(corner_keeps_the_label(model, x, y, eps).all()):
        raise RuntimeError("a corner of a region has another prediction")
    direction = nn.functional.normalize(eps.flatten(1), dim=1)
    cosines = (direction @ direction.T)[~torch.eye(len(x), dtype=torch.bool)]
    ratio = volume.mean().item() / uniform.mean().item()
    ours = (uniform.mean().item(), volume.mean().item(), ratio, cosines.mean().item(), cosines.min().item())
    return {
        "ours": dict(zip(COLUMNS, ours, strict=True)),
        "regions": len(x),
        "smallest_ratio": (volume / uniform).min().item(),
        "largest_ratio": (volume / uniform).max().item(),
        "smallest_margin_float64": worst,
        "seconds": round(seconds, 1),
    }


def network(given: argparse.Namespace, data: str, units: int, kind: str) -> tuple[nn.Sequential, int]:
    """Read from ``given.networks``, or trained and kept there; and its epochs."""
    epochs = EPOCHS[kind]
    first = "" if data == "mnist" else f"{data}_"

    def file_of(done: int) -> Path | None:
        return None if given.networks is None else given.networks / f"{first}{units}_{kind}_{done}.pt"

    def keep(done: int, model: nn.Module) -> None:
        if (to := file_of(done)) is not None:
            to.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), to)

    x, y = images_of(given.data, data, "train")
    file = file_of(epochs)
    if file is not None and file.is_file():
        model = layers_of(units, x[0].numel()).eval()
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        model = train(2 * x - 1, y, units, kind, epochs, keep)
    return model.requires_grad_(False), epochs


def run(given: argparse.Namespace, table: TableFile, chunk: int = 25) -> None:
    """Tables 3.2 and 3.3 of the data sets that are there. given: ``data``, ``units``, ``images``, ``networks``."""
    heads = ("accuracy", "PGD", "uniform", "volume", "ratio", "printed", "diff", "cosine", "min", "regions", "s")
    print(f"{'tables 3.2 and 3.3':<22}" + "".join(f"{head:>9}" for head in heads))
    count = given.images or 50
    for data, units, kind in PRINTED:
        if given.units is not None and units not in given.units:
            continue
        try:
            test, labels = images_of(given.data, data)
        except FileNotFoundError as error:
            print(f"{f'{data} {units} {kind}':<22}skipped: {error}")
            continue
        test = 2 * test - 1
        model, epochs = network(given, data, units, kind)
        accuracy = 100 * (model(test).argmax(1) == labels).double().mean().item()
        attacked = fr.attacks.pgd(model, test, labels, eps=0.1, steps=20, step_size=0.02, clip=(-1.0, 1.0), seed=0)
        robust = 100 * (model(attacked).argmax(1) == labels).double().mean().item()
        row = measure(model, test[:count], labels[:count], chunk)
        ours, printed = row["ours"], PRINTED[data, units, kind]
        print(
            f"{f'{data} {units} {kind}':<22}{accuracy:9.2f}{robust:9.2f}{ours['uniform']:9.4f}{ours['nonuniform']:9.4f}"
            f"{ours['ratio']:9.3f}{printed[2]:9.3f}{ours['ratio'] - printed[2]:9.3f}{ours['cosine_mean']:9.4f}"
            f"{ours['cosine_min']:9.4f}{row['regions']:9d}{row['seconds']:9.1f}\n"
            f"{'  printed':<22}{'':18}{printed[0]:9.4f}{printed[1]:9.4f}{printed[2]:9.3f}{'':18}{printed[3]:9.4f}{printed[4]:9.4f}",
            flush=True,
        )
        about = {"data": data, "units": units, "kind": kind, "epochs": epochs, "images": count, "accuracy": accuracy}
        printed_row = dict(zip(COLUMNS, printed, strict=True))
        table.add(f"{data} {units} {kind}", about | {"pgd_accuracy": robust, "printed": printed_row} | row)
