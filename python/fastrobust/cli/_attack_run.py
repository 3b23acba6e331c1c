"""The run of ``fastrobust attack``: every batch attacked, timed and judged by predictions of its own."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import attacks
from ..attacks._model import Victim, undisturbed
from ..data import Images
from . import _report as report
from ._arguments import check_classes, model_failures
from ._common import BadArguments

ATTACKS: dict[str, Callable[..., Any]] = {"fgsm": attacks.fgsm, "ifgsm": attacks.ifgsm, "pgd": attacks.pgd}
_PASSED_ON = (
    "eps", "norm", "step_size", "restarts", "loss", "targets", "early_stop", "keep", "normalize", "clip", "eot_samples",
    "output",
)  # fmt: skip


def attack_all(args: argparse.Namespace, model: nn.Module, images: Images, setting: dict[str, Any]) -> report.Outcome:
    """``setting`` has the attack's options; ``args`` the rest (batch size, device, progress)."""
    options = {key: setting[key] for key in _PASSED_ON} | {"targeted": setting["target"] is not None}
    if setting["attack"] != "fgsm":
        options["steps"] = setting["steps"]
    show = sys.stderr.isatty() if args.progress is None else args.progress
    parts: list[dict[str, Tensor]] = []
    passes, seconds, robust = 0, 0.0, 0
    with tqdm(total=len(images.labels), desc=setting["attack"], unit="image", disable=not show, file=sys.stderr) as bar:
        for first in range(0, len(images.labels), args.batch_size):
            rows = slice(first, first + args.batch_size)
            x, y = images.images[rows].to(args.device), images.labels[rows].to(args.device)
            with model_failures(setting["model"], x):
                logits = logits_of(model, x, setting)
                check_classes(logits.shape[1], y)
                _check_target(logits.shape[1], setting["target"])
                goal = y if setting["target"] is None else torch.full_like(y, setting["target"])
                start = _now(args.device)
                found = ATTACKS[setting["attack"]](
                    model,
                    x,
                    goal,
                    seed=setting["seed"],
                    first_example=args.first + first,
                    return_details=True,
                    **options,
                )
                seconds += _now(args.device) - start
                before, after = logits.argmax(1), logits_of(model, found.adv, setting).argmax(1)
            # the score of a targeted attack is minus its loss
            loss = found.loss if setting["target"] is None else -found.loss
            parts.append(
                {"adversarial": found.adv.cpu(), "before": before.cpu(), "after": after.cpu(), "loss": loss.cpu()}
            )
            passes = max(passes, found.queries)
            robust += int(((before == y) & (after == y)).sum())
            bar.update(len(y))
            bar.set_postfix_str(f"robust {100 * robust / (first + len(y)):.1f} %")
    gathered = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    return report.Outcome(images.images, labels=images.labels, passes=passes, seconds=seconds, **gathered)


def logits_of(model: nn.Module, x: Tensor, setting: dict[str, Any]) -> Tensor:
    """In eval mode with the attack's own conversions of input and output."""
    with undisturbed(model, "eval"), torch.no_grad():
        return Victim(model, setting["normalize"], None, x, setting["output"])(x)


def _check_target(classes: int, target: int | None) -> None:
    if target is not None and target >= classes:
        raise BadArguments(f"argument --targeted: got {target}, but the model has {classes} classes")


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
