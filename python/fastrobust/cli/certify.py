"""``fastrobust certify``: certified radii of a model on a data set, on one process or many."""

from __future__ import annotations

import argparse
import csv
import math
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..bounds import compute_bounds
from ..certify.envelope import LINEAR_METHODS, polyhedral_envelope
from ..certify.search import STRATEGIES, search_radius
from ..data import Images
from . import _arguments as shared
from . import _certify_exact as exact
from . import _common as common
from ._common import BadArguments
from ._workers import Workers, workers

Columns = dict[str, np.ndarray]
_THESIS = "Liu, Towards Verifiable, Generalizable and Efficient Robust Deep Neural Networks (PhD thesis, EPFL, 2022)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``fastrobust certify``."""
    shared.add_model(parser, "of the built-in model")
    shared.add_images(parser)
    parser.epilog = f"Figures are named as in tables 3.6 to 3.9 of {_THESIS}."
    add = parser.add_argument_group("the certificate").add_argument
    add("--norm", type=shared.norm, default="inf", help="Linf, L2, L1 or a number >= 1 (default: Linf)")
    add("--eps", type=common.radius, help="one-shot: the budget on which the bounds are computed, such as 0.1 or 8/255")
    add("--high", type=common.radius, help="search the largest certified radius between 0 and this, instead of --eps")
    add("--tol", type=common.radius, default=1e-4, help="of the search (default: 1e-4)")
    add("--strategy", type=str.lower, default="pec", choices=STRATEGIES, help="of the search (default: pec)")
    add(
        "--method", type=str.lower, choices=LINEAR_METHODS,
        help="linear bounds (default: fast-lin; with --exact crown)",
    )  # fmt: skip
    add(
        "--rounding", type=str.lower, default="nearest", choices=("nearest", "outward"),
        help="of the bounds (default: nearest)",
    )  # fmt: skip
    add(
        "--refine", type=str.lower, default="unstable", choices=("unstable", "all"),
        help='hidden neurons bounded linearly; the thesis\' tables are of "all" (default: unstable)',
    )  # fmt: skip
    add("--exact-input", action="store_true", help="norms below inf in a box: the first layer's exact bounds")
    exact.add_arguments(parser)
    run = parser.add_argument_group("running and results")
    shared.add_running(run, 500)
    run.add_argument("--out", type=common.output, help="a line an image, .csv or .npz")


def certify_batch(
    model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, progress: Callable[[int], None]
) -> Columns:
    """The columns of one batch. What a batch holds does not depend on the number of workers, so neither does a
    result."""
    common_options: dict[str, Any] = {"norm": args.norm, "clip": shared.clip_of(args), "rounding": args.rounding}
    linear = {**common_options, "method": args.method, "refine": args.refine, "exact_input": args.exact_input}
    with torch.no_grad():
        with shared.model_failures(str(args.model), x):
            logits = model(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise BadArguments(f"argument --model: returns {shape}, expected logits of shape ({len(x)}, classes)")
        shared.check_classes(logits.shape[1], y)
        columns: dict[str, Any] = {"label": y, "prediction": logits.argmax(1)}
        if args.exact:
            columns |= exact.batch(model, x, y, args, progress)
        elif args.high is not None:
            found = search_radius(
                model, x, y, high=args.high, tol=args.tol, strategy=args.strategy, batch_size=len(x), **linear
            )
            columns |= {"radius": found.radius, "midpoint": found.midpoint, "evaluations": found.evaluations}
        else:
            envelope = polyhedral_envelope(model, x, y, args.eps, **linear)
            ibp = compute_bounds(model, x, args.eps, method="ibp", labels=y, sides="lower", **common_options)
            columns |= {
                "radius": envelope.radius,
                "distance": envelope.distance,
                "certified": envelope.certified,
                "certified_ibp": ibp.lower.amin(1) > 0,
            }
    if not args.exact:
        progress(len(y))
    return {name: value.cpu().numpy() if isinstance(value, Tensor) else value for name, value in columns.items()}


def summarise(columns: Columns, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The rows of the summary, with the thesis' short names (tables 3.6 to 3.9) in brackets."""
    if args.exact:
        return exact.summarise(columns, args)
    wrong = columns["prediction"] != columns["label"]
    radius = columns["radius"].mean(dtype=np.float64)
    rows = [("clean test error (CTE)", f"{100 * wrong.mean():.2f} %")]
    if args.high is not None:
        tries = math.ceil(math.log2(args.high / args.tol)) if args.high > args.tol else 0
        return [
            *rows,
            ("mean certified radius", f"{radius:.4f}"),
            ("bound evaluations an image", f"{columns['evaluations'].mean():.2f} (bisection: {tries})"),
        ]
    linear, ibp = columns["certified"].mean(), columns["certified_ibp"].mean()
    error, bound = "certified robust error", "average certified bound"
    return [
        *rows,
        (f"{error}, linear bounds (CRE Lin)", f"{100 * (1 - linear):.2f} %"),
        (f"{error}, interval bounds (CRE IBP)", f"{100 * (1 - ibp):.2f} %"),
        (f"{bound}, linear bounds (ACB Lin)", f"{args.eps * linear:.4f}"),
        (f"{bound}, interval bounds (ACB IBP)", f"{args.eps * ibp:.4f}"),
        (f"{bound}, polyhedral envelope certification (ACB PEC)", f"{radius:.4f}"),
    ]


def setting(args: argparse.Namespace, given: shared.Given, images: Images) -> list[tuple[str, str]]:
    """What is certified, over which set and how."""
    clip = shared.clip_of(args)
    budget = f"eps {args.eps:.6g}" if args.high is None else f"the largest radius up to {args.high:.6g}"
    box = "no box" if clip is None else f"box [{clip[0]:g}, {clip[1]:g}]"
    size = "inf" if args.norm == math.inf else f"{args.norm:g}"
    how = [args.method, *(["exact input"] * args.exact_input), *(["refine all"] * (args.refine == "all"))]
    how += ["outward rounding"] * (args.rounding == "outward")
    return [
        ("decided" if args.exact else "certified", f"L{size}, {budget}, {box}, {', '.join(how)}"),
        ("model", given.name + (", normalised input" if args.normalize else "")),
        *([("built", given.built)] if given.built else []),
        ("data", shared.data_text(images)),
        ("device", shared.device_text(args.device)),
    ]


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


def main(args: argparse.Namespace) -> int:
    """Certifies, writes the file and prints the summary; returns the exit status."""
    with common.plain_warnings():
        return _main(args)


def _main(args: argparse.Namespace) -> int:
    args.method = args.method or ("crown" if args.exact else "fast-lin")
    exact.check(args)
    if (args.eps is None) == (args.high is None):
        raise BadArguments("eps, high: give exactly one: --eps for the one-shot certificate, --high for the search")
    if args.high is not None and args.tol <= 0:
        raise BadArguments(f"argument --tol: got {args.tol:g}, expected a value > 0")
    if args.out and args.out.suffix not in (".csv", ".npz"):
        raise BadArguments(f"argument --out: got {args.out}, expected a name that ends in .csv or .npz")
    begun = time.perf_counter()
    images = shared.begin(args, args.out)
    with workers(args.device) as team:
        args.device = team.device
        return _certify_all(args, images, team, begun)


def _certify_all(args: argparse.Namespace, images: Images, team: Workers, begun: float) -> int:
    given = shared.model_of(args, images, graphs=False)
    model = given.model
    if args.normalize is not None:
        mean, std = args.normalize
        model = shared.Normalized(model, mean, std, images.images[:1].to(args.device)).eval()
    starts = range(0, len(images.labels), args.batch_size)
    show = sys.stderr.isatty() if args.progress is None else args.progress
    mine: dict[int, Columns] = {}
    with tqdm(total=len(images.labels), desc="certify", unit="image", disable=not show or team.rank > 0) as bar:
        for number, start in enumerate(starts):
            x, y = (t[start : start + args.batch_size] for t in images[:2])
            if team.mine(number):
                mine[number] = certify_batch(model, x.to(args.device), y.to(args.device), args, bar.update)
            else:
                bar.update(len(y))
    parts = team.gather(mine)
    if team.rank == 0:
        columns = {name: np.concatenate([parts[i][name] for i in range(len(starts))]) for name in parts[0]}
        head, found = setting(args, given, images), summarise(columns, args)
        columns.pop("note", None)
        width = max(len(name) for name, _ in found)
        print("\n".join(f"{name:<16} {value}" for name, value in head))
        print("\n".join(f"{name:<{width}}  {value}" for name, value in found))
        print(f"{'time':<16} {time.perf_counter() - begun:.2f} s")
        if args.out:
            write(args.out, args.first, columns)
            print(f"{'written':<16} {args.out}")
    return 0


if __name__ == "__main__":  # torchrun --nproc-per-node N -m fastrobust.cli.certify ...
    from . import main as command_line

    raise SystemExit(command_line(["certify", *sys.argv[1:]]))
