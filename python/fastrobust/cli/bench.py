"""``fastrobust bench``: the suites of :mod:`fastrobust.benchmarks`, installed with the package."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType

from ._common import BadArguments

_SUITES = "fastrobust.benchmarks"


def _suites() -> ModuleType:
    try:
        return importlib.import_module(f"{_SUITES}.cli")
    except ModuleNotFoundError as error:
        if error.name not in (_SUITES, f"{_SUITES}.cli"):
            raise
        raise BadArguments("fastrobust bench: the benchmark suites are not part of this installation") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _suites().add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    return int(_suites().main(args))
