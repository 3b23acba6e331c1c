"""The suites are installed as fastrobust.benchmarks. Where the package is used from the checkout without being
installed, they are the checkout's top-level folder, and get that name here."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("fastrobust.benchmarks") is None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "fastrobust.benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["fastrobust.benchmarks"] = package
    spec.loader.exec_module(package)


@pytest.fixture(autouse=True)
def one_thread():
    """Rounds of short calls on a busy machine: waiting for a second thread would be most of the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
