"""torch.compile with its default backend, applied to the formulas of peers/eager.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..case import Unavailable

_BROKEN: dict[str, str] = {}


def _probe(device: torch.device) -> str:
    """Why torch.compile cannot be used on the device; "" when it can. On the CPU it needs a C++ compiler."""
    key = device.type
    if key not in _BROKEN:
        try:
            torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(4, device=device))
            _BROKEN[key] = ""
        except Exception as error:  # the compiler's, the backend's or the driver's
            text = str(error).strip().splitlines() or [type(error).__name__]
            _BROKEN[key] = f"torch.compile does not work here ({text[0][:120]})"
    return _BROKEN[key]


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function compiled for fixed shapes; raises `Unavailable` where torch.compile does not work."""
    reason = _probe(device)
    if reason:
        raise Unavailable(reason)
    torch._dynamo.reset()  # rows share code objects: earlier shapes would count towards the recompile limit
    return torch.compile(function, dynamic=False, fullgraph=True)
