"""Table 3.6 (and FC1 of table 3.7) of Liu, Towards Verifiable, Generalizable and Efficient Robust Deep Neural Networks
(PhD thesis, EPFL, 2022), from networks trained here: printed figures beside ours.

    python -m benchmarks.certified_training --data FOLDER [--epochs 100] [--rows NAME ...] [--out FILE] [--save FOLDER]

FC1 is 784-1024-10, CNN the thesis' conv(16,4,2,1)-conv(32,4,2,1)-100-10; Adam 1e-3 (CNN: 1e-4 for the last tenth),
batches of 100 MNIST images, 100 epochs unless --epochs says fewer. Schedules are shares of the training, so that a
short run sees all of them. Columns as in benchmarks.certificate_tables, then training time an epoch and of all;
``fastrobust tables --trained FOLDER --exact`` adds complete verification.
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

from fastrobust import data
from fastrobust.models import mnist_cnn
from fastrobust.training import certified, train
from fastrobust.training.method import Method
from fastrobust.training.registry import METHODS

from . import thesis_tables as thesis
from .certificate_tables import measured, named
from .table_file import TableFile


@dataclass(frozen=True)
class Row:
    """name: of the row, and of the file of its weights (spaces become _)."""

    name: str
    method: str
    eps: float = 0.1
    network: str = "fc1"
    norm: str = "Linf"
    options: dict[str, Any] = field(default_factory=dict)


def per(method: str, network: str, norm: str) -> dict[str, Any]:
    """The settings of table 3.5."""
    return certified.TABLE_3_5["mnist", network, norm][method.endswith("+at")]


ROWS = [
    Row("plain", "plain"),
    *(Row(m, m, options={"eps": 0.1}) for m in ("kw", "ibp", "crown-ibp")),
    *(Row(m, m, options=per(m, "fc1", "Linf")) for m in ("l-per", "l-per+at", "i-per", "i-per+at")),
    *(Row(m, m, options={"eps": 0.1}) for m in ("mmr", "mmr+at", "sabr", "mtl-ibp")),
    Row("l2 l-per+at", "l-per+at", 0.3, norm="L2", options=per("l-per+at", "fc1", "L2")),
    Row("cnn i-per+at", "i-per+at", network="cnn", options=per("i-per+at", "cnn", "Linf")),
]


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
        got = measured(model, x_test, y_test, row.eps, row.norm).figures
        printed = thesis.printed(row.network, row.norm, row.method)
        heads = (*thesis.COLUMNS, "s/epoch", "s")
        print(f"{'':<30}" + "".join(f"{name:>9}" for name in heads))
        print(thesis.beside(row.name, got, printed, f"{seconds / args.epochs:9.2f}{seconds:9.1f}"), flush=True)
        entry = {
            "method": row.method, "network": row.network, "norm": row.norm, "eps": row.eps, "settings": row.options,
            "epochs": args.epochs, "train_images": len(y), "test_images": len(y_test), "seed": args.seed,
            "seconds": round(seconds, 1), "printed": named(printed), "ours": named(got),
        }  # fmt: skip
        table.add(row.name, entry)
        if args.save is not None:
            args.save.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), args.save / f"{row.name.replace(' ', '_')}.pt")


if __name__ == "__main__":
    main()
