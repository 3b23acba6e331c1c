"""Rows of every kind that the solver has to get right, float32, by name."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

from polyhedron_oracle import close_and_never_above, exact_signed

KINDS = ("normal", "sparse", "heavy", "power", "geometric", "equal", "faces", "zero_width", "tiny", "huge")
FRACTIONS = (1e-6, 0.01, 0.3, 0.9, 0.9999, 1.2)


def rows(kind: str, count: int, size: int, seed: int = 0):
    """a (count, size), b (count), lower, upper (count, size) as float32; b is a fraction of what the box allows."""
    rng = np.random.default_rng([seed, KINDS.index(kind), size])
    a = rng.standard_normal((count, size))
    x = rng.random((count, size))
    if kind == "sparse":
        a *= rng.random((count, size)) < 0.05
    if kind == "heavy":
        a = rng.standard_cauchy((count, size)) ** 3
    if kind == "power":
        a *= np.arange(1, size + 1) ** -1.5
    if kind == "geometric":
        a = np.sign(a) * 0.5 ** (np.arange(size) % 60)
    if kind == "equal":
        a, x = np.sign(a), np.full_like(x, 0.25)
    if kind == "faces":
        x = rng.choice([0.0, 1.0, 0.5], x.shape)
    if kind == "tiny":
        a *= 1e-30
    if kind == "huge":
        a *= 1e30
    a, x = a.astype(np.float32), x.astype(np.float32)
    lower, upper = -x, np.float32(1) - x
    if kind == "zero_width":
        shut = rng.random((count, size)) < 0.5
        lower, upper = np.where(shut, np.float32(0), lower), np.where(shut, np.float32(0), upper)
    room = (np.abs(a.astype(np.float64)) * np.where(a > 0, -lower, upper)).sum(1)
    b = (room * rng.choice(FRACTIONS, count)).astype(np.float32)
    return a, b, lower, upper


def staircase(size: int = 40):
    """The constructed row on which the greedy algorithm fixes one coordinate an iteration, more than 20 in all."""
    a = (0.5 ** np.arange(size)).astype(np.float32)
    room = (1.5 ** np.arange(size) * 1e-3).astype(np.float32)
    lower, upper = -room, room
    return a[None], lower[None], upper[None]


def short_rows(most: int):
    """Rows of (a, room below, room above) for property tests."""
    entry = st.tuples(st.floats(-4, 4, width=32), st.floats(0, 1, width=32), st.floats(0, 1, width=32))
    return st.lists(entry, min_size=1, max_size=most)


def check_signed(solver, p, row, b) -> None:
    """A solver of problem (3.14) against exact rationals, on either side of the hyperplane."""
    a, down, up = (np.array(column, np.float32) for column in zip(*row, strict=True))
    got = solver(*map(torch.tensor, (a, np.float32(b), -down, up)), p, signed=True)
    close_and_never_above(got.reshape(1), [exact_signed(a, b, -down, up, p)])
