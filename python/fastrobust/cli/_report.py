"""What an attack found: the figures, their text and their JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
from torch import Tensor

NORM_NAMES = {math.inf: "Linf", 2.0: "L2", 1.0: "L1"}


@dataclasses.dataclass
class Outcome:
    """All examples of a run, on the CPU. ``correct`` means: predicts the label."""

    images: Tensor
    adversarial: Tensor
    labels: Tensor
    before: Tensor
    after: Tensor
    loss: Tensor
    passes: int
    seconds: float

    @property
    def clean(self) -> Tensor:
        return self.before == self.labels

    @property
    def robust(self) -> Tensor:
        """Correct on the image and on its adversarial example: the image itself lies in the ball."""
        return self.clean & (self.after == self.labels)


def norms(delta: Tensor) -> dict[str, Tensor]:
    """Linf, L2 and L1 norm of each example, in float64."""
    flat = delta.double().flatten(1)
    return {"Linf": flat.abs().amax(1), "L2": flat.square().sum(1).sqrt(), "L1": flat.abs().sum(1)}


def figures(outcome: Outcome, setting: dict[str, Any]) -> dict[str, Any]:
    """The report as plain numbers. ``setting`` holds at least norm, eps, clip and target."""
    delta = outcome.adversarial.double() - outcome.images.double()
    sizes = norms(delta)
    lo, hi = setting["clip"] or (-math.inf, math.inf)
    n = len(outcome.labels)
    largest = float(sizes[setting["norm"]].max())
    box = bool(((outcome.adversarial >= lo) & (outcome.adversarial <= hi)).all())
    found: dict[str, Any] = {
        "examples": n,
        "clean_accuracy": _share(outcome.clean),
        "robust_accuracy": _share(outcome.robust),
        "loss": {"mean": float(outcome.loss.double().mean()), "median": float(outcome.loss.double().median())},
        "perturbation": {
            "largest": largest,
            "eps": setting["eps"],
            "ball_holds": largest <= setting["eps"],
            "box_holds": box,
            "max": {k: float(v.max()) for k, v in sizes.items()},
            "mean": {k: float(v.mean()) for k, v in sizes.items()},
        },
        "seconds": outcome.seconds,
        "examples_per_second": n / outcome.seconds if outcome.seconds else math.inf,
        "forward_passes_per_example": outcome.passes,
    }
    if setting["target"] is not None:
        found["reached_target"] = _share(outcome.after == setting["target"])
    return found


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def text(setting: dict[str, Any], found: dict[str, Any]) -> str:
    rows = [("attack", _attack(setting)), *head(setting, found)]
    if "reached_target" in found:
        rows.append((f"says {setting['target']}", percent(found, "reached_target")))
    rows += [
        (
            f"loss ({setting['reported_loss']})",
            f"mean {found['loss']['mean']:.4f}, median {found['loss']['median']:.4f}",
        ),
        *perturbation(setting, found),
        ("time", f"{found['seconds']:.2f} s, {found['examples_per_second']:.0f} examples/s, {_passes(setting, found)}"),
    ]
    return lines(rows)


Row = tuple[str, str]


def lines(rows: list[Row]) -> str:
    return "\n".join(f"{name:<16} {value}".rstrip() for name, value in rows)


def percent(found: dict[str, Any], key: str) -> str:
    n = found["examples"]
    return f"{100 * found[key]:6.2f} %  ({round(found[key] * n)} of {n})"


def head(setting: dict[str, Any], found: dict[str, Any]) -> list[Row]:
    """Model, data, device, and both accuracies."""
    return [
        ("model", setting["model"]),
        *([("built", setting["built"])] if setting["built"] else []),
        ("data", setting["data"]),
        ("device", setting["device"]),
        ("clean accuracy", percent(found, "clean_accuracy")),
        ("robust accuracy", percent(found, "robust_accuracy")),
    ]


def perturbation(setting: dict[str, Any], found: dict[str, Any]) -> list[Row]:
    """The largest one, whether ball and box hold, and the means."""
    p = found["perturbation"]
    holds = "holds" if p["ball_holds"] else "IS BROKEN"
    box = "no box"
    if setting["clip"] is not None:
        lo, hi = setting["clip"]
        box = f"the box [{lo:g}, {hi:g}] {'holds' if p['box_holds'] else 'IS BROKEN'}"
    return [
        ("perturbation", f"largest {setting['norm']} {p['largest']!r}"),
        ("", f"the ball of {p['eps']!r} {holds}, {box} (float64)"),
        ("", "mean " + ", ".join(f"{name} {value:.4g}" for name, value in p["mean"].items())),
    ]


def _attack(setting: dict[str, Any]) -> str:
    parts = [f"{setting['attack']}, {setting['norm']}, eps {setting['eps']:.6g}"]
    if setting["attack"] != "fgsm":
        parts.append(f"{setting['steps']} steps of {setting['step_size']:.4g}")
    if setting["restarts"] > 1:
        parts.append(f"{setting['restarts']} restarts")
    parts.append(f"loss {setting['loss']}")
    if setting["target"] is not None:
        parts.append(f"towards class {setting['target']}")
    if setting["targets"] is not None:
        parts.append(f"targets: {setting['targets']}")
    if setting["early_stop"]:
        parts.append("early stop")
    return ", ".join(parts)


def _passes(setting: dict[str, Any], found: dict[str, Any]) -> str:
    shrinks = setting["early_stop"] or setting["restarts"] > 1 or setting["targets"] is not None
    return f"{'at most ' if shrinks else ''}{found['forward_passes_per_example']} forward passes an example"


def to_json(setting: dict[str, Any], found: dict[str, Any]) -> str:
    """Strict JSON: a number that is not finite becomes null."""
    return json.dumps(_finite({"setting": setting, "result": found}), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def arrays(outcome: Outcome, setting: dict[str, Any]) -> dict[str, np.ndarray]:
    """What --out saves: ``images`` and ``labels`` as --data reads them, and what the attack made of them."""
    return {
        "images": outcome.images.numpy(),
        "labels": outcome.labels.numpy(),
        "adversarial": outcome.adversarial.numpy(),
        "prediction_clean": outcome.before.numpy(),
        "prediction_adversarial": outcome.after.numpy(),
        "loss": outcome.loss.numpy(),
        "eps": np.float64(setting["eps"]),
        "norm": np.str_(setting["norm"]),
    }
