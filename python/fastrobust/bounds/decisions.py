"""Which ways to the same bounds a call may take, and what was decided in it.

Each deciding function asks ``allowed`` first, says with ``declined`` why its way is not the one, and with ``took`` that
it is. An explanation therefore is what the deciding code said, and an override is what it asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

WAYS: dict[str, str] = {
    "one call": "intervals of a small chain, one call of the compiled module",
    "graph op": "lines from intervals, or intervals, of a graph of stages, one op",
    "neuron kernel": "rows of single neurons of an image to the input, one kernel, living neurons alone",
    "image kernel": "rows of images to the input, one kernel, living neurons alone",
    "living layers": "rows through a chain to the input, living neurons alone",
    "convolution kernel": "recorded rows through convolutions to the input, one kernel",
    "walk": "node by node",
    "slope search": "node by node, again and again with better slopes",
}


class Decision(NamedTuple):
    """way: of ``WAYS``, or "rows" where rows begin; node: number in the graph, None for the call; taken; why not."""

    way: str
    node: int | None = None
    taken: bool = True
    why: str = ""


_FORBIDDEN: ContextVar[frozenset[str]] = ContextVar("fastrobust_forbidden_ways", default=frozenset())
_LOG: ContextVar[list[Decision] | None] = ContextVar("fastrobust_decisions", default=None)


def allowed(way: str) -> bool:
    if way not in _FORBIDDEN.get():
        return True
    declined(way, "not allowed here (fr.bounds.ways)")
    return False


def declined(way: str, why: str, node: int | None = None) -> Any:
    """None, so that a function that gives bounds or None can return it."""
    log = _LOG.get()
    if log is not None:
        log.append(Decision(way, node, False, why))
    return None


def took(way: str, node: int | None = None) -> None:
    log = _LOG.get()
    if log is not None:
        log.append(Decision(way, node))


@contextmanager
def recorded() -> Iterator[list[Decision]]:
    """Within, decisions go to the list, in order."""
    log: list[Decision] = []
    token = _LOG.set(log)
    try:
        yield log
    finally:
        _LOG.reset(token)


@contextmanager
def ways(*only: str, without: str | Iterable[str] = ()) -> Iterator[None]:
    """Within, ``compute_bounds`` and what is made of it take none but these ways, or none of ``without``.

    Names are those of ``fr.bounds.WAYS``; "walk", the engine that goes node by node, is always left, so that
    ``ways("walk")`` means the engine alone. Bounds are the same up to rounding: for tests, and for those who know
    better than the rules of cost. Holds for the current thread (and asyncio task); nested uses add up.

    Raises ValueError for names that are no ways.
    """
    gone = {without} if isinstance(without, str) else set(without)
    for name in (*only, *gone):
        if name not in WAYS:
            raise ValueError(f"ways: got {name!r}, expected some of {', '.join(map(repr, WAYS))}")
    if only:
        gone |= WAYS.keys() - set(only)
    token = _FORBIDDEN.set(_FORBIDDEN.get() | (gone - {"walk"}))
    try:
        yield
    finally:
        _FORBIDDEN.reset(token)
