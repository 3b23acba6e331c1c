"""Liu 2022, tables 3.2, 3.3, 3.6 to 3.9: printed figures beside ours. Not a timing suite.

    python -m benchmarks.certificate_tables --data FOLDER [--table 3.6|3.9|3.2] [--images N] [--units N ...] [--out FILE]

Tables 3.6 to 3.9 need the published checkpoints in FOLDER/polyenvelope; table 3.2 (with the cosines of table 3.3) trains
its networks here: three hidden layers, pixels in [-1, 1], plainly or on PGD examples of size 0.1. The CIFAR-10 rows run on the
846 test images of FOLDER/cifar10_subset.npz, so their errors are printed with the standard error of such a sample.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrobust as fr
from fastrobust.certify.checkpoints import load_model

from .metadata import collect
from .report import finite

COLUMNS = ("CTE", "CRE Lin", "CRE IBP", "ACB Lin", "ACB IBP", "ACB PEC")
# checkpoint, activation, data, norm, eps, method, and COLUMNS as printed
ONE_SHOT = [
    ("relu_linf/mnist_fc1_l1_kw", "relu", "mnist", math.inf, 0.1, "fast-lin", (2.26, 12.91, 69.20, 0.0871, 0.0308, 0.0928)),
    ("relu_linf/mnist_fc1_l1_ibp", "relu", "mnist", math.inf, 0.1, "fast-lin", (1.65, 87.27, 15.20, 0.0127, 0.0848, 0.0705)),
    ("relu_linf/mnist_fc1_l1_c-perat", "relu", "mnist", math.inf, 0.1, "fast-lin", (1.81, 12.90, 99.90, 0.0871, 0.0001, 0.0925)),
    ("relu_l2/mnist_fc1_l2_i-per", "relu", "mnist", 2.0, 0.3, "fast-lin", (1.21, 5.34, 54.13, 0.2840, 0.1376, 0.2888)),
    ("sigmoid_linf/sigd_c-per", "sigmoid", "mnist", math.inf, 0.1, "crown", (1.97, 12.15, 84.76, 0.0879, 0.0152, 0.0930)),
    ("tanh_l2/tanh_i-per+at", "tanh", "mnist", 2.0, 0.3, "crown", (0.55, 5.57, 53.73, 0.2833, 0.1388, 0.2890)),
    ("relu_linf/mnist_cnn_l1_kw", "relu", "mnist", math.inf, 0.1, "fast-lin", (1.21, 4.44, 100.0, 0.0956, 0.0, 0.0971)),
    ("relu_linf/mnist_cnn_l1_ibp", "relu", "mnist", math.inf, 0.1, "fast-lin", (1.51, 23.89, 8.13, 0.0761, 0.0919, 0.0872)),
    ("relu_linf/mnist_cnn_l1_c-perat", "relu", "mnist", math.inf, 0.1, "fast-lin", (0.50, 4.85, 100.0, 0.0952, 0.0, 0.0969)),
    ("relu_linf/cifar_cnn_l1_kw", "relu", "cifar", math.inf, 2 / 255, "fast-lin", (39.27, 53.81, 99.98, 0.0036, 0.0, 0.0040)),
    ("relu_linf/cifar_cnn_l1_c-perat", "relu", "cifar", math.inf, 2 / 255, "fast-lin", (28.87, 56.59, 100.0, 0.0034, 0.0, 0.0040)),
]  # fmt: skip
# checkpoint, high, tol, T_Lin, T_PEC as printed
SEARCHES = [
    ("relu_linf/mnist_fc1_l1_kw", 0.4, 12, 8.48),
    ("relu_linf/mnist_fc1_l1_c-perat", 0.4, 12, 9.38),
    ("relu_linf/mnist_cnn_l1_kw", 0.4, 12, 11.61),
]
# units, robust: uniform, non-uniform, ratio as printed
VOLUMES = {
    (100, False): (0.0295, 0.0349, 1.183),
    (100, True): (0.0692, 0.1678, 2.425),
    (300, False): (0.0309, 0.0350, 1.133),
    (300, True): (0.0507, 0.1404, 2.769),
    (500, False): (0.0319, 0.0360, 1.129),
    (500, True): (0.0436, 0.1167, 2.677),
}


def mnist(folder: Path, split: str, count: int | None = None) -> tuple[Tensor, Tensor]:
    with np.load(folder / "mnist.npz") as archive:
        x = torch.tensor(archive[f"{split}_images"][:count]).float().view(-1, 1, 28, 28) / 255
        return x, torch.tensor(archive[f"{split}_labels"][:count]).long()


def cifar(folder: Path, count: int | None = None) -> tuple[Tensor, Tensor]:
    with np.load(folder / "cifar10_subset.npz") as archive:
        x = torch.tensor(archive["test_images"][:count]).float() / 255
        return x, torch.tensor(archive["test_labels"][:count]).long()


def one_shot(folder: Path, images: int) -> list[dict[str, Any]]:
    print("tables 3.6 to 3.8".ljust(34) + "".join(name.rjust(9) for name in COLUMNS) + "s".rjust(8))
    rows = []
    for path, activation, data, norm, eps, method, printed in ONE_SHOT:
        file = folder / "polyenvelope" / f"{path}.ckpt"
        archive = folder / ("mnist.npz" if data == "mnist" else "cifar10_subset.npz")
        if not file.is_file() or not archive.is_file():
            print(f"{path:<34} skipped: no {(archive if file.is_file() else file).name}")
            continue
        x, y = mnist(folder, "test", images) if data == "mnist" else cifar(folder, images)
        model = load_model(str(file), activation, tuple(x.shape[1:]))
        start = time.perf_counter()
        wrong = linear = ibp = 0
        total = 0.0
        size = 500 if not any(isinstance(layer, nn.Conv2d) for layer in model) else 100
        with torch.no_grad():
            for part, labels in tqdm(list(zip(x.split(size), y.split(size), strict=True)), leave=False):
                wrong += int((model(part).argmax(1) != labels).sum())
                found = fr.certify.polyhedral_envelope(model, part, labels, eps, norm=norm, clip=(0, 1), method=method)
                bounds = fr.bounds.compute_bounds(
                    model, part, eps, norm=norm, clip=(0, 1), method="ibp", labels=labels, sides="lower"
                )
                linear += int(found.certified.sum())
                ibp += int((bounds.lower.amin(1) > 0).sum())
                total += found.radius.double().sum().item()
        seconds, n = time.perf_counter() - start, len(y)
        got = (100 * wrong / n, 100 - 100 * linear / n, 100 - 100 * ibp / n, eps * linear / n, eps * ibp / n, total / n)
        # what the same quantity of another sample of this size differs by: the printed figures are of 10 000 images
        sampling = [100 * math.sqrt(v / 100 * (1 - v / 100) / n) if n < 10_000 else 0.0 for v in got[:3]]
        figures = lambda row: "".join(f"{v:9.2f}" for v in row[:3]) + "".join(f"{v:9.4f}" for v in row[3:])
        print(f"{path:<34}{figures(got)}{seconds:8.1f}", flush=True)
        print("  printed".ljust(34) + figures(printed))
        if n < 10_000:
            print(f"  standard error of {n} images".ljust(34) + "".join(f"{v:9.2f}" for v in sampling))
        rows.append(
            {
                "checkpoint": path,
                "method": method,
                "norm": norm,
                "eps": eps,
                "images": n,
                "seconds": seconds,
                "ours": dict(zip(COLUMNS, got, strict=True)),
                "printed": dict(zip(COLUMNS, printed, strict=True)),
                "standard_error": dict(zip(COLUMNS, sampling, strict=False)),
            }  # fmt: skip
        )
    return rows


def searches(folder: Path, images: int) -> list[dict[str, Any]]:
    rows = []
    x, y = mnist(folder, "test", images)
    print(f"{'table 3.9':<34}{'T_Lin':>8}{'T_PEC':>8}{'printed':>9}{'saved':>8}{'s':>8}")
    for path, high, steps, printed in SEARCHES:
        file = folder / "polyenvelope" / f"{path}.ckpt"
        if not file.is_file():
            print(f"{path:<34} skipped: no {file.name}")
            continue
        model = load_model(str(file))
        start = time.perf_counter()
        with tqdm(total=len(y), leave=False) as bar:
            size = 500 if "fc1" in path else 100
            found = fr.certify.search_radius(
                model, x, y, high=high, tol=1e-4, clip=(0, 1), batch_size=size, progress=bar.update
            )  # fmt: skip
        mean = found.evaluations.double().mean().item()
        seconds = time.perf_counter() - start
        print(
            f"{path:<34}{steps:8d}{mean:8.2f}{printed:9.2f}{100 * (1 - mean / steps):7.0f}%{seconds:8.1f}", flush=True
        )
        rows.append(
            {
                "checkpoint": path,
                "images": len(y),
                "seconds": seconds,
                "T_Lin": steps,
                "T_PEC": mean,
                "printed": printed,
            }
        )
    return rows


def train(x: Tensor, y: Tensor, units: int, robust: bool, seed: int = 0) -> nn.Module:
    """Adam; robust networks see PGD-5 examples in a ball that grows to 0.1 over the first two epochs."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(3):
        layers += [nn.Linear(784 if i == 0 else units, units), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(units, 10))
    optimiser = torch.optim.Adam(model.parameters(), 2e-3 if robust else 1e-3)
    epochs = 30 if robust else 4
    for epoch in tqdm(range(epochs), leave=False):
        eps = 0.1 * min(1.0, (epoch + 1) / 2)
        for batch in torch.randperm(len(y)).split(200):
            images, labels = x[batch], y[batch]
            if robust:
                images = fr.attacks.pgd(
                    model, images, labels, eps=eps, steps=5, step_size=eps / 2.5, clip=(-1.0, 1.0), model_mode="keep"
                )
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model.eval()


def volumes(folder: Path, images: int, units: list[int]) -> list[dict[str, Any]]:
    rows = []
    x, y = mnist(folder, "train")
    test, labels = mnist(folder, "test")
    x, test = 2 * x - 1, 2 * test - 1
    print(
        f"{'tables 3.2 and 3.3':<20}{'accuracy':>9}{'uniform':>9}{'volume':>9}{'ratio':>8}{'printed':>9}{'cosine':>8}{'min':>8}{'s':>8}"
    )
    for count in units:
        for robust in (False, True):
            model = train(x, y, count, robust)
            accuracy = 100 * (model(test).argmax(1) == labels).double().mean().item()
            start = time.perf_counter()
            found = fr.certify.nonuniform_radius(model, test[:images], labels[:images])
            keep = found.uniform > 0
            uniform, volume = found.uniform[keep].mean().item(), found.volume[keep].mean().item()
            double = model.double()
            again = fr.bounds.compute_bounds(
                double,
                test[:images][keep].double(),
                found.eps[keep].double(),
                method="fast-lin",
                labels=labels[:images][keep],
            ).lower
            assert bool((again > 0).all()), "a region is not certified in float64"
            direction = nn.functional.normalize(found.eps[keep].flatten(1), dim=1)
            cosines = (direction @ direction.T)[~torch.eye(int(keep.sum()), dtype=torch.bool)]
            printed = VOLUMES.get((count, robust), (math.nan,) * 3)[2]
            name = f"{count} {'robust' if robust else 'plain'}"
            print(
                f"{name:<20}{accuracy:9.1f}{uniform:9.4f}{volume:9.4f}{volume / uniform:8.3f}{printed:9.3f}"
                f"{cosines.mean():8.4f}{cosines.min():8.4f}{time.perf_counter() - start:8.1f}",
                flush=True,
            )
            rows.append(
                {
                    "units": count,
                    "robust": robust,
                    "images": images,
                    "accuracy": accuracy,
                    "uniform": uniform,
                    "volume": volume,
                    "ratio": volume / uniform,
                    "printed": printed,
                    "cosine": cosines.mean().item(),
                    "least_cosine": cosines.min().item(),
                    "seconds": time.perf_counter() - start,
                }  # fmt: skip
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--table", choices=("3.6", "3.9", "3.2"), help="one table (default: all)")
    parser.add_argument("--images", type=int, help="test images (default: 10000; table 3.2: 50)")
    parser.add_argument(
        "--units", type=int, nargs="+", default=[100, 300, 500], help="table 3.2 (default: 100 300 500)"
    )
    parser.add_argument("--out", type=Path, help="also write the rows as JSON")
    args = parser.parse_args()
    if args.data is None or not (Path(args.data) / "mnist.npz").is_file():
        parser.error("--data: expected the folder with mnist.npz (or set FASTROBUST_DATA)")
    tables: dict[str, Any] = {"metadata": collect(torch.device("cpu"), "tables")}
    if args.table in (None, "3.6"):
        tables["3.6 to 3.8"] = one_shot(Path(args.data), args.images or 10_000)
    if args.table in (None, "3.9"):
        tables["3.9"] = searches(Path(args.data), args.images or 10_000)
    if args.table in (None, "3.2"):
        tables["3.2 and 3.3"] = volumes(Path(args.data), args.images or 50, args.units)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(finite(tables), indent=1, allow_nan=False, default=str) + "\n")


if __name__ == "__main__":
    main()
