"""What a run ran on: hardware, versions, build, threads, date and load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from .floors import cache_sizes

LIBRARIES = (
    "numpy",
    "torchattacks",
    "foolbox",
    "adversarial-robustness-toolbox",
    "auto_LiRPA",
    "autoattack",
    "scikit-learn",
    "scipy",
    "matplotlib",
)


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def gpu_name(device: torch.device) -> str | None:
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm_{properties.major}{properties.minor}"


def versions() -> dict[str, str]:
    """Version of every library of LIBRARIES that is installed."""
    found: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def build_info() -> dict[str, Any]:
    """fastrobust's own account of its build; empty where the package is not importable."""
    try:
        import fastrobust
    except ImportError:
        return {}
    return dict(fastrobust.build_info())


def load_average() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def collect(device: torch.device, level: str) -> dict[str, Any]:
    """The metadata of a run about to start."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "level": level,
        "device": str(device),
        "cpu": cpu_name(),
        "cpus": usable_cpus(),
        "caches": cache_sizes(),
        "gpu": gpu_name(device),
        "threads": torch.get_num_threads(),
        "load": load_average(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "libraries": versions(),
        "build": build_info(),
    }
