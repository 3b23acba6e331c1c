"""Cache sizes, the memory a working set lives in, copies, and peak memory."""

import subprocess
import sys

import pytest
import torch

from fastrobust.benchmarks import floors

CPU = torch.device("cpu")


@pytest.mark.parametrize(("text", "size"), [("48K\n", 49152), ("32768K", 32 << 20), ("2M", 2 << 20), ("512", 512)])
def test_parse_size(text, size):
    assert floors.parse_size(text) == size


def test_cache_sizes_reads_the_data_caches(tmp_path):
    described = [
        ("1", "Data", "48K"),
        ("1", "Instruction", "32K"),
        ("2", "Unified", "1024K"),
        ("3", "Unified", "32768K"),
    ]
    for number, (level, kind, size) in enumerate(described):
        index = tmp_path / f"index{number}"
        index.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(text + "\n")
    (tmp_path / "index9").mkdir()  # unreadable entries are passed over
    assert floors.cache_sizes(str(tmp_path)) == {"L1": 48 << 10, "L2": 1 << 20, "L3": 32 << 20}


def test_cache_sizes_of_a_system_that_does_not_say(tmp_path):
    assert floors.cache_sizes(str(tmp_path / "absent")) == {}


def test_memory_level_adds_up_the_caches_of_the_threads():
    caches = {"L1": 100, "L2": 1000, "L3": 5000}
    levels = [floors.memory_level(size, CPU, 2, caches) for size in (200, 201, 2000, 2001, 5000, 5001)]
    assert levels == ["L1", "L2", "L2", "L3", "L3", "DRAM"]
    assert floors.memory_level(200, CPU, 1, caches) == "L2"
    assert floors.memory_level(1, CPU, 1, {}) == "DRAM"


def test_copies_move_half_in_and_half_out():
    calls = floors.copy_calls(8000, CPU)
    assert set(calls) == {"torch copy_", "numpy copyto"}
    target = calls["torch copy_"]()
    assert target.nbytes == 4000
    assert bool((target == 1).all())


def test_machine_measures_positive_rates():
    machine = floors.Machine.measure(CPU, 1, scale=1 / 64)
    assert machine.copy_bandwidth > 1e7
    assert machine.matrix_rate > 1e7


PEAKS = """
import torch
from fastrobust.benchmarks import memory

size = 64 << 20  # bytes; blocks of more than 32 MB go back to the system as soon as they are freed
a = torch.zeros(size // 4)


def two_at_once():
    b = a + 1
    return b + 1


def one_after_the_other():
    for _ in range(4):
        b = a + 1
        del b


two_at_once()
for f in (two_at_once, one_after_the_other, lambda: a.add_(1)):
    peak = memory.peak_bytes(f, torch.device("cpu"))
    print(-1.0 if peak is None else peak / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident set sizes are read from /proc")
def test_peak_memory_counts_what_is_held_at_once():
    """In a process of its own: what other tests did to the heap decides when blocks go back to the system."""
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    two, one, none = map(float, done.stdout.split())
    if two < 0:
        pytest.skip("the system does not let a process reset its peak resident set")
    assert 1.9 < two < 2.5 and 0.9 < one < 1.5 and none < 0.3
