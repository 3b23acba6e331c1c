"""auto_LiRPA's bounds: computed where it is installed, read from auto_lirpa_bounds.txt elsewhere.

pip cannot install a release of it beside this torch. The file holds what release 0.7.1 returned, one line each: a
digest of all that was asked (weights and points bit for bit), the shape, and the lower and upper bounds. To write it
anew, put a checkout on PYTHONPATH, remove the file and run the tests that import this with
FASTROBUST_RECORD_AUTO_LIRPA=1.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("auto_lirpa_bounds.txt")
Bounds = tuple[Tensor, Tensor]


@functools.cache
def installed() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return __import__("auto_LiRPA")
        except ImportError:
            return None


@functools.cache
def recorded() -> dict[str, str]:
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return dict(line.split(" ", 1) for line in lines)


def auto_lirpa_bounds(
    name: str,
    net: nn.Module,
    x: Tensor,
    p: float,
    eps: float,
    methods: Sequence[str],
    *,
    spec: Tensor | None = None,
    lines: str = "adaptive",
) -> Iterator[tuple[str, Bounds]]:
    """(method, (lower, upper)) for each of ``methods``, of the network called ``name``; skips the test where there is
    neither auto_LiRPA nor a record."""
    peer, model = installed(), None
    for method in methods:
        key = _digest(net, x, spec, f"{name} {p} {eps} {method} {lines}")
        if peer is None:
            if key not in recorded():
                pytest.skip("auto_LiRPA is not installed, and its bounds of these very weights are not recorded")
            yield method, _read(recorded()[key])
            continue
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = model or peer.BoundedModule(net, x, bound_opts={"activation_bound_option": lines}, verbose=False)
            given = peer.BoundedTensor(x, peer.PerturbationLpNorm(norm=p, eps=eps))
            low, up = model.compute_bounds(x=(given,), C=spec, method=method)
        if "FASTROBUST_RECORD_AUTO_LIRPA" in os.environ:
            with FILE.open("a") as file:
                file.write(f"{key} {_written(low, up)}\n")
        yield method, (low, up)


def _digest(net: nn.Module, x: Tensor, spec: Tensor | None, text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for t in (*net.state_dict().values(), x, *(() if spec is None else (spec,))):
        digest.update(str(tuple(t.shape)).encode() + t.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()[:24]


def _written(low: Tensor, up: Tensor) -> str:
    values = torch.stack([low, up]).detach().numpy().astype("<f4")
    return ",".join(map(str, low.shape)) + " " + base64.b85encode(values.tobytes()).decode()


def _read(line: str) -> Bounds:
    shape, text = line.split(" ")
    values = torch.from_numpy(np.frombuffer(base64.b85decode(text), "<f4").astype(np.float32))
    low, up = values.view(2, *map(int, shape.split(",")))
    return low, up
