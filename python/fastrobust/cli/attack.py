"""``fastrobust attack``: attack a saved model, or the built-in digits model, and report what is left of its
accuracy."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .. import build_info, data
from ..attacks._objective import LOSSES
from . import _arguments as shared
from . import _common as common
from . import _picture as picture
from . import _report as report
from . import _suite_page as page
from . import _suite_run as suite
from ._attack_run import ATTACKS, attack_all
from ._common import BadArguments
from ._workers import Workers, workers

# radii in common use, in units of images in [0, 1]
DEFAULT_EPS = {
    "digits": {"Linf": 0.1, "L2": 0.5, "L1": 2.0},
    "mnist": {"Linf": 0.1, "L2": 1.5, "L1": 10.0},
    "cifar10": {"Linf": 8 / 255, "L2": 0.5, "L1": 12.0},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shared.add_model(parser, "of the random starts and the built-in model")
    shared.add_images(parser)
    add = parser.add_argument_group("the attack").add_argument
    add("--attack", type=str.lower, choices=[*ATTACKS, "autoattack"], default="pgd", help="default: pgd")
    add("--norm", type=_norm, default="Linf", help="Linf, L2 or L1 (default: Linf)")
    add("--eps", type=common.radius, help="radius, such as 0.1 or 8/255 (default: a usual one for the data set)")
    add("--steps", type=common.natural, metavar="N", help="default: 10 (fgsm takes one)")
    add("--step-size", type=common.radius, metavar="SIZE", help="default: 2.5 eps / steps; ifgsm: eps / steps")
    add("--restarts", type=common.count, default=1, metavar="N", help="default: 1")
    add("--loss", type=str.lower, choices=LOSSES, default="ce", help="default: ce")
    add("--targeted", type=common.natural, metavar="CLASS", help="make the model say CLASS")
    add("--targets", type=_targets, metavar="N|all", help="attack towards the N likeliest wrong classes, or all")
    add("--early-stop", action="store_true", help="an example leaves its batch once the model is fooled")
    add(
        "--keep", type=str.lower, choices=("last", "best"), default="last", help="the iterate kept (default: last)"
    )  # fmt: skip
    add("--eot-samples", type=common.count, default=1, metavar="N", help="average over N passes of a randomised model")
    add("--output", type=_output, metavar="KEY", help="what of a tuple's or dictionary's outputs is attacked")
    add = parser.add_argument_group(
        "--attack autoattack: several attacks, each on what the ones before left"
    ).add_argument
    add(
        "--version",
        type=suite.version,
        metavar="VERSION",
        help="standard, plus, rand, fast, or attacks with commas between them, such as apgd-ce,square (default: "
        "standard)",
    )
    add(
        "--certify-first",
        nargs="?",
        const=True,
        metavar="METHOD",
        help="images that bounds prove robust are not attacked (default: crown-ibp, and tighter bounds for what the "
        "first "
        "attack leaves)",
    )
    add(
        "--state",
        type=common.output,
        metavar="FILE",
        help="go on where an interrupted run of the same command stopped; one file for each batch, FILE.0, FILE.256, "
        "...",
    )
    add("--curve", type=common.output, metavar="PNG", help="draw the robust accuracy against seconds")
    add("--page", type=common.output, metavar="HTML", help="save a page with setting, table, curve and warnings")
    run = parser.add_argument_group("running and results")
    shared.add_running(run, 256)
    run.add_argument(
        "--out", type=common.output, metavar="NPZ", help="save images, labels, adversarial examples, predictions"
    )
    run.add_argument("--report", type=common.output, metavar="JSON", help="save the setting and the figures")
    run.add_argument(
        "--picture", type=common.output, metavar="PNG", help="draw originals, perturbations, adversarial examples"
    )


def main(args: argparse.Namespace) -> int:
    wrong = suite.misplaced(args)
    if wrong is not None:
        raise BadArguments(wrong)
    with common.plain_warnings():
        images = shared.begin(args, args.out, args.report, args.picture, args.curve, args.page)
        eps = _eps(args, images.name)
        if args.attack == "autoattack":
            with workers(args.device) as team:
                args.device = team.device
                return _evaluate(args, eps, images, team)
        with_picture = args.picture is not None and _can_draw(images.images)
        given = shared.model_of(args, images, graphs=True)
        images = _without_target(images, args.targeted)
        setting = _setting(args, eps, images, given)
        outcome = attack_all(args, given.model, images, setting)
        found = report.figures(outcome, setting)
        print(report.text(setting, found))
        for path in _write(args, outcome, setting, found, with_picture):
            print(f"{'written':<16} {path}")
        return _status(found)


def _status(found: dict[str, Any]) -> int:
    return 0 if found["perturbation"]["ball_holds"] and found["perturbation"]["box_holds"] else 1


def _evaluate(args: argparse.Namespace, eps: float, images: data.Images, team: Workers) -> int:
    """By several attacks; the first process says and writes what all of them found."""
    first = team.rank == 0
    with_picture = first and args.picture is not None and _can_draw(images.images)
    with_curve = first and (args.curve or args.page) is not None and _can_draw(None)
    given = shared.model_of(args, images, graphs=True)
    setting = _common_setting(args, eps, images, given) | {
        "suite": "own list" if isinstance(args.version, list) else args.version or "standard",
        "certify_first": args.certify_first, "processes": team.world, "target": None,
    }  # fmt: skip
    parts = suite.evaluate_all(args, given.model, images, setting, team)
    if not first:
        return 0
    outcome, whole = suite.outcome(images, parts)
    found = report.figures(outcome, setting) | {"evaluation": dataclasses.asdict(whole)}
    print(page.text(setting, found, whole))
    written = _write(args, outcome, setting, found, with_picture)
    title = f"{setting['suite']}, {setting['norm']}, eps {eps:.4g}: robust accuracy {100 * whole.robust_accuracy:.2f} %"
    if args.curve is not None and with_curve:
        picture.save(page.draw(whole, title), args.curve)
        written.append(args.curve)
    if args.page is not None:
        drawing = page.svg(page.draw(whole, title)) if with_curve else None
        args.page.write_text(page.page(setting, found, whole, drawing))
        written.append(args.page)
    for path in written:
        print(f"{'written':<16} {path}")
    return _status(found)


def _norm(text: str) -> str:
    try:
        return report.NORM_NAMES[shared.norm(text)]
    except (KeyError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected Linf, L2 or L1") from None


def _targets(text: str) -> int | str:
    return "all" if text.lower() == "all" else common.count(text)


def _output(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _eps(args: argparse.Namespace, name: str) -> float:
    if args.eps is not None:
        return float(args.eps)
    if name not in DEFAULT_EPS:
        raise BadArguments(f"argument --eps: is needed with data of your own ({args.data})")
    return DEFAULT_EPS[name][args.norm]


def _can_draw(images: Tensor | None) -> bool:
    """The picture is an extra: without it the attack still runs, and a line says why there is none."""
    if images is not None and not picture.drawable(images):
        print(
            f"fastrobust: no picture: images of shape {tuple(images.shape[1:])} are neither grey nor RGB",
            file=sys.stderr,
        )
        return False
    if importlib.util.find_spec("matplotlib") is None:
        print("fastrobust: no picture: it needs matplotlib: pip install matplotlib", file=sys.stderr)
        return False
    return True


def _without_target(images: data.Images, target: int | None) -> data.Images:
    """A targeted attack leaves out the images that are of the target class."""
    if target is None:
        return images
    rows = images.labels != target
    if not bool(rows.any()):
        raise BadArguments(f"argument --targeted: every image is of class {target} already")
    return data.Images(images.images[rows], images.labels[rows], images.name)


def _setting(args: argparse.Namespace, eps: float, images: data.Images, given: shared.Given) -> dict[str, Any]:
    if args.attack == "fgsm" and args.steps not in (None, 1):
        raise BadArguments(f"argument --steps: got {args.steps}, but fgsm takes one; use ifgsm or pgd")
    if args.targets is not None and args.targeted is not None:
        raise BadArguments("argument --targets: cannot be combined with --targeted")
    steps = 1 if args.attack == "fgsm" else 10 if args.steps is None else args.steps
    factor = 2.5 if args.attack == "pgd" else 1.0
    step_size = args.step_size if args.step_size is not None else factor * eps / max(steps, 1)
    # what AttackResult.loss holds: for several targets the margin of the true class
    loss = "margin" if args.targets is not None else args.loss
    return _common_setting(args, eps, images, given) | {
        "steps": steps, "step_size": step_size, "restarts": args.restarts, "loss": args.loss, "reported_loss": loss,
        "target": args.targeted, "targets": args.targets, "early_stop": args.early_stop, "keep": args.keep,
        "eot_samples": args.eot_samples,
    }  # fmt: skip


def _common_setting(args: argparse.Namespace, eps: float, images: data.Images, given: shared.Given) -> dict[str, Any]:
    info = build_info()
    return {
        "attack": args.attack,
        "norm": args.norm,
        "eps": eps,
        "output": args.output,
        "clip": shared.clip_of(args),
        "normalize": args.normalize,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "model": given.name,
        "built": given.built,
        "data": shared.data_text(images),
        "device": shared.device_text(args.device),
        "first": args.first,
        "version": info["version"],
        "torch": info["torch"],
    }


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
        title = (
            f"{setting['attack']}, {setting['norm']}, eps {setting['eps']:.4g}: accuracy {clean}, under attack {robust}"
        )
        images, adversarial = outcome.images[rows], outcome.adversarial[rows]
        labels, before, after = outcome.labels[rows], outcome.before[rows], outcome.after[rows]
        picture.save(picture.draw(images, adversarial, labels, before, after, title), args.picture)
        written.append(args.picture)
    return written


if __name__ == "__main__":  # torchrun --nproc-per-node N -m fastrobust.cli.attack ...
    from . import main as command_line

    raise SystemExit(command_line(["attack", *sys.argv[1:]]))
