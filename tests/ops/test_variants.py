"""Every CPU variant of the build gives the same bits: one process each, the results compared by hash."""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest

import fastrobust
from variant_runs import run_script

DIGEST = pathlib.Path(__file__).parents[1] / "pgd_digest.py"
SCRIPT = """import runpy, sys
sys.path.insert(0, {folder!r})
sys.argv = {words}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
INFO = "import fastrobust; i = fastrobust.build_info(); print(i['cpu_variant'], i['cpu_variant_reason'])"


def run(variant: str, script: str = INFO) -> subprocess.CompletedProcess[str]:
    return run_script(script, os.environ | {"FASTROBUST_CPU": variant})


def usable() -> list[str]:
    """The build's variants that this processor runs, the plainest first."""
    info = fastrobust.build_info()
    best = run("").stdout.split()[0]
    return info["cpu_variants"][: info["cpu_variants"].index(best) + 1]


def test_variants_and_threads_give_the_same_bits() -> None:
    variants = usable()
    want: dict[str, str] = {}
    for variant, threads in [(v, "1") for v in variants] + [(variants[-1], "2")]:
        done = run(variant, SCRIPT.format(folder=str(DIGEST.parent), words=[str(DIGEST), variant, threads]))
        assert done.returncode == 0, done.stderr
        got = dict(line.rsplit(" ", 1) for line in done.stdout.splitlines())
        assert len(got) > 15
        want = want or got
        different = [k for k in got if got[k] != want[k]]
        assert not different, f"{variant} with {threads} threads differs from {variants[0]}"


@pytest.mark.parametrize("wish", ["v9", "avx"])
def test_unknown_variant_is_an_error_that_names_it(wish) -> None:
    done = run(wish)
    assert done.returncode != 0 and f"FASTROBUST_CPU: got '{wish}', expected one of " in done.stderr


def test_wish_is_followed_and_explained() -> None:
    first = usable()[0]
    assert run(first).stdout.split() == [first, f"FASTROBUST_CPU={first}"]
