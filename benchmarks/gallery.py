"""The page of pictures: every study of `fastrobust analyse`, and whether the paper's observation came out.

python -m benchmarks.gallery --out docs [--topics NAME ...] [--work DIR]  runs the studies, writes FILE and the page
python -m benchmarks.gallery --out docs --page                           the page alone, from FILE

FILE is benchmarks/results/gallery.json: the numbers that the command wrote, by study and seed; the sentences and
verdicts come from it (benchmarks/gallery_claims.py). DIR keeps the command's own files; a study whose files are there
is not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .gallery_claims import STUDIES, Study

FILE = Path(__file__).parent / "results" / "gallery.json"
Results = dict[str, dict[str, Any]]
_BYTES = 60_000


def measure(name: str, seeds: Iterable[int], work: Path) -> dict[str, Any]:
    """{"data", "images", "seconds", "seeds": {seed: arrays}} of one study, run where its files are not there yet."""
    found: dict[str, Any] = {"seeds": {}}
    for seed in seeds:
        folder = work / f"seed-{seed}"
        if not (folder / f"{name}.json").is_file():
            start = time.perf_counter()
            command = [sys.executable, "-m", "fastrobust", "analyse", name, "--seed", str(seed), "--out", str(folder)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            found.setdefault("seconds", round(time.perf_counter() - start))
        written = json.loads((folder / f"{name}.json").read_text())
        found |= {"data": written["data"], "images": written["images"]}
        found["seeds"][str(seed)] = {key: _short(value) for key, value in written["arrays"].items()}
    return found


def _short(value: Any) -> Any:
    """To four digits: the file is kept in the repository."""
    if isinstance(value, list):
        return [_short(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def shrink(source: Path, target: Path, *, colours: int = 48, limit: int = _BYTES) -> None:
    """A PNG with a palette, made narrower until it has at most ``limit`` bytes."""
    from PIL import Image

    with Image.open(source) as opened:
        picture = opened.convert("RGB")
    width = min(picture.width, 1000)
    while True:
        small = picture.resize((width, round(picture.height * width / picture.width)), Image.Resampling.LANCZOS)
        small.quantize(colours, dither=Image.Dither.NONE).save(target, optimize=True)
        if target.stat().st_size <= limit or width < 300:
            return
        width = width * 9 // 10


def page(results: Results) -> str:
    lines = [
        "# Gallery of the analyses", "",
        "One picture for each study of [`fastrobust analyse`](analysis.md), and whether what the paper saw came out,",
        "at a size that runs in minutes on two cores: small nets, few epochs. The figures are what the command wrote;",
        "`python -m benchmarks.gallery --out docs` runs all and writes this page. One seed shows a tendency, no more.",
        "",
    ]  # fmt: skip
    for name, study in STUDIES.items():
        if name in results:
            lines += [*section(name, study, results[name]), ""]
    return "\n".join(lines).rstrip() + "\n"


def section(name: str, study: Study, result: dict[str, Any]) -> list[str]:
    seeds = {seed: {k: np.array(v) for k, v in arrays.items()} for seed, arrays in result["seeds"].items()}
    shown = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"
    lines = [
        f"## {name}", "", f"{study.about} `fastrobust analyse {name}`; "
        + (f"{result['images']} images of {result['data']}, {shown}." if study.images else f"{shown}."), "",
        f"![{name}](pictures/{name}.png)", "",
    ]  # fmt: skip
    for claim in study.claims:
        found = [claim.check(arrays) for arrays in seeds.values()]
        yes = sum(bool(held) for held, _ in found)
        verdict = (
            "came out" if yes == len(found) else "did not come out" if not yes else f"in {yes} of {len(found)} seeds"
        )
        if all(held is None for held, _ in found):
            verdict = "within the error of so few images"
        lines.append(f"- {claim.where}: {claim.said} **{verdict[0].upper()}{verdict[1:]}**: {found[0][1]}.")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("docs"), help="folder of gallery.md and pictures/ (default: docs)"
    )
    parser.add_argument(
        "--topics", nargs="*", choices=list(STUDIES), help="these alone; others stay as they are in FILE"
    )
    parser.add_argument("--work", type=Path, help="folder of the command's files (default: a temporary one)")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    results: Results = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if not args.page:
        (args.out / "pictures").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            work = args.work or Path(scratch)
            for name in args.topics if args.topics is not None else STUDIES:
                results[name] = measure(name, range(STUDIES[name].seeds), work)
                shrink(work / "seed-0" / f"{name}.png", args.out / "pictures" / f"{name}.png")
                FILE.write_text(json.dumps(dict(sorted(results.items())), separators=(",", ":")) + "\n")
                print(f"{name:18s}{results[name].get('seconds', '')}", flush=True)
    (args.out / "gallery.md").write_text(page(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
