"""The command line: ``fastrobust info | attack | certify | train | analyse | tables | bench``.

A command is a module with ``add_arguments(parser)`` and ``main(args) -> int``, and one line in :data:`COMMANDS`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .. import __version__
from ._common import Parser, one_line


class Command(NamedTuple):
    module: str
    summary: str


COMMANDS = {
    "info": Command("fastrobust.cli.info", "what was built, what is used on this machine, and why"),
    "attack": Command("fastrobust.cli.attack", "attack a model; report its accuracy, save and draw the examples"),
    "certify": Command(
        "fastrobust.cli.certify", "certified radii of a model: a summary, and a file with a line an image"
    ),
    "train": Command("fastrobust.cli.train", "train a robust model by any method; checkpoints, log, curves, accuracy"),
    "analyse": Command("fastrobust.cli.analyse", "studies of the papers, small: arrays, numbers and a picture"),
    "tables": Command(
        "fastrobust.cli.tables", "tables of certified training and certificates: ours beside the printed figures"
    ),
    "bench": Command("fastrobust.cli.bench", "benchmark suites: ratios to the best peer and to the floor"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. 0: done; 1: done, and a check failed; 2: bad input, one line on stderr says what."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv)
    except BrokenPipeError:
        _drop_stdout()
        return 141  # what a shell reports of a program that wrote to a closed pipe
    except KeyboardInterrupt:
        print("fastrobust: interrupted", file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    try:
        try:
            args = _parser(argv).parse_args(argv)
            return int(args.run(args))
        finally:
            sys.stdout.flush()  # here, where a reader that has gone or a full disk can be dealt with
    except BrokenPipeError:
        raise
    except Exception as error:
        if "--debug" in argv:
            raise
        print(one_line(error), file=sys.stderr)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            return 2
        _drop_stdout()
        return 2


def _drop_stdout() -> None:
    """What is left of it would be written again, and fail again, as the interpreter ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser(argv: Sequence[str]) -> Parser:
    """All commands by name; only the chosen one is imported, so that its neighbours' dependencies cannot stop it."""
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="on bad input show the traceback")
    parser = Parser(
        prog="fastrobust", description="Compiled kernels for adversarial robustness in PyTorch.", parents=[common]
    )
    parser.add_argument("--version", action="version", version=f"fastrobust {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.summary, description=command.summary.capitalize() + ".", parents=[common]
        )
        if name == chosen:
            module = importlib.import_module(command.module)
            module.add_arguments(sub)
            sub.set_defaults(run=module.main)
    return parser


__all__ = ["COMMANDS", "main"]
