"""``fastrobust bench``: the suites of :mod:`fastrobust.benchmarks`, installed with the package."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType

from ._common import BadArguments

_SUITES = "fastrobust.benchmarks"


def benchmark(name: str) -> ModuleType:
    """A module of the benchmarks, which an installation may lack."""
    try:
        return importlib.import_module(f"{_SUITES}.{name}")
    except ModuleNotFoundError as error:
        if error.name not in (_SUITES, f"{_SUITES}.{name}"):
            raise
        raise BadArguments("fastrobust: the benchmark suites are not part of this installation") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark("cli").add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    return int(benchmark("cli").main(args))
