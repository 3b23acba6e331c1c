"""Profiles, markers and shared fixtures."""

from __future__ import annotations

import os
import pathlib

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile("default", max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("sanitised", max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import fastrobust

    no_gpu = not torch.cuda.is_available() or not fastrobust.build_info()["cuda_toolkit"]
    no_data = "FASTROBUST_DATA" not in os.environ
    for item in items:
        if "cuda" in item.keywords and no_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and a build with CUDA kernels"))
        if "data" in item.keywords and no_data:
            item.add_marker(pytest.mark.skip(reason="needs FASTROBUST_DATA, the folder with mnist.npz"))


@pytest.fixture(scope="session")
def data_dir() -> pathlib.Path:
    return pathlib.Path(os.environ["FASTROBUST_DATA"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
