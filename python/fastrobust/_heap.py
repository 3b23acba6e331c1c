"""Pages of freed activations stay with the process instead of being handed back and faulted in again."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from typing import Any

import torch

# The largest block that teaches glibc (32 MiB, less what a block carries besides its contents).
_BLOCK = (32 << 20) - (64 << 10)


@functools.cache
def keep_pages() -> bool:
    """Once a process: let glibc keep up to 64 MiB of freed heap; True when it was asked to.

    A pass through a network frees all of its activations at its end. glibc then returns the top of the heap to the
    system when it is larger than a threshold, and the next pass takes every page as a fault again: a quarter of the
    time of a small network. The threshold adapts to twice the largest block that was mapped and freed (mallopt(3),
    M_MMAP_THRESHOLD), so mapping and freeing one block of the largest size that counts raises it to 64 MiB, as any
    program that frees a tensor of 32 MB does; no page of it is touched. A process that sets its own thresholds
    (MALLOC_TRIM_THRESHOLD_ and the like) keeps them. ``FASTROBUST_KEEP_PAGES=0`` leaves the heap alone.
    """
    if os.environ.get("FASTROBUST_KEEP_PAGES", "1") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    block = torch.empty(_BLOCK, dtype=torch.uint8)
    del block
    return True


class _Usage(ctypes.Structure):
    """struct mallinfo2 (mallinfo(3), glibc 2.33)."""

    _fields_ = [
        (n, ctypes.c_size_t)
        for n in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


@functools.cache
def _library() -> Any:
    """The C library where it tells how much of its heap is free, else None."""
    if platform.libc_ver()[0] != "glibc":
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2") or not hasattr(library, "malloc_trim"):
        return None
    library.mallinfo2.restype = _Usage
    return library


def return_pages(above: int) -> bool:
    """Hands free pages of the heap back to the system when there are more than ``above`` bytes of them; True when it
    did.

    glibc up to 2.37 does not use freed aligned blocks again for aligned blocks of their own size (its bug 14581): a
    loop over large tensors grows the heap many times beyond what is in use.
    """
    library = _library()
    if library is None or library.mallinfo2().fordblks <= above:
        return False
    library.malloc_trim(0)
    return True
