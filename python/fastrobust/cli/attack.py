"""``fastrobust attack``: attack a saved model, or the built-in digits model, and report what is left of its accuracy."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import build_info, data, models
from ..attacks._objective import LOSSES
from ..ops._checks import parse_norm
from . import _common as common
from . import _picture as picture
from . import _report as report
from ._attack_run import ATTACKS, attack_all
from ._common import BadArguments
from ._saved_model import load_model

# radii in common use, in units of images in [0, 1]
DEFAULT_EPS = {
    "digits": {"Linf": 0.1, "L2": 0.5, "L1": 2.0},
    "mnist": {"Linf": 0.1, "L2": 1.5, "L1": 10.0},
    "cifar10": {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0},
}
_CLIP = (0.0, 1.0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is attacked")
    what.add_argument(
        "--model", type=Path, metavar="FILE",
        help="a TorchScript file, an exported program (.pt2), or with --trust a pickled nn.Module; it maps images in [0, 1] "
        "to logits (default: a small CNN trained on the digits at first use)",
    )  # fmt: skip
    what.add_argument(
        "--trust", action="store_true", help="load a pickled model, which runs any code its author put there"
    )
    what.add_argument(
        "--data", default="digits", metavar="DATA",
        help="digits, mnist, cifar10 (test images), or an npz file with images and labels (default: digits)",
    )  # fmt: skip
    what.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help=f"folder of mnist.npz and cifar10_subset.npz (default: ${data.ENVIRONMENT})",
    )
    what.add_argument("--limit", type=common.count, metavar="N", help="the first N images only")
    what.add_argument(
        "--normalize", type=_mean_std, metavar="MEAN/STD",
        help="applied before the model; per channel with commas: 0.49,0.48,0.45/0.25,0.24,0.26",
    )  # fmt: skip
    how = parser.add_argument_group("the attack")
    how.add_argument("--attack", choices=list(ATTACKS), default="pgd", help="default: pgd")
    how.add_argument("--norm", type=_norm, default="Linf", help="Linf, L2 or L1 (default: Linf)")
    how.add_argument(
        "--eps", type=common.radius, help="radius, such as 0.1 or 8/255 (default: a usual one for the data set)"
    )
    how.add_argument("--steps", type=common.natural, metavar="N", help="default: 10 (fgsm takes one)")
    how.add_argument(
        "--step-size", type=common.radius, metavar="SIZE", help="default: 2.5 eps / steps; ifgsm: eps / steps"
    )
    how.add_argument("--restarts", type=common.count, default=1, metavar="N", help="default: 1")
    how.add_argument("--loss", choices=LOSSES, default="ce", help="default: ce")
    how.add_argument("--targeted", type=common.natural, metavar="CLASS", help="make the model say CLASS")
    how.add_argument(
        "--targets", type=_targets, metavar="N|all", help="attack towards the N likeliest wrong classes, or all"
    )
    how.add_argument("--early-stop", action="store_true", help="an example leaves its batch once the model is fooled")
    how.add_argument("--keep", choices=("last", "best"), default="last", help="the iterate kept (default: last)")
    how.add_argument(
        "--seed", type=common.natural, default=0, help="of the random starts and the built-in model (default: 0)"
    )
    run = parser.add_argument_group("running and results")
    run.add_argument("--batch-size", type=common.count, default=256, metavar="N", help="default: 256")
    run.add_argument(
        "--device", type=common.device, default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)"
    )
    run.add_argument("--no-cache", action="store_true", help="train the built-in model anew and do not keep it")
    run.add_argument(
        "--out", type=common.output, metavar="NPZ", help="save images, labels, adversarial examples, predictions"
    )
    run.add_argument("--report", type=common.output, metavar="JSON", help="save the setting and the figures")
    run.add_argument(
        "--picture", type=common.output, metavar="PNG", help="draw originals, perturbations, adversarial examples"
    )
    run.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="a bar over batches (default: on a terminal)",
    )


def main(args: argparse.Namespace) -> int:
    images = data.load(args.data, folder=args.data_dir, limit=args.limit)
    eps = _eps(args)
    with_picture = args.picture is not None and _can_draw(images.images)
    model, described = _model(args, images.name)
    images = _without_target(images, args.targeted)
    setting = _setting(args, eps, images, described)
    outcome = attack_all(args, model, images, setting)
    found = report.figures(outcome, setting)
    print(report.text(setting, found))
    for path in _write(args, outcome, setting, found, with_picture):
        print(f"{'written':<16} {path}")
    return 0 if found["perturbation"]["ball_holds"] and found["perturbation"]["box_holds"] else 1


def _mean_std(text: str) -> tuple[list[float], list[float]]:
    try:
        mean, std = ([float(v) for v in part.split(",")] for part in text.split("/"))
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected MEAN/STD with std > 0 and as many values on both sides, such as 0.1307/0.3081"
        ) from None
    return mean, std


def _norm(text: str) -> str:
    try:
        return report.NORM_NAMES[parse_norm(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected Linf, L2 or L1") from None


def _targets(text: str) -> int | str:
    return text if text == "all" else common.count(text)


def _eps(args: argparse.Namespace) -> float:
    if args.eps is not None:
        return float(args.eps)
    if args.data not in DEFAULT_EPS:
        raise BadArguments(f"fastrobust attack: argument --eps: is needed with data of your own ({args.data})")
    return DEFAULT_EPS[args.data][args.norm]


def _can_draw(images: Tensor) -> bool:
    """The picture is an extra: without it the attack still runs, and a line says why there is none."""
    if not picture.drawable(images):
        print(
            f"fastrobust: no picture: images of shape {tuple(images.shape[1:])} are neither grey nor RGB",
            file=sys.stderr,
        )
        return False
    if importlib.util.find_spec("matplotlib") is None:
        print("fastrobust: no picture: it needs matplotlib: pip install matplotlib", file=sys.stderr)
        return False
    return True


def _model(args: argparse.Namespace, name: str) -> tuple[nn.Module, str]:
    if args.model is not None:
        model, kind = load_model(args.model, args.device, args.trust)
        return model, f"{args.model} ({kind})"
    if name != "digits":
        raise BadArguments(
            f"fastrobust attack: argument --model: is needed with --data {args.data}; the built-in one reads digits"
        )
    return models.train_digits(args.seed, cache=not args.no_cache).to(
        args.device
    ), f"built-in digits CNN (seed {args.seed})"


def _without_target(images: data.Images, target: int | None) -> data.Images:
    """A targeted attack leaves out the images that are of the target class."""
    if target is None:
        return images
    rows = images.labels != target
    if not bool(rows.any()):
        raise BadArguments(f"fastrobust attack: argument --targeted: every image is of class {target} already")
    return data.Images(images.images[rows], images.labels[rows], images.name)


def _setting(args: argparse.Namespace, eps: float, images: data.Images, described: str) -> dict[str, Any]:
    if args.attack == "fgsm" and args.steps not in (None, 1):
        raise BadArguments(
            f"fastrobust attack: argument --steps: got {args.steps}, but fgsm takes one; use ifgsm or pgd"
        )
    if args.targets is not None and args.targeted is not None:
        raise BadArguments("fastrobust attack: argument --targets: cannot be combined with --targeted")
    steps = 1 if args.attack == "fgsm" else 10 if args.steps is None else args.steps
    factor = 2.5 if args.attack == "pgd" else 1.0
    step_size = args.step_size if args.step_size is not None else factor * eps / max(steps, 1)
    info = build_info()
    used = f"{info['cpu_variant']} kernels, {info['threads']} threads"
    if args.device.type == "cuda":
        used = torch.cuda.get_device_name(args.device)
    shape = "x".join(map(str, images.images.shape[1:]))
    # what AttackResult.loss holds: for several targets the margin of the true class
    loss = "margin" if args.targets is not None else args.loss
    return {
        "attack": args.attack, "norm": args.norm, "eps": eps, "steps": steps, "step_size": step_size,
        "restarts": args.restarts, "loss": args.loss, "reported_loss": loss, "target": args.targeted, "targets": args.targets,
        "early_stop": args.early_stop, "keep": args.keep, "clip": _CLIP, "normalize": args.normalize, "seed": args.seed,
        "batch_size": args.batch_size, "model": described, "data": f"{images.name}, {len(images.labels)} images of {shape}",
        "device": f"{args.device} ({used})", "version": info["version"], "torch": info["torch"],
    }  # fmt: skip


def _write(
    args: argparse.Namespace,
    outcome: report.Outcome,
    setting: dict[str, Any],
    found: dict[str, Any],
    with_picture: bool,
) -> list[Path]:
    written = []
    if args.out is not None:
        with open(args.out, "wb") as file:  # savez would add a suffix to a bare name
            arrays: dict[str, Any] = report.arrays(outcome, setting)
            np.savez_compressed(file, **arrays)
        written.append(args.out)
    if args.report is not None:
        args.report.write_text(report.to_json(setting, found))
        written.append(args.report)
    if with_picture:
        rows = picture.pick(outcome.labels, outcome.before, outcome.after)
        clean, robust = (f"{100 * found[key]:.1f} %" for key in ("clean_accuracy", "robust_accuracy"))
        title = f"{setting['attack']}, {setting['norm']}, eps {setting['eps']:.4g}: accuracy {clean} falls to {robust}"
        images, adversarial = outcome.images[rows], outcome.adversarial[rows]
        labels, before, after = outcome.labels[rows], outcome.before[rows], outcome.after[rows]
        picture.save(picture.draw(images, adversarial, labels, before, after, title), args.picture)
        written.append(args.picture)
    return written
