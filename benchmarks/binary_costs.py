"""Fits the constants of the cost model that chooses between sparse and dense convolutions (ops/binary/_conv_cost.py).

    python -m benchmarks.binary_costs [--threads N]

Times the sparse kernels, the copies into and out of the fast layout and torch's dense convolution over layers,
densities and batches, fits each as a sum of non-negative terms by relative least squares, and prints the constants and
how far the fits are off. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastrobust as fr
from fastrobust.ops.binary import _conv_cost as cost
from fastrobust.ops.binary import _feature_maps as fm
from fastrobust.ops.binary import _plain_maps as plain_maps

# channels in and out, kernel, stride, map
SHAPES = (
    (64, 64, 3, 1, 32),
    (128, 128, 3, 1, 16),
    (256, 256, 3, 1, 8),
    (512, 512, 3, 1, 4),
    (3, 64, 3, 1, 32),
    (64, 128, 3, 2, 32),
    (64, 128, 1, 2, 32),
    (256, 512, 1, 2, 8),
    (32, 32, 5, 1, 28),
)
DENSITIES = (0.5, 0.2, 0.1, 0.04, 0.01, 0.002)
SPARSE_BATCHES = ((1, 1), (4, 4), (7, 8), (16, 16), (33, 16))  # and lanes
DENSE_BATCHES = (1, 4, 7, 16, 33)

Sample = tuple[dict[str, float], float, str]


def microseconds(call: Callable[[], Any], repeats: int = 5) -> float:
    call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return 1e6 * sorted(taken)[repeats // 2]


def sparse_samples() -> tuple[list[Sample], list[Sample]]:
    """Of the kernel and of the copies."""
    kernel, copies = [], []
    for channels, out, k, stride, size in SHAPES:
        g, shape = fm.ConvGeometry.of(stride, k // 2), (out, channels, k, k)
        for batch, lanes in SPARSE_BATCHES:
            source = fm.input_maps(batch, channels, size, size, shape, g, lanes)
            target = fm.Maps(batch, out, *g.out_size(shape, size, size), lanes, source.pitch, 0, 0)
            x = torch.randn(batch, channels, size, size)
            y = torch.empty(batch, out, target.height, target.width)
            room = [fm.roomy(m.blocks * m.block + fm.SLACK, x.device).zero_() for m in (source, target)]
            taken = microseconds(partial(fm.to_maps, x, source, room[0]))
            taken += microseconds(partial(fm.from_maps, room[1], target, y))
            copies.append((cost.copy_terms(batch, size, size, shape, g, lanes), taken, f"{shape} {batch} {lanes}"))
            for density in DENSITIES:
                weight = (torch.randint(0, 2, shape) * 2 - 1).float() * (torch.rand(shape) < density)
                packed = fr.ops.pack(weight)
                lists = fm.plan(packed, g, source, False)
                taken = microseconds(partial(fm.gather, room[0], source, target, lists, out=room[1]))
                terms = cost.sparse_terms(batch, size, size, shape, g, packed.kept, lanes)
                kernel.append((terms, taken, f"{shape} {batch} {lanes} {density}"))
    return kernel, copies


def direct_samples() -> list[Sample]:
    """Of the kernel from plain maps to plain maps."""
    found = []
    for channels, out, k, stride, size in SHAPES:
        g, shape = fm.ConvGeometry.of(stride, k // 2), (out, channels, k, k)
        for batch in DENSE_BATCHES:
            x = torch.randn(batch, channels, size, size)
            y = torch.empty(batch, out, *g.out_size(shape, size, size))
            for density in DENSITIES:
                weight = (torch.randint(0, 2, shape) * 2 - 1).float() * (torch.rand(shape) < density)
                packed, program = fr.ops.pack(weight), fm.new_program()
                lists = plain_maps.plan(packed, g, size, size, False)
                program.direct(1 << 56, 2 << 56, lists.bind(batch), 0, 0, 0, False)
                taken = microseconds(partial(program.run, -1, 0, [x.data_ptr(), y.data_ptr()]))
                terms = cost.direct_terms(batch, size, size, shape, g, packed.kept)
                found.append((terms, taken, f"{shape} {batch} {density}"))
    return found


def dense_time(x: Tensor, weight: Tensor, stride: int, memory_format: torch.memory_format) -> float:
    x, weight = (t.contiguous(memory_format=memory_format) for t in (x, weight))
    return microseconds(lambda: F.conv2d(x, weight, None, stride, weight.shape[-1] // 2))


def dense_samples() -> list[Sample]:
    found = []
    for channels, out, k, stride, size in SHAPES:
        g, shape = fm.ConvGeometry.of(stride, k // 2), (out, channels, k, k)
        weight = torch.randn(shape)
        for batch in DENSE_BATCHES:
            x = torch.randn(batch, channels, size, size)
            for layout in (torch.contiguous_format, torch.channels_last):
                terms = cost.dense_terms(batch, size, size, shape, g, plain=layout == torch.contiguous_format)
                found.append((terms, dense_time(x, weight, stride, layout), f"{shape} {batch} {layout}"))
    return found


def fit(samples: list[Sample]) -> dict[str, float]:
    """Least squares of the relative errors; terms that would come out negative are left out."""
    names = list(dict.fromkeys(n for terms, _, _ in samples for n in terms))
    target = torch.ones(len(samples), dtype=torch.float64)
    rows = torch.tensor([[terms.get(n, 0.0) / t for n in names] for terms, t, _ in samples], dtype=torch.float64)
    active = list(range(len(names)))
    while True:
        scale = rows[:, active].norm(dim=0).clamp_min(1e-30)
        found: Tensor = torch.linalg.lstsq(rows[:, active] / scale, target).solution / scale
        if bool((found >= 0).all()):
            break
        active.pop(int((found * scale).argmin()))
    return dict.fromkeys(names, 0.0) | {names[i]: float(v) for i, v in zip(active, found, strict=True)}


def report(title: str, samples: list[Sample], constants: Mapping[str, float]) -> None:
    ratios = sorted((sum(constants[n] * v for n, v in terms.items()) / t, what, t) for terms, t, what in samples)
    print(f"{title} = {{" + ", ".join(f'"{n}": {v:.3g}' for n, v in constants.items()) + "}")
    tenth = len(ratios) // 10
    print(
        f"  estimate / measured: least {ratios[0][0]:.2f}, 10 % {ratios[tenth][0]:.2f}, 90 % "
        f"{ratios[-1 - tenth][0]:.2f}, most {ratios[-1][0]:.2f}"
    )
    for ratio, what, t in (*ratios[:3], *ratios[-3:]):
        print(f"    {ratio:.2f} of {t:.0f} us: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        dense = dense_samples()
        direct = direct_samples()
        kernel, copies = sparse_samples()
    for title, samples in (("SPARSE", kernel), ("COPY", copies), ("DIRECT", direct), ("DENSE", dense)):
        report(title, samples, fit(samples))


if __name__ == "__main__":
    main()
