"""``fastrobust analyse NAME``: a study of the papers at a size that runs in minutes; arrays, numbers and a picture."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import data
from . import _common as common
from ._common import BadArguments

_SMALL = 100  # numbers: an array of up to so many is written out in the JSON file


def topics() -> dict[str, Any]:
    """By name: function(images, labels, seed) -> (arrays, draw(path))."""
    found: dict[str, Any] = {}
    for module in ("", "_dynamic", "_schedules", "_training", "_overfitting", "_weights", "_small"):
        found |= importlib.import_module(f"fastrobust.analysis._topics{module}").TOPICS
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "DIR gets NAME.npz (all arrays), NAME.json (settings and small arrays) and, with matplotlib, NAME.png."
    )
    add = parser.add_argument
    add("name", metavar="NAME", nargs="?", help="see --list")
    add("--list", action="store_true", help="the studies, and nothing else")
    add("--data", default="digits", metavar="DATA", help="digits, mnist, cifar10, or an npz file (default: digits)")
    add("--data-dir", type=Path, metavar="DIR", help=f"folder of the archives (default: ${data.ENVIRONMENT})")
    add("--limit", type=common.count, metavar="N", help="N training images only (default: 2000)")
    add("--seed", type=common.natural, default=0, help="of weights, order and attacks (default: 0)")
    add("--out", type=Path, metavar="DIR", help="folder of the results; made where it is not there (default: .)")


def main(args: argparse.Namespace) -> int:
    known = topics()
    if args.list:
        for name, topic in known.items():
            print(f"{name:14s}{' '.join((topic.__doc__ or '').split())}")
        return 0
    if args.name is None or args.name.lower() not in known:
        raise BadArguments(f"argument NAME: got {args.name}, expected one of {', '.join(known)}")
    name, out = args.name.lower(), args.out or Path()
    if out.exists() and not out.is_dir():
        raise BadArguments(f"argument --out: {out} is a file, expected a folder")
    images = data.load(args.data, "train", folder=args.data_dir, limit=args.limit or 2000)
    if images.images.dim() != 4:
        raise BadArguments(
            f"argument --data: got images of shape {tuple(images.images.shape[1:])}, expected (channels, height, width)"
        )
    with torch.random.fork_rng(), common.plain_warnings():
        torch.manual_seed(args.seed)
        arrays, draw = known[name](images.images, images.labels, args.seed)
    arrays = {key: np.asarray(value) for key, value in arrays.items()}
    out.mkdir(parents=True, exist_ok=True)
    np.savez(out / f"{name}.npz", **arrays)
    small = {key: value.tolist() for key, value in arrays.items() if value.size <= _SMALL}
    settings = {"name": name, "data": images.name, "images": len(images.labels), "seed": args.seed}
    (out / f"{name}.json").write_text(json.dumps({**settings, "arrays": small}, indent=1) + "\n")
    files = ["npz", "json"]
    if importlib.util.find_spec("matplotlib") is not None:
        draw(out / f"{name}.png")
        files.append("png")
    print(f"{name:14s}{images.name}, {len(images.labels)} images, seed {args.seed}")
    for key, value in small.items():
        print(f"{key:24s}{np.array2string(np.asarray(value), precision=4, separator=', ', prefix=' ' * 24)}")
    print(f"{'written':24s}{', '.join(str(out / f'{name}.{ending}') for ending in files)}")
    return 0
