"""Freed activations must not be handed back to the system between the steps of an attack (glibc)."""

import os
import platform
import subprocess
import sys

import pytest

# Without keep_pages every repetition of such a pass takes hundreds to thousands of faults: its 24 MB are freed to the
# top of the heap.
SCRIPT = """
import resource
import torch
import fastrobust as fr

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(1, 16, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.ReLU(),
    torch.nn.Flatten(), torch.nn.Linear(16 * 28 * 28, 10),
).requires_grad_(False)
x, y = torch.rand(64, 1, 28, 28), torch.randint(10, (64,))
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fr.attacks.pgd(model, x, y, eps=0.1, steps=5, random_start=False)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults[1:]))
"""


def _faults(**variables: str) -> int:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"))}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=plain | {"OMP_NUM_THREADS": "1"} | variables, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the threshold is glibc's")
def test_repeated_attacks_take_no_page_faults() -> None:
    assert _faults() < 200


def test_the_heap_is_left_alone_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastrobust._heap import keep_pages

    monkeypatch.setenv("FASTROBUST_KEEP_PAGES", "0")
    assert keep_pages.__wrapped__() is False
