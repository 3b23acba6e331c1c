"""``fastrobust certify``: certified radii of a saved model on a data set, on one process or many."""

from __future__ import annotations

import argparse
import csv
import math
import os
import pathlib
import sys
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..bounds import compute_bounds
from ..certify.checkpoints import ACTIVATIONS, load_model
from ..certify.envelope import LINEAR_METHODS, polyhedral_envelope
from ..certify.search import STRATEGIES, search_radius
from ..ops._checks import parse_norm
from . import _common as common

Columns = dict[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastrobust certify``."""
    add = parser.add_argument
    add("--model", required=True, help="saved module, or state dictionary (see --factory and --activation)")
    add("--trust", action="store_true", help="load a pickled module, which runs any code its author put there")
    add("--factory", help="package.module:callable that builds the model of a state dictionary")
    add("--activation", default="relu", choices=sorted(ACTIVATIONS), help="of a plain chain of layers (default: relu)")
    add("--data", help="npz with images and labels; default: mnist.npz in FASTROBUST_DATA")
    add("--split", default="test", help="prefix of the arrays, as in test_images (default: test)")
    add("--first", type=common.natural, default=0, help="index of the first example")
    add("--limit", type=common.count, help="number of examples (default: all)")
    add("--norm", default="inf", help="inf, 2 or 1 (default: inf)")
    add("--eps", type=common.radius, help="one-shot: the budget on which the bounds are computed")
    add("--high", type=common.radius, help="search the largest certified radius between 0 and this, instead of --eps")
    add("--tol", type=common.radius, default=1e-4, help="of the search (default: 1e-4)")
    add("--strategy", default="pec", choices=STRATEGIES, help="of the search (default: pec)")
    add(
        "--clip",
        type=float,
        nargs=2,
        default=(0.0, 1.0),
        metavar=("LOW", "HIGH"),
        help="the attacker's box (default: 0 1)",
    )
    add("--no-clip", action="store_true", help="no box")
    add("--method", default="fast-lin", choices=LINEAR_METHODS, help="linear bounds (default: fast-lin)")
    add("--rounding", default="nearest", choices=("nearest", "outward"), help="of the bounds (default: nearest)")
    add(
        "--refine",
        default="unstable",
        choices=("unstable", "all"),
        help='hidden neurons bounded linearly; the thesis\' tables are of "all" (default: unstable)',
    )
    add("--exact-input", action="store_true", help="norms below inf in a box: the first layer's exact bounds")
    add("--batch-size", type=common.count, default=500, help="examples per call of the bounds (default: 500)")
    add("--device", type=common.device, default="cpu", help="cpu, cuda or auto (default: cpu)")
    add("--out", type=common.output, help="per-example results, .csv or .npz")
    add(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a bar over images (default: on a terminal)",
    )


def load_data(path: str | None, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, C, H, W) or (N, features) as float32, uint8 ones divided by 255, and labels (N,) int64."""
    if path is None:
        folder = os.environ.get("FASTROBUST_DATA")
        if folder is None:
            raise ValueError("data: give --data FILE.npz, or set FASTROBUST_DATA to the folder with mnist.npz")
        path = str(pathlib.Path(folder) / "mnist.npz")
    if not pathlib.Path(path).is_file():
        raise ValueError(f"data: no file {path}")
    with np.load(path, allow_pickle=False) as archive:
        names = {"x": (f"{split}_images", "x", "images"), "y": (f"{split}_labels", "y", "labels")}
        found = {key: next((n for n in options if n in archive), None) for key, options in names.items()}
        if None in found.values():
            raise ValueError(f"data: {path} has {', '.join(archive.files)}, expected {split}_images and {split}_labels")
        images, labels = archive[found["x"]], archive[found["y"]].astype(np.int64)
    if len(images) != len(labels):
        raise ValueError(f"data: {path} has {len(images)} images and {len(labels)} labels")
    if images.dtype == np.uint8:
        images = images.astype(np.float32) / np.float32(255)
    if images.ndim == 3:
        images = images[:, None]
    return images.astype(np.float32), labels


def certify_batch(model: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> Columns:
    """The columns of one batch. What a batch holds does not depend on the number of workers, so neither does a result."""
    clip = None if options.no_clip else tuple(options.clip)
    norm = parse_norm(float(options.norm) if options.norm in ("1", "2", "inf") else options.norm)
    shared: dict[str, Any] = {"norm": norm, "clip": clip, "rounding": options.rounding}
    linear = {**shared, "method": options.method, "refine": options.refine, "exact_input": options.exact_input}
    with torch.no_grad():
        columns: dict[str, Any] = {"label": y, "prediction": model(x).argmax(1)}
        if options.high is not None:
            found = search_radius(
                model, x, y, high=options.high, tol=options.tol, strategy=options.strategy, batch_size=len(x), **linear
            )
            columns |= {"radius": found.radius, "midpoint": found.midpoint, "evaluations": found.evaluations}
        else:
            envelope = polyhedral_envelope(model, x, y, options.eps, **linear)
            ibp = compute_bounds(model, x, options.eps, method="ibp", labels=y, sides="lower", **shared)
            columns |= {
                "radius": envelope.radius,
                "distance": envelope.distance,
                "certified": envelope.certified,
                "certified_ibp": ibp.lower.amin(1) > 0,
            }
    return {name: value.cpu().numpy() for name, value in columns.items()}


def summarise(columns: Columns, options: argparse.Namespace) -> list[tuple[str, str]]:
    """The rows of the summary table, named as in the thesis (tables 3.6 to 3.9)."""
    wrong = columns["prediction"] != columns["label"]
    rows = [("examples", str(len(wrong))), ("CTE (%)", f"{100 * wrong.mean():.2f}")]
    if options.high is not None:
        tries = math.ceil(math.log2(options.high / options.tol)) if options.high > options.tol else 0
        mean = columns["evaluations"].mean()
        rows += [
            ("mean radius", f"{columns['radius'].mean(dtype=np.float64):.4f}"),
            ("bound evaluations", f"{mean:.2f} (bisection: {tries})"),
        ]
    else:
        linear, ibp = columns["certified"].mean(), columns["certified_ibp"].mean()
        rows += [
            ("CRE Lin (%)", f"{100 * (1 - linear):.2f}"),
            ("CRE IBP (%)", f"{100 * (1 - ibp):.2f}"),
            ("ACB Lin", f"{options.eps * linear:.4f}"),
            ("ACB IBP", f"{options.eps * ibp:.4f}"),
            ("ACB PEC", f"{columns['radius'].mean(dtype=np.float64):.4f}"),
        ]
    return rows


def write(path: pathlib.Path, first: int, columns: Columns) -> None:
    """One line an example, or arrays; floats in the shortest form that reads back to the same float32."""
    columns = {"index": np.arange(first, first + len(columns["label"])), **columns}
    if path.suffix == ".npz":
        np.savez(path, **columns)  # type: ignore[arg-type]
        return
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for values in zip(*columns.values(), strict=True):
            writer.writerow([int(v) if v.dtype.kind in "bi" else str(v) for v in values])


def main(options: argparse.Namespace) -> int:
    """Certifies, writes the file and prints the summary; returns the exit status."""
    if (options.eps is None) == (options.high is None):
        raise ValueError("eps, high: give exactly one: --eps for the one-shot certificate, --high for the search")
    if options.out and options.out.suffix not in (".csv", ".npz"):
        raise ValueError(f"out: got {options.out}, expected a name that ends in .csv or .npz")
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = options.device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    images, labels = load_data(options.data, options.split)
    last = len(labels) if options.limit is None else min(len(labels), options.first + options.limit)
    if not 0 <= options.first < last:
        raise ValueError(f"first, limit: no examples between {options.first} and {last} of {len(labels)}")
    images, labels = images[options.first : last], labels[options.first : last]
    model = load_model(options.model, options.activation, images.shape[1:], options.factory, options.trust).to(device)
    starts = range(0, len(labels), options.batch_size)
    shown = options.progress if rank == 0 else False
    begin = time.perf_counter()
    mine: dict[int, Columns] = {}
    with tqdm(total=len(labels), unit="image", disable=None if shown is None else not shown) as bar:
        for number, start in enumerate(starts):
            stop = min(start + options.batch_size, len(labels))
            if number % world == rank:
                x, y = torch.from_numpy(images[start:stop]).to(device), torch.from_numpy(labels[start:stop]).to(device)
                mine[number] = certify_batch(model, x, y, options)
            bar.update(stop - start)
    parts = mine
    if world > 1:
        gathered: list[Any] = [None] * world
        torch.distributed.all_gather_object(gathered, mine)
        parts = {number: columns for share in gathered for number, columns in share.items()}
        torch.distributed.destroy_process_group()
    if rank == 0:
        columns = {name: np.concatenate([parts[i][name] for i in range(len(starts))]) for name in parts[0]}
        if options.out:
            write(options.out, options.first, columns)
        rows = [*summarise(columns, options), ("seconds", f"{time.perf_counter() - begin:.1f}")]
        width = max(len(name) for name, _ in rows)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    return 0


if __name__ == "__main__":  # torchrun --nproc-per-node N -m fastrobust.cli.certify ...
    from . import main as command_line

    raise SystemExit(command_line(["certify", *sys.argv[1:]]))
