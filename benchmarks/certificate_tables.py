"""Tables 3.2, 3.3 and 3.6 to 3.9 of Liu, Towards Verifiable, Generalizable and Efficient Robust Deep Neural Networks
(PhD thesis, EPFL, 2022): ours, the printed figures and the difference, from the published checkpoints and from
networks trained here.

    fastrobust tables --data FOLDER [--table 3.6 3.9 ...] [--rows WORD ...] [--trained FOLDER] [--exact] [--out FILE]

The checkpoints are looked for below FOLDER/polyenvelope (a copy of the authors' ckpts), networks trained here in
the folder of ``python -m benchmarks.certified_training --save``. Tables 3.6 to 3.8 bound every hidden neuron
linearly, as the printed figures do; the default of compute_bounds keeps the intervals of stable neurons, which is
tighter for networks trained by IBP. Sigmoid and tanh stand there with parallel and with adaptive lines. CIFAR-10
rows run on the 846 test images of cifar10_subset.npz, so their errors come with the standard error of such a
sample. PGD has 20 steps and 2 restarts. ``--exact`` fills CRE MIP by fr.certify.verify: what is not verified within
``--timeout`` seconds an image counts as an error, as in the thesis, and the share that is undecided is told.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrobust as fr
from fastrobust.certify.checkpoints import load_model

from . import thesis_tables as thesis
from .image_files import images_of
from .table_file import TableFile

TABLES = ("3.2", "3.3", "3.6", "3.7", "3.8", "3.9")
TOL = 1e-4  # of the search


class Found(NamedTuple):
    """A printed row and a network of that kind; origin: "published" or "trained here"."""

    row: thesis.Printed
    file: Path
    origin: str

    def model(self, shape: torch.Size) -> nn.Module:
        row = self.row
        return load_model(self.file, layout=row.network, activation=row.activation, shape=tuple(shape))

    @property
    def size(self) -> int:
        return 100 if self.row.network == "cnn" else 500


class Measured(NamedTuple):
    """figures: of ``thesis.COLUMNS``. undecided: percent that complete verification left open."""

    figures: tuple[float, ...]
    undecided: float


@torch.no_grad()
def measured(
    model: nn.Module, x: Tensor, y: Tensor, eps: float, norm: str, *, lines: str = "fast-lin",
    timeout: float | None = None, size: int = 500,
) -> Measured:  # fmt: skip
    """One-shot certificates of all images. timeout: seconds an image of complete verification, None: without."""
    wrong = hit = linear = ibp = total = proven = left = 0.0
    options: dict[str, Any] = {"norm": norm, "clip": (0.0, 1.0)}
    for part, labels in tqdm(list(zip(x.split(size), y.split(size), strict=True)), leave=False, disable=None):
        clean = model(part).argmax(1) != labels
        adv = fr.attacks.pgd(model, part, labels, eps=eps, steps=20, restarts=2, seed=0, check=False, **options)
        found = fr.certify.polyhedral_envelope(model, part, labels, eps, method=lines, refine="all", **options)
        bounds = fr.bounds.compute_bounds(model, part, eps, method="ibp", labels=labels, sides="lower", **options)
        wrong += clean.sum().item()
        hit += ((model(adv).argmax(1) != labels) | clean).sum().item()
        linear += found.certified.sum().item()
        ibp += (bounds.lower.amin(1) > 0).sum().item()
        total += found.radius.double().sum().item()
        if timeout is not None:
            status = fr.certify.verify(model, part, labels, eps, timeout=timeout, **options).status
            proven += sum(s == "verified" for s in status)
            left += sum(s == "unknown" for s in status)
    n = len(y)
    errors = [100 * wrong / n, 100 * hit / n, *(100 - 100 * v / n for v in (linear, ibp, proven))]
    if timeout is None:
        errors[-1] = math.nan
    bound = (eps * linear / n, eps * ibp / n, total / n)
    return Measured((*errors, *bound), math.nan if timeout is None else 100 * left / n)


def named(figures: tuple[float, ...]) -> dict[str, float | None]:
    """By column; None where there is none."""
    return {k: None if math.isnan(v) else v for k, v in zip(thesis.COLUMNS, figures, strict=True)}


def networks(folder: Path, trained: Path | None, words: list[str]) -> Iterator[Found]:
    """The networks of the printed rows that are there; says which are not, and where they are to be had."""
    missing: dict[str, list[str]] = {}
    for row in thesis.PRINTED:
        if not any(word in f"{row.name} {' '.join(row.files())}" for word in words):
            continue
        published, ours = row.published(folder), None if trained is None else row.trained(trained)
        if published is not None:
            yield Found(row, published, "published")
        else:
            section = f"{row.table} {row.name.rsplit(' ', 1)[0]}"
            missing.setdefault(section, []).append(row.method)
        if ours is not None:
            yield Found(row, ours, "trained here")
    for section, methods in missing.items():
        print(f"{section}: no checkpoint of {', '.join(methods)}")
    if missing:
        print(f"the published ones are the folder ckpts of {thesis.SOURCE}; copy it to {folder}", flush=True)


def one_shot(args: argparse.Namespace, found: list[Found], table: TableFile) -> None:
    print(thesis.MEANING)
    print(f"{'tables 3.6 to 3.8':<54}" + "".join(f"{name:>9}" for name in thesis.COLUMNS) + f"{'images':>8}{'s':>7}")
    for net in found:
        row = net.row
        x, y = images_of(args.data, row.data, count=args.images)
        model = net.model(x.shape[1:])
        timeout = args.timeout if args.exact and row.table == "3.6" else None
        for lines in ("fast-lin",) if row.activation == "relu" else ("fast-lin", "crown"):
            start, cpu = time.perf_counter(), time.process_time()
            got = measured(model, x, y, row.eps, row.norm, lines=lines, timeout=timeout, size=net.size)
            seconds, n = time.perf_counter() - start, len(y)
            cpu = time.process_time() - cpu
            label = f"{row.table} {row.name}{'' if lines == 'fast-lin' else ' ' + lines}, {net.origin}"
            print(thesis.beside(label, got.figures, row.figures, f"{n:8d}{seconds:7.1f}", 54), flush=True)
            # what another sample of this size differs by: the printed figures are of 10 000 images
            deviation = [100 * math.sqrt(v / 100 * (1 - v / 100) / n) if n < 10_000 else 0.0 for v in got.figures[:5]]
            if n < 10_000:
                print(thesis.line("  standard error", [*deviation, *[math.nan] * 3], "", 54))
            if timeout is not None and got.undecided:
                print(f"  undecided after {timeout:g} s an image: {got.undecided:.2f} %")
            entry = {
                "table": row.table, "data": row.data, "network": row.network, "activation": row.activation,
                "norm": row.norm, "eps": row.eps, "method": row.method, "lines": lines, "origin": net.origin,
                "file": net.file.name, "images": n, "printed": named(row.figures), "ours": named(got.figures),
                "standard_error": dict(zip(thesis.COLUMNS, deviation, strict=False)),
                "undecided": None if timeout is None else got.undecided, "timeout": timeout,
                "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
            }  # fmt: skip
            table.add(label, entry)


def searches(args: argparse.Namespace, found: list[Found], table: TableFile) -> None:
    # The thesis' figures are those of the correctly classified images: on others every try fails and PEC saves nothing.
    heads = ("T_Lin", "T_PEC", "printed", "diff", "saved", "all", "radius", "images", "s")
    print(f"{'table 3.9':<54}" + "".join(f"{head:>8}" for head in heads))
    for net in found:
        row = net.row
        high = thesis.HIGH[row.data, row.norm]
        x, y = images_of(args.data, row.data, count=args.images)
        model, steps = net.model(x.shape[1:]), math.ceil(math.log2(high / TOL))
        start, cpu = time.perf_counter(), time.process_time()
        with tqdm(total=len(y), leave=False, disable=None) as bar:
            radii = fr.certify.search_radius(
                model, x, y, high=high, tol=TOL, norm=row.norm, clip=(0, 1), batch_size=net.size, progress=bar.update
            )
        with torch.no_grad():
            correct = torch.cat([model(part).argmax(1) for part in x.split(500)]) == y
        tries = radii.evaluations.double()
        mean, everyone, radius = tries[correct].mean().item(), tries.mean().item(), radii.radius.double().mean().item()
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        printed = thesis.SEARCHES.get((row.data, row.network, row.norm, row.method), (steps, math.nan))[1]
        label = f"3.9 {row.name}, {net.origin}"
        cells = (mean, printed, mean - printed)
        print(
            f"{label:<54}{steps:8d}" + "".join(" " * 8 if math.isnan(v) else f"{v:8.2f}" for v in cells) +
            f"{100 * (1 - mean / steps):7.0f}%{everyone:8.2f}{radius:8.4f}{len(y):8d}{seconds:8.1f}", flush=True,
        )  # fmt: skip
        ours = {
            "table": "3.9", "data": row.data, "network": row.network, "norm": row.norm, "method": row.method,
            "origin": net.origin, "file": net.file.name, "high": high, "T_Lin": steps, "T_PEC": mean,
            "printed": None if math.isnan(printed) else printed, "T_PEC_all_images": everyone, "mean_radius": radius,
            "images": len(y), "correct": int(correct.sum()), "seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2),
        }  # fmt: skip
        table.add(label, ours)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--table", nargs="+", choices=TABLES, help="which (default: all; with --rows 3.6 to 3.9)")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="of 3.6 to 3.9, rows with a word in their name, such as kw or cnn",
    )
    parser.add_argument(
        "--published", type=Path, help="folder of the authors' checkpoints (default: DATA/polyenvelope)"
    )
    parser.add_argument("--trained", type=Path, help="folder of networks trained by benchmarks.certified_training")
    parser.add_argument("--images", type=int, help="test images (default: all; 50 in tables 3.2 and 3.3)")
    parser.add_argument("--exact", action="store_true", help="fill CRE MIP by complete verification")
    parser.add_argument("--timeout", type=float, default=10.0, help="seconds an image of that (default: 10)")
    parser.add_argument(
        "--networks", type=Path, help="of 3.2 and 3.3: folder that keeps trained networks, or has them already"
    )
    parser.add_argument("--units", type=int, nargs="+", help="of 3.2 and 3.3: widths of the networks (default: all)")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")  # fmt: skip


def main(args: argparse.Namespace) -> int:
    if args.data is None:
        raise ValueError("data: got no folder, expected --data or FASTROBUST_DATA")
    if args.images is not None and args.images < 1:
        raise ValueError(f"images: got {args.images}, expected at least 1")
    if not args.timeout > 0:
        raise ValueError(f"timeout: got {args.timeout:g}, expected more than 0 seconds")
    for name in ("trained", "published"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            raise ValueError(f"{name}: got {folder}, expected a folder")
    args.data = Path(args.data)
    args.table = args.table or TABLES[0 if args.rows == [""] else 2 :]
    table = TableFile(args.out, "Liu 2022, tables of chapter 3: ours beside the printed figures")
    if {"3.2", "3.3"} & set(args.table):
        from . import nonuniform_tables

        nonuniform_tables.run(args, table)
    if set(args.table) <= {"3.2", "3.3"}:
        return 0
    found = list(networks(args.published or args.data / "polyenvelope", args.trained, args.rows))
    if not any(word in f"{r.name} {' '.join(r.files())}" for r in thesis.PRINTED for word in args.rows):
        names = ", ".join(sorted({r.method for r in thesis.PRINTED}))
        raise ValueError(f"rows: got {args.rows}, expected words of rows: fc1, cnn, mnist, cifar10, Linf, L2, {names}")
    if shots := [net for net in found if net.row.table in args.table]:
        one_shot(args, shots, table)
    if "3.9" in args.table and (nets := [net for net in found if net.row.activation == "relu"]):
        searches(args, nets, table)
    return 0


if __name__ == "__main__":
    chosen = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(chosen)
    raise SystemExit(main(chosen.parse_args()))
