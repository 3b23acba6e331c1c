"""The build backend, and what the built module shows to the linker and says of itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

import fastrobust

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def backend() -> ModuleType:
    pytest.importorskip("scikit_build_core", reason="the backend is built on scikit-build-core")
    spec = importlib.util.spec_from_file_location("fastrobust_build", ROOT / "python" / "fastrobust_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_says_what_is_compiled_in(backend: ModuleType) -> None:
    public = backend.public_version((ROOT / "python" / "fastrobust" / "_version.py").read_text())
    toolkit = fastrobust.build_info()["cuda_toolkit"]
    kind = "cpu" if toolkit in ("", "emulated") else "cu" + "".join(toolkit.split(".")[:2])
    assert fastrobust.__version__ in (public, f"{public}+{kind}")  # no local part: built from a source archive
    assert fastrobust.__version__ == fastrobust.build_info()["version"]


def test_metadata_is_of_the_module() -> None:
    try:
        installed = importlib.metadata.distribution("fastrobust")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed: run from the checkout")
    assert installed.version == fastrobust.__version__


def test_another_versions_module_is_refused(tmp_path: Path) -> None:
    package = tmp_path / "fastrobust"
    shutil.copytree(
        Path(fastrobust.__file__).parent, package, ignore=shutil.ignore_patterns("benchmarks", "__pycache__")
    )
    (package / "_version.py").write_text('__version__ = "7.0.0"\n')
    done = subprocess.run([sys.executable, "-c", "import fastrobust"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"fastrobust 7.0.0 found a compiled module of version {fastrobust.__version__}" in done.stderr


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("nm") is None, reason="needs Linux and binutils")
def test_module_exports_its_entry_alone() -> None:
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", fastrobust._C.__file__], capture_output=True, text=True, check=True
    )
    assert [line.split()[-1] for line in listed.stdout.splitlines()] == ["PyInit__C"]


@pytest.mark.parametrize("text", ['__version__ = "1.2.3+cpu"\n', "version = 3\n", ""])
def test_home_of_the_version_has_no_local_part(backend: ModuleType, text: str) -> None:
    with pytest.raises(ValueError, match="without a local part"):
        backend.public_version(text)
    assert backend.public_version('__version__ = "1.2.3rc1"\n') == "1.2.3rc1"


@pytest.mark.parametrize(
    ("settings", "environment", "asked"),
    [
        ({}, {}, "AUTO"),
        ({"cmake.define.FASTROBUST_CUDA": "OFF"}, {}, "OFF"),
        ({"skbuild.cmake.define.FASTROBUST_CUDA": "ON"}, {}, "ON"),
        ({"cmake.args": ["-DOTHER=1", "-DFASTROBUST_CUDA:STRING=OFF"]}, {}, "OFF"),
        ({"cmake.args": "-DFASTROBUST_CUDA=OFF"}, {}, "OFF"),
        ({}, {"SKBUILD_CMAKE_DEFINE": "FASTROBUST_WERROR=ON;FASTROBUST_CUDA=OFF"}, "OFF"),
        ({}, {"SKBUILD_CMAKE_DEFINE": "NOT_FASTROBUST_CUDA=OFF"}, "AUTO"),
        ({}, {"CMAKE_ARGS": "-DFASTROBUST_CUDA=ON -DFASTROBUST_CUDA=OFF"}, "OFF"),
        ({}, {"SKBUILD_CMAKE_ARGS": "-GNinja;-DFASTROBUST_CUDA=ON;-DX=2"}, "ON"),
        ({"cmake.define.FASTROBUST_CUDA": "ON"}, {"SKBUILD_CMAKE_DEFINE": "FASTROBUST_CUDA=OFF"}, "ON"),
    ],
)
def test_option_is_read_as_cmake_gets_it(
    backend: ModuleType, settings: dict[str, str | list[str]], environment: dict[str, str], asked: str
) -> None:
    assert backend.cuda_asked(settings, environment) == asked


@pytest.mark.parametrize("value", ["off", "1", ""])
def test_other_values_are_refused(backend: ModuleType, value: str) -> None:
    with pytest.raises(SystemExit, match=rf"^FASTROBUST_CUDA: got '{value}', expected AUTO, ON or OFF$"):
        backend.cuda_asked({"cmake.define.FASTROBUST_CUDA": value}, {})


@pytest.mark.parametrize("works", [True, False])
def test_a_compiler_counts_only_if_it_works(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(
        f'#!/bin/sh\n[ "$1" != --version ] && exit {0 if works else 1}\necho "Cuda compilation tools, release 12.9, V12.9.86"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.chdir(tmp_path)  # no PKG-INFO here
    for asked in ("AUTO", "ON"):
        if asked == "ON" and not works:
            with pytest.raises(SystemExit, match="FASTROBUST_CUDA=ON but no working CUDA compiler"):
                backend._decide({"cmake.define.FASTROBUST_CUDA": asked})
            continue
        decided = backend._decide({"cmake.define.FASTROBUST_CUDA": asked})
        assert decided == {"cmake.define.FASTROBUST_CUDA": "ON" if works else "OFF"}
        assert backend._local == ("+cu129" if works else "+cpu")
    assert backend._decide({"cmake.define.FASTROBUST_CUDA": "OFF"}) == {"cmake.define.FASTROBUST_CUDA": "OFF"}
    assert backend._local == "+cpu"
    # From a source archive: the version of its name, and the build tag says the rest.
    (tmp_path / "PKG-INFO").touch()
    decided = backend._decide(None)
    assert backend._local == "" and decided["wheel.build-tag"] == ("0cu129" if works else "0cpu")


def test_links_of_the_readme_lead_somewhere_on_an_index(backend: ModuleType) -> None:
    text = "[ops](docs/ops.md) ![p](./p.png) [a](#b) [w](https://w.org/x) [m](mailto:a@b.c) [l](docs/c.md#part)"
    kept = "[a](#b) [w](https://w.org/x) [m](mailto:a@b.c)"
    assert backend.absolute_links(text, None) == f"ops (`docs/ops.md`) p (`p.png`) {kept} l (`docs/c.md#part`)"
    base = "https://host.org/p/blob/main"
    assert backend.absolute_links(text, "https://host.org/p/") == (
        f"[ops]({base}/docs/ops.md) ![p]({base}/p.png) {kept} [l]({base}/docs/c.md#part)"
    )
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"\]\(docs/", readme)  # relative in the repository
    for source in (None, "https://host.org/p"):
        for link in re.findall(r"\]\(([^)]*)\)", backend.absolute_links(readme, source)):
            assert re.match(r"https?://|#|mailto:", link), link


def test_source_archive(backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(sys.modules, "fastrobust_build", backend)  # what pyproject.toml names is this one
    public = backend.public_version(Path("python/fastrobust/_version.py").read_text())
    assert backend.build_sdist(str(tmp_path)) == f"fastrobust-{public}.tar.gz"
    with tarfile.open(tmp_path / f"fastrobust-{public}.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        about = archive.extractfile(f"fastrobust-{public}/PKG-INFO")
        assert about is not None
        metadata = about.read().decode()
    assert {"CMakeLists.txt", "python/fastrobust_build.py", "csrc/runtime/portable.cmake", "docs/ops.md"} <= names
    assert not [name for name in names if "/results/" in name or name.startswith(("build/", ".dev", ".venv"))]
    assert f"\nVersion: {public}\n" in metadata
    assert not re.findall(r"\]\((?!https?://|#|mailto:)", metadata)
