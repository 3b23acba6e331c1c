"""One script on every CPU variant that this processor runs."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile

import fastrobust as fr

# Importing torch takes longer than most of the scripts. This process has done it, and nothing else: fastrobust is
# imported by the children, one for each script, under the environment that they are to have.
SERVER = """
import json, os, sys, traceback, torch
for line in sys.stdin:
    job = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in ((1, job["out"]), (2, job["err"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_TRUNC), number)
    code = 0
    try:
        os.environ.update(job["environment"])
        sys.path[1:1] = job["environment"].get("PYTHONPATH", "").split(os.pathsep)
        exec(compile(job["script"], "script", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
"""


@functools.cache
def server() -> subprocess.Popen[str]:
    """Ends with this process, whose end closes its input."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def run_script(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """As ``python -c script`` in this environment, without the import of torch."""
    process = server()
    assert process.stdin is not None and process.stdout is not None
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        job = {"script": script, "environment": environment, "out": out.name, "err": err.name}
        process.stdin.write(json.dumps(job) + "\n")
        code = process.stdout.readline()
        assert code, "the process that runs the scripts has ended"
        return subprocess.CompletedProcess(script, int(code), out.read(), err.read())


def outputs_by_variant(script: str, **environment: str) -> dict[str, list[str]]:
    """Words that ``script`` (which has ``fr``) prints, by variant; the variant asked for is the one that ran."""
    results = {}
    for variant in fr._C.cpu_variants.split(","):
        check = "\nprint(fr._C.cpu_variant())\n"
        done = run_script(script + check, {**os.environ, "FASTROBUST_CPU": variant, **environment})
        if "that this processor supports" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        *words, used = done.stdout.split()
        assert used == variant
        results[variant] = words
    assert results
    return results
