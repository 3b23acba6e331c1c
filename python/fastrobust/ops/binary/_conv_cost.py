"""Which path a masked convolution takes: a cost model of the sparse kernel and of torch's dense one.

Each estimate is a sum of terms times constants in microseconds, fitted by `python -m benchmarks.binary_costs` on two
cores of an AVX-512 server processor. Only ratios matter to the choice, and both sides scale with the vector width and
the clock. The estimate is fixed, so the same call takes the same path. FASTROBUST_BINARY=sparse|dense overrides it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

from . import _plain_maps as plain_maps
from ._feature_maps import VECTOR, ConvGeometry, grad_maps, input_maps, segment_channels

LANES = (1, 4, 8, 16)
PLAIN = 0  # in the place of lanes: from plain maps to plain maps
# What FASTROBUST_BINARY may force: "plain" and "lanes" are the two sparse kernels.
FORCED = ("sparse", "plain", "lanes", "dense")
# Floats of the fast layout handled at a time: what is read and written again stays in cache.
CHUNK_FLOATS = 1 << 20

# The kernel: `add` a vector of sixteen sums (of lists cut to the first cache level, or in unaligned groups), `entry` a
# list entry of a tile, `row` a row of a tile and segment, `store` a vector of the output.
SPARSE = {
    "start": 3.3,
    "add": 0.172e-3,
    "add segmented": 0.138e-3,
    "add unaligned": 0.169e-3,
    "entry": 0.1e-3,
    "row": 2.2e-3,
    "store": 0.33e-3,
}
# Into and out of the fast layout: `copy` a float in groups of images, `copy far` the same where a group is larger than
# what is done at a time (not fitted: 16 images against 8 of 64 channels on 32x32); without groups `copy single` a
# float, `copy row` a row, `copy phases` a float that goes to the phases of a stride.
COPY = {"copy": 0.12e-3, "copy far": 0.1e-3, "copy single": 0.0, "copy row": 5.4e-3, "copy phases": 1.0e-3}
_COPY_CHANNELS_LAST = 0.25e-3  # a float, which lies in as many lines of cache as there are images
# torch: `mac` a multiplication of a dense convolution (of a kernel of one pixel), `weight` a float of the weight, which
# is reordered in every call, `map` a float read or written, `map reordered` what it costs more where channels are
# outermost. Input gradients, and groups of channels, are computed for multiples of sixteen channels.
DENSE = {"start": 20.0, "mac": 4.7e-6, "mac 1x1": 4.9e-6, "weight": 0.175e-3, "map": 0.06e-3, "map reordered": 0.2e-3}
# From plain maps to plain maps: as SPARSE, `add masked` where borders are masks, `add lines` where only those of the
# first and the last line of a tile differ from the others, `phase` a float of the phases of a stride.
DIRECT = {
    "start": 1.5,
    "add": 0.15e-3,
    "add masked": 0.29e-3,
    "add lines": 0.245e-3,
    "entry": 0.2e-3,
    "row": 5.8e-3,
    "store": 0.1e-3,
    "phase": 0.13e-3,
}
# By which a multiplication lengthens an addition (not fitted: where sixteen images lie side by side the loads are
# aligned and cheaper, so that it shows more).
_VALUED = {
    "add": 1.45,
    "add segmented": 1.45,
    "add unaligned": 1.3,
    "add masked": 1.15,
    "add lines": 1.15,
}
_DIRECT_CALL = 4.0  # a call from Python by itself
_DIRECT_MARGIN = 0.85  # see _MARGIN
_COPIED = 1.05  # the factor by which copies that are not in cache lengthen calls on lanes in the mean
_CALL = 6.0  # a sparse call from Python by itself, beyond its three kernels
_STEP = 2.0  # a kernel among others in one call
_PASS = 0.02e-3  # one float of an elementwise pass of torch
_LANES_PASS = 0.03e-3  # the same of a copy or pooling in the fast layout
_TORCH = 3.0  # a call of a small operation of torch from a schedule
GROUP = 8.0  # a group of images by itself
# The sparse path is taken where it is expected to win by more than the estimates err: copies of maps that are not in
# cache and a memory shared with others take half as long again.
_MARGIN = 0.65


@dataclasses.dataclass(frozen=True)
class Choice:
    """path "sparse" or "dense", the images to interleave, and the estimates in microseconds."""

    path: str
    lanes: int
    sparse: float
    dense: float

    @property
    def reason(self) -> str:
        if math.isinf(self.sparse):
            return f"done by torch, estimated {self.dense:.0f} us"
        how = "plain maps" if self.lanes == PLAIN else f"{self.lanes} lanes"
        return f"estimated {self.sparse:.0f} us sparse ({how}), {self.dense:.0f} us dense"


_VARIABLE = "FASTROBUST_BINARY"


def _reader() -> Callable[[], Any]:
    """What `os.environ` holds for the variable, past the decoding, which takes a microsecond."""
    try:
        kept, name = os.environ._data, os.environ.encodekey(_VARIABLE)  # type: ignore[attr-defined]
        kept.get(name)
    except (AttributeError, TypeError):
        return functools.partial(os.environ.get, _VARIABLE)
    return functools.partial(kept.get, name)


# FASTROBUST_BINARY as it is kept: equal when nothing changed.
variable = _reader()


def forced_path() -> str | None:
    """The path named by FASTROBUST_BINARY, None for the cost model."""
    if variable() is None:
        return None
    value = os.environ.get(_VARIABLE, "")
    if value not in ("", "auto", *FORCED):
        raise ValueError(f"{_VARIABLE}: expected auto, {', '.join(FORCED[:-1])} or {FORCED[-1]}, got {value!r}")
    return value if value in FORCED else None


@functools.lru_cache(maxsize=4096)
def choose(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry, kept: int,
    forced: str | None, transposed: bool = False, plain: bool = False, valued: bool = False,
) -> Choice:  # fmt: skip
    """The path of one call on plain tensors: a convolution of `batch` maps with `kept` weights of `shape`, or its input
    gradient. plain: what is read is contiguous and on the CPU; valued: the weights are not just signs."""

    def through_lanes(lanes: int) -> float:
        kernel = _sum(SPARSE, sparse_terms(batch, height, width, shape, geometry, kept, lanes, transposed), valued)
        return kernel + _sum(COPY, copy_terms(batch, height, width, shape, geometry, lanes)) + _CALL

    direct = math.inf
    if plain and forced != "lanes" and plain_maps.fits(height, width, shape, geometry, transposed):
        terms = direct_terms(batch, height, width, shape, geometry, kept, transposed)
        direct = _sum(DIRECT, terms, valued) + _DIRECT_CALL
    sparse, lanes = min((through_lanes(lanes), lanes) for lanes in LANES)
    dense = _sum(DENSE, dense_terms(batch, height, width, shape, geometry, transposed, plain))
    if direct < _COPIED * sparse or forced == "plain" and direct < math.inf:
        sparse, lanes, margin = direct, PLAIN, _DIRECT_MARGIN
    else:
        margin = _MARGIN
    path = ("dense" if forced == "dense" else "sparse") if forced else "sparse" if sparse < margin * dense else "dense"
    return Choice(path, lanes, sparse, dense)


def estimate(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry, kept: int,
    lanes: int, valued: bool = False, conv: bool = True,
) -> Choice:  # fmt: skip
    """Both paths inside a network that keeps maps in the form the path reads; the path named is the cheaper one.

    Of a forward and an input gradient together, so that both take the same path and the outputs do not depend on
    whether a gradient is wanted. conv: torch runs it as a convolution, and not as passes over the maps.
    """
    sparse = dense = 0.0
    for transposed in (False, True):
        terms = sparse_terms(batch, height, width, shape, geometry, kept, lanes, transposed)
        sparse += _sum(SPARSE, terms, valued) + _STEP
        if conv:
            dense += _sum(DENSE, dense_terms(batch, height, width, shape, geometry, transposed))
    if not conv:
        floats = batch * shape[0] * (height * width + math.prod(geometry.out_size(shape, height, width)))
        dense = 2 * (_TORCH + floats * _PASS)
    return Choice("sparse" if sparse < dense else "dense", lanes, sparse, dense)


def copy(floats: int) -> float:
    """Between a plain tensor, channels last, and the fast layout."""
    return _STEP + floats * _COPY_CHANNELS_LAST


def passes(floats: int, lanes: int) -> Choice:
    """A forward and a gradient of something that reads and writes so many floats."""
    return Choice("sparse", lanes, 2 * (_STEP + floats * _LANES_PASS), 2 * (_TORCH + floats * _PASS))


def dense_epilogue(floats: int, residual: bool, relu: bool) -> float:
    """What torch does in passes of its own after a convolution."""
    return floats * (2 * residual + relu) * _PASS


def _sum(constants: Mapping[str, float], terms: Mapping[str, float], valued: bool = False) -> float:
    return sum(constants[name] * value * (_VALUED.get(name, 1.0) if valued else 1.0) for name, value in terms.items())


def dense_terms(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry,
    transposed: bool = False, plain: bool = False,
) -> dict[str, float]:  # fmt: skip
    out, size = math.prod(geometry.out_size(shape, height, width)), math.prod(shape)
    single = geometry.groups > 1 and shape[1] == 1  # channels by themselves have a kernel of their own
    padded = shape[1] and not single and (transposed or geometry.groups > 1)
    computed = size * (-(-shape[1] // VECTOR) * VECTOR) / shape[1] if padded else size
    maps = float(batch * (shape[1] * geometry.groups * height * width + shape[0] * out))
    return {
        "start": 1.0,
        "mac" if shape[2] * shape[3] > 1 else "mac 1x1": float(batch * out * computed),
        "weight": float(size),
        "map": maps,
        "map reordered": maps if plain else 0.0,
    }


def copy_terms(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry, lanes: int
) -> dict[str, float]:
    out_h, out_w = geometry.out_size(shape, height, width)
    rows = shape[1] * geometry.groups * height + shape[0] * out_h
    floats = shape[1] * geometry.groups * height * width + shape[0] * out_h * out_w
    images = -(-batch // lanes) * lanes
    if lanes == 1:
        strided = geometry.stride != (1, 1)
        phased = shape[1] * geometry.groups * height * width if strided else 0
        return {
            "copy single": float(batch * floats), "copy row": float(batch * rows), "copy phases": float(batch * phased)
        }  # fmt: skip
    group = lanes * max(shape[1] * geometry.groups * height * width, shape[0] * out_h * out_w)
    return {"copy": float(images * floats), "copy far": float(images * floats) if group >= CHUNK_FLOATS else 0.0}


def direct_terms(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry, kept: int,
    transposed: bool = False,
) -> dict[str, float]:  # fmt: skip
    rows = shape[1] * geometry.groups if transposed else shape[0]
    pixels = height * width if transposed else math.prod(geometry.out_size(shape, height, width))
    vectors = -(-pixels // VECTOR)
    together = 1  # maps of a tile, where one does not fill it
    while together < 8 and 2 * together * vectors <= VECTOR and 2 * together <= batch:
        together *= 2
    tiles = (batch // together + (batch % together).bit_count()) * -(-vectors // VECTOR)
    masked = shape[2] * shape[3] > 1 or geometry.padding != (0, 0) or pixels % VECTOR > 0
    wide = width if transposed else geometry.out_size(shape, height, width)[1]
    padding, stride = geometry.padding[0], geometry.stride[0]
    near = -padding // stride >= -1 and (geometry.dilation[0] * (shape[2] - 1) - padding) // stride <= 1
    lines = near and wide in (VECTOR, 2 * VECTOR) and vectors % VECTOR == 0
    phases = min(math.prod(geometry.stride), shape[2] * shape[3]) if geometry.stride != (1, 1) else 0
    phase = -(-height // geometry.stride[0]) * -(-width // geometry.stride[1])
    return {
        "start": 1.0,
        "add" if not masked else "add lines" if lines else "add masked": float(batch * kept * vectors),
        "entry": float(tiles * kept),
        "row": float(tiles * rows),
        "store": float(batch * rows * vectors),
        "phase": float(batch * shape[1] * geometry.groups * phases * phase),
    }


def sparse_terms(
    batch: int, height: int, width: int, shape: tuple[int, int, int, int], geometry: ConvGeometry, kept: int,
    lanes: int, transposed: bool = False,
) -> dict[str, float]:  # fmt: skip
    if transposed:
        maps, written = grad_maps(batch, height, width, shape, geometry, lanes)
        rows, read = written.channels * math.prod(written.phases), shape[0] // geometry.groups
        out_h, out_w = written.phase_size
    else:
        maps = input_maps(batch, shape[1] * geometry.groups, height, width, shape, geometry, lanes)
        rows, read = shape[0], shape[1]
        out_h, out_w = geometry.out_size(shape, height, width)
    segment = segment_channels(kept, rows, read)
    segments = math.ceil(read / segment) if segment else 1
    if lanes == VECTOR:  # patches of pixels, a vector each
        vectors = out_h * out_w
        tiles = math.ceil(vectors / (16 if segments > 1 else 24))
    else:
        vectors = math.ceil(((out_h - 1) * maps.pitch + out_w) * lanes / VECTOR)
        tiles = math.ceil(vectors / (16 if segments > 1 else 28))
    add = "add unaligned" if lanes < VECTOR else "add segmented" if segments > 1 else "add"
    return {
        "start": 1.0,
        add: float(maps.blocks * kept * vectors),
        "entry": float(maps.blocks * kept * tiles),
        "row": float(maps.blocks * rows * tiles * segments),
        "store": float(maps.blocks * rows * vectors),
    }
