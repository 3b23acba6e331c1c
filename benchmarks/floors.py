"""The least time a piece of work can take on this machine, measured in the same run.

Bytes are bounded by a plain copy that moves as many (half read, half written), timed in the rounds of the row
itself; its working set equals the row's, so the copy lives in the same cache, or in DRAM, as the work does.
Operations are bounded by the rate of a large matrix product, by the fastest engine that torch has for it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

from .case import Call

MATRIX_SIZE = {"cpu": 1536, "cuda": 8192}
COPY_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}


def parse_size(text: str) -> int:
    """Bytes of a size as sysfs writes it: "48K", "32768K", "2M"."""
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


def cache_sizes(root: str = "/sys/devices/system/cpu/cpu0/cache") -> dict[str, int]:
    """Bytes of the data caches one core sees, by "L1", "L2", "L3"; empty where the system does not say."""
    sizes: dict[str, int] = {}
    for index in sorted(Path(root).glob("index*")):
        try:
            if (index / "type").read_text().strip() == "Instruction":
                continue
            name = "L" + (index / "level").read_text().strip()
            sizes[name] = parse_size((index / "size").read_text())
        except (OSError, ValueError):
            continue
    return sizes


def memory_level(working_set: int, device: torch.device, threads: int, caches: dict[str, int] | None = None) -> str:
    """The smallest memory that holds the working set: "L1", "L2", "L3" or "DRAM" ("HBM" on a GPU).

    L1 and L2 belong to a core, so threads that share the work add theirs up.
    """
    if device.type == "cuda":
        level2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        return "L2" if working_set <= level2 else "HBM"
    for name, size in sorted((cache_sizes() if caches is None else caches).items()):
        if working_set <= size * (threads if name in ("L1", "L2") else 1):
            return name
    return "DRAM"


def copy_calls(moved: int, device: torch.device) -> dict[str, Call]:
    """Plain copies that read moved / 2 bytes and write as many, by the name of who copies."""
    count = max(moved // 8, 1)
    source = torch.ones(count, device=device)
    target = torch.zeros(count, device=device)
    calls: dict[str, Call] = {"torch copy_": lambda: target.copy_(source)}
    if device.type == "cpu":
        try:
            import numpy
        except ImportError:
            return calls
        from_, to = source.numpy(), target.numpy()
        calls["numpy copyto"] = lambda: numpy.copyto(to, from_)
    return calls


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(call: Call, device: torch.device, times: int = 5) -> float:
    """The shortest of a few calls after a warm-up."""
    call()
    best = float("inf")
    for _ in range(times):
        synchronise(device)
        begin = time.perf_counter()
        call()
        synchronise(device)
        best = min(best, time.perf_counter() - begin)
    return best


@dataclass(frozen=True)
class Machine:
    """Measured limits of the device, for the head of the report and the operation floors."""

    device: torch.device
    threads: int
    copy_bandwidth: float  # bytes a second, read plus written, from DRAM
    matrix_rate: float  # float32 operations a second

    @classmethod
    def measure(cls, device: torch.device, threads: int, *, scale: float = 1.0) -> Machine:
        """scale < 1 shrinks the measured sizes (a smoke run)."""
        moved = int(2 * COPY_BYTES[device.type] * scale)
        size = max(int(MATRIX_SIZE[device.type] * scale), 64)
        a = torch.rand(size, size, device=device)
        b = torch.rand(size, size, device=device)
        product = torch.empty_like(a)
        calls: list[Call] = [lambda: torch.mm(a, b, out=product)]
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            # the matrix library does not use AVX-512 on every processor that has it; oneDNN does
            line, kernel = a.view(1, size, 1, size).permute(0, 3, 1, 2), b.view(size, size, 1, 1)
            calls.append(lambda: torch.conv_transpose2d(line, kernel))
        matrix = min(best_seconds(call, device) for call in calls)
        copy = min(best_seconds(call, device) for call in copy_calls(moved, device).values())
        return cls(device, threads, moved / copy, 2.0 * size**3 / matrix)
