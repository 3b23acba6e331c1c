"""Options of ``fastrobust bench`` and what they do."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import os
import pkgutil
import re
import sys
from pathlib import Path

import torch

from . import against, compare, harness, plot, rendered, report
from .case import Context, Suite, Unavailable

_RESULTS = Path("benchmarks") / "results"


def suites() -> dict[str, Suite]:
    """Every suite: a module of this package that has a `SUITE`, by the suite's name."""
    package = importlib.import_module(__package__)
    found: dict[str, Suite] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.ispkg or info.name.startswith("_"):
            continue
        suite = getattr(importlib.import_module(f"{__package__}.{info.name}"), "SUITE", None)
        if isinstance(suite, Suite):
            found[suite.name] = suite
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suites", nargs="*", metavar="SUITE", help="suites to run (default: all; see --list)")
    parser.add_argument("--list", action="store_true", help="list the suites and stop")
    parser.add_argument(
        "--only", metavar="REGEX", default=None, help="only rows in whose work and axes the expression is found"
    )
    level = parser.add_mutually_exclusive_group()
    level.add_argument("--quick", dest="level", action="store_const", const="quick", help="fewer rows and samples")
    level.add_argument(
        "--smoke", dest="level", action="store_const", const="smoke", help="tiny sizes, seconds: does it run"
    )
    level.add_argument("--full", dest="level", action="store_const", const="full", help="every row, many samples")
    parser.set_defaults(level="default")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N or auto (default: cuda where there is one)")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated inputs (default: 0)")
    parser.add_argument("--data", default=os.environ.get("FASTROBUST_DATA"), help="folder of the optional data sets")
    parser.add_argument(
        "--out",
        type=Path,
        default=None,
        help="JSON file of the run (default: in benchmarks/results in a checkout, else in the current folder)",
    )
    parser.add_argument(
        "--plot",
        nargs="?",
        type=Path,
        const=Path(),
        default=None,
        metavar="PNG",
        help="also draw the run (default: beside the JSON)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit 1 when a target ratio is missed, a peer's result differs, or a row fails",
    )
    parser.add_argument(
        "--compare", type=Path, default=None, metavar="FILE", help="this run against an earlier run's JSON, row by row"
    )
    parser.add_argument(
        "--against",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="instead: another build of the library in turns with this one, without peers",
    )
    parser.add_argument(
        "--fail-under",
        type=float,
        default=None,
        metavar="RATIO",
        help="with --compare or --against: exit 1 when a row's time then / now is under it by more than the noise",
    )
    parser.add_argument(
        "--report",
        nargs="+",
        type=Path,
        default=None,
        metavar="FILE",
        help="instead of a run: a page of runs' JSON files, what is slower than a peer first (--html, --markdown)",
    )
    parser.add_argument(
        "--html", type=Path, default=None, metavar="OUT", help="write the page of this run, or of --report, as one file"
    )
    parser.add_argument("--markdown", type=Path, default=None, metavar="OUT", help="the same as Markdown")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="ours and the floor alone")
    parser.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")


def choose_device(text: str) -> torch.device:
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise ValueError(f"--device is {text!r}; expected cpu, cuda, cuda:N or auto") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is {text!r}; expected cpu, cuda, cuda:N or auto")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {text!r}, but torch sees no GPU here")
    return device


def choose_suites(names: list[str]) -> list[Suite]:
    known = suites()
    for name in names:
        if name not in known:
            raise ValueError(f"there is no suite {name!r}; expected some of {', '.join(sorted(known))}")
    return [known[name] for name in names] if names else [suite for suite in known.values() if suite.default]


def choose_rows(text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise ValueError(f"--only is {text!r}; expected a regular expression ({error})") from None


def default_out(level: str, names: list[str]) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = _RESULTS if _RESULTS.is_dir() else Path()
    return folder / f"run-{'-'.join(names) or 'all'}-{level}-{stamp}.json"


def main(args: argparse.Namespace) -> int:
    """Runs what `add_arguments` collected. 0, 1 for a failed run or check, 2 for bad arguments."""
    try:
        chosen = choose_suites(args.suites)
        device = choose_device(args.device)
        if args.threads is not None and args.threads < 1:
            raise ValueError(f"--threads is {args.threads}; expected 1 or more")
        only = choose_rows(args.only)
        compare.check_ratio(args.fail_under)
        if args.compare is not None and args.against is not None:
            raise ValueError("--compare and --against are both given; expected one of them")
        if args.fail_under is not None and args.compare is None and args.against is None:
            raise ValueError("--fail-under is given alone; expected --compare FILE or --against FOLDER with it")
        then = None if args.compare is None else compare.read(args.compare)
        pages = None if args.report is None else rendered.collect(args.report)
        other = None if args.against is None else against.library(args.against)
    except (OSError, ValueError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if args.list:
        for name, suite in suites().items():
            print(f"{name:12} {suite.summary}" + ("" if suite.default else " (only when named)"))
        return 0
    if pages is not None:
        return write_pages(pages, args)
    if other is not None:
        return run_against(other, args)
    gc.collect()
    gc.freeze()  # every row collects garbage; it need not go through all of torch each time
    before = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        context = Context(device, args.level, args.data, args.seed)
        bar = report.progress_bar if args.progress else report.no_bar
        run = harness.run(chosen, context, bar, only, args.peers)
    finally:
        torch.set_num_threads(before)
    print(report.table(run))
    out = args.out or default_out(args.level, args.suites)
    report.write_json(run, out)
    print(f"\nwritten: {out}")
    if args.plot is not None:
        picture = out.with_suffix(".png") if args.plot == Path() else args.plot
        try:
            plot.plot(run, picture)
            print(f"drawn: {picture}")
        except Unavailable as missing:
            print(f"bench: {missing}", file=sys.stderr)
            return 2
    if not run.rows:
        print("bench: nothing ran", file=sys.stderr)
        return 1
    if args.html is not None or args.markdown is not None:
        write_pages(rendered.of_content(out.name, report.finite(report.as_dict(run))), args)
    slower = 0
    if then is not None:
        print(f"\nagainst {args.compare}:")
        slower = compare.report(then, report.as_dict(run), args.fail_under)
    if args.check:
        found = harness.problems(run)
        print("check: all targets met" if not found else "check: " + "\ncheck: ".join(found))
        return 1 if found else slower
    return 1 if any(row.ours.status == harness.FAILED for row in run.rows) else slower


def write_pages(found: rendered.Report, args: argparse.Namespace) -> int:
    """The rendered report where it was asked for, else on the terminal."""
    written = 0
    for path, make in ((args.html, rendered.page), (args.markdown, rendered.markdown)):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(make(found))
            print(f"written: {path}")
            written += 1
    print(rendered.summary(found) if written else rendered.markdown(found))
    return 0


def run_against(other: Path, args: argparse.Namespace) -> int:
    """The chosen rows with either library, and the comparison; 1 where it or the other library fails."""
    argv = [*args.suites, "--device", args.device, "--seed", str(args.seed), "--no-peers"]
    argv += [] if args.level == "default" else [f"--{args.level}"]
    for name in ("only", "threads", "data"):
        if getattr(args, name) is not None:
            argv += [f"--{name}", str(getattr(args, name))]
    try:
        then, now = against.side_by_side(other, argv)
    except Unavailable as missing:
        print(f"bench: {missing}", file=sys.stderr)
        return 1
    print(f"then: {other}; now: this library; the faster of two runs each")
    return compare.report(then, now, args.fail_under)


def run_from_argv(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m " + __package__, description="Benchmark suites of fastrobust.")
    add_arguments(parser)
    return main(parser.parse_args(argv))
