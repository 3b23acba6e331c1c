"""``fastrobust info``: what was built, what is used here and why, and which optional parts are there."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from typing import Any

from .. import build_info, data, nn
from ._common import BadArguments

# distribution: what it gives, and the extra that brings it
EXTRAS = {
    "scikit-learn": ("the digits data and the built-in model of attack and bench", "pip install scikit-learn"),
    "matplotlib": ("pictures of attack, plots of bench", "pip install matplotlib"),
    "torchattacks": ("a peer in the benchmarks", "pip install --no-deps torchattacks"),
    "foolbox": ("a peer in the benchmarks", "pip install foolbox"),
    "adversarial-robustness-toolbox": ("a peer in the benchmarks", "pip install adversarial-robustness-toolbox"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument(
        "--paths",
        nargs=3,
        metavar=("RATE", "GAMMA", "BATCH"),
        help="print instead which path each layer of a pruned ResNet-34 (32x32 images) takes here, and why",
    )


def main(args: argparse.Namespace) -> int:
    if args.paths:
        print(paths(*args.paths))
        return 0
    info = gather()
    print(json.dumps(info, indent=2) if args.json else text(info))
    return 0


def gather() -> dict[str, Any]:
    """build_info() with ``extras`` (version or null) and ``data`` (folder and the archives found in it)."""
    extras = {name: _version(name) for name in EXTRAS}
    folder = data.find_folder()
    found = {name: bool(folder and (folder / file).is_file()) for name, file in data.ARCHIVES.items()}
    return {**build_info(), "extras": extras, "data": {"folder": str(folder) if folder else None, "found": found}}


def paths(rate: str, gamma: str, batch: str) -> str:
    """The path of every masked layer of a ResNet-34 of fixed signs, pruned to 1 - rate."""
    if not batch.isdigit() or int(batch) < 1:
        raise BadArguments(f"--paths: expected a batch of at least 1, got {batch!r}")
    try:
        model = nn.convert(nn.resnet34(), float(rate), float(gamma)).eval()
    except ValueError as error:
        raise BadArguments(f"--paths: {error}") from None
    return nn.freeze(model).report((int(batch), 3, 32, 32))


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def text(info: dict[str, Any]) -> str:
    rows = [
        ("built", f"compiler {info['compiler']}, {_cuda_build(info)}"),
        ("CPU kernels", f"{info['cpu_variant']} in use ({info['cpu_variant_reason']})"),
        ("threads", f"{info['threads']}, run by {info['thread_backend']}"),
        ("GPU", _gpu(info)),
        ("torch", f"{info['torch']}, " + (f"CUDA {info['torch_cuda']}" if info["torch_cuda"] else "no CUDA")),
        ("python", f"{info['python']} on {info['platform']}"),
        ("data", _data(info["data"])),
    ]
    lines = [f"fastrobust {info['version']}", *(f"  {name:<12} {value}" for name, value in rows), "optional parts"]
    width = max(map(len, EXTRAS))
    for name, (gives, install) in EXTRAS.items():
        version = info["extras"][name]
        lines.append(f"  {name:<{width}}  {version or 'missing':<8} {gives}" + ("" if version else f": {install}"))
    return "\n".join(lines)


def _cuda_build(info: dict[str, Any]) -> str:
    if not info["cuda_toolkit"]:
        return "no CUDA kernels"
    return f"CUDA kernels by toolkit {info['cuda_toolkit']} for {', '.join(info['cuda_architectures'])}"


def _gpu(info: dict[str, Any]) -> str:
    if info["devices"]:
        names = ", ".join(map(str, info["devices"]))
        return names if info["torch_cuda"] else f"{names}, not used: this torch has no CUDA"
    return f"none, the CPU kernels serve ({info['device_error'] or 'the driver reports no device'})"


def _data(found: dict[str, Any]) -> str:
    if found["folder"] is None:
        return f"digits (built in); set {data.ENVIRONMENT} to the folder of {' and '.join(data.ARCHIVES.values())} for more"
    parts = [f"{file} {'found' if found['found'][name] else 'missing'}" for name, file in data.ARCHIVES.items()]
    return f"digits (built in); {', '.join(parts)} in {found['folder']}"
