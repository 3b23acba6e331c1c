"""Table 3.6 (and FC1 of table 3.7) of Liu, Towards Verifiable, Generalizable and Efficient Robust Deep Neural Networks (PhD
thesis, EPFL, 2022), from networks trained here: printed figures beside ours.

    python -m benchmarks.certified_training --data FOLDER [--epochs 100] [--rows NAME ...] [--out FILE.json] [--save FOLDER]

FC1 is 784-1024-10, CNN the thesis' conv(16,4,2,1)-conv(32,4,2,1)-100-10; Adam 1e-3 (CNN: 1e-4 for the last tenth), batches of 100
MNIST images, 100 epochs unless --epochs says fewer. Schedules are shares of the training, so that a short run sees all of
them. Columns: clean test error, error under PGD (20 steps, 2 restarts), certified error by Fast-Lin and by intervals, average certified
bounds by Fast-Lin, intervals and envelopes (one shot at the budget); then training time an epoch and of all.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastrobust as fr
from fastrobust import data
from fastrobust.models import mnist_cnn
from fastrobust.training import certified, train
from fastrobust.training.method import Method
from fastrobust.training.registry import METHODS

from .table_file import TableFile

COLUMNS = ("CTE", "PGD", "CRE Lin", "CRE IBP", "ACB Lin", "ACB IBP", "ACB PEC")
NONE = math.nan


@dataclass(frozen=True)
class Row:
    """printed: in the order of ``COLUMNS``; NaN where the thesis has none."""

    name: str
    method: str
    printed: tuple[float, ...]
    eps: float = 0.1
    network: str = "fc1"
    norm: str = "Linf"
    options: dict[str, Any] = field(default_factory=dict)


def per(method: str, network: str, norm: str) -> dict[str, Any]:
    """The settings of table 3.5."""
    return certified.TABLE_3_5["mnist", network, norm][method.endswith("+at")]


ROWS = [
    Row("plain", "plain", (1.99, 98.37, 100.0, 100.0, 0.0, 0.0, 0.0)),
    Row("kw", "kw", (2.26, 8.59, 12.91, 69.20, 0.0871, 0.0308, 0.0928), options={"eps": 0.1}),
    Row("ibp", "ibp", (1.65, 9.67, 87.27, 15.20, 0.0127, 0.0848, 0.0705), options={"eps": 0.1}),
    Row("crown-ibp", "crown-ibp", (1.98, 9.50, 67.39, 14.45, 0.0326, 0.0855, 0.0800), options={"eps": 0.1}),
    Row("l-per", "l-per", (1.60, 7.45, 11.71, 92.89, 0.0883, 0.0071, 0.0935), options=per("l-per", "fc1", "Linf")),
    Row(
        "l-per+at", "l-per+at", (1.81, 7.73, 12.90, 99.90, 0.0871, 0.0001, 0.0925), options=per("l-per+at", "fc1", "Linf")
    ),
    Row("i-per", "i-per", (1.60, 6.28, 11.96, 93.33, 0.0880, 0.0067, 0.0934), options=per("i-per", "fc1", "Linf")),
    Row(
        "i-per+at", "i-per+at", (1.54, 7.15, 13.96, 98.55, 0.0868, 0.0014, 0.0927), options=per("i-per+at", "fc1", "Linf")
    ),
    Row("sabr", "sabr", (NONE,) * 7, options={"eps": 0.1}),
    Row("mtl-ibp", "mtl-ibp", (NONE,) * 7, options={"eps": 0.1}),
    Row(
        "l2 l-per+at", "l-per+at", (0.67, 1.40, 4.84, 64.79, 0.2855, 0.1056, 0.2910), 0.3, norm="L2",
        options=per("l-per+at", "fc1", "L2"),
    ),
    Row(
        "cnn i-per+at", "i-per+at", (0.48, 1.29, 4.61, 99.94, 0.0954, 0.0001, 0.0971), network="cnn",
        options=per("i-per+at", "cnn", "Linf"),
    ),
]  # fmt: skip


class Batches:
    """Images of a data set in a new order every epoch, without workers."""

    def __init__(self, x: Tensor, y: Tensor, size: int, seed: int) -> None:
        self.x, self.y, self.size = x, y, size
        self.dataset = y  # for its length
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return math.ceil(len(self.y) / self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for rows in torch.randperm(len(self.y), generator=self.generator).split(self.size):
            yield self.x[rows], self.y[rows]


def network(name: str) -> nn.Sequential:
    if name == "cnn":
        return mnist_cnn()
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))


def trained(row: Row, x: Tensor, y: Tensor, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """The network, and seconds of training."""
    torch.manual_seed(seed)
    model = network(row.network)
    method = Method() if row.method == "plain" else METHODS[row.method](**row.options)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    late = max(1, round(0.9 * epochs))
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [late], 0.1) if row.network == "cnn" else None
    start = time.perf_counter()

    def tell(_: nn.Module, record: dict[str, float]) -> None:
        print(
            f"  {row.name}: epoch {record['epoch']:.0f} of {epochs}, loss {record['loss']:.4f}, "
            f"error {100 - 100 * record['accuracy']:.2f}, {record['seconds']:.1f} s",
            flush=True,
        )

    train(
        model, Batches(x, y, 100, seed), method, epochs=epochs, optimizer=optimizer, scheduler=scheduler, on_epoch=tell
    )
    return model.eval(), time.perf_counter() - start


@torch.no_grad()
def evaluated(model: nn.Module, x: Tensor, y: Tensor, row: Row) -> tuple[float, ...]:
    """The columns."""
    wrong = hit = linear = ibp = total = 0.0
    for part, labels in zip(x.split(500), y.split(500), strict=True):
        options: dict[str, Any] = {"norm": row.norm, "clip": (0.0, 1.0)}
        clean = model(part).argmax(1) != labels
        adv = fr.attacks.pgd(model, part, labels, eps=row.eps, steps=20, restarts=2, seed=0, check=False, **options)
        found = fr.certify.polyhedral_envelope(model, part, labels, row.eps, refine="all", **options)
        bounds = fr.bounds.compute_bounds(model, part, row.eps, method="ibp", labels=labels, sides="lower", **options)
        wrong += clean.sum().item()
        hit += ((model(adv).argmax(1) != labels) | clean).sum().item()
        linear += found.certified.sum().item()
        ibp += (bounds.lower.amin(1) > 0).sum().item()
        total += found.radius.double().sum().item()
    n, eps = len(y), row.eps
    errors = 100 * wrong / n, 100 * hit / n, 100 - 100 * linear / n, 100 - 100 * ibp / n
    return (*errors, eps * linear / n, eps * ibp / n, total / n)


def line(label: str, values: tuple[float, ...], end: str = "") -> str:
    return f"{label:<24}" + "".join(f"{v:9.{2 if i < 4 else 4}f}" for i, v in enumerate(values)) + end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--rows", nargs="+", help=f"of {', '.join(repr(r.name) for r in ROWS)} (default: all)")
    parser.add_argument("--images", type=int, help="training images (default: all)")
    parser.add_argument("--test", type=int, help="test images (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="folder for the weights")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args()
    unknown = set(args.rows or ()) - {row.name for row in ROWS}
    if unknown:
        parser.error(f"--rows: got {sorted(unknown)}, expected of {[row.name for row in ROWS]}")
    seen = data.load("mnist", "train", folder=args.data)
    held = data.load("mnist", "test", folder=args.data)
    x, y = seen.images[: args.images], seen.labels[: args.images]
    x_test, y_test = held.images[: args.test], held.labels[: args.test]
    table = TableFile(args.out, "Liu 2022, tables 3.6 and 3.7, MNIST, trained here")
    for row in ROWS:
        if args.rows and row.name not in args.rows:
            continue
        model, seconds = trained(row, x, y, args.epochs, args.seed)
        got = evaluated(model, x_test, y_test, row)
        print(f"{'':<24}" + "".join(f"{name:>9}" for name in COLUMNS) + f"{'s/epoch':>9}{'s':>8}")
        print(line(row.name, got, f"{seconds / args.epochs:9.2f}{seconds:8.1f}"))
        print(line("  printed", row.printed))
        print(line("  difference", tuple(a - b for a, b in zip(got, row.printed, strict=True))), flush=True)
        entry = {
            "method": row.method, "network": row.network, "norm": row.norm, "eps": row.eps, "settings": row.options,
            "epochs": args.epochs, "train_images": len(y), "test_images": len(y_test), "seed": args.seed,
            "seconds": round(seconds, 1), "printed": dict(zip(COLUMNS, row.printed, strict=True)),
            "ours": dict(zip(COLUMNS, got, strict=True)),
        }  # fmt: skip
        table.add(row.name, entry)
        if args.save is not None:
            args.save.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), args.save / f"{row.name.replace(' ', '_')}.pt")


if __name__ == "__main__":
    main()
