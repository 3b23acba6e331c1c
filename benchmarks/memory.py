"""Peak memory of one call, beyond what was held before it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

import torch

from .case import Call

_STATUS = "/proc/self/status"
_RESET = "/proc/self/clear_refs"


def _resident() -> tuple[int, int]:
    """Bytes resident now and at the highest since the last reset."""
    now = high = 0
    with open(_STATUS) as status:
        for line in status:
            if line.startswith("VmRSS:"):
                now = int(line.split()[1]) * 1024
            elif line.startswith("VmHWM:"):
                high = int(line.split()[1]) * 1024
    return now, high


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Bytes one call needs at its peak, its result included; None where the system cannot tell.

    On a GPU the caching allocator's own count. On the CPU the growth of the resident set (Linux only), so it holds
    for torch, numpy and compiled code alike; it includes what the C library's heap leaves unused between blocks, and
    pages make it coarse below about 100 KB.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    with contextlib.suppress(AttributeError):  # raised by another C library than glibc
        # free heap pages would otherwise hide what the call takes from them
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open(_RESET, "w") as reset:
            reset.write("5")
        before, _ = _resident()
        call()
        _, high = _resident()
    except OSError:
        return None
    return max(high - before, 0)
