"""The run of ``fastrobust attack --attack autoattack``: parts of the images, each evaluated by all attacks."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import ops
from ..attacks import EvaluationReport, autoattack
from ..attacks._versions import VERSIONS, planned
from ..data import Images
from . import _report as report
from ._arguments import check_classes, model_failures
from ._attack_run import logits_of
from ._workers import Workers

# what --version and its list decide, by the names of args; all are given in the default
_OF_ONE_ATTACK = {
    "steps": None,
    "step_size": None,
    "restarts": 1,
    "loss": "ce",
    "targeted": None,
    "targets": None,
    "early_stop": False,
    "keep": "last",
    "eot_samples": 1,
}
_OF_THE_SUITE = {"version": None, "certify_first": None, "state": None, "curve": None, "page": None}


def version(text: str) -> str | list[str]:
    """The name of a version, or names of attacks with commas between them."""
    name = text.lower()
    if name in VERSIONS:
        return name
    names = name.split(",")
    try:
        planned(names, 2.0)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected {', '.join(VERSIONS)}, or attacks with commas between them; {error}"
        ) from None
    return names


def misplaced(args: argparse.Namespace) -> str | None:
    """What is wrong with the options that were given for the other kind of attack."""
    suite = args.attack == "autoattack"
    for name, default in (_OF_ONE_ATTACK if suite else _OF_THE_SUITE).items():
        if getattr(args, name) != default:
            flag = "--" + name.replace("_", "-")
            return (
                f"argument {flag}: is not for autoattack, whose --version decides"
                if suite
                else f"argument {flag}: needs --attack autoattack"
            )
    return None


class Part(NamedTuple):
    """What one batch of images gave, on the CPU."""

    adversarial: Tensor
    before: Tensor
    after: Tensor
    loss: Tensor
    report: EvaluationReport


def evaluate_all(
    args: argparse.Namespace, model: nn.Module, images: Images, setting: dict[str, Any], team: Workers
) -> list[Part]:
    """Part by part, each evaluated by all attacks: what a part gives depends neither on the others nor on the process
    that does it."""
    options = {key: setting[key] for key in ("eps", "norm", "clip", "normalize", "output", "seed")}
    show = (sys.stderr.isatty() if args.progress is None else args.progress) and team.rank == 0
    mine: dict[int, Part] = {}
    starts = range(0, len(images.labels), args.batch_size)
    with tqdm(total=len(images.labels), desc="autoattack", unit="image", disable=not show, file=sys.stderr) as bar:
        for number, first in enumerate(starts):
            if not team.mine(number):
                continue
            rows = slice(first, first + args.batch_size)
            x, y = images.images[rows].to(team.device), images.labels[rows].to(team.device)
            at = args.first + first
            with model_failures(setting["model"], x):
                before = logits_of(model, x, setting)
                check_classes(before.shape[1], y)
                found = autoattack(
                    model, x, y, version=args.version or "standard", certify_first=args.certify_first or False,
                    batch_size=args.batch_size, first_example=at, state=args.state and f"{args.state}.{at}",
                    return_details=True, **options,
                )  # fmt: skip
                after = logits_of(model, found.adv, setting)
            margin = ops.margin_loss(after.float(), y).value
            mine[number] = Part(
                found.adv.cpu(), before.argmax(1).cpu(), after.argmax(1).cpu(), margin.cpu(), found.report
            )
            bar.update(len(y) * team.world if number + team.world < len(starts) else bar.total - bar.n)
            robust = EvaluationReport.of_parts([part.report for part in mine.values()]).robust_accuracy
            bar.set_postfix_str(f"robust {100 * robust:.1f} %")
    parts = team.gather(mine)
    return [parts[k] for k in range(len(starts))]


def outcome(images: Images, parts: list[Part]) -> tuple[report.Outcome, EvaluationReport]:
    whole = EvaluationReport.of_parts([part.report for part in parts])
    gathered = (torch.cat(list(t)) for t in zip(*(part[:4] for part in parts), strict=True))
    adv, before, after, loss = gathered
    passes = round(whole.forwards / max(whole.examples, 1))
    return report.Outcome(images.images, adv, images.labels, before, after, loss, passes, whole.seconds), whole
