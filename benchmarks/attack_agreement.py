"""Whole standard evaluations beside the public AutoAttack over several seeds: robust accuracy and verdicts. Not a
timing suite.

    python -m benchmarks.attack_agreement --data FOLDER [--points N] [--seeds N] [--minutes M] [--out FILE.json]

Plain and PGD-trained CNNs of MNIST and CIFAR-10's subset (those of the suite "attacks"), three norms. Attacks draw
random numbers, so that a run of either breaks an example more or less by luck: what two runs of the same one with
other seeds differ in is counted, too. Rows are written as they are found, and a
run goes on where the file ends.
"""

from __future__ import annotations

import argparse
import math
import os
import time
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import fastrobust as fr

from .agreement_table import means
from .attacks import BARS, RADII_OF, Problem, trained_problem
from .case import Context, once
from .peers import auto_attack
from .table_file import TableFile

ABOUT = (
    "robust accuracy in percent under the standard version, ours and the public AutoAttack's, of networks trained here"
)
SHORT: dict[str, Any] = {"steps": 3, "queries": 5}  # of --short, which says nothing about the attacks


def verdicts(problem: Problem, norm: float, eps: float, seed: int, short: bool) -> tuple[Tensor, Tensor]:
    """(N,) bool each: who holds out against our standard version, and against the public one."""
    model, x, y = problem
    version: Any = "standard"
    if short:
        few = {"steps": SHORT["steps"]}
        version = [("apgd-ce", few), ("apgd-t", few), ("fab-t", few), ("square", {"queries": SHORT["queries"]})]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adv = fr.attacks.autoattack(model, x, y, eps=eps, norm=norm, version=version, batch_size=len(x), seed=seed)
        lengths = SHORT if short else {"steps": None, "queries": None}
        public = auto_attack.standard(model, x, y, norm=norm, eps=eps, seed=seed, **lengths)()["adv"]
    with torch.no_grad():
        ours, theirs = (model(found).argmax(1) == y for found in (adv, public))
    return ours, theirs


def row(problem: Problem, norm: float, eps: float, seed: int, short: bool) -> dict[str, Any]:
    ours, theirs = verdicts(problem, norm, eps, seed, short)
    percent = lambda flags: 100 * int(flags.sum()) / len(flags)
    model, x, y = problem
    with torch.no_grad():
        clean = percent(model(x).argmax(1) == y)
    return {
        "points": len(y), "seed": seed, "eps": eps, "clean": clean, "ours": percent(ours), "public": percent(theirs),
        "alike": int((ours == theirs).sum()), "only ours breaks": int((~ours & theirs).sum()),
        "only the public one breaks": int((ours & ~theirs).sum()),
        "held": {"ours": ours.nonzero()[:, 0].tolist(), "public": theirs.nonzero()[:, 0].tolist()},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attack_agreement", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--data", default=os.environ.get("FASTROBUST_DATA"), help="folder of the data sets")
    parser.add_argument("--datasets", nargs="+", choices=tuple(RADII_OF), default=list(RADII_OF))
    parser.add_argument("--models", nargs="+", choices=tuple(BARS), default=list(BARS))
    parser.add_argument("--norms", nargs="+", choices=tuple(auto_attack.NAMES.values()), default=None)
    parser.add_argument("--points", type=int, default=100, help="test images (default: 100)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each (default: 3)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no further row after so many")
    parser.add_argument("--short", action="store_true", help="3 steps, 5 queries, random networks: does it run")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.json", help="keep the rows in this file")
    args = parser.parse_args(argv)
    for name in ("points", "seeds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: got {getattr(args, name)}, expected at least 1")
    table, started = TableFile(args.out, ABOUT), time.monotonic()
    context = Context(level="smoke" if args.short else "full", data=args.data)
    norms = {norm: name for norm, name in auto_attack.NAMES.items() if name in (args.norms or (name,))}
    rows = list(table.content["rows"])
    known = {r["key"] for r in rows}
    problems = {
        (data, kind): once(partial(trained_problem, context, data, kind == "PGD-trained", args.points))
        for data, kind in product(args.datasets, args.models)
    }
    plan = list(product(range(args.seeds), norms, problems))
    for seed, norm, (data, kind) in tqdm(plan, desc="agreement", unit="row", disable=None):
        name = f"{data} {kind} {norms[norm]}, {args.points} points"
        key = f"{name}, seed {seed}"
        if key in known:
            continue
        if time.monotonic() - started > 60 * args.minutes:
            print(f"stopped after {args.minutes:g} minutes; the same command goes on")
            break
        found = {"problem": name, **row(problems[data, kind](), norm, RADII_OF[data][norm], seed, args.short)}
        table.add(key, found)
        rows.append({"key": key, **found})
    print(f"{'mean over seeds':<40}{'seeds':>7}{'clean':>8}{'ours':>8}{'public':>8}{'apart':>8}{'alike':>8}")
    for name, m in means(rows).items():
        print(
            f"{name:<40}{m['seeds']:7d}{m['clean']:8.1f}{m['ours']:8.2f}{m['public']:8.2f}"
            f"{m['apart']:8.2f}{m['points'] - m['verdicts apart']:8d}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
