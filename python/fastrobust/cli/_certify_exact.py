"""``fastrobust certify --exact``: the verdicts of ``fr.certify.verify`` as columns and as a summary."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..certify.exact import MILP, verify
from . import _arguments as shared
from . import _common as common
from ._common import BadArguments

Columns = dict[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("complete verification").add_argument
    add("--exact", action="store_true", help="decide each image: attacks, bounds, then branch and bound (with --eps)")
    add("--timeout", type=common.radius, default=60.0, help="seconds of branch and bound an image (default: 60)")
    add("--milp", type=str.lower, default="auto", choices=MILP, help="subproblems by HiGHS (default: auto)")


def check(args: argparse.Namespace) -> None:
    """What goes with --exact, and what does not."""
    if not args.exact:
        return
    if args.eps is None:
        raise BadArguments("argument --exact: needs --eps, the radius to decide")
    if args.timeout <= 0:
        raise BadArguments(f"argument --timeout: got {args.timeout:g}, expected a value > 0")
    if args.exact_input or args.refine != "unstable":
        raise BadArguments("argument --exact: takes neither --exact-input nor --refine")


def batch(
    model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, progress: Callable[[int], None]
) -> dict[str, Any]:
    """Columns of one batch: status, the stage that settled it, the lower bound, subproblems and seconds."""
    found = verify(
        model, x, y, args.eps, norm=args.norm, clip=shared.clip_of(args), timeout=args.timeout, method=args.method,
        rounding=args.rounding, milp=args.milp, progress=progress,
    )  # fmt: skip
    return {
        "status": np.array(found.status),
        "stage": np.array(found.stage),
        "lower": found.lower.cpu().numpy(),
        "subproblems": found.subproblems.cpu().numpy(),
        "seconds": np.round(found.seconds.cpu().numpy(), 3),
        "distance": (found.counterexamples.double() - x.double()).flatten(1).norm(args.norm, 1).cpu().numpy(),
        "note": np.full(len(y), found.note),
    }


def errors(columns: Columns) -> dict[str, float]:
    """Percentages: attacked <= exact <= exact + undecided <= CRE."""
    status, stage = columns["status"], columns["stage"]
    falsified, verified = status == "falsified", status == "verified"
    easy = np.isin(stage, ("clean", "attack"))
    return {
        "attacked": 100 * float((falsified & easy).mean()),
        "exact": 100 * float(falsified.mean()),
        "undecided": 100 * float((~falsified & ~verified).mean()),
        "certified": 100 * float(1 - (verified & (stage == "bounds")).mean()),
    }


def summarise(columns: Columns, args: argparse.Namespace) -> list[tuple[str, str]]:
    """The rows of the summary."""
    wrong = columns["prediction"] != columns["label"]
    found = errors(columns)
    rows = [
        ("clean test error (CTE)", f"{100 * wrong.mean():.2f} %"),
        ("attacked error (PGD)", f"{found['attacked']:.2f} %"),
        ("exact error (CRE MIP)", f"{found['exact']:.2f} %"),
        ("undecided", f"{found['undecided']:.2f} %"),
        (f"certified robust error, {args.method} and interval bounds", f"{found['certified']:.2f} %"),
        ("subproblems", f"{int(columns['subproblems'].sum())}"),
    ]
    notes = sorted({str(n) for n in columns["note"] if n})
    return rows + [("note", n) for n in notes]
