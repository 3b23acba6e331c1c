"""Column CRE MIP of table 3.6 of Liu (PhD thesis, EPFL, 2022) by complete verification of the published checkpoints,
with the printed figure (MIPVerify under a time limit) beside ours. Not a timing suite.

    python -m benchmarks.exact_tables --data FOLDER [--rows WORD ...] [--images N] [--timeout S] [--budget S] [--out FILE.json]

attacked: falsified by the clean prediction or by PGD. exact: falsified at all, each with a counterexample that the
model confirms.
CRE: not certified by CROWN's and interval bounds. attacked <= exact <= exact + undecided <= CRE. An image has
``--timeout`` seconds of branch and bound; what is left of a row's ``--budget`` goes to the undecided ones once more.
The checkpoints are anywhere in FOLDER; CIFAR-10 rows run on the test images of FOLDER/cifar10_subset.npz.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastrobust as fr
from fastrobust.certify import Verification

from . import thesis_tables as thesis
from .certificate_tables import networks
from .image_files import images_of
from .table_file import TableFile

COLUMNS = ("CTE", "attacked", "exact", "undecided", "CRE")
_CHUNK = 500


_IMAGES = {("mnist", "fc1"): 10_000, ("mnist", "cnn"): 1000, ("cifar10", "cnn"): 200}


def decide(model: nn.Module, x: Tensor, y: Tensor, eps: float, timeout: float, budget: float) -> Verification:
    """``verify`` within ``budget`` seconds in all: images beyond it stay unknown, and time that is left goes to the
    undecided."""
    end = time.monotonic() + budget
    found: list[Verification] = []
    with tqdm(total=len(y), desc="decided", unit="image", leave=False) as bar:
        for part, labels in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
            left = end - time.monotonic()
            own = max(1e-3, min(timeout, left)) if left > 0 else 1e-3
            found.append(fr.certify.verify(model, part, labels, eps, timeout=own, progress=bar.update))
        whole = joined(found)
        open_ = [i for i, s in enumerate(whole.status) if s == "unknown"]
        for n, i in enumerate(open_):
            left = end - time.monotonic()
            own = left / (len(open_) - n)
            if own <= timeout:
                continue
            one = fr.certify.verify(model, x[i : i + 1], y[i : i + 1], eps, timeout=own, progress=bar.update)
            whole.status[i], whole.stage[i] = one.status[0], one.stage[0]
            whole.lower[i] = max(float(whole.lower[i]), float(one.lower[0]))
            whole.counterexamples[i] = one.counterexamples[0]
            whole.subproblems[i] += one.subproblems[0]
            whole.seconds[i] += one.seconds[0]
    return whole


def joined(parts: list[Verification]) -> Verification:
    """The verdicts of several calls behind one another."""
    cat = lambda name: torch.cat([getattr(v, name) for v in parts])  # noqa: E731
    status, stage = ([s for v in parts for s in getattr(v, name)] for name in ("status", "stage"))
    return Verification(
        status, stage, cat("counterexamples"), cat("lower"), cat("subproblems"), cat("seconds"), parts[0].note
    )


def figures(found: Verification) -> dict[str, float]:
    """The columns, in percent."""
    n = len(found.status)
    pairs = list(zip(found.status, found.stage, strict=True))
    clean = sum(stage == "clean" for _, stage in pairs)
    attacked = clean + sum(stage == "attack" for _, stage in pairs)
    bounded = pairs.count(("verified", "bounds"))
    counts = (clean, attacked, found.count("falsified"), found.count("unknown"), n - bounded)
    return {name: 100 * k / n for name, k in zip(COLUMNS, counts, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("FASTROBUST_DATA"), help="folder with mnist.npz")
    parser.add_argument("--rows", nargs="+", default=[""], help="words of the checkpoints' names (default: all)")
    parser.add_argument("--images", type=int, help="test images (default: 10 000 of FC1, 1000 and 200 of the CNNs)")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds an image (default: 20)")
    parser.add_argument("--budget", type=float, default=1200.0, help="seconds a row (default: 1200)")
    parser.add_argument("--out", type=Path, help="JSON file to write, or to update")
    args = parser.parse_args()
    if args.data is None or not (Path(args.data) / "mnist.npz").is_file():
        parser.error("--data: expected the folder with mnist.npz (or set FASTROBUST_DATA)")
    table = TableFile(args.out, "Liu 2022, table 3.6, CRE MIP by complete verification of the published checkpoints")
    heads = (*COLUMNS, "MIP there", "images", "s")
    print(f"{'table 3.6':<34}" + "".join(f"{h:>10}" for h in heads))
    for net in networks(Path(args.data), None, args.rows):
        row = net.row
        if row.table != "3.6" or row.norm != "Linf":
            continue
        x, y = images_of(Path(args.data), row.data, count=args.images or _IMAGES[row.data, row.network])
        model, printed = net.model(x.shape[1:]), dict(zip(thesis.COLUMNS, row.figures, strict=True))
        start, cpu = time.perf_counter(), time.process_time()
        verdicts = decide(model, x, y, row.eps, args.timeout, args.budget)
        seconds, got = time.perf_counter() - start, figures(verdicts)
        values = "".join(f"{got[name]:10.2f}" for name in COLUMNS)
        print(f"{row.name:<34}{values}{printed['CRE MIP']:10.2f}{len(y):10d}{seconds:10.1f}", flush=True)
        entry = {
            "data": row.data, "network": row.network, "method": row.method, "eps": row.eps,
            "printed": {name: printed[name] for name in ("CTE", "PGD", "CRE MIP")},
            "images": len(y), "timeout": args.timeout, "budget": args.budget, "ours": got,
            "subproblems": int(verdicts.subproblems.sum()), "most_subproblems": int(verdicts.subproblems.max()),
            "seconds": round(seconds, 1), "cpu_seconds": round(time.process_time() - cpu, 1),
            "undecided": [i for i, s in enumerate(verdicts.status) if s == "unknown"],
        }  # fmt: skip
        table.add(row.name, entry)


if __name__ == "__main__":
    main()
