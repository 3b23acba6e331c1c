"""The types of arguments and results of the public API, as mypy sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("family", ["attacks", "bounds"])
def test_mypy_accepts_and_refuses(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that ought to be refused and is not leaves an unused ignore, which is an error."""
    api = pytest.importorskip("mypy.api", reason="mypy is not installed")
    monkeypatch.setenv("MYPYPATH", str(ROOT / "python"))
    monkeypatch.chdir(tmp_path)
    file = str(ROOT / "tests" / "typing" / f"{family}.py")
    out, err, status = api.run(
        ["--config-file=", "--warn-unused-ignores", "--follow-imports=silent", "--ignore-missing-imports", file]
    )
    assert (status, err) == (0, ""), out
