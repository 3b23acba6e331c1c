"""``fastrobust tables``: tables of the thesis' chapter 3, ours beside the printed figures."""

from __future__ import annotations

import argparse

from . import _common as common
from .bench import benchmark


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark("certificate_tables").add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    with common.plain_warnings():
        return int(benchmark("certificate_tables").main(args))
