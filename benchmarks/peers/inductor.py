"""torch.compile with its default backend, applied to the formulas of peers/eager.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..case import Unavailable

_BROKEN: dict[str, str] = {}  # by kind of device; on the CPU the backend needs a C++ compiler


def compiled(function: Callable[..., Any], *example: torch.Tensor) -> Callable[..., Any]:
    """The function compiled for the shapes of the example, and called once with it.

    Raises `Unavailable` where torch.compile does not work; the first failure stands for all that follow, since each
    attempt takes seconds.
    """
    kind = example[0].device.type
    if kind in _BROKEN:
        raise Unavailable(_BROKEN[kind])
    torch._dynamo.reset()  # rows share code objects: earlier shapes would count towards the recompile limit
    try:
        fast = torch.compile(function, dynamic=False, fullgraph=True)
        fast(*example)
    except Exception as error:  # the compiler's, the backend's or the driver's
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _BROKEN[kind] = f"torch.compile does not work here ({lines[0][:120]})"
        raise Unavailable(_BROKEN[kind]) from None
    return fast
