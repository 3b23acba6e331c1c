"""Profiles, markers and shared fixtures."""

from __future__ import annotations

import gc
import os
import pathlib
import random

import pytest
import torch
from hypothesis import HealthCheck, settings

# By default the same examples in every run: what a change is refused for is what the change did. The others draw anew.
settings.register_profile(
    "default", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("sanitised", max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "default")
settings.load_profile(PROFILE)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run at most this many of the parameter sets of each test, drawn with a fixed seed"
    parser.addoption("--at-most", type=int, metavar="N", help=text)


def sample(items: list[pytest.Item], most: int) -> list[pytest.Item]:
    """At most ``most`` items of each test function, always the same ones."""
    of_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_test.setdefault(item.nodeid.split("[")[0], []).append(item)
    drawn = {item for name, some in of_test.items() for item in random.Random(name).sample(some, min(most, len(some)))}
    return [item for item in items if item in drawn]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import fastrobust

    kept = [item for item in items if PROFILE == "thorough" or "thorough" not in item.keywords]
    if (most := config.getoption("--at-most")) is not None:
        kept = sample(kept, most)
    left_out = set(items) - set(kept)
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = kept
    no_gpu = not torch.cuda.is_available() or not fastrobust.build_info()["cuda_toolkit"]
    no_data = "FASTROBUST_DATA" not in os.environ
    for item in items:
        if "cuda" in item.keywords and no_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and a build with CUDA kernels"))
        if "data" in item.keywords and no_data:
            item.add_marker(pytest.mark.skip(reason="needs FASTROBUST_DATA, the folder with mnist.npz"))


def pytest_collection_finish() -> None:
    """What is there now stays: a collection of garbage would go through all of torch and twenty thousand tests, which
    takes half a second, and benchmarks collect for every row."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    return pathlib.Path(os.environ["FASTROBUST_DATA"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
