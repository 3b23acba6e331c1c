"""Tables 3.6 to 3.9 of Liu, Towards Verifiable, Generalizable and Efficient Robust Deep Neural Networks
(PhD thesis, EPFL, 2022): printed figures beside ours, from the published checkpoints. Not a timing suite.

    python -m benchmarks.certificate_tables --data FOLDER [--table 3.6|3.9] [--rows WORD ...] [--images N] [--out FILE.json]

The checkpoints are expected in FOLDER/polyenvelope. Tables 3.6 to 3.8 bound every hidden neuron linearly, as the printed figures
do; the default of compute_bounds keeps the intervals of stable neurons, which is tighter for networks trained by IBP. Sigmoid and tanh
stand there with adaptive and with parallel lines. The
CIFAR-10 rows run on the 846 test images of FOLDER/cifar10_subset.npz, so their errors come with the standard error of such a
sample. Tables 3.2 and 3.3 are in benchmarks.nonuniform_tables.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrobust as fr
from fastrobust.certify.checkpoints import load_model

from .table_file import TableFile

COLUMNS = ("CTE", "CRE Lin", "CRE IBP", "ACB Lin", "ACB IBP", "ACB PEC")
MEANING = (
    "CTE: clean test error, CRE: certified robust error (percent), ACB: average certified bound; by linear "
    "bounds (Lin), intervals (IBP), polyhedral envelope certification (PEC)"
)


@dataclass(frozen=True)
class OneShot:
    """A row of tables 3.6 to 3.8: where it is printed, the checkpoint, and the columns as printed."""

    table: str
    path: str
    eps: float
    printed: tuple[float, ...]
    norm: float = math.inf
    method: str = "fast-lin"
    activation: str = "relu"
    data: str = "mnist"


ONE_SHOT = [
    OneShot("3.6", "relu_linf/mnist_fc1_l1_kw", 0.1, (2.26, 12.91, 69.20, 0.0871, 0.0308, 0.0928)),
    OneShot("3.6", "relu_linf/mnist_fc1_l1_ibp", 0.1, (1.65, 87.27, 15.20, 0.0127, 0.0848, 0.0705)),
    OneShot("3.6", "relu_linf/mnist_fc1_l1_c-perat", 0.1, (1.81, 12.90, 99.90, 0.0871, 0.0001, 0.0925)),
    OneShot("3.7", "relu_l2/mnist_fc1_l2_i-per", 0.3, (1.21, 5.34, 54.13, 0.2840, 0.1376, 0.2888), norm=2.0),
    *(
        OneShot(
            "3.8", "sigmoid_linf/sigd_c-per", 0.1, (1.97, 12.15, 84.76, 0.0879, 0.0152, 0.0930),
            method=method, activation="sigmoid",
        )
        for method in ("crown", "fast-lin")
    ),
    *(
        OneShot(
            "3.8", "tanh_l2/tanh_i-per+at", 0.3, (0.55, 5.57, 53.73, 0.2833, 0.1388, 0.2890),
            norm=2.0, method=method, activation="tanh",
        )
        for method in ("crown", "fast-lin")
    ),
    OneShot("3.6", "relu_linf/mnist_cnn_l1_kw", 0.1, (1.21, 4.44, 100.0, 0.0956, 0.0, 0.0971)),
    OneShot("3.6", "relu_linf/mnist_cnn_l1_ibp", 0.1, (1.51, 23.89, 8.13, 0.0761, 0.0919, 0.0872)),
    OneShot("3.6", "relu_linf/mnist_cnn_l1_c-perat", 0.1, (0.50, 4.85, 100.0, 0.0952, 0.0, 0.0969)),
    OneShot("3.6", "relu_linf/cifar_cnn_l1_kw", 2 / 255, (39.27, 53.81, 99.98, 0.0036, 0.0, 0.0040), data="cifar"),
    OneShot("3.6", "relu_linf/cifar_cnn_l1_c-perat", 2 / 255, (28.87, 56.59, 100.0, 0.0034, 0.0, 0.0040), data="cifar"),
]  # fmt: skip


@dataclass(frozen=True)
class Search:
    """A row of table 3.9; `printed` is T_PEC, None where the thesis has no such model."""

    path: str
    high: float
    printed: float | None
    norm: float = math.inf
    data: str = "mnist"
    tol: float = 1e-4

    @property
    def steps(self) -> int:
        return math.ceil(math.log2(self.high / self.tol))


SEARCHES = [
    Search("relu_linf/mnist_fc1_l1_kw", 0.4, 8.48),
    Search("relu_linf/mnist_fc1_l1_c-perat", 0.4, 9.38),
    Search("relu_linf/mnist_fc1_l1_ibp", 0.4, None),
    Search("relu_l2/mnist_fc1_l2_i-per", 1.2, None, norm=2.0),
    Search("relu_linf/mnist_cnn_l1_kw", 0.4, 11.61),
    Search("relu_linf/mnist_cnn_l1_c-perat", 0.4, 11.74),
    Search("relu_linf/mnist_cnn_l1_ibp", 0.4, None),
    Search("relu_linf/cifar_cnn_l1_kw", 0.1, 8.43, data="cifar"),
    Search("relu_linf/cifar_cnn_l1_c-perat", 0.1, 8.68, data="cifar"),
]


def images_of(folder: Path, data: str, split: str = "test", count: int | None = None) -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], and labels."""
    file = {"mnist": "mnist.npz", "cifar": "cifar10_subset.npz"}[data]
    with np.load(folder / file) as archive:
        x = torch.tensor(archive[f"{split}_images"][:count]).float() / 255
        y = torch.tensor(archive[f"{split}_labels"][:count]).long()
    return (x.view(-1, 1, 28, 28) if data == "mnist" else x), y


def network(folder: Path, path: str, activation: str, shape: torch.Size) -> nn.Module | None:
    file = folder / "polyenvelope" / f"{path}.ckpt"
    if not file.is_file():
        print(f"{path:<42} skipped: no {file.name}")
        return None
    return load_model(file, layout="cnn" if "_cnn_" in path else "fc1", activation=activation, shape=tuple(shape))


def one_shot(folder: Path, rows: list[OneShot], images: int | None, table: TableFile) -> None:
    print(MEANING)
    print(f"{'tables 3.6 to 3.8':<42}" + "".join(f"{name:>9}" for name in COLUMNS) + f"{'images':>8}{'s':>7}")
    for row in rows:
        x, y = images_of(folder, row.data, count=images)
        model = network(folder, row.path, row.activation, x.shape[1:])
        if model is None:
            continue
        start, cpu = time.perf_counter(), time.process_time()
        wrong = linear = ibp = total = 0.0
        size = 100 if "cnn" in row.path else 500
        options: dict[str, Any] = {"norm": row.norm, "clip": (0.0, 1.0)}
        with torch.no_grad():
            for part, labels in tqdm(list(zip(x.split(size), y.split(size), strict=True)), leave=False):
                wrong += (model(part).argmax(1) != labels).sum().item()
                found = fr.certify.polyhedral_envelope(
                    model, part, labels, row.eps, method=row.method, refine="all", **options
                )
                bounds = fr.bounds.compute_bounds(
                    model, part, row.eps, method="ibp", labels=labels, sides="lower", **options
                )
                linear += found.certified.sum().item()
                ibp += (bounds.lower.amin(1) > 0).sum().item()
                total += found.radius.double().sum().item()
        seconds, cpu, n, eps = time.perf_counter() - start, time.process_time() - cpu, len(y), row.eps
        got = (100 * wrong / n, 100 - 100 * linear / n, 100 - 100 * ibp / n, eps * linear / n, eps * ibp / n, total / n)
        name = f"{row.path} {row.method}"
        for label, values, end in ((name, got, f"{n:8d}{seconds:7.1f}"), ("  printed", row.printed, "")):
            print(
                f"{label:<42}"
                + "".join(f"{v:9.2f}" for v in values[:3])
                + "".join(f"{v:9.4f}" for v in values[3:])
                + end,
                flush=True,
            )
        # what another sample of this size differs by: the printed figures are of 10 000 images
        sampling = [100 * math.sqrt(v / 100 * (1 - v / 100) / n) if n < 10_000 else 0.0 for v in got[:3]]
        if n < 10_000:
            print(f"{'  standard error':<42}" + "".join(f"{v:9.2f}" for v in sampling))
        ours = {
            "images": n,
            "standard_error": dict(zip(COLUMNS, sampling, strict=False)),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "ours": dict(zip(COLUMNS, got, strict=True)),
        }
        entry = asdict(row) | {"printed": dict(zip(COLUMNS, row.printed, strict=True))} | ours
        table.add(f"one-shot {name}", entry)


def searches(folder: Path, rows: list[Search], images: int | None, table: TableFile) -> None:
    # The thesis' figures are those of the correctly classified images: on the others every try fails and PEC saves nothing.
    heads = ("T_Lin", "T_PEC", "printed", "saved", "all", "radius", "images", "s")
    print(f"{'table 3.9':<42}" + "".join(f"{head:>8}" for head in heads))
    for row in rows:
        x, y = images_of(folder, row.data, count=images)
        model = network(folder, row.path, "relu", x.shape[1:])
        if model is None:
            continue
        start, cpu = time.perf_counter(), time.process_time()
        with tqdm(total=len(y), leave=False) as bar:
            found = fr.certify.search_radius(
                model, x, y, high=row.high, tol=row.tol, norm=row.norm, clip=(0, 1),
                batch_size=100 if "cnn" in row.path else 500, progress=bar.update,
            )  # fmt: skip
        with torch.no_grad():
            correct = torch.cat([model(part).argmax(1) for part in x.split(500)]) == y
        evaluations = found.evaluations.double()
        mean, everyone, radius = evaluations[correct].mean(), evaluations.mean(), found.radius.double().mean()
        seconds = time.perf_counter() - start
        printed = math.nan if row.printed is None else row.printed
        print(
            f"{row.path:<42}{row.steps:8d}{mean:8.2f}{printed:8.2f}{100 * (1 - mean / row.steps):7.0f}%{everyone:8.2f}"
            f"{radius:8.4f}{len(y):8d}{seconds:8.1f}",
            flush=True,
        )
        ours = {
            "T_Lin": row.steps,
            "T_PEC": mean.item(),
            "T_PEC_all_images": everyone.item(),
            "mean_radius": radius.item(),
            "images": len(y),
            "correct": int(correct.sum()),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(time.process_time() - cpu, 2),
        }
        table.add(f"search {row.path}", {"table": "3.9", **asdict(row), **ours})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--table", choices=("3.6", "3.9"), help="one table; 3.7 and 3.8 go with 3.6 (default: all)")
    parser.add_argument("--rows", nargs="+", default=[""], help="words of the checkpoints' names (default: all)")
    parser.add_argument("--images", type=int, help="test images (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args()
    if args.data is None or not (Path(args.data) / "mnist.npz").is_file():
        parser.error("--data: expected the folder with mnist.npz (or set FASTROBUST_DATA)")
    table = TableFile(
        args.out,
        "Liu 2022, tables 3.6 to 3.9, from the published checkpoints",
    )

    def wanted(path: str) -> bool:
        return any(word in path for word in args.rows)

    if args.table in (None, "3.6"):
        one_shot(Path(args.data), [row for row in ONE_SHOT if wanted(row.path)], args.images, table)
    if args.table in (None, "3.9"):
        searches(Path(args.data), [row for row in SEARCHES if wanted(row.path)], args.images, table)


if __name__ == "__main__":
    main()
