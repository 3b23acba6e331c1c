"""What was built, what is used on this machine, and why."""

from __future__ import annotations

import platform
from typing import Any

import torch

from . import _C


def build_info() -> dict[str, Any]:
    """A dictionary that says what this build holds and what it uses here.

    Keys: ``version`` (its local part names the CUDA release, or ``cpu``); ``compiler``; ``cuda_toolkit`` ("" without
    CUDA kernels), ``cuda_architectures``; ``devices`` (names, found by the driver) and ``device_error`` (why there are
    none); ``cpu_variants`` (built), ``cpu_variant`` (in use), ``cpu_variant_reason``; ``threads``, ``thread_backend``;
    ``torch``, ``torch_cuda``, ``python``, ``platform``.
    """
    devices, error = _C.cuda_devices()
    return {
        "version": _C.__version__,
        "compiler": _C.compiler,
        "cuda_toolkit": _C.cuda_toolkit,
        "cuda_architectures": [a for a in _C.cuda_architectures.split(",") if a],
        "devices": list(devices),
        "device_error": error,
        "cpu_variants": _C.cpu_variants.split(","),
        "cpu_variant": _C.cpu_variant(),
        "cpu_variant_reason": _C.cpu_variant_reason(),
        "threads": _C.num_threads(),
        "thread_backend": _C.thread_backend(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
