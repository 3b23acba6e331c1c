"""What a wheel and the source archive hold, and that what was installed of them runs.

    check_wheel.py WHEEL [--sdist SDIST] [--installed VENV] [--beside PYTHON ...]

VENV: where the wheel is installed (default: the environment of this interpreter). PYTHON: interpreters with a torch of
their own, an older one for example; the wheel is unpacked for each and run there, too.
"""

import argparse
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
MOST_BYTES = 20e6
# What CMakeLists.txt builds where nobody says otherwise and there is no GPU; the last has PTX, too. CUDA 12 before 12.8
# knows less.
ARCHITECTURES = "75-real,80-real,86-real,89-real,90-real,100-real,120"
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
info = fr.build_info()
if info["cuda_toolkit"] and not torch.cuda.is_available():  # a launch without a GPU is an error that can be caught
    from fastrobust import _C
    devices, why = _C.cuda_devices()
    assert not devices and why, (devices, why)
print("".join(info["cuda_toolkit"].split(".")[:2]), ",".join(info["cuda_architectures"]), torch.__version__)
"""


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_module(module: Path) -> None:
    exported = [line.split()[-1] for line in output("nm", "-D", "--defined-only", module).splitlines()]
    assert exported == ["PyInit__C"], f"exported: got {exported}, expected PyInit__C alone"
    needed = set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "-d", module)))
    needed = {name for name in needed if not name.startswith("ld-linux")}
    for kind, pattern in (("torch", "torch|c10"), ("OpenMP", "gomp|omp5|iomp"), ("CUDA", "cuda|cublas|nv")):
        linked = [name for name in needed if re.search(pattern, name)]
        assert not linked, f"{kind}: got {linked}, expected that it is found at run time or linked statically"
    assert needed <= SYSTEM, f"libraries: got {sorted(needed - SYSTEM)} beside the system's own"
    weak = [line for line in output("nm", "-D", module).splitlines() if re.search(r" [WVu] ", line)]
    assert not weak, f"weak symbols that another module's could take the place of: {weak}"
    versions = {}
    for name, version in re.findall(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", output("readelf", "-V", module)):
        versions[name] = max(versions.get(name, (0,)), tuple(map(int, version.split("."))))
    print("youngest symbols:", ", ".join(f"{name}_{'.'.join(map(str, v))}" for name, v in sorted(versions.items())))


def check_wheel(wheel: Path) -> tuple[str, str]:
    """The version in the file's name and what it holds, "cpu" or "cu130", once all its parts are as they should be."""
    _, version, *built, _, _, platform = wheel.stem.split("-")
    assert "manylinux_2_28_" in platform, f"tag: got {platform}"
    # of a source archive: without a local version, which an index refuses; the build tag says what it holds
    kind = f"{version.partition('+')[0]}+{built[0].removeprefix('0')}" if built else version
    assert re.fullmatch(r"[\d.]+(\w+\d+)?\+(cpu|cu\d+)", kind), f"version: got {kind}, expected +cpu or +cuNNN"
    size = wheel.stat().st_size
    assert size < MOST_BYTES, f"size: got {size / 1e6:.1f} MB, expected less than {MOST_BYTES / 1e6:.0f}"
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
    return version, kind.partition("+")[2]


def check_archive(archive: Path, version: str) -> None:
    assert archive.name == f"fastrobust-{version.partition('+')[0]}.tar.gz", archive.name
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"CMakeLists.txt", "python/fastrobust_build.py", "csrc/runtime/portable.cmake", "README.md"} <= names
    left = [name for name in names if re.match(r"build/|dist/|benchmarks/results/|\.venv|CHANGELOG\.d/", name)]
    assert not left, left


def check_run(python: Path, folder: Path, version: str, kind: str, path: str | None = None) -> None:
    """The package in ``folder`` runs with that interpreter; ``path``: what PYTHONPATH has to be for it."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": path} if path else {})
    with tempfile.TemporaryDirectory() as away:  # from the checkout
        run = lambda *command: (
            subprocess.run(command, check=True, cwd=away, env=environment, stdout=subprocess.PIPE, text=True).stdout
        )
        toolkit, architectures, torch = run(python, "-c", RUN, str(folder), version).rstrip("\n").split(" ")
        assert kind == (f"cu{toolkit}" if toolkit else "cpu"), (version, kind, toolkit)
        expected = os.environ.get("CUDAARCHS", "").replace(";", ",") or ARCHITECTURES
        assert not toolkit or architectures == expected, f"architectures: got {architectures}, expected {expected}"
        assert run(python, "-m", "fastrobust", "--version").strip() == f"fastrobust {version}"
        assert version in run(python, "-m", "fastrobust", "info")
        if path is None:
            assert run(python.parent / "fastrobust", "--version").strip() == f"fastrobust {version}"
    print(f"runs with torch {torch}{' and CUDA ' + toolkit + ' for ' + architectures if toolkit else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--sdist", type=Path)
    parser.add_argument("--installed", type=Path, default=Path(sys.prefix))
    parser.add_argument("--beside", type=Path, nargs="*", default=[], metavar="PYTHON")
    args = parser.parse_args()
    version, kind = check_wheel(args.wheel)
    if args.sdist is not None:
        check_archive(args.sdist, version)
    venv = args.installed.absolute()
    check_run(venv / "bin" / "python", venv, version, kind)
    for python in args.beside:
        with tempfile.TemporaryDirectory() as folder:
            with zipfile.ZipFile(args.wheel) as archive:
                archive.extractall(folder)
            check_run(python.absolute(), Path(folder), version, kind, path=folder)
    for file in (args.wheel, args.sdist):
        if file is not None:
            print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB, ok")


if __name__ == "__main__":
    main()
