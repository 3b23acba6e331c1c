"""A figure of a page, named by the committed result that it is from: ``FILE / ROW / FIELD``.

- FILE: a JSON file of benchmarks/results without its ``.json``; without its date too, the newest of that name counts.
- ROW: work and axes of a row of a run, as ``fastrobust bench`` prints them ("pgd_step Linf 16x1x28x28"), or the key of
  a row of another table. ``~EXPRESSION`` takes every row in which the expression is found and gives "least to most".
  ``-``: the file itself.
- FIELD of a run: ``ours`` (the time), ``floor`` (its share of ours), ``best`` (the best equal peer's time over ours),
  or a peer's name (that of its time over ours; ``A or B``: of the faster of the two). Of another table: names that lead
  to a number and its unit, as in ``ratio papers x``: ``x`` (ratio), ``1/x`` (what a share is the inverse of), ``s``
  (seconds), ``us`` (microseconds), ``%`` (of a share), or digits as in ``.2f``.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHIPPED = Path(__file__).resolve().parent / "results"


def ratio(value: float) -> str:
    """Two digits; whole numbers from ten on."""
    return f"{value:.0f}x" if value >= 9.95 else f"{value:.2g}x" if value >= 1.95 else f"{value:.2f}x"


def seconds(value: float) -> str:
    """Two digits; whole numbers from ten on."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9)):
        if value >= 0.995 * size:
            return f"{value / size:.{0 if value >= 9.95 * size else 1}f} {unit}"
    return f"{value:.1g} s"


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


UNITS: dict[str, Callable[[float], str]] = {
    "x": ratio,
    "1/x": lambda value: ratio(1 / value),
    "s": seconds,
    "us": lambda value: seconds(1e-6 * value),
    "%": share,
}


@functools.lru_cache(maxsize=64)
def _content(path: Path, changed: float) -> Any:
    return json.loads(path.read_text())


def source(name: str, results: Path = SHIPPED) -> Path:
    """The file of that name, or the newest of those that have a date behind it. ValueError where there is none."""
    exact = results / f"{name}.json"
    if exact.is_file():
        return exact
    dated = sorted(
        p for p in results.glob(f"{name}-*.json") if re.fullmatch(r"\d{4}-\d\d-\d\d", p.stem[len(name) + 1 :])
    )
    if not dated:
        raise ValueError(f"{name!r}: got no file {exact.name} or {name}-DATE.json in {results.name}, expected one")
    return dated[-1]


def _title(row: dict[str, Any]) -> str:
    if "key" in row:
        return str(row["key"])
    return " ".join([row["work"], *(str(value) for value in row["axes"].values())])


def _number(row: dict[str, Any], field: str) -> tuple[float, Callable[[float], str]]:
    """A figure of a row and how it is written."""
    if "ours" not in row or "peers" not in row:
        *names, unit = field.split()
        # a name may have blanks in it
        found: Any = row
        while names:
            taken = next((k for k in range(len(names), 0, -1) if _has(found, " ".join(names[:k]))), 0)
            if not taken:
                raise ValueError(f"got no {' '.join(names)!r}")
            found, names = found[" ".join(names[:taken])], names[taken:]
        if unit not in UNITS and not re.fullmatch(r"\.\d[fg]", unit):
            raise ValueError(f"got unit {unit!r}, expected {', '.join(UNITS)} or .2f and the like")
        return float(found), UNITS.get(unit) or (lambda value: format(value, unit))
    if row["ours"]["seconds"] is None:
        raise ValueError(f"ours is {row['ours']['status']}")
    if field == "ours":
        return float(row["ours"]["seconds"]["median"]), seconds
    if field == "floor" and row["floor"]:
        return float(row["floor"]["fraction"]["median"]), share
    equal = {p["name"]: float(p["ratio"]["median"]) for p in row["peers"] if p["status"] == "ok" and p["ratio"]}
    if field == "best" and equal:
        return min(equal.values()), ratio
    if " or " in field:
        chosen = {name: number for name, number in equal.items() if name in field.split(" or ")}
        if chosen:
            return min(chosen.values()), ratio
    if field not in equal:
        raise ValueError(
            f"got no equal {field!r}, expected ours, floor, best or one of {', '.join(equal) or 'no peer'}"
        )
    return equal[field], ratio


def _has(value: Any, name: str) -> bool:
    return isinstance(value, dict) and name in value


def value(reference: str, results: Path = SHIPPED) -> str:
    """The figure as text. ValueError, naming the reference, where the results do not hold it."""
    parts = [part.strip() for part in reference.split(" / ")]
    if len(parts) != 3:
        raise ValueError(f"{reference!r}: got {len(parts)} parts, expected FILE / ROW / FIELD")
    file, title, field = parts
    path = source(file, results)
    content = _content(path, path.stat().st_mtime)
    try:
        if title == "-":
            number, write = _number(content, field)
            return write(number)
        rows = content["rows"]
        if title.startswith("~"):
            found = [row for row in rows if re.search(title[1:], _title(row))]
            numbers = [_number(row, field) for row in found]
            if not numbers:
                raise ValueError("no row has it")
            low, high = min(n for n, _ in numbers), max(n for n, _ in numbers)
            if field.endswith(" 1/x"):
                low, high = high, low
            return _range(low, high, numbers[0][1])
        exact = [row for row in rows if _title(row) == title]
        if len(exact) != 1:
            raise ValueError(f"got {len(exact)} rows of that name, expected one")
        number, write = _number(exact[0], field)
        return write(number)
    except ZeroDivisionError:
        raise ValueError(f"{reference!r}: {path.name}: the figure is 0, expected a ratio") from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{reference!r}: {path.name}: got no {error}") from None
    except ValueError as error:
        raise ValueError(f"{reference!r}: {path.name}: {error}") from None


def _range(low: float, high: float, write: Callable[[float], str]) -> str:
    """ "1.03 to 1.11x": the unit once, where both have the same."""
    first, last = write(low), write(high)
    if first == last:
        return first
    for unit in ("x", " %", " ms", " us", " s"):
        if first.endswith(unit) and last.endswith(unit):
            return f"{first.removesuffix(unit)} to {last}"
    return f"{first} to {last}"
