"""The types of arguments and results of the public API, as mypy sees them."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import fastrobust as fr

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("ops", "attacks", "bounds", "certify", "data", "models", "nn", "training", "analysis")


def public() -> list[str]:
    """Every public function and class, one module deep as well: analysis.fosc, training.schedules."""
    found = []
    for family in FAMILIES:
        module = getattr(fr, family)
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value):
                found += [f"{family}.{name}.{inner}" for inner in getattr(value, "__all__", ())]
            else:
                found.append(f"{family}.{name}")
    return [name for name in found if callable(_value(name))]


def _value(name: str) -> object:
    value: object = fr
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_mypy_accepts_and_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strict user's file: of calls that ought to be refused and are not an ignore is left over, which is an error;
    and no public function or class is Any, takes any arguments at all, or returns Any."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    monkeypatch.setenv("MYPYPATH", str(ROOT / "python"))
    monkeypatch.chdir(tmp_path)
    names = public()
    assert len(names) > 120
    (tmp_path / "user.py").write_text("import fastrobust as fr\n" + "".join(f"reveal_type(fr.{n})\n" for n in names))
    files = ["user.py", *(str(ROOT / "tests" / "typing" / f"{family}.py") for family in ("attacks", "bounds"))]
    out, err, _ = api.run(["--config-file=", "--strict", "--follow-imports=silent", "--ignore-missing-imports", *files])
    lines = out.splitlines()
    assert not err and not [line for line in lines if " error: " in line], out
    revealed = {
        int(m[1]): m[2] for line in lines if (m := re.match(r'user\.py:(\d+): note: Revealed type is "(.*)"', line))
    }
    assert [*revealed] == [*range(2, len(names) + 2)]
    unknown = re.compile(r"^Any$| -> Any$|^def \(\*\w+: Any, \*\*\w+: Any\)")
    assert not {n: text for n, text in zip(names, revealed.values(), strict=True) if unknown.search(text)}
