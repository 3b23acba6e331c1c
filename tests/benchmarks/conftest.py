"""The suites are installed as fastrobust.benchmarks. Where the package is used from the checkout without being
installed, they are the checkout's top-level folder, and get that name here."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("fastrobust.benchmarks") is None:
    folder = Path(__file__).resolve().parents[2] / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "fastrobust.benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["fastrobust.benchmarks"] = package
    spec.loader.exec_module(package)
