"""``max_memory`` caps what a pass adds to the resident set, not only what it counts itself."""

from __future__ import annotations

import platform

import pytest
import torch
import torch.nn as nn

from combinations import THOROUGH, combinations
from fastrobust.benchmarks.memory import peak_bytes
from fastrobust.bounds import compute_bounds

MB = 1 << 20
NETS = {  # rows of the second layer take 340 MB a matrix without chunks
    "pooled": lambda: [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, 1, 1)],
    "dilated": lambda: [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 2, dilation=2)],
    "windows": lambda: [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1)],
}


USUAL = [(4, False), (32, False), (1024, False), (4, True)]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts pages of glibc's heap")
@pytest.mark.parametrize("name", list(NETS))
@pytest.mark.parametrize(("cap", "wide"), combinations((4, 32, 1024), (False, True)) if THOROUGH else USUAL)
def test_the_resident_set_grows_by_little_more_than_the_cap(name: str, wide: bool, cap: int) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*NETS[name](), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 144, 5)).requires_grad_(False)
    net, x = (net.double(), torch.rand(1, 3, 24, 24).double()) if wide else (net, torch.rand(1, 3, 24, 24))

    def call() -> None:
        with torch.no_grad():
            compute_bounds(net, x, 0.2, method="crown", refine="all", max_memory=cap * MB)

    with torch.no_grad():
        compute_bounds(net, x, 0.2, method="ibp")
    found = peak_bytes(call, torch.device("cpu"))
    if found is None:
        pytest.skip("this system does not tell the resident set")
    # a chunk stays in the cache without a tighter cap; boxes, lines and the heap's free blocks come on top
    assert found <= (min(cap, 96) + 32) * MB
