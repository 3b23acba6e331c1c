"""The run of ``fastrobust train``: data split, model built, trained with a log, judged at the end."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import attacks, build_info, data, training
from ..certify import checkpoints
from ..nn import zoo
from ..training import checkpoint as files
from ..training import distributed
from ..training.recipes import Recipe
from ..training.schedules import PAS
from . import _arguments as shared
from . import _curves as curves
from ._common import BadArguments
from ._report import NORM_NAMES, _finite


class Sets(NamedTuple):
    """Disjoint: trained on, choosing the best epoch, judging at the end."""

    train: data.Images
    validation: data.Images
    test: data.Images


@dataclasses.dataclass
class Setup:
    method: training.Method
    how: Recipe
    model: nn.Module
    name: str
    sets: Sets
    eps: float
    norm: float | str
    out: Path
    augment: bool
    average: str | None
    resume: bool
    every: int
    steps: int
    final: str
    seed: int
    device: torch.device
    autocast: torch.dtype | None
    progress: bool
    plots: bool

    def words(self) -> dict[str, Any]:
        """The settings, for the log."""
        options = {k: files.plain(v) for k, v in self.method.settings().items()}
        return {
            "method": self.method.name,
            "options": options,
            **dataclasses.asdict(self.how),
            "eps": self.eps,
            "norm": NORM_NAMES[_norm(self.norm)],
            "model": self.name,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **{name: shared.data_text(images) for name, images in self.sets._asdict().items()},
            "augment": self.augment,
            "average": self.average,
            "autocast": None if self.autocast is None else str(self.autocast),
            "seed": self.seed,
            "device": shared.device_text(self.device),
            "version": build_info()["version"],
            "torch": torch.__version__,
        }


def _norm(given: float | str) -> float:
    return shared.norm(given) if isinstance(given, str) else float(given)


def split(args: argparse.Namespace) -> Sets:
    """The test images are those of the test split; of a file without splits a fifth. Validation images are drawn from
    the training images by a fixed permutation, so that one seed or another compares on the same ones."""
    whole = data.load(args.data, "train", folder=args.data_dir)
    test = data.load(args.data, "test", folder=args.data_dir, limit=args.test_limit)
    order = torch.randperm(len(whole.labels), generator=torch.Generator().manual_seed(0))
    if args.test_limit is None and test.images.shape == whole.images.shape and torch.equal(test.images, whole.images):
        held, order = order[: max(1, len(order) // 5)], order[max(1, len(order) // 5) :]
        test = _rows(whole, held)
    count = args.validation or min(1000, max(1, len(order) // 10))
    if count >= len(order):
        raise BadArguments(f"argument --validation: got {count}, but there are {len(order)} images to train on")
    rows = order[count:] if args.limit is None else order[count : count + args.limit]
    return Sets(_rows(whole, rows), _rows(whole, order[:count]), test)


def _rows(images: data.Images, rows: torch.Tensor) -> data.Images:
    return data.Images(images.images[rows], images.labels[rows], images.name)


def model_of(name: str, classes: int, shape: tuple[int, ...], args: argparse.Namespace) -> nn.Module:
    if ":" in name:
        if args.width is not None:
            raise BadArguments("argument --width: is for a model by name")
        model = checkpoints.made_by(name)
    else:
        model = zoo.build(
            name, max(classes, 10 if name in ("digits-cnn", "mnist-cnn") else classes), shape, width=args.width
        )
    if args.weights is not None:
        held = torch.load(args.weights, map_location="cpu", weights_only=True)
        held = held.get("model", held) if isinstance(held, dict) else held
        try:
            model.load_state_dict(held)
        except (RuntimeError, TypeError, AttributeError) as error:
            raise BadArguments(f"argument --weights: {args.weights} does not fit {name}: {error}") from error
    with shared.model_failures(name, torch.zeros(2, *shape)), torch.no_grad():
        model.eval()(torch.zeros(2, *shape))
    return model


def fit(setup: Setup, device: torch.device) -> list[dict[str, float]]:
    """Trains; the log is written after every epoch."""
    rank, world = distributed.rank_and_world()
    model = setup.model.to(device)
    torch.manual_seed(setup.seed + rank)
    sets, how = setup.sets, setup.how
    loader = training.loader(
        sets.train.images.to(device), sets.train.labels, how.batch_size, seed=setup.seed,
        augment=training.ShiftFlip(seed=setup.seed) if setup.augment else None,
    )  # fmt: skip
    judge = training.Evaluation(
        sets.validation.images, sets.validation.labels, eps=setup.eps, norm=setup.norm, every=setup.every
    )
    if rank == 0:
        setup.out.mkdir(parents=True, exist_ok=True)
    log: list[dict[str, float]] = []
    before = setup.out / "log.json"
    if setup.resume and before.exists() and (setup.out / "last.pt").exists():
        log = json.loads(before.read_text())["history"]

    def write(_: nn.Module, record: dict[str, float]) -> None:
        if rank == 0:
            del log[int(record["epoch"]) - 1 :]
            log.append(record)
            write_log(setup, log, {})

    return training.train(
        model, loader, setup.method, epochs=how.epochs, optimizer=how.make_optimizer(model), scheduler=how.rate,
        max_grad_norm=how.max_grad_norm, evaluate=judge, checkpoint=setup.out, resume=setup.resume,
        average=setup.average, autocast=setup.autocast, progress=setup.progress and rank == 0, callbacks=write,
    )  # fmt: skip


def write_log(setup: Setup, history: list[dict[str, float]], result: dict[str, Any]) -> None:
    """Strict JSON, whole at every moment."""
    text = json.dumps(
        _finite({"setting": setup.words(), "history": history, "result": result}), indent=2, allow_nan=False
    )
    part = setup.out / "log.json.part"
    part.write_text(text + "\n")
    os.replace(part, setup.out / "log.json")


def finish(setup: Setup, history: list[dict[str, float]], device: torch.device) -> str:
    """Judged on the test images: the weights at the end, and those of the best epoch; the text of the report."""
    files.write(setup.out / "model.pt", {"model": setup.model.state_dict()})
    result: dict[str, Any] = {"last": {"epoch": history[-1]["epoch"], **_judge(setup, device)}}
    best = setup.out / "best.pt"
    if best.exists():
        kept = files.read(best)
        if kept["record"]["epoch"] == history[-1]["epoch"]:
            result["best"] = result["last"]
        else:
            setup.model.load_state_dict(kept["model"])
            result["best"] = {"epoch": kept["record"]["epoch"], **_judge(setup, device)}
    if isinstance(setup.method, PAS) and setup.method.ends:
        setup.model.load_state_dict(torch.load(setup.out / "model.pt", map_location=device, weights_only=True)["model"])
        result["ensemble"] = {
            "epoch": history[-1]["epoch"],
            **_judge(setup, device, setup.method.ensemble(setup.model)),
        }
    write_log(setup, history, result)
    written = [setup.out / "log.json", setup.out / "model.pt", *([best] if best.exists() else [])]
    if setup.plots:
        curves.save(
            history, result, f"{setup.method.name}, {setup.name}, eps {setup.eps:.4g}", setup.out / "curves.png"
        )
        written.append(setup.out / "curves.png")
    else:
        print("fastrobust: no plot: it needs matplotlib: pip install matplotlib", file=sys.stderr)
    return _text(setup, history, result, written)


def _judge(setup: Setup, device: torch.device, model: nn.Module | None = None) -> dict[str, float]:
    """Clean, FGSM, PGD and AutoAttack accuracy on the test images."""
    model, test, norm = (setup.model if model is None else model).eval(), setup.sets.test, NORM_NAMES[_norm(setup.norm)]
    start = time.perf_counter()
    judge = training.Evaluation(
        test.images, test.labels, eps=setup.eps, norm=setup.norm, steps=setup.steps, seed=setup.seed
    )
    found = judge(model)
    if setup.final != "pgd":
        options: dict[str, Any] = {"eps": setup.eps, "norm": norm, "version": setup.final, "seed": setup.seed}
        x, y = test.images.to(device), test.labels.to(device)
        done = attacks.autoattack(model, x, y, progress=setup.progress, return_details=True, **options)
        found[f"autoattack_{setup.final}"] = 1 - float(done.fooled.double().mean())
    return {**found, "seconds": time.perf_counter() - start}


_NAMES = {"clean": "clean accuracy", "fgsm": "FGSM", "pgd": "PGD-{steps}", "autoattack_fast": "AutoAttack fast",
          "autoattack_standard": "AutoAttack"}  # fmt: skip


def _text(setup: Setup, history: list[dict[str, float]], result: dict[str, Any], written: list[Path]) -> str:
    words = setup.words()
    options = ", ".join(f"{k} {_short(v)}" for k, v in words["options"].items())
    rows = [
        ("method", setup.method.name + (f" ({options})" if options else "")),
        ("trained", setup.how.text() + (f", {setup.average.upper()}" if setup.average else "")),
        ("model", f"{setup.name}, {words['parameters']} parameters"),
        ("data", words["train"]),
        ("", f"{len(setup.sets.validation.labels)} images for validation, {len(setup.sets.test.labels)} to test on"),
        ("device", words["device"]),
        ("judged", f"{words['norm']}, eps {setup.eps:.6g}; weights at the end, and of the best validated epoch"),
    ]
    shown = [name for name in ("last", "best", "ensemble") if name in result]
    if "ensemble" in shown:
        rows.append(("", "and, last, the ensemble of the ends of the periods"))
    columns = [result[name] for name in shown]
    rows.append(("epoch", "".join(f"{c['epoch']:10.0f}" for c in columns)))
    for key, name in _NAMES.items():
        if key in columns[0]:
            rows.append((name.format(steps=setup.steps), "".join(f"{100 * c[key]:8.2f} %" for c in columns)))
    seconds = sum(r["seconds"] for r in history)
    rows.append(("time", f"{seconds:.1f} s of training, {seconds / len(history):.2f} s an epoch"))
    rows += [("written", str(path)) for path in written]
    return "\n".join(f"{name:<16} {value}".rstrip() for name, value in rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
