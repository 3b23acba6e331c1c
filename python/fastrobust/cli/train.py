"""``fastrobust train``: train a robust model by any method, and say how robust it is."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from .. import data, training
from ..nn import zoo
from ..training import distributed
from ..training.recipes import RECIPES, recipe
from ..training.registry import options_of
from . import _arguments as shared
from . import _common as common
from . import _train_run as runs
from ._common import BadArguments
from .attack import DEFAULT_EPS

DEFAULT_MODEL = {"digits": "digits-cnn", "mnist": "mnist-cnn", "cifar10": "preact-resnet-18"}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "DIR gets log.json (settings, a record an epoch, results), curves.png, model.pt (the weights at the end), "
        "best.pt (the "
        "weights of the epoch that was most robust on the validation images) and the checkpoints last.pt and "
        "previous.pt. "
        "Settings that are not given are those of the method's paper, for CIFAR-10: see --list."
    )
    add = parser.add_argument_group("the method").add_argument
    add("--method", type=str.lower, default="pgd", metavar="NAME", help="see --list (default: pgd)")
    add(
        "--list",
        action="store_true",
        help="the methods with their options and their papers' settings, and nothing else",
    )
    add("--eps", type=common.radius, help="radius, such as 0.1 or 8/255 (default: a usual one for the data set)")
    add("--norm", type=shared.norm, default=None, help="Linf, L2 or L1 (default: the method's, Linf)")
    add(
        "--set",
        action="append",
        default=[],
        type=_pair,
        metavar="KEY=VALUE",
        help="any option of the method; repeat it",
    )
    add = parser.add_argument_group("the model").add_argument
    add(
        "--model",
        metavar="NAME|MODULE:NAME",
        help=f"{', '.join(zoo.MODELS)}, wrn-DEPTH-WIDEN, or a callable that builds a "
        "module: package.module:callable or file.py:callable (default: by data set)",
    )
    add("--width", type=common.count, metavar="N", help="of a model by name (default: the paper's)")
    add("--weights", type=Path, metavar="FILE", help="a state_dict to start from")
    add = parser.add_argument_group("the images").add_argument
    add(
        "--data",
        default="digits",
        metavar="DATA",
        help="digits, mnist, cifar10, or an npz file with images and labels (default: digits)",
    )
    add("--data-dir", type=Path, metavar="DIR", help=f"folder of the archives (default: ${data.ENVIRONMENT})")
    add("--limit", type=common.count, metavar="N", help="train on N images only")
    add(
        "--validation",
        type=common.count,
        metavar="N",
        help="images of the training set that choose the best epoch and are "
        "not trained on (default: a tenth, at most 1000)",
    )
    add("--test-limit", type=common.count, metavar="N", help="N test images only")
    add(
        "--augment",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="crops and mirror images (default: with "
        "cifar10; methods that keep something for each image augment by themselves)",
    )
    add = parser.add_argument_group("the optimiser (defaults: the method's paper's)").add_argument
    add("--epochs", type=common.count, metavar="N")
    add("--batch-size", type=common.count, metavar="N")
    add("--optimizer", type=str.lower, choices=("sgd", "adam"))
    add("--lr", type=common.radius, metavar="RATE")
    add("--weight-decay", type=common.radius, metavar="W")
    add("--schedule", type=str.lower, choices=("steps", "triangle", "cosine", "constant"), help="of the rate")
    add("--average", type=str.lower, choices=("ema", "swa"), help="average the weights")
    add("--autocast", type=str.lower, choices=tuple(_DTYPES), help="passes of the model in mixed precision")
    run = parser.add_argument_group("running and results")
    run.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; made where it is not there")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in DIR")
    run.add_argument("--every", type=common.count, default=1, metavar="N", help="validate every N epochs (default: 1)")
    run.add_argument("--steps", type=common.count, default=20, metavar="N", help="of PGD at the end (default: 20)")
    run.add_argument(
        "--final", type=str.lower, choices=("fast", "standard", "pgd"), default="fast",
        help="AutoAttack at the end, or PGD alone (default: fast)",
    )  # fmt: skip
    run.add_argument("--seed", type=common.natural, default=0, help="of weights, order and attacks (default: 0)")
    run.add_argument(
        "--device", type=common.device, default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)"
    )
    run.add_argument("--threads", type=common.count, metavar="N", help="CPU threads (default: torch's)")
    run.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, default=None, help="a bar (default: on a terminal)"
    )


def main(args: argparse.Namespace) -> int:
    if args.list:
        print(listing())
        return 0
    if args.out is None:
        raise BadArguments("argument --out: is needed: the folder of the results")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with common.plain_warnings():
        setup = _setup(args)
        with distributed.join(args.device) as device:
            first = distributed.rank_and_world()[0] == 0
            history = runs.fit(setup, device)
        if first:
            print(runs.finish(setup, history, device))
    return 0


def _setup(args: argparse.Namespace) -> runs.Setup:
    """Everything that can be refused, before anything is written."""
    method = _method(args)
    how = recipe(
        method.name, epochs=args.epochs, batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay,
        optimizer=args.optimizer, schedule=args.schedule,
    )  # fmt: skip
    if how.resets:  # the rate's are the radius'
        how = dataclasses.replace(how, resets=tuple(getattr(method, "resets", how.resets)))
    if args.out.exists() and not args.out.is_dir():
        raise BadArguments(f"argument --out: {args.out} is a file, expected a folder")
    if not args.resume and any((args.out / name).exists() for name in ("last.pt", "previous.pt")):
        raise BadArguments(
            f"argument --out: {args.out} holds a training already; go on with --resume, or give another folder"
        )
    sets = runs.split(args)
    shape, classes = tuple(sets.train.images.shape[1:]), int(max(sets.train.labels.max(), sets.test.labels.max())) + 1
    torch.manual_seed(args.seed)
    name = args.model or DEFAULT_MODEL.get(sets.train.name)
    if name is None:
        raise BadArguments(f"argument --model: is needed with data of your own ({args.data})")
    model = runs.model_of(name, classes, shape, args)
    augment = sets.train.name == "cifar10" if args.augment is None else args.augment
    if augment and len(shape) != 3:
        raise BadArguments(f"argument --augment: got images of shape {shape}, expected (channels, height, width)")
    grows = "growth" in method.settings()
    own = None if grows else getattr(method, "eps", None)
    number = isinstance(own, float | int) and args.eps is None
    eps = float(own) if number else _eps(args)  # type: ignore[arg-type]
    return runs.Setup(
        method=method, how=how, model=model, name=name, sets=sets, eps=eps, norm=args.norm or "Linf", out=args.out,
        augment=augment and not method.needs_index, average=args.average, resume=args.resume, every=args.every,
        steps=args.steps, final=args.final, seed=args.seed, device=args.device,
        autocast=None if args.autocast is None else _DTYPES[args.autocast],
        progress=sys.stderr.isatty() if args.progress is None else args.progress,
        plots=importlib.util.find_spec("matplotlib") is not None,
    )  # fmt: skip


def _method(args: argparse.Namespace) -> training.Method:
    given: dict[str, Any] = dict(args.set)
    if args.method not in training.methods():
        training.make(args.method)  # says which there are
    known = options_of(training.methods()[args.method])
    takes = lambda key: known is None or key in known
    if "eps" in given and args.eps is not None:
        raise BadArguments("argument --set: eps is given twice, by --eps as well")
    # where the radius grows from a start of its own, a usual radius is not that start
    usual = known is not None and "growth" not in known
    if takes("eps") and "eps" not in given and (usual or args.eps is not None):
        given["eps"] = _eps(args)
    augment = args.data.lower() == "cifar10" if args.augment is None else args.augment
    if known is not None and not augment:  # methods that keep something for each image move it by themselves
        given = {
            **{key: 0 for key in ("shift",) if key in known},
            **{key: False for key in ("flip",) if key in known},
            **given,
        }
    if args.norm is not None and takes("norm"):
        given["norm"] = args.norm
    needed = [k for k, v in (known or {}).items() if v is inspect.Parameter.empty and k not in given]
    if needed:
        raise BadArguments(f"argument --set: {args.method} needs {', '.join(f'--set {k}=' for k in needed)}")
    return training.make(args.method, **given)


def _eps(args: argparse.Namespace) -> float:
    if args.eps is not None:
        return float(args.eps)
    norm = {2.0: "L2", 1.0: "L1"}.get(args.norm, "Linf")
    if args.data.lower() not in DEFAULT_EPS:
        raise BadArguments(f"argument --eps: is needed with data of your own ({args.data})")
    return DEFAULT_EPS[args.data.lower()][norm]


def _pair(text: str) -> tuple[str, Any]:
    """key=value; the value is a Python number, tuple, True, None ..., a fraction, or else a word."""
    key, sign, value = text.partition("=")
    if not sign or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected KEY=VALUE")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        pass
    try:
        return key, common.number(value)
    except argparse.ArgumentTypeError:
        return key, value


def listing() -> str:
    """Every method: what it is, its options, and how its paper trains."""
    rows = []
    for name, cls in training.methods().items():
        text = inspect.getdoc(cls) or ""
        first = " ".join(text.split("\n\n")[0].split())
        options = options_of(cls)
        if (
            options and inspect.Parameter.empty not in options.values()
        ):  # as they are once a constructor has set its own
            made = cls().settings()
            options = {k: made.get(k, v) for k, v in options.items()}
        shown = "any" if options is None else ", ".join(f"{k}={_default(v)}" for k, v in options.items()) or "none"
        source = "" if name in RECIPES else " (usual settings)"
        body = [textwrap.fill(first, 110), textwrap.fill(f"options: {shown}", 110, subsequent_indent="  "),
                f"trains: {recipe(name).text()}{source}"]  # fmt: skip
        rows.append(name + "\n" + textwrap.indent("\n".join(body), "    "))
    return "\n".join(rows)


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "(needed)"
    return f"{value:.5g}" if isinstance(value, float) else repr(value) if isinstance(value, str) else str(value)


if __name__ == "__main__":  # torchrun --nproc-per-node N -m fastrobust.cli.train ...
    from . import main as command_line

    raise SystemExit(command_line(["train", *sys.argv[1:]]))
