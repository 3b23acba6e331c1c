"""Adapters to the libraries ours is compared with.

An adapter imports its library when it is asked to build a call, and raises `Unavailable` with one line when the
library is missing or cannot be used; nothing else of the benchmarks imports a peer.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from ..case import Unavailable

_SEEN: dict[str, ModuleType | str] = {}


def require(module: str, install: str | None = None) -> ModuleType:
    """The peer's module, or `Unavailable` naming what to install. The answer is remembered, failures too."""
    if module not in _SEEN:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _SEEN[module] = importlib.import_module(module)
        except ImportError as error:
            own = (error.name or "").split(".")[0] == module.split(".")[0]
            wanted = install or module
            what = "not installed" if own else f"installed, but its import fails ({error})"
            _SEEN[module] = f"{what} (pip install {wanted})" if own else what
        except Exception as error:  # whatever an incompatible version raises at import
            _SEEN[module] = f"installed, but its import fails ({type(error).__name__}: {error})"
    found = _SEEN[module]
    if isinstance(found, str):
        raise Unavailable(found)
    return found
