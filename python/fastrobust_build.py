"""The build backend: scikit-build-core's, with a version that says what a wheel holds.

``0.1.0+cpu`` has no CUDA kernels, ``0.1.0+cu130`` has those of CUDA 13.0 and the CPU's (a local version, PEP 440, as
torch has). Metadata is written before CMake runs, so that whether CUDA is built is decided here and told to CMake,
which refuses a version that is not what it builds. A source archive has no local part, and installers refuse a wheel
made from one if its version is another; those say it in their build tag, ``fastrobust-0.1.0-0cu130-cp311-...``.

It is the provider of pyproject.toml's dynamic fields, too: ``version``, and ``readme`` without links that lead nowhere
outside the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import (  # noqa: F401
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

Settings = Mapping[str, Any]
OPTION = "FASTROBUST_CUDA"
_local = ""  # of the build that goes on


def build_sdist(directory: str, config_settings: Settings | None = None) -> str:
    global _local
    _local = ""
    return _build.build_sdist(directory, dict(config_settings or {}))


def build_wheel(directory: str, config_settings: Settings | None = None, metadata: str | None = None) -> str:
    return _build.build_wheel(directory, _decide(config_settings), metadata)


def build_editable(directory: str, config_settings: Settings | None = None, metadata: str | None = None) -> str:
    return _build.build_editable(directory, _decide(config_settings), metadata)


def prepare_metadata_for_build_wheel(directory: str, config_settings: Settings | None = None) -> str:
    return _build.prepare_metadata_for_build_wheel(directory, _decide(config_settings))


def prepare_metadata_for_build_editable(directory: str, config_settings: Settings | None = None) -> str:
    return _build.prepare_metadata_for_build_editable(directory, _decide(config_settings))


def dynamic_metadata(field: str, settings: Settings) -> Any:
    """scikit-build-core's hook: the value of one field that pyproject.toml calls dynamic."""
    if field == "version":
        return public_version(Path("python/fastrobust/_version.py").read_text()) + _local
    text = absolute_links(Path("README.md").read_text(), settings.get("source"))
    return {"content-type": "text/markdown", "text": text}


def public_version(text: str) -> str:
    found = re.search(r'^__version__ = "([^"+]+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('_version.py: expected one line __version__ = "..." without a local part')
    return found[1]


def absolute_links(markdown: str, source: str | None) -> str:
    """Relative links lead to the repository at ``source``, or are the name of the file where none is known."""
    relative = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z][a-z0-9+.-]*:|#)(?:\./)?([^)\s]+)\)", re.IGNORECASE)
    if source:
        return relative.sub(rf"\1[\2]({source.rstrip('/')}/blob/main/\3)", markdown)
    return relative.sub(r"\2 (`\3`)", markdown)


def _decide(config_settings: Settings | None) -> dict[str, Any]:
    """``config_settings`` with FASTROBUST_CUDA as ON or OFF; sets the local version."""
    global _local
    settings = dict(config_settings or {})
    asked = cuda_asked(settings, os.environ)
    toolkit = "" if asked == "OFF" else toolkit_version(defined("CMAKE_CUDA_COMPILER", settings, os.environ))
    if asked == "ON" and not toolkit:
        raise SystemExit(
            f"{OPTION}=ON but no working CUDA compiler was found; put nvcc on PATH, set CUDACXX, or use AUTO"
        )
    _local = "+cu" + "".join(toolkit.split(".")[:2]) if toolkit else "+cpu"
    settings[f"cmake.define.{OPTION}"] = "ON" if toolkit else "OFF"
    if Path("PKG-INFO").is_file():  # an unpacked source archive
        settings.setdefault("wheel.build-tag", "0" + _local[1:])
        _local = ""
    return settings


def cuda_asked(settings: Settings, environment: Mapping[str, str]) -> str:
    asked = defined(OPTION, settings, environment)
    if asked not in (None, "AUTO", "ON", "OFF"):
        raise SystemExit(f"{OPTION}: got '{asked}', expected AUTO, ON or OFF")
    return asked or "AUTO"


def defined(name: str, settings: Settings, environment: Mapping[str, str]) -> str | None:
    """What CMake's variable is set to, in any of the ways in which scikit-build-core takes it; the strongest comes
    last."""
    given = [environment.get(variable, "") for variable in ("CMAKE_ARGS", "SKBUILD_CMAKE_ARGS")]
    for key in ("cmake.args", "skbuild.cmake.args"):
        value = settings.get(key, "")
        given += [value] if isinstance(value, str) else value
    values = [found[-1] for text in given if (found := re.findall(rf"-D\s*{name}(?::\w+)?=([^\s;]*)", text))]
    values += re.findall(rf"(?:^|;){name}=([^;]*)", environment.get("SKBUILD_CMAKE_DEFINE", ""))
    values += [settings[key] for key in (f"cmake.define.{name}", f"skbuild.cmake.define.{name}") if key in settings]
    return values[-1] if values else None


def toolkit_version(compiler: str | None) -> str:
    """The release of nvcc that CMake will find, if it compiles and links; "" otherwise."""
    nvcc = shutil.which(compiler or os.environ.get("CUDACXX") or "nvcc")
    if nvcc is None:
        return ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text("__global__ void kernel() {}\nint main() { kernel<<<1, 1>>>(); }\n")
        host = ["-ccbin", os.environ["CUDAHOSTCXX"]] if "CUDAHOSTCXX" in os.environ else []
        done = subprocess.run(
            [nvcc, *host, str(source), "-o", str(source.with_suffix(""))], capture_output=True, text=True
        )
        if done.returncode:
            print(f"fastrobust: {nvcc} does not compile, no CUDA kernels are built:\n{done.stdout}{done.stderr}")
            return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    return found[1] if found else ""
