"""One script on every CPU variant that this processor runs."""

from __future__ import annotations

import os
import subprocess
import sys

import fastrobust as fr


def outputs_by_variant(script: str, **environment: str) -> dict[str, list[str]]:
    """Words that ``script`` (which has ``fr``) prints, by variant; the variant asked for is the one that ran."""
    results = {}
    for variant in fr._C.cpu_variants.split(","):
        env = {**os.environ, "FASTROBUST_CPU": variant, **environment}
        check = "\nprint(fr._C.cpu_variant())\n"
        done = subprocess.run([sys.executable, "-c", script + check], env=env, capture_output=True, text=True)
        if "that this processor supports" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        *words, used = done.stdout.split()
        assert used == variant
        results[variant] = words
    assert results
    return results
