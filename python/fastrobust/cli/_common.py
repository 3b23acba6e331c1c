"""What the commands share: errors in one line, and the types of their arguments."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import build_info


class BadArguments(Exception):
    """Bad input that ends a command; the message is for the user."""


class Parser(argparse.ArgumentParser):
    """An error is one line and an exception (the usage is for --help); options are not abbreviated."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise BadArguments(f"{self.prog}: {message} (see {self.prog} --help)")


# of bad input; whatever else comes may be a fault of ours, and its kind is shown
EXPECTED = (BadArguments, ValueError, TypeError, OSError, ImportError)


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        text = f"out of memory; try a smaller --batch-size ({text.split('. ')[0]})"
    elif not isinstance(error, EXPECTED):
        text = f"{type(error).__name__}: {text}"
    if len(text) > 400:
        text = text[:397] + "..."
    return text if text.startswith("fastrobust") else f"fastrobust: error: {text}"


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """A warning is one line on stderr, said once; at the end, how often it came again with other figures (of
    batches)."""
    shown: dict[tuple[type[Warning], str], list[str]] = {}

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if not issubclass(category, UserWarning | RuntimeWarning):
            return
        text = " ".join(str(message).split())
        seen = shown.setdefault((category, re.sub(r"\d[\d.e+-]*", "#", text)), [])
        if not seen:
            # a bar stands on the line
            print("\r\033[K" * sys.stderr.isatty() + f"fastrobust: warning: {text}", file=sys.stderr)
        seen.append(text)

    with warnings.catch_warnings():
        warnings.showwarning = show  # type: ignore[assignment]
        for kind in (UserWarning, RuntimeWarning):
            warnings.simplefilter("always", kind)
        yield
    for texts in shown.values():
        if len(set(texts)) > 1:
            again = f"came {len(texts) - 1} more times with other figures: {texts[0][:60]}..."
            print(f"fastrobust: warning: {again}", file=sys.stderr)


def number(text: str) -> float:
    """A finite number, or a fraction of two such as 8/255."""
    try:
        top, slash, bottom = text.partition("/")
        value = float(top) / float(bottom) if slash else float(top)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number or a fraction such as 8/255")
    return value


def radius(text: str) -> float:
    value = number(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a value >= 0")
    return value


def count(text: str) -> int:
    """An integer of at least 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """An integer of at least 0."""
    return _integer(text, 0)


def _integer(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"got {value}, expected at least {least}")
    return value


def output(text: str) -> Path:
    """A file to write: its folder must be there, so that a long run does not end in an error."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, expected a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent} to write {path.name} in")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} cannot be written")
    return path


def device(text: str) -> torch.device:
    """ "auto": the GPU where this build and this machine have one, else the CPU."""
    kernels = bool(build_info()["cuda_toolkit"])
    if text == "auto":
        return torch.device("cuda" if kernels and torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(text)
    except RuntimeError:
        chosen = torch.device("meta")
    if chosen.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        if not kernels:
            raise argparse.ArgumentTypeError(f"got {text!r}, but this build has no CUDA kernels (see fastrobust info)")
        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError(f"got {text!r}, but torch finds no GPU here")
        if (chosen.index or 0) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(f"got {text!r}, but there are {torch.cuda.device_count()} GPUs")
    return chosen
