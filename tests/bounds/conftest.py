"""What the tests of bounds share."""

from collections.abc import Iterator

import pytest

from fastrobust.bounds import ways


@pytest.fixture
def engine_alone() -> Iterator[None]:
    """No op gives the bounds of a whole call: the engine goes through the graph, with all of its kernels."""
    with ways(without=("one call", "graph op")):
        yield
