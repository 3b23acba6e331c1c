"""What attack and certify take alike: the model, the images, the box, and where and how they run."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import build_info, data, models
from ..certify import checkpoints
from . import _common as common
from ._common import BadArguments

Clip = tuple[float, float] | None
# what both commands and the Python API do without being told
CLIP_RULE = (
    "By default an answer errs to the safe side: in Python an attack stays inside the image box (clip=(0, 1)) and a "
    "bound or certificate holds on the whole ball (clip=None). Both commands take the box [0, 1], which their images "
    "lie in, and say so; --clip and --no-clip change it, as clip= does in Python."
)


def add_model(parser: argparse.ArgumentParser, seed: str) -> None:
    add = parser.add_argument_group("the model").add_argument
    add(
        "--model",
        type=Path,
        metavar="FILE",
        help="weights (a state_dict) with --factory or --layout, or with --trust a pickled nn.Module; attack also "
        "takes "
        "a TorchScript file or an exported program (.pt2). It maps images in [0, 1] to logits (default: a small CNN "
        "trained on the digits at first use)",
    )
    add(
        "--factory",
        metavar="MODULE:NAME",
        help="package.module:callable or file.py:callable that builds the model; weights are loaded into it strictly",
    )
    add(
        "--layout",
        type=str.lower,
        choices=tuple(checkpoints.LAYOUTS),
        help="instead of a factory: " + "; ".join(f"{name}: {text}" for name, text in checkpoints.LAYOUTS.items()),
    )
    add(
        "--activation", type=str.lower, choices=tuple(checkpoints.ACTIVATIONS),
        help="between the layers of a layout (default: relu)",
    )  # fmt: skip
    add("--trust", action="store_true", help="load a pickled model, which runs any code its author put there")
    add(
        "--normalize", type=_mean_std, metavar="MEAN/STD",
        help="applied before the model; per channel with commas: 0.49,0.48,0.45/0.25,0.24,0.26",
    )  # fmt: skip
    add("--seed", type=common.natural, default=0, help=f"{seed} (default: 0)")
    add("--no-cache", action="store_true", help="train the built-in model anew and do not keep it")


def add_images(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the images").add_argument
    add(
        "--data", default="digits", metavar="DATA",
        help="digits, mnist, cifar10, or an npz file with images and labels (default: digits)",
    )  # fmt: skip
    add(
        "--data-dir", type=Path, metavar="DIR",
        help=f"folder of mnist.npz and cifar10_subset.npz (default: ${data.ENVIRONMENT})",
    )  # fmt: skip
    add("--split", type=str.lower, choices=("test", "train"), default="test", help="default: test")
    add("--first", type=common.natural, default=0, metavar="I", help="number of the first image (default: 0)")
    add("--limit", type=common.count, metavar="N", help="N images only")
    box = parser.add_argument_group("the box of allowed images", CLIP_RULE)
    box.add_argument(
        "--clip", type=common.number, nargs=2, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="default: 0 1"
    )
    box.add_argument("--no-clip", action="store_true", help="no box")


def add_running(group: argparse._ArgumentGroup, batch_size: int) -> None:
    add = group.add_argument
    add("--batch-size", type=common.count, default=batch_size, metavar="N", help=f"default: {batch_size}")
    add("--device", type=common.device, default="auto", help="cpu, cuda, cuda:N (default: a GPU if there is one)")
    add("--threads", type=common.count, metavar="N", help="CPU threads (default: torch's)")
    add(
        "--progress", action=argparse.BooleanOptionalAction, default=None,
        help="a bar over images (default: on a terminal)",
    )  # fmt: skip


def begin(args: argparse.Namespace, *outputs: Path | None) -> data.Images:
    """Threads set, files to write compared with those that are read and with each other, and the images loaded."""
    given = {p.resolve() for p in (args.model, Path(args.data)) if p is not None and p.is_file()}
    for path in outputs:
        if path is not None and path.resolve() in given:
            raise BadArguments(f"fastrobust: error: {path} is read or written already, and would be overwritten")
        if path is not None:
            given.add(path.resolve())
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return data.load(args.data, args.split, folder=args.data_dir, limit=args.limit, first=args.first)


def clip_of(args: argparse.Namespace) -> Clip:
    if args.no_clip:
        return None
    low, high = args.clip
    if low > high:
        raise BadArguments(f"argument --clip: got {low:g} {high:g}, expected LOW <= HIGH")
    return low, high


class Given(NamedTuple):
    """A model on its device, in evaluation mode; what it is; and for weights what was built."""

    model: nn.Module
    name: str
    built: str = ""


def model_of(args: argparse.Namespace, images: data.Images, graphs: bool) -> Given:
    """The model to attack or certify; ``graphs``: TorchScript and exported programs too."""
    options = {"factory": args.factory, "layout": args.layout, "activation": args.activation}
    if args.model is None:
        given = next((name for name, value in options.items() if value is not None), None)
        if given is not None:
            raise BadArguments(f"argument --{given}: needs the file of weights, --model FILE")
        if images.name != "digits":
            raise BadArguments(f"argument --model: is needed with --data {args.data}; the built-in one reads digits")
        trained = models.train_digits(args.seed, cache=not args.no_cache)
        return Given(trained.to(args.device), f"built-in digits CNN (seed {args.seed})")
    kind = checkpoints.file_kind(args.model) if args.model.is_file() else "pickle"
    if graphs and kind != "pickle":
        given = next((name for name, value in options.items() if value is not None), None)
        if given is not None:
            raise BadArguments(f"argument --{given}: is for weights, but {args.model} is of kind {kind}")
        return Given(_graph(args.model, kind, args.device), f"{args.model} ({kind})")
    found = checkpoints.load(args.model, shape=tuple(images.images.shape[1:]), trust=args.trust, **options)
    return Given(found.model.to(args.device), f"{args.model} ({found.kind})", found.built)


def _graph(path: Path, kind: str, device: torch.device) -> nn.Module:
    """Both kinds hold a graph of their own, not Python code."""
    try:
        if kind == "TorchScript":
            return torch.jit.load(str(path), map_location=device)
        module: Any = torch.export.load(path).module()
        return module.to(device)
    except Exception as error:
        raise BadArguments(f"argument --model: {path} is not a readable {kind}: {error}") from error


def device_text(device: torch.device) -> str:
    info = build_info()
    used = f"{info['cpu_variant']} kernels, {info['threads']} threads"
    return f"{device} ({torch.cuda.get_device_name(device) if device.type == 'cuda' else used})"


def data_text(images: data.Images) -> str:
    return f"{images.name}, {len(images.labels)} images of {'x'.join(map(str, images.images.shape[1:]))}"


def check_classes(classes: int, y: Tensor) -> None:
    if int(y.max()) >= classes:
        raise BadArguments(f"the labels reach class {int(y.max())}, but the model has {classes} classes")


@contextlib.contextmanager
def model_failures(model: str, x: Tensor) -> Iterator[None]:
    """What a model raises on images it does not take, as bad input."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, NotImplementedError, IndexError, AttributeError) as error:
        hint = ""
        if "exported program" in model:
            batch = "dynamic_shapes=({0: torch.export.Dim('batch')},)"
            hint = f"; an exported program needs a dynamic batch: export with {batch}"
        elif x.dim() == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
            hint = "; their channels come last, and are expected before height and width"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadArguments(
            f"argument --model: {model} fails on images of shape {tuple(x.shape)}{hint}: {lines[-1]}"
        ) from error


def norm(text: str) -> float:
    """inf, 2, 1 by number or name in any case, or another p >= 1."""
    bare = text.lower().removeprefix("l").lstrip("-_")
    try:
        value = math.inf if bare == "infinity" else float(bare)
    except ValueError:
        value = math.nan
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected Linf, L2, L1 or a number >= 1")
    return value


def _mean_std(text: str) -> tuple[list[float], list[float]]:
    try:
        mean, std = ([common.number(v) for v in part.split(",")] for part in text.split("/"))
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected MEAN/STD with std > 0 and as many values on both sides, such as 0.1307/0.3081"
        ) from None
    return mean, std


class Normalized(nn.Module):
    """(x - mean) / std before a model, so that bounds see it too."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float], x: Tensor) -> None:
        super().__init__()
        channels = x.shape[1]
        if len(mean) not in (1, channels):
            raise BadArguments(
                f"argument --normalize: got {len(mean)} values, expected 1 or one per channel ({channels})"
            )
        shape = (-1, *(1 for _ in x.shape[2:]))
        self.model = model
        self.register_buffer("mean", torch.tensor(mean, dtype=x.dtype, device=x.device).view(shape))
        self.register_buffer("std", torch.tensor(std, dtype=x.dtype, device=x.device).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.mean) / self.std)
