"""check_wheel.py WHEEL SDIST VENV: what the wheel and the source archive hold, and that VENV runs what was installed there."""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

# The system's own, which every manylinux_2_28 has; torch and CUDA are found at run time or linked statically.
SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "librt.so.1", "libstdc++.so.6", "libgcc_s.so.1"}
KINDS = (
    r"\.(py|pyi)$|/py\.typed$|/_C\.[\w-]+\.so$|\.dist-info/(METADATA|WHEEL|RECORD|entry_points\.txt|licenses/LICENSE)$"
)
RUN = """
import importlib.metadata, sys
import torch, fastrobust as fr
assert fr.__file__.startswith(sys.argv[1]), fr.__file__
assert fr.__version__ == importlib.metadata.version("fastrobust") == fr.build_info()["version"] == sys.argv[2], fr.__version__
x = torch.full((2, 3), 0.5)
step = fr.ops.pgd_step(x, x, torch.tensor([[1.0, -1.0, 0.0]] * 2), step_size=0.25, eps=0.125)
assert step.tolist() == [[0.625, 0.375, 0.5]] * 2, step
print("".join(fr.build_info()["cuda_toolkit"].split(".")[:2]))
"""


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_module(module: Path) -> None:
    exported = [line.split()[-1] for line in output("nm", "-D", "--defined-only", module).splitlines()]
    assert exported == ["PyInit__C"], f"exported: got {exported}, expected PyInit__C alone"
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", module)))
    needed = {name for name in needed if not name.startswith("ld-linux")}
    assert needed <= SYSTEM, f"libraries: got {sorted(needed - SYSTEM)} beside the system's own"
    versions = {}
    for name, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", output("readelf", "-V", module)):
        versions[name] = max(versions.get(name, (0,)), tuple(map(int, version.split("."))))
    print("youngest symbols:", ", ".join(f"{name}_{'.'.join(map(str, v))}" for name, v in sorted(versions.items())))


def check_wheel(wheel: Path) -> str:
    """The version in the file's name, once all its parts are as they should be."""
    _, version, _, _, platform = wheel.stem.split("-")
    assert "manylinux_2_28_" in platform, f"tag: got {platform}"
    assert re.fullmatch(r"[\d.]+(\w+\d+)?\+(cpu|cu\d+)", version), f"version: got {version}, expected +cpu or +cuNNN"
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        others = [name for name in names if not re.search(KINDS, name) or "/results/" in name]
        assert not others, f"files: {others}"
        recorded = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/RECORD"))
        assert {line.rsplit(",", 2)[0] for line in recorded.splitlines()} == set(names), (
            "RECORD is not the list of files"
        )
        metadata = next(archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
        assert f"\nVersion: {version}\n" in metadata
        relative = re.findall(r"\]\((?!https?://|#|mailto:)[^)]*\)", metadata)
        assert not relative, f"links that lead nowhere on an index: {relative}"
        with tempfile.TemporaryDirectory() as folder:
            (module,) = (name for name in names if name.endswith(".so"))
            check_module(Path(archive.extract(module, folder)))
    return version


def check_archive(archive: Path, version: str) -> None:
    assert archive.name == f"fastrobust-{version.partition('+')[0]}.tar.gz", archive.name
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"CMakeLists.txt", "python/fastrobust_build.py", "csrc/runtime/portable.cmake", "README.md"} <= names
    left = [name for name in names if re.match(r"build/|dist/|benchmarks/results/|\.venv|CHANGELOG\.d/", name)]
    assert not left, left


def main(wheel: str, archive: str, venv: str) -> None:
    version = check_wheel(Path(wheel))
    check_archive(Path(archive), version)
    binaries = Path(venv).absolute() / "bin"
    with tempfile.TemporaryDirectory() as folder:  # away from the checkout
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        run = lambda *command: (
            subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True).stdout
        )
        toolkit = run(binaries / "python", "-c", RUN, str(binaries.parent), version).strip()
        assert version.endswith(f"+cu{toolkit}" if toolkit else "+cpu"), (version, toolkit)
        assert run(binaries / "fastrobust", "--version").strip() == f"fastrobust {version}"
        assert version in run(binaries / "fastrobust", "info")
    for file in (wheel, archive):
        print(f"{Path(file).name}: {Path(file).stat().st_size / 1e6:.1f} MB, ok")


if __name__ == "__main__":
    main(*sys.argv[1:])
