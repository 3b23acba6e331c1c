"""Pages of freed activations stay with the process instead of being handed back and faulted in again."""

from __future__ import annotations

import functools
import os
import platform

import torch

# The largest block that teaches glibc (32 MiB, less what a block carries besides its contents).
_BLOCK = (32 << 20) - (64 << 10)


@functools.cache
def keep_pages() -> bool:
    """Once a process: let glibc keep up to 64 MiB of freed heap; True when it was asked to.

    A pass through a network frees all of its activations at its end. glibc then returns the top of the heap to the
    system when it is larger than a threshold, and the next pass takes every page as a fault again: a quarter of the time
    of a small network. The threshold adapts to twice the largest block that was mapped and freed (mallopt(3),
    M_MMAP_THRESHOLD), so mapping and freeing one block of the largest size that counts raises it to 64 MiB, as any
    program that frees a tensor of 32 MB does; no page of it is touched. A process that sets its own thresholds
    (MALLOC_TRIM_THRESHOLD_ and the like) keeps them. ``FASTROBUST_KEEP_PAGES=0`` leaves the heap alone.
    """
    if os.environ.get("FASTROBUST_KEEP_PAGES", "1") == "0" or platform.libc_ver()[0] != "glibc":
        return False
    block = torch.empty(_BLOCK, dtype=torch.uint8)
    del block
    return True
