"""Attacks on what is verified: no point of the input set of a verified example may be predicted otherwise. Not a timing
suite.

    python -m benchmarks.attacked_verdicts --data FOLDER [--rows WORD ...] [--images 1000] [--points 100000]
        [--timeout S] [--out FILE.json]

Of each published network of tables 3.6 to 3.8: ``verify`` on the first images, then the same number of points in every
verified example's set: half are the ends of PGD on the margin (20 steps) from random starts, a quarter lie on the set's
border (corners of the box; random directions for l2), and a quarter are uniform in it. All are predicted by the model
in float32. fooled: points predicted otherwise (must be 0). least: the smallest margin met less the certified lower
bound of it (must not be negative beyond rounding). attacked: points in all.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastrobust as fr

from .certificate_tables import networks
from .image_files import images_of
from .table_file import TableFile

COLUMNS = ("verified", "by branch", "attacked", "fooled", "least")
_AT_ONCE = 2000
_STEPS = 20


class Counts(NamedTuple):
    attacked: int
    fooled: int
    least: float


def margins(model: nn.Module, points: Tensor, y: Tensor) -> Tensor:
    """z_y less the largest other output, (N,) in float64."""
    z = model(points).double()
    return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)


def drawn(x: Tensor, eps: float, norm: str, border: bool, generator: torch.Generator) -> Tensor:
    """A point in each example's set: of its border, or uniform."""
    noise = torch.empty_like(x)
    if norm == "Linf":
        noise.uniform_(-1, 1, generator=generator)
        step = eps * (noise.sign() if border else noise)
    else:
        noise.normal_(generator=generator)
        length = eps * noise.flatten(1).norm(dim=1).reciprocal()
        if not border:
            length *= torch.rand(len(x), generator=generator) ** (1 / x[0].numel())
        step = noise * length.view(-1, *[1] * (x.dim() - 1))
    return fr.ops.project(x + step, x, eps, norm, (0.0, 1.0))


@torch.no_grad()
def attacked(
    model: nn.Module, x: Tensor, y: Tensor, lower: Tensor, eps: float, norm: str, points: int, seed: int = 0
) -> Counts:
    """At least ``points`` points in the sets of examples with certified margins ``lower``."""
    each = -(-points // max(1, len(x)))
    ends, border = -(-each // 2), -(-each // 4)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {
        "eps": eps, "norm": norm, "clip": (0.0, 1.0), "loss": "margin", "steps": _STEPS, "random_start": True,
        "check": False,
    }  # fmt: skip
    count, fooled, least = 0, 0, torch.inf
    for k in range(each):
        for part in torch.arange(len(x)).split(_AT_ONCE):
            own, label = x[part], y[part]
            if k < ends:
                found = fr.attacks.pgd(model, own, label, seed=seed + k, first_example=part, **options)
            else:
                found = drawn(own, eps, norm, k < ends + border, generator)
            value = margins(model, found, label)
            count += len(part)
            fooled += int((value <= 0).sum())
            least = min(least, float((value - lower[part]).min()))
    return Counts(count, fooled, least)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--rows", nargs="+", default=["mnist"], help="words of the checkpoints' names")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--points", type=int, default=100_000, help="of each network")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds an image of verification")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args()
    if args.data is None or not (Path(args.data) / "mnist.npz").is_file():
        parser.error("--data: expected the folder with mnist.npz (or set FASTROBUST_DATA)")
    table = TableFile(args.out, "attacks on verified examples of the published networks")
    print(f"{'network':<38}" + "".join(f"{h:>11}" for h in (*COLUMNS, "s")), flush=True)
    for net in networks(Path(args.data), None, args.rows):
        row = net.row
        if row.table not in ("3.6", "3.7", "3.8"):
            continue
        x, y = images_of(Path(args.data), row.data, count=args.images)
        model, start = net.model(x.shape[1:]), time.perf_counter()
        found = fr.certify.verify(model, x, y, row.eps, norm=row.norm, timeout=args.timeout)
        proven = torch.tensor([s == "verified" for s in found.status])
        branch = sum(stage == "branch" and s == "verified" for s, stage in zip(found.status, found.stage, strict=True))
        counts = attacked(model, x[proven], y[proven], found.lower[proven], row.eps, row.norm, args.points)
        seconds = time.perf_counter() - start
        shown = (int(proven.sum()), branch, *counts[:2])
        name = f"{row.table} {row.name}"
        print(f"{name:<38}" + "".join(f"{v:11d}" for v in shown) + f"{counts.least:11.2e}{seconds:11.1f}", flush=True)
        table.add(
            name,
            dict(zip(COLUMNS, (*shown, counts.least), strict=True))
            | {"eps": row.eps, "norm": row.norm, "images": len(y), "timeout": args.timeout, "note": found.note},
        )


if __name__ == "__main__":
    main()
