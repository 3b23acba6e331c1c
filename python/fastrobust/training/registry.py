"""Training methods by name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from .method import Method

METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Decorator: the method can be asked for by that name."""

    def add(cls: type[Method]) -> type[Method]:
        cls.name = name
        METHODS[name] = cls
        return cls

    return add


register("plain")(Method)


def methods() -> dict[str, type[Method]]:
    """Every method by its name; a class called without arguments has its paper's settings."""
    return dict(sorted(METHODS.items()))


def make(method: str | Method, **options: Any) -> Method:
    """The method of that name with ``options`` for its constructor; an object is handed back as it is.

    Raises:
        ValueError: no such name, or an option that the method does not have (both say which there are).
        TypeError: neither a name nor a Method, or options for an object.
    """
    if isinstance(method, Method):
        if options:
            raise TypeError(f"method: got an object and options for it ({', '.join(options)}), expected one of the two")
        return method
    if not isinstance(method, str):
        raise TypeError(f"method: got {type(method).__name__}, expected a name or a Method")
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(methods())}{hint}")
    known = options_of(METHODS[method])
    for name in options:
        if known is not None and name not in known:
            there = ", ".join(known) or "none"
            raise ValueError(f"{method}: got option {name!r}, expected one of its own ({there})")
    return METHODS[method](**options)


def options_of(cls: type[Method]) -> dict[str, Any] | None:
    """Names and defaults of a method's options (``inspect.Parameter.empty`` where one must be given), with those that
    it hands on to its base class; None: it takes any."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base) or base is object:
            continue
        parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        for p in parameters:
            if p.name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                found.setdefault(p.name, p.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found
    return None if any("__init__" in vars(b) for b in cls.__mro__ if b is not object) else {}


__all__ = ["METHODS", "make", "methods", "options_of", "register"]
