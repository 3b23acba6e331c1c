"""Builds the module with its CUDA kernels compiled for the CPU, once a session, and routes the ops to them."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from fastrobust.ops.bounds import _autograd, _relu_box, intervals
from fastrobust.ops.pgd import _kernels as _pgd_ops
from fastrobust.ops.pgd import losses, square
from fastrobust.ops.pgd import steps as pgd
from fastrobust.ops.polyhedron import distance as polyhedron
from fastrobust.ops.store import _kernels as store

ROOT = pathlib.Path(__file__).parents[2]


def build(folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler to build the emulated kernels")
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11 to build the emulated kernels")
    ninja = shutil.which("ninja", path=os.path.dirname(sys.executable)) or shutil.which("ninja")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    commands = [
        [
            cmake,
            *generator,
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            "-DFASTROBUST_CUDA_EMULATION=ON",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        [cmake, "--build", str(folder), "--parallel", "2"],
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            break
    return done


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    # Kept between sessions, so that only what changed is compiled; the lock is for sessions that run side by side.
    folder = ROOT / "build" / f"emulation-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = build(folder)
        if done.returncode != 0:  # what an older checkout or another generator left there may be in the way
            shutil.rmtree(folder)
            done = build(folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (library,) = folder.glob("_C*.so")
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.cuda_toolkit == "emulated"
    return module


@pytest.fixture
def on_device(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """on_device(op, ...) runs a public op on the emulated CUDA kernels."""

    def run(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as m:
            for module in (_pgd_ops, losses, square, polyhedron, store):
                m.setattr(module, "_C", emulated_module)
                m.setattr(module, "stream_of", lambda device: (0, 0))
                m.setattr(module, "require_cuda_build", lambda device: None)
            m.setattr(pgd, "_is_simple", lambda t: False)  # the fast path is the CPU's
            return op(*args, **kwargs)

    return run


@pytest.fixture
def bounds_on_device(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """bounds_on_device(f, ...) runs f with every op on the emulated CUDA kernels, by the ways of CUDA tensors."""
    wanted = {
        "_C": emulated_module,
        "stream_of": lambda device: (0, 0),
        "require_cuda_build": lambda device: None,
        "on_cpu": lambda t: False,
    }
    modules = [
        m
        for name, m in sys.modules.items()
        if name.startswith("fastrobust.ops") and {"stream_of", "on_cpu"} & {*vars(m)}
    ]
    assert {intervals, _autograd, _relu_box} <= {*modules}

    def run(f: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with monkeypatch.context() as m:
            for module in modules:
                for name, value in wanted.items():
                    if hasattr(module, name):
                        m.setattr(module, name, value)
            return f(*args, **kwargs)

    return run
