"""Which path a masked convolution takes: a cost model of the sparse kernel and of torch's dense one.

The constants are microseconds on two cores of an AVX-512 server processor, set by hand from measurements like those that
`benchmarks/binary.py` prints. Only ratios matter to the choice, and both sides scale with the vector
width and the clock. FASTROBUST_BINARY=sparse|dense overrides it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os

from ._feature_maps import VECTOR, ConvGeometry, input_maps, segment_channels

LANES = (1, 4, 8, 16)

_CALL = 14.0  # a sparse call: three kernels started from Python
_ADD = 0.125e-3  # one vector of sixteen sums, read from the second cache level
_ADD_SEGMENTED = 0.10e-3  # the same with the lists cut to the first level
_ENTRY = 1.3e-3  # per list entry and tile
_ROW = 8e-3  # per row, tile and segment
_STEP = 2.0  # a sparse convolution among others in one call
_COPY = 0.08e-3  # one float to or from the fast layout
_COPY_ROW = 4e-3  # one row of one image when images are not interleaved
_DENSE_CALL = 9.0
_DENSE_MAC = 4.6e-6
_DENSE_WEIGHT = 0.18e-3  # torch reorders the weight in every call
_PASS = 0.02e-3  # one float of an elementwise pass of torch
_MARGIN = 0.95


@dataclasses.dataclass(frozen=True)
class Choice:
    """path "sparse" or "dense", the images to interleave, and the estimates in microseconds."""

    path: str
    lanes: int
    sparse: float
    dense: float

    @property
    def reason(self) -> str:
        return f"estimated {self.sparse:.0f} us sparse ({self.lanes} lanes), {self.dense:.0f} us dense"


def forced_path() -> str | None:
    """The path named by FASTROBUST_BINARY, None for the cost model."""
    value = os.environ.get("FASTROBUST_BINARY", "")
    if value not in ("", "auto", "sparse", "dense"):
        raise ValueError(f"FASTROBUST_BINARY: expected auto, sparse or dense, got {value!r}")
    return value if value in ("sparse", "dense") else None


@functools.lru_cache(maxsize=4096)
def choose(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry, kept: int,
    forced: str | None,
) -> Choice:  # fmt: skip
    """The path of one call on plain tensors: a convolution of `batch` maps with `kept` weights of `shape`."""
    out_h, out_w = geometry.out_size(shape, height, width)
    channels = shape[1] * geometry.groups
    floats = channels * height * width + shape[0] * out_h * out_w

    def plain(lanes: int) -> float:
        cost = _sparse(batch, height, width, shape, geometry, kept, lanes) + copy(-(-batch // lanes) * lanes * floats)
        if lanes == 1:
            cost += batch * (channels * height + shape[0] * out_h) * _COPY_ROW
        return cost + _CALL

    sparse, lanes = min((plain(lanes), lanes) for lanes in LANES)
    dense = _dense(batch, height, width, shape, geometry)
    return Choice(forced or ("sparse" if sparse < _MARGIN * dense else "dense"), lanes, sparse, dense)


def estimate(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry, kept: int,
    lanes: int,
) -> Choice:  # fmt: skip
    """Both paths inside a network that keeps maps in the form the path reads; the path named is the cheaper one."""
    sparse = _sparse(batch, height, width, shape, geometry, kept, lanes) + _STEP
    dense = _dense(batch, height, width, shape, geometry)
    return Choice("sparse" if sparse < dense else "dense", lanes, sparse, dense)


def copy(floats: int) -> float:
    """Between a plain tensor and the fast layout."""
    return floats * _COPY


def dense_epilogue(floats: int, residual: bool, relu: bool) -> float:
    """What torch does in passes of its own after a convolution."""
    return floats * (2 * residual + relu) * _PASS


def _dense(batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry) -> float:
    out, size = math.prod(geometry.out_size(shape, height, width)), math.prod(shape)
    return _DENSE_CALL + batch * out * size * _DENSE_MAC + size * _DENSE_WEIGHT


def _sparse(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry, kept: int,
    lanes: int,
) -> float:  # fmt: skip
    maps = input_maps(batch, shape[1] * geometry.groups, height, width, shape, geometry, lanes)
    out_h, out_w = geometry.out_size(shape, height, width)
    vectors = math.ceil(((out_h - 1) * maps.pitch + out_w) * lanes / VECTOR)
    segment = segment_channels(kept, shape[0], shape[1])
    segments = math.ceil(shape[1] / segment) if segment else 1
    tiles = math.ceil(vectors / (16 if segments > 1 else 28))
    add = _ADD_SEGMENTED if segments > 1 else _ADD
    if lanes < VECTOR:
        add *= 1.1  # unaligned loads
    return maps.blocks * (kept * (vectors * add + tiles * _ENTRY) / 2 + shape[0] * tiles * segments * _ROW / 2)
